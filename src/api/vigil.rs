//! Streams that were opened with `hasleader: true` do not outlive the leader for long.
//!
//! Whether there is a leader is looked at once per election timeout, in one place for all streams. After three looks in a row
//! that found none, every such stream ends, so that its client looks for another member. Reconnecting costs much more
//! than waiting, hence the patience; whoever comes anew meanwhile is refused at once.
//!
//! A stream remembers how often that had happened when it was opened. So all that is to be done when it happens again is to
//! count it and to wake them.

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
    call::{Conversation, Line, Step},
    error::Error,
};

/// So many looks in a row that find no leader.
const PATIENCE: u32 = 3;

/// Watches over the streams that want a leader.
#[derive(Default)]
pub struct Vigil {
    /// How often the leader was given up.
    given_up: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    looks_in_vain: u32,
    next_name: u64,
    wakers: HashMap<u64, Waker>,
}

impl Vigil {
    /// One look: is there a leader?
    pub fn look(&self, has_leader: bool) {
        let mut state = self.state.lock();
        state.looks_in_vain = if has_leader { 0 } else { state.looks_in_vain + 1 };
        if state.looks_in_vain < PATIENCE {
            return;
        }
        self.given_up.fetch_add(1, Ordering::Release);
        let wakers = mem::take(&mut state.wakers);
        drop(state);
        wakers.into_values().for_each(Waker::wake);
    }

    /// The same conversation, which ends when the leader is given up.
    #[must_use]
    pub fn guard(self: &Arc<Self>, conversation: Box<dyn Conversation>) -> Box<dyn Conversation> {
        let mut state = self.state.lock();
        let name = state.next_name;
        state.next_name += 1;
        drop(state);
        let since = self.given_up.load(Ordering::Acquire);
        Box::new(Guarded { conversation, vigil: self.clone(), name, since, waker: None })
    }
}

/// A stream that wants a leader.
struct Guarded {
    conversation: Box<dyn Conversation>,
    vigil: Arc<Vigil>,
    name: u64,
    /// How often the leader had been given up when the stream was opened.
    since: u64,
    /// Who is woken.
    waker: Option<Waker>,
}

impl Conversation for Guarded {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        if self.waker.as_ref().is_none_or(|known| !known.will_wake(line.waker())) {
            self.waker = Some(line.waker().clone());
            self.vigil.state.lock().wakers.insert(self.name, line.waker().clone());
        }
        // Behind the registration: who is not woken sees the count.
        if self.vigil.given_up.load(Ordering::Acquire) != self.since {
            return Step::End(Err(Error::NoLeader.into()));
        }
        self.conversation.step(line)
    }

    fn held(&self) -> usize {
        self.conversation.held()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.vigil.state.lock().wakers.remove(&self.name);
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
        fn step(&mut self, _line: &mut dyn Line) -> Step {
            Step::Wait
        }
    }

    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A line on which nobody says anything.
    struct Silence(Waker);

    impl Line for Silence {
        fn receive(&mut self) -> Option<Bytes> {
            None
        }

        fn ended(&self) -> bool {
            false
        }

        fn has_room(&self) -> bool {
            true
        }

        fn send(&mut self, _message: Bytes) {}

        fn waker(&self) -> &Waker {
            &self.0
        }
    }

    /// A stream, the line that it is stepped with, and how often it was woken.
    fn open(vigil: &Arc<Vigil>) -> (Box<dyn Conversation>, Silence, Arc<Bell>) {
        let bell = Arc::new(Bell::default());
        (vigil.guard(Box::new(Idle)), Silence(Waker::from(bell.clone())), bell)
    }

    #[test]
    fn streams_end_at_the_third_look_that_finds_no_leader() {
        let vigil = Arc::new(Vigil::default());
        let (mut stream, mut line, bell) = open(&vigil);
        assert_eq!(stream.step(&mut line), Step::Wait);
        for has_leader in [false, false, true, false, false] {
            vigil.look(has_leader);
            assert_eq!(stream.step(&mut line), Step::Wait, "it is given up after three in a row only");
        }
        assert_eq!(bell.0.load(Ordering::Relaxed), 0);
        vigil.look(false);
        assert_eq!(bell.0.load(Ordering::Relaxed), 1, "it is woken");
        let Step::End(Err(refusal)) = stream.step(&mut line) else { panic!("it goes on") };
        assert_eq!((refusal.code, refusal.message.as_ref()), (Code::Unavailable, "etcdserver: no leader"));
    }

    #[test]
    fn a_stream_that_is_opened_later_lives_until_the_next_time() {
        let vigil = Arc::new(Vigil::default());
        (0..3).for_each(|_| vigil.look(false));
        let (mut stream, mut line, _) = open(&vigil);
        vigil.look(true);
        assert_eq!(stream.step(&mut line), Step::Wait);
        (0..3).for_each(|_| vigil.look(false));
        assert!(matches!(stream.step(&mut line), Step::End(Err(_))));
    }

    #[test]
    fn streams_that_are_gone_leave_nothing_behind() {
        let vigil = Arc::new(Vigil::default());
        let streams: Vec<_> = (0..10).map(|_| open(&vigil)).collect();
        for (mut stream, mut line, _) in streams {
            assert_eq!(stream.step(&mut line), Step::Wait);
        }
        assert!(vigil.state.lock().wakers.is_empty());
    }
}
