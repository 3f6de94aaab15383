//! The replicated state machine: deterministic, synchronous, written by one thread.
//!
//! Its input is log entries, its output is outcomes and effects. The same entries produce the same state, byte for byte, on
//! every replica: nothing here reads a clock, generates random numbers, reads configuration, or depends on whether a client
//! waits for the outcome.
//!
//! [`Machine`] applies entries; [`Readers`] read the published state. Entries are applied in batches: [`Machine::apply`] any
//! number of entries, [`Machine::commit`] them to the database together with the applied index, then
//! [`Machine::publish_head`].
//!
//! It connects the key space (`mvcc`), the lease table (`lease`) and the users (`auth`), which do not use each other: a put
//! returns the lease that the key had, and the key is detached from it; revoking a lease returns its keys, and the key space
//! deletes them; a request is executed if the permissions of its user allow that.
//!
//! INVARIANTS
//! * Entries are applied in order, without gaps; the effects of an entry and its index are written in the same batch.
//! * A refused request has changed nothing.
//! * Readers see nothing that is not in the database.

mod alarms;
mod apply;
pub mod capability;
pub mod command;
mod members;
pub mod permission;
pub mod txn;
pub mod txn_decode;

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use crate::{
    auth::{self, Auth, TokenEffect},
    error::{Error, Halt},
    lease,
    lease::Leases,
    mvcc,
    mvcc::{Event, Store},
    storage::{
        Batch, Engine, Table,
        schema::{decode_u64, meta},
    },
    version::CAPABILITY_LEVEL,
};
pub use alarms::{Alarms, CORRUPT, NOSPACE};
pub use capability::{CapabilityLevelSet, MemberAttributes};
pub use command::{Command, Kind, Request, Response};
pub use members::{Members, NewMember, VotersAndLearners};

/// A committed entry of the log.
#[derive(Debug, Clone)]
pub struct Entry {
    pub index: u64,
    pub term: u64,
    /// An encoded command; empty for the entry that a new leader appends at the start of its term.
    pub data: Bytes,
    /// Whether this is a configuration change entry for raft, which changes voters or learners.
    pub changes_members: bool,
}

/// The result of applying one entry.
#[derive(Debug)]
pub struct Applied {
    /// The request ID, by which the proposer finds its waiter; zero if the entry has none.
    pub id: u64,
    /// The bytes that the quota charges for the entry.
    pub cost: u64,
    /// etcd's name for the kind of the command, see [`Request::operation`].
    pub operation: &'static str,
    /// The same on every replica.
    pub outcome: Result<Response, Error>,
}

/// A change other than to a key, for the layers above.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    LeaseGranted {
        id: i64,
        /// In seconds.
        ttl: i64,
    },
    /// A lease was revoked and its keys were deleted.
    LeaseRevoked { id: i64 },
    /// A compaction was applied; its records are still to be removed.
    CompactionScheduled { at: i64 },
    /// An alarm was raised or cleared.
    AlarmsChanged,
    /// A member was added, removed, promoted or updated, or has published its attributes.
    MembersChanged,
    /// A member was started, and knows this capability level.
    MemberStarted { id: u64, level: u64 },
    /// What a login, or a change of users, requires of the tokens that this member keeps.
    Tokens(TokenEffect),
}

/// How many operations were executed, those in transactions included.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct OperationCounts {
    pub puts: u64,
    /// The keys and values of the puts.
    pub put_bytes: u64,
    pub deletes: u64,
    /// Ranges in transactions. Others are no commands.
    pub ranges: u64,
    /// Requests that have executed several operations, which is what etcd counts as transactions.
    pub txns: u64,
}

impl OperationCounts {
    /// Operations of all kinds.
    fn operations(&self) -> u64 {
        self.puts + self.deletes + self.ranges
    }

    /// Counts a request that has executed all operations since there were this many.
    fn add_txn_since(&mut self, before: u64) {
        self.txns += u64::from(self.operations() - before > 1);
    }
}

