//! The hub's inputs: streams are opened and closed, watches are created and cancelled, and progress is requested.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use super::{
    Settings,
    hub::{Create, HubCore, Input, Request},
    outbox::{Outbox, Response},
    stream::{Stream, Watch, WatchState},
};
use crate::{error::Error, metrics, mvcc::Reader};

/// The watch ID in a response that concerns no watch, or all watches of the stream.
pub const NO_WATCH_ID: i64 = -1;

const DUPLICATE: &str = "mvcc: duplicate watch ID provided on the WatchStream";

impl HubCore {
    pub(super) fn handle_input(&mut self, input: Input) {
        match input {
            Input::Open { stream, outbox, period } => self.open(stream, outbox, period),
            Input::Request { stream, request } => {
                if let Some(&slot) = self.slots_by_id.get(&stream) {
                    self.handle_request(slot, request);
                }
            }
            Input::HasCapacity { stream } => {
                if let Some(&slot) = self.slots_by_id.get(&stream) {
                    self.make_ready(slot);
                }
            }
            Input::Close { stream } => self.close(stream),
            Input::Replayed(replayed) => {
                self.job_running = false;
                for replayed in replayed {
                    self.apply_replayed(replayed);
                }
            }
            Input::OldestNeeded(answer) => answer(self.oldest_needed()),
            Input::Restored(reader) => self.restore(reader),
        }
    }

    fn open(&mut self, id: u64, outbox: Arc<Outbox>, period: Duration) {
        let stream = Stream::new(id, outbox, self.now, period, self.settings.pending_bytes);
        let slot = self.streams.insert(stream);
        assert!(self.slots_by_id.insert(id, slot).is_none(), "a stream is opened once");
        self.gauges.streams.inc();
    }

    fn close(&mut self, id: u64) {
        let Some(slot) = self.slots_by_id.remove(&id) else { return };
        self.closed_streams.push(slot);
    }

    fn handle_request(&mut self, stream: u32, request: Request) {
        self.streams[stream].count_handled();
        self.mark_dirty(stream);
        let revision = self.delivered;
        match request {
            Request::Create(create) => match self.check_create(stream, &create) {
                Ok(()) => self.create(stream, create),
                Err(reason) => {
                    self.streams[stream].release_refused(&create.interval);
                    self.stage(stream, Response::Refused { reason: reason.into(), revision });
                }
            },
            Request::Refuse(reason) => self.stage(stream, Response::Refused { reason, revision }),
            Request::Cancel(id) => {
                if self.cancel(stream, id) {
                    self.stage(stream, Response::Canceled { watch: id, revision });
                }
            }
            Request::Progress => self.send_progress(stream),
        }
    }

    fn check_create(&self, stream: u32, create: &Create) -> Result<(), String> {
        let watches = &self.streams[stream].watches;
        // The ID that means "all watches" cannot be the ID of one.
        if create.id == NO_WATCH_ID || create.id != 0 && watches.contains_key(&create.id) {
            return Err(DUPLICATE.into());
        }
        let Settings { watches_per_stream, watches: watches_in_all, .. } = self.settings;
        let (what, flag, value) = if watches.len() >= watches_per_stream {
            ("too many watches on this stream", "max-watches-per-stream", watches_per_stream)
        } else if self.watches.len() >= watches_in_all {
            ("too many watches on this member", "max-watches", watches_in_all)
        } else {
            return Ok(());
        };
        metrics::refused("watches");
        Err(Error::LimitReached { what, flag, value }.to_string())
    }

    fn create(&mut self, slot: u32, create: Create) {
        let revision = self.delivered;
        let stream = &mut self.streams[slot];
        let id = if create.id == 0 { stream.allocate_watch_id() } else { create.id };
        let from = if create.start == 0 { revision + 1 } else { create.start };
        let state = if from > revision { WatchState::Synced } else { WatchState::Ready };
        self.created_watches += 1;
        let Create { interval, start, options, .. } = create;
        let watch = Watch {
            serial: self.created_watches,
            stream: slot,
            id,
            interval,
            options,
            start,
            from,
            state,
            position: 0,
            idle: true,
        };
        let progress = options.progress;
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

    /// Cancels a watch; false if the stream has no watch with this ID.
    fn cancel(&mut self, stream: u32, id: i64) -> bool {
        let watch = self.streams[stream].watches.remove(&id);
        if let Some(watch) = watch {
            self.remove(watch);
        }
        watch.is_some()
    }

    /// Removes a watch. Callers must have removed it from its stream's `watches`.
    pub(super) fn remove(&mut self, slot: u32) {
        self.leave_state(slot);
        let watch = self.watches.remove(slot);
        self.streams[watch.stream].release(slot, &watch);
        self.gauges.watches.dec();
    }

    /// Sends a progress notification for a whole stream, if all of its watches are synced and have started.
    fn send_progress(&mut self, slot: u32) {
        let revision = self.delivered;
        let stream = &mut self.streams[slot];
        let is_synced = stream.lagging == 0 && !stream.watches.is_empty() && stream.has_begun(revision);
        if is_synced && self.has_capacity(slot) {
            self.stage(slot, Response::Progress { watch: NO_WATCH_ID, revision });
        }
    }

    /// Sends the progress notifications that are due.
    pub(super) fn tick(&mut self) {
        while let Some(&Reverse((at, id))) = self.timers.peek()
            && at <= self.now
        {
            self.timers.pop();
            if let Some(&slot) = self.slots_by_id.get(&id) {
                self.tick_stream(slot);
            }
        }
    }

    fn tick_stream(&mut self, slot: u32) {
        self.streams[slot].ticking = false;
        let revision = self.delivered;
        let watches: Vec<u32> = self.streams[slot].watches.values().copied().collect();
        let mut wants_progress = false;
        for watch in watches {
            let watch = &mut self.watches[watch];
            if !watch.options.progress {
                continue;
            }
            wants_progress = true;
            let idle = std::mem::replace(&mut watch.idle, true);
            let at_head = watch.state == WatchState::Synced && watch.start <= revision;
            let id = watch.id;
            if idle && at_head && self.has_capacity(slot) {
                self.stage(slot, Response::Progress { watch: id, revision });
            }
        }
        if wants_progress {
            self.start_ticking(slot);
        }
    }

    fn start_ticking(&mut self, slot: u32) {
        let stream = &mut self.streams[slot];
        if !std::mem::replace(&mut stream.ticking, true) {
            self.timers.push(Reverse((stream.next_tick(self.now), stream.id)));
        }
    }

    /// Switches to a later state of the key space. The revisions in between have to be read from its history table.
    fn restore(&mut self, reader: Reader) {
        let head = reader.head();
        assert!(head >= self.delivered, "a key space is replaced by a later state of itself");
        self.reader = reader;
        self.fall_behind_all(self.delivered + 1, head);
        self.delivered = head;
    }
}
