//! Drives the conversation of a streaming call.
//!
//! It is stepped on the connection's task when a message has arrived, when its queue has room again, or when its waker was
//! called.

use std::{sync::Arc, task::Waker};

use bytes::Bytes;

use super::{
    limits::{self, Shared},
    message::Encoding,
    outbox::StreamWaker,
    sender::{Ending, MAX_QUEUED_BYTES, Outbound, Sender},
    service::Method,
    streams::{Inbound, Stream},
};
use crate::{
    call::{CallError, Code, Conversation, Step, StreamIo},
    ledger,
};

/// At most this much is decompressed per step: a few bytes may expand to megabytes.
const STEP_BYTES: usize = 1 << 20;

/// A conversation and its waker.
pub struct StreamHandler {
    conversation: Box<dyn Conversation>,
    method: Arc<dyn Method>,
    stream_waker: Arc<StreamWaker>,
    waker: Waker,
}

/// How much the connection of a stream holds, and whether it may hold more.
pub struct HeldBytes<'a> {
    /// Shared by all connections.
    pub shared: &'a Shared,
    /// What the connection has reported to the ledger.
    pub reported: usize,
    /// What the connection holds apart from its output.
    pub other: usize,
}

/// The result of a step.
#[derive(Debug)]
pub struct StepOutcome {
    /// How many bytes of the stream were consumed.
    pub consumed: usize,
    /// The handler stopped because the connection has too much to write, and wants to continue when that is written.
    pub is_stalled: bool,
    /// The decompressed size of the messages that it received.
    pub received: usize,
    /// It received as much as one step may, and there is more.
    pub has_more: bool,
}

impl StreamHandler {
    #[must_use]
    pub fn new(conversation: Box<dyn Conversation>, method: Arc<dyn Method>, stream_waker: Arc<StreamWaker>) -> Self {
        let waker = Waker::from(stream_waker.clone());
        Self { conversation, method, stream_waker, waker }
    }

    /// The method, for its metrics.
    #[must_use]
    pub fn method(&self) -> &dyn Method {
        &*self.method
    }

    /// Does what can be done now. If that ends the conversation, the end is sent.
    pub fn step<H>(
        &mut self,
        slot: u64,
        stream: &mut Stream<H>,
        sender: &mut Sender,
        held_bytes: &HeldBytes<'_>,
        max_bytes: usize,
    ) -> StepOutcome {
        self.stream_waker.rearm();
        let mut io = HandlerIo {
            slot,
            id: stream.id,
            encoding: stream.request.encoding,
            max_bytes,
            method: &*self.method,
            inbound: &mut stream.inbound,
            outbound: &mut stream.outbound,
            sender,
            held_bytes,
            waker: &self.waker,
            error: None,
            consumed: 0,
            received: 0,
        };
        let step = self.conversation.step(&mut io);
        let (error, consumed, received) = (io.error.take(), io.consumed, io.received);
        let has_more = received >= STEP_BYTES && !stream.inbound.deframer.is_empty();
        let is_stalled = sender.is_saturated() || sender.is_full();
        let outcome = StepOutcome { consumed, is_stalled, received, has_more };
        let end = match (error, step) {
            (Some(refusal), _) => Err(refusal),
            (None, Step::End(end)) => end,
            (None, Step::Wait) => {
                stream.kept = self.conversation.held_bytes();
                return outcome;
            }
        };
        stream.kept = 0;
        self.method.handled(end.as_ref().map_or_else(|refusal| refusal.code, |()| Code::Ok));
        sender.end(slot, stream.id, &mut stream.outbound, Ending::Status(end));
        outcome
    }
}

struct HandlerIo<'a> {
    slot: u64,
    id: u32,
    encoding: Encoding,
    max_bytes: usize,
    method: &'a dyn Method,
    inbound: &'a mut Inbound,
    outbound: &'a mut Outbound,
    sender: &'a mut Sender,
    held_bytes: &'a HeldBytes<'a>,
    waker: &'a Waker,
    error: Option<CallError>,
    consumed: usize,
    received: usize,
}

impl HandlerIo<'_> {
    /// What the connection holds now.
    fn held(&self) -> usize {
        self.held_bytes.other + self.sender.held_bytes()
    }

    /// Whether a message may be queued. A small one always may: the number of small ones is bounded by other limits.
    fn admits(&self, bytes: usize) -> bool {
        let HeldBytes { shared, reported, .. } = *self.held_bytes;
        bytes <= MAX_QUEUED_BYTES
            || if self.sender.held > 0 {
                shared.admits(reported, self.held(), bytes)
            } else {
                shared.admits_first(reported, self.held(), bytes)
            }
    }
}

impl StreamIo for HandlerIo<'_> {
    fn receive(&mut self) -> Option<Bytes> {
        if self.error.is_some() || self.received >= STEP_BYTES {
            return None; // More than that waits for another step.
        }
        let before = self.inbound.deframer.len();
        match self.inbound.deframer.take(self.encoding, self.max_bytes) {
            Ok(Some(message)) => {
                self.consumed += before - self.inbound.deframer.len();
                self.received += message.len();
                self.method.received(message.len());
                return Some(message);
            }
            Ok(None) if self.inbound.ended && self.inbound.deframer.wanted().is_some() => {
                limits::count_refusal("message_length");
                let code = if self.method.is_unary() { Code::Unknown } else { Code::Internal };
                self.error = Some(CallError { code, message: "unexpected EOF".into() });
            }
            Ok(None) => (),
            Err(refusal) => self.error = Some(refusal),
        }
        None
    }

    /// As in grpc-go, less than a message prefix before the end is ignored.
    fn is_half_closed(&self) -> bool {
        self.inbound.ended && self.inbound.deframer.wanted().is_none()
    }

    fn can_send(&self) -> bool {
        self.sender.can_send(self.outbound)
    }

    fn send(&mut self, message: Bytes) {
        if self.error.is_some() {
            return;
        }
        if !self.admits(message.len()) {
            self.error = Some(ledger::response_over_limit());
            return;
        }
        self.method.sent(message.len());
        self.sender.message(self.slot, self.id, self.outbound, message);
    }

    fn spare_bytes(&self) -> usize {
        self.held_bytes.shared.spare(self.held_bytes.reported, self.held())
    }

    fn waker(&self) -> &Waker {
        self.waker
    }
}
