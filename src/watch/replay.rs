//! Catching up: many watches at once, in one pass over a piece of history.
//!
//! A pass takes watches that stand at different revisions, goes through history from the lowest one, and gives each watch
//! what it has missed, in whole revisions: at most [`REVISIONS_MAX`] of them, or about as many bytes as the pass was given for
//! a response. A watch that has got that much sits out the rest of the pass. So does one that would have to keep a large list of
//! frames of its own when the pass has grown large enough.

use bytes::Bytes;

use super::{
    frame::Framer,
    interest::Interest,
    outbox::{Frames, frame_cost, give_back},
    revision::{Match, Revision},
    stream::Wishes,
};
use crate::{
    error::{Error, Halt},
    mvcc::{Event, Interval, Reader, history::Span, read::Failure},
};

/// A replayed response holds no more distinct revisions than this.
pub const REVISIONS_MAX: usize = 1000;
/// A replayed response is not much larger than this, unless one revision is.
pub const RESPONSE_BYTES: usize = 1 << 20;
/// All responses of a pass together are not much larger than this.
const PASS_BYTES: usize = 8 << 20;
/// Events are read in chunks of this size.
pub const CHUNK_EVENTS: usize = 256;
/// A pass goes over no more events than about this.
pub const PASS_EVENTS: usize = 8192;
/// A pass takes no more watches than this.
pub const PASS_WATCHES: usize = 4096;
/// So many bytes of one revision make a response of their own, whose frames can be shared.
const LARGE_REVISION_BYTES: usize = 64 << 10;

/// A watch that catches up.
pub struct Member {
    slot: u32,
    serial: u64,
    from: i64,
    wishes: Wishes,
    frames: Vec<Bytes>,
    /// One large revision, instead of `frames`.
    shared: Option<Frames>,
    bytes: usize,
    revisions: usize,
    /// The revision of its newest frame.
    last: i64,
    /// Where it sits out.
    stopped: Option<i64>,
}

/// What a watch got.
pub struct Replayed {
    /// Its number.
    pub slot: u32,
    /// Its serial.
    pub serial: u64,
    /// What it missed, if anything.
    pub frames: Option<Frames>,
    /// The first revision that it still needs.
    pub next: i64,
}

/// A pass.
#[derive(Default)]
pub struct Replay {
    members: Vec<Member>,
    interest: Interest,
    bytes: usize,
    stopped: usize,
    through: i64,
    matched: Vec<u32>,
    with_previous: bool,
    response_bytes: usize,
}

impl Replay {
    /// A pass that nobody has joined yet, with responses not much larger than `response_bytes`.
    #[must_use]
    pub fn new(response_bytes: usize) -> Self {
        Self { response_bytes, ..Self::default() }
    }

    /// Adds a watch that needs everything from `from` on.
    pub fn add(&mut self, (slot, serial): (u32, u64), interval: &Interval, wishes: Wishes, from: i64) {
        let member = u32::try_from(self.members.len()).expect("a pass has few members");
        self.interest.insert(interval, member);
        self.with_previous |= wishes.previous;
        self.through = if member == 0 { from - 1 } else { self.through.min(from - 1) };
        self.members.push(Member {
            slot,
            serial,
            from,
            wishes,
            frames: Vec::new(),
            shared: None,
            bytes: 0,
            revisions: 0,
            last: 0,
            stopped: None,
        });
    }

    /// Whether there is anybody to catch up.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The first revision that the pass has not covered.
    #[must_use]
    pub fn next(&self) -> i64 {
        self.through + 1
    }

