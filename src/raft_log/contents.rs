//! The content of a log, computed by replaying its records.
//!
//! The same few rules are used three times: recovery replays the records of the segment files, the volatile store consists of
//! nothing else, and tests use them as the model.

use std::path::PathBuf;

use raft::eraftpb::{Entry, HardState};

use super::{Group, Identity, Position};
use crate::error::Halt;

/// A record: one change of the log.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Record {
    /// Entries that supersede everything from the first one's index on; never empty.
    Entries(Vec<Entry>),
    /// Term, vote and commit index.
    HardState(HardState),
    /// All entries up to this position are removed.
    Truncate(Position),
    /// All entries are removed; the next one is the one after this position.
    Reset(Position),
    /// A snapshot install begins, or is cancelled.
    Installing(Option<Position>),
}

impl Record {
    /// The highest index of its entries, or 0.
    pub fn last_index(&self) -> u64 {
        if let Self::Entries(entries) = self { entries.last().map_or(0, |last| last.index) } else { 0 }
    }

    /// Whether it removes all earlier entries.
    pub fn is_reset(&self) -> bool {
        matches!(self, Self::Reset(_))
    }

    /// The records of a group, in the order in which they take effect.
    pub fn of(group: &Group) -> Vec<Self> {
        let entries = (!group.entries.is_empty()).then(|| Self::Entries(group.entries.clone()));
        entries.into_iter().chain(group.hard_state.clone().map(Self::HardState)).collect()
    }
}

/// The state of the log between two records, without the entries. Each segment begins with it, so that earlier segments can be
/// removed.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Summary {
    /// The truncation point: the position of the last entry that was removed.
    pub truncated: Position,
    pub hard_state: HardState,
    /// The snapshot that was about to replace the database.
    pub installing: Option<Position>,
    /// The last index plus one.
    pub next_index: u64,
}

impl Summary {
    /// A log without entries, with its truncation point at `truncated`.
    pub fn new(truncated: Position, hard_state: HardState) -> Self {
        Self { truncated, hard_state, installing: None, next_index: truncated.index + 1 }
    }

    pub fn replay(&mut self, record: &Record) {
        match record {
            Record::Entries(entries) => self.next_index = entries.last().map_or(self.next_index, |last| last.index + 1),
            Record::HardState(hard_state) => self.hard_state = hard_state.clone(),
            Record::Truncate(at) => self.truncated = *at,
            Record::Reset(at) => *self = Self::new(*at, self.hard_state.clone()),
            Record::Installing(snapshot) => self.installing = *snapshot,
        }
    }

    /// The same as replaying the records of the group.
    pub fn replay_group(&mut self, group: &Group) {
        self.next_index = group.entries.last().map_or(self.next_index, |last| last.index + 1);
        if let Some(hard_state) = &group.hard_state {
            self.hard_state = hard_state.clone();
        }
    }

    /// Returns the reason why `entries` cannot come next, if there is one: they must be contiguous and leave no gap.
    pub fn refuses(&self, entries: &[Entry]) -> Option<String> {
        let first = entries.first()?.index;
        if entries.windows(2).any(|pair| pair[0].index + 1 != pair[1].index) {
            return Some(format!("entries from index {first} on are not contiguous"));
        }
        if first > self.next_index || first <= self.truncated.index {
            let (truncated, next) = (self.truncated.index, self.next_index);
            return Some(format!("entries from index {first} on do not fit between {truncated} and {next}"));
        }
        None
    }
}

/// A log in memory: the summary and the entries themselves.
#[derive(Debug, Default, Clone)]
pub(super) struct Contents {
    pub summary: Summary,
    /// Ascending and contiguous, up to the next index. During replay they may begin above the truncation point plus one: the
    /// truncation that allowed earlier segments to be removed is in a later record.
    entries: Vec<Entry>,
}

impl Contents {
    pub fn new(summary: Summary) -> Self {
        Self { summary, entries: Vec::new() }
    }

