//! What a member writes to, and how it can fail him.
//!
//! A log is the real one, on files that tear what was not synced, or [`VolatileLog`], which forgets it; a database is
//! [`Memory`], which forgets what was not flushed. Here they get what only the simulation wants: a power cut between two
//! operations, checks on what is written and cut, and faults that are planted on purpose.

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
    node::log::{
        Group, Identity, LogStore, Place, Position, Recovered, SegmentLog,
        lossy::{Loss, LossyFiles},
        volatile::VolatileLog,
    },
    state::Progress,
    storage::{Batch, Change, Engine, Lack, Size, Table, Visit, memory::Memory, schema::meta},
};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState};
use tempfile::TempDir;

use super::{dice::Dice, fault::Fault, oaths::Ledger};

/// So small that a log has several.
const SEGMENT_BYTES: u64 = 4096;

/// The end of the world, for one member.
fn power_cut() -> Halt {
    Halt::Refused("the simulation cut the power".to_owned())
}

/// What a member's disks and the simulation both know.
#[derive(Debug, Default)]
pub struct Gauge {
    /// Operations until the power fails; zero is never.
    fuse: AtomicU64,
    durable: Mutex<Durable>,
}

/// What the log has called durable.
#[derive(Debug, Default, Clone, Copy)]
pub struct Durable {
    pub last_index: u64,
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
}

impl Gauge {
    /// The power fails at the n-th operation from now on.
    pub fn light(&self, operations: u64) {
        self.fuse.store(operations, Ordering::Relaxed);
    }

    /// Whether the power may fail, or has failed.
    pub fn is_lit(&self) -> bool {
        self.fuse.load(Ordering::Relaxed) > 0
    }

    pub fn durable(&self) -> Durable {
        *self.durable.lock()
    }

