//! When which call is made: one schedule per phase, shared by all callers of all workers.
//!
//! A caller takes the next call, which has a unique number. Without a rate, the call is due at once. With a rate, call n is
//! due n intervals after the start, and any idle caller takes it. When all callers are busy, calls are made late, and their
//! latency is still measured from when they were due.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::sync::watch;

/// The runtime's timer has a resolution of one millisecond, so the load generator itself may start a call this late.
const TIMER_SLACK: Duration = Duration::from_millis(2);
/// How often a waiting caller checks whether the phase was ended early.
const END_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The length of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// This many calls.
    Calls(u64),
    /// All calls that are due within this time.
    Time(Duration),
}

impl Extent {
    /// Whether a call that is due `after` the start is outside of the phase.
    fn is_over(self, after: Duration) -> bool {
        matches!(self, Self::Time(time) if after >= time)
    }
}

/// Calls per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate(f64);

impl Rate {
    pub(super) fn new(per_second: f64) -> Result<Self, String> {
        if (0.001..=10_000_000.0).contains(&per_second) {
            Ok(Self(per_second))
        } else {
            Err(format!("--rate {per_second} is not between 0.001 and 10000000 per second"))
        }
    }

    pub(super) fn per_second(self) -> f64 {
        self.0
    }

    #[allow(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 calls")]
    fn due(self, number: u64) -> Duration {
        Duration::try_from_secs_f64(number as f64 / self.0).unwrap_or(Duration::MAX)
    }
}

/// The calls of one phase.
#[derive(Debug)]
pub(super) struct Schedule {
    started: Instant,
    extent: Extent,
    rate: Option<Rate>,
    issued: AtomicU64,
    ended: AtomicBool,
    abandoned: watch::Sender<bool>,
}

/// A call to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ScheduledCall {
    /// Counted from zero.
    pub(super) number: u64,
    /// The time from which its latency is measured.
    pub(super) start: Instant,
}

impl Schedule {
    pub(super) fn start(extent: Extent, rate: Option<Rate>) -> Self {
        let (issued, ended, abandoned) = (AtomicU64::new(0), AtomicBool::new(false), watch::Sender::new(false));
        Self { started: Instant::now(), extent, rate, issued, ended, abandoned }
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Ends the phase: no further calls are made.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Ends the phase without waiting for outstanding responses.
    pub(super) fn abandon(&self) {
        self.end();
        self.abandoned.send_replace(true);
    }

    /// Returns when the phase is abandoned.
    pub(super) async fn abandoned(&self) {
        let received = self.abandoned.subscribe().wait_for(|abandoned| *abandoned).await.map(drop);
        received.expect("the schedule owns the sender");
    }

    /// Takes the next call and waits until it is due; None when the phase is over.
    pub(super) async fn next_call(&self) -> Option<ScheduledCall> {
        if self.ended.load(Ordering::Relaxed) {
            return None;
        }
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        if matches!(self.extent, Extent::Calls(total) if number >= total) {
            return None;
        }
        let start = match self.rate {
            Some(rate) => self.wait(rate.due(number)).await?,
            None => Instant::now(),
        };
        // With a rate, `wait` has checked this by when the call was due, so that a call that starts a little late is not lost.
        let is_over = self.rate.is_none() && self.extent.is_over(start - self.started);
        (!is_over).then_some(ScheduledCall { number, start })
    }

    /// Waits until a call that is due `after` the start; None if the phase is over by then.
    async fn wait(&self, after: Duration) -> Option<Instant> {
        if self.extent.is_over(after) {
            return None;
        }
        let due = self.started.checked_add(after)?;
        let mut waited = false;
        loop {
            let now = Instant::now();
            if now >= due {
                return Some(latency_start(due, now, waited));
            }
            if self.ended.load(Ordering::Relaxed) {
                return None;
            }
            waited = true;
            tokio::time::sleep_until(due.min(now + END_POLL_INTERVAL).into()).await;
        }
    }
}

/// The time from which the latency of a call is measured that was due at `due` and starts `now`. A caller that was busy at
/// `due` is late because of the server. One that has `waited` is late because of the timer, which must not be blamed on the
/// server.
fn latency_start(due: Instant, now: Instant, waited: bool) -> Instant {
    if waited && now - due <= TIMER_SLACK { now } else { due }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_measured_from_the_due_time_unless_the_timer_was_late() {
        let due = Instant::now();
        let late = due + Duration::from_millis(1);
        assert_eq!(latency_start(due, late, false), due);
        assert_eq!(latency_start(due, late, true), late);
        assert_eq!(latency_start(due, due + Duration::from_millis(50), true), due);
    }

    #[test]
    fn calls_are_due_at_the_rate() {
        let rate = Rate::new(200.0).unwrap();
        assert_eq!(rate.due(0), Duration::ZERO);
        assert_eq!(rate.due(300), Duration::from_millis(1500));
        for invalid in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
            assert!(Rate::new(invalid).is_err(), "{invalid} was accepted");
        }
    }

    #[tokio::test]
    async fn a_schedule_has_the_requested_number_of_calls() {
        let schedule = Schedule::start(Extent::Calls(3), None);
        let mut numbers = Vec::new();
        while let Some(call) = schedule.next_call().await {
            numbers.push(call.number);
        }
        assert_eq!(numbers, [0, 1, 2]);
    }

    #[tokio::test]
    async fn a_rate_gives_all_calls_that_are_due_within_the_time() {
        let schedule = Schedule::start(Extent::Time(Duration::from_millis(50)), Rate::new(1000.0).ok());
        let mut calls = 0;
        while schedule.next_call().await.is_some() {
            calls += 1;
        }
        assert_eq!(calls, 50);
        assert!(schedule.started().elapsed() >= Duration::from_millis(49), "the last call is not due before");
    }

    #[tokio::test]
    async fn an_ended_schedule_gives_no_call_even_to_waiting_callers() {
        let schedule = Schedule::start(Extent::Calls(10), Rate::new(0.001).ok());
        assert!(schedule.next_call().await.is_some());
        let (waiting, ()) = tokio::join!(schedule.next_call(), async { schedule.end() });
        assert_eq!(waiting, None);
    }
}
