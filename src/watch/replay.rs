//! Catching up: one pass over a part of the history serves many watches.
//!
//! A pass takes watches that are at different revisions, reads the history from the lowest one, and collects for each watch the
//! events that it has missed, in whole revisions: at most [`REVISIONS_MAX`] of them, or about as many bytes as the pass allows
//! for a response. A watch that has reached that limit is stopped for the rest of the pass. So is one that would need a large
//! list of frames of its own when the pass as a whole is large enough.

use bytes::Bytes;

use super::{
    frame::Framer,
    matcher::Matcher,
    outbox::{Frames, frame_cost, release_memory},
    revision::{Match, Revision},
    stream::WatchOptions,
};
use crate::{
    error::{Error, Halt},
    mvcc::{Event, Interval, Reader, history::RevisionSpan, read::ReadError},
};

/// The maximum number of revisions in a replayed response.
pub const REVISIONS_MAX: usize = 1000;
/// The approximate maximum size of a replayed response, unless a single revision is larger.
pub const RESPONSE_BYTES: usize = 1 << 20;
/// The approximate maximum size of all responses of a pass together.
const PASS_BYTES: usize = 8 << 20;
/// The number of events that are read at a time.
pub const CHUNK_EVENTS: usize = 256;
/// The approximate maximum number of events that a pass reads.
pub const PASS_EVENTS: usize = 8192;
/// The maximum number of watches in a pass.
pub const PASS_WATCHES: usize = 4096;
/// From this size on, the events of one revision are a response of their own, whose frames can be shared with other watches.
const LARGE_REVISION_BYTES: usize = 64 << 10;

/// A watch that takes part in a pass.
pub struct ReplayWatch {
    slot: u32,
    serial: u64,
    from: i64,
    options: WatchOptions,
    frames: Vec<Bytes>,
    /// The events of one large revision, instead of `frames`.
    shared: Option<Frames>,
    bytes: usize,
    revisions: usize,
    /// The revision of its newest frame.
    last: i64,
    /// The first revision that it does not get in this pass, if it is stopped.
    stopped: Option<i64>,
}

/// The result of a pass for one watch.
pub struct Replayed {
    pub slot: u32,
    pub serial: u64,
    /// The events that it has missed, if any.
    pub frames: Option<Frames>,
    /// The first revision that it still needs.
    pub next: i64,
}

/// A pass of catching up.
#[derive(Default)]
pub struct Replay {
    watches: Vec<ReplayWatch>,
    matcher: Matcher,
    bytes: usize,
    stopped: usize,
    through: i64,
    matched: Vec<u32>,
    with_previous: bool,
    response_bytes: usize,
}

impl Replay {
    /// A pass without watches, whose responses have about `response_bytes` at most.
    #[must_use]
    pub fn new(response_bytes: usize) -> Self {
        Self { response_bytes, ..Self::default() }
    }

    /// Adds a watch that needs all events from revision `from` on.
    pub fn add(&mut self, (slot, serial): (u32, u64), interval: &Interval, options: WatchOptions, from: i64) {
        let watch = u32::try_from(self.watches.len()).expect("a pass has few watches");
        self.matcher.insert(interval, watch);
        self.with_previous |= options.previous;
        self.through = if watch == 0 { from - 1 } else { self.through.min(from - 1) };
        self.watches.push(ReplayWatch {
            slot,
            serial,
            from,
            options,
            frames: Vec::new(),
            shared: None,
            bytes: 0,
            revisions: 0,
            last: 0,
            stopped: None,
        });
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.watches.is_empty()
    }

    /// The first revision that the pass has not covered.
    #[must_use]
    pub fn next(&self) -> i64 {
        self.through + 1
    }