/// The effects of a batch of entries that was written to the database.
#[derive(Debug, Default)]
pub struct Published {
    /// Every change to a key, in order.
    pub events: Vec<Event>,
    /// All other changes, in order.
    pub effects: Vec<Effect>,
    pub counts: OperationCounts,
    /// The revision that becomes readable with this batch.
    pub head: i64,
}

/// The applied position of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppliedPosition {
    /// The index of the last applied entry.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// The revision of the key space.
    pub head: i64,
}

impl AppliedPosition {
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

    /// The applied position, including writes that are not flushed; None if the database was never initialised.
    pub fn of(engine: &dyn Engine) -> Result<Option<Self>, Halt> {
        Self::read(engine.get(Table::Meta, meta::APPLIED)?)
    }

    /// The applied position as a crash right now would leave it.
    pub fn durable(engine: &dyn Engine) -> Result<Option<Self>, Halt> {
        Self::read(engine.get_durable(Table::Meta, meta::APPLIED)?)
    }

    fn read(stored: Option<Bytes>) -> Result<Option<Self>, Halt> {
        let damaged =
            || Halt::InvalidData("the database is corrupt: cannot decode `applied`, the applied position".into());
        stored.map(|bytes| Self::decode(&bytes).ok_or_else(damaged)).transpose()
    }
}

/// The published state other than keys and leases.
#[derive(Debug, Default, Clone)]
pub struct ClusterState {
    pub members: Members,
    pub alarms: Alarms,
    /// The version that all members support, `X.Y.0`; empty until it is decided.
    pub cluster_version: String,
    /// Which kinds of entries the log may contain: see [`capability`].
    pub capability_level: u64,
}

/// Reads the published state, from any thread.
#[derive(Clone)]
pub struct Readers {
    pub keys: mvcc::Reader,
    pub leases: lease::Reader,
    pub auth: auth::Reader,
    /// Everything else.
    pub cluster: Arc<RwLock<ClusterState>>,
}

/// The state machine. One thread owns it.
pub struct Machine {
    engine: Arc<dyn Engine>,
    store: Store,
    leases: Leases,
    auth: Auth,
    auth_changed: bool,
    auth_reader: auth::Reader,
    /// The capability level that this member knows.
    known_level: u64,
    cluster: ClusterState,
    cluster_changed: bool,
    shared_cluster: Arc<RwLock<ClusterState>>,
    batch: Batch,
    effects: Vec<Effect>,
    counts: OperationCounts,
    applied: AppliedPosition,
}

impl Machine {
    /// Initialises the database of a new member with the initial members, as of the index and term `at`. A member that joins a
    /// cluster starts with no members at position 0: it receives everything from the others.
    pub fn bootstrap(engine: &dyn Engine, cluster_id: u64, members: &Members, at: (u64, u64)) -> Result<(), Halt> {
        let mut batch = Batch::default();
        members.write(&mut batch);
        batch.put(Table::Meta, meta::CLUSTER_ID, cluster_id.to_be_bytes().to_vec());
        let progress = AppliedPosition { index: at.0, term: at.1, head: 1 };
        batch.put(Table::Meta, meta::APPLIED, progress.encode().to_vec());
        engine.write(&batch)?;
        engine.flush()
    }

