//! A conversation on its stream.
//!
//! It is stepped on the connection's task when a message has come, when its queue has room again, or when its bell rings.

use std::{sync::Arc, task::Waker};

use bytes::Bytes;

use super::{
    limits::{self, Shared},
    message::Encoding,
    outbox::Bell,
    sender::{Ending, Outbound, ROOM_BYTES, Sender},
    service::Method,
    streams::{Inbound, Stream},
};
use crate::{
    call::{Code, Conversation, Line, Refusal, Step},
    ledger,
};

/// In one step so much is unpacked: a few bytes may become megabytes.
const STEP_BYTES: usize = 1 << 20;

/// A conversation, and what wakes it.
pub struct Talk {
    conversation: Box<dyn Conversation>,
    method: Arc<dyn Method>,
    bell: Arc<Bell>,
    waker: Waker,
}

/// What the connection of a conversation holds, and may hold.
pub struct Account<'a> {
    /// What all connections share.
    pub shared: &'a Shared,
    /// What the connection is known to hold.
    pub told: usize,
    /// What it holds beside answers.
    pub beside: usize,
}

/// What a step came to.
#[derive(Debug)]
pub struct Outcome {
    /// So many bytes of the stream were used up.
    pub consumed: usize,
    /// It stopped because the connection has too much to write, and wants to go on when that is written.
    pub is_stalled: bool,
    /// How long the messages were that it took in, unpacked.
    pub received: usize,
    /// It took in as much as a step may, and there is more.
    pub goes_on: bool,
}

impl Talk {
    /// A conversation that has just begun.
    #[must_use]
    pub fn new(conversation: Box<dyn Conversation>, method: Arc<dyn Method>, bell: Arc<Bell>) -> Self {
        let waker = Waker::from(bell.clone());
        Self { conversation, method, bell, waker }
    }

    /// Who counts.
    #[must_use]
    pub fn method(&self) -> &dyn Method {
        &*self.method
    }

    /// Does what can be done now. When that ends the conversation, its end is sent.
    pub fn step(
        &mut self,
        slot: u64,
        stream: &mut Stream,
        sender: &mut Sender,
        account: &Account<'_>,
        max_bytes: usize,
    ) -> Outcome {
        self.bell.listen();
        let mut line = TalkLine {
            slot,
            id: stream.id,
            encoding: stream.request.encoding,
            max_bytes,
            method: &*self.method,
            inbound: &mut stream.inbound,
            outbound: &mut stream.outbound,
            sender,
            account,
            waker: &self.waker,
            broken: None,
            consumed: 0,
            received: 0,
        };
        let step = self.conversation.step(&mut line);
        let (broken, consumed, received) = (line.broken.take(), line.consumed, line.received);
        let goes_on = received >= STEP_BYTES && !stream.inbound.deframer.is_empty();
        let is_stalled = sender.is_saturated() || sender.is_full();
        let outcome = Outcome { consumed, is_stalled, received, goes_on };
        let end = match (broken, step) {
            (Some(refusal), _) => Err(refusal),
            (None, Step::End(end)) => end,
            (None, Step::Wait) => {
                stream.kept = self.conversation.held();
                return outcome;
            }
        };
        stream.kept = 0;
        self.method.handled(end.as_ref().map_or_else(|refusal| refusal.code, |()| Code::Ok));
        sender.end(slot, stream.id, &mut stream.outbound, Ending::Status(end));
        outcome
    }
}

struct TalkLine<'a> {
    slot: u64,
    id: u32,
    encoding: Encoding,
    max_bytes: usize,
    method: &'a dyn Method,
    inbound: &'a mut Inbound,
    outbound: &'a mut Outbound,
    sender: &'a mut Sender,
    account: &'a Account<'a>,
    waker: &'a Waker,
    broken: Option<Refusal>,
    consumed: usize,
    received: usize,
}

impl TalkLine<'_> {
    /// What the connection holds now.
    fn held(&self) -> usize {
        self.account.beside + self.sender.held_bytes()
    }

    /// Whether a message may wait here. A small one always may: how many there are is bounded elsewhere.
    fn admits(&self, bytes: usize) -> bool {
        let Account { shared, told, .. } = *self.account;
        bytes <= ROOM_BYTES
            || if self.sender.held > 0 {
                shared.admits(told, self.held(), bytes)
            } else {
                shared.admits_first(told, self.held(), bytes)
            }
    }
}

impl Line for TalkLine<'_> {
    fn receive(&mut self) -> Option<Bytes> {
        if self.broken.is_some() || self.received >= STEP_BYTES {
            return None; // What there is beyond that waits for another step.
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
                limits::note("message_length");
                let code = if self.method.is_unary() { Code::Unknown } else { Code::Internal };
                self.broken = Some(Refusal { code, message: "unexpected EOF".into() });
            }
            Ok(None) => (),
            Err(refusal) => self.broken = Some(refusal),
        }
        None
    }

    /// As in grpc-go, less than the prefix of a message is as good as nothing.
    fn ended(&self) -> bool {
        self.inbound.ended && self.inbound.deframer.wanted().is_none()
    }

    fn has_room(&self) -> bool {
        self.sender.has_room(self.outbound)
    }

    fn send(&mut self, message: Bytes) {
        if self.broken.is_some() {
            return;
        }
        if !self.admits(message.len()) {
            self.broken = Some(ledger::unread());
            return;
        }
        self.method.sent(message.len());
        self.sender.message(self.slot, self.id, self.outbound, message);
    }

    fn spare(&self) -> usize {
        self.account.shared.spare(self.account.told, self.held())
    }

    fn waker(&self) -> &Waker {
        self.waker
    }
}
