//! What the hub knows of one stream, and of one watch.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::outbox::{Delivery, Outbox, Response};
use crate::mvcc::Interval;

/// Room for one small response, granted to each watch of a stream on top of the stream's own.
const ROOM_PER_WATCH_BYTES: usize = 512;

/// What a watch costs beside its keys: itself, and its places in the lists of the hub.
const WATCH_BYTES: usize = 400;

/// What a watch of these keys is counted for.
#[must_use]
pub fn charge(interval: &Interval) -> usize {
    let keys = match interval {
        Interval::Key(key) | Interval::From(key) => key.len(),
        Interval::Range(start, end) => start.len() + end.len(),
    };
    WATCH_BYTES + keys
}

/// One client's stream.
pub struct Stream {
    /// Its name.
    pub name: u64,
    /// Its watches, by ID.
    pub watches: BTreeMap<i64, u32>,
    /// The next ID to be given away, unless a client chose it.
    pub next_id: i64,
    /// How many of its watches are not synced.
    pub lagging: usize,
    /// Watches that wait for room, by the revision that they need next.
    pub waiting: BTreeSet<(i64, u32)>,
    /// Watches that begin in the future, or did when they were made, by where they begin.
    pub future: BTreeSet<(i64, u32)>,
    /// When it was opened.
    pub opened: Duration,
    /// How often it says that nothing happened, to those who asked for it.
    pub period: Duration,
    /// Whether a tick is due.
    pub ticking: bool,
    /// Whether it is to be flushed.
    pub dirty: bool,
    outbox: Arc<Outbox>,
    staged: Delivery,
    room: usize,
    /// The revision that is being offered to watches which share its frames, how many those are here, and whether there was
    /// room for them.
    offer: (i64, usize, bool),
}

impl Stream {
    /// A stream without watches. `room` is what may wait for it, in bytes.
    #[must_use]
    pub fn new(name: u64, outbox: Arc<Outbox>, opened: Duration, period: Duration, room: usize) -> Self {
        Self {
            name,
            watches: BTreeMap::new(),
            next_id: 0,
            lagging: 0,
            waiting: BTreeSet::new(),
            future: BTreeSet::new(),
            opened,
            period,
            ticking: false,
            dirty: false,
            outbox,
            staged: Delivery::default(),
            room,
            offer: (0, 0, false),
        }
    }

    /// Whether another response can be taken, if no more than `most` may wait.
    #[must_use]
    pub fn has_room(&self, most: usize) -> bool {
        self.outbox.cost() + self.staged.cost < self.limit().min(most)
    }

    /// Counts one more watch that shares the frames of revision `main`.
    pub fn count_sharer(&mut self, main: i64, most: usize) {
        if self.offer.0 != main {
            self.offer = (main, 0, self.has_room(most));
        }
        self.offer.1 += 1;
    }

    /// How many there were, and whether there was room for them.
    #[must_use]
    pub fn sharers(&self) -> (usize, bool) {
        (self.offer.1, self.offer.2)
    }

    /// A watch is gone, and what it counted for.
    pub fn release(&mut self, slot: u32, watch: &Watch) {
        self.future.remove(&(watch.start, slot));
        self.outbox.release_watch(charge(&watch.interval));
    }

    /// A watch did not begin.
    pub fn release_refused(&self, interval: &Interval) {
        self.outbox.release_watch(charge(interval));
    }

    /// Whether all watches have begun at `revision`. It never goes back, so each watch is looked at once.
    pub fn has_begun(&mut self, revision: i64) -> bool {
        while let Some(&(start, _)) = self.future.first()
            && start <= revision
        {
            self.future.pop_first();
        }
        self.future.is_empty()
    }

    /// Puts a response behind all others. It leaves with the next [`Stream::flush`].
    pub fn stage(&mut self, response: Response) {
        self.staged.cost += response.cost();
        self.staged.responses.push(response);
    }

    /// Counts a request as handled.
    pub fn handled(&mut self) {
        self.staged.handled += 1;
    }

    /// Hands on what was staged. True if watches wait for room, and there is some already.
    pub fn flush(&mut self, most: usize) -> bool {
        self.dirty = false;
        let low = self.limit().min(most) / 2;
        self.staged.hungry_below = (!self.waiting.is_empty()).then_some(low);
        if self.staged.responses.is_empty() && self.staged.handled == 0 && self.waiting.is_empty() {
            return false;
        }
        self.outbox.deliver(&mut self.staged)
    }

    /// Ends it for its task, too.
    pub fn close(&self) {
        self.outbox.close();
    }

    /// The next automatic ID.
    pub fn take_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    /// When the tick after `now` is.
    #[must_use]
    pub fn next_tick(&self, now: Duration) -> Duration {
        let period = self.period.max(Duration::from_millis(1)).as_nanos();
        let ticks = now.saturating_sub(self.opened).as_nanos() / period + 1;
        self.opened + Duration::from_nanos(u64::try_from(ticks * period).unwrap_or(u64::MAX))
    }

    fn limit(&self) -> usize {
        self.room + self.watches.len() * ROOM_PER_WATCH_BYTES
    }
}

/// Which events a watch wants, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "a request has so many switches")]
pub struct Wishes {
    /// Leave puts out.
    pub no_put: bool,
    /// Leave deletions out.
    pub no_delete: bool,
    /// Add what was there before.
    pub previous: bool,
    /// Say now and then that nothing happened.
    pub progress: bool,
    /// Large responses may be sent in parts.
    pub fragment: bool,
}

impl Wishes {
    /// Whether an event of this kind is wanted.
    #[must_use]
    pub fn admit(self, deletion: bool) -> bool {
        if deletion { !self.no_delete } else { !self.no_put }
    }
}

/// Where a watch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It hears events as they are published.
    Synced,
    /// It is to catch up.
    Ready,
    /// It is catching up, on the historian's thread.
    Reading,
    /// It is to catch up once its stream has room.
    Waiting,
}

/// One watch.
pub struct Watch {
    /// Tells it from a later one with the same number.
    pub serial: u64,
    /// Its stream.
    pub stream: u32,
    /// Its name there.
    pub id: i64,
    /// Its keys.
    pub interval: Interval,
    /// Its client's wishes.
    pub wishes: Wishes,
    /// The revision it was asked to start from.
    pub start: i64,
    /// It needs no event below this revision: not yet, or no more.
    pub from: i64,
    /// How it gets them.
    pub standing: Standing,
    /// Its place among those who watch the same keys, while it is synced.
    pub place: usize,
    /// Whether it heard no event since the last tick.
    pub quiet: bool,
}
