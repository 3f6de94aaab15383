//! What this member reports of itself to those that watch over it: its health, and its metrics.

use std::time::Duration;

use super::Service;
use crate::{
    cluster::await_outcome,
    error::Error,
    metrics::{self, METRICS},
    mvcc::{Interval, Query},
    state::{CORRUPT, NOSPACE},
};

/// A health check fails after this time.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(7);

impl Service {
    /// Whether this member can serve; if not, why. `excluded` are names of alarms that do not count.
    pub async fn check_health(&self, serializable: bool, excluded: &[&str]) -> Result<(), String> {
        for alarm in self.readers().cluster.read().alarms.list(0) {
            let name = match alarm.alarm {
                NOSPACE => "NOSPACE",
                CORRUPT => "CORRUPT",
                _ => "UNKNOWN",
            };
            if !excluded.contains(&name) {
                return Err(format!("ALARM {name}"));
            }
        }
        if !serializable && self.node().status().leader() == 0 {
            return Err("RAFT NO LEADER".to_owned());
        }
        if !serializable {
            let barrier = await_outcome(|waiter| self.node().read_barrier(waiter));
            let result = tokio::time::timeout(HEALTH_TIMEOUT, barrier).await;
            result.unwrap_or(Err(Error::Timeout)).map_err(|error| format!("RANGE ERROR:{error}"))?;
        }
        let query = Query { limit: 1, keys_only: true, ..Query::all(Interval::From("\0".into())) };
        self.readers().keys.range(&query).map(|_| ()).map_err(|error| format!("RANGE ERROR:{error}"))
    }

    /// Sets the metrics that are measured only when they are scraped.
    pub fn refresh_metrics(&self) {
        if let Err(halt) = self.node().measure() {
            halt.abort();
        }
        let status = self.node().status();
        let keys = &self.readers().keys;
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        METRICS.proposals_committed.set(number(status.committed()));
        METRICS.proposals_applied.set(number(status.applied()));
        METRICS.db_total_bytes.set(status.total_bytes());
        METRICS.db_in_use_bytes.set(status.in_use_bytes());
        METRICS.is_leader.set(i64::from(status.leader() == self.cluster.member_id));
        METRICS.current_revision.set(keys.head());
        METRICS.compact_revision.set(keys.compacted());
        METRICS.keys.set(i64::try_from(keys.keys()).unwrap_or(i64::MAX));
        METRICS.history_bytes.set(number(keys.history_bytes()));
        let (index, value_cache) = keys.memory();
        metrics::set_memory_bytes("index", index);
        metrics::set_memory_bytes("value_cache", value_cache);
        metrics::set_memory_bytes("watch_ring", self.hub.ring_bytes() as u64);
        metrics::set_memory_bytes("watch_pending", self.hub.pending_bytes() as u64);
    }
}
