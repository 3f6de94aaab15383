//! What a stream still has to hear: filled by the hub, emptied by the stream's own task.
//!
//! The hub never waits for room here. It asks beforehand, and a watch whose response finds no room falls behind instead;
//! the hub is told when there is room again. Answers to requests are always taken: how many of them there can be is bounded
//! by the stream's task, which asks no more before it has taken some.
//!
//! INVARIANTS
//! * Responses leave in the order they came.
//! * Once closed, from either side, an outbox is empty and stays so.
//! * The gauge of pending events counts exactly the events that lie in an outbox; [`Backlog`] sums up what all outboxes cost.
//! * Memory for the largest burst is not kept once it has been taken out.

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

/// What a response costs beside its events.
pub const RESPONSE_OVERHEAD_BYTES: usize = 96;

/// At most so much is taken out in one go, but at least one response.
const TAKE_BYTES: usize = 64 << 10;

/// One response, but for what only the answering member knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// A watch has begun.
    Created {
        /// Its ID.
        watch: i64,
        /// The revision behind which it hears everything.
        revision: i64,
    },
    /// A watch has not begun.
    Refused {
        /// Why.
        reason: Cow<'static, str>,
        /// The revision at that moment.
        revision: i64,
    },
    /// A watch was cancelled as its client asked.
    Canceled {
        /// Its ID.
        watch: i64,
        /// The revision at that moment.
        revision: i64,
    },
    /// A watch has ended, because what it had to hear next is forgotten.
    Compacted {
        /// Its ID.
        watch: i64,
        /// The compact revision.
        compacted: i64,
    },
    /// Everything up to a revision has been said.
    Progress {
        /// To whom: one watch, or all of the stream.
        watch: i64,
        /// Up to where.
        revision: i64,
    },
    /// Something happened.
    Events(Events),
}

/// Events for one watch: whole revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Events {
    /// Who hears of them.
    pub watch: i64,
    /// For the header.
    pub revision: i64,
    /// Whether the response may be sent in parts.
    pub fragment: bool,
    /// The events, encoded.
    pub frames: Frames,
}

/// One encoded event, or several, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frames {
    /// Nearly always.
    One(Bytes),
    /// For one watch alone.
    Many(Vec<Bytes>),
    /// Some of a list that several watches have in common.
    Shared {
        /// The list.
        list: Arc<[Bytes]>,
        /// Which of them.
        range: Range<usize>,
        /// What these count for here.
        cost: usize,
    },
}

impl Frames {
    /// All of them.
    #[must_use]
    pub fn as_slice(&self) -> &[Bytes] {
        match self {
            Self::One(frame) => std::slice::from_ref(frame),
            Self::Many(frames) => frames,
            Self::Shared { list, range, .. } => &list[range.clone()],
        }
    }

    /// What they count for.
    #[must_use]
    pub fn cost(&self) -> usize {
        match self {
            Self::One(frame) => frame_cost(frame),
            Self::Many(frames) => frames.iter().map(frame_cost).sum(),
            Self::Shared { cost, .. } => *cost,
        }
    }
}

/// What one frame counts for.
#[must_use]
pub fn frame_cost(frame: &Bytes) -> usize {
    frame.len() + size_of::<Bytes>()
}

impl Response {
    /// What it counts for.
    #[must_use]
    pub fn cost(&self) -> usize {
        let frames = if let Self::Events(events) = self { events.frames.cost() } else { 0 };
        RESPONSE_OVERHEAD_BYTES + frames
    }

    /// Its events.
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

    /// Whether it answers a request that is always answered.
    fn is_answer(&self) -> bool {
        matches!(self, Self::Created { .. } | Self::Refused { .. } | Self::Canceled { .. })
    }
}

/// What the hub adds in one go.
#[derive(Debug, Default)]
pub struct Delivery {
    /// In order.
    pub responses: Vec<Response>,
    /// What they cost.
    pub cost: usize,
    /// Requests of the stream that were handled since the last delivery.
    pub handled: u64,
    /// Tell the hub as soon as no more than this is left.
    pub hungry_below: Option<usize>,
}

