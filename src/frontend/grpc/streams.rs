//! Streaming methods, but for Watch: conversations around what the service streams.

use std::{
    sync::Arc,
    task::{Poll, Waker},
};

use bytes::Bytes;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};

use super::{Grpc, caller, decode_streamed, not_implemented, unary};
use crate::{
    lease::LeaseId,
    proto::{
        etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, RangeRequest, SnapshotRequest},
        health::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus},
    },
    service::{
        Caller, Operation,
        auth::TokenBarrier,
        keep_alive::{KeepAlive, KeepAliveOutcome},
        leader_watch::LeaderLoss,
        range_stream::{Chunk, RangeStream},
    },
};
use http2::{
    call::{CallError, Code, Conversation, Metadata, Step, StreamIo},
    ledger,
};

const RANGE_RESPONSE_FIELD: u32 = 1;

impl Grpc {
    pub fn range_stream(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        let caller = caller(metadata);
        self.service.check_request(&caller, &Operation::RangeStream)?;
        Ok(Box::new(RangeStreamConversation { grpc: self.clone(), caller, stream: None, response: None }))
    }

    /// One request is answered after another: those behind a renewal that waits, wait too.
    pub fn lease_keep_alive(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        let caller = caller(metadata);
        self.service.check_request(&caller, &Operation::LeaseKeepAlive)?;
        let token = TokenBarrier::new(&self.service, &caller);
        Ok(Box::new(KeepAliveConversation { grpc: self.clone(), token, request: None, response: None }))
    }

    pub fn snapshot(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.service.admit(&caller(metadata), &Operation::Snapshot)?;
        Ok(Box::new(NotImplemented("this version of metastore cannot stream snapshots yet")))
    }

    /// Nothing changes after the first response, until the stream ends.
    pub fn health_watch(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.service.admit(&caller(metadata), &Operation::Health)?;
        Ok(Box::new(HealthWatch { is_answered: false }))
    }
}

struct RangeStreamConversation {
    grpc: Arc<Grpc>,
    caller: Caller,
    /// None until the request has arrived.
    stream: Option<RangeStream>,
    /// A chunk that has not been sent yet.
    response: Option<Bytes>,
}

impl Conversation for RangeStreamConversation {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        let stream = if let Some(stream) = &mut self.stream {
            stream
        } else {
            let Some(message) = io.receive() else { return Step::Wait };
            let begun = decode_streamed::<RangeRequest>(message)
                .and_then(|request| Ok(self.grpc.service.range_stream(&self.caller, &request, io.waker())?));
            match begun {
                Ok(stream) => self.stream.insert(stream),
                Err(error) => return Step::End(Err(error)),
            }
        };
        loop {
            if !send_pending(&mut self.response, io) {
                return Step::Wait;
            }
            // A chunk is read only if it can be sent. One that is being read is taken in nevertheless: it is counted here.
            if !io.can_send() && !stream.is_reading() {
                return Step::Wait;
            }
            match stream.poll_next(io.spare_bytes(), io.waker()) {
                Poll::Ready(Ok(Some(chunk))) => self.response = Some(encode_chunk(&self.grpc, &chunk)),
                Poll::Ready(Ok(None)) => return Step::End(Ok(())),
                Poll::Ready(Err(error)) => return Step::End(Err(error.into())),
                Poll::Pending => return Step::Wait,
            }
        }
    }

    fn held_bytes(&self) -> usize {
        self.stream.as_ref().map_or(0, RangeStream::held) + self.response.as_ref().map_or(0, Bytes::len)
    }
}

/// Sends the pending response, if there is one. False if it has to wait for capacity.
fn send_pending(response: &mut Option<Bytes>, io: &mut dyn StreamIo) -> bool {
    if response.is_some() && !io.can_send() {
        return false;
    }
    if let Some(response) = response.take() {
        io.send(response);
    }
    true
}