    /// Replays one record; `Err` says why the record is impossible here.
    pub fn replay(&mut self, record: Record) -> Result<(), String> {
        match &record {
            Record::Entries(entries) => {
                if let Some(reason) = self.summary.refuses(entries) {
                    return Err(reason);
                }
                let first = entries[0].index;
                self.entries.truncate(self.entries.partition_point(|entry| entry.index < first));
            }
            Record::Truncate(at) => {
                let gone = self.entries.partition_point(|entry| entry.index <= at.index);
                self.entries.drain(..gone);
            }
            Record::Reset(_) => self.entries.clear(),
            Record::HardState(_) | Record::Installing(_) => {}
        }
        self.summary.replay(&record);
        if let Record::Entries(entries) = record {
            self.entries.extend(entries);
        }
        Ok(())
    }

    /// Ends the replay; `Err` says what is missing.
    pub fn finish(self, identity: Identity, torn_tail: Option<TornTail>) -> Result<Recovered, String> {
        let Summary { truncated, mut hard_state, installing, next_index } = self.summary;
        let first = next_index - self.entries.len() as u64;
        if first != truncated.index + 1 {
            return Err(format!("entries {} to {} are missing", truncated.index + 1, first - 1));
        }
        if hard_state.commit >= next_index {
            return Err(format!("the commit index is {}, but the last entry is {}", hard_state.commit, next_index - 1));
        }
        // A commit index alone is never synced, so it may lag behind a truncation.
        hard_state.commit = hard_state.commit.max(truncated.index);
        Ok(Recovered { identity, hard_state, truncated, entries: self.entries, installing, torn_tail })
    }
}

/// The content of a log when it was opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Recovered {
    pub identity: Identity,
    /// Term, vote and commit index. The commit index may be lower than the applied index of the database.
    pub hard_state: HardState,
    /// The truncation point: the position of the last entry that was removed.
    pub truncated: Position,
    /// All entries after it.
    pub entries: Vec<Entry>,
    /// The snapshot that was about to replace the database.
    pub installing: Option<Position>,
    /// What was removed, if the last write was torn.
    pub torn_tail: Option<TornTail>,
}

/// An incomplete write at the end of the log, which was never synced and has been removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornTail {
    /// The segment file.
    pub file: PathBuf,
    /// Where it began.
    pub offset: u64,
    /// How long the complete group would have been.
    pub bytes: u64,
}

impl Recovered {
    /// The index of the last entry, or of the truncation point if there is none.
    #[must_use]
    pub fn last_index(&self) -> u64 {
        self.truncated.index + self.entries.len() as u64
    }

    /// The size of the entries after an index, which must be applied again if the database's applied index is this one.
    #[must_use]
    pub fn bytes_after(&self, index: u64) -> u64 {
        let applied = self.entries.partition_point(|entry| entry.index <= index);
        self.entries[applied..].iter().map(|entry| (entry.data.len() + entry.context.len()) as u64).sum()
    }

    /// The term at an index, if it is that of an entry or the truncation point.
    #[must_use]
    pub fn term(&self, index: u64) -> Option<u64> {
        if index == self.truncated.index {
            return Some(self.truncated.term);
        }
        let nth = usize::try_from(index.checked_sub(self.truncated.index + 1)?).ok()?;
        self.entries.get(nth).map(|entry| entry.term)
    }

    /// The snapshot whose install was interrupted after the database had been replaced and before the log was reset: the
    /// caller must [`reset`](super::LogStore::reset) the log to it before anything else.
    ///
    /// The marker alone does not imply that: it may be left over from an install that never changed the database. It counts only
    /// if the database's applied position is exactly the marker's while the log has no such entry.
    #[must_use]
    pub fn interrupted_install(&self, applied: Position) -> Option<Position> {
        self.installing.filter(|marker| *marker == applied && self.term(marker.index) != Some(marker.term))
    }

    /// Changes this to what opening the log would return after a [`reset`](super::LogStore::reset) to a snapshot.
    pub fn reset_to(&mut self, at: Position, hard_state: HardState) {
        (self.truncated, self.hard_state, self.installing) = (at, hard_state, None);
        self.entries.clear();
    }

