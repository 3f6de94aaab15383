//! The pending responses of a stream: filled by the hub, emptied by the stream's task.
//!
//! The hub never waits for capacity here. It checks before it stages events, and a watch whose stream has no capacity falls
//! behind instead; the hub is notified when there is capacity again. Responses to requests are always accepted: their number is
//! bounded by the stream's task, which sends no more requests before it has taken some responses.
//!
//! INVARIANTS
//! * Responses are taken in the order in which they were delivered.
//! * Once closed, from either side, an outbox is empty and stays empty.
//! * The gauge of pending events counts exactly the events in all outboxes; [`Backlog`] is the total cost of all outboxes.
//! * Memory for a large burst is released once the burst has been taken.

use std::{
    borrow::Cow,
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::Gauges;

/// The cost of a response in addition to its events.
pub const RESPONSE_OVERHEAD_BYTES: usize = 96;

/// The approximate maximum cost of the responses that one call takes; at least one response is taken.
const TAKE_BYTES: usize = 64 << 10;

/// A response, without what only the serving member knows: the rest of its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// A watch was created. `revision` is the head at that time; without a start revision, the watch receives all
    /// events after it.
    Created {
        watch: i64,
        revision: i64,
    },
    /// A watch was not created. `revision` is the head at that time.
    Refused {
        reason: Cow<'static, str>,
        revision: i64,
    },
    /// A watch was cancelled by its client. `revision` is the head at that time.
    Canceled {
        watch: i64,
        revision: i64,
    },
    /// A watch was cancelled by the server, because the revision that it needs next is compacted.
    Compacted {
        watch: i64,
        /// The compact revision.
        compacted: i64,
    },
    /// A progress notification: all events up to `revision` were delivered to one watch, or to all watches of the stream.
    Progress {
        watch: i64,
        revision: i64,
    },
    Events(Events),
}

/// Events for one watch: whole revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Events {
    pub watch: i64,
    /// The revision for the response header.
    pub revision: i64,
    /// Whether the response may be split.
    pub fragment: bool,
    pub frames: Frames,
}

/// Encoded events, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frames {
    /// One event: by far the most frequent case.
    One(Bytes),
    /// Several events, for one watch only.
    Many(Vec<Bytes>),
    /// Part of a list that several watches share.
    Shared {
        list: Arc<[Bytes]>,
        range: Range<usize>,
        /// What this part is charged with.
        cost: usize,
    },
}

impl Frames {
    #[must_use]
    pub fn as_slice(&self) -> &[Bytes] {
        match self {
            Self::One(frame) => std::slice::from_ref(frame),
            Self::Many(frames) => frames,
            Self::Shared { list, range, .. } => &list[range.clone()],
        }
    }

    /// The bytes that they are charged with.
    #[must_use]
    pub fn cost(&self) -> usize {
        match self {
            Self::One(frame) => frame_cost(frame),
            Self::Many(frames) => frames.iter().map(frame_cost).sum(),
            Self::Shared { cost, .. } => *cost,
        }
    }
}

/// The bytes that one frame is charged with.
#[must_use]
pub fn frame_cost(frame: &Bytes) -> usize {
    frame.len() + size_of::<Bytes>()
}

impl Response {
    /// The bytes that it is charged with.
    #[must_use]
    pub fn cost(&self) -> usize {
        let frames = if let Self::Events(events) = self { events.frames.cost() } else { 0 };
        RESPONSE_OVERHEAD_BYTES + frames
    }

    #[must_use]
    pub fn frames(&self) -> &[Bytes] {
        match self {
            Self::Events(events) => events.frames.as_slice(),
            Self::Created { .. }
            | Self::Refused { .. }
            | Self::Canceled { .. }
            | Self::Compacted { .. }
            | Self::Progress { .. } => &[],
        }
    }

    /// Whether it responds to a request of a kind that always has a response.
    fn is_answer(&self) -> bool {
        matches!(self, Self::Created { .. } | Self::Refused { .. } | Self::Canceled { .. })
    }
}

/// Responses that the hub delivers to an outbox together.
#[derive(Debug, Default)]
pub struct Delivery {
    pub responses: Vec<Response>,
    /// The total cost of the responses.
    pub cost: usize,
    /// The number of the stream's requests that were handled since the last delivery.
    pub handled: u64,
    /// If set, the hub has to be notified as soon as the outbox holds no more than this.
    pub notify_below: Option<usize>,
}

/// What [`Outbox::take`] reports besides the responses.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The number of requests handled so far.
    pub handled: u64,
    /// The number of responses to requests that are still in the outbox.
    pub answers: usize,
    /// Whether the caller has to notify the hub that there is capacity.
    pub notify_hub: bool,
    /// Whether the hub has stopped.
    pub stopped: bool,
}

/// The total cost of all outboxes of a hub.
#[derive(Debug, Default)]
pub struct Backlog(AtomicUsize);