/// What the stream's task finds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Requests handled so far.
    pub handled: u64,
    /// Answers to requests that still lie here.
    pub answers: usize,
    /// Whether the hub waits to be told that there is room.
    pub room: bool,
    /// Whether the hub has stopped.
    pub stopped: bool,
}

/// What lies in all outboxes of a hub together.
#[derive(Debug, Default)]
pub struct Backlog(AtomicUsize);

impl Backlog {
    /// In bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A stream's pending responses.
pub struct Outbox {
    state: Mutex<State>,
    /// Written under the lock only.
    cost: AtomicUsize,
    backlog: Arc<Backlog>,
    /// What the watches of the stream count for.
    watches: AtomicUsize,
    gauges: Gauges,
}

#[derive(Default)]
struct State {
    responses: VecDeque<Response>,
    answers: usize,
    handled: u64,
    hungry_below: Option<usize>,
    waker: Option<Waker>,
    closed: bool,
}

impl Outbox {
    /// An empty outbox, which is summed up in `backlog`.
    #[must_use]
    pub fn new(backlog: Arc<Backlog>, gauges: Gauges) -> Self {
        let (state, cost, watches) = (Mutex::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        Self { state, cost, backlog, watches, gauges }
    }

    /// A watch was asked for, which counts for so much until it has ended.
    pub fn charge_watch(&self, bytes: usize) {
        self.watches.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It has ended, or did not begin.
    pub fn release_watch(&self, bytes: usize) {
        self.watches.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What is kept for the stream: its watches, and what lies here.
    #[must_use]
    pub fn held(&self) -> usize {
        self.watches.load(Ordering::Relaxed) + self.cost()
    }

    /// What lies here. It may be less by now, but only the hub makes it more.
    #[must_use]
    pub fn cost(&self) -> usize {
        self.cost.load(Ordering::Relaxed)
    }

    /// Adds responses and wakes the stream's task. True if the hub was hungry and need not wait.
    pub fn deliver(&self, delivery: &mut Delivery) -> bool {
        let mut state = self.state.lock();
        let hungry_below = delivery.hungry_below.take();
        if state.closed {
            delivery.responses.clear();
            delivery.cost = 0;
            return false;
        }
        self.gauges.pending.add(count(&delivery.responses));
        let added = std::mem::take(&mut delivery.cost);
        self.backlog.0.fetch_add(added, Ordering::Relaxed);
        let cost = self.cost();
        self.cost.store(cost + added, Ordering::Relaxed);
        state.answers += delivery.responses.iter().filter(|response| response.is_answer()).count();
        state.handled += std::mem::take(&mut delivery.handled);
        state.responses.extend(delivery.responses.drain(..));
        give_back(&mut delivery.responses);
        let satisfied = hungry_below.is_some_and(|below| cost <= below);
        if !satisfied && hungry_below.is_some() {
            state.hungry_below = hungry_below;
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        satisfied
    }

    /// Takes some responses out. If there are none, the waker is called when there are, or when requests were handled.
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
        if state.responses.is_empty() && state.responses.capacity() > KEPT_CAPACITY {
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
        let room = state.hungry_below.take_if(|below| left <= *below).is_some();
        let taken = Taken { handled: state.handled, answers: state.answers, room, stopped: state.closed };
        drop(state);
        let events = count(into.range(before..));
        if events > 0 {
            self.gauges.pending.sub(events);
            self.gauges.events.inc_by(events.unsigned_abs());
        }
        taken
    }

    /// Throws everything away, for good.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let responses = std::mem::take(&mut state.responses);
        let waker = state.waker.take();
        self.backlog.0.fetch_sub(self.cost(), Ordering::Relaxed);
        self.cost.store(0, Ordering::Relaxed);
        drop(state);
        self.gauges.pending.sub(count(&responses));
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A list that has held a burst keeps no memory for the next one beyond this.
const KEPT_CAPACITY: usize = 4096;

/// Gives the memory of an empty list back if it is much.
pub fn give_back<T>(list: &mut Vec<T>) {
    if list.capacity() > KEPT_CAPACITY {
        *list = Vec::new();
    }
}

fn count<'a>(responses: impl IntoIterator<Item = &'a Response>) -> i64 {
    let events: usize = responses.into_iter().map(|response| response.frames().len()).sum();
    i64::try_from(events).expect("events fit in memory")
}
