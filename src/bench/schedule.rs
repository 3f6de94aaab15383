//! Who calls next, and when: one schedule per phase, shared by all callers of all workers.
//!
//! A caller draws a turn, a number that nobody else gets. Without a rate the turn is due at once. With a rate, turn n is
//! due n intervals after the beginning, and whichever caller is free draws it; when all are busy the turns fall behind,
//! and their latency still counts from when they were due.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::sync::watch;

/// The runtime's timer ticks once a millisecond. So much a turn may begin late because of the generator itself.
const TIMER: Duration = Duration::from_millis(2);
/// A waiting caller looks so often whether the run was ended early.
const LOOK_UP: Duration = Duration::from_millis(100);

/// When a phase is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// After so many turns.
    Turns(u64),
    /// When no turn is due any more within this time.
    Time(Duration),
}

impl Extent {
    /// Whether no turn is due any more, so long after the start.
    fn is_over(self, after: Duration) -> bool {
        matches!(self, Self::Time(time) if after >= time)
    }
}

/// Turns per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate(f64);

impl Rate {
    /// A rate that time can tell from standing still and from infinity.
    pub(super) fn new(per_second: f64) -> Result<Self, String> {
        if (0.001..=10_000_000.0).contains(&per_second) {
            Ok(Self(per_second))
        } else {
            Err(format!("--rate {per_second} is not between 0.001 and 10000000 a second"))
        }
    }

    /// Turns per second.
    pub(super) fn per_second(self) -> f64 {
        self.0
    }

    #[allow(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 turns")]
    fn due(self, turn: u64) -> Duration {
        Duration::try_from_secs_f64(turn as f64 / self.0).unwrap_or(Duration::MAX)
    }
}

/// The turns of one phase.
#[derive(Debug)]
pub(super) struct Schedule {
    started: Instant,
    extent: Extent,
    rate: Option<Rate>,
    drawn: AtomicU64,
    ended: AtomicBool,
    abandoned: watch::Sender<bool>,
}

/// The right to make one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    /// Which one, from zero.
    pub(super) number: u64,
    /// From when its latency counts.
    pub(super) begun: Instant,
}

impl Schedule {
    /// A phase that starts now.
    pub(super) fn start(extent: Extent, rate: Option<Rate>) -> Self {
        let (drawn, ended, abandoned) = (AtomicU64::new(0), AtomicBool::new(false), watch::Sender::new(false));
        Self { started: Instant::now(), extent, rate, drawn, ended, abandoned }
    }

    /// When the phase began.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Lets no further turn be drawn.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Tells everybody not to wait for answers any longer.
    pub(super) fn abandon(&self) {
        self.end();
        self.abandoned.send_replace(true);
    }

    /// Returns when the phase was abandoned.
    pub(super) async fn abandoned(&self) {
        let heard = self.abandoned.subscribe().wait_for(|abandoned| *abandoned).await.map(drop);
        heard.expect("the schedule owns the sender, so it is there");
    }

    /// Draws the next turn and waits until it is due; none when the phase is over.
    pub(super) async fn turn(&self) -> Option<Turn> {
        if self.ended.load(Ordering::Relaxed) {
            return None;
        }
        let number = self.drawn.fetch_add(1, Ordering::Relaxed);
        if matches!(self.extent, Extent::Turns(total) if number >= total) {
            return None;
        }
        let begun = match self.rate {
            Some(rate) => self.wait(rate.due(number)).await?,
            None => Instant::now(),
        };
        // With a rate, `wait` has judged by when the turn was due: that it came a little late costs nobody a turn.
        let is_over = self.rate.is_none() && self.extent.is_over(begun - self.started);
        (!is_over).then_some(Turn { number, begun })
    }

    /// Waits until a turn is due, so long after the start; none if it never will be.
    async fn wait(&self, after: Duration) -> Option<Instant> {
        if self.extent.is_over(after) {
            return None;
        }
        let due = self.started.checked_add(after)?;
        let mut waited = false;
        loop {
            let now = Instant::now();
            if now >= due {
                return Some(begun(due, now, waited));
            }
            if self.ended.load(Ordering::Relaxed) {
                return None;
            }
            waited = true;
            tokio::time::sleep_until(due.min(now + LOOK_UP).into()).await;
        }
    }
}

/// From when the latency of a turn counts that was due at `due` and begins `now`. A caller that was busy at `due` is late
/// because of the server. One that `waited` is late because of the timer, which is not the server's doing.
fn begun(due: Instant, now: Instant, waited: bool) -> Instant {
    if waited && now - due <= TIMER { now } else { due }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_caller_is_late_since_its_turn_was_due() {
        let due = Instant::now();
        let late = due + Duration::from_millis(1);
        assert_eq!(begun(due, late, false), due);
        assert_eq!(begun(due, late, true), late);
        assert_eq!(begun(due, due + Duration::from_millis(50), true), due);
    }

    #[test]
    fn turns_are_due_at_the_rate() {
        let rate = Rate::new(200.0).unwrap();
        assert_eq!(rate.due(0), Duration::ZERO);
        assert_eq!(rate.due(300), Duration::from_millis(1500));
        for nonsense in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
            assert!(Rate::new(nonsense).is_err(), "{nonsense} was taken for a rate");
        }
    }

    #[tokio::test]
    async fn as_many_turns_are_given_as_were_asked_for() {
        let schedule = Schedule::start(Extent::Turns(3), None);
        let mut numbers = Vec::new();
        while let Some(turn) = schedule.turn().await {
            numbers.push(turn.number);
        }
        assert_eq!(numbers, [0, 1, 2]);
    }

    #[tokio::test]
    async fn a_rate_gives_the_turns_that_are_due_within_the_time() {
        let schedule = Schedule::start(Extent::Time(Duration::from_millis(50)), Rate::new(1000.0).ok());
        let mut turns = 0;
        while schedule.turn().await.is_some() {
            turns += 1;
        }
        assert_eq!(turns, 50);
        assert!(schedule.started().elapsed() >= Duration::from_millis(49), "the last turn is not due before");
    }

    #[tokio::test]
    async fn an_ended_schedule_gives_no_turn_even_to_those_who_wait() {
        let schedule = Schedule::start(Extent::Turns(10), Rate::new(0.001).ok());
        assert!(schedule.turn().await.is_some());
        let (waiting, ()) = tokio::join!(schedule.turn(), async { schedule.end() });
        assert_eq!(waiting, None);
    }
}
