//! Latencies and failures: counted by each worker alone, added up at the end.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;

/// The longest latency that can be told from longer ones.
const LONGEST: Duration = Duration::from_mins(10);
/// Of each kind of failure so many messages are kept.
const EXAMPLES: usize = 3;

/// Something that went wrong with one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// What kind: a gRPC code, or a word of ours for a wrong answer.
    pub(super) kind: String,
    /// What exactly.
    pub(super) message: String,
}

impl Failure {
    /// A call that was answered, but not with the truth.
    pub(super) fn wrong(message: impl Into<String>) -> Self {
        Self { kind: "WrongAnswer".to_owned(), message: message.into() }
    }

    /// A call that was not answered.
    pub(super) fn unanswered(message: impl Into<String>) -> Self {
        Self { kind: "Unanswered".to_owned(), message: message.into() }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self { kind: format!("{:?}", status.code()), message: status.message().to_owned() }
    }
}

/// All that one worker counts; adding up tallies loses nothing.
#[derive(Debug, Clone)]
pub(super) struct Tally {
    /// Calls.
    pub(super) calls: Latencies,
    /// Events that reached a watcher.
    pub(super) events: Latencies,
    /// Compare-and-swaps that another caller was quicker with.
    pub(super) lost: u64,
    /// What went wrong, by kind.
    pub(super) failures: BTreeMap<String, Failures>,
}

/// Failures of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Failures {
    /// How many.
    pub(super) count: u64,
    /// The first few different messages.
    pub(super) examples: Vec<String>,
}

impl Tally {
    /// Nothing counted yet.
    pub(super) fn new() -> Self {
        Self { calls: Latencies::new(), events: Latencies::new(), lost: 0, failures: BTreeMap::new() }
    }

    /// Counts a failure.
    pub(super) fn fail(&mut self, failure: Failure) {
        self.fail_often(failure, 1);
    }

    /// Counts the same failure so many times, which may be none.
    pub(super) fn fail_often(&mut self, failure: Failure, count: u64) {
        if count > 0 {
            self.add_failures(failure.kind, Failures { count, examples: vec![failure.message] });
        }
    }

    /// Everything that went wrong.
    pub(super) fn failed(&self) -> u64 {
        self.failures.values().map(|failures| failures.count).sum()
    }

    /// Adds what another worker counted.
    pub(super) fn add(&mut self, other: Self) {
        self.calls.add(&other.calls);
        self.events.add(&other.events);
        self.lost += other.lost;
        self.add_all_failures(other.failures);
    }

    /// Adds what went wrong elsewhere.
    pub(super) fn add_all_failures(&mut self, failures: BTreeMap<String, Failures>) {
        for (kind, failures) in failures {
            self.add_failures(kind, failures);
        }
    }

    fn add_failures(&mut self, kind: String, more: Failures) {
        let failures = self.failures.entry(kind).or_default();
        failures.count += more.count;
        for example in more.examples {
            if failures.examples.len() < EXAMPLES && !failures.examples.contains(&example) {
                failures.examples.push(example);
            }
        }
    }
}

/// A distribution of latencies, to three digits.
#[derive(Debug, Clone)]
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    fn new() -> Self {
        let longest = u64::try_from(LONGEST.as_nanos()).expect("ten minutes are few nanoseconds");
        Self(Histogram::new_with_bounds(1, longest, 3).expect("these bounds are in order"))
    }

    /// Counts one.
    pub(super) fn record(&mut self, latency: Duration) {
        self.record_many(latency, 1);
    }

    /// Counts several that took equally long.
    pub(super) fn record_many(&mut self, latency: Duration, count: u64) {
        self.0.saturating_record_n(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX), count);
    }

    /// How many were counted.
    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// The latency that `quantile` of all stay within, in microseconds.
    pub(super) fn quantile_micros(&self, quantile: f64) -> f64 {
        micros(self.0.value_at_quantile(quantile))
    }

    /// The longest, in microseconds.
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
    fn percentiles_are_right_to_three_digits() {
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
    fn an_endless_latency_is_counted_as_the_longest() {
        let mut latencies = Latencies::new();
        latencies.record(Duration::MAX);
        assert_eq!(latencies.count(), 1);
        assert!(latencies.max_micros() >= 600e6);
    }

    #[test]
    fn adding_tallies_adds_all_of_them() {
        let (mut left, mut right) = (Tally::new(), Tally::new());
        left.calls.record(Duration::from_millis(1));
        right.calls.record(Duration::from_millis(3));
        right.events.record_many(Duration::from_millis(2), 5);
        right.lost = 2;
        left.fail(Failure::wrong("first"));
        right.fail(Failure::wrong("second"));
        right.fail(Failure::unanswered("gone"));
        left.add(right);
        assert_eq!((left.calls.count(), left.events.count(), left.lost, left.failed()), (2, 5, 2, 3));
        assert_eq!(left.failures["WrongAnswer"].examples, ["first", "second"]);
    }

    #[test]
    fn nothing_fails_no_times() {
        let mut tally = Tally::new();
        tally.fail_often(Failure::wrong("nothing"), 0);
        assert!(tally.failures.is_empty());
        tally.fail_often(Failure::wrong("much"), 1_000_000);
        assert_eq!(tally.failed(), 1_000_000);
    }

    #[test]
    fn only_the_first_few_different_messages_are_kept() {
        let mut tally = Tally::new();
        for message in ["a", "a", "b", "c", "d", "e"] {
            tally.fail(Failure::wrong(message));
        }
        assert_eq!(
            tally.failures["WrongAnswer"],
            Failures { count: 6, examples: ["a", "b", "c"].map(str::to_owned).to_vec() }
        );
    }
}
