//! Streams that are gone, remembered for a while: what is still on its way for them has to be told from what breaks the rules.
//!
//! Streams that ended as they should leave little behind, and the last few are enough. A stream that *we* cut off is spoken
//! of by the other side until it hears of that, however many others end meanwhile: it is remembered for a time.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

/// How many that ended as they should are remembered.
const ENDED: usize = 64;
/// How long it may take until the other side has heard that a stream was cut off.
const HEARD: Duration = Duration::from_secs(10);
/// How many of those are remembered at most.
const CUT: usize = 4096;

/// Who ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// We did, early: the other side may not have known.
    Ours,
    /// The other side did, or knew.
    Theirs,
}

/// What is remembered.
#[derive(Debug, Default)]
pub struct Past {
    ended: VecDeque<u32>,
    cut: HashSet<u32>,
    /// The same in order. The other side has heard of those that are missing above.
    cut_in_order: VecDeque<(u32, Instant)>,
}

impl Past {
    /// A stream is gone.
    pub fn remember(&mut self, id: u32, end: End, now: Instant) {
        match end {
            End::Theirs => {
                if self.ended.len() == ENDED {
                    self.ended.pop_front();
                }
                self.ended.push_back(id);
            }
            End::Ours => {
                let is_old = |&(_, since): &(u32, Instant)| now.duration_since(since) > HEARD;
                while self.cut_in_order.len() == CUT || self.cut_in_order.front().is_some_and(is_old) {
                    if let Some((oldest, _)) = self.cut_in_order.pop_front() {
                        self.cut.remove(&oldest);
                    }
                }
                self.cut.insert(id);
                self.cut_in_order.push_back((id, now));
            }
        }
    }

    /// Who ended this stream, if that is still known.
    #[must_use]
    pub fn find(&self, id: u32) -> Option<End> {
        if self.cut.contains(&id) {
            return Some(End::Ours);
        }
        self.ended.iter().rev().any(|&ended| ended == id).then_some(End::Theirs)
    }

    /// The other side knows by now that this stream is gone.
    pub fn hear(&mut self, id: u32, now: Instant) {
        if self.cut.remove(&id) {
            self.remember(id, End::Theirs, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_is_remembered_for_a_time_and_the_rest_by_number() {
        let (mut past, start) = (Past::default(), Instant::now());
        past.remember(1, End::Ours, start);
        past.remember(3, End::Theirs, start);
        assert_eq!((past.find(1), past.find(3), past.find(5)), (Some(End::Ours), Some(End::Theirs), None));
        for nth in 0..1000 {
            past.remember(2 * nth + 5, End::Theirs, start);
        }
        assert_eq!((past.find(1), past.find(3)), (Some(End::Ours), None));
        past.remember(3001, End::Ours, start + HEARD);
        past.hear(3001, start);
        assert_eq!((past.find(1), past.find(3001)), (Some(End::Ours), Some(End::Theirs)));
        past.remember(3003, End::Ours, start + HEARD * 2);
        assert_eq!(past.find(1), None);
    }

    #[test]
    fn nothing_grows() {
        let (mut past, start) = (Past::default(), Instant::now());
        for nth in 0..10_000 {
            past.remember(nth, End::Ours, start);
        }
        assert_eq!((past.cut.len(), past.cut_in_order.len()), (CUT, CUT));
        assert_eq!((past.find(10_000 - 1), past.find(0)), (Some(End::Ours), None));
    }
}
