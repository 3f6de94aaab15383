//! What a member writes to, and how it can fail him.
//!
//! Both disks are values of the crate itself: [`VolatileLog`] forgets what was not synced, [`Memory`] what was not flushed.
//! Here they get what only the simulation wants: a power cut between two operations of the log, checks on what is cut, and
//! faults that are planted on purpose.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use metastore::{
    error::Halt,
    node::log::{Group, LogStore, Position, volatile::VolatileLog},
    state::Progress,
    storage::{Batch, Engine, Size, Table, Visit, memory::Memory, schema::meta},
};
use raft::eraftpb::HardState;

/// A mistake that the checks must find: each is one that a real system has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// "It is synced", says the log, and syncs when the next group comes.
    AcknowledgedBeforeSync,
    /// The applied index is written after the batch that it belongs to.
    AppliedIndexLate,
    /// The applied index is written before the batch that it belongs to.
    AppliedIndexEarly,
}

/// The end of the world, for one member.
pub fn power_cut() -> Halt {
    Halt::Refused("the simulation cut the power".to_owned())
}

/// What the member's log and the simulation both know.
#[derive(Debug, Default)]
pub struct LogGauge {
    /// The last index that the log has called durable.
    pub synced: AtomicU64,
    /// Operations until the power fails; zero is never.
    pub fuse: AtomicU64,
}

impl LogGauge {
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

/// The log of one member.
pub struct SimulatedLog {
    pub log: VolatileLog,
    pub engine: Arc<SimulatedEngine>,
    pub gauge: Arc<LogGauge>,
    pub fault: Option<Fault>,
    /// Something is written that the log itself has not been told to sync.
    pub owes_sync: bool,
    pub written: u64,
}

impl SimulatedLog {
    fn settle(&mut self) -> Result<(), Halt> {
        if std::mem::take(&mut self.owes_sync) { self.log.sync() } else { Ok(()) }
    }
}

impl LogStore for SimulatedLog {
    fn write(&mut self, group: &Group) -> Result<u64, Halt> {
        self.settle()?;
        self.gauge.burn()?;
        self.written = group.entries.last().map_or(self.written, |last| last.index);
        self.log.write(group)
    }

    fn sync(&mut self) -> Result<(), Halt> {
        self.gauge.burn()?;
        if self.fault == Some(Fault::AcknowledgedBeforeSync) {
            self.owes_sync = true;
        } else {
            self.log.sync()?;
        }
        self.gauge.synced.store(self.written, Ordering::Relaxed);
        Ok(())
    }

    fn cut(&mut self, at: Position) -> Result<(), Halt> {
        self.settle()?;
        let durable = Progress::durable(self.engine.as_ref())?.expect("initialised");
        assert!(at.index <= durable.index, "the log is cut at {at}, but the database is durable up to {durable:?}");
        self.gauge.burn()?;
        self.log.cut(at)
    }

    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt> {
        self.log.set_installing(snapshot)
    }

    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt> {
        self.log.reset(at, hard_state)
    }

    fn size_bytes(&self) -> u64 {
        self.log.size_bytes()
    }
}

/// The database of one member.
#[derive(Debug, Default)]
pub struct SimulatedEngine {
    pub memory: Memory,
    pub fault: Option<Fault>,
}

impl SimulatedEngine {
    /// The batch without its applied index, and the applied index alone.
    fn split(batch: &Batch) -> [Batch; 2] {
        let (mut effects, mut applied) = (Batch::default(), Batch::default());
        for (table, key, value) in batch.iter() {
            let part = if (table, key) == (Table::Meta, meta::APPLIED) { &mut applied } else { &mut effects };
            match value {
                Some(value) => part.put(table, key, value.clone()),
                None => part.delete(table, key),
            }
        }
        [effects, applied]
    }
}

impl Engine for SimulatedEngine {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        let mut parts = match self.fault {
            Some(Fault::AppliedIndexLate | Fault::AppliedIndexEarly) => Self::split(batch),
            Some(Fault::AcknowledgedBeforeSync) | None => return self.memory.write(batch),
        };
        if self.fault == Some(Fault::AppliedIndexEarly) {
            parts.reverse();
        }
        parts.iter().try_for_each(|part| self.memory.write(part))
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        self.memory.get(table, key)
    }

    fn get_many(&self, table: Table, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>, Halt> {
        self.memory.get_many(table, keys)
    }

    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt> {
        self.memory.scan(table, from, to, visit)
    }

    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        self.memory.get_durable(table, key)
    }

    fn copy_to(&self, path: &Path) -> Result<Arc<dyn Engine>, Halt> {
        self.memory.copy_to(path)
    }

    fn flush(&self) -> Result<(), Halt> {
        self.memory.flush()
    }

    fn reclaim(&self) -> Result<(), Halt> {
        self.memory.reclaim()
    }

    fn size(&self) -> Result<Size, Halt> {
        self.memory.size()
    }
}
