//! Histograms that are observed for every request, by many threads.
//!
//! Each thread counts in a shard of its own, which no other thread writes, so an observation is two additions without any
//! synchronisation between processors. A scrape adds up the shards. The shard of a thread that has ended is given to the next
//! new one.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus::{
    core::{Collector, Desc},
    exponential_buckets,
    proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

/// More than any histogram here has, with that of what is beyond the last bound.
const MAX_BUCKETS: usize = 24;

/// Durations of one thread.
#[derive(Default)]
struct Shard {
    buckets: [AtomicU64; MAX_BUCKETS],
    sum_nanos: AtomicU64,
}

impl Shard {
    fn add(counter: &AtomicU64, number: u64) {
        // Only the thread that owns the shard writes.
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(number), Ordering::Relaxed);
    }
}

/// A histogram of durations, whose buckets double.
pub struct Durations {
    /// Identifies it in the list of each thread.
    number: usize,
    /// The upper bound of the first bucket.
    first_nanos: u64,
    /// The number of bounds.
    bounds: usize,
    shards: Mutex<Vec<Arc<Shard>>>,
}

thread_local! {
    /// This thread's shard of each histogram, by the histogram's number.
    static SHARDS: RefCell<Vec<Option<Arc<Shard>>>> = const { RefCell::new(Vec::new()) };
}

impl Durations {
    fn new(first: Duration, bounds: usize) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        assert!(bounds < MAX_BUCKETS, "there is room for all buckets");
        let first_nanos = u64::try_from(first.as_nanos()).expect("the first bound is short").max(1);
        Self { number: NEXT.fetch_add(1, Ordering::Relaxed), first_nanos, bounds, shards: Mutex::default() }
    }

    /// Adds a duration.
    pub fn observe(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        // Bounds are inclusive.
        let bucket = match nanos.saturating_sub(1) / self.first_nanos {
            0 => 0,
            multiple => (multiple.ilog2() as usize + 1).min(self.bounds),
        };
        SHARDS.with_borrow_mut(|shards| {
            if shards.len() <= self.number {
                shards.resize(self.number + 1, None);
            }
            let shard = shards[self.number].get_or_insert_with(|| self.new_shard());
            Shard::add(&shard.buckets[bucket], 1);
            Shard::add(&shard.sum_nanos, nanos);
        });
    }

    fn new_shard(&self) -> Arc<Shard> {
        let mut shards = self.shards.lock();
        if let Some(free) = shards.iter().find(|shard| Arc::strong_count(shard) == 1) {
            return free.clone();
        }
        shards.push(Arc::default());
        shards[shards.len() - 1].clone()
    }

    /// How many durations were added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.totals().0.iter().sum()
    }

    /// The number of durations in each bucket, and the sum of all in nanoseconds.
    fn totals(&self) -> ([u64; MAX_BUCKETS], u64) {
        let (mut buckets, mut nanos) = ([0; MAX_BUCKETS], 0_u64);
        for shard in self.shards.lock().iter() {
            for (total, count) in buckets.iter_mut().zip(&shard.buckets) {
                *total += count.load(Ordering::Relaxed);
            }
            nanos = nanos.wrapping_add(shard.sum_nanos.load(Ordering::Relaxed));
        }
        (buckets, nanos)
    }

    #[allow(clippy::cast_precision_loss, reason = "metrics are floats")]
    fn export(&self, bounds: &[f64]) -> Histogram {
        let (buckets, nanos) = self.totals();
        let mut below = 0;
        let with_bounds = bounds.iter().zip(buckets).map(|(&bound, count)| {
            below += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(below);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(with_bounds.collect());
        histogram.set_sample_count(buckets.iter().sum());
        histogram.set_sample_sum(nanos as f64 / 1e9);
        histogram
    }
}

/// Histograms of durations with labels.
#[derive(Clone)]
pub struct DurationsVec(Arc<Family>);

struct Family {
    desc: Desc,
    labels: &'static [&'static str],
    first: Duration,
    bounds: Vec<f64>,
    /// By the values of their labels.
    histograms: Mutex<Vec<(Vec<String>, Arc<Durations>)>>,
}

