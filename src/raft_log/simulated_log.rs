//! A log in memory that loses unsynced writes in a simulated crash, for the single-threaded simulation.
//!
//! The store is a handle: the node owns one, the simulation keeps a clone. To simulate a crash, the simulation drops the node,
//! calls [`crash`](VolatileLog::crash), and starts the next one from [`open`](VolatileLog::open).

use std::sync::{Arc, Mutex, MutexGuard};

use raft::eraftpb::HardState;

use super::contents::{Contents, Record, Summary};
use super::{Group, Identity, LogStore, Position, Recovered};
use crate::error::Halt;

/// A log on a simulated disk.
#[derive(Debug, Clone)]
pub struct VolatileLog {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug)]
struct Disk {
    identity: Identity,
    durable: Contents,
    /// Written but not synced.
    pending: Option<Vec<Record>>,
    size_bytes: u64,
    broken: bool,
}

impl VolatileLog {
    /// Creates a log without entries, with its truncation point at `truncated`.
    #[must_use]
    pub fn create(identity: Identity, truncated: Position, hard_state: &HardState) -> Self {
        let durable = Contents::new(Summary::new(truncated, hard_state.clone()));
        let disk = Disk { identity, durable, pending: None, size_bytes: 0, broken: false };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// The content that a node finds when it starts now.
    pub fn open(&self) -> Result<Recovered, Halt> {
        let disk = self.disk();
        assert!(disk.pending.is_none(), "a store is opened after a crash or a sync");
        disk.durable.clone().finish(disk.identity, None).map_err(Halt::InvalidData)
    }

    /// Simulates a crash: an unsynced write is lost unless `the_last_write_survives`. A broken disk works again.
    pub fn crash(&self, the_last_write_survives: bool) {
        let mut disk = self.disk();
        disk.broken = false;
        if the_last_write_survives {
            disk.make_durable();
        }
        disk.pending = None;
    }

    /// Makes every call fail until the next crash.
    pub fn break_disk(&self) {
        self.disk().broken = true;
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("no function of this file panics while it holds the lock")
    }

    fn working_disk(&self) -> Result<MutexGuard<'_, Disk>, Halt> {
        let disk = self.disk();
        if disk.broken { Err(Halt::InvalidData("the simulated disk is broken".to_owned())) } else { Ok(disk) }
    }

    fn write_synced(&mut self, records: Vec<Record>) -> Result<(), Halt> {
        let mut disk = self.working_disk()?;
        disk.stage(records);
        disk.make_durable();
        Ok(())
    }
}

impl Disk {
    fn stage(&mut self, records: Vec<Record>) {
        assert!(self.pending.is_none(), "each write is synced before the next one");
        self.pending = Some(records);
    }

    fn make_durable(&mut self) {
        for record in self.pending.take().into_iter().flatten() {
            self.durable.replay(record).expect("raft appends without gaps and never below the truncation point");
        }
    }
}

impl LogStore for VolatileLog {
    fn write(&mut self, group: &Group) -> Result<u64, Halt> {
        assert!(!group.is_empty(), "an empty group needs no write");
        let mut disk = self.working_disk()?;
        disk.stage(Record::of(group));
        let bytes = group.entries.iter().map(|entry| (entry.data.len() + entry.context.len()) as u64).sum();
        disk.size_bytes += bytes;
        Ok(bytes)
    }

    fn sync(&mut self) -> Result<(), Halt> {
        let mut disk = self.working_disk()?;
        assert!(disk.pending.is_some(), "there is a write to sync");
        disk.make_durable();
        Ok(())
    }

    fn truncate(&mut self, at: Position) -> Result<(), Halt> {
        let (truncated, next_index) = {
            let disk = self.disk();
            (disk.durable.summary.truncated, disk.durable.summary.next_index)
        };
        assert!(at.index < next_index, "the truncation point is in the log");
        if at.index > truncated.index { self.write_synced(vec![Record::Truncate(at)]) } else { Ok(()) }
    }

    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt> {
        self.write_synced(vec![Record::Installing(snapshot)])
    }

    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt> {
        self.write_synced(vec![Record::Reset(at), Record::HardState(hard_state.clone())])
    }

    fn size_bytes(&self) -> u64 {
        self.disk().size_bytes
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn log() -> VolatileLog {
        VolatileLog::create(Identity::default(), Position::default(), &HardState::default())
    }

    fn group(index: u64) -> Group {
        Group { entries: vec![Entry { index, term: 1, ..Entry::default() }], hard_state: None }
    }

    #[test]
    fn a_crash_loses_an_unsynced_write_unless_told_otherwise() {
        for (survives, last) in [(false, 1), (true, 2)] {
            let mut log = log();
            log.append(&group(1)).unwrap();
            log.write(&group(2)).unwrap();
            log.crash(survives);
            assert_eq!(log.open().unwrap().last_index(), last);
        }
    }

    #[test]
    fn a_broken_disk_fails_every_write_until_the_crash() {
        let mut log = log();
        log.clone().break_disk();
        assert!(log.append(&group(1)).is_err());
        log.crash(true);
        log.append(&group(1)).unwrap();
        assert_eq!(log.open().unwrap().last_index(), 1);
    }
}
