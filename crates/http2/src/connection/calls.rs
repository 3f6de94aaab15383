//! The work between reading and writing: calls, their responses, and steps of streams.

use std::time::Instant;

use bytes::Bytes;

use super::{CALLS_WAIT_BYTES, Connection};
use crate::{
    call::{Call, CallError, CallResult, Delivery, Metadata, Reply},
    handler::{Handler, ReadyCall},
    ledger, message,
    request::Target,
    sender::{Ending, MAX_QUEUED_BYTES},
    stream_handler::HeldBytes,
};

/// A part of a turn ends after so many responses, calls and steps, or so many bytes of them.
const MAX_TURN_STEPS: usize = 256;
const MAX_TURN_BYTES: usize = 64 << 10;

/// The cost of a part of a turn so far.
#[derive(Default)]
pub struct TurnCost {
    steps: usize,
    bytes: usize,
}

impl TurnCost {
    fn spend(&mut self, bytes: usize) {
        self.steps += 1;
        self.bytes += bytes;
    }

    fn is_spent(&self) -> bool {
        self.steps >= MAX_TURN_STEPS || self.bytes >= MAX_TURN_BYTES
    }
}

impl Connection {
    /// Does the pending work. True if there is more, and it waits only for another turn.
    pub fn run(&mut self, now: Instant) -> bool {
        self.now = now;
        self.collect_deliveries();
        self.was_long = self.turn_cost.is_spent();
        self.begin_calls();
        self.was_long |= self.turn_cost.is_spent();
        self.step_streams();
        self.was_long |= self.turn_cost.is_spent();
        self.send_scheduled();
        self.count_tiny_frames(now);
        self.reads.forget_unused();
        self.report_held();
        let may_step_streams = self.may_step_streams();
        self.timers.schedule_retry(!self.stalled.is_empty() && !may_step_streams && !self.sender.is_saturated(), now);
        let has_calls = !self.ready.is_empty() && !self.is_backlogged();
        !self.deliveries.is_empty()
            || !self.due.is_empty()
            || has_calls
            || (!self.stalled.is_empty() && may_step_streams)
    }

    /// Whether the last turn was expensive enough that other connections should run first.
    #[must_use]
    pub fn was_long(&self) -> bool {
        self.was_long
    }

    /// Takes the deliveries of other threads, and schedules the streams that were woken or are no longer stalled.
    fn collect_deliveries(&mut self) {
        let (mut deliveries, mut woken) = (std::mem::take(&mut self.deliveries), std::mem::take(&mut self.woken));
        self.outbox.take(&mut deliveries, &mut woken);
        for slot in woken.drain(..) {
            self.make_due(slot);
        }
        self.woken = woken;
        self.deliveries = deliveries;
        self.turn_cost = TurnCost::default();
        self.deliver();
        if self.stalled.is_empty() || !self.may_step_streams() {
            return;
        }
        for slot in self.stalled.drain(..self.stalled.len().min(MAX_TURN_STEPS)) {
            if let Some(stream) = self.streams.get(slot) {
                stream.is_stalled = false;
                if !std::mem::replace(&mut stream.is_due, true) {
                    self.due.push_back(slot);
                }
            }
        }
    }

    /// Processes the deliveries, as far as this turn may go. Deferred work runs here and may lead to further deliveries.
    fn deliver(&mut self) {
        while !self.deliveries.is_empty() && !self.turn_cost.is_spent() {
            let mut deliveries = std::mem::replace(&mut self.deliveries, std::mem::take(&mut self.spare_deliveries));
            let mut waiting = deliveries.drain(..);
            while !self.turn_cost.is_spent()
                && let Some((slot, delivery)) = waiting.next()
            {
                self.deliver_one(slot, delivery);
            }
            if waiting.len() > 0 {
                let further = std::mem::take(&mut self.deliveries);
                self.deliveries = waiting.chain(further).collect();
            } else {
                drop(waiting);
                self.spare_deliveries = deliveries;
            }
        }
    }

    fn deliver_one(&mut self, slot: u64, delivery: Delivery) {
        match delivery {
            Delivery::Answer(answer) => {
                self.turn_cost.spend(answer.as_ref().map_or(0, Bytes::len));
                self.respond(slot, answer);
            }
            Delivery::Work(work) if self.streams.get(slot).is_some() => {
                self.turn_cost.spend(0);
                let reply = Reply::new(self.outbox.clone(), slot);
                self.outbox.run_local(&mut self.deliveries, || work(reply));
            }
            Delivery::Work(_) => self.release_orphan(slot), // The stream is gone.
        }
    }

    /// Starts calls while the client reads its responses.
    fn begin_calls(&mut self) {
        self.turn_cost = TurnCost::default();
        while !self.turn_cost.is_spent() {
            if self.is_backlogged() {
                return self.detach_waiting_calls();
            }
            let Some(slot) = self.ready.pop_front() else { return };
            self.begin_call(slot);
            self.deliver();
        }
    }