    /// Whether it makes sense to go on.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        self.stopped < self.members.len() && self.bytes < PASS_BYTES
    }

    /// Goes over the next events, in whole revisions, up to `through`.
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
        self.interest.visit(&event.key, |group| matched.extend_from_slice(group));
        let mut framer = Framer::new(event);
        for nth in matched.drain(..) {
            let member = &mut self.members[nth as usize];
            if !member.wishes.admit(event.deletion) || !self.admits(nth, main) {
                continue;
            }
            let member = &mut self.members[nth as usize];
            let frame = framer.frame(member.wishes.previous, reader)?;
            self.bytes += frame.len();
            member.take(main, frame_cost(&frame));
            member.frames.push(frame);
        }
        give_back(&mut matched);
        self.matched = matched;
        Ok(())
    }

    /// A revision that has several events.
    fn feed_many(&mut self, events: &[Event], reader: &Reader) -> Result<(), Halt> {
        let main = events[0].revision.main;
        let (mut revision, mut matched) = (Revision::new(events, reader), Vec::new());
        revision.matches(&self.interest, &mut matched);
        matched.sort_unstable_by_key(|found| found.watch);
        let mut has_begun = false;
        for Match { watch: nth, events } in matched {
            let wishes = self.members[nth as usize].wishes;
            if !revision.concerns(&events, wishes) || !self.admits(nth, main) {
                continue;
            }
            let member = &mut self.members[nth as usize];
            let is_whole = revision.is_whole(&events, wishes)?;
            if has_begun && !is_whole && self.bytes >= PASS_BYTES {
                self.stopped += 1;
                member.stopped = Some(main);
                continue;
            }
            let frames = revision.frames(&events, wishes)?;
            let cost = frames.cost();
            if cost < LARGE_REVISION_BYTES {
                member.frames.extend_from_slice(frames.as_slice());
            } else if member.frames.is_empty() {
                member.shared = Some(frames);
            } else {
                self.stopped += 1;
                member.stopped = Some(main);
                continue;
            }
            member.take(main, cost);
            // The list of all frames is there once, however many keep it.
            self.bytes += if is_whole && has_begun { 0 } else { cost };
            has_begun = true;
        }
        Ok(())
    }

    /// Whether a member may have a revision in this pass. If it has too much already, it sits out from there on.
    fn admits(&mut self, nth: u32, main: i64) -> bool {
        let response_bytes = self.response_bytes;
        let member = &mut self.members[nth as usize];
        if main < member.from || member.stopped.is_some() {
            return false;
        }
        let is_full = member.is_full(response_bytes);
        if is_full {
            member.stopped = Some(main);
            self.stopped += 1;
        }
        !is_full
    }

    /// Ends the pass.
    #[must_use]
    pub fn finish(self) -> Vec<Replayed> {
        let next = self.next();
        let members = self.members.into_iter();
        members.map(|member| member.finish(next)).collect()
    }
}

impl Member {
    /// Whether it has so much that no further revision fits.
    fn is_full(&self, response_bytes: usize) -> bool {
        self.shared.is_some() || self.revisions >= REVISIONS_MAX || self.bytes >= response_bytes
    }

    /// Counts what it has got of a revision.
    fn take(&mut self, main: i64, cost: usize) {
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

/// A pass over the history table, for whoever has time to wait for a disk.
pub struct Job {
    replay: Replay,
    reader: Reader,
    to: i64,
}

impl Job {
    /// Lets the members of a pass catch up with `to`.
    #[must_use]
    pub fn new(replay: Replay, reader: Reader, to: i64) -> Self {
        Self { replay, reader, to }
    }

    /// Does it. If compaction gets in between, everybody just keeps what he has.
    pub fn run(self) -> Result<Vec<Replayed>, Halt> {
        let Self { mut replay, reader, to } = self;
        let mut seen = 0;
        while seen < PASS_EVENTS && replay.next() <= to && replay.wants_more() {
            let span = Span { from: replay.next(), to, with_previous: replay.with_previous };
            match reader.history(span, CHUNK_EVENTS) {
                Ok(chunk) => {
                    seen += chunk.events.len();
                    replay.feed(&chunk.events, chunk.through, &reader)?;
                }
                Err(Failure::Refused(error)) => {
                    assert_eq!(error, Error::Compacted, "nothing else is wrong with the span");
                    break;
                }
                Err(Failure::Halted(halt)) => return Err(halt),
            }
        }
        Ok(replay.finish())
    }
}
