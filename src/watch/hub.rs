//! The hub: takes what was published to those who watch it.
//!
//! A value with one step: look how far the published head is, deliver everything up to it, then hear the inputs that came
//! before the look, let some watches catch up, and hand all responses on. Everything happens at one revision at a time, so
//! most promises of the protocol hold by the order of these lines: a watch begins behind what was delivered, a progress
//! notice stands behind every event that it covers, and an answer stands behind the answers to earlier requests.
//!
//! INVARIANTS
//! * Every event up to `delivered` was offered to every watch that was synced when its turn came.
//! * A synced watch needs nothing at or below `delivered`; one that is not needs something there.
//! * `ready` holds exactly the watches that stand [`Standing::Ready`], by the revision that they need next.
//! * While all outboxes together hold as much as they may, only a stream whose own holds less than a fair share has room.
//! * A revision costs in proportion to its events plus the watches that they concern, and not to the product of both. What a
//!   stream with very many watches leaves behind is removed in portions.

use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    Gauges, Settings,
    frame::Framer,
    interest::Interest,
    outbox::{Backlog, Events, Frames, Outbox, Response, give_back},
    replay::{CHUNK_EVENTS, Job, RESPONSE_BYTES, Replayed},
    revision::{Match, Revision},
    ring::Ring,
    slots::Slots,
    stream::{Standing, Stream, Watch, Wishes},
};
use crate::{
    error::{Error, Halt},
    mvcc::{
        Event, Interval, Reader,
        history::{Chunk, Span},
        read::Failure,
    },
};

/// Watches of streams that are gone are removed in portions of this size; in between, others hear what they wait for.
const REMOVALS: usize = 1024;
/// However many streams there are, replayed responses are not smaller than this.
const LEAST_RESPONSE_BYTES: usize = 16 << 10;

/// What a stream asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Begin a watch.
    Create(Create),
    /// Say, in its turn, that a watch has not begun.
    Refuse(Cow<'static, str>),
    /// End a watch.
    Cancel(i64),
    /// Say how far everything has been said.
    Progress,
}

/// A watch to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// Its name; zero leaves it to the hub.
    pub id: i64,
    /// Its keys; not an empty range.
    pub interval: Interval,
    /// The first revision to hear of; zero for what comes next.
    pub start: i64,
    /// How it wants to hear.
    pub wishes: Wishes,
}

/// What the hub hears.
pub enum Input {
    /// A stream was opened.
    Open {
        /// Its name.
        stream: u64,
        /// Where its responses go.
        outbox: Arc<Outbox>,
        /// How often it says that nothing happened.
        period: Duration,
    },
    /// A stream asks for something.
    Request {
        /// Its name.
        stream: u64,
        /// What.
        request: Request,
    },
    /// A stream that watches waited for has room.
    Room {
        /// Its name.
        stream: u64,
    },
    /// A stream was closed.
    Close {
        /// Its name.
        stream: u64,
    },
    /// A [`Job`] is done.
    Replayed(Vec<Replayed>),
    /// The whole key space was replaced by a later state of itself.
    Restored(Reader),
}

/// What a step came to.
#[derive(Default)]
pub struct Turn {
    /// Something to be done elsewhere; the result is an input.
    pub job: Option<Job>,
    /// Take the next step at once.
    pub busy: bool,
    /// Take the next step no later than this.
    pub until: Option<Duration>,
}

/// The hub.
pub struct HubCore {
    pub(super) reader: Reader,
    pub(super) ring: Arc<Mutex<Ring>>,
    pub(super) settings: Settings,
    pub(super) gauges: Gauges,
    pub(super) now: Duration,
    pub(super) delivered: i64,
    pub(super) streams: Slots<Stream>,
    pub(super) names: HashMap<u64, u32>,
    pub(super) watches: Slots<Watch>,
    /// Watches ever made.
    pub(super) made: u64,
    pub(super) interest: Interest,
    pub(super) ready: BTreeSet<(i64, u32)>,
    /// Whether a job is under way.
    pub(super) reading: bool,
    pub(super) timers: BinaryHeap<Reverse<(Duration, u64)>>,
    /// Streams with something staged.
    pub(super) dirty: Vec<u32>,
    /// Streams that were closed, and still have watches.
    pub(super) leaving: Vec<u32>,
    /// What lies in all outboxes.
    backlog: Arc<Backlog>,
    /// What may lie in one outbox, if it is less than the stream's own limit.
    pub(super) most: usize,
    /// Room to work in: the watches that an event concerns.
    matched: Vec<u32>,
}

