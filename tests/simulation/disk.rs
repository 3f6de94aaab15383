//! The disks of a member, and how they fail.
//!
//! A log is the real one, on files that tear what was not synced, or [`VolatileLog`], which loses it; a database is
//! [`Memory`], which loses what was not flushed. The wrappers here add what only the simulation needs: a power failure
//! between two operations, checks on what is written and truncated, and planted faults.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use metastore::{
    error::Halt,
    raft_log::{
        Group, Identity, LogLocation, LogStore, Position, Recovered, SegmentLog,
        fault_files::{Loss, LossyFiles},
        simulated_log::VolatileLog,
    },
    state::AppliedPosition,
    storage::{Batch, Engine, InsufficientSpace, Size, Table, Visit, WriteOp, memory::Memory, schema::meta},
};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState};
use tempfile::TempDir;

use super::{planted_faults::Fault, raft_checks::Ledger, rng::Rng};

/// So small that a log has several segments.
const SEGMENT_BYTES: u64 = 4096;

fn power_failure() -> Halt {
    Halt::InvalidData("simulated power failure".to_owned())
}

/// The state of a member's disks, shared with the simulation.
#[derive(Debug, Default)]
pub struct DiskState {
    /// Operations until the power fails; zero means never.
    operations_left: AtomicU64,
    durable: Mutex<Durable>,
}

/// What the log has reported as durable.
#[derive(Debug, Default, Clone, Copy)]
pub struct Durable {
    pub last_index: u64,
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
}

impl DiskState {
    /// The power fails at the n-th operation from now.
    pub fn cut_power_after(&self, operations: u64) {
        self.operations_left.store(operations, Ordering::Relaxed);
    }

    /// Whether the power may fail, or has failed.
    pub fn may_lose_power(&self) -> bool {
        self.operations_left.load(Ordering::Relaxed) > 0
    }

    pub fn durable(&self) -> Durable {
        *self.durable.lock()
    }

