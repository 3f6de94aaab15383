//! The node's indexes, terms and sizes, each an atomic that one thread writes and any thread reads; and which members are
//! connected, and since when.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::clock::Clock;
use crate::{error::Halt, metrics, storage::Engine};

/// The node's indexes, terms and sizes.
#[derive(Debug)]
pub struct Status {
    clock: Clock,
    /// A raft thread that counts no tick for longer than this has stalled: it was paused, or its disk does not respond.
    stalled_after: Duration,
    /// When it counted the last tick, in nanoseconds.
    ticked_at: AtomicU64,
    /// How often it has stalled.
    stalls: AtomicU64,
    leader: AtomicU64,
    leader_term: AtomicU64,
    term: AtomicU64,
    committed: AtomicU64,
    applied: AtomicU64,
    applied_term: AtomicU64,
    /// Whether this member leads a cluster that has no other member, and has caught up.
    is_sole_leader: AtomicBool,
    is_learner: AtomicBool,
    capability_level: AtomicU64,
    /// How many starts of other members this one has applied, of those that know capability levels.
    started_members: AtomicU64,
    /// Bytes written to the log since the last flush of the database, including those of earlier runs of this member.
    unflushed_log_bytes: AtomicU64,
    /// The total cost of all writes, as the quota charges for them, and how much of that is in the last measurement.
    written_bytes: AtomicU64,
    measured_bytes: AtomicU64,
    total_bytes: AtomicI64,
    in_use_bytes: AtomicI64,
    /// In how many seconds the quota is expected to be used up, as the bits of a float.
    quota_full_seconds: AtomicU64,
}

/// What entitles this member to decide about leases: the term in which it leads, and how often its raft thread has stalled since
/// it started. If two values are equal, nothing happened between them that could have let another member take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Authority {
    pub term: u64,
    pub stalls: u64,
}

impl Default for Status {
    fn default() -> Self {
        Self::new(Clock::default(), Duration::MAX)
    }
}

impl Status {
    /// The raft thread is considered stalled when it counts no tick for longer than `stalled_after`.
    #[must_use]
    pub fn new(clock: Clock, stalled_after: Duration) -> Self {
        let ticked_at = AtomicU64::new(nanos(clock.now()));
        Self {
            clock,
            stalled_after,
            ticked_at,
            stalls: AtomicU64::default(),
            leader: AtomicU64::default(),
            leader_term: AtomicU64::default(),
            term: AtomicU64::default(),
            committed: AtomicU64::default(),
            applied: AtomicU64::default(),
            applied_term: AtomicU64::default(),
            is_sole_leader: AtomicBool::default(),
            is_learner: AtomicBool::default(),
            capability_level: AtomicU64::default(),
            started_members: AtomicU64::default(),
            unflushed_log_bytes: AtomicU64::default(),
            written_bytes: AtomicU64::default(),
            measured_bytes: AtomicU64::default(),
            total_bytes: AtomicI64::default(),
            in_use_bytes: AtomicI64::default(),
            quota_full_seconds: AtomicU64::new(f64::INFINITY.to_bits()),
        }
    }

    /// The node's clock.
    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The leader's ID; zero if none is known.
    pub fn leader(&self) -> u64 {
        self.leader.load(Ordering::Relaxed)
    }

    /// Raft's current term.
    pub fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    /// The highest commit index seen.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// The last applied index.
    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// The term of the last applied entry, which is the one in response headers.
    pub fn applied_term(&self) -> u64 {
        self.applied_term.load(Ordering::Acquire)
    }

    /// Whether this member leads a cluster that has no other member, and has applied an entry of its own term: then everything
    /// that was ever acknowledged can be read here, without a round of ReadIndex.
    pub fn is_sole_leader(&self) -> bool {
        self.is_sole_leader.load(Ordering::Acquire)
    }

    /// The capability level of the cluster, as far as this member has applied the log.
    #[must_use]
    pub fn capability_level(&self) -> u64 {
        self.capability_level.load(Ordering::Relaxed)
    }

    /// Whether this member is a learner.
    pub fn is_learner(&self) -> bool {
        self.is_learner.load(Ordering::Relaxed)
    }

    /// The size of the database, as last measured.
    pub fn total_bytes(&self) -> i64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// The estimated current size of the database: as last measured, plus the cost of writes since then.
    pub fn estimated_bytes(&self) -> i64 {
        let measured = self.measured_bytes.load(Ordering::Acquire);
        let since = self.written_bytes.load(Ordering::Relaxed).saturating_sub(measured);
        self.total_bytes().saturating_add_unsigned(since)
    }

    /// The part of the database's size that holds live data, as last measured.
    pub fn in_use_bytes(&self) -> i64 {
        self.in_use_bytes.load(Ordering::Relaxed)
    }

    /// In how many seconds the quota is expected to be used up; infinite if the database does not grow.
    pub fn quota_full_seconds(&self) -> f64 {
        f64::from_bits(self.quota_full_seconds.load(Ordering::Relaxed))
    }

    pub(super) fn set_quota_full_seconds(&self, seconds: f64) {
        self.quota_full_seconds.store(seconds.to_bits(), Ordering::Relaxed);
    }

    /// Bytes in the log that are newer than the last flush of the database.
    pub fn unflushed_log_bytes(&self) -> u64 {
        self.unflushed_log_bytes.load(Ordering::Relaxed)
    }

