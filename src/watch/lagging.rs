//! Lagging watches: a watch whose stream has no capacity, or that starts at an old revision, is only a position in the history.
//! It costs nothing until its stream has capacity; then it catches up, from the ring within the hub's step if the ring goes back
//! far enough, otherwise from the history table on the history thread.

use super::{
    hub::HubCore,
    outbox::Response,
    replay::{CHUNK_EVENTS, Job, PASS_EVENTS, PASS_WATCHES, Replay, Replayed},
    stream::{Stream, WatchState},
};
use crate::error::Halt;

/// The maximum number of watches of one stream that catch up at a time after they waited for capacity. The capacity is usually
/// used up by fewer.
const MAX_READY_PER_STREAM: usize = 1024;

impl HubCore {
    /// Adds a new watch to the list of its initial state.
    pub(super) fn begin(&mut self, slot: u32) {
        let watch = &mut self.watches[slot];
        let (from, state) = (watch.from, watch.state);
        watch.state = WatchState::Reading; // The state that has no list.
        self.streams[watch.stream].lagging += 1;
        self.gauges.lagging.inc();
        self.set_state(slot, from, state);
    }

    /// A synced watch could not receive revision `main`, because its stream has no capacity.
    pub(super) fn fall_behind(&mut self, slot: u32, main: i64) {
        self.set_state(slot, main, WatchState::Waiting);
    }

    /// The revisions `from` to `head` were not delivered to any watch.
    pub(super) fn fall_behind_all(&mut self, from: i64, head: i64) {
        let synced = self.watches.iter().filter(|(_, watch)| watch.state == WatchState::Synced);
        let behind: Vec<(u32, i64)> = synced.map(|(slot, watch)| (slot, watch.from.max(from))).collect();
        for (slot, from) in behind.into_iter().filter(|(_, from)| *from <= head) {
            self.set_state(slot, from, WatchState::Ready);
        }
    }

    /// A stream has capacity: watches that waited for it may catch up. If there are too many, those furthest behind come first;
    /// the others follow as these have caught up, if there is still capacity.
    pub(super) fn make_ready(&mut self, stream: u32) {
        let Stream { lagging, waiting, .. } = &self.streams[stream];
        for _ in lagging - waiting.len()..MAX_READY_PER_STREAM {
            let Some(&(from, slot)) = self.streams[stream].waiting.first() else { return };
            self.set_state(slot, from, WatchState::Ready);
        }
    }

    /// The lowest revision that a watch needs which waits to catch up.
    pub(super) fn oldest_needed(&self) -> Option<i64> {
        let lagging = self.streams.iter().filter(|(_, stream)| stream.lagging > 0);
        let waiting = lagging.filter_map(|(_, stream)| stream.waiting.first()).chain(self.ready.first());
        waiting.map(|(revision, _)| *revision).min()
    }

    /// Whether [`HubCore::catch_up`] has something to do now.
    pub(super) fn can_catch_up(&self) -> bool {
        match self.ready.last() {
            Some(&(newest, _)) => !self.job_running || newest >= self.ring.lock().lowest(),
            None => false,
        }
    }

    /// Runs one pass of catching up from the ring; returns a pass that has to read the history table, if any.
    pub(super) fn catch_up(&mut self) -> Result<Option<Job>, Halt> {
        if self.ready.is_empty() {
            return Ok(None);
        }
        self.cancel_compacted();
        let lowest = self.ring.lock().lowest();
        let reader = self.reader.clone();
        let mut replay = self.gather(lowest, i64::MAX);
        if !replay.is_empty() {
            self.read_ring(&mut replay)?;
            for replayed in replay.finish() {
                self.apply_replayed(replayed);
            }
        }
        if self.job_running {
            return Ok(None);
        }
        let replay = self.gather(i64::MIN, lowest);
        self.job_running = !replay.is_empty();
        Ok(self.job_running.then(|| Job::new(replay, reader, self.delivered)))
    }

    /// Cancels the watches that need revisions that are compacted.
    fn cancel_compacted(&mut self) {
        let compacted = self.reader.compacted();
        let lost: Vec<u32> = self.ready.range(..(compacted, 0)).map(|(_, slot)| *slot).collect();
        for slot in lost {
            let (stream, id) = (self.watches[slot].stream, self.watches[slot].id);
            self.streams[stream].watches.remove(&id);
            self.remove(slot);
            self.stage(stream, Response::Compacted { watch: id, compacted });
        }
    }

    /// Gathers ready watches that need a revision in `from..to` for a pass. Watches so far ahead of the first one that the pass
    /// would not reach them are left for the next pass.
    fn gather(&mut self, from: i64, to: i64) -> Replay {
        let mut replay = Replay::new(self.response_bytes());
        let Some(&(first, _)) = self.ready.range((from, 0)..).next() else { return replay };
        let to = to.min(first.saturating_add_unsigned(PASS_EVENTS as u64));
        if first >= to {
            return replay;
        }
        let slots: Vec<u32> = self.ready.range((from, 0)..(to, 0)).map(|(_, slot)| *slot).take(PASS_WATCHES).collect();
        for slot in slots {
            self.set_state(slot, self.watches[slot].from, WatchState::Reading);
            let watch = &self.watches[slot];
            replay.add((slot, watch.serial), &watch.interval, watch.options, watch.from);
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

    /// Stages what a pass has read for a watch, unless the watch is gone, or its stream has no capacity any more.
    pub(super) fn apply_replayed(&mut self, replayed: Replayed) {
        let Replayed { slot, serial, frames, next } = replayed;
        let Some(watch) = self.watches.get(slot).filter(|watch| watch.serial == serial) else { return };
        assert_eq!(watch.state, WatchState::Reading, "only gathered watches take part in a pass");
        let (stream, from) = (watch.stream, watch.from);
        if frames.is_some() && !self.has_capacity(stream) {
            return self.set_state(slot, from, WatchState::Waiting);
        }
        if let Some(frames) = frames {
            self.stage_events(slot, self.delivered, frames);
        }
        let has_capacity = self.has_capacity(stream);
        let state = match next {
            next if next > self.delivered => WatchState::Synced,
            _ if has_capacity => WatchState::Ready,
            _ => WatchState::Waiting,
        };
        self.set_state(slot, next, state);
        if !self.streams[stream].waiting.is_empty() {
            self.mark_dirty(stream); // The flush notices if there is capacity for other waiting watches.
        }
    }
}
