//! The requests of a conversation: one that is known already, or those in a body, as they arrive.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use http_body::Body as _;

use super::{
    decode::{self, DecodeError},
    schema::{Schema, TypeId},
    values::{Values, too_large},
};
use http2::{
    call::{CallError, Code},
    ledger::{self, Charge},
};

/// What a client sends.
pub enum Requests {
    /// One message, unless it was received already.
    One(Option<Bytes>),
    Body(Box<BodyRequests>),
}

/// The messages in a body.
pub struct BodyRequests {
    body: Body,
    /// What has arrived and is not parsed yet.
    data: Bytes,
    values: Values,
    decoder: MessageDecoder,
    state: State,
    /// Why the call fails.
    error: Option<CallError>,
    /// What is held of the body.
    charge: Charge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Receiving,
    /// No message follows. What the client still sends is ignored: as in etcd, a stream that cannot be understood is as good as
    /// half-closed.
    Ended,
    /// The body is complete, too.
    Complete,
}

/// Decodes the requests of a method.
#[derive(Clone)]
pub struct MessageDecoder {
    pub schema: Arc<Schema>,
    pub request: TypeId,
    pub max_bytes: usize,
}

impl MessageDecoder {
    /// Decodes a JSON value.
    pub fn decode(&self, value: &[u8]) -> Result<Bytes, CallError> {
        match decode::decode(&self.schema, self.request, value, self.max_bytes) {
            Ok(message) if message.len() > self.max_bytes => Err(too_large(message.len(), self.max_bytes)),
            Ok(message) => Ok(message.into()),
            Err(DecodeError::TooLarge) => Err(too_large(value.len(), self.max_bytes)),
            Err(DecodeError::Invalid(message)) => {
                Err(CallError { code: Code::InvalidArgument, message: message.into() })
            }
        }
    }
}

impl BodyRequests {
    /// `charge` is for what is held.
    pub fn new(body: Body, values: Values, decoder: MessageDecoder, charge: Charge) -> Self {
        Self { body, data: Bytes::new(), values, decoder, state: State::Receiving, error: None, charge }
    }

    fn next(&mut self, context: &mut Context<'_>) -> Option<Bytes> {
        loop {
            if self.state == State::Receiving {
                match self.values.push(&mut self.data) {
                    Ok(Some(value)) => return self.decode(&value),
                    Ok(None) => (),
                    Err(error) => self.fail(error),
                }
            }
            self.data.clear();
            let held = self.values.held_bytes();
            if held > self.charge.bytes() && !self.charge.try_grow(held - self.charge.bytes()) {
                self.state = State::Ended;
                self.error = Some(ledger::request_over_limit());
            }
            if self.state == State::Complete {
                return None;
            }
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Pending => return None,
                Poll::Ready(Some(Ok(frame))) => self.data = frame.into_data().unwrap_or_default(),
                // The client is gone, or sends no HTTP.
                Poll::Ready(Some(Err(_))) => {
                    self.state = State::Complete;
                    self.error = Some(CallError { code: Code::Canceled, message: "context canceled".into() });
                }
                Poll::Ready(None) => {
                    let was_receiving = std::mem::replace(&mut self.state, State::Complete) == State::Receiving;
                    // What is cut off is ignored.
                    if was_receiving && let Ok(Some(value)) = self.values.end() {
                        return self.decode(&value);
                    }
                }
            }
        }
    }

    fn decode(&mut self, value: &[u8]) -> Option<Bytes> {
        self.charge.set(self.values.held_bytes());
        match self.decoder.decode(value) {
            Ok(message) => Some(message),
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// Ends the requests: silently, unless a message was too large.
    fn fail(&mut self, error: CallError) {
        if self.state == State::Receiving {
            self.state = State::Ended;
        }
        if error.code == Code::ResourceExhausted {
            self.error = Some(error);
        }
    }
}

impl Requests {
    /// The next message, if it has arrived.
    pub fn next(&mut self, context: &mut Context<'_>) -> Option<Bytes> {
        match self {
            Self::One(message) => message.take(),
            Self::Body(requests) => requests.next(context),
        }
    }

    /// Whether no more messages will arrive.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        match self {
            Self::One(message) => message.is_none(),
            Self::Body(requests) => requests.state != State::Receiving,
        }
    }

    /// Why the call fails, if it does.
    pub fn take_error(&mut self) -> Option<CallError> {
        match self {
            Self::One(_) => None,
            Self::Body(requests) => requests.error.take(),
        }
    }
}