    fn burn(&self) -> Result<(), Halt> {
        match self.fuse.load(Ordering::Relaxed) {
            0 => Ok(()),
            1 => Err(power_cut()),
            left => {
                self.fuse.store(left - 1, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// Where a log lies when nobody runs on it.
pub enum LogDisk {
    Memory(VolatileLog),
    Files { _root: TempDir, files: LossyFiles, place: Place },
}

impl LogDisk {
    /// A log without entries behind a position.
    pub fn create(on_files: bool, identity: Identity, at: Position, hard_state: &HardState) -> Self {
        if !on_files {
            return Self::Memory(VolatileLog::create(identity, at, hard_state));
        }
        let root = tempfile::tempdir().expect("there is room for small files");
        let files = LossyFiles::new();
        let place =
            Place { dir: root.path().join("log"), files: Arc::new(files.clone()), segment_bytes: SEGMENT_BYTES };
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

    /// Whoever ran on it is gone, and with it what the dice say of what was not synced.
    pub fn crash(&self, dice: &mut Dice) {
        match self {
            Self::Memory(log) => log.crash(dice.percent(50)),
            Self::Files { files, .. } => {
                let seed = dice.below(usize::MAX) as u64;
                let loss = *dice.pick(&[Loss::Nothing, Loss::Unsynced, Loss::Parts(seed), Loss::Parts(seed)]);
                files.crash(loss).expect("the disk behind the disk works");
            }
        }
    }
}

/// Which database a member has: changes when a snapshot takes its place, durably.
pub type Current = Arc<Mutex<Arc<SimulatedEngine>>>;

/// The log of one member.
pub struct SimulatedLog {
    store: Box<dyn LogStore>,
    current: Current,
    gauge: Arc<Gauge>,
    ledger: Arc<Mutex<Ledger>>,
    fault: Option<Fault>,
    /// Something is written that the log itself has not been told to sync.
    owes_sync: bool,
    /// What is durable once the last write is.
    written: Durable,
    /// The term of each entry, and of the one before the first.
    terms: BTreeMap<u64, u64>,
    /// What was written last, and the term of the entry before.
    unsynced: (u64, Vec<Entry>),
}

impl SimulatedLog {
    pub fn new(
        store: Box<dyn LogStore>,
        recovered: &Recovered,
        current: Current,
        ledger: Arc<Mutex<Ledger>>,
        fault: Option<Fault>,
    ) -> Self {
        let HardState { term, vote, commit, .. } = recovered.hard_state;
        // What is in the database was agreed.
        let applied = Progress::durable(current.lock().as_ref()).ok().flatten().map_or(0, |applied| applied.index);
        let written = Durable { last_index: recovered.last_index(), term, vote, commit: commit.max(applied) };
        let first = (recovered.truncated.index, recovered.truncated.term);
        let terms = recovered.entries.iter().map(|entry| (entry.index, entry.term)).chain([first]).collect();
        let gauge = current.lock().gauge.clone();
        *gauge.durable.lock() = written;
        Self { store, current, gauge, ledger, fault, owes_sync: false, written, terms, unsynced: (0, Vec::new()) }
    }

    fn settle(&mut self) -> Result<(), Halt> {
        if std::mem::take(&mut self.owes_sync) { self.store.sync() } else { Ok(()) }
    }

    fn note_hard_state(&mut self, hard_state: &HardState) {
        let HardState { term, vote, commit, .. } = *hard_state;
        self.written = Durable { term, vote, commit: commit.max(self.written.commit), ..self.written };
    }
}

impl LogStore for SimulatedLog {
    fn write(&mut self, group: &Group) -> Result<u64, Halt> {
        self.settle()?;
        self.gauge.burn()?;
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
        self.gauge.burn()?;
        if self.fault == Some(Fault::AcknowledgedBeforeSync) {
            self.owes_sync = true;
        } else {
            self.store.sync()?;
        }
        let (before, entries) = std::mem::take(&mut self.unsynced);
        self.ledger.lock().note_all(&entries, before);
        *self.gauge.durable.lock() = self.written;
        Ok(())
    }

    fn cut(&mut self, at: Position) -> Result<(), Halt> {
        self.settle()?;
        let durable = Progress::durable(self.current.lock().as_ref())?.expect("initialised");
        assert!(at.index <= durable.index, "the log is cut at {at}, but the database is durable up to {durable:?}");
        self.gauge.burn()?;
        self.store.cut(at)
    }

    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt> {
        self.settle()?;
        self.gauge.burn()?;
        self.store.set_installing(snapshot)
    }

    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt> {
        self.settle()?;
        self.gauge.burn()?;
        self.store.reset(at, hard_state)?;
        self.written.last_index = at.index;
        self.note_hard_state(hard_state);
        self.terms = [(at.index, at.term)].into();
        *self.gauge.durable.lock() = self.written;
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.store.size_bytes()
    }
}

/// Copies of databases, by the path that they were given.
pub type Copies = Arc<Mutex<BTreeMap<PathBuf, Memory>>>;

/// The database of one member.
#[derive(Debug)]
pub struct SimulatedEngine {
    pub memory: Memory,
    pub fault: Option<Fault>,
    pub gauge: Arc<Gauge>,
    pub copies: Copies,
}

impl SimulatedEngine {
    /// The batch without its applied index, and the applied index alone.
    fn split(batch: &Batch) -> [Batch; 2] {
        let (mut effects, mut applied) = (Batch::default(), Batch::default());
        for (table, key, change) in batch.iter() {
            let part = if (table, key) == (Table::Meta, meta::APPLIED) { &mut applied } else { &mut effects };
            match change {
                Change::Put(value) => part.put(table, key, value.clone()),
                Change::Remove => part.delete(table, key),
                Change::RemoveTo(end) => part.delete_range(table, key, end.clone()),
            }
        }
        [effects, applied]
    }
}

impl Engine for SimulatedEngine {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        self.gauge.burn()?;
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
        self.gauge.burn()?;
        self.memory.flush()
    }

    fn reclaim(&self) -> Result<Option<Lack>, Halt> {
        self.memory.reclaim()
    }

    fn size(&self) -> Result<Size, Halt> {
        self.memory.size()
    }
}
