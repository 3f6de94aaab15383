//! Logs slow calls and reads, with etcd's messages, because operators and tools search for them.

use std::time::{Duration, Instant};

use super::table::Method;
use crate::call::CallResult;

/// The durations from which calls and reads are logged as slow.
#[derive(Debug, Clone, Copy)]
pub struct Slow {
    /// The threshold for a call (`--warning-unary-request-duration`).
    pub call: Duration,
    /// The threshold for reading the state (`--warning-apply-duration`).
    pub read: Duration,
}

impl Slow {
    /// Logs a unary call that has ended: at WARN if it was slow, otherwise at DEBUG.
    pub fn note_call(&self, method: &Method, spent: Duration, request_bytes: usize, answer: &CallResult) {
        let response_bytes = answer.as_ref().map_or(0, bytes::Bytes::len);
        macro_rules! stats {
            ($level:ident) => {
                tracing::$level!(
                    {
                        "time spent" = ?spent,
                        "response type" = method.path,
                        "request size" = request_bytes,
                        "response size" = response_bytes
                    },
                    "request stats"
                )
            };
        }
        if spent > self.call {
            stats!(warn);
        } else {
            stats!(debug);
        }
    }

    /// Logs a read if it was slow.
    pub fn note_read(&self, started: Instant, what: &'static str) {
        let took = started.elapsed();
        if took > self.read {
            crate::metrics::METRICS.slow_applies.inc();
            tracing::warn!(
                { took = ?took, "expected-duration" = ?self.read, prefix = what },
                "apply request took too long"
            );
        }
    }
}