impl HubCore {
    /// A hub that begins at the published head.
    #[must_use]
    pub fn new(
        reader: Reader,
        ring: Arc<Mutex<Ring>>,
        backlog: Arc<Backlog>,
        settings: Settings,
        gauges: Gauges,
    ) -> Self {
        Self {
            delivered: reader.head(),
            reader,
            ring,
            settings,
            gauges,
            now: Duration::ZERO,
            streams: Slots::default(),
            names: HashMap::new(),
            watches: Slots::default(),
            made: 0,
            interest: Interest::default(),
            ready: BTreeSet::new(),
            reading: false,
            timers: BinaryHeap::new(),
            dirty: Vec::new(),
            leaving: Vec::new(),
            backlog,
            most: usize::MAX,
            matched: Vec::new(),
        }
    }

    /// One step at time `now`. The inputs came before it: whoever sent one has seen no later head than this step will.
    pub fn step(&mut self, now: Duration, inputs: &mut Vec<Input>) -> Result<Turn, Halt> {
        self.now = self.now.max(now);
        self.share_backlog();
        self.deliver()?;
        for input in inputs.drain(..) {
            self.hear(input);
        }
        give_back(inputs);
        self.tick();
        self.remove_leaving();
        let job = self.catch_up()?;
        self.flush();
        let until = self.timers.peek().map(|Reverse((at, _))| *at);
        let busy = self.can_catch_up() || !self.leaving.is_empty();
        Ok(Turn { job, busy, until })
    }

    /// Removes some watches of streams that are gone, and each stream with its last watch.
    fn remove_leaving(&mut self) {
        for _ in 0..REMOVALS {
            let Some(&slot) = self.leaving.last() else { return };
            if let Some((_, watch)) = self.streams[slot].watches.pop_first() {
                self.remove(watch);
            } else {
                self.leaving.pop();
                self.streams.remove(slot);
                self.gauges.streams.dec();
            }
        }
    }

    /// Finds out how much may lie in one outbox.
    fn share_backlog(&mut self) {
        let is_scarce = self.backlog.bytes() >= self.settings.all_pending_bytes;
        self.most = if is_scarce { self.fair_share() } else { usize::MAX };
    }

    fn fair_share(&self) -> usize {
        (self.settings.all_pending_bytes / self.streams.len().max(1)).max(1)
    }

    /// How large a replayed response is, about, unless a single revision is larger. If all streams had one of these
    /// waiting, it would not be too much.
    pub(super) fn response_bytes(&self) -> usize {
        self.fair_share().clamp(LEAST_RESPONSE_BYTES, RESPONSE_BYTES)
    }

    /// Whether another response can be taken for a stream.
    pub(super) fn has_room(&self, stream: u32) -> bool {
        self.streams[stream].has_room(self.most)
    }

    /// Whether anybody wants to hear of what is published.
    #[must_use]
    pub fn listens(&self) -> bool {
        !self.interest.is_empty()
    }

