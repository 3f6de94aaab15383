//! Ends streams that were opened with `hasleader: true` when the member has no leader.
//!
//! Once per election timeout, one task polls for all streams whether there is a leader. After three polls in a row without one,
//! every such stream ends, so that its client connects to another member. Reconnecting costs much more than waiting, hence the
//! three polls; new streams are refused immediately while there is no leader.
//!
//! A stream remembers the number of leader losses at the time when it was opened. So a new loss only has to increment the
//! counter and wake the streams.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
};

use parking_lot::Mutex;

use crate::{
    call::{Conversation, Step, StreamIo},
    error::Error,
};

/// The leader counts as lost after this many polls in a row without one.
const MAX_POLLS_WITHOUT_LEADER: u32 = 3;

/// Tells streams that require a leader when it is lost.
#[derive(Default)]
pub struct LeaderWatch {
    /// How many times the leader was lost.
    losses: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    polls_without_leader: u32,
    next_id: u64,
    wakers: HashMap<u64, Waker>,
}

impl LeaderWatch {
    /// Records whether there is a leader. To be called once per election timeout.
    pub fn look(&self, has_leader: bool) {
        let mut state = self.state.lock();
        state.polls_without_leader = if has_leader { 0 } else { state.polls_without_leader + 1 };
        if state.polls_without_leader < MAX_POLLS_WITHOUT_LEADER {
            return;
        }
        self.losses.fetch_add(1, Ordering::Release);
        let wakers = mem::take(&mut state.wakers);
        drop(state);
        wakers.into_values().for_each(Waker::wake);
    }

    /// Wraps a conversation so that it ends when the leader is lost.
    #[must_use]
    pub fn guard(self: &Arc<Self>, conversation: Box<dyn Conversation>) -> Box<dyn Conversation> {
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        drop(state);
        let losses_at_open = self.losses.load(Ordering::Acquire);
        Box::new(Guarded { conversation, leader_watch: self.clone(), id, losses_at_open, waker: None })
    }
}

/// A stream that requires a leader.
struct Guarded {
    conversation: Box<dyn Conversation>,
    leader_watch: Arc<LeaderWatch>,
    id: u64,
    losses_at_open: u64,
    /// The waker that is registered.
    waker: Option<Waker>,
}

impl Conversation for Guarded {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        if self.waker.as_ref().is_none_or(|registered| !registered.will_wake(line.waker())) {
            self.waker = Some(line.waker().clone());
            self.leader_watch.state.lock().wakers.insert(self.id, line.waker().clone());
        }
        // After the registration: a stream that was registered too late to be woken sees the new count.
        if self.leader_watch.losses.load(Ordering::Acquire) != self.losses_at_open {
            return Step::End(Err(Error::NoLeader.into()));
        }
        self.conversation.step(line)
    }

    fn held_bytes(&self) -> usize {
        self.conversation.held_bytes()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.leader_watch.state.lock().wakers.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicUsize,
        task::{Wake, Waker},
    };

    use bytes::Bytes;

    use super::*;
    use crate::call::Code;

    struct Idle;

    impl Conversation for Idle {
        fn step(&mut self, _line: &mut dyn StreamIo) -> Step {
            Step::Wait
        }
    }

    #[derive(Default)]
    struct CountingWaker(AtomicUsize);

    impl Wake for CountingWaker {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A line without messages.
    struct IdleLine(Waker);

    impl StreamIo for IdleLine {
        fn receive(&mut self) -> Option<Bytes> {
            None
        }

        fn is_half_closed(&self) -> bool {
            false
        }

        fn can_send(&self) -> bool {
            true
        }

        fn send(&mut self, _message: Bytes) {}

        fn waker(&self) -> &Waker {
            &self.0
        }
    }

    /// A stream, the line that it is stepped with, and the number of its wake-ups.
    fn open(leader_watch: &Arc<LeaderWatch>) -> (Box<dyn Conversation>, IdleLine, Arc<CountingWaker>) {
        let wakes = Arc::new(CountingWaker::default());
        (leader_watch.guard(Box::new(Idle)), IdleLine(Waker::from(wakes.clone())), wakes)
    }

    #[test]
    fn streams_end_at_the_third_poll_without_a_leader() {
        let leader_watch = Arc::new(LeaderWatch::default());
        let (mut stream, mut line, wakes) = open(&leader_watch);
        assert_eq!(stream.step(&mut line), Step::Wait);
        for has_leader in [false, false, true, false, false] {
            leader_watch.look(has_leader);
            assert_eq!(stream.step(&mut line), Step::Wait, "the leader is lost after three polls in a row only");
        }
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
        leader_watch.look(false);
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "it is woken");
        let Step::End(Err(refusal)) = stream.step(&mut line) else { panic!("the stream goes on") };
        assert_eq!((refusal.code, refusal.message.as_ref()), (Code::Unavailable, "etcdserver: no leader"));
    }

    #[test]
    fn a_stream_that_is_opened_after_a_loss_ends_at_the_next_one() {
        let leader_watch = Arc::new(LeaderWatch::default());
        (0..3).for_each(|_| leader_watch.look(false));
        let (mut stream, mut line, _) = open(&leader_watch);
        leader_watch.look(true);
        assert_eq!(stream.step(&mut line), Step::Wait);
        (0..3).for_each(|_| leader_watch.look(false));
        assert!(matches!(stream.step(&mut line), Step::End(Err(_))));
    }

    #[test]
    fn dropped_streams_leave_no_wakers() {
        let leader_watch = Arc::new(LeaderWatch::default());
        let streams: Vec<_> = (0..10).map(|_| open(&leader_watch)).collect();
        for (mut stream, mut line, _) in streams {
            assert_eq!(stream.step(&mut line), Step::Wait);
        }
        assert!(leader_watch.state.lock().wakers.is_empty());
    }
}
