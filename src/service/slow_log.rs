//! Logs slow calls and reads, with etcd's messages, because operators and tools search for them.

use std::time::{Duration, Instant};

/// The durations from which calls and reads are logged as slow.
#[derive(Debug, Clone, Copy)]
pub struct SlowLog {
    /// The threshold for a call (`--warning-unary-request-duration`).
    pub call_threshold: Duration,
    /// The threshold for reading the state (`--warning-apply-duration`).
    pub read_threshold: Duration,
}

impl SlowLog {
    /// Logs a unary call that has ended: at WARN if it was slow, otherwise at DEBUG.
    pub fn note_call(&self, method: &'static str, spent: Duration, request_bytes: usize, response_bytes: usize) {
        macro_rules! stats {
            ($level:ident) => {
                tracing::$level!(
                    {
                        "time spent" = ?spent,
                        "response type" = method,
                        "request size" = request_bytes,
                        "response size" = response_bytes
                    },
                    "request stats"
                )
            };
        }
        if spent > self.call_threshold {
            stats!(warn);
        } else {
            stats!(debug);
        }
    }

    /// Logs a read if it was slow.
    pub fn note_read(&self, started: Instant, what: &'static str) {
        let took = started.elapsed();
        if took > self.read_threshold {
            crate::metrics::METRICS.slow_applies.inc();
            tracing::warn!(
                { took = ?took, "expected-duration" = ?self.read_threshold, prefix = what },
                "apply request took too long"
            );
        }
    }
}
