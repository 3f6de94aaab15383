//! The entries that raft reads.
//!
//! raft-rs reads its log through [`raft::Storage`], on its own thread, at every step. So everything that it may read is in
//! memory: all entries after the truncation point. A follower that needs older ones gets a snapshot.
//!
//! Entries are appended here before raft is told that they are written; they are written to disk independently, through the
//! [`LogStore`](super::LogStore). After a restart both start from the same [`Recovered`].
//!
//! INVARIANTS
//! * Indexes are contiguous from the truncation point on.
//! * The term at the truncation point is known, although the entry is removed.

use std::{cell::Cell, collections::VecDeque};

use protobuf::Message;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use super::{Position, Recovered};

/// The log in memory, as raft's storage.
#[derive(Debug, Default, Clone)]
pub struct MemoryLog {
    truncated: Position,
    entries: VecDeque<Entry>,
    hard_state: HardState,
    conf_state: ConfState,
    size_bytes: usize,
    /// The position and configuration of the snapshot that can be sent.
    offer: Option<(Position, ConfState)>,
    /// Raft asked for a snapshot, and there was none that fits.
    wants_offer: Cell<bool>,
}

impl MemoryLog {
    /// Starts from the content of the log on disk, with the configuration at the applied index of the database.
    ///
    /// The caller must have [checked](Recovered::check_applied) that log and database belong together.
    #[must_use]
    pub fn new(recovered: &Recovered, applied_index: u64, conf_state: ConfState) -> Self {
        assert!(applied_index <= recovered.last_index(), "what is applied was in the log before");
        let mut hard_state = recovered.hard_state.clone();
        // The commit index on disk may lag, but what is applied was committed.
        hard_state.commit = hard_state.commit.max(applied_index);
        let mut log = Self { truncated: recovered.truncated, hard_state, conf_state, ..Self::default() };
        log.append(&recovered.entries);
        log
    }

    /// Appends entries; they supersede existing ones from the first one's index on.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.truncated.index, "entries at or below the truncation point were committed");
        assert!(first.index <= self.next_index(), "entries follow one another without gaps");
        while self.next_index() > first.index {
            let gone = self.entries.pop_back().expect("the next index is above the truncation point's");
            self.size_bytes -= footprint(&gone);
        }
        for entry in entries {
            assert_eq!(entry.index, self.next_index(), "entries follow one another without gaps");
            self.size_bytes += footprint(entry);
            self.entries.push_back(entry.clone());
        }
    }

    /// Removes all entries up to and including `index`, if they have not been removed already.
    pub fn truncate(&mut self, index: u64) {
        assert!(index < self.next_index(), "the truncation point is in the log");
        while self.truncated.index < index {
            let gone = self.entries.pop_front().expect("the index is in the log");
            self.size_bytes -= footprint(&gone);
            self.truncated = Position { index: gone.index, term: gone.term };
        }
    }

    /// Resets the log after a snapshot was installed.
    pub fn restore(&mut self, at: Position, hard_state: HardState, conf_state: ConfState) {
        *self = Self { truncated: at, hard_state, conf_state, ..Self::default() };
    }

    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    pub fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    /// Sets the snapshot that raft can send, by its position and the configuration there; None if there is none any more.
    pub fn offer(&mut self, offer: Option<(Position, ConfState)>) {
        self.offer = offer;
    }

    /// Whether raft has asked for a snapshot and got none since the last call.
    pub fn take_wants_offer(&self) -> bool {
        self.wants_offer.take()
    }

    #[must_use]
    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    /// The truncation point: the position of the last entry that was removed.
    #[must_use]
    pub fn truncated(&self) -> Position {
        self.truncated
    }

    /// The position at an index, if its term is known.
    #[must_use]
    pub fn position(&self, index: u64) -> Option<Position> {
        Some(Position { index, term: self.term(index).ok()? })
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The approximate memory use of the entries.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn next_index(&self) -> u64 {
        self.truncated.index + self.entries.len() as u64 + 1
    }

    /// The offset of an index in the deque. The index must be above the truncation point.
    fn offset(&self, index: u64) -> usize {
        usize::try_from(index - self.truncated.index - 1).expect("the entries fit into memory")
    }
}