    /// Reads the state from a database. `value_cache_bytes` limits the memory for recently used values.
    pub fn open(engine: Arc<dyn Engine>, value_cache_bytes: u64) -> Result<Self, Halt> {
        let uninitialised =
            || Halt::InvalidData("the database was never initialised: it has no `applied` position".into());
        let applied = AppliedPosition::of(engine.as_ref())?.ok_or_else(uninitialised)?;
        let mut leases = Leases::restore(engine.as_ref())?;
        let mut orphans = 0_u64;
        let store = Store::open(engine.clone(), applied.head, value_cache_bytes, &mut |key, lease| {
            orphans += u64::from(leases.attach(lease::LeaseId(lease), key).is_err());
        })?;
        if orphans > 0 {
            tracing::warn!(
                keys = orphans,
                "keys are attached to leases that do not exist; they are kept and never expire"
            );
        }
        let cluster_version = engine.get(Table::Meta, meta::CLUSTER_VERSION)?.unwrap_or_default();
        let cluster = ClusterState {
            members: Members::read(engine.as_ref())?,
            alarms: Alarms::read(engine.as_ref())?,
            cluster_version: String::from_utf8_lossy(&cluster_version).into_owned(),
            capability_level: capability_level(engine.as_ref())?,
        };
        let auth = Auth::read(engine.as_ref())?;
        let shared_cluster = Arc::new(RwLock::new(cluster.clone()));
        let machine = Self {
            engine,
            store,
            leases,
            auth_reader: auth::Reader::new(&auth),
            auth,
            auth_changed: false,
            known_level: CAPABILITY_LEVEL,
            cluster,
            cluster_changed: false,
            shared_cluster,
            batch: Batch::default(),
            effects: Vec::new(),
            counts: OperationCounts::default(),
            applied,
        };
        machine.check_known(machine.cluster.capability_level)?;
        Ok(machine)
    }

    /// The applied position, including the current batch.
    #[must_use]
    pub fn applied(&self) -> AppliedPosition {
        self.applied
    }

    /// The members, including changes of the current batch.
    #[must_use]
    pub fn members(&self) -> &Members {
        &self.cluster.members
    }

    #[must_use]
    pub fn capability_level(&self) -> u64 {
        self.cluster.capability_level
    }

    #[must_use]
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    #[must_use]
    pub fn readers(&self) -> Readers {
        Readers {
            keys: self.store.reader(),
            leases: self.leases.reader().clone(),
            auth: self.auth_reader.clone(),
            cluster: self.shared_cluster.clone(),
        }
    }

    /// The shared part of the key space, for [`mvcc::compact`].
    #[must_use]
    pub fn shared(&self) -> &Arc<mvcc::Shared> {
        self.store.shared()
    }

    /// Writes everything that was applied since the last call to the database, together with the applied index, in one batch.
    /// Readers see it after [`Machine::publish_head`].
    pub fn commit(&mut self) -> Result<Published, Halt> {
        self.applied.head = self.store.head();
        self.batch.put(Table::Meta, meta::APPLIED, self.applied.encode().to_vec());
        self.engine.write(&self.batch)?;
        self.batch.clear();
        let events = self.store.publish();
        if std::mem::take(&mut self.auth_changed) {
            self.auth_reader.publish(&self.auth);
        }
        if std::mem::take(&mut self.cluster_changed) {
            *self.shared_cluster.write() = self.cluster.clone();
        }
        let (effects, counts) = (std::mem::take(&mut self.effects), std::mem::take(&mut self.counts));
        Ok(Published { events, effects, counts, head: self.applied.head })
    }

    /// Publishes the last commit to readers. The caller must have passed its events to the watch hub before.
    pub fn publish_head(&self) {
        self.store.publish_head();
    }
}

/// The capability level that a database was written with.
fn capability_level(engine: &dyn Engine) -> Result<u64, Halt> {
    let Some(stored) = engine.get(Table::Meta, meta::CAPABILITY_LEVEL)? else { return Ok(0) };
    decode_u64(&stored)
        .ok_or_else(|| Halt::InvalidData("the database is corrupt: cannot decode `capability_level`".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::Memory;

    #[test]
    fn a_joining_member_starts_without_members_and_entries() {
        let engine: Arc<dyn Engine> = Arc::new(Memory::default());
        Machine::bootstrap(engine.as_ref(), 7, &Members::default(), (0, 0)).unwrap();
        let mut machine = Machine::open(engine.clone(), 1 << 20).unwrap();
        assert_eq!(machine.applied(), AppliedPosition { index: 0, term: 0, head: 1 });
        assert_eq!(machine.members().voters_and_learners(), VotersAndLearners::default());
        machine.apply(&Entry { index: 1, term: 1, data: Bytes::new(), changes_members: false }).unwrap();
        machine.commit().unwrap();
        assert_eq!(AppliedPosition::of(engine.as_ref()).unwrap().unwrap().index, 1);
    }
}
