//! The replicated state machine: deterministic, synchronous, written by one thread.
//!
//! Entries go in, outcomes and effects come out. The same entries make the same state, byte for byte, on every replica:
//! nothing here reads a clock, draws a random number, looks at a flag, or asks whether anybody waits for the outcome.
//!
//! [`Machine`] applies; [`Readers`] look at what has been published. Applying gathers one batch: [`Machine::apply`] any
//! number of entries, [`Machine::commit`] them to the database with the applied index, then [`Machine::publish_head`].
//!
//! It composes its three siblings, which do not know each other: the key space (`mvcc`) says which lease a change
//! displaced and the lease table is told; a revoked lease names its keys and the key space deletes them.
//!
//! INVARIANTS
//! * Entries apply in order, without gaps; each one's effects and the applied index are in the same batch.
//! * An outcome that is refused has changed nothing.
//! * Nothing is readable that the database does not hold.

mod alarms;
mod apply;
pub mod command;
mod members;
pub mod nesting;
pub mod txn;

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use crate::{
    error::{Error, Halt},
    lease,
    lease::Leases,
    mvcc,
    mvcc::{Event, Store},
    storage::{
        Batch, Engine, Table,
        schema::{decode_u64, meta},
    },
};
pub use alarms::{Alarms, CORRUPT, NOSPACE};
pub use command::{Command, Kind, Request, Response};
pub use members::{Electorate, Members, Newcomer};

/// A committed entry of the log.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its place in the log.
    pub index: u64,
    /// The term it was proposed in.
    pub term: u64,
    /// An encoded command; empty for the entry with which a leader begins.
    pub data: Bytes,
    /// Whether raft was told that this entry changes who votes or learns.
    pub changes_members: bool,
}

/// What applying one entry produced.
#[derive(Debug)]
pub struct Applied {
    /// Finds whoever proposed it; zero if it was nobody's.
    pub id: u64,
    /// What the quota charges for what it added.
    pub cost: u64,
    /// The answer, the same on every replica.
    pub outcome: Result<Response, Error>,
}

/// Something that the world outside the key space should hear about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A lease began.
    LeaseGranted {
        /// Its ID.
        id: i64,
        /// Its seconds to live.
        ttl: i64,
    },
    /// A lease ended, and its keys with it.
    LeaseRevoked {
        /// Its ID.
        id: i64,
    },
    /// There is something to forget.
    CompactionScheduled {
        /// The new compact revision.
        at: i64,
    },
    /// An alarm was raised or cleared.
    AlarmsChanged,
    /// A member was added, removed or promoted, or something about one has changed.
    MembersChanged,
}

/// What a batch of entries came to, once it is in the database.
#[derive(Debug, Default)]
pub struct Published {
    /// Every change to a key, in order.
    pub events: Vec<Event>,
    /// Everything else, in order.
    pub effects: Vec<Effect>,
    /// The revision that becomes readable with them.
    pub head: i64,
}

/// How far a database is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The last entry whose effects it holds.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// The revision of the key space.
    pub head: i64,
}

impl Progress {
    const LEN: usize = 24;

    fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.index.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.term.to_be_bytes());
        bytes[16..].copy_from_slice(&self.head.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != Self::LEN {
            return None;
        }
        let number = |at: usize| decode_u64(&bytes[at..at + 8]);
        Some(Self { index: number(0)?, term: number(8)?, head: number(16)?.cast_signed() })
    }

    /// How far the database is, in memory or on disk; None for one that was never initialised.
    pub fn of(engine: &dyn Engine) -> Result<Option<Self>, Halt> {
        Self::read(engine.get(Table::Meta, meta::APPLIED)?)
    }

    /// How far the database would be after a crash right now.
    pub fn durable(engine: &dyn Engine) -> Result<Option<Self>, Halt> {
        Self::read(engine.get_durable(Table::Meta, meta::APPLIED)?)
    }

    fn read(stored: Option<Bytes>) -> Result<Option<Self>, Halt> {
        let damaged =
            || Halt::Refused("the database does not say how far it is: its `applied` entry is damaged".into());
        stored.map(|bytes| Self::decode(&bytes).ok_or_else(damaged)).transpose()
    }
}

/// What readers may see beside keys and leases.
#[derive(Debug, Default, Clone)]
pub struct Board {
    /// The members of the cluster.
    pub members: Members,
    /// Raised alarms.
    pub alarms: Alarms,
    /// The version all members can speak, `X.Y.0`; empty until it is decided.
    pub cluster_version: String,
}

/// Looks at what has been published, from any thread.
#[derive(Clone)]
pub struct Readers {
    /// The key space.
    pub keys: mvcc::Reader,
    /// The leases.
    pub leases: lease::Reader,
    /// Everything else.
    pub board: Arc<RwLock<Board>>,
}

