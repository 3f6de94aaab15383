//! The hub: delivers published events to watch streams.
//!
//! The hub is a value with one operation, a step: read the published head, deliver everything up to it, then handle the inputs
//! that were sent before the head was read, let some watches catch up, and move all staged responses to the outboxes. Each of
//! these actions happens at one revision, so most guarantees of the protocol follow from their order: a watch starts after what
//! was delivered, a progress notification follows every event that it covers, and a response follows the responses to earlier
//! requests.
//!
//! INVARIANTS
//! * Every event up to `delivered` was offered to every watch that was synced at that time.
//! * A synced watch needs no event at or below `delivered`; a watch that is not synced does.
//! * `ready` contains exactly the watches in [`WatchState::Ready`], by the revision that they need next.
//! * While the total of all outboxes is at its limit, only streams whose own outbox holds less than a fair share have capacity.
//! * The cost of a revision is proportional to its events plus the watches that they concern, not to the product of both.
//!   The watches of a closed stream are removed in portions.

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
    matcher::Matcher,
    outbox::{Backlog, Events, Frames, Outbox, Response, release_memory},
    replay::{CHUNK_EVENTS, Job, RESPONSE_BYTES, Replayed},
    revision::{Match, Revision},
    ring::Ring,
    slab::Slab,
    stream::{Stream, Watch, WatchOptions, WatchState},
};
use crate::{
    error::{Error, Halt},
    mvcc::{
        Event, Interval, Reader,
        history::{Chunk, RevisionSpan},
        read::ReadError,
    },
};

/// The maximum number of watches of closed streams that one step removes, so that deliveries to other streams are not delayed.
const REMOVALS_PER_STEP: usize = 1024;
/// The lower limit of [`HubCore::response_bytes`], however many streams there are.
const MIN_RESPONSE_BYTES: usize = 16 << 10;

/// A request of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Create a watch.
    Create(Create),
    /// Respond, after the responses to earlier requests, that a watch was not created, for this reason.
    Refuse(Cow<'static, str>),
    /// Cancel the watch with this ID.
    Cancel(i64),
    /// Send a progress notification for the whole stream.
    Progress,
}

/// A watch to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// The watch ID; with zero, the hub chooses one.
    pub id: i64,
    /// The watched keys; must not be an empty range.
    pub interval: Interval,
    /// The first revision to deliver; zero for the next one.
    pub start: i64,
    pub options: WatchOptions,
}

/// An input of the hub.
pub enum Input {
    /// A stream was opened.
    Open {
        /// The ID of the stream, as in all other inputs.
        stream: u64,
        /// Receives the responses.
        outbox: Arc<Outbox>,
        /// The interval of progress notifications.
        period: Duration,
    },
    /// A stream sent a request.
    Request { stream: u64, request: Request },
    /// The outbox of a stream has capacity again, which some of its watches waited for.
    HasCapacity { stream: u64 },
    /// A stream was closed.
    Close { stream: u64 },
    /// The results of a [`Job`].
    Replayed(Vec<Replayed>),
    /// Call this with the lowest revision that a watch needs which is not synced; None if there is no such watch.
    OldestNeeded(Box<dyn FnOnce(Option<i64>) + Send>),
    /// The key space was replaced by a later state of it.
    Restored(Reader),
}

/// The result of a step.
#[derive(Default)]
pub struct StepResult {
    /// A job to be run outside the step, because it reads the disk. Its results have to be passed to a later step as an input.
    pub job: Option<Job>,
    /// The next step must be taken without waiting.
    pub busy: bool,
    /// The next step must be taken at this time at the latest.
    pub until: Option<Duration>,
}

/// The state of the hub.
pub struct HubCore {
    pub(super) reader: Reader,
    pub(super) ring: Arc<Mutex<Ring>>,
    pub(super) settings: Settings,
    pub(super) gauges: Gauges,
    pub(super) now: Duration,
    pub(super) delivered: i64,
    pub(super) streams: Slab<Stream>,
    /// The slot of each open stream, by the stream's ID.
    pub(super) slots_by_id: HashMap<u64, u32>,
    pub(super) watches: Slab<Watch>,
    /// The number of watches created so far.
    pub(super) created_watches: u64,
    /// The synced watches.
    pub(super) matcher: Matcher,
    pub(super) ready: BTreeSet<(i64, u32)>,
    /// Whether a job is running whose results have not arrived.
    pub(super) job_running: bool,
    pub(super) timers: BinaryHeap<Reverse<(Duration, u64)>>,
    /// Streams that have to be flushed.
    pub(super) dirty: Vec<u32>,
    /// Streams that were closed and are not removed yet.
    pub(super) closed_streams: Vec<u32>,
    /// The total of all outboxes.
    backlog: Arc<Backlog>,
    /// The maximum bytes in one outbox, if that is less than the stream's own limit.
    pub(super) outbox_limit: usize,
    /// A buffer that is reused: the watches that match an event.
    matched: Vec<u32>,
}

