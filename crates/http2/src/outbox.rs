//! The queue in which responses wait for their connection.
//!
//! A response that is known at once is put here by the connection's own task, while it dispatches calls: that takes no lock and
//! wakes nothing ([`Outbox::run_local`]). Other threads append to a list behind a lock, and only the first append since the task
//! last looked wakes it: a batch of responses costs one wake-up.

use std::{
    cell::{Cell, RefCell},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
};

use parking_lot::Mutex;

use crate::{
    call::{Delivery, ReplySink},
    ledger::Charge,
};

/// The slot of no stream.
const NO_STREAM: u64 = 0;

/// Deliveries, with the slots of their streams.
pub type Deliveries = Vec<(u64, Delivery)>;

thread_local! {
    /// The address of the outbox whose task is inside [`Outbox::run_local`] on this thread, or zero.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
    /// What was put into that outbox meanwhile.
    static LOCAL: RefCell<Deliveries> = const { RefCell::new(Vec::new()) };
}

/// Receives the responses of all calls of a connection.
#[derive(Default)]
pub struct Outbox {
    pending: Mutex<Pending>,
    /// The connection shall end once its calls have ended.
    shutdown_requested: AtomicBool,
    /// Counts what calls in progress keep after their connection has ended, until the last of them has ended.
    orphaned: Mutex<Option<Charge>>,
}

#[derive(Default)]
struct Pending {
    deliveries: Deliveries,
    /// Streams whose handlers want to be stepped.
    woken: Vec<u64>,
    /// The connection has ended: nothing is kept for it any more.
    is_closed: bool,
    /// Wakes the sleeping task. `None` while the task is awake: it will look before it sleeps.
    waker: Option<Waker>,
}

impl ReplySink for Outbox {
    fn put(self: Arc<Self>, slot: u64, delivery: Delivery) {
        if CURRENT.get() == self.address() {
            return LOCAL.with_borrow_mut(|deliveries| deliveries.push((slot, delivery)));
        }
        let mut delivery = Some(delivery);
        self.add(|pending| {
            if !pending.is_closed {
                pending.deliveries.extend(delivery.take().map(|delivery| (slot, delivery)));
            }
        });
    }

    fn is_open(&self, _slot: u64) -> bool {
        !self.pending.lock().is_closed
    }
}

impl Outbox {
    /// Runs a closure on the connection's own task; what it puts into this outbox is appended to `answers`.
    pub fn run_local(&self, answers: &mut Deliveries, run: impl FnOnce()) {
        /// If the closure panics, nothing of it may be left to the next connection on this thread.
        struct Reset;
        impl Drop for Reset {
            fn drop(&mut self) {
                CURRENT.set(0);
                if std::thread::panicking() {
                    drop(LOCAL.take());
                }
            }
        }
        CURRENT.set(self.address());
        let reset = Reset;
        run();
        drop(reset);
        LOCAL.with_borrow_mut(|deliveries| answers.append(deliveries));
    }

    /// Takes everything that is pending. False if there was nothing.
    pub fn take(&self, deliveries: &mut Deliveries, woken: &mut Vec<u64>) -> bool {
        let mut pending = self.pending.lock();
        pending.waker = None;
        deliveries.append(&mut pending.deliveries);
        woken.append(&mut pending.woken);
        !deliveries.is_empty() || !woken.is_empty()
    }

    /// Registers the task's waker before it sleeps. False if the task must not sleep, because something is pending.
    pub fn register_waker(&self, waker: &Waker) -> bool {
        let mut pending = self.pending.lock();
        if !pending.deliveries.is_empty() || !pending.woken.is_empty() {
            return false;
        }
        pending.waker = Some(waker.clone());
        true
    }

    #[must_use]
    pub fn has_pending(&self) -> bool {
        let pending = self.pending.lock();
        !pending.deliveries.is_empty() || !pending.woken.is_empty()
    }

    /// Asks the connection to end once its calls have ended.
    pub fn request_shutdown(&self) {
        self.shutdown_requested.store(true, Ordering::Release);
        self.add(|pending| pending.woken.push(NO_STREAM)); // A pending entry keeps the task from going to sleep meanwhile.
    }

