//! The hub hears: streams come and go, watches begin and end, and somebody asks how far things are.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use super::{
    hub::{Create, HubCore, Input, Request},
    outbox::{Outbox, Response},
    stream::{Standing, Stream, Watch},
};
use crate::{error::Error, mvcc::Reader};

/// The ID in a response that is for no watch, or for all.
pub const NOBODY: i64 = -1;

const DUPLICATE: &str = "mvcc: duplicate watch ID provided on the WatchStream";

impl HubCore {
    pub(super) fn hear(&mut self, input: Input) {
        match input {
            Input::Open { stream, outbox, period } => self.open(stream, outbox, period),
            Input::Request { stream, request } => {
                if let Some(&slot) = self.names.get(&stream) {
                    self.answer(slot, request);
                }
            }
            Input::Room { stream } => {
                if let Some(&slot) = self.names.get(&stream) {
                    self.make_ready(slot);
                }
            }
            Input::Close { stream } => self.close(stream),
            Input::Replayed(replayed) => {
                self.reading = false;
                for replayed in replayed {
                    self.caught_up(replayed);
                }
            }
            Input::Restored(reader) => self.restored(reader),
        }
    }

    fn open(&mut self, name: u64, outbox: Arc<Outbox>, period: Duration) {
        let stream = Stream::new(name, outbox, self.now, period, self.settings.pending_bytes);
        let slot = self.streams.insert(stream);
        assert!(self.names.insert(name, slot).is_none(), "a stream is opened once");
        self.gauges.streams.inc();
    }

    fn close(&mut self, name: u64) {
        let Some(slot) = self.names.remove(&name) else { return };
        self.leaving.push(slot);
    }

    fn answer(&mut self, stream: u32, request: Request) {
        self.streams[stream].handled();
        self.mark_dirty(stream);
        let revision = self.delivered;
        match request {
            Request::Create(create) => match self.admit(stream, &create) {
                Ok(()) => self.create(stream, create),
                Err(reason) => {
                    self.streams[stream].release_refused(&create.interval);
                    self.stage(stream, Response::Refused { reason: reason.into(), revision });
                }
            },
            Request::Refuse(reason) => self.stage(stream, Response::Refused { reason, revision }),
            Request::Cancel(id) => {
                if self.end(stream, id) {
                    self.stage(stream, Response::Canceled { watch: id, revision });
                }
            }
            Request::Progress => self.say_progress(stream),
        }
    }

    fn admit(&self, stream: u32, create: &Create) -> Result<(), String> {
        let watches = &self.streams[stream].watches;
        // The ID that means "all" cannot be a watch's own.
        if create.id == NOBODY || create.id != 0 && watches.contains_key(&create.id) {
            return Err(DUPLICATE.into());
        }
        if watches.len() >= self.settings.watches_per_stream {
            return Err(Error::TooManyRequests.to_string());
        }
        Ok(())
    }

    fn create(&mut self, slot: u32, create: Create) {
        let revision = self.delivered;
        let stream = &mut self.streams[slot];
        let id = if create.id == 0 { stream.take_id() } else { create.id };
        let from = if create.start == 0 { revision + 1 } else { create.start };
        let standing = if from > revision { Standing::Synced } else { Standing::Ready };
        self.made += 1;
        let Create { interval, start, wishes, .. } = create;
        let watch = Watch {
            serial: self.made,
            stream: slot,
            id,
            interval,
            wishes,
            start,
            from,
            standing,
            place: 0,
            quiet: true,
        };
        let progress = wishes.progress;
        let watch = self.watches.insert(watch);
        let stream = &mut self.streams[slot];
        stream.watches.insert(id, watch);
        if start > revision {
            stream.future.insert((start, watch));
        }
        self.gauges.watches.inc();
        self.begin(watch);
        self.stage(slot, Response::Created { watch: id, revision });
        if progress {
            self.start_ticking(slot);
        }
    }

    /// Cancels a watch; false if there is none.
    fn end(&mut self, stream: u32, id: i64) -> bool {
        let watch = self.streams[stream].watches.remove(&id);
        if let Some(watch) = watch {
            self.remove(watch);
        }
        watch.is_some()
    }

    /// Removes a watch that its stream no longer lists.
    pub(super) fn remove(&mut self, slot: u32) {
        self.leave_standing(slot);
        let watch = self.watches.remove(slot);
        self.streams[watch.stream].release(slot, &watch);
        self.gauges.watches.dec();
    }

    /// Tells a whole stream how far everything was said, if it is the same for all of its watches.
    fn say_progress(&mut self, slot: u32) {
        let revision = self.delivered;
        let stream = &mut self.streams[slot];
        let agreed = stream.lagging == 0 && !stream.watches.is_empty() && stream.has_begun(revision);
        if agreed && self.has_room(slot) {
            self.stage(slot, Response::Progress { watch: NOBODY, revision });
        }
    }

    /// Tells the watches that asked for it how far everything was said, where the time has come.
    pub(super) fn tick(&mut self) {
        while let Some(&Reverse((at, name))) = self.timers.peek()
            && at <= self.now
        {
            self.timers.pop();
            if let Some(&slot) = self.names.get(&name) {
                self.tick_stream(slot);
            }
        }
    }

    fn tick_stream(&mut self, slot: u32) {
        self.streams[slot].ticking = false;
        let revision = self.delivered;
        let watches: Vec<u32> = self.streams[slot].watches.values().copied().collect();
        let mut listening = false;
        for watch in watches {
            let watch = &mut self.watches[watch];
            if !watch.wishes.progress {
                continue;
            }
            listening = true;
            let quiet = std::mem::replace(&mut watch.quiet, true);
            let at_head = watch.standing == Standing::Synced && watch.start <= revision;
            let id = watch.id;
            if quiet && at_head && self.has_room(slot) {
                self.stage(slot, Response::Progress { watch: id, revision });
            }
        }
        if listening {
            self.start_ticking(slot);
        }
    }

    fn start_ticking(&mut self, slot: u32) {
        let stream = &mut self.streams[slot];
        if !std::mem::replace(&mut stream.ticking, true) {
            self.timers.push(Reverse((stream.next_tick(self.now), stream.name)));
        }
    }

    /// Goes over to a later state of the key space. What lies between the two has to be read from its history.
    fn restored(&mut self, reader: Reader) {
        let head = reader.head();
        assert!(head >= self.delivered, "a key space is replaced by a later state of itself");
        self.reader = reader;
        self.fall_behind_all(self.delivered + 1, head);
        self.delivered = head;
    }
}
