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
    outbox::{Events, Frames, Outbox, Response},
    replay::{CHUNK_EVENTS, Job, Replayed},
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
    /// Room to work in: watches and which event matches them.
    matched: Vec<(u32, u32)>,
}

impl HubCore {
    /// A hub that begins at the published head.
    #[must_use]
    pub fn new(reader: Reader, ring: Arc<Mutex<Ring>>, settings: Settings, gauges: Gauges) -> Self {
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
            matched: Vec::new(),
        }
    }

    /// One step at time `now`. The inputs came before it: whoever sent one has seen no later head than this step will.
    pub fn step(&mut self, now: Duration, inputs: &mut Vec<Input>) -> Result<Turn, Halt> {
        self.now = self.now.max(now);
        self.deliver()?;
        for input in inputs.drain(..) {
            self.hear(input);
        }
        self.tick();
        let job = self.catch_up()?;
        self.flush();
        let until = self.timers.peek().map(|Reverse((at, _))| *at);
        Ok(Turn { job, busy: self.can_catch_up(), until })
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

    /// Offers the events of one revision to those who watch their keys.
    fn offer(&mut self, events: &[Event]) -> Result<(), Halt> {
        let mut matched = std::mem::take(&mut self.matched);
        for (nth, event) in (0..).zip(events) {
            self.interest.visit(&event.key, &mut |group| matched.extend(group.iter().map(|&watch| (watch, nth))));
        }
        if let [event] = events {
            let mut framer = Framer::new(event);
            for &(watch, _) in &matched {
                self.offer_one(watch, &mut framer)?;
            }
        } else if !matched.is_empty() {
            // By watch, and each watch's events in order.
            matched.sort_unstable();
            let mut framers: Vec<Framer<'_>> = events.iter().map(Framer::new).collect();
            for run in matched.chunk_by(|a, b| a.0 == b.0) {
                self.offer_run(run, &mut framers)?;
            }
        }
        matched.clear();
        self.matched = matched;
        Ok(())
    }

    fn offer_one(&mut self, slot: u32, framer: &mut Framer<'_>) -> Result<(), Halt> {
        let main = framer.event().revision.main;
        let watch = &self.watches[slot];
        if main < watch.from || !watch.wishes.admit(framer.event().deletion) {
            return Ok(());
        }
        if !self.streams[watch.stream].has_room() {
            self.fall_behind(slot, main);
            return Ok(());
        }
        let frame = framer.frame(watch.wishes.previous, &self.reader)?;
        self.stage_events(slot, main, Frames::One(frame));
        Ok(())
    }

    fn offer_run(&mut self, run: &[(u32, u32)], framers: &mut [Framer<'_>]) -> Result<(), Halt> {
        let slot = run[0].0;
        let watch = &self.watches[slot];
        let main = framers[0].event().revision.main;
        let wanted = |nth: u32, framers: &[Framer<'_>]| watch.wishes.admit(framers[nth as usize].event().deletion);
        if main < watch.from || !run.iter().any(|&(_, nth)| wanted(nth, framers)) {
            return Ok(());
        }
        if !self.streams[watch.stream].has_room() {
            self.fall_behind(slot, main);
            return Ok(());
        }
        let mut wanted_frames = Vec::with_capacity(run.len());
        for &(_, nth) in run {
            if wanted(nth, framers) {
                wanted_frames.push(framers[nth as usize].frame(watch.wishes.previous, &self.reader)?);
            }
        }
        self.stage_events(slot, main, Frames::Many(wanted_frames));
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
            if self.streams.get(slot).is_some() && self.streams[slot].flush() {
                self.make_ready(slot);
            }
        }
        self.dirty = dirty;
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
            Standing::Waiting => _ = stream.waiting.insert(slot),
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
            Standing::Waiting => assert!(stream.waiting.remove(&slot), "its stream knows that it waits"),
            Standing::Reading => (),
        }
        stream.lagging -= 1;
        self.gauges.lagging.dec();
    }
}