    fn begin_call(&mut self, slot: u64) {
        let max_bytes = self.limits().max_message;
        let Some(stream) = self.streams.get(slot) else { return };
        let Handler::Ready(ReadyCall { message, is_compressed, since, .. }) = &mut stream.handler else { return };
        let (mut message, is_compressed, since) = (std::mem::take(message), *is_compressed, *since);
        // It would take effect, and its response could not be delivered.
        if self.sender.held > 0 && !self.shared.admits(self.held_reported, self.held(), 0) {
            return self.refuse(slot, ledger::response_over_limit());
        }
        if is_compressed {
            match message::decompress(&message, max_bytes) {
                Ok(decompressed) => message = decompressed,
                Err(refusal) => return self.refuse(slot, refusal),
            }
        }
        let Some(stream) = self.streams.get(slot) else { return };
        let Target::Method(method) = &stream.request.target else { return };
        stream.handler = Handler::Called { since, bytes: message.len() };
        // The message stays counted until the call is answered: a handler that waits keeps it, or a copy.
        self.held_in = self.held_in - std::mem::replace(&mut stream.inbound.held, message.len()) + message.len();
        self.turn_cost.spend(message.len());
        method.received(message.len());
        let (deadline, connection) = (stream.deadline, self.info.clone());
        let metadata = Metadata { deadline, connection, ..stream.request.metadata.clone() };
        let reply = Reply::new(self.outbox.clone(), slot);
        self.outbox.run_local(&mut self.deliveries, || method.call(Call { metadata, message }, reply));
    }

    /// Copies the messages of calls that have to wait, so that they keep no larger read buffers alive. Drops calls whose streams
    /// have ended.
    fn detach_waiting_calls(&mut self) {
        if self.ready.len() > 2 * self.streams.len() + MAX_TURN_STEPS {
            self.ready.retain(|&slot| self.streams.get(slot).is_some());
        }
        for &slot in self.ready.iter().rev() {
            match self.streams.get(slot).map(|stream| &mut stream.handler) {
                Some(Handler::Ready(waiting)) if waiting.is_copy => return,
                Some(Handler::Ready(waiting)) => {
                    waiting.is_copy = true;
                    waiting.message = Bytes::copy_from_slice(&waiting.message);
                }
                _ => (), // It was reset.
            }
        }
    }

    fn is_backlogged(&self) -> bool {
        self.sender.held_of_calls + self.sender.output.len() > CALLS_WAIT_BYTES
    }

    /// Whether conversations and HTTP handlers may queue more output. They leave half of what may be held to calls, and a stream
    /// may always send while nothing is held.
    fn may_step_streams(&mut self) -> bool {
        let limits = &self.shared.limits;
        let (held, half) = (self.held(), limits.max_held / 2);
        let can_send = held <= half && self.shared.admits(self.held_reported, held, 0);
        self.sender.held_limit = if can_send { self.sender.held + (half - held) } else { 0 }.max(1);
        !self.sender.is_saturated() && !self.sender.is_full()
    }

    fn respond(&mut self, slot: u64, answer: CallResult) {
        let is_full = answer.as_ref().is_ok_and(|message| !self.admits_answer(message.len()));
        let Some(stream) = self.streams.get(slot) else { return self.release_orphan(slot) };
        if let Handler::Compressing = stream.handler {
            return self.respond_compressed(slot, if is_full { Err(ledger::response_over_limit()) } else { answer });
        }
        let (Target::Method(method), &Handler::Called { since, bytes }) = (&stream.request.target, &stream.handler)
        else {
            return;
        };
        let answer = if is_full { Err(ledger::response_over_limit()) } else { answer };
        method.answered(self.now.saturating_duration_since(since), bytes, &answer);
        let answer = match answer {
            Ok(message) if stream.outbound.is_slow_to_compress(&message) => {
                return self.compress_elsewhere(slot, message);
            }
            answer => answer,
        };
        self.held_in -= std::mem::take(&mut stream.inbound.held);
        let (id, out) = (stream.id, &mut stream.outbound);
        let status = answer.map(|message| self.sender.message(slot, id, out, message));
        self.sender.end(slot, id, out, Ending::Status(status));
        stream.handler = Handler::Answered;
        self.finish(slot);
    }

    /// Compresses a large response on another thread. The result arrives through another reply.
    fn compress_elsewhere(&mut self, slot: u64, message: Bytes) {
        let Some(stream) = self.streams.get(slot) else { return };
        stream.handler = Handler::Compressing;
        self.held_in = self.held_in - std::mem::replace(&mut stream.inbound.held, message.len()) + message.len();
        let reply = Reply::new(self.outbox.clone(), slot);
        self.service.run_blocking(Box::new(move || {
            if reply.is_wanted() {
                reply.answer(Ok(message::compress(&message)));
            }
        }));
    }

