//! The raft log: what this member promised, in the order in which it promised it.
//!
//! A vote, a term, an acknowledged entry are promises to the other members, so they must outlive a power cut. All that one
//! turn of raft wants kept is one [`Group`]; a group is one write, one checksum and one sync, and it is there afterwards
//! either whole or not at all.
//!
//! ```text
//! raft thread ──Group──▶ LogStore::write ──▶ LogStore::sync ──▶ "persisted n", acknowledgements
//!      │
//!      └── entries ──▶ MemoryLog: what raft itself reads back
//! ```
//!
//! Three stores keep groups. [`SegmentLog`] is the real one, on files. [`volatile::VolatileLog`] keeps them in memory and
//! forgets on [`crash`](volatile::VolatileLog::crash) what was not synced, for the single-threaded simulation. Under the
//! real one, [`lossy::LossyFiles`] can take the place of the operating system and lose power at any step.
//!
//! Why files of our own: overwriting a file that is already full of bytes and syncing it costs a fraction of what a growing
//! file or a general-purpose store costs, and only a format whose groups prove one another can tell a write that the power
//! cut tore (harmless: nobody was promised anything) from damage to what was promised (never to be cut off in silence).
//!
//! INVARIANTS
//! * A group is written only after the group before it was synced.
//! * Indexes are contiguous from the truncation point on; entries at or below the last index supersede the tail.
//! * The truncation point, the hard state and an unfinished snapshot install survive every cut.
//! * After the first error of a write or a sync the log refuses everything: a sync is never tried again, because the
//!   operating system may report success next time without having written.

#![allow(clippy::missing_errors_doc, reason = "a `Halt` says what failed, and each failure is final")]
#![allow(clippy::missing_panics_doc, reason = "what panics is a bug of ours, and its message says which")]

pub mod files;
pub mod lossy;
pub mod memory;
pub mod segment;
pub mod volatile;

mod contents;
mod direct;
mod format;
mod handle;
mod recovery;
mod spares;

use std::fmt;

use raft::eraftpb::{Entry, HardState};

use crate::error::Halt;
pub use contents::{Recovered, TornTail};
pub use handle::FileSystem;
pub use memory::MemoryLog;
pub use segment::{Place, SegmentLog};

/// A place in the log: an index and the term of the entry there.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Index of the entry; 0 stands before the first one.
    pub index: u64,
    /// Term of the entry.
    pub term: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "index {} of term {}", self.index, self.term)
    }
}

/// Whose log this is; written into every segment, so that files of different members never mix.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster_id: u64,
    /// This member.
    pub member_id: u64,
}

/// What one write makes durable: all of it or nothing.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Group {
    /// New entries, contiguous; from the first one's index on they supersede what the log holds.
    pub entries: Vec<Entry>,
    /// The newest term, vote and commit, if they changed.
    pub hard_state: Option<HardState>,
}

impl Group {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.hard_state.is_none()
    }

    /// Takes in a later group, so that both become one write: its entries supersede ours where they overlap.
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

/// Where groups are kept. One owner writes; what was kept comes back as [`Recovered`] when the store is opened.
///
/// Any `Err` is final: the store refuses all further calls, and the process should end.
pub trait LogStore: Send {
    /// Writes a group, which is durable only after [`sync`](Self::sync); returns the bytes written. Separate from the
    /// sync, so that the caller can time either.
    fn write(&mut self, group: &Group) -> Result<u64, Halt>;

    /// Makes the written group durable. Must follow each [`write`](Self::write).
    fn sync(&mut self) -> Result<(), Halt>;

    /// Forgets all entries up to and including `at`, which becomes the truncation point; durable when this returns. At or
    /// below the present truncation point it does nothing.
    fn cut(&mut self, at: Position) -> Result<(), Halt>;

    /// Notes that the database is about to be replaced by the snapshot at this position, or, with None, that this will not
    /// happen after all; durable when this returns.
    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt>;

    /// Starts over behind an installed snapshot: no entries, the truncation point at `at`, no install under way. All of it
    /// in one group, durable when this returns.
    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt>;

    /// Room that the log takes where it is kept.
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
    fn a_group_absorbs_a_later_one_as_the_log_would() {
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
