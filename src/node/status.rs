//! What everybody may know about this node, as numbers that one thread writes and any thread reads.

use std::{
    sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    time::Duration,
};

use super::clock::Clock;
use crate::{error::Halt, metrics, storage::Engine};

/// The node in numbers.
#[derive(Debug)]
pub struct Status {
    clock: Clock,
    /// A raft thread that counts no tick for longer than this is away: paused, or without its disk.
    away_after: Duration,
    /// When it counted the last one, in nanoseconds.
    ticked_at: AtomicU64,
    /// How often it was away.
    absences: AtomicU64,
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

/// What entitles this member to decide about leases: the term in which it leads, and how often it was away since it started.
/// Two that are equal were taken while nothing happened that another member could have used to take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Authority {
    pub term: u64,
    pub absences: u64,
}

impl Default for Status {
    fn default() -> Self {
        Self::new(Clock::default(), Duration::MAX)
    }
}

impl Status {
    /// A node that has done nothing yet. A raft thread is away when it counts no tick for longer than `away_after`.
    #[must_use]
    pub fn new(clock: Clock, away_after: Duration) -> Self {
        let ticked_at = AtomicU64::new(nanos(clock.now()));
        Self {
            clock,
            away_after,
            ticked_at,
            absences: AtomicU64::default(),
            leader: AtomicU64::default(),
            reign: AtomicU64::default(),
            term: AtomicU64::default(),
            committed: AtomicU64::default(),
            applied: AtomicU64::default(),
            applied_term: AtomicU64::default(),
            rules_alone: AtomicBool::default(),
            is_learner: AtomicBool::default(),
            unflushed_log_bytes: AtomicU64::default(),
            written_bytes: AtomicU64::default(),
            measured_bytes: AtomicU64::default(),
            total_bytes: AtomicI64::default(),
            in_use_bytes: AtomicI64::default(),
        }
    }

    /// The time, as this node reads it.
    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

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

    /// What entitles this member to decide about leases now; None if it does not lead, or is away.
    pub(super) fn authority(&self) -> Option<Authority> {
        // In this order: an absence is counted before the tick that ends it, and a pause of the calling thread shows in the
        // time that is read last.
        let ticked_at = Duration::from_nanos(self.ticked_at.load(Ordering::Acquire));
        let authority = Authority { absences: self.absences.load(Ordering::Acquire), term: self.reign() };
        let is_away = self.clock.now().saturating_sub(ticked_at) > self.away_after;
        (authority.term != 0 && !is_away).then_some(authority)
    }

    /// The raft thread has counted a tick, and its disk works.
    pub(super) fn set_ticked(&self) {
        let now = self.clock.now();
        let before = Duration::from_nanos(self.ticked_at.load(Ordering::Relaxed));
        if now.saturating_sub(before) > self.away_after {
            self.absences.fetch_add(1, Ordering::Release);
        }
        self.ticked_at.store(nanos(now), Ordering::Release);
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

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).expect("a process runs for less than five centuries")
}