/// A `RangeStreamResponse` around an encoded `RangeResponse`. Only the last one has a header.
fn encode_chunk(grpc: &Grpc, Chunk { rows, head }: &Chunk) -> Bytes {
    let response = if let Some(head) = head {
        grpc.header.rows(rows, *head)
    } else {
        let mut records = Vec::with_capacity(rows.encoded_len());
        rows.encode_records(&mut records);
        records.into()
    };
    let mut out = Vec::with_capacity(response.len() + 8);
    encode_key(RANGE_RESPONSE_FIELD, WireType::LengthDelimited, &mut out);
    encode_varint(response.len() as u64, &mut out);
    out.extend_from_slice(&response);
    out.into()
}

struct KeepAliveConversation {
    grpc: Arc<Grpc>,
    token: TokenBarrier,
    request: Option<KeepAlive>,
    /// A response that has not been sent yet.
    response: Option<Bytes>,
}

impl Conversation for KeepAliveConversation {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        if !self.token.is_passed(io.waker()) {
            return Step::Wait;
        }
        let service = &self.grpc.service;
        loop {
            if !send_pending(&mut self.response, io) {
                return Step::Wait;
            }
            if self.request.is_none() {
                match io.receive().map(decode_streamed::<LeaseKeepAliveRequest>) {
                    Some(Ok(request)) => match service.keep_alive(self.token.caller(), LeaseId(request.id)) {
                        Ok(renewal) => self.request = Some(renewal),
                        Err(error) => return Step::End(Err(error.into())),
                    },
                    Some(Err(error)) => return Step::End(Err(error)),
                    None if io.is_half_closed() => return Step::End(Ok(())),
                    None => return Step::Wait,
                }
            }
            let request = self.request.as_mut().expect("a request was just received unless there was one");
            match request.poll(service, io.waker()) {
                Poll::Ready(Ok(KeepAliveOutcome { head, id, ttl })) => {
                    let response = LeaseKeepAliveResponse { header: Some(self.grpc.header.at(head)), id: id.0, ttl };
                    (self.request, self.response) = (None, Some(response.encode_to_vec().into()));
                }
                Poll::Ready(Err(error)) => return Step::End(Err(error.into())),
                Poll::Pending => return Step::Wait,
            }
        }
    }
}

/// A stream that fails as soon as its request has arrived.
struct NotImplemented(&'static str);

impl Conversation for NotImplemented {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        match io.receive().map(decode_streamed::<SnapshotRequest>) {
            Some(Ok(_)) => Step::End(Err(not_implemented(self.0))),
            Some(Err(error)) => Step::End(Err(error)),
            None => Step::Wait,
        }
    }
}

struct HealthWatch {
    is_answered: bool,
}

impl Conversation for HealthWatch {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        if self.is_answered || !io.can_send() {
            return Step::Wait;
        }
        let Some(message) = io.receive() else { return Step::Wait };
        let response = match decode_streamed::<HealthCheckRequest>(message) {
            Ok(request) if request.service.is_empty() => unary::serving(),
            Ok(_) => HealthCheckResponse { status: ServingStatus::ServiceUnknown as i32 },
            Err(error) => return Step::End(Err(error)),
        };
        io.send(response.encode_to_vec().into());
        self.is_answered = true;
        Step::Wait
    }
}

/// A conversation that ends when the leader is lost.
pub struct RequiresLeader {
    conversation: Box<dyn Conversation>,
    loss: LeaderLoss,
}

impl RequiresLeader {
    #[must_use]
    pub fn new(conversation: Box<dyn Conversation>, loss: LeaderLoss) -> Self {
        Self { conversation, loss }
    }
}

impl Conversation for RequiresLeader {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        match self.loss.check(io.waker()) {
            Ok(()) => self.conversation.step(io),
            Err(error) => Step::End(Err(error.into())),
        }
    }

    fn held_bytes(&self) -> usize {
        self.conversation.held_bytes()
    }
}

/// A conversation that receives exactly one message, once the client has half-closed. As in grpc-go, a call that sends no
/// message, or more than one, fails before its handler sees anything.
pub struct SingleRequest {
    conversation: Box<dyn Conversation>,
    /// The request, until the conversation has received it.
    message: Option<Bytes>,
    is_started: bool,
}

impl SingleRequest {
    /// Wraps a new conversation.
    #[must_use]
    pub fn new(conversation: Box<dyn Conversation>) -> Self {
        Self { conversation, message: None, is_started: false }
    }

