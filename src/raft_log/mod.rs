//! The raft log on disk: votes, terms and entries, in the order in which they were persisted.
//!
//! A vote, a term or an acknowledged entry is a promise to the other members, so it must survive a power failure. Everything
//! that one iteration of raft must persist is one [`Group`]. A group is one write, one checksum and one sync; after a crash it is
//! there either completely or not at all.
//!
//! ```text
//! raft thread ──Group──▶ LogStore::write ──▶ LogStore::sync ──▶ "persisted n", acknowledgements
//!      │
//!      └── entries ──▶ MemoryLog: what raft reads
//! ```
//!
//! There are two stores. [`SegmentLog`] is the real one, on files. [`simulated_log::VolatileLog`] keeps groups in memory and
//! drops unsynced ones on [`crash`](simulated_log::VolatileLog::crash), for the single-threaded simulation. In tests,
//! [`fault_files::LossyFiles`] can replace the operating system below the real one, and simulate a power failure at any operation.
//!
//! Why a file format of our own: overwriting a preallocated file and syncing it costs a fraction of what a growing file or a
//! general-purpose store costs. And only a format in which each group proves that the one before it was synced can distinguish a
//! torn write (harmless: nothing in it was acknowledged) from corruption of synced data (which must never be truncated silently).
//!
//! INVARIANTS
//! * A group is written only after the group before it was synced.
//! * Indexes are contiguous from the truncation point on; entries at or below the last index supersede the tail.
//! * The truncation point, the hard state and an unfinished snapshot install survive every truncation.
//! * After the first error of a write or a sync the log refuses all further operations: a sync is never retried, because the
//!   operating system may report success the next time without having written the data.

#![allow(clippy::missing_errors_doc, reason = "a `Halt` says what failed, and each failure is final")]
#![allow(clippy::missing_panics_doc, reason = "what panics is a bug of ours, and its message says which")]

pub mod fault_files;
pub mod files;
pub mod memory;
pub mod segment;
pub mod simulated_log;

mod contents;
mod direct_io;
mod format;
mod handle;
mod location;
mod recovery;
mod segment_pool;

use std::fmt;

use raft::eraftpb::{Entry, HardState};

use crate::error::Halt;
pub use contents::{Recovered, TornTail};
pub use handle::FileSystem;
pub use location::LogLocation;
pub use memory::MemoryLog;
pub use segment::SegmentLog;

/// A position in the log: an index and the term of the entry there.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The index of the entry, or 0 for the position before the first one.
    pub index: u64,
    /// The term of the entry.
    pub term: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "index {} of term {}", self.index, self.term)
    }
}

/// The cluster and member that a log belongs to. It is written into every segment, so that files of different members cannot be
/// mixed up.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster_id: u64,
    /// This member.
    pub member_id: u64,
}

/// What one write makes durable, atomically.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Group {
    /// New entries, contiguous; from the first one's index on they supersede what the log holds.
    pub entries: Vec<Entry>,
    /// The newest term, vote and commit index, if they changed.
    pub hard_state: Option<HardState>,
}

impl Group {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.hard_state.is_none()
    }

    /// Merges a later group into this one, so that both become one write: its entries supersede those of this one where they
    /// overlap.
    pub fn absorb(&mut self, later: Self) {
        if let Some(first) = later.entries.first() {
            let kept = self.entries.partition_point(|entry| entry.index < first.index);
            self.entries.truncate(kept);
            let next = self.entries.last().map_or(first.index, |last| last.index + 1);
            assert_eq!(first.index, next, "entries follow one another without gaps");
        }
        self.entries.extend(later.entries);
        self.hard_state = later.hard_state.or(self.hard_state.take());
    }
}

/// Stores groups durably. It has one owner, which writes; opening a store returns its content as [`Recovered`].
///
/// Any `Err` is final: the store refuses all further calls, and the process should exit.
pub trait LogStore: Send {
    /// Writes a group, which is durable only after [`sync`](Self::sync); returns the number of bytes written. Writing and
    /// syncing are separate so that the caller can measure each.
    fn write(&mut self, group: &Group) -> Result<u64, Halt>;

    /// Makes the written group durable. Must be called after each [`write`](Self::write).
    fn sync(&mut self) -> Result<(), Halt>;

    /// Removes all entries up to and including `at`, which becomes the truncation point; durable when this returns. Does nothing
    /// if `at` is not above the current truncation point.
    fn truncate(&mut self, at: Position) -> Result<(), Halt>;

    /// Records that the database is about to be replaced by the snapshot at this position or, with None, that the install was
    /// cancelled; durable when this returns.
    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt>;

    /// Resets the log after a snapshot was installed: no entries, the truncation point at `at`, no install in progress. All of
    /// it is one group, durable when this returns.
    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt>;

    /// The space that the log takes on disk.
    fn size_bytes(&self) -> u64;

    /// Writes and syncs a group.
    fn append(&mut self, group: &Group) -> Result<(), Halt> {
        self.write(group)?;
        self.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(first: u64, last: u64, term: u64, commit: Option<u64>) -> Group {
        Group {
            entries: (first..=last).map(|index| Entry { index, term, ..Entry::default() }).collect(),
            hard_state: commit.map(|commit| HardState { term, commit, ..HardState::default() }),
        }
    }

    #[test]
    fn merging_groups_gives_what_the_log_would_hold_after_writing_both() {
        let mut group_of_both = group(4, 8, 1, Some(3));
        group_of_both.absorb(group(9, 9, 1, None));
        group_of_both.absorb(group(7, 7, 2, Some(5)));
        let entries: Vec<_> = group_of_both.entries.iter().map(|entry| (entry.index, entry.term)).collect();
        assert_eq!(entries, [(4, 1), (5, 1), (6, 1), (7, 2)]);
        assert_eq!(group_of_both.hard_state, group(7, 7, 2, Some(5)).hard_state);
        group_of_both.absorb(group(2, 3, 3, None));
        assert_eq!(group_of_both.entries.len(), 2, "a tail that begins before the group replaces all of it");
    }
}
