//! The connection's window for what comes in: how much the other side may send on all streams together.
//!
//! What has come is given back at once, whichever stream it was for, so that no stream keeps another one waiting; what
//! streams hold is bounded elsewhere. The window grows while the other side uses it up quickly, and shrinks while memory is
//! scarce.

use std::time::{Duration, Instant};

use super::{
    fault::{Code, Fault},
    frame::DEFAULT_WINDOW,
};

/// What a connection begins with.
const FIRST: i64 = 1 << 20;
const LEAST: i64 = 64 << 10;
const MOST: i64 = 16 << 20;
/// Half a window used up in this time is quick.
const QUICK: Duration = Duration::from_millis(10);

/// The window.
#[derive(Debug)]
pub struct Intake {
    window: i64,
    target: i64,
    given_back: Option<Instant>,
}

impl Default for Intake {
    fn default() -> Self {
        Self { window: DEFAULT_WINDOW, target: FIRST, given_back: None }
    }
}

impl Intake {
    /// The other side has sent so much.
    pub fn take(&mut self, bytes: usize) -> Result<(), Fault> {
        self.window -= i64::try_from(bytes).unwrap_or(i64::MAX);
        if self.window < 0 {
            return Err(Fault::connection(Code::FlowControl, "more data than the connection's window"));
        }
        Ok(())
    }

    /// By how much the other side's window shall grow, if it is time to say so.
    pub fn give_back(&mut self, is_scarce: bool, now: Instant) -> Option<u32> {
        if self.window > self.target / 2 {
            return None;
        }
        if is_scarce {
            self.target = (self.target / 2).max(LEAST);
        } else if self.given_back.is_some_and(|before| now.duration_since(before) < QUICK) {
            self.target = (self.target * 2).min(MOST);
        }
        self.given_back = Some(now);
        let increment = u32::try_from(self.target - self.window).ok().filter(|&increment| increment > 0)?;
        self.window = self.target;
        Some(increment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_load() {
        let (mut intake, start) = (Intake::default(), Instant::now());
        assert_eq!(intake.give_back(false, start), Some(u32::try_from(FIRST - DEFAULT_WINDOW).unwrap()));
        assert_eq!(intake.give_back(false, start), None);
        intake.take(600 << 10).unwrap();
        assert_eq!(intake.give_back(false, start), Some((600 << 10) + (1 << 20)), "quick: twice as large");
        intake.take(1200 << 10).unwrap();
        assert_eq!(intake.give_back(false, start + QUICK), Some(1200 << 10), "slow: as large as before");
        intake.take(1200 << 10).unwrap();
        assert_eq!(intake.give_back(true, start + QUICK), Some(176 << 10), "scarce: half as large");
        assert_eq!(intake.take(2 << 20).unwrap_err().code, Code::FlowControl);
    }
}
