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

use crate::error::Error;

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
    pub fn poll(&self, has_leader: bool) {
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

    /// Registers a stream that requires a leader.
    #[must_use]
    pub fn register(self: &Arc<Self>) -> LeaderLoss {
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        drop(state);
        let losses_at_open = self.losses.load(Ordering::Acquire);
        LeaderLoss { leader_watch: self.clone(), id, losses_at_open, waker: None }
    }
}

/// Whether the leader was lost after a stream was opened.
pub struct LeaderLoss {
    leader_watch: Arc<LeaderWatch>,
    id: u64,
    losses_at_open: u64,
    /// The waker that is registered.
    waker: Option<Waker>,
}

impl LeaderLoss {
    /// `NoLeader` if the leader was lost; otherwise the waker is woken when it is.
    pub fn check(&mut self, waker: &Waker) -> Result<(), Error> {
        if self.waker.as_ref().is_none_or(|registered| !registered.will_wake(waker)) {
            self.waker = Some(waker.clone());
            self.leader_watch.state.lock().wakers.insert(self.id, waker.clone());
        }
        // After the registration: a stream that was registered too late to be woken sees the new count.
        if self.leader_watch.losses.load(Ordering::Acquire) == self.losses_at_open {
            Ok(())
        } else {
            Err(Error::NoLeader)
        }
    }
}

impl Drop for LeaderLoss {
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

    use super::*;

    #[derive(Default)]
    struct WakeCounter(AtomicUsize);

    impl Wake for WakeCounter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_leader_is_lost_at_the_third_poll_without_one() {
        let leader_watch = Arc::new(LeaderWatch::default());
        let counter = Arc::new(WakeCounter::default());
        let (mut stream, waker) = (leader_watch.register(), Waker::from(counter.clone()));
        assert_eq!(stream.check(&waker), Ok(()));
        for has_leader in [false, false, true, false, false] {
            leader_watch.poll(has_leader);
            assert_eq!(stream.check(&waker), Ok(()), "only three in a row count");
        }
        assert_eq!(counter.0.load(Ordering::Relaxed), 0);
        leader_watch.poll(false);
        assert_eq!(counter.0.load(Ordering::Relaxed), 1, "it is woken");
        assert_eq!(stream.check(&waker), Err(Error::NoLeader));
    }

    #[test]
    fn a_stream_that_is_opened_after_a_loss_lives_until_the_next_one() {
        let leader_watch = Arc::new(LeaderWatch::default());
        (0..3).for_each(|_| leader_watch.poll(false));
        let mut stream = leader_watch.register();
        leader_watch.poll(true);
        assert_eq!(stream.check(Waker::noop()), Ok(()));
        (0..3).for_each(|_| leader_watch.poll(false));
        assert_eq!(stream.check(Waker::noop()), Err(Error::NoLeader));
    }

    #[test]
    fn a_stream_that_has_ended_leaves_no_waker_behind() {
        let leader_watch = Arc::new(LeaderWatch::default());
        for mut stream in (0..10).map(|_| leader_watch.register()).collect::<Vec<_>>() {
            assert_eq!(stream.check(Waker::noop()), Ok(()));
        }
        assert!(leader_watch.state.lock().wakers.is_empty());
    }
}