    fn count_operation(&self) -> Result<(), Halt> {
        match self.operations_left.load(Ordering::Relaxed) {
            0 => Ok(()),
            1 => Err(power_failure()),
            left => {
                self.operations_left.store(left - 1, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// The storage of a log, which outlives the member that runs on it.
pub enum LogDisk {
    Memory(VolatileLog),
    Files { _root: TempDir, files: LossyFiles, place: LogLocation },
}

impl LogDisk {
    /// A log without entries that begins after a position.
    pub fn create(on_files: bool, identity: Identity, at: Position, hard_state: &HardState) -> Self {
        if !on_files {
            return Self::Memory(VolatileLog::create(identity, at, hard_state));
        }
        let root = tempfile::tempdir().expect("there is space for small files");
        let files = LossyFiles::new();
        let place =
            LogLocation { dir: root.path().join("log"), files: Arc::new(files.clone()), segment_bytes: SEGMENT_BYTES };
        SegmentLog::create(&place, identity, at, hard_state).expect("the disk works");
        Self::Files { _root: root, files, place }
    }

    pub fn open(&self) -> Result<(Box<dyn LogStore>, Recovered), Halt> {
        match self {
            Self::Memory(log) => Ok((Box::new(log.clone()), log.open()?)),
            Self::Files { place, .. } => {
                let (log, recovered) = SegmentLog::open(place)?;
                Ok((Box::new(log), recovered))
            }
        }
    }

    /// The member is gone, and a random part of what was not synced is lost.
    pub fn crash(&self, rng: &mut Rng) {
        match self {
            Self::Memory(log) => log.crash(rng.percent(50)),
            Self::Files { files, .. } => {
                let seed = rng.below(usize::MAX) as u64;
                let loss = *rng.pick(&[Loss::Nothing, Loss::Unsynced, Loss::Partial(seed), Loss::Partial(seed)]);
                files.crash(loss).expect("the real disk works");
            }
        }
    }
}

/// The database of a member; a snapshot replaces it, durably.
pub type CurrentEngine = Arc<Mutex<Arc<SimulatedEngine>>>;

/// The log of one member.
pub struct SimulatedLog {
    store: Box<dyn LogStore>,
    current: CurrentEngine,
    disk_state: Arc<DiskState>,
    ledger: Arc<Mutex<Ledger>>,
    fault: Option<Fault>,
    /// A write has been acknowledged without a sync of the log underneath (a planted fault).
    sync_owed: bool,
    /// What is durable once the last write is synced.
    written: Durable,
    /// The term of each entry, and of the one before the first.
    terms: BTreeMap<u64, u64>,
    /// The entries written last, and the term of the entry before them.
    unsynced: (u64, Vec<Entry>),
}

impl SimulatedLog {
    pub fn new(
        store: Box<dyn LogStore>,
        recovered: &Recovered,
        current: CurrentEngine,
        ledger: Arc<Mutex<Ledger>>,
        fault: Option<Fault>,
    ) -> Self {
        let HardState { term, vote, commit, .. } = recovered.hard_state;
        // What is in the database was committed.
        let applied =
            AppliedPosition::durable(current.lock().as_ref()).ok().flatten().map_or(0, |applied| applied.index);
        let written = Durable { last_index: recovered.last_index(), term, vote, commit: commit.max(applied) };
        let first = (recovered.truncated.index, recovered.truncated.term);
        let terms = recovered.entries.iter().map(|entry| (entry.index, entry.term)).chain([first]).collect();
        let disk_state = current.lock().disk_state.clone();
        *disk_state.durable.lock() = written;
        Self { store, current, disk_state, ledger, fault, sync_owed: false, written, terms, unsynced: (0, Vec::new()) }
    }

    fn sync_if_owed(&mut self) -> Result<(), Halt> {
        if std::mem::take(&mut self.sync_owed) { self.store.sync() } else { Ok(()) }
    }

    fn note_hard_state(&mut self, hard_state: &HardState) {
        let HardState { term, vote, commit, .. } = *hard_state;
        self.written = Durable { term, vote, commit: commit.max(self.written.commit), ..self.written };
    }
}

impl LogStore for SimulatedLog {
    fn write(&mut self, group: &Group) -> Result<u64, Halt> {
        self.sync_if_owed()?;
        self.disk_state.count_operation()?;
        if let Some(first) = group.entries.first() {
            drop(self.terms.split_off(&first.index));
            let before = self.terms.get(&(first.index - 1)).copied().expect("entries leave no gap");
            self.terms.extend(group.entries.iter().map(|entry| (entry.index, entry.term)));
            self.unsynced = (before, group.entries.clone());
        }
        self.written.last_index = group.entries.last().map_or(self.written.last_index, |last| last.index);
        if let Some(hard_state) = &group.hard_state {
            self.note_hard_state(hard_state);
        }
        self.store.write(group)
    }

    fn sync(&mut self) -> Result<(), Halt> {
        self.disk_state.count_operation()?;
        if self.fault == Some(Fault::AcknowledgedBeforeSync) {
            self.sync_owed = true;
        } else {
            self.store.sync()?;
        }
        let (before, entries) = std::mem::take(&mut self.unsynced);
        self.ledger.lock().note_all(&entries, before);
        *self.disk_state.durable.lock() = self.written;
        Ok(())
    }

    fn truncate(&mut self, at: Position) -> Result<(), Halt> {
        self.sync_if_owed()?;
        let durable = AppliedPosition::durable(self.current.lock().as_ref())?.expect("initialised");
        assert!(
            at.index <= durable.index,
            "the log is truncated at {at}, but the database is durable up to {durable:?}"
        );
        self.disk_state.count_operation()?;
        self.store.truncate(at)
    }

    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt> {
        self.sync_if_owed()?;
        self.disk_state.count_operation()?;
        self.store.set_installing(snapshot)
    }

    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt> {
        self.sync_if_owed()?;
        self.disk_state.count_operation()?;
        self.store.reset(at, hard_state)?;
        self.written.last_index = at.index;
        self.note_hard_state(hard_state);
        self.terms = [(at.index, at.term)].into();
        *self.disk_state.durable.lock() = self.written;
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.store.size_bytes()
    }
}

/// Copies of databases, by path.
pub type Copies = Arc<Mutex<BTreeMap<PathBuf, Memory>>>;

/// The database of one member.
#[derive(Debug)]
pub struct SimulatedEngine {
    pub memory: Memory,
    pub fault: Option<Fault>,
    pub disk_state: Arc<DiskState>,
    pub copies: Copies,
}

impl SimulatedEngine {
    /// The batch without its applied index, and the applied index alone.
    fn split(batch: &Batch) -> [Batch; 2] {
        let (mut effects, mut applied) = (Batch::default(), Batch::default());
        for (table, key, change) in batch.iter() {
            let part = if (table, key) == (Table::Meta, meta::APPLIED) { &mut applied } else { &mut effects };
            match change {
                WriteOp::Put(value) => part.put(table, key, value.clone()),
                WriteOp::Remove => part.delete(table, key),
                WriteOp::RemoveRange(end) => part.delete_range(table, key, end.clone()),
            }
        }
        [effects, applied]
    }
}

impl Engine for SimulatedEngine {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        self.disk_state.count_operation()?;
        let mut parts = match self.fault {
            Some(Fault::AppliedIndexLate | Fault::AppliedIndexEarly) => Self::split(batch),
            _ => return self.memory.write(batch),
        };
        if self.fault == Some(Fault::AppliedIndexEarly) {
            parts.reverse();
        }
        parts.iter().try_for_each(|part| self.memory.write(part))
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        self.memory.get(table, key)
    }

    fn get_many(&self, table: Table, keys: &[&[u8]], is_scan: bool) -> Result<Vec<Option<Bytes>>, Halt> {
        self.memory.get_many(table, keys, is_scan)
    }

    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt> {
        self.memory.scan(table, from, to, visit)
    }

    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        self.memory.get_durable(table, key)
    }

    fn copy_to(&self, path: &Path) -> Result<Arc<dyn Engine>, Halt> {
        self.flush()?;
        self.copies.lock().insert(path.to_path_buf(), self.memory.crash(0));
        Ok(Arc::new(self.memory.crash(0)))
    }

    fn flush(&self) -> Result<(), Halt> {
        self.disk_state.count_operation()?;
        self.memory.flush()
    }

    fn defragment(&self) -> Result<Option<InsufficientSpace>, Halt> {
        self.memory.defragment()
    }

    fn size(&self) -> Result<Size, Halt> {
        self.memory.size()
    }
}
