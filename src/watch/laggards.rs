//! The hub and those who lag: a watch whose stream has no room, or that starts in the past, is a position in history. It
//! costs nobody anything until its stream has room; then it catches up, from the ring in the hub's own step if the ring goes
//! back far enough, else from the history table on a thread of its own.

use super::{
    hub::HubCore,
    outbox::Response,
    replay::{CHUNK_EVENTS, Job, PASS_EVENTS, PASS_WATCHES, Replay, Replayed},
    stream::{Standing, Stream},
};
use crate::error::Halt;

/// No more watches of a stream that waited for room catch up at a time. The room that they wait for is mostly for fewer.
const READY_AT_ONCE: usize = 1024;

impl HubCore {
    /// Puts a new watch where it says that it stands.
    pub(super) fn begin(&mut self, slot: u32) {
        let watch = &mut self.watches[slot];
        let (from, standing) = (watch.from, watch.standing);
        watch.standing = Standing::Reading; // The standing that is listed nowhere.
        self.streams[watch.stream].lagging += 1;
        self.gauges.lagging.inc();
        self.stand(slot, from, standing);
    }

    /// A synced watch could not be told of revision `main`.
    pub(super) fn fall_behind(&mut self, slot: u32, main: i64) {
        self.stand(slot, main, Standing::Waiting);
    }

    /// Nobody was told of the revisions from `from` up to `head`.
    pub(super) fn fall_behind_all(&mut self, from: i64, head: i64) {
        let synced = self.watches.iter().filter(|(_, watch)| watch.standing == Standing::Synced);
        let behind: Vec<(u32, i64)> = synced.map(|(slot, watch)| (slot, watch.from.max(from))).collect();
        for (slot, from) in behind.into_iter().filter(|(_, from)| *from <= head) {
            self.stand(slot, from, Standing::Ready);
        }
    }

    /// A stream has room: watches that waited for it may catch up. If there are more, they are those that are furthest
    /// behind; the others follow as these have caught up, if there still is room then.
    pub(super) fn make_ready(&mut self, stream: u32) {
        let Stream { lagging, waiting, .. } = &self.streams[stream];
        for _ in lagging - waiting.len()..READY_AT_ONCE {
            let Some(&(from, slot)) = self.streams[stream].waiting.first() else { return };
            self.stand(slot, from, Standing::Ready);
        }
    }

    /// Whether [`HubCore::catch_up`] could do something now.
    pub(super) fn can_catch_up(&self) -> bool {
        match self.ready.last() {
            Some(&(newest, _)) => !self.reading || newest >= self.ring.lock().lowest(),
            None => false,
        }
    }

    /// Lets watches catch up for a while; returns what has to be read from the history table.
    pub(super) fn catch_up(&mut self) -> Result<Option<Job>, Halt> {
        if self.ready.is_empty() {
            return Ok(None);
        }
        self.end_compacted();
        let lowest = self.ring.lock().lowest();
        let reader = self.reader.clone();
        let mut replay = self.gather(lowest, i64::MAX);
        if !replay.is_empty() {
            self.read_ring(&mut replay)?;
            for replayed in replay.finish() {
                self.caught_up(replayed);
            }
        }
        if self.reading {
            return Ok(None);
        }
        let replay = self.gather(i64::MIN, lowest);
        self.reading = !replay.is_empty();
        Ok(self.reading.then(|| Job::new(replay, reader, self.delivered)))
    }

    /// Ends the watches that need what is forgotten.
    fn end_compacted(&mut self) {
        let compacted = self.reader.compacted();
        let lost: Vec<u32> = self.ready.range(..(compacted, 0)).map(|(_, slot)| *slot).collect();
        for slot in lost {
            let (stream, id) = (self.watches[slot].stream, self.watches[slot].id);
            self.streams[stream].watches.remove(&id);
            self.remove(slot);
            self.stage(stream, Response::Compacted { watch: id, compacted });
        }
    }

    /// Gathers ready watches that need a revision from `from` on but below `to`. Those too far ahead of the first one to
    /// gain anything by the same pass are left for the next.
    fn gather(&mut self, from: i64, to: i64) -> Replay {
        let mut replay = Replay::new(self.response_bytes());
        let Some(&(first, _)) = self.ready.range((from, 0)..).next() else { return replay };
        let to = to.min(first.saturating_add_unsigned(PASS_EVENTS as u64));
        if first >= to {
            return replay;
        }
        let members: Vec<u32> =
            self.ready.range((from, 0)..(to, 0)).map(|(_, slot)| *slot).take(PASS_WATCHES).collect();
        for slot in members {
            self.stand(slot, self.watches[slot].from, Standing::Reading);
            let watch = &self.watches[slot];
            replay.add((slot, watch.serial), &watch.interval, watch.wishes, watch.from);
        }
        replay
    }

    fn read_ring(&self, replay: &mut Replay) -> Result<(), Halt> {
        let mut seen = 0;
        while seen < PASS_EVENTS && replay.next() <= self.delivered && replay.wants_more() {
            let chunk = self.ring.lock().read(replay.next(), self.delivered, CHUNK_EVENTS);
            let Some(chunk) = chunk else { break };
            seen += chunk.events.len();
            replay.feed(&chunk.events, chunk.through, &self.reader)?;
        }
        Ok(())
    }

    /// A watch has got some of what it missed, unless it is gone, or its stream is full by now.
    pub(super) fn caught_up(&mut self, replayed: Replayed) {
        let Replayed { slot, serial, frames, next } = replayed;
        let Some(watch) = self.watches.get(slot).filter(|watch| watch.serial == serial) else { return };
        assert_eq!(watch.standing, Standing::Reading, "only those who were gathered catch up");
        let (stream, from) = (watch.stream, watch.from);
        if frames.is_some() && !self.has_room(stream) {
            return self.stand(slot, from, Standing::Waiting);
        }
        if let Some(frames) = frames {
            self.stage_events(slot, self.delivered, frames);
        }
        let has_room = self.has_room(stream);
        let standing = match next {
            next if next > self.delivered => Standing::Synced,
            _ if has_room => Standing::Ready,
            _ => Standing::Waiting,
        };
        self.stand(slot, next, standing);
        if !self.streams[stream].waiting.is_empty() {
            self.mark_dirty(stream); // Its next ones have their turn.
        }
    }
}
