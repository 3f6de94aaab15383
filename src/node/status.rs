//! What everybody may know about this node, as numbers that one thread writes and any thread reads.

use std::{
    sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::{error::Halt, metrics, storage::Engine};

/// The node in numbers.
#[derive(Debug, Default)]
pub struct Status {
    ticked: LastTick,
    leader: AtomicU64,
    reign: AtomicU64,
    term: AtomicU64,
    committed: AtomicU64,
    applied: AtomicU64,
    applied_term: AtomicU64,
    /// Whether this member leads a cluster that has no other member, and has caught up.
    rules_alone: AtomicBool,
    is_learner: AtomicBool,
    /// Bytes that the log has taken since the last flush of the database, by an earlier life of this member too.
    unflushed_log_bytes: AtomicU64,
    /// What was ever written, as the quota charges for it, and how much of that is in the last measurement.
    written_bytes: AtomicU64,
    measured_bytes: AtomicU64,
    total_bytes: AtomicI64,
    in_use_bytes: AtomicI64,
}

/// When raft counted its last tick.
#[derive(Debug)]
struct LastTick {
    started: Instant,
    /// Milliseconds since then.
    at_ms: AtomicU64,
}

impl Default for LastTick {
    fn default() -> Self {
        Self { started: Instant::now(), at_ms: AtomicU64::default() }
    }
}

impl Status {
    /// The leader's ID, or zero.
    pub fn leader(&self) -> u64 {
        self.leader.load(Ordering::Relaxed)
    }

    /// The present term of raft.
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

    /// The term of the last applied entry: what headers show.
    pub fn applied_term(&self) -> u64 {
        self.applied_term.load(Ordering::Acquire)
    }

    /// Whether this member leads a cluster that has no other member, and has applied an entry of its own term: then nothing
    /// was ever acknowledged that cannot be read here, and there is nobody to ask.
    pub fn rules_alone(&self) -> bool {
        self.rules_alone.load(Ordering::Acquire)
    }

    /// Whether this member is in the cluster and only learns.
    pub fn is_learner(&self) -> bool {
        self.is_learner.load(Ordering::Relaxed)
    }

    /// Size of the database, as last measured.
    pub fn total_bytes(&self) -> i64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// Size of the database by now: as last measured, and what was written since.
    pub fn estimated_bytes(&self) -> i64 {
        let measured = self.measured_bytes.load(Ordering::Acquire);
        let since = self.written_bytes.load(Ordering::Relaxed).saturating_sub(measured);
        self.total_bytes().saturating_add_unsigned(since)
    }

    /// The part of it that holds data, as last measured.
    pub fn in_use_bytes(&self) -> i64 {
        self.in_use_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that the log holds behind the last flush of the database.
    pub fn unflushed_log_bytes(&self) -> u64 {
        self.unflushed_log_bytes.load(Ordering::Relaxed)
    }

    /// How long ago raft counted its last tick.
    pub fn since_tick(&self) -> Duration {
        let LastTick { started, at_ms } = &self.ticked;
        started.elapsed().saturating_sub(Duration::from_millis(at_ms.load(Ordering::Relaxed)))
    }

    pub(super) fn set_ticked(&self) {
        let now = self.ticked.started.elapsed().as_millis();
        self.ticked.at_ms.store(u64::try_from(now).expect("a process runs for less than that"), Ordering::Relaxed);
    }

    /// The term in which this member leads, as raft knows it; zero if it does not.
    pub(super) fn reign(&self) -> u64 {
        self.reign.load(Ordering::Acquire)
    }

    pub(super) fn set_reign(&self, term: u64) {
        self.reign.store(term, Ordering::Release);
    }

    pub(super) fn set_leader(&self, leader: u64) {
        let before = self.leader.swap(leader, Ordering::Relaxed);
        metrics::leader_changed(before, leader);
    }

    pub(super) fn set_is_learner(&self, learner: bool) {
        self.is_learner.store(learner, Ordering::Relaxed);
        metrics::METRICS.is_learner.set(i64::from(learner));
    }

    pub(super) fn set_rules_alone(&self, alone: bool) {
        self.rules_alone.store(alone, Ordering::Release);
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

    /// Something of this cost was written. It is in the database already, so no measurement misses it.
    pub(super) fn wrote(&self, cost: u64) {
        self.written_bytes.fetch_add(cost, Ordering::Relaxed);
    }

    pub(super) fn measure(&self, engine: &dyn Engine) -> Result<(), Halt> {
        let written = self.written_bytes.load(Ordering::Relaxed);
        let size = engine.size()?;
        self.total_bytes.store(size.total_bytes.cast_signed(), Ordering::Relaxed);
        self.in_use_bytes.store(size.in_use_bytes.cast_signed(), Ordering::Relaxed);
        self.measured_bytes.store(written, Ordering::Release);
        metrics::measured("memtables", size.memtable_bytes);
        metrics::measured("block_cache", size.block_cache_bytes);
        Ok(())
    }

    pub(super) fn logged(&self, bytes: u64, write: Duration, sync: Duration) {
        self.unflushed_log_bytes.fetch_add(bytes, Ordering::Relaxed);
        metrics::logged(bytes, write, sync);
    }

    pub(super) fn set_unflushed(&self, bytes: u64) {
        self.unflushed_log_bytes.store(bytes, Ordering::Relaxed);
    }
}