    /// What entitles this member to decide about leases now; None if it does not lead, or its raft thread has stalled.
    pub(super) fn authority(&self) -> Option<Authority> {
        // The order matters: a stall is counted before the tick that ends it, and reading the time last accounts for a pause of
        // the calling thread.
        let ticked_at = Duration::from_nanos(self.ticked_at.load(Ordering::Acquire));
        let authority = Authority { stalls: self.stalls.load(Ordering::Acquire), term: self.leader_term() };
        let is_stalled = self.clock.now().saturating_sub(ticked_at) > self.stalled_after;
        (authority.term != 0 && !is_stalled).then_some(authority)
    }

    /// Call when the raft thread has counted a tick, and its disk responds.
    pub(super) fn set_ticked(&self) {
        let now = self.clock.now();
        let before = Duration::from_nanos(self.ticked_at.load(Ordering::Relaxed));
        if now.saturating_sub(before) > self.stalled_after {
            self.stalls.fetch_add(1, Ordering::Release);
        }
        self.ticked_at.store(nanos(now), Ordering::Release);
    }

    /// The term in which this member leads, according to raft; zero if it does not lead.
    pub(super) fn leader_term(&self) -> u64 {
        self.leader_term.load(Ordering::Acquire)
    }

    pub(super) fn set_leader_term(&self, term: u64) {
        self.leader_term.store(term, Ordering::Release);
    }

    pub(super) fn set_leader(&self, leader: u64) {
        let before = self.leader.swap(leader, Ordering::Relaxed);
        metrics::leader_changed(before, leader);
    }

    /// How often other members were started, as far as this one has applied the log: those that know capability levels.
    #[must_use]
    pub fn started_members(&self) -> u64 {
        self.started_members.load(Ordering::Relaxed)
    }

    pub(super) fn note_started_member(&self) {
        self.started_members.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_capability_level(&self, level: u64) {
        self.capability_level.store(level, Ordering::Relaxed);
        metrics::METRICS.capability_level.set(i64::try_from(level).unwrap_or(i64::MAX));
    }

    pub(super) fn set_is_learner(&self, learner: bool) {
        self.is_learner.store(learner, Ordering::Relaxed);
        metrics::METRICS.is_learner.set(i64::from(learner));
    }

    pub(super) fn set_is_sole_leader(&self, sole: bool) {
        self.is_sole_leader.store(sole, Ordering::Release);
    }

    pub(super) fn set_term(&self, term: u64) {
        self.term.store(term, Ordering::Relaxed);
    }

    pub(super) fn set_committed(&self, index: u64) {
        self.committed.store(index, Ordering::Relaxed);
    }

    pub(super) fn set_applied(&self, index: u64, term: u64) {
        self.applied_term.store(term, Ordering::Release);
        self.applied.store(index, Ordering::Release);
    }

    /// Adds the cost of a write. The write must be in the database already, so that no measurement misses it.
    pub(super) fn add_written(&self, cost: u64) {
        self.written_bytes.fetch_add(cost, Ordering::Relaxed);
    }

    pub(super) fn measure(&self, engine: &dyn Engine) -> Result<(), Halt> {
        let written = self.written_bytes.load(Ordering::Relaxed);
        let size = engine.size()?;
        self.total_bytes.store(size.total_bytes.cast_signed(), Ordering::Relaxed);
        self.in_use_bytes.store(size.in_use_bytes.cast_signed(), Ordering::Relaxed);
        self.measured_bytes.store(written, Ordering::Release);
        metrics::set_memory_bytes("memtables", size.memtable_bytes);
        metrics::set_memory_bytes("block_cache", size.block_cache_bytes);
        Ok(())
    }

    pub(super) fn add_log_write(&self, bytes: u64, write: Duration, sync: Duration) {
        self.unflushed_log_bytes.fetch_add(bytes, Ordering::Relaxed);
        metrics::observe_log_write(bytes, write, sync);
    }

    pub(super) fn set_unflushed(&self, bytes: u64) {
        self.unflushed_log_bytes.store(bytes, Ordering::Relaxed);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).expect("a process runs for less than five centuries")
}

/// The connections of this member to others. A connection is active from its handshake until its first failure.
#[derive(Debug, Default)]
pub struct Connectivity(Mutex<BTreeMap<u64, Instant>>);

impl Connectivity {
    /// Adds a connection; returns how many there are.
    pub(super) fn connected(&self, member: u64, now: Instant) -> usize {
        let mut connectivity = self.0.lock();
        connectivity.insert(member, now);
        connectivity.len()
    }

    /// Removes the connection of that time, which has failed or was given up, unless another one has replaced it.
    pub(super) fn disconnected(&self, member: u64, since: Instant) {
        let mut connectivity = self.0.lock();
        if connectivity.get(&member) == Some(&since) {
            connectivity.remove(&member);
        }
    }

    /// For how long a member has been connected; None if it is not.
    #[must_use]
    pub fn active_for(&self, member: u64) -> Option<Duration> {
        self.0.lock().get(&member).map(Instant::elapsed)
    }

    /// The eligible member that has been connected for longest.
    #[must_use]
    pub fn longest_connected(&self, eligible: impl Fn(u64) -> bool) -> Option<u64> {
        let connectivity = self.0.lock();
        connectivity
            .iter()
            .filter(|(member, _)| eligible(**member))
            .min_by_key(|(_, since)| **since)
            .map(|(member, _)| *member)
    }
}