    /// Ends a call whose response was compressed, and counted before that.
    fn respond_compressed(&mut self, slot: u64, answer: CallResult) {
        let Some(stream) = self.streams.get(slot) else { return };
        self.held_in -= std::mem::take(&mut stream.inbound.held);
        let (id, out) = (stream.id, &mut stream.outbound);
        let status = answer.map(|message| self.sender.message_as_is(slot, id, out, message, true));
        self.sender.end(slot, id, out, Ending::Status(status));
        stream.handler = Handler::Answered;
        self.finish(slot);
    }

    /// Whether a response of so many bytes may be queued. The first queued response of a connection may be larger than others.
    fn admits_answer(&self, bytes: usize) -> bool {
        let (reported, held) = (self.held_reported, self.held());
        if self.sender.held > 0 {
            self.shared.admits(reported, held, bytes)
        } else {
            self.shared.admits_first(reported, held, bytes)
        }
    }

    /// The handler of a call whose stream is gone has used its reply.
    fn release_orphan(&mut self, slot: u64) {
        if let Some(held) = self.orphans.remove(&slot) {
            self.held_in -= held;
        }
    }

    /// Ends a gRPC call with an error.
    pub(super) fn refuse(&mut self, slot: u64, refusal: CallError) {
        let Some(stream) = self.streams.get(slot) else { return };
        // The message of a waiting call is dropped.
        if let Handler::Ready(_) = stream.handler {
            self.held_in -= std::mem::take(&mut stream.inbound.held);
        }
        match (&stream.request.target, std::mem::replace(&mut stream.handler, Handler::Answered)) {
            (_, Handler::Answered) => return,
            (Target::Method(method), _) => {
                method.handled(refusal.code);
                self.sender.end(slot, stream.id, &mut stream.outbound, Ending::Status(Err(refusal)));
            }
            _ => self.sender.end(slot, stream.id, &mut stream.outbound, Ending::Broken),
        }
        // The client's end of stream may be in the same read: then no reset is needed.
        self.due.push_back(slot);
    }

    /// Steps the streams that are due now. Streams that become due meanwhile have to wait for the next turn.
    fn step_streams(&mut self) {
        self.turn_cost = TurnCost::default();
        for _ in 0..self.due.len() {
            if self.turn_cost.is_spent() {
                return;
            }
            let Some(slot) = self.due.pop_front() else { return };
            let before = self.sender.backlog();
            self.step(slot);
            self.turn_cost.spend(self.sender.backlog().saturating_sub(before));
        }
    }

    fn step(&mut self, slot: u64) {
        let max_bytes = self.limits().max_message;
        self.may_step_streams();
        let held_besides_output = self.held_besides_output();
        let Some(stream) = self.streams.get(slot) else { return };
        stream.is_due = false;
        let mut handler = std::mem::replace(&mut stream.handler, Handler::Answered);
        let kept = stream.kept;
        let outcome = match &mut handler {
            Handler::Stream(stream_handler) => {
                let held_bytes =
                    HeldBytes { shared: &self.shared, reported: self.held_reported, other: held_besides_output };
                stream_handler.step(slot, stream, &mut self.sender, &held_bytes, max_bytes)
            }
            Handler::Http(http_handler) => http_handler.step(slot, stream, &mut self.sender),
            Handler::AwaitingMessage | Handler::Ready(_) | Handler::Called { .. } | Handler::Compressing => {
                stream.handler = handler;
                return;
            }
            Handler::Answered => return self.finish(slot), // For streams that were refused.
        };
        self.turn_cost.bytes += outcome.received;
        self.held_in = self.held_in - kept + stream.kept;
        if !stream.outbound.is_ending() {
            stream.handler = handler;
            if outcome.is_stalled && !std::mem::replace(&mut stream.is_stalled, true) {
                self.stalled.push_back(slot);
            }
            if outcome.has_more && !outcome.is_stalled {
                self.make_due(slot);
            }
        }
        if outcome.consumed > 0 {
            self.release_window(slot, outcome.consumed);
        }
        self.finish(slot);
    }

    /// Sends data that waited for a window, one frame per stream and turn.
    fn send_scheduled(&mut self) {
        while let Some(slot) = self.sender.next_scheduled() {
            let Some(stream) = self.streams.get(slot) else { continue };
            self.sender.send_frame(slot, stream.id, &mut stream.outbound);
            if stream.outbound.is_over() {
                self.finish(slot);
            } else if matches!(stream.handler, Handler::Stream(_) | Handler::Http(_))
                && stream.outbound.queued() < MAX_QUEUED_BYTES
            {
                self.make_due(slot);
            }
        }
    }
}
