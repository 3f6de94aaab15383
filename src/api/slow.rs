//! What took long, said in the log in etcd's words: people and tools look for them.

use std::time::{Duration, Instant};

use super::table::Method;
use crate::call::Answer;

/// What takes long.
#[derive(Debug, Clone, Copy)]
pub struct Slow {
    /// A call.
    pub call: Duration,
    /// Reading the state for one.
    pub read: Duration,
}

impl Slow {
    /// A call with one message each way has ended. Every call is worth a line to who asked for debugging.
    pub fn note_call(&self, method: &Method, spent: Duration, request_bytes: usize, answer: &Answer) {
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

    /// Something was read that may have been long.
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