    /// The connection has ended. `orphaned` counts what its calls in progress keep. Deliveries are dropped from now on.
    pub fn close(&self, orphaned: Option<Charge>) {
        *self.orphaned.lock() = orphaned;
        let closed = Pending { is_closed: true, ..Pending::default() };
        let dropped = std::mem::replace(&mut *self.pending.lock(), closed);
        drop(dropped); // Not under the lock: dropping a delivery may put another one here.
    }

    #[must_use]
    pub fn shutdown_requested(&self) -> bool {
        self.shutdown_requested.load(Ordering::Acquire)
    }

    fn wake(&self, slot: u64) {
        self.add(|pending| pending.woken.push(slot));
    }

    fn add(&self, add: impl FnOnce(&mut Pending)) {
        let mut pending = self.pending.lock();
        add(&mut pending);
        let waker = pending.waker.take();
        drop(pending);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// Schedules one stream to be stepped.
pub struct StreamWaker {
    outbox: Arc<Outbox>,
    slot: u64,
    /// The stream is in the outbox already.
    is_queued: AtomicBool,
}

impl StreamWaker {
    #[must_use]
    pub fn new(outbox: Arc<Outbox>, slot: u64) -> Arc<Self> {
        Arc::new(Self { outbox, slot, is_queued: AtomicBool::new(false) })
    }

    /// Must be called before the handler looks for work: from then on a wake schedules the stream again.
    pub fn rearm(&self) {
        self.is_queued.store(false, Ordering::Release);
    }
}

impl Wake for StreamWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.outbox.wake(self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use bytes::Bytes;

    use super::*;
    use crate::call::Reply;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn slots(deliveries: &Deliveries) -> Vec<u64> {
        deliveries.iter().map(|(slot, _)| *slot).collect()
    }

    #[test]
    fn a_batch_of_responses_wakes_the_task_once() {
        let outbox = Arc::new(Outbox::default());
        let count = Arc::new(Count::default());
        assert!(outbox.register_waker(&count.clone().into()));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for slot in 0..100 {
                    Reply::new(outbox.clone(), slot).answer(Ok(Bytes::new()));
                }
            });
        });
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(!outbox.register_waker(&count.into()), "something is pending");
        let (mut deliveries, mut woken) = (Vec::new(), Vec::new());
        assert!(outbox.take(&mut deliveries, &mut woken));
        assert_eq!(slots(&deliveries), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_reply_on_the_connections_own_task_is_returned_at_once() {
        let (own, other) = (Arc::new(Outbox::default()), Arc::new(Outbox::default()));
        let mut answers = Vec::new();
        own.run_local(&mut answers, || {
            Reply::new(own.clone(), 1).answer(Ok(Bytes::new()));
            Reply::new(other.clone(), 2).answer(Ok(Bytes::new()));
            drop(Reply::new(own.clone(), 3));
        });
        assert_eq!(slots(&answers), [1, 3]);
        let (mut deliveries, mut woken) = (Vec::new(), Vec::new());
        assert!(!own.take(&mut deliveries, &mut woken));
        assert!(other.take(&mut deliveries, &mut woken));
        assert_eq!(slots(&deliveries), [2]);
    }

    #[test]
    fn a_panic_leaves_nothing_to_the_next_connection_on_the_thread() {
        let (first, next) = (Arc::new(Outbox::default()), Arc::new(Outbox::default()));
        let panics = std::panic::AssertUnwindSafe(|| {
            let reply = Reply::new(first.clone(), 1);
            Reply::new(first.clone(), 2).answer(Ok(Bytes::new()));
            first.run_local(&mut Vec::new(), || {
                let _unused = reply;
                panic!("a handler fails");
            });
        });
        assert!(std::panic::catch_unwind(panics).is_err());
        let mut answers = Vec::new();
        next.run_local(&mut answers, || ());
        assert_eq!(slots(&answers), [0_u64; 0]);
    }

    #[test]
    fn a_stream_is_scheduled_once_until_its_waker_is_rearmed() {
        let outbox = Arc::new(Outbox::default());
        let stream_waker = StreamWaker::new(outbox.clone(), 7);
        let waker = Waker::from(stream_waker.clone());
        let (mut deliveries, mut woken) = (Vec::new(), Vec::new());
        waker.wake_by_ref();
        waker.wake_by_ref();
        outbox.take(&mut deliveries, &mut woken);
        assert_eq!(woken, [7]);
        stream_waker.rearm();
        waker.wake();
        outbox.take(&mut deliveries, &mut woken);
        assert_eq!(woken, [7, 7]);
    }
}