    /// Returns an error if the log cannot belong to a database that has applied everything up to `applied`.
    ///
    /// Entries are synced here before they are applied, and stay until the database is durable. So a log that ends before
    /// `applied`, begins after it, or has another term there has lost data or belongs to another database.
    pub fn check_applied(&self, applied: Position) -> Result<(), Halt> {
        let problem = if applied.index > self.last_index() {
            format!("the log ends at index {}: entries that were synced are missing", self.last_index())
        } else if applied.index < self.truncated.index {
            format!("the log begins after {}: the database is older than the log", self.truncated)
        } else if self.term(applied.index) != Some(applied.term) {
            "the log has another term there: the log and the database do not belong together".to_owned()
        } else {
            return Ok(());
        };
        Err(Halt::InvalidData(format!(
            "the database has applied {applied}, but {problem}. Restore both from the same backup, or remove this member \
             from the cluster and add it again with an empty data directory"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(first: u64, last: u64, term: u64) -> Record {
        Record::Entries((first..=last).map(|index| Entry { index, term, ..Entry::default() }).collect())
    }

    fn at(index: u64, term: u64) -> Position {
        Position { index, term }
    }

    fn replay(records: Vec<Record>) -> Result<Recovered, String> {
        let mut contents = Contents::new(Summary::new(at(3, 1), HardState::default()));
        for record in records {
            contents.replay(record)?;
        }
        contents.finish(Identity::default(), None)
    }

    #[test]
    fn later_entries_supersede_earlier_ones_and_truncation_removes_them() {
        let log = replay(vec![entries(4, 9, 1), entries(7, 8, 2), Record::Truncate(at(5, 1))]).unwrap();
        let left: Vec<_> = log.entries.iter().map(|entry| (entry.index, entry.term)).collect();
        assert_eq!(left, [(6, 1), (7, 2), (8, 2)]);
        assert_eq!((log.last_index(), log.term(5), log.term(8)), (8, Some(1), Some(2)));
        assert_eq!((log.term(4), log.term(9)), (None, None));
    }

    #[test]
    fn entries_that_are_not_contiguous_are_refused() {
        assert!(replay(vec![entries(5, 6, 1)]).is_err(), "a gap");
        assert!(replay(vec![entries(3, 6, 1)]).is_err(), "below the truncation point");
        assert!(replay(vec![entries(4, 6, 1), Record::Reset(at(9, 2)), entries(7, 7, 2)]).is_err(), "before the reset");
    }

    #[test]
    fn a_commit_index_may_lag_behind_the_truncation_point_but_not_exceed_the_last_index() {
        let commit = |commit| Record::HardState(HardState { commit, ..HardState::default() });
        let log = replay(vec![entries(4, 9, 1), commit(5), Record::Truncate(at(8, 1))]).unwrap();
        assert_eq!(log.hard_state.commit, 8);
        assert!(replay(vec![entries(4, 9, 1), commit(10)]).is_err());
    }

    #[test]
    fn an_install_was_interrupted_only_if_the_database_is_at_the_marker_and_the_log_is_not() {
        let marked = |records: Vec<Record>| {
            replay(records.into_iter().chain([Record::Installing(Some(at(6, 2)))]).collect()).unwrap()
        };
        assert_eq!(marked(vec![]).interrupted_install(at(6, 2)), Some(at(6, 2)));
        assert_eq!(marked(vec![entries(4, 9, 1)]).interrupted_install(at(6, 2)), Some(at(6, 2)), "a conflicting log");
        assert_eq!(marked(vec![]).interrupted_install(at(3, 1)), None, "the database was not replaced");
        assert_eq!(marked(vec![entries(4, 9, 2)]).interrupted_install(at(6, 2)), None, "the log has that entry itself");
        let reset = replay(vec![Record::Installing(Some(at(6, 2))), Record::Reset(at(6, 2))]).unwrap();
        assert_eq!(reset.interrupted_install(at(6, 2)), None);
    }
}
