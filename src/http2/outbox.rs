//! Where answers wait for their connection.
//!
//! An answer that is known at once is put here by the connection's own task, while it hands out calls: that takes no lock and
//! wakes nobody ([`Outbox::at_home`]). Everybody else adds to a list behind a lock, and only the first to do so since the task
//! last looked wakes it: a batch of answers costs one wake-up.

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
    call::{Mailbox, Parcel},
    ledger::Charge,
};

/// The slot of no stream.
const NOBODY: u64 = 0;

/// Parcels, and the streams that they are for.
pub type Parcels = Vec<(u64, Parcel)>;

thread_local! {
    /// The outbox whose task runs on this thread, by its address; zero is none.
    static HOME: Cell<usize> = const { Cell::new(0) };
    /// What was put into it meanwhile.
    static AT_HOME: RefCell<Parcels> = const { RefCell::new(Vec::new()) };
}

/// The mailbox of all calls of a connection.
#[derive(Default)]
pub struct Outbox {
    letters: Mutex<Letters>,
    /// The connection is to end when its calls have ended.
    is_to_leave: AtomicBool,
    /// What calls in progress keep is counted until the last of them has ended.
    orphaned: Mutex<Option<Charge>>,
}

#[derive(Default)]
struct Letters {
    parcels: Parcels,
    /// Streams whose conversations want to be stepped.
    woken: Vec<u64>,
    /// The connection has ended: nothing is kept for it any more.
    is_closed: bool,
    /// Whoever is to be woken. None: the task is awake, and will look before it sleeps.
    sleeper: Option<Waker>,
}

impl Mailbox for Outbox {
    fn put(self: Arc<Self>, slot: u64, parcel: Parcel) {
        if HOME.get() == self.address() {
            return AT_HOME.with_borrow_mut(|parcels| parcels.push((slot, parcel)));
        }
        let mut parcel = Some(parcel);
        self.add(|letters| {
            if !letters.is_closed {
                letters.parcels.extend(parcel.take().map(|parcel| (slot, parcel)));
            }
        });
    }

    fn is_open(&self, _slot: u64) -> bool {
        !self.letters.lock().is_closed
    }
}

impl Outbox {
    /// Runs something on the connection's own task; what it puts here comes back as `answers`.
    pub fn at_home(&self, answers: &mut Parcels, run: impl FnOnce()) {
        /// If what runs panics, nothing of it may be left to the thread's next connection.
        struct Leave;
        impl Drop for Leave {
            fn drop(&mut self) {
                HOME.set(0);
                if std::thread::panicking() {
                    drop(AT_HOME.take());
                }
            }
        }
        HOME.set(self.address());
        let leave = Leave;
        run();
        drop(leave);
        AT_HOME.with_borrow_mut(|parcels| answers.append(parcels));
    }

    /// Takes everything that has come. False if there was nothing.
    pub fn take(&self, parcels: &mut Parcels, woken: &mut Vec<u64>) -> bool {
        let mut letters = self.letters.lock();
        letters.sleeper = None;
        parcels.append(&mut letters.parcels);
        woken.append(&mut letters.woken);
        !parcels.is_empty() || !woken.is_empty()
    }

    /// The task is about to sleep. False: it must not, because something has come.
    pub fn sleep(&self, waker: &Waker) -> bool {
        let mut letters = self.letters.lock();
        if !letters.parcels.is_empty() || !letters.woken.is_empty() {
            return false;
        }
        letters.sleeper = Some(waker.clone());
        true
    }

    /// Whether something has come.
    #[must_use]
    pub fn has_letters(&self) -> bool {
        let letters = self.letters.lock();
        !letters.parcels.is_empty() || !letters.woken.is_empty()
    }

    /// Tells the connection to end when its calls have ended.
    pub fn ask_to_leave(&self) {
        self.is_to_leave.store(true, Ordering::Release);
        self.add(|letters| letters.woken.push(NOBODY)); // A letter, so that the task does not fall asleep meanwhile.
    }

    /// The connection has ended, and leaves what its calls in progress keep. Parcels are dropped from now on.
    pub fn close(&self, orphaned: Option<Charge>) {
        *self.orphaned.lock() = orphaned;
        let closed = Letters { is_closed: true, ..Letters::default() };
        let dropped = std::mem::replace(&mut *self.letters.lock(), closed);
        drop(dropped); // Not under the lock: what parcels hold may put something here when it goes.
    }

