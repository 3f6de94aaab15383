//! What was refused and why, so that the log hears of it once a minute and not once an attempt: a member of another cluster
//! that has this one's address tries again every second, for as long as it runs. A caller that invents names, or says
//! something else that is wrong each time, is heard so often and no more.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The same refusal is news again after this.
const NEWS_AFTER: Duration = Duration::from_mins(1);
/// No more lines than this within that time.
const MOST_LINES: usize = 128;

/// What was said lately.
#[derive(Default)]
pub(super) struct Refusals {
    said: HashMap<(u64, String), Said>,
    /// How many were worth a line and got none, since the last line.
    unsaid: u32,
}

struct Said {
    at: Instant,
    since: u32,
}

impl Refusals {
    /// Whether this is worth a line now; and how often it has happened since the last line about it, or, if it is new, how
    /// often anything new has happened that there was no line for.
    pub fn is_news(&mut self, from: u64, why: &str, now: Instant) -> Option<u32> {
        let key = (from, why.to_owned());
        if let Some(said) = self.said.get_mut(&key) {
            if now - said.at < NEWS_AFTER {
                said.since += 1;
                return None;
            }
            said.at = now;
            return Some(std::mem::take(&mut said.since));
        }
        if self.said.len() >= MOST_LINES {
            self.said.retain(|_, said| now - said.at < NEWS_AFTER);
        }
        if self.said.len() >= MOST_LINES {
            self.unsaid += 1;
            return None;
        }
        self.said.insert(key, Said { at: now, since: 0 });
        Some(std::mem::take(&mut self.unsaid))
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
        let lines = (10..400).filter(|&invented| refusals.is_news(invented, "a", at(62)).is_some()).count();
        assert_eq!(lines, MOST_LINES - 1, "an invented name is news, but not for ever; two are old");
        let unsaid = u32::try_from(390 - lines).unwrap();
        assert_eq!(refusals.is_news(1000, "a", at(122)), Some(unsaid), "it is told how many were not");
        assert_eq!(refusals.is_news(1001, "a", at(122)), Some(0));
    }
}