/// The state machine. One thread owns it.
pub struct Machine {
    engine: Arc<dyn Engine>,
    store: Store,
    leases: Leases,
    board: Board,
    board_changed: bool,
    shared_board: Arc<RwLock<Board>>,
    batch: Batch,
    effects: Vec<Effect>,
    applied: Progress,
}

impl Machine {
    /// Makes the database of a new member: the members it knows, as of the log position that it starts from. One that joins a
    /// cluster knows nobody and starts from nothing: all of it comes from the others.
    pub fn bootstrap(engine: &dyn Engine, cluster_id: u64, members: &Members, at: (u64, u64)) -> Result<(), Halt> {
        let mut batch = Batch::default();
        members.write(&mut batch);
        batch.put(Table::Meta, meta::CLUSTER_ID, cluster_id.to_be_bytes().to_vec());
        let progress = Progress { index: at.0, term: at.1, head: 1 };
        batch.put(Table::Meta, meta::APPLIED, progress.encode().to_vec());
        engine.write(&batch)?;
        engine.flush()
    }

    /// Opens the state that a database holds. `value_cache_bytes` bounds the memory for recently used values.
    pub fn open(engine: Arc<dyn Engine>, value_cache_bytes: u64) -> Result<Self, Halt> {
        let uninitialised = || Halt::Refused("the database was never initialised: it has no `applied` entry".into());
        let applied = Progress::of(engine.as_ref())?.ok_or_else(uninitialised)?;
        let mut leases = Leases::restore(engine.as_ref())?;
        let mut orphans = 0_u64;
        let store = Store::open(engine.clone(), applied.head, value_cache_bytes, &mut |key, lease| {
            orphans += u64::from(leases.attach(lease::LeaseId(lease), key).is_err());
        })?;
        if orphans > 0 {
            tracing::warn!(
                keys = orphans,
                "keys name leases that do not exist; they stay, without a lease to end them"
            );
        }
        let cluster_version = engine.get(Table::Meta, meta::CLUSTER_VERSION)?.unwrap_or_default();
        let board = Board {
            members: Members::read(engine.as_ref())?,
            alarms: Alarms::read(engine.as_ref())?,
            cluster_version: String::from_utf8_lossy(&cluster_version).into_owned(),
        };
        let shared_board = Arc::new(RwLock::new(board.clone()));
        Ok(Self {
            engine,
            store,
            leases,
            board,
            board_changed: false,
            shared_board,
            batch: Batch::default(),
            effects: Vec::new(),
            applied,
        })
    }

    /// How far the machine is, the running batch included.
    #[must_use]
    pub fn applied(&self) -> Progress {
        self.applied
    }

    /// Who the members are, the running batch included.
    #[must_use]
    pub fn members(&self) -> &Members {
        &self.board.members
    }

    /// Where the state is kept.
    #[must_use]
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// Readers of what is published.
    #[must_use]
    pub fn readers(&self) -> Readers {
        Readers { keys: self.store.reader(), leases: self.leases.reader().clone(), board: self.shared_board.clone() }
    }

    /// The key space's shared part, for whoever removes what was compacted.
    #[must_use]
    pub fn shared(&self) -> &Arc<mvcc::Shared> {
        self.store.shared()
    }

    /// Writes all that was applied since the last call to the database, the applied index with it, in one batch. After
    /// this only [`Machine::publish_head`] is missing until readers see it.
    pub fn commit(&mut self) -> Result<Published, Halt> {
        self.applied.head = self.store.head();
        self.batch.put(Table::Meta, meta::APPLIED, self.applied.encode().to_vec());
        self.engine.write(&self.batch)?;
        self.batch.clear();
        let events = self.store.publish();
        if std::mem::take(&mut self.board_changed) {
            *self.shared_board.write() = self.board.clone();
        }
        Ok(Published { events, effects: std::mem::take(&mut self.effects), head: self.applied.head })
    }

    /// Lets readers see what was committed. The caller has made the events deliverable by now.
    pub fn publish_head(&self) {
        self.store.publish_head();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::Memory;

    #[test]
    fn a_joiner_knows_nobody_and_starts_from_nothing() {
        let engine: Arc<dyn Engine> = Arc::new(Memory::default());
        Machine::bootstrap(engine.as_ref(), 7, &Members::default(), (0, 0)).unwrap();
        let mut machine = Machine::open(engine.clone(), 1 << 20).unwrap();
        assert_eq!(machine.applied(), Progress { index: 0, term: 0, head: 1 });
        assert_eq!(machine.members().electorate(), Electorate::default());
        machine.apply(&Entry { index: 1, term: 1, data: Bytes::new(), changes_members: false }).unwrap();
        machine.commit().unwrap();
        assert_eq!(Progress::of(engine.as_ref()).unwrap().unwrap().index, 1);
    }
}
