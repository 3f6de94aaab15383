//! Warnings about what takes too long, with etcd's messages, because operators and tools search for them.
//!
//! | message | what took too long | fields of ours |
//! | --- | --- | --- |
//! | `apply request took too long` | applying a batch of entries, or a read | `queue`, `log`, `apply`, `commit`; `queue`, `read-index`, `read` |
//! | `request waited too long before it was applied` | a proposal, until it was committed | `queue`, `log` |
//! | `request stats` | a unary call | |
//! | `slow fdatasync` | a sync of the log | `entries` |
//! | `leader failed to send out heartbeat on time; …` | the raft thread | |
//! | `waiting for ReadIndex response took too long, retrying` | the leader's confirmation of reads | |
//!
//! A slow disk makes everything slow, so each kind of warning is logged a few times in some seconds at most, and the next one
//! says how many were suppressed. All of them are counted by `metastore_slow_total`.

pub mod request_text;

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::metrics::METRICS;

/// The durations from which something is logged as slow.
#[derive(Debug, Clone, Copy)]
pub struct Thresholds {
    /// For a unary call, and for a proposal until it is committed (`--warning-unary-request-duration`).
    pub call: Duration,
    /// For applying a batch of entries, and for reads (`--warning-apply-duration`).
    pub apply: Duration,
}

/// A sync of the log that takes longer is logged.
pub const SLOW_SYNC: Duration = Duration::from_secs(1);

/// What took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slow {
    Apply,
    Wait,
    Read,
    Request,
    Sync,
    Heartbeat,
    ReadIndex,
}

const KINDS: usize = 7;
static LIMITS: [RateLimit; KINDS] = [const { RateLimit::new() }; KINDS];

impl Slow {
    fn name(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::Wait => "wait",
            Self::Read => "read",
            Self::Request => "request",
            Self::Sync => "sync",
            Self::Heartbeat => "heartbeat",
            Self::ReadIndex => "read_index",
        }
    }

    /// Counts it. If it is to be logged, returns how many warnings of this kind were suppressed since the last one.
    #[must_use]
    pub fn count(self, now: Instant) -> Option<u64> {
        METRICS.slow_warnings.with_label_values(&[self.name()]).inc();
        LIMITS[self as usize].admit(now)
    }
}

/// Lets through a number of log lines in each interval.
struct RateLimit(Mutex<Window>);

struct Window {
    began: Option<Instant>,
    admitted: u32,
    suppressed: u64,
}

impl RateLimit {
    const INTERVAL: Duration = Duration::from_secs(10);
    const LINES: u32 = 10;

    const fn new() -> Self {
        Self(Mutex::new(Window { began: None, admitted: 0, suppressed: 0 }))
    }

    fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock();
        if window.began.is_none_or(|began| now.saturating_duration_since(began) >= Self::INTERVAL) {
            (window.began, window.admitted) = (Some(now), 0);
        }
        if window.admitted == Self::LINES {
            window.suppressed += 1;
            return None;
        }
        window.admitted += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

/// When the parts of a read began.
#[derive(Debug, Clone, Copy)]
pub struct ReadStart {
    read_index: Duration,
    queue: Duration,
    /// When the part began that is not over.
    since: Instant,
}

impl ReadStart {
    /// The read was admitted.
    #[must_use]
    pub fn now() -> Self {
        Self { read_index: Duration::ZERO, queue: Duration::ZERO, since: Instant::now() }
    }

    /// The read may see what this member has applied now.
    #[must_use]
    pub fn confirmed(self) -> Self {
        let now = Instant::now();
        Self { read_index: now - self.since, since: now, ..self }
    }

    /// A thread of the read pool has begun with it.
    #[must_use]
    pub fn dequeued(self) -> Self {
        let now = Instant::now();
        Self { queue: now - self.since, since: now, ..self }
    }

    /// The read has ended.
    #[must_use]
    pub fn ended(self) -> ReadParts {
        ReadParts { read_index: self.read_index, queue: self.queue, read: self.since.elapsed() }
    }
}

/// How long the parts of a read took.
#[derive(Debug, Default, Clone, Copy)]
pub struct ReadParts {
    /// Until the leader had confirmed that it leads, and this member had applied what was acknowledged before.
    pub read_index: Duration,
    /// Until a thread of the read pool was free.
    pub queue: Duration,
    pub read: Duration,
}

impl ReadParts {
    #[must_use]
    pub fn total(&self) -> Duration {
        self.read_index + self.queue + self.read
    }
}

impl Thresholds {
    /// Logs a read that took too long, as etcd does: with the texts of the request and of the response.
    pub fn note_read(&self, what: &'static str, parts: &ReadParts, texts: impl FnOnce() -> [String; 2]) {
        let took = parts.total();
        if took <= self.apply {
            return;
        }
        METRICS.slow_applies.inc();
        let Some(suppressed) = Slow::Read.count(Instant::now()) else { return };
        let (ReadParts { read_index, queue, read }, [request, response]) = (parts, texts());
        tracing::warn!(
            {
                took = ?took,
                "expected-duration" = ?self.apply,
                prefix = what,
                request,
                response,
                "read-index" = ?read_index,
                queue = ?queue,
                read = ?read,
                suppressed
            },
            "apply request took too long"
        );
    }
}

impl Thresholds {
    /// Logs a unary call that has ended: at WARN if it was slow, otherwise at DEBUG.
    pub fn note_call(&self, method: &'static str, spent: Duration, request_bytes: usize, response_bytes: usize) {
        macro_rules! stats {
            ($level:ident, $($suppressed:ident)?) => {
                tracing::$level!(
                    {
                        "time spent" = ?spent,
                        "response type" = method,
                        "request size" = request_bytes,
                        "response size" = response_bytes,
                        $($suppressed)?
                    },
                    "request stats"
                )
            };
        }
        if spent <= self.call {
            stats!(debug,);
        } else if let Some(suppressed) = Slow::Request.count(Instant::now()) {
            stats!(warn, suppressed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_lines_are_let_through_in_each_interval_and_the_next_one_says_how_many_were_not() {
        let (limit, start) = (RateLimit::new(), Instant::now());
        let admitted = |after: u64| limit.admit(start + Duration::from_secs(after));
        for nth in 0..RateLimit::LINES {
            assert_eq!(admitted(u64::from(nth) / 2), Some(0));
        }
        assert_eq!([admitted(6), admitted(7), admitted(9)], [None; 3]);
        assert_eq!([admitted(10), admitted(10)], [Some(3), Some(0)]);
        assert_eq!(limit.admit(start), Some(0), "a time before the interval began is in it");
    }

    #[test]
    fn the_parts_of_a_read_add_up() {
        let ms = Duration::from_millis;
        assert_eq!(ReadParts { read_index: ms(1), queue: ms(2), read: ms(3) }.total(), ms(6));
    }
}
