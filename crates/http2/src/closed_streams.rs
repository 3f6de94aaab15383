//! Recently closed streams: frames that were in flight when a stream closed have to be told from protocol errors.
//!
//! Of streams that ended normally little can still be in flight, so the last few are remembered. For a stream that the *server*
//! reset early, the client keeps sending until it has received the reset, however many other streams end meanwhile: those streams
//! are remembered for a time.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

/// How many normally ended streams are remembered.
const MAX_ENDED: usize = 64;
/// How long it may take until the client has received a reset.
const RESET_MEMORY: Duration = Duration::from_secs(10);
/// How many reset streams are remembered at most.
const MAX_RESET: usize = 4096;

/// Which side closed a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClosedBy {
    /// The server, early: the client may not have known.
    Server,
    /// The client; or the server, and the client knew.
    Client,
}

#[derive(Debug, Default)]
pub struct ClosedStreams {
    ended: VecDeque<u32>,
    reset: HashSet<u32>,
    /// The same in order. IDs that are missing in `reset` have been acknowledged by the client.
    reset_in_order: VecDeque<(u32, Instant)>,
}

impl ClosedStreams {
    /// Must be called when a stream is closed.
    pub fn remember(&mut self, id: u32, closed_by: ClosedBy, now: Instant) {
        match closed_by {
            ClosedBy::Client => {
                if self.ended.len() == MAX_ENDED {
                    self.ended.pop_front();
                }
                self.ended.push_back(id);
            }
            ClosedBy::Server => {
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

    /// Which side closed the stream, if that is still known.
    #[must_use]
    pub fn find(&self, id: u32) -> Option<ClosedBy> {
        if self.reset.contains(&id) {
            return Some(ClosedBy::Server);
        }
        self.ended.iter().rev().any(|&ended| ended == id).then_some(ClosedBy::Client)
    }

    /// The client has shown that it knows of the reset of this stream.
    pub fn client_acknowledged(&mut self, id: u32, now: Instant) {
        if self.reset.remove(&id) {
            self.remember(id, ClosedBy::Client, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_streams_are_remembered_for_a_time_and_others_by_number() {
        let (mut closed, start) = (ClosedStreams::default(), Instant::now());
        closed.remember(1, ClosedBy::Server, start);
        closed.remember(3, ClosedBy::Client, start);
        assert_eq!(
            (closed.find(1), closed.find(3), closed.find(5)),
            (Some(ClosedBy::Server), Some(ClosedBy::Client), None)
        );
        for nth in 0..1000 {
            closed.remember(2 * nth + 5, ClosedBy::Client, start);
        }
        assert_eq!((closed.find(1), closed.find(3)), (Some(ClosedBy::Server), None));
        closed.remember(3001, ClosedBy::Server, start + RESET_MEMORY);
        closed.client_acknowledged(3001, start);
        assert_eq!((closed.find(1), closed.find(3001)), (Some(ClosedBy::Server), Some(ClosedBy::Client)));
        closed.remember(3003, ClosedBy::Server, start + RESET_MEMORY * 2);
        assert_eq!(closed.find(1), None);
    }

    #[test]
    fn memory_is_bounded() {
        let (mut closed, start) = (ClosedStreams::default(), Instant::now());
        for nth in 0..10_000 {
            closed.remember(nth, ClosedBy::Server, start);
        }
        assert_eq!((closed.reset.len(), closed.reset_in_order.len()), (MAX_RESET, MAX_RESET));
        assert_eq!((closed.find(10_000 - 1), closed.find(0)), (Some(ClosedBy::Server), None));
    }
}
