//! Latencies and failures, recorded by each worker separately and merged at the end, and the counters that the progress display
//! reads meanwhile.

use std::{collections::BTreeMap, sync::atomic::AtomicU64, time::Duration};

use hdrhistogram::Histogram;

/// Longer latencies are recorded as this one.
const MAX_LATENCY: Duration = Duration::from_mins(10);
/// The number of messages that are kept per kind of failure.
const MAX_EXAMPLES: usize = 3;

/// The failure of one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// A gRPC status code, or `WrongAnswer`, `Unanswered` and the like.
    pub(super) kind: String,
    pub(super) message: String,
}

impl Failure {
    /// A call with an incorrect response.
    pub(super) fn wrong_answer(message: impl Into<String>) -> Self {
        Self { kind: "WrongAnswer".to_owned(), message: message.into() }
    }

    /// A call without a response.
    pub(super) fn unanswered(message: impl Into<String>) -> Self {
        Self { kind: "Unanswered".to_owned(), message: message.into() }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self { kind: format!("{:?}", status.code()), message: status.message().to_owned() }
    }
}

/// Everything that one worker records. Merging tallies loses nothing.
#[derive(Debug, Clone)]
pub(super) struct Tally {
    pub(super) calls: Latencies,
    /// Events that reached a watcher.
    pub(super) events: Latencies,
    /// Compare-and-swaps for which another caller had changed the key first.
    pub(super) lost: u64,
    /// Failures by kind.
    pub(super) failures: BTreeMap<String, Failures>,
}

/// Failures of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Failures {
    pub(super) count: u64,
    /// The first few different messages.
    pub(super) examples: Vec<String>,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self { calls: Latencies::new(), events: Latencies::new(), lost: 0, failures: BTreeMap::new() }
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        self.fail_many(failure, 1);
    }

    /// Records the same failure `count` times, which may be zero.
    pub(super) fn fail_many(&mut self, failure: Failure, count: u64) {
        if count > 0 {
            self.add_failures(failure.kind, Failures { count, examples: vec![failure.message] });
        }
    }

    /// The total number of failures.
    pub(super) fn failed(&self) -> u64 {
        self.failures.values().map(|failures| failures.count).sum()
    }

    /// Merges the tally of another worker.
    pub(super) fn add(&mut self, other: Self) {
        self.calls.add(&other.calls);
        self.events.add(&other.events);
        self.lost += other.lost;
        self.add_all_failures(other.failures);
    }

    pub(super) fn add_all_failures(&mut self, failures: BTreeMap<String, Failures>) {
        for (kind, failures) in failures {
            self.add_failures(kind, failures);
        }
    }

    fn add_failures(&mut self, kind: String, more: Failures) {
        let failures = self.failures.entry(kind).or_default();
        failures.count += more.count;
        for example in more.examples {
            if failures.examples.len() < MAX_EXAMPLES && !failures.examples.contains(&example) {
                failures.examples.push(example);
            }
        }
    }
}

/// A worker's counters, which are read while it runs. On a cache line of their own, because they change with every response.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct LiveCounters {
    /// Successful calls.
    pub(super) answered: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Events received.
    pub(super) events: AtomicU64,
}

/// A distribution of latencies, with a precision of three digits.
#[derive(Debug, Clone)]
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    fn new() -> Self {
        let max_latency = u64::try_from(MAX_LATENCY.as_nanos()).expect("ten minutes fit into 64 bits of nanoseconds");
        Self(Histogram::new_with_bounds(1, max_latency, 3).expect("the bounds are valid"))
    }

    pub(super) fn record(&mut self, latency: Duration) {
        self.record_many(latency, 1);
    }

    /// Records `count` equal latencies.
    pub(super) fn record_many(&mut self, latency: Duration, count: u64) {
        self.0.saturating_record_n(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX), count);
    }

    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// The latency at `quantile`, in microseconds.
    pub(super) fn quantile_micros(&self, quantile: f64) -> f64 {
        micros(self.0.value_at_quantile(quantile))
    }

    /// The maximum, in microseconds.
    pub(super) fn max_micros(&self) -> f64 {
        micros(self.0.max())
    }

    /// The mean, in microseconds.
    pub(super) fn mean_micros(&self) -> f64 {
        self.0.mean() / 1e3
    }

    fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("all histograms have the same bounds");
    }
}

#[allow(clippy::cast_precision_loss, reason = "latencies are far below 2^52 nanoseconds")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::cast_precision_loss, reason = "small numbers")]
    fn percentiles_are_exact_to_three_digits() {
        let mut latencies = Latencies::new();
        for millis in 1..=1000 {
            latencies.record(Duration::from_millis(millis));
        }
        for (quantile, expected) in [(0.5, 500e3), (0.9, 900e3), (0.99, 990e3), (0.999, 999e3)] {
            let measured = latencies.quantile_micros(quantile);
            assert!((measured / expected - 1.0).abs() < 0.001, "p{quantile}: {measured} is not {expected}");
        }
        assert!((latencies.max_micros() / 1e6 - 1.0).abs() < 0.001);
        assert!((latencies.mean_micros() / 500.5e3 - 1.0).abs() < 0.001);
    }

    #[test]
    fn a_latency_out_of_range_is_recorded_as_the_maximum() {
        let mut latencies = Latencies::new();
        latencies.record(Duration::MAX);
        assert_eq!(latencies.count(), 1);
        assert!(latencies.max_micros() >= 600e6);
    }

    #[test]
    fn merging_tallies_adds_all_their_parts() {
        let (mut left, mut right) = (Tally::new(), Tally::new());
        left.calls.record(Duration::from_millis(1));
        right.calls.record(Duration::from_millis(3));
        right.events.record_many(Duration::from_millis(2), 5);
        right.lost = 2;
        left.fail(Failure::wrong_answer("first"));
        right.fail(Failure::wrong_answer("second"));
        right.fail(Failure::unanswered("gone"));
        left.add(right);
        assert_eq!((left.calls.count(), left.events.count(), left.lost, left.failed()), (2, 5, 2, 3));
        assert_eq!(left.failures["WrongAnswer"].examples, ["first", "second"]);
    }

    #[test]
    fn a_failure_may_be_recorded_zero_or_many_times() {
        let mut tally = Tally::new();
        tally.fail_many(Failure::wrong_answer("nothing"), 0);
        assert!(tally.failures.is_empty());
        tally.fail_many(Failure::wrong_answer("much"), 1_000_000);
        assert_eq!(tally.failed(), 1_000_000);
    }

    #[test]
    fn only_the_first_few_different_messages_are_kept() {
        let mut tally = Tally::new();
        for message in ["a", "a", "b", "c", "d", "e"] {
            tally.fail(Failure::wrong_answer(message));
        }
        assert_eq!(
            tally.failures["WrongAnswer"],
            Failures { count: 6, examples: ["a", "b", "c"].map(str::to_owned).to_vec() }
        );
    }
}
