//! Streams that are gone, remembered for a while: what is still on its way for them has to be told from what breaks the rules.
//!
//! Streams that ended as they should leave little behind, and the last few are enough. A stream that *we* cut off is spoken
//! of by the other side until it hears of that, however many others end meanwhile: it is remembered for a time.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

/// How many that ended as they should are remembered.
const MAX_ENDED: usize = 64;
/// How long it may take until the other side has heard that a stream was cut off.
const RESET_MEMORY: Duration = Duration::from_secs(10);
/// How many of those are remembered at most.
const MAX_RESET: usize = 4096;

/// Who ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClosedBy {
    /// We did, early: the other side may not have known.
    Us,
    /// The other side did, or knew.
    Peer,
}

/// What is remembered.
#[derive(Debug, Default)]
pub struct ClosedStreams {
    ended: VecDeque<u32>,
    reset: HashSet<u32>,
    /// The same in order. The other side has heard of those that are missing above.
    reset_in_order: VecDeque<(u32, Instant)>,
}

impl ClosedStreams {
    /// A stream is gone.
    pub fn remember(&mut self, id: u32, closed_by: ClosedBy, now: Instant) {
        match closed_by {
            ClosedBy::Peer => {
                if self.ended.len() == MAX_ENDED {
                    self.ended.pop_front();
                }
                self.ended.push_back(id);
            }
            ClosedBy::Us => {
                let is_old = |&(_, since): &(u32, Instant)| now.duration_since(since) > RESET_MEMORY;
                while self.reset_in_order.len() == MAX_RESET || self.reset_in_order.front().is_some_and(is_old) {
                    if let Some((oldest, _)) = self.reset_in_order.pop_front() {
                        self.reset.remove(&oldest);
                    }
                }
                self.reset.insert(id);
                self.reset_in_order.push_back((id, now));
            }
        }
    }

    /// Who ended this stream, if that is still known.
    #[must_use]
    pub fn find(&self, id: u32) -> Option<ClosedBy> {
        if self.reset.contains(&id) {
            return Some(ClosedBy::Us);
        }
        self.ended.iter().rev().any(|&ended| ended == id).then_some(ClosedBy::Peer)
    }

    /// The other side knows by now that this stream is gone.
    pub fn peer_acknowledged(&mut self, id: u32, now: Instant) {
        if self.reset.remove(&id) {
            self.remember(id, ClosedBy::Peer, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_is_remembered_for_a_time_and_the_rest_by_number() {
        let (mut closed, start) = (ClosedStreams::default(), Instant::now());
        closed.remember(1, ClosedBy::Us, start);
        closed.remember(3, ClosedBy::Peer, start);
        assert_eq!((closed.find(1), closed.find(3), closed.find(5)), (Some(ClosedBy::Us), Some(ClosedBy::Peer), None));
        for nth in 0..1000 {
            closed.remember(2 * nth + 5, ClosedBy::Peer, start);
        }
        assert_eq!((closed.find(1), closed.find(3)), (Some(ClosedBy::Us), None));
        closed.remember(3001, ClosedBy::Us, start + RESET_MEMORY);
        closed.peer_acknowledged(3001, start);
        assert_eq!((closed.find(1), closed.find(3001)), (Some(ClosedBy::Us), Some(ClosedBy::Peer)));
        closed.remember(3003, ClosedBy::Us, start + RESET_MEMORY * 2);
        assert_eq!(closed.find(1), None);
    }

    #[test]
    fn nothing_grows() {
        let (mut closed, start) = (ClosedStreams::default(), Instant::now());
        for nth in 0..10_000 {
            closed.remember(nth, ClosedBy::Us, start);
        }
        assert_eq!((closed.reset.len(), closed.reset_in_order.len()), (MAX_RESET, MAX_RESET));
        assert_eq!((closed.find(10_000 - 1), closed.find(0)), (Some(ClosedBy::Us), None));
    }
}