/// The memory use of an entry.
fn footprint(entry: &Entry) -> usize {
    size_of::<Entry>() + entry.data.len() + entry.context.len()
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.truncated.index {
            return Err(StorageError::Compacted.into());
        }
        assert!(high <= self.next_index(), "raft asks for no entries after the last one");
        let mut left = max_size.into().unwrap_or(u64::MAX);
        let fits = |(nth, entry): &(usize, &Entry)| {
            let size = u64::from(entry.compute_size());
            let fits = *nth == 0 || size <= left;
            left = left.saturating_sub(size);
            fits
        };
        let range = self.entries.range(self.offset(low)..self.offset(high));
        Ok(range.enumerate().take_while(fits).map(|(_, entry)| entry.clone()).collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.truncated.index {
            return Err(StorageError::Compacted.into());
        }
        if index == self.truncated.index {
            return Ok(self.truncated.term);
        }
        self.entries.get(self.offset(index)).map(|entry| entry.term).ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.truncated.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.next_index() - 1)
    }

    /// A member ignores a snapshot whose configuration does not contain it, and a snapshot from before the truncation point
    /// cannot be continued from the log. In both cases a new snapshot is requested.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let contains = |conf: &ConfState| conf.voters.contains(&to) || conf.learners.contains(&to);
        let lowest = request_index.max(self.truncated.index);
        let fits = |(at, conf): &&(Position, ConfState)| at.index >= lowest && contains(conf);
        let Some((at, conf_state)) = self.offer.as_ref().filter(fits) else {
            self.wants_offer.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        };
        let metadata = SnapshotMetadata {
            index: at.index,
            term: at.term,
            conf_state: Some(conf_state.clone()).into(),
            ..SnapshotMetadata::default()
        };
        Ok(Snapshot { metadata: Some(metadata).into(), ..Snapshot::default() })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: Bytes::from(vec![0; 100]), ..Entry::default() }
    }

    /// Entries 11 to 20 of term 2, after the truncation point (10, 1).
    fn log() -> MemoryLog {
        let mut log = MemoryLog { truncated: Position { index: 10, term: 1 }, ..MemoryLog::default() };
        log.append(&(11..=20).map(|index| entry(index, 2)).collect::<Vec<_>>());
        log
    }

    fn indexes(log: &MemoryLog, low: u64, high: u64, max_size: u64) -> Vec<u64> {
        let entries = log.entries(low, high, max_size, GetEntriesContext::empty(false)).unwrap();
        entries.iter().map(|entry| entry.index).collect()
    }

    #[test]
    fn raft_gets_at_least_one_entry_however_small_the_limit_is() {
        let log = log();
        assert_eq!(indexes(&log, 12, 21, 0), [12]);
        assert_eq!(indexes(&log, 12, 15, u64::MAX), [12, 13, 14]);
        let size = u64::from(entry(12, 2).compute_size());
        assert_eq!(indexes(&log, 12, 21, 2 * size), [12, 13]);
        assert_eq!(indexes(&log, 12, 21, 3 * size - 1), [12, 13]);
    }

    #[test]
    fn the_term_at_the_truncation_point_outlives_its_entry() {
        let mut log = log();
        log.truncate(15);
        assert_eq!((log.first_index(), log.last_index()), (Ok(16), Ok(20)));
        assert_eq!((log.term(15), log.term(16)), (Ok(2), Ok(2)));
        assert_eq!(log.term(14), Err(StorageError::Compacted.into()));
        assert_eq!(log.term(21), Err(StorageError::Unavailable.into()));
        let compacted = log.entries(15, 18, None, GetEntriesContext::empty(true));
        assert_eq!(compacted, Err(StorageError::Compacted.into()));
    }

    #[test]
    fn entries_of_a_later_term_supersede_the_tail() {
        let mut log = log();
        log.append(&[entry(14, 3), entry(15, 3)]);
        assert_eq!(log.last_index(), Ok(15));
        assert_eq!((log.term(13), log.term(14)), (Ok(2), Ok(3)));
    }

    #[test]
    fn the_size_is_that_of_the_entries_in_the_log() {
        let mut log = log();
        let one = footprint(&entry(1, 1));
        assert_eq!(log.size_bytes(), 10 * one);
        log.append(&[entry(19, 3)]);
        assert_eq!(log.size_bytes(), 9 * one);
        log.truncate(17);
        assert_eq!(log.size_bytes(), 2 * one);
        log.restore(Position { index: 50, term: 4 }, HardState::default(), ConfState::default());
        assert_eq!((log.size_bytes(), log.last_index(), log.term(50)), (0, Ok(50), Ok(4)));
    }

    #[test]
    fn applied_entries_count_as_committed() {
        let recovered = Recovered {
            identity: super::super::Identity::default(),
            hard_state: HardState { term: 2, commit: 12, ..HardState::default() },
            truncated: Position { index: 10, term: 1 },
            entries: (11..=20).map(|index| entry(index, 2)).collect(),
            installing: None,
            torn_tail: None,
        };
        let conf_state = ConfState { voters: vec![1], ..ConfState::default() };
        let log = MemoryLog::new(&recovered, 17, conf_state);
        let state = log.initial_state().unwrap();
        assert_eq!((state.hard_state.commit, state.hard_state.term), (17, 2));
        assert!(state.initialized());
    }
}
