//! Auto compaction: when to compact, and at which revision. A value without a clock: time and the head revision are arguments.
//!
//! By age, history that is older than a period is compacted: the head is sampled every tenth of the period (or of an hour, if
//! that is less), and the oldest sample of the window is what the head was a period ago.
//!
//! ```text
//! period 10 h, a step is 6 min
//! samples   |0:00 … 10:00|            the window slides: 101 samples
//! compact                ^ 10:00 to the head of 0:00, then hourly
//! ```
//!
//! By count, all but the given number of newest revisions are compacted, every five minutes.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

const HOUR: Duration = Duration::from_hours(1);
const STEPS: u32 = 10;
const BY_COUNT_EVERY: Duration = Duration::from_mins(5);

/// What is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Everything.
    All,
    /// Revisions that are no older than this.
    Period(Duration),
    /// This many of the newest revisions.
    Revisions(i64),
}

/// Decides when to compact, and at which revision.
#[derive(Debug)]
pub struct Retention {
    policy: Policy,
    /// The head at the last steps, oldest first.
    samples: VecDeque<i64>,
    next_step: Instant,
    /// When the last compaction succeeded; before the first, when this value was made.
    last_success: Instant,
    /// The revision of the last compaction.
    last_target: i64,
}

impl Retention {
    /// Starts to measure at `now`, with this head.
    #[must_use]
    pub fn new(policy: Policy, now: Instant, head: i64) -> Self {
        let mut retention =
            Self { policy, samples: VecDeque::new(), next_step: now, last_success: now, last_target: 0 };
        retention.next_step += retention.step();
        retention.samples.push_back(head);
        retention
    }

    /// The revision to compact at, if one is due and this member leads. Call it regularly.
    pub fn due(&mut self, now: Instant, head: i64, leads: bool) -> Option<i64> {
        let mut due = None;
        while self.next_step <= now {
            due = self.target(self.next_step, head).filter(|_| leads);
            self.next_step += self.step();
            self.samples.push_back(head);
            while self.samples.len() > self.window() {
                self.samples.pop_front();
            }
        }
        due
    }

    /// Call when a compaction at `target` has succeeded, or was done before.
    pub fn done(&mut self, target: i64, now: Instant) {
        self.last_target = target;
        self.last_success = now;
    }

    fn target(&self, now: Instant, head: i64) -> Option<i64> {
        let target = match self.policy {
            Policy::All => return None,
            Policy::Revisions(kept) => head - kept,
            Policy::Period(period) => {
                let interval = if self.last_target == 0 { period } else { period.min(HOUR) };
                if now - self.last_success < interval {
                    return None;
                }
                *self.samples.front()?
            }
        };
        (target > 0 && target != self.last_target).then_some(target)
    }

    fn step(&self) -> Duration {
        match self.policy {
            Policy::All => HOUR,
            Policy::Revisions(_) => BY_COUNT_EVERY,
            Policy::Period(period) => (period.min(HOUR) / STEPS).max(Duration::from_millis(1)),
        }
    }

    fn window(&self) -> usize {
        match self.policy {
            Policy::All | Policy::Revisions(_) => 1,
            Policy::Period(period) => {
                let steps = period.as_nanos() / self.step().as_nanos();
                usize::try_from(steps).unwrap_or(usize::MAX - 1) + 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a policy with a head that grows by one a minute; collects the minute and revision of each compaction.
    fn compactions(policy: Policy, minutes: u32, leads: impl Fn(u32) -> bool) -> Vec<(u32, i64)> {
        let start = Instant::now();
        let mut retention = Retention::new(policy, start, 1);
        let mut seen = Vec::new();
        for minute in 1..=minutes {
            let now = start + Duration::from_mins(minute.into());
            if let Some(target) = retention.due(now, i64::from(minute) + 1, leads(minute)) {
                retention.done(target, now);
                seen.push((minute, target));
            }
        }
        seen
    }

    /// KV-43.
    #[test]
    fn by_age_the_first_compaction_comes_after_a_period_and_the_next_within_an_hour() {
        let seen = compactions(Policy::Period(Duration::from_hours(10)), 13 * 60, |_| true);
        assert_eq!(seen, [(600, 1), (660, 55), (720, 115), (780, 175)]);
        let seen = compactions(Policy::Period(Duration::from_mins(10)), 31, |_| true);
        assert_eq!(seen, [(10, 1), (20, 10), (30, 20)]);
    }

    #[test]
    fn a_follower_compacts_nothing_but_samples_the_head() {
        let seen = compactions(Policy::Period(Duration::from_mins(10)), 36, |minute| minute > 25);
        assert_eq!(seen, [(26, 16), (36, 26)]);
    }

    #[test]
    fn an_idle_store_is_compacted_once() {
        let start = Instant::now();
        let mut retention = Retention::new(Policy::Period(Duration::from_mins(10)), start, 5);
        let mut targets = Vec::new();
        for minute in 1..60 {
            let now = start + Duration::from_mins(minute);
            if let Some(target) = retention.due(now, 5, true) {
                retention.done(target, now);
                targets.push(target);
            }
        }
        assert_eq!(targets, [5]);
    }

    #[test]
    fn by_count_a_compaction_is_considered_every_five_minutes() {
        let seen = compactions(Policy::Revisions(8), 21, |_| true);
        assert_eq!(seen, [(10, 3), (15, 8), (20, 13)]);
        assert!(compactions(Policy::All, 1000, |_| true).is_empty());
    }
}
