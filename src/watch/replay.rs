//! Catching up: many watches at once, in one pass over a piece of history.
//!
//! A pass takes watches that stand at different revisions, goes through history from the lowest one, and gives each watch
//! what it has missed, in whole revisions: at most [`REVISIONS_MAX`] of them, or about [`RESPONSE_BYTES`]. A watch that has
//! got that much sits out the rest of the pass.

use bytes::Bytes;

use super::{frame::Framer, interest::Interest, stream::Wishes};
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

/// A watch that catches up.
pub struct Member {
    slot: u32,
    serial: u64,
    from: i64,
    wishes: Wishes,
    frames: Vec<Bytes>,
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
    /// What it missed.
    pub frames: Vec<Bytes>,
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
    matched: Vec<(u32, u32)>,
    with_previous: bool,
}

impl Replay {
    /// Adds a watch that needs everything from `from` on.
    pub fn add(&mut self, (slot, serial): (u32, u64), interval: &Interval, wishes: Wishes, from: i64) {
        let member = u32::try_from(self.members.len()).expect("a pass has few members");
        self.interest.insert(interval, member);
        self.with_previous |= wishes.previous;
        self.through = if member == 0 { from - 1 } else { self.through.min(from - 1) };
        let new =
            Member { slot, serial, from, wishes, frames: Vec::new(), bytes: 0, revisions: 0, last: 0, stopped: None };
        self.members.push(new);
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
        let main = events[0].revision.main;
        let mut matched = std::mem::take(&mut self.matched);
        for (nth, event) in (0..).zip(events) {
            self.interest.visit(&event.key, &mut |group| matched.extend(group.iter().map(|&member| (nth, member))));
        }
        let mut framer: Option<(u32, Framer<'_>)> = None;
        for (nth, member) in matched.drain(..) {
            let event = &events[nth as usize];
            let member = &mut self.members[member as usize];
            if !member.admits(event, main) {
                self.stopped += usize::from(member.stop_now(main));
                continue;
            }
            if framer.as_ref().is_none_or(|(known, _)| *known != nth) {
                framer = Some((nth, Framer::new(event)));
            }
            let (_, framer) = framer.as_mut().expect("it was just made");
            let frame = framer.frame(member.wishes.previous, reader)?;
            self.bytes += frame.len();
            member.take(frame, main);
        }
        self.matched = matched;
        Ok(())
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
    /// Whether it wants an event, and may have it in this pass.
    fn admits(&self, event: &Event, main: i64) -> bool {
        self.wishes.admit(event.deletion) && main >= self.from && self.stopped.is_none() && !self.is_full(main)
    }

    /// Whether it has so much that no further revision fits.
    fn is_full(&self, main: i64) -> bool {
        main != self.last && (self.revisions >= REVISIONS_MAX || self.bytes >= RESPONSE_BYTES)
    }

    /// Sits out from `main` on if it has to, and says whether that is new.
    fn stop_now(&mut self, main: i64) -> bool {
        let stops = self.stopped.is_none() && main >= self.from && self.is_full(main);
        if stops {
            self.stopped = Some(main);
        }
        stops
    }

    fn take(&mut self, frame: Bytes, main: i64) {
        self.revisions += usize::from(self.last != main);
        self.last = main;
        self.bytes += frame.len();
        self.frames.push(frame);
    }

    fn finish(self, next: i64) -> Replayed {
        let next = self.stopped.unwrap_or(next).max(self.from);
        Replayed { slot: self.slot, serial: self.serial, frames: self.frames, next }
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
