//! Limits log lines about refused connections: the same refusal is logged once a minute, not once per attempt. A member of
//! another cluster that is configured with this one's address retries every second, for as long as it runs. A client that uses a
//! different member ID, or fails in a different way, each time is logged up to a limit.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The same refusal is logged again after this time.
const LOG_AGAIN_AFTER: Duration = Duration::from_mins(1);
/// The limit for lines within that time.
const MAX_LINES: usize = 128;

/// The refusals that were logged lately.
#[derive(Default)]
pub(super) struct RefusalLog {
    logged: HashMap<(u64, String), Logged>,
    /// How many new refusals were not logged because of the limit, since the last line.
    suppressed: u32,
}

struct Logged {
    at: Instant,
    /// How often it was not logged since.
    suppressed: u32,
}

impl RefusalLog {
    /// Returns `Some` if the refusal should be logged now, with the number of times that it was not logged since the last line
    /// about it; or, if it is new, the number of new refusals that were not logged because of the limit.
    pub fn should_log(&mut self, from: u64, why: &str, now: Instant) -> Option<u32> {
        let key = (from, why.to_owned());
        if let Some(logged) = self.logged.get_mut(&key) {
            if now - logged.at < LOG_AGAIN_AFTER {
                logged.suppressed += 1;
                return None;
            }
            logged.at = now;
            return Some(std::mem::take(&mut logged.suppressed));
        }
        if self.logged.len() >= MAX_LINES {
            self.logged.retain(|_, logged| now - logged.at < LOG_AGAIN_AFTER);
        }
        if self.logged.len() >= MAX_LINES {
            self.suppressed += 1;
            return None;
        }
        self.logged.insert(key, Logged { at: now, suppressed: 0 });
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_refusal_is_logged_once_a_minute_and_another_reason_at_once() {
        let (mut log, start) = (RefusalLog::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(log.should_log(1, "a", at(0)), Some(0));
        assert_eq!(log.should_log(1, "a", at(1)), None);
        assert_eq!(log.should_log(2, "a", at(1)), Some(0));
        assert_eq!(log.should_log(1, "b", at(2)), Some(0));
        assert_eq!(log.should_log(1, "a", at(59)), None);
        assert_eq!(log.should_log(1, "a", at(60)), Some(2));
        assert_eq!(log.should_log(1, "a", at(61)), None);
        let lines = (10..400).filter(|&invented| log.should_log(invented, "a", at(62)).is_some()).count();
        assert_eq!(lines, MAX_LINES - 1, "new member IDs are logged up to the limit; two are old");
        let suppressed = u32::try_from(390 - lines).unwrap();
        assert_eq!(
            log.should_log(1000, "a", at(122)),
            Some(suppressed),
            "with the number of those that were not logged"
        );
        assert_eq!(log.should_log(1001, "a", at(122)), Some(0));
    }
}