    /// Waits for the only message and for the half-close. Returns None when both have arrived.
    fn receive_request(&mut self, io: &mut dyn StreamIo) -> Option<Step> {
        while let Some(message) = io.receive() {
            if message.len() > io.spare_bytes() {
                return Some(Step::End(Err(ledger::request_over_limit())));
            }
            if self.message.replace(message).is_some() {
                return Some(refuse("received multiple request messages for non-client-streaming RPC"));
            }
        }
        match &self.message {
            _ if !io.is_half_closed() => Some(Step::Wait),
            None => Some(refuse("received no request message from non-client-streaming RPC")),
            Some(_) => None,
        }
    }
}

fn refuse(what: &str) -> Step {
    Step::End(Err(CallError { code: Code::Internal, message: format!("cardinality violation: {what}").into() }))
}

impl Conversation for SingleRequest {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        if !self.is_started {
            if let Some(step) = self.receive_request(io) {
                return step;
            }
            self.is_started = true;
        }
        self.conversation.step(&mut SingleRequestIo { io, message: &mut self.message })
    }

    fn held_bytes(&self) -> usize {
        self.message.as_ref().map_or(0, Bytes::len) + self.conversation.held_bytes()
    }
}

/// The stream of a call whose only message has been received.
struct SingleRequestIo<'a> {
    io: &'a mut dyn StreamIo,
    message: &'a mut Option<Bytes>,
}

impl StreamIo for SingleRequestIo<'_> {
    fn receive(&mut self) -> Option<Bytes> {
        self.message.take()
    }

    fn is_half_closed(&self) -> bool {
        self.message.is_none()
    }

    fn can_send(&self) -> bool {
        self.io.can_send()
    }

    fn send(&mut self, message: Bytes) {
        self.io.send(message);
    }

    fn spare_bytes(&self) -> usize {
        self.io.spare_bytes()
    }

    fn waker(&self) -> &Waker {
        self.io.waker()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A line with the messages that the client has sent so far.
    #[derive(Default)]
    struct TestIo {
        messages: VecDeque<Bytes>,
        ended: bool,
        answers: Vec<Bytes>,
    }

    impl StreamIo for TestIo {
        fn receive(&mut self) -> Option<Bytes> {
            self.messages.pop_front()
        }

        fn is_half_closed(&self) -> bool {
            self.ended && self.messages.is_empty()
        }

        fn can_send(&self) -> bool {
            true
        }

        fn send(&mut self, message: Bytes) {
            self.answers.push(message);
        }

        fn waker(&self) -> &Waker {
            Waker::noop()
        }
    }

    /// Sends each message back, and then ends.
    struct Echo;

    impl Conversation for Echo {
        fn step(&mut self, io: &mut dyn StreamIo) -> Step {
            while let Some(message) = io.receive() {
                io.send(message);
            }
            if io.is_half_closed() { Step::End(Ok(())) } else { Step::Wait }
        }
    }

    #[test]
    fn the_request_is_passed_on_after_the_half_close() {
        let (mut single, mut io) = (SingleRequest::new(Box::new(Echo)), TestIo::default());
        assert_eq!(single.step(&mut io), Step::Wait);
        io.messages.push_back("a".into());
        assert_eq!((single.step(&mut io), io.answers.len()), (Step::Wait, 0));
        io.ended = true;
        assert_eq!(single.step(&mut io), Step::End(Ok(())));
        assert_eq!(io.answers, ["a"]);
    }

    #[test]
    fn no_message_and_two_messages_are_errors() {
        for (messages, word) in [(&[][..], "no request message"), (&["a", "b"], "multiple request messages")] {
            let messages = messages.iter().map(|message| Bytes::from_static(message.as_bytes())).collect();
            let mut io = TestIo { messages, ended: true, answers: Vec::new() };
            let Step::End(Err(error)) = SingleRequest::new(Box::new(Echo)).step(&mut io) else {
                panic!("the call started")
            };
            assert_eq!(error.code, Code::Internal);
            assert!(error.message.contains(word), "{error:?}");
            assert!(io.answers.is_empty());
        }
    }
}
