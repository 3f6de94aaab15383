//! Who was refused and why, so that the log hears of it once a minute and not once an attempt: a member of another cluster
//! that has this one's address tries again every second, for as long as it runs.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The same refusal is news again after this.
const NEWS_AFTER: Duration = Duration::from_mins(1);
/// More are not remembered: whoever invents names is heard more often.
const REMEMBERED: usize = 64;

/// What was said lately.
#[derive(Default)]
pub(super) struct Refusals(HashMap<(u64, String), Said>);

struct Said {
    at: Instant,
    since: u32,
}

impl Refusals {
    /// Whether this is worth a line now, and how often it has happened since the last one.
    pub fn is_news(&mut self, from: u64, why: &str, now: Instant) -> Option<u32> {
        if self.0.len() >= REMEMBERED {
            self.0.retain(|_, said| now - said.at < NEWS_AFTER);
        }
        if self.0.len() >= REMEMBERED {
            self.0.clear();
        }
        match self.0.get_mut(&(from, why.to_owned())) {
            Some(said) if now - said.at < NEWS_AFTER => {
                said.since += 1;
                None
            }
            Some(said) => {
                said.at = now;
                Some(std::mem::take(&mut said.since))
            }
            None => {
                self.0.insert((from, why.to_owned()), Said { at: now, since: 0 });
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_a_minute_and_another_reason_at_once() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(refusals.is_news(1, "a", at(0)), Some(0));
        assert_eq!(refusals.is_news(1, "a", at(1)), None);
        assert_eq!(refusals.is_news(2, "a", at(1)), Some(0));
        assert_eq!(refusals.is_news(1, "b", at(2)), Some(0));
        assert_eq!(refusals.is_news(1, "a", at(59)), None);
        assert_eq!(refusals.is_news(1, "a", at(60)), Some(2));
        assert_eq!(refusals.is_news(1, "a", at(61)), None);
        for nobody in 10..200 {
            assert_eq!(refusals.is_news(nobody, "a", at(62)), Some(0));
            assert!(refusals.0.len() <= REMEMBERED);
        }
    }
}