    /// Whether something was published since the last step.
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.reader.head() > self.delivered
    }

    /// Ends all streams, those included that are among the last inputs.
    pub fn stop(&mut self, inputs: &mut Vec<Input>) {
        for input in inputs.drain(..) {
            if let Input::Open { outbox, .. } = input {
                outbox.close();
            }
        }
        for (_, stream) in self.streams.iter() {
            stream.close();
        }
    }

    /// Delivers everything up to the published head.
    fn deliver(&mut self) -> Result<(), Halt> {
        let head = self.reader.head();
        while self.delivered < head && self.listens() {
            let Some(chunk) = self.next_chunk(head)? else {
                self.fall_behind_all(self.delivered + 1, head);
                break;
            };
            for revision in chunk.events.chunk_by(|a, b| a.revision.main == b.revision.main) {
                self.offer(revision)?;
            }
            self.delivered = chunk.through;
            self.flush();
        }
        self.delivered = head;
        Ok(())
    }

    /// The next events to deliver: from the ring; from the history, if the hub was so slow that the ring lost them; None if
    /// compaction has overtaken it even there.
    fn next_chunk(&self, head: i64) -> Result<Option<Chunk>, Halt> {
        let from = self.delivered + 1;
        if let Some(chunk) = self.ring.lock().read(from, head, CHUNK_EVENTS) {
            return Ok(Some(chunk));
        }
        match self.reader.history(Span { from, to: head, with_previous: true }, CHUNK_EVENTS) {
            Ok(chunk) => Ok(Some(chunk)),
            Err(Failure::Refused(error)) => {
                assert_eq!(error, Error::Compacted, "nothing else is wrong with the span");
                Ok(None)
            }
            Err(Failure::Halted(halt)) => Err(halt),
        }
    }

    /// Offers the events of one revision to the watches of their keys.
    fn offer(&mut self, events: &[Event]) -> Result<(), Halt> {
        let [event] = events else { return self.offer_many(events) };
        let mut matched = std::mem::take(&mut self.matched);
        self.interest.visit(&event.key, |group| matched.extend_from_slice(group));
        let mut framer = Framer::new(event);
        for watch in matched.drain(..) {
            self.offer_one(watch, &mut framer)?;
        }
        give_back(&mut matched);
        self.matched = matched;
        Ok(())
    }

    fn offer_one(&mut self, slot: u32, framer: &mut Framer<'_>) -> Result<(), Halt> {
        let main = framer.event().revision.main;
        let watch = &self.watches[slot];
        if main < watch.from || !watch.wishes.admit(framer.event().deletion) {
            return Ok(());
        }
        if !self.has_room(watch.stream) {
            self.fall_behind(slot, main);
            return Ok(());
        }
        let frame = framer.frame(watch.wishes.previous, &self.reader)?;
        self.stage_events(slot, main, Frames::One(frame));
        Ok(())
    }

    /// Offers the events of a revision that has several. The watches of a stream that share the list of all frames are taken
    /// together, or fall behind together: the list counts once for them.
    fn offer_many(&mut self, events: &[Event]) -> Result<(), Halt> {
        let (main, reader) = (events[0].revision.main, self.reader.clone());
        let mut revision = Revision::new(events, &reader);
        let mut matched = Vec::new();
        revision.matches(&self.interest, &mut matched);
        matched.retain(|found| {
            let watch = &self.watches[found.watch];
            main >= watch.from && revision.concerns(&found.events, watch.wishes)
        });
        matched.sort_unstable_by_key(|found| found.watch);
        for found in &matched {
            let watch = &self.watches[found.watch];
            if revision.is_whole(&found.events, watch.wishes)? {
                self.streams[watch.stream].count_sharer(main, self.most);
            }
        }
        for Match { watch: slot, events } in matched {
            let Watch { stream, wishes, .. } = self.watches[slot];
            let sharers = revision.is_whole(&events, wishes)?.then(|| self.streams[stream].sharers());
            let has_room = sharers.map_or_else(|| self.has_room(stream), |(_, has_room)| has_room);
            if !has_room {
                self.fall_behind(slot, main);
                continue;
            }
            let mut frames = revision.frames(&events, wishes)?;
            if let (Frames::Shared { cost, .. }, Some((count, _))) = (&mut frames, sharers) {
                *cost = cost.div_ceil(count);
            }
            self.stage_events(slot, main, frames);
        }
        Ok(())
    }

    /// Puts events for a watch into its stream, which has room.
    pub(super) fn stage_events(&mut self, slot: u32, revision: i64, frames: Frames) {
        let watch = &mut self.watches[slot];
        watch.quiet = false;
        let events = Events { watch: watch.id, revision, fragment: watch.wishes.fragment, frames };
        let stream = watch.stream;
        self.stage(stream, Response::Events(events));
    }

    /// Puts a response into a stream.
    pub(super) fn stage(&mut self, stream: u32, response: Response) {
        self.streams[stream].stage(response);
        self.mark_dirty(stream);
    }

    /// Notes that a stream has to be flushed.
    pub(super) fn mark_dirty(&mut self, stream: u32) {
        if !std::mem::replace(&mut self.streams[stream].dirty, true) {
            self.dirty.push(stream);
        }
    }

    /// Hands on all that is staged.
    fn flush(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for slot in dirty.drain(..) {
            // A stream may have been closed since.
            if self.streams.get(slot).is_some() && self.streams[slot].flush(self.most) {
                self.make_ready(slot);
            }
        }
        give_back(&mut dirty);
        assert!(self.dirty.is_empty(), "what becomes ready stages nothing");
        self.dirty = dirty;
        self.share_backlog();
    }

    /// Moves a watch to another standing, needing `from` next.
    pub(super) fn stand(&mut self, slot: u32, from: i64, standing: Standing) {
        self.leave_standing(slot);
        let watch = &mut self.watches[slot];
        watch.from = from;
        watch.standing = standing;
        let stream = &mut self.streams[watch.stream];
        match standing {
            Standing::Synced => watch.place = self.interest.insert(&watch.interval, slot),
            Standing::Ready => _ = self.ready.insert((from, slot)),
            Standing::Waiting => _ = stream.waiting.insert((from, slot)),
            Standing::Reading => (),
        }
        if standing != Standing::Synced {
            stream.lagging += 1;
            self.gauges.lagging.inc();
        }
        if standing == Standing::Waiting {
            let stream = watch.stream;
            self.mark_dirty(stream); // So that its task learns that it is waited for.
        }
    }

    /// Takes a watch out of wherever it stands. It must be put somewhere else, or removed.
    pub(super) fn leave_standing(&mut self, slot: u32) {
        let watch = &self.watches[slot];
        let stream = &mut self.streams[watch.stream];
        match watch.standing {
            Standing::Synced => {
                let place = watch.place;
                if let Some(moved) = self.interest.remove(&watch.interval, place) {
                    self.watches[moved].place = place;
                }
                return;
            }
            Standing::Ready => assert!(self.ready.remove(&(watch.from, slot)), "a ready watch is among the ready"),
            Standing::Waiting => assert!(stream.waiting.remove(&(watch.from, slot)), "its stream knows that it waits"),
            Standing::Reading => (),
        }
        stream.lagging -= 1;
        self.gauges.lagging.dec();
    }
}