impl HubCore {
    /// Creates a hub that starts at the published head.
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
            streams: Slab::default(),
            slots_by_id: HashMap::new(),
            watches: Slab::default(),
            created_watches: 0,
            matcher: Matcher::default(),
            ready: BTreeSet::new(),
            job_running: false,
            timers: BinaryHeap::new(),
            dirty: Vec::new(),
            closed_streams: Vec::new(),
            backlog,
            outbox_limit: usize::MAX,
            matched: Vec::new(),
        }
    }

    /// Takes a step at time `now`. The inputs must have been sent before, so that their senders cannot have seen a later head
    /// than the one that this step reads.
    pub fn step(&mut self, now: Duration, inputs: &mut Vec<Input>) -> Result<StepResult, Halt> {
        self.now = self.now.max(now);
        self.update_outbox_limit();
        self.deliver()?;
        for input in inputs.drain(..) {
            self.handle_input(input);
        }
        release_memory(inputs);
        self.tick();
        self.remove_closed_streams();
        let job = self.catch_up()?;
        self.flush();
        let until = self.timers.peek().map(|Reverse((at, _))| *at);
        let busy = self.can_catch_up() || !self.closed_streams.is_empty();
        Ok(StepResult { job, busy, until })
    }

    /// Removes some watches of closed streams, and each stream after its last watch.
    fn remove_closed_streams(&mut self) {
        for _ in 0..REMOVALS_PER_STEP {
            let Some(&slot) = self.closed_streams.last() else { return };
            if let Some((_, watch)) = self.streams[slot].watches.pop_first() {
                self.remove(watch);
            } else {
                self.closed_streams.pop();
                self.streams.remove(slot);
                self.gauges.streams.dec();
            }
        }
    }

    /// Updates `outbox_limit` from the total of all outboxes.
    fn update_outbox_limit(&mut self) {
        let is_scarce = self.backlog.bytes() >= self.settings.all_pending_bytes;
        self.outbox_limit = if is_scarce { self.fair_share() } else { usize::MAX };
    }

    fn fair_share(&self) -> usize {
        (self.settings.all_pending_bytes / self.streams.len().max(1)).max(1)
    }

    /// The approximate size of a replayed response, unless a single revision is larger. If every stream had one such response
    /// pending, the total would be within its limit.
    pub(super) fn response_bytes(&self) -> usize {
        self.fair_share().clamp(MIN_RESPONSE_BYTES, RESPONSE_BYTES)
    }

    /// Whether a stream has capacity for another response.
    pub(super) fn has_capacity(&self, stream: u32) -> bool {
        self.streams[stream].has_capacity(self.outbox_limit)
    }

    /// Whether there are synced watches. If not, nothing needs to be delivered.
    #[must_use]
    pub fn has_synced_watches(&self) -> bool {
        !self.matcher.is_empty()
    }

    /// Whether the published head has advanced since the last step.
    #[must_use]
    pub fn has_undelivered(&self) -> bool {
        self.reader.head() > self.delivered
    }

    /// Ends all streams, including those that are opened by the last inputs.
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
        while self.delivered < head && self.has_synced_watches() {
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

    /// The next events to deliver: from the ring, or from the history table if the hub was so slow that they are no longer in
    /// the ring. None if they were compacted, too.
    fn next_chunk(&self, head: i64) -> Result<Option<Chunk>, Halt> {
        let from = self.delivered + 1;
        if let Some(chunk) = self.ring.lock().read(from, head, CHUNK_EVENTS) {
            return Ok(Some(chunk));
        }
        match self.reader.history(RevisionSpan { from, to: head, with_previous: true }, CHUNK_EVENTS) {
            Ok(chunk) => Ok(Some(chunk)),
            Err(ReadError::Refused(error)) => {
                assert_eq!(error, Error::Compacted, "a read of this span fails only if it is compacted");
                Ok(None)
            }
            Err(ReadError::Halt(halt)) => Err(halt),
        }
    }

    /// Offers the events of one revision to the watches that match their keys.
    fn offer(&mut self, events: &[Event]) -> Result<(), Halt> {
        let [event] = events else { return self.offer_many(events) };
        let mut matched = std::mem::take(&mut self.matched);
        self.matcher.visit(&event.key, |group| matched.extend_from_slice(group));
        let mut framer = Framer::new(event);
        for watch in matched.drain(..) {
            self.offer_one(watch, &mut framer)?;
        }
        release_memory(&mut matched);
        self.matched = matched;
        Ok(())
    }

    fn offer_one(&mut self, slot: u32, framer: &mut Framer<'_>) -> Result<(), Halt> {
        let main = framer.event().revision.main;
        let watch = &self.watches[slot];
        if main < watch.from || !watch.options.includes(framer.event().deletion) {
            return Ok(());
        }
        if !self.has_capacity(watch.stream) {
            self.fall_behind(slot, main);
            return Ok(());
        }
        let frame = framer.frame(watch.options.previous, &self.reader)?;
        self.stage_events(slot, main, Frames::One(frame));
        Ok(())
    }

    /// Offers the events of a revision that has several. All watches of a stream that share the list of all frames receive it,
    /// or all of them fall behind: the list is charged to the stream once.
    fn offer_many(&mut self, events: &[Event]) -> Result<(), Halt> {
        let (main, reader) = (events[0].revision.main, self.reader.clone());
        let mut revision = Revision::new(events, &reader);
        let mut matched = Vec::new();
        revision.matches(&self.matcher, &mut matched);
        matched.retain(|found| {
            let watch = &self.watches[found.watch];
            main >= watch.from && revision.concerns(&found.events, watch.options)
        });
        matched.sort_unstable_by_key(|found| found.watch);
        for found in &matched {
            let watch = &self.watches[found.watch];
            if revision.is_whole(&found.events, watch.options)? {
                self.streams[watch.stream].count_sharer(main, self.outbox_limit);
            }
        }
        for Match { watch: slot, events } in matched {
            let Watch { stream, options, .. } = self.watches[slot];
            let sharers = revision.is_whole(&events, options)?.then(|| self.streams[stream].sharers());
            let has_capacity = sharers.map_or_else(|| self.has_capacity(stream), |(_, has_capacity)| has_capacity);
            if !has_capacity {
                self.fall_behind(slot, main);
                continue;
            }
            let mut frames = revision.frames(&events, options)?;
            if let (Frames::Shared { cost, .. }, Some((count, _))) = (&mut frames, sharers) {
                *cost = cost.div_ceil(count);
            }
            self.stage_events(slot, main, frames);
        }
        Ok(())
    }

    /// Stages events for a watch. Its stream must have capacity.
    pub(super) fn stage_events(&mut self, slot: u32, revision: i64, frames: Frames) {
        let watch = &mut self.watches[slot];
        watch.idle = false;
        let events = Events { watch: watch.id, revision, fragment: watch.options.fragment, frames };
        let stream = watch.stream;
        self.stage(stream, Response::Events(events));
    }

    /// Stages a response for a stream.
    pub(super) fn stage(&mut self, stream: u32, response: Response) {
        self.streams[stream].stage(response);
        self.mark_dirty(stream);
    }

    /// Marks a stream to be flushed.
    pub(super) fn mark_dirty(&mut self, stream: u32) {
        if !std::mem::replace(&mut self.streams[stream].dirty, true) {
            self.dirty.push(stream);
        }
    }

    /// Moves all staged responses to the outboxes.
    fn flush(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for slot in dirty.drain(..) {
            // The stream may have been removed since it was marked.
            if self.streams.get(slot).is_some() && self.streams[slot].flush(self.outbox_limit) {
                self.make_ready(slot);
            }
        }
        release_memory(&mut dirty);
        assert!(self.dirty.is_empty(), "making watches ready stages nothing");
        self.dirty = dirty;
        self.update_outbox_limit();
    }

    /// Changes the state of a watch; `from` is the revision that it needs next.
    pub(super) fn set_state(&mut self, slot: u32, from: i64, state: WatchState) {
        self.leave_state(slot);
        let watch = &mut self.watches[slot];
        watch.from = from;
        watch.state = state;
        let stream = &mut self.streams[watch.stream];
        match state {
            WatchState::Synced => watch.position = self.matcher.insert(&watch.interval, slot),
            WatchState::Ready => _ = self.ready.insert((from, slot)),
            WatchState::Waiting => _ = stream.waiting.insert((from, slot)),
            WatchState::Reading => (),
        }
        if state != WatchState::Synced {
            stream.lagging += 1;
            self.gauges.lagging.inc();
        }
        if state == WatchState::Waiting {
            let stream = watch.stream;
            self.mark_dirty(stream); // The flush tells the outbox to notify the hub when there is capacity.
        }
    }

    /// Removes a watch from the list of its state. Callers must set another state, or remove the watch.
    pub(super) fn leave_state(&mut self, slot: u32) {
        let watch = &self.watches[slot];
        let stream = &mut self.streams[watch.stream];
        match watch.state {
            WatchState::Synced => {
                let position = watch.position;
                if let Some(moved) = self.matcher.remove(&watch.interval, position) {
                    self.watches[moved].position = position;
                }
                return;
            }
            WatchState::Ready => assert!(self.ready.remove(&(watch.from, slot)), "a ready watch is listed as ready"),
            WatchState::Waiting => {
                assert!(stream.waiting.remove(&(watch.from, slot)), "a waiting watch is listed by its stream");
            }
            WatchState::Reading => (),
        }
        stream.lagging -= 1;
        self.gauges.lagging.dec();
    }
}