    /// Whether any watch can get more in this pass.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        self.stopped < self.watches.len() && self.bytes < PASS_BYTES
    }

    /// Processes the next events, in whole revisions, up to `through`.
    pub fn feed(&mut self, events: &[Event], through: i64, reader: &Reader) -> Result<(), Halt> {
        for revision in events.chunk_by(|a, b| a.revision.main == b.revision.main) {
            if !self.wants_more() {
                return Ok(());
            }
            self.feed_revision(revision, reader)?;
            self.through = revision[0].revision.main;
        }
        self.through = through;
        Ok(())
    }

    fn feed_revision(&mut self, events: &[Event], reader: &Reader) -> Result<(), Halt> {
        let [event] = events else { return self.feed_many(events, reader) };
        let main = event.revision.main;
        let mut matched = std::mem::take(&mut self.matched);
        self.matcher.visit(&event.key, |group| matched.extend_from_slice(group));
        let mut framer = Framer::new(event);
        for nth in matched.drain(..) {
            let watch = &mut self.watches[nth as usize];
            if !watch.options.includes(event.deletion) || !self.accepts(nth, main) {
                continue;
            }
            let watch = &mut self.watches[nth as usize];
            let frame = framer.frame(watch.options.previous, reader)?;
            self.bytes += frame.len();
            watch.count(main, frame_cost(&frame));
            watch.frames.push(frame);
        }
        release_memory(&mut matched);
        self.matched = matched;
        Ok(())
    }

    /// Processes a revision that has several events.
    fn feed_many(&mut self, events: &[Event], reader: &Reader) -> Result<(), Halt> {
        let main = events[0].revision.main;
        let (mut revision, mut matched) = (Revision::new(events, reader), Vec::new());
        revision.matches(&self.matcher, &mut matched);
        matched.sort_unstable_by_key(|found| found.watch);
        let mut has_begun = false;
        for Match { watch: nth, events } in matched {
            let options = self.watches[nth as usize].options;
            if !revision.concerns(&events, options) || !self.accepts(nth, main) {
                continue;
            }
            let watch = &mut self.watches[nth as usize];
            let is_whole = revision.is_whole(&events, options)?;
            if has_begun && !is_whole && self.bytes >= PASS_BYTES {
                self.stopped += 1;
                watch.stopped = Some(main);
                continue;
            }
            let frames = revision.frames(&events, options)?;
            let cost = frames.cost();
            if cost < LARGE_REVISION_BYTES {
                watch.frames.extend_from_slice(frames.as_slice());
            } else if watch.frames.is_empty() {
                watch.shared = Some(frames);
            } else {
                self.stopped += 1;
                watch.stopped = Some(main);
                continue;
            }
            watch.count(main, cost);
            // The list of all frames exists once, however many watches share it.
            self.bytes += if is_whole && has_begun { 0 } else { cost };
            has_begun = true;
        }
        Ok(())
    }

    /// Whether a watch may get a revision in this pass. If it has too much already, it is stopped here.
    fn accepts(&mut self, nth: u32, main: i64) -> bool {
        let response_bytes = self.response_bytes;
        let watch = &mut self.watches[nth as usize];
        if main < watch.from || watch.stopped.is_some() {
            return false;
        }
        let is_full = watch.is_full(response_bytes);
        if is_full {
            watch.stopped = Some(main);
            self.stopped += 1;
        }
        !is_full
    }

    #[must_use]
    pub fn finish(self) -> Vec<Replayed> {
        let next = self.next();
        let watches = self.watches.into_iter();
        watches.map(|watch| watch.finish(next)).collect()
    }
}

impl ReplayWatch {
    /// Whether it has reached the limit of a response.
    fn is_full(&self, response_bytes: usize) -> bool {
        self.shared.is_some() || self.revisions >= REVISIONS_MAX || self.bytes >= response_bytes
    }

    /// Counts frames of a revision that were added.
    fn count(&mut self, main: i64, cost: usize) {
        self.revisions += usize::from(self.last != main);
        self.last = main;
        self.bytes += cost;
    }

    fn finish(mut self, next: i64) -> Replayed {
        let next = self.stopped.unwrap_or(next).max(self.from);
        let frames = self.shared.or_else(|| match self.frames.len() {
            0 => None,
            1 => self.frames.pop().map(Frames::One),
            _ => Some(Frames::Many(self.frames)),
        });
        Replayed { slot: self.slot, serial: self.serial, frames, next }
    }
}

/// A pass over the history table. It runs on its own thread, because it waits for the disk.
pub struct Job {
    replay: Replay,
    reader: Reader,
    to: i64,
}

impl Job {
    /// A job that reads the history up to revision `to`.
    #[must_use]
    pub fn new(replay: Replay, reader: Reader, to: i64) -> Self {
        Self { replay, reader, to }
    }

    /// Runs the job. If a compaction interferes, it ends early with what it has read.
    pub fn run(self) -> Result<Vec<Replayed>, Halt> {
        let Self { mut replay, reader, to } = self;
        let mut seen = 0;
        while seen < PASS_EVENTS && replay.next() <= to && replay.wants_more() {
            let span = RevisionSpan { from: replay.next(), to, with_previous: replay.with_previous };
            match reader.history(span, CHUNK_EVENTS) {
                Ok(chunk) => {
                    seen += chunk.events.len();
                    replay.feed(&chunk.events, chunk.through, &reader)?;
                }
                Err(ReadError::Refused(error)) => {
                    assert_eq!(error, Error::Compacted, "a read of this span fails only if it is compacted");
                    break;
                }
                Err(ReadError::Halt(halt)) => return Err(halt),
            }
        }
        Ok(replay.finish())
    }
}