impl Backlog {
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A stream's pending responses.
pub struct Outbox {
    state: Mutex<State>,
    /// The cost of the responses in `state`. Written only while `state` is locked.
    cost: AtomicUsize,
    backlog: Arc<Backlog>,
    /// The bytes that the watches of the stream are charged with.
    watches: AtomicUsize,
    gauges: Gauges,
}

#[derive(Default)]
struct State {
    responses: VecDeque<Response>,
    answers: usize,
    handled: u64,
    notify_below: Option<usize>,
    waker: Option<Waker>,
    closed: bool,
}

impl Outbox {
    /// An empty outbox, whose cost is included in `backlog`.
    #[must_use]
    pub fn new(backlog: Arc<Backlog>, gauges: Gauges) -> Self {
        let (state, cost, watches) = (Mutex::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        Self { state, cost, backlog, watches, gauges }
    }

    /// Charges a watch that was requested.
    pub fn charge_watch(&self, bytes: usize) {
        self.watches.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Releases the charge of a watch that was removed, or not created.
    pub fn release_watch(&self, bytes: usize) {
        self.watches.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The bytes held for the stream: its watches and its pending responses.
    #[must_use]
    pub fn held(&self) -> usize {
        self.watches.load(Ordering::Relaxed) + self.cost()
    }

    /// The cost of the pending responses. It can decrease at any time, but only the hub increases it.
    #[must_use]
    pub fn cost(&self) -> usize {
        self.cost.load(Ordering::Relaxed)
    }

    /// Adds responses and wakes the stream's task. True if `notify_below` is set and there is capacity already, so that the hub
    /// is not notified.
    pub fn deliver(&self, delivery: &mut Delivery) -> bool {
        let mut state = self.state.lock();
        let notify_below = delivery.notify_below.take();
        if state.closed {
            delivery.responses.clear();
            delivery.cost = 0;
            return false;
        }
        self.gauges.pending.add(count_events(&delivery.responses));
        let added = std::mem::take(&mut delivery.cost);
        self.backlog.0.fetch_add(added, Ordering::Relaxed);
        let cost = self.cost();
        self.cost.store(cost + added, Ordering::Relaxed);
        state.answers += delivery.responses.iter().filter(|response| response.is_answer()).count();
        state.handled += std::mem::take(&mut delivery.handled);
        state.responses.extend(delivery.responses.drain(..));
        release_memory(&mut delivery.responses);
        let has_capacity = notify_below.is_some_and(|below| cost <= below);
        if !has_capacity && notify_below.is_some() {
            state.notify_below = notify_below;
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        has_capacity
    }

    /// Takes some responses. If there are none, the waker is woken when there are, or when requests were handled.
    pub fn take(&self, into: &mut VecDeque<Response>, waker: &Waker) -> Taken {
        let mut state = self.state.lock();
        let (mut cost, before) = (0, into.len());
        while cost < TAKE_BYTES
            && let Some(response) = state.responses.pop_front()
        {
            cost += response.cost();
            state.answers -= usize::from(response.is_answer());
            into.push_back(response);
        }
        if state.responses.is_empty() && state.responses.capacity() > MAX_KEPT_CAPACITY {
            state.responses = VecDeque::new();
        }
        if cost == 0 && state.waker.as_ref().is_none_or(|known| !known.will_wake(waker)) {
            state.waker = Some(waker.clone());
        }
        if cost > 0 {
            self.backlog.0.fetch_sub(cost, Ordering::Relaxed);
        }
        let left = self.cost() - cost;
        self.cost.store(left, Ordering::Relaxed);
        let notify_hub = state.notify_below.take_if(|below| left <= *below).is_some();
        let taken = Taken { handled: state.handled, answers: state.answers, notify_hub, stopped: state.closed };
        drop(state);
        let events = count_events(into.range(before..));
        if events > 0 {
            self.gauges.pending.sub(events);
            self.gauges.events.inc_by(events.unsigned_abs());
        }
        taken
    }

    /// Discards all responses, now and in the future, and wakes the stream's task.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let responses = std::mem::take(&mut state.responses);
        let waker = state.waker.take();
        self.backlog.0.fetch_sub(self.cost(), Ordering::Relaxed);
        self.cost.store(0, Ordering::Relaxed);
        drop(state);
        self.gauges.pending.sub(count_events(&responses));
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// An empty list with a larger capacity is released.
const MAX_KEPT_CAPACITY: usize = 4096;

/// Releases the memory of an empty list if it is large.
pub fn release_memory<T>(list: &mut Vec<T>) {
    if list.capacity() > MAX_KEPT_CAPACITY {
        *list = Vec::new();
    }
}

fn count_events<'a>(responses: impl IntoIterator<Item = &'a Response>) -> i64 {
    let events: usize = responses.into_iter().map(|response| response.frames().len()).sum();
    i64::try_from(events).expect("events fit in memory")
}
