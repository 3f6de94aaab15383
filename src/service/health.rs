//! What this member reports of itself to those that watch over it: its health, and its metrics.

use std::time::{Duration, Instant};

use super::Service;
use crate::{
    cluster::await_outcome,
    error::Error,
    metrics::{self, METRICS},
    mvcc::{Interval, Query},
    node::replica::RaftStatus,
    proto::etcdserverpb::AlarmType,
    state::{CORRUPT, NOSPACE},
    storage::TableUsage,
};

/// How long asking the raft thread for its state may take.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);
/// A health check fails after this time.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(7);

/// One condition of being alive or ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// This member can read.
    SerializableRead,
    /// This member can read what the cluster has agreed on.
    LinearizableRead,
    /// No member's data is known to differ from that of others.
    DataCorruption,
    /// This member is a voter.
    NonLearner,
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn length(value: usize) -> i64 {
    number(value as u64)
}

impl Service {
    /// Whether a condition holds; if not, why.
    pub async fn check(&self, check: Check) -> Result<(), String> {
        match check {
            Check::SerializableRead => self.read_one_key(true).await,
            Check::LinearizableRead => self.read_one_key(false).await,
            Check::DataCorruption if self.readers().cluster.read().alarms.list(CORRUPT).is_empty() => Ok(()),
            Check::DataCorruption => Err("alarm activated: CORRUPT".to_owned()),
            Check::NonLearner if self.node().status().is_learner() => Err("not supported for learner".to_owned()),
            Check::NonLearner => Ok(()),
        }
    }

    /// Whether this member can serve; if not, why. `excluded` are names of alarms that do not count.
    pub async fn check_health(&self, serializable: bool, excluded: &[String]) -> Result<(), String> {
        for alarm in self.readers().cluster.read().alarms.list(0) {
            let name = match alarm.alarm {
                NOSPACE => "NOSPACE",
                CORRUPT => "CORRUPT",
                _ => "UNKNOWN",
            };
            if excluded.iter().all(|excluded| excluded != name) {
                return Err(format!("ALARM {name}"));
            }
        }
        if !serializable && self.node().status().leader() == 0 {
            return Err("RAFT NO LEADER".to_owned());
        }
        self.read_one_key(serializable).await.map_err(|error| format!("RANGE ERROR:{error}"))
    }

    /// Counts as a Range, as in etcd.
    async fn read_one_key(&self, serializable: bool) -> Result<(), String> {
        let admitted = Instant::now();
        if !serializable {
            let barrier = await_outcome(|waiter| self.node().read_barrier(waiter));
            let result = tokio::time::timeout(HEALTH_TIMEOUT, barrier).await;
            result.unwrap_or(Err(Error::Timeout)).map_err(|error| error.to_string())?;
        }
        let reading = Instant::now();
        let query = Query { limit: 1, keys_only: true, ..Query::all(Interval::From("\0".into())) };
        let found = self.readers().keys.range(&query);
        METRICS.ranges.inc();
        metrics::observe_range(found.is_ok(), reading.elapsed(), admitted.elapsed());
        found.map(|_| ()).map_err(|error| error.to_string())
    }

    /// The state of raft; None if the raft thread does not answer.
    pub async fn raft_status(&self) -> Option<RaftStatus> {
        let status = await_outcome(|waiter| self.node().raft_status(Box::new(move |status| waiter(Ok(status)))));
        tokio::time::timeout(STATUS_TIMEOUT, status).await.ok()?.ok()
    }

    fn refresh_alarms(&self) {
        let raised = self.readers().cluster.read().alarms.list(0);
        METRICS.alarms.reset();
        for alarm in raised {
            let kind = AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |kind| kind.as_str_name());
            METRICS.alarms.with_label_values(&[format!("{:x}", alarm.member_id).as_str(), kind]).set(1);
        }
    }

    fn refresh_queues(&self) {
        let status = self.node().status();
        let (raft, background) = self.node().waiting_inputs();
        for (queue, waiting) in [
            ("raft", length(raft)),
            ("background", length(background)),
            ("apply", number(status.committed().saturating_sub(status.applied()))),
            ("read_pool", length(self.read_pool().waiting())),
            ("passwords", length(self.authentication.passwords.waiting())),
            ("hashes", length(self.scans.waiting() + self.cluster.scans.waiting())),
        ] {
            METRICS.queue_length.with_label_values(&[queue]).set(waiting);
        }
    }

    fn refresh_tables(&self) {
        for usage in self.node().engine().tables().unwrap_or_else(|halt| halt.abort()) {
            let TableUsage { name, file_bytes, memtable_bytes, keys, pending_compaction_bytes } = usage;
            METRICS.table_bytes.with_label_values(&[name, "files"]).set(number(file_bytes));
            METRICS.table_bytes.with_label_values(&[name, "memtables"]).set(number(memtable_bytes));
            METRICS.table_keys.with_label_values(&[name]).set(number(keys));
            METRICS.pending_compaction_bytes.with_label_values(&[name]).set(number(pending_compaction_bytes));
        }
    }

    /// Sets the metrics that are measured only when they are scraped.
    pub fn refresh_metrics(&self) {
        if let Err(halt) = self.node().measure() {
            halt.abort();
        }
        let status = self.node().status();
        let keys = &self.readers().keys;
        METRICS.proposals_committed.set(number(status.committed()));
        METRICS.proposals_applied.set(number(status.applied()));
        METRICS.db_total_bytes.set(status.total_bytes());
        METRICS.db_in_use_bytes.set(status.in_use_bytes());
        METRICS.is_leader.set(i64::from(status.leader() == self.cluster.member_id));
        METRICS.current_revision.set(keys.head());
        METRICS.compact_revision.set(keys.compacted());
        METRICS.keys.set(length(keys.keys()));
        METRICS.history_bytes.set(number(keys.history_bytes()));
        METRICS.open_views.set(length(keys.open_views()));
        METRICS.auth_revision.set(number(self.readers().auth.tables().revision()));
        METRICS.watch_lag.set(self.hub.lag(keys.head()));
        metrics::set_cache_lookups("values", keys.cache_lookups());
        self.refresh_alarms();
        self.refresh_queues();
        self.refresh_tables();
        metrics::refresh_thread_times();
        let (index, value_cache) = keys.memory();
        metrics::set_memory_bytes("index", index);
        metrics::set_memory_bytes("value_cache", value_cache);
        metrics::set_memory_bytes("watch_ring", self.hub.ring_bytes() as u64);
        metrics::set_memory_bytes("watch_pending", self.hub.pending_bytes() as u64);
    }
}
