//! Limits log lines that others can cause: the same one is written once a minute, not once per attempt. A member of another
//! cluster that is configured with this one's address retries every second, for as long as it runs. Lines about something else
//! each time are written up to a limit.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// The same line is written again after this time.
const LOG_AGAIN_AFTER: Duration = Duration::from_mins(1);
/// The limit for lines within that time.
const MAX_LINES: usize = 128;

/// The lines that were written lately. A key says what a line is about.
pub struct Repeats<K> {
    written: BTreeMap<K, Written>,
    /// How many new lines were left out because of the limit, since the last one that was written.
    suppressed: u32,
}

struct Written {
    at: Instant,
    /// How often it was left out since.
    suppressed: u32,
}

impl<K> Default for Repeats<K> {
    fn default() -> Self {
        Self { written: BTreeMap::new(), suppressed: 0 }
    }
}

impl<K: Ord> Repeats<K> {
    /// Returns `Some` if a line should be written now, with the number of times that it was left out since the last time; or, if
    /// it is new, the number of new lines that were left out because of the limit.
    pub fn should_log(&mut self, key: K, now: Instant) -> Option<u32> {
        if let Some(written) = self.written.get_mut(&key) {
            if now - written.at < LOG_AGAIN_AFTER {
                written.suppressed += 1;
                return None;
            }
            written.at = now;
            return Some(std::mem::take(&mut written.suppressed));
        }
        if self.written.len() >= MAX_LINES {
            self.written.retain(|_, written| now - written.at < LOG_AGAIN_AFTER);
        }
        if self.written.len() >= MAX_LINES {
            self.suppressed += 1;
            return None;
        }
        self.written.insert(key, Written { at: now, suppressed: 0 });
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_line_is_written_once_a_minute_and_another_one_at_once() {
        let (mut log, start) = (Repeats::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(log.should_log((1, "a"), at(0)), Some(0));
        assert_eq!(log.should_log((1, "a"), at(1)), None);
        assert_eq!(log.should_log((2, "a"), at(1)), Some(0));
        assert_eq!(log.should_log((1, "b"), at(2)), Some(0));
        assert_eq!(log.should_log((1, "a"), at(59)), None);
        assert_eq!(log.should_log((1, "a"), at(60)), Some(2));
        assert_eq!(log.should_log((1, "a"), at(61)), None);
        let lines = (10..400).filter(|&invented| log.should_log((invented, "a"), at(62)).is_some()).count();
        assert_eq!(lines, MAX_LINES - 1, "new lines are written up to the limit; two are old");
        let suppressed = u32::try_from(390 - lines).unwrap();
        assert_eq!(
            log.should_log((1000, "a"), at(122)),
            Some(suppressed),
            "with the number of those that were left out"
        );
        assert_eq!(log.should_log((1001, "a"), at(122)), Some(0));
    }
}
