//! The hub's state of one stream, and of one watch.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::outbox::{Delivery, Outbox, Response};
use crate::mvcc::Interval;

/// The allowance that each watch adds to its stream's limit of pending bytes: space for one small response.
const PENDING_BYTES_PER_WATCH: usize = 512;

/// The memory of a watch beside its keys: the watch itself, and its entries in the hub's lists.
const WATCH_BYTES: usize = 400;

/// The bytes that a watch of these keys is charged with.
#[must_use]
pub fn watch_cost(interval: &Interval) -> usize {
    let keys = match interval {
        Interval::Key(key) | Interval::From(key) => key.len(),
        Interval::Range(start, end) => start.len() + end.len(),
    };
    WATCH_BYTES + keys
}

/// A watch stream.
pub struct Stream {
    pub id: u64,
    /// The slots of its watches, by watch ID.
    pub watches: BTreeMap<i64, u32>,
    /// The next ID for a watch that is created without one; IDs that the client chose are skipped.
    pub next_watch_id: i64,
    /// How many of its watches are not synced.
    pub lagging: usize,
    /// Watches in [`WatchState::Waiting`], by the revision that they need next.
    pub waiting: BTreeSet<(i64, u32)>,
    /// Watches that start at a revision above the head, or did when they were created, by that revision.
    pub future: BTreeSet<(i64, u32)>,
    pub opened: Duration,
    /// The interval of progress notifications.
    pub period: Duration,
    /// Whether the hub has a timer for the next tick.
    pub ticking: bool,
    /// Whether it is marked to be flushed.
    pub dirty: bool,
    outbox: Arc<Outbox>,
    staged: Delivery,
    /// The maximum bytes of pending responses, without the allowance of the watches.
    pending_limit: usize,
    /// The revision that is offered to watches that share its frames, how many such watches this stream has, and whether it had
    /// capacity for them.
    offer: (i64, usize, bool),
}

impl Stream {
    #[must_use]
    pub fn new(id: u64, outbox: Arc<Outbox>, opened: Duration, period: Duration, pending_limit: usize) -> Self {
        Self {
            id,
            watches: BTreeMap::new(),
            next_watch_id: 0,
            lagging: 0,
            waiting: BTreeSet::new(),
            future: BTreeSet::new(),
            opened,
            period,
            ticking: false,
            dirty: false,
            outbox,
            staged: Delivery::default(),
            pending_limit,
            offer: (0, 0, false),
        }
    }

    /// Whether there is capacity for another response, if at most `outbox_limit` bytes may be pending.
    #[must_use]
    pub fn has_capacity(&self, outbox_limit: usize) -> bool {
        self.outbox.cost() + self.staged.cost < self.limit().min(outbox_limit)
    }

    /// Counts one more watch that shares the frames of revision `main`.
    pub fn count_sharer(&mut self, main: i64, outbox_limit: usize) {
        if self.offer.0 != main {
            self.offer = (main, 0, self.has_capacity(outbox_limit));
        }
        self.offer.1 += 1;
    }

    /// The number of watches that share the frames, and whether there was capacity for them.
    #[must_use]
    pub fn sharers(&self) -> (usize, bool) {
        (self.offer.1, self.offer.2)
    }

    /// Releases what a removed watch was charged with.
    pub fn release(&mut self, slot: u32, watch: &Watch) {
        self.future.remove(&(watch.start, slot));
        self.outbox.release_watch(watch_cost(&watch.interval));
    }

    /// Releases what a watch was charged with that was not created.
    pub fn release_refused(&self, interval: &Interval) {
        self.outbox.release_watch(watch_cost(interval));
    }

    /// Whether all watches start at or below `revision`. Revisions never decrease, so each watch is examined once.
    pub fn has_begun(&mut self, revision: i64) -> bool {
        while let Some(&(start, _)) = self.future.first()
            && start <= revision
        {
            self.future.pop_first();
        }
        self.future.is_empty()
    }

    /// Appends a response, which is delivered by the next [`Stream::flush`].
    pub fn stage(&mut self, response: Response) {
        self.staged.cost += response.cost();
        self.staged.responses.push(response);
    }

    /// Counts a request as handled.
    pub fn count_handled(&mut self) {
        self.staged.handled += 1;
    }

    /// Moves the staged responses to the outbox. True if watches wait for capacity and there already is some.
    pub fn flush(&mut self, outbox_limit: usize) -> bool {
        self.dirty = false;
        let low = self.limit().min(outbox_limit) / 2;
        self.staged.notify_below = (!self.waiting.is_empty()).then_some(low);
        if self.staged.responses.is_empty() && self.staged.handled == 0 && self.waiting.is_empty() {
            return false;
        }
        self.outbox.deliver(&mut self.staged)
    }

    /// Closes the outbox, which ends the stream's task.
    pub fn close(&self) {
        self.outbox.close();
    }

    /// Returns an ID that no watch of the stream has.
    pub fn allocate_watch_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_watch_id) {
            self.next_watch_id += 1;
        }
        self.next_watch_id += 1;
        self.next_watch_id - 1
    }

    /// The time of the first tick after `now`.
    #[must_use]
    pub fn next_tick(&self, now: Duration) -> Duration {
        let period = self.period.max(Duration::from_millis(1)).as_nanos();
        let ticks = now.saturating_sub(self.opened).as_nanos() / period + 1;
        self.opened + Duration::from_nanos(u64::try_from(ticks * period).unwrap_or(u64::MAX))
    }

    fn limit(&self) -> usize {
        self.pending_limit + self.watches.len() * PENDING_BYTES_PER_WATCH
    }
}

/// Which events a watch selects, and how they are delivered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "a request has as many switches")]
pub struct WatchOptions {
    pub no_put: bool,
    pub no_delete: bool,
    /// Include the previous value of the key (`prev_kv`).
    pub previous: bool,
    /// Send progress notifications while there are no events (`progress_notify`).
    pub progress: bool,
    /// Large responses may be split (`fragment`).
    pub fragment: bool,
}

impl WatchOptions {
    /// Whether an event of this type is selected.
    #[must_use]
    pub fn includes(self, deletion: bool) -> bool {
        if deletion { !self.no_delete } else { !self.no_put }
    }
}

/// The state of a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchState {
    /// It receives events as they are published.
    Synced,
    /// It lags, and takes part in one of the next passes of catching up.
    Ready,
    /// It takes part in a pass that is running.
    Reading,
    /// It lags, and waits until its stream has capacity.
    Waiting,
}

/// One watch.
pub struct Watch {
    /// Distinguishes it from later watches in the same slot.
    pub serial: u64,
    /// The slot of its stream.
    pub stream: u32,
    pub id: i64,
    pub interval: Interval,
    pub options: WatchOptions,
    /// The start revision that the client requested.
    pub start: i64,
    /// The first revision that it needs: all events below were delivered or precede its start.
    pub from: i64,
    pub state: WatchState,
    /// Its position in the group of watches of the same keys, while it is synced.
    pub position: usize,
    /// Whether it received no event since the last tick.
    pub idle: bool,
}