impl DurationsVec {
    /// Histograms with `bounds` bounds, of which the first is `first`, and each other one twice the one before.
    pub fn new(
        name: &str,
        help: &str,
        first: Duration,
        bounds: usize,
        labels: &'static [&'static str],
    ) -> prometheus::Result<Self> {
        let names = labels.iter().map(ToString::to_string).collect();
        let desc = Desc::new(name.to_owned(), help.to_owned(), names, HashMap::new())?;
        let bounds = exponential_buckets(first.as_secs_f64(), 2.0, bounds)?;
        Ok(Self(Arc::new(Family { desc, labels, first, bounds, histograms: Mutex::default() })))
    }

    /// The histogram with these values of the labels. Callers that observe often must keep it: finding it takes a lock.
    #[must_use]
    pub fn with(&self, values: &[&str]) -> Arc<Durations> {
        assert_eq!(values.len(), self.0.labels.len(), "each label has a value");
        let mut histograms = self.0.histograms.lock();
        if let Some((_, found)) = histograms.iter().find(|(labels, _)| labels == values) {
            return found.clone();
        }
        let histogram = Arc::new(Durations::new(self.0.first, self.0.bounds.len()));
        histograms.push((values.iter().map(ToString::to_string).collect(), histogram.clone()));
        histogram
    }
}

impl Collector for DurationsVec {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let family = &*self.0;
        let export = |(values, histogram): &(Vec<String>, Arc<Durations>)| {
            let mut labels: Vec<LabelPair> =
                family.labels.iter().zip(values).map(|(name, value)| pair(name, value)).collect();
            labels.sort_by(|a, b| a.name().cmp(b.name()));
            let mut metric = Metric::from_label(labels);
            metric.set_histogram(histogram.export(&family.bounds));
            metric
        };
        let metrics: Vec<Metric> = family.histograms.lock().iter().map(export).collect();
        let mut exported = MetricFamily::default();
        exported.set_name(family.desc.fq_name.clone());
        exported.set_help(family.desc.help.clone());
        exported.set_field_type(MetricType::HISTOGRAM);
        exported.set_metric(metrics);
        vec![exported]
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

/// The histograms of operations by name and success, for one thread that observes often: each is looked up once.
pub struct OperationDurations {
    all: DurationsVec,
    /// The values of labels that are constant, in front of the others.
    constant: &'static [&'static str],
    /// Those that were used. There are few operations.
    used: Vec<(&'static str, bool, Arc<Durations>)>,
}

impl OperationDurations {
    #[must_use]
    pub fn new(all: DurationsVec, constant: &'static [&'static str]) -> Self {
        Self { all, constant, used: Vec::new() }
    }

    /// Adds a duration. An operation without a name is not counted.
    pub fn observe(&mut self, operation: &'static str, is_success: bool, took: Duration) {
        if operation.is_empty() {
            return;
        }
        let is_it = |used: &(&str, bool, _)| used.1 == is_success && used.0 == operation;
        let nth = self.used.iter().position(is_it).unwrap_or_else(|| {
            let success = if is_success { "true" } else { "false" };
            let histogram = self.all.with(&[self.constant, &[operation, success]].concat());
            self.used.push((operation, is_success, histogram));
            self.used.len() - 1
        });
        self.used[nth].2.observe(took);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn family() -> DurationsVec {
        DurationsVec::new("a", "b", Duration::from_millis(1), 4, &["version", "op", "success"]).unwrap()
    }

    #[test]
    fn a_duration_is_counted_up_to_the_first_bound_that_is_not_below_it() {
        let (family, ms) = (family(), Duration::from_millis(1));
        let histogram = family.with(&["v", "Put", "true"]);
        for took in [Duration::ZERO, ms, ms + Duration::from_nanos(1), 2 * ms, 3 * ms, 8 * ms, 9 * ms, Duration::MAX] {
            histogram.observe(took);
        }
        let exported = family.collect();
        let metric = &exported[0].get_metric()[0];
        let names: Vec<&str> = metric.get_label().iter().map(LabelPair::name).collect();
        assert_eq!(names, ["op", "success", "version"]);
        let buckets = metric.get_histogram().get_bucket().iter();
        let buckets: Vec<_> = buckets.map(|bucket| (bucket.upper_bound(), bucket.cumulative_count())).collect();
        assert_eq!(buckets, [(0.001, 2), (0.002, 4), (0.004, 5), (0.008, 6)]);
        assert_eq!(metric.get_histogram().get_sample_count(), 8);
    }

    #[test]
    fn threads_count_apart_and_a_new_one_takes_over_the_shard_of_one_that_has_ended() {
        let family = family();
        let observe = |times: u64| {
            let family = family.clone();
            thread::spawn(move || {
                let mut operations = OperationDurations::new(family, &["v"]);
                (0..times).for_each(|_| operations.observe("Put", true, Duration::from_micros(1)));
                operations.observe("", true, Duration::from_micros(1));
            })
        };
        let together = [observe(1000), observe(1000)];
        for thread in together {
            thread.join().unwrap();
        }
        observe(1000).join().unwrap();
        let histogram = family.with(&["v", "Put", "true"]);
        assert_eq!(histogram.count(), 3000);
        assert!(histogram.shards.lock().len() <= 2);
    }
}
