//! A call that is a conversation: a stream, or a unary call that may wait for long.
//!
//! Its owner polls it for one message after another. To be polled means that a message can be sent, so nothing is buffered.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use tokio::{sync::OwnedSemaphorePermit, time::Sleep};

use super::requests::Requests;
use crate::{error::Error, frontend::grpc::methods::GrpcMethod};
use http2::{
    call::{CallError, Code, Conversation, Step, StreamIo},
    ledger::{Charge, Ledger},
    service::Method,
};

/// A conversation in progress.
pub struct ConversationCall {
    method: Arc<GrpcMethod>,
    /// None: it has ended.
    conversation: Option<Box<dyn Conversation>>,
    requests: Requests,
    deadline: Option<Pin<Box<Sleep>>>,
    /// How it has ended, while its last message is being sent.
    end: Option<Result<(), CallError>>,
    ledger: Arc<Ledger>,
    /// What the conversation holds.
    charge: Charge,
    max_held_bytes: usize,
    /// Calls in progress are limited.
    _permit: OwnedSemaphorePermit,
}

impl ConversationCall {
    pub fn new(
        method: Arc<GrpcMethod>,
        conversation: Box<dyn Conversation>,
        requests: Requests,
        deadline: Option<std::time::Instant>,
        (ledger, max_held_bytes): (Arc<Ledger>, usize),
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            method,
            conversation: Some(conversation),
            requests,
            deadline: deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into()))),
            end: None,
            charge: ledger.charge(0),
            ledger,
            max_held_bytes,
            _permit: permit,
        }
    }

    /// The next message; None at the end.
    pub fn poll_message(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, CallError>> {
        let Some(conversation) = &mut self.conversation else {
            return Poll::Ready(self.end.take().unwrap_or(Ok(())).map(|()| None));
        };
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(self.finish(Err(Error::DeadlineExceeded.into())));
        }
        let spare = self.max_held_bytes.min(self.ledger.limit().saturating_sub(self.ledger.held()));
        let mut io =
            PollIo { context, requests: &mut self.requests, method: &self.method, message: None, spare_bytes: spare };
        let step = conversation.step(&mut io);
        let message = io.message.take();
        self.charge.set(conversation.held_bytes());
        if let Some(error) = self.requests.take_error() {
            return Poll::Ready(self.finish(Err(error)));
        }
        match (message, step) {
            (None, Step::Wait) => Poll::Pending,
            (None, Step::End(end)) => Poll::Ready(self.finish(end)),
            (Some(message), step) => {
                if let Step::End(end) = step {
                    self.close(&end);
                    self.end = Some(end);
                }
                Poll::Ready(Ok(Some(message)))
            }
        }
    }

    fn finish(&mut self, end: Result<(), CallError>) -> Result<Option<Bytes>, CallError> {
        self.close(&end);
        end.map(|()| None)
    }

    fn close(&mut self, end: &Result<(), CallError>) {
        if self.conversation.take().is_some() {
            self.charge.set(0);
            self.method.handled(end.as_ref().map_or_else(|error| error.code, |()| Code::Ok));
        }
    }
}

impl Drop for ConversationCall {
    fn drop(&mut self) {
        if self.conversation.is_some() {
            self.method.handled(Code::Canceled);
        }
    }
}

/// Both directions of a conversation, during one step.
struct PollIo<'a, 'b> {
    context: &'a mut Context<'b>,
    requests: &'a mut Requests,
    method: &'a GrpcMethod,
    message: Option<Bytes>,
    spare_bytes: usize,
}

impl StreamIo for PollIo<'_, '_> {
    fn receive(&mut self) -> Option<Bytes> {
        let message = self.requests.next(self.context)?;
        self.method.received(message.len());
        Some(message)
    }

    fn is_half_closed(&self) -> bool {
        self.requests.is_ended()
    }

    fn can_send(&self) -> bool {
        self.message.is_none()
    }

    fn send(&mut self, message: Bytes) {
        assert!(self.message.is_none(), "conversations check can_send before they send");
        self.method.sent(message.len());
        self.message = Some(message);
    }

    fn spare_bytes(&self) -> usize {
        self.spare_bytes
    }

    fn waker(&self) -> &Waker {
        self.context.waker()
    }
}