    /// Whether the connection was told to end.
    #[must_use]
    pub fn is_to_leave(&self) -> bool {
        self.is_to_leave.load(Ordering::Acquire)
    }

    fn wake(&self, slot: u64) {
        self.add(|letters| letters.woken.push(slot));
    }

    fn add(&self, add: impl FnOnce(&mut Letters)) {
        let mut letters = self.letters.lock();
        add(&mut letters);
        let sleeper = letters.sleeper.take();
        drop(letters);
        if let Some(sleeper) = sleeper {
            sleeper.wake();
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// Wakes one stream's conversation.
pub struct Bell {
    outbox: Arc<Outbox>,
    slot: u64,
    /// It lies in the outbox already.
    has_rung: AtomicBool,
}

impl Bell {
    /// A bell for a stream.
    #[must_use]
    pub fn new(outbox: Arc<Outbox>, slot: u64) -> Arc<Self> {
        Arc::new(Self { outbox, slot, has_rung: AtomicBool::new(false) })
    }

    /// The conversation is about to look: from now on it wants to hear the bell again.
    pub fn listen(&self) {
        self.has_rung.store(false, Ordering::Release);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.has_rung.swap(true, Ordering::AcqRel) {
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

    fn slots(parcels: &Parcels) -> Vec<u64> {
        parcels.iter().map(|(slot, _)| *slot).collect()
    }

    #[test]
    fn a_batch_of_answers_wakes_once() {
        let outbox = Arc::new(Outbox::default());
        let count = Arc::new(Count::default());
        assert!(outbox.sleep(&count.clone().into()));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for slot in 0..100 {
                    Reply::new(outbox.clone(), slot).answer(Ok(Bytes::new()));
                }
            });
        });
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(!outbox.sleep(&count.into()), "there is something to be taken");
        let (mut parcels, mut woken) = (Vec::new(), Vec::new());
        assert!(outbox.take(&mut parcels, &mut woken));
        assert_eq!(slots(&parcels), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_answered_at_home_comes_back_at_once() {
        let (home, other) = (Arc::new(Outbox::default()), Arc::new(Outbox::default()));
        let mut answers = Vec::new();
        home.at_home(&mut answers, || {
            Reply::new(home.clone(), 1).answer(Ok(Bytes::new()));
            Reply::new(other.clone(), 2).answer(Ok(Bytes::new()));
            drop(Reply::new(home.clone(), 3));
        });
        assert_eq!(slots(&answers), [1, 3]);
        let (mut parcels, mut woken) = (Vec::new(), Vec::new());
        assert!(!home.take(&mut parcels, &mut woken));
        assert!(other.take(&mut parcels, &mut woken));
        assert_eq!(slots(&parcels), [2]);
    }

    #[test]
    fn what_panics_at_home_leaves_nothing_to_the_next_one() {
        let (first, next) = (Arc::new(Outbox::default()), Arc::new(Outbox::default()));
        let panics = std::panic::AssertUnwindSafe(|| {
            let reply = Reply::new(first.clone(), 1);
            Reply::new(first.clone(), 2).answer(Ok(Bytes::new()));
            first.at_home(&mut Vec::new(), || {
                let _unused = reply;
                panic!("a handler fails");
            });
        });
        assert!(std::panic::catch_unwind(panics).is_err());
        let mut answers = Vec::new();
        next.at_home(&mut answers, || ());
        assert_eq!(slots(&answers), [0_u64; 0]);
    }

    #[test]
    fn a_bell_rings_once_until_it_is_listened_to_again() {
        let outbox = Arc::new(Outbox::default());
        let bell = Bell::new(outbox.clone(), 7);
        let waker = Waker::from(bell.clone());
        let (mut parcels, mut woken) = (Vec::new(), Vec::new());
        waker.wake_by_ref();
        waker.wake_by_ref();
        outbox.take(&mut parcels, &mut woken);
        assert_eq!(woken, [7]);
        bell.listen();
        waker.wake();
        outbox.take(&mut parcels, &mut woken);
        assert_eq!(woken, [7, 7]);
    }
}
