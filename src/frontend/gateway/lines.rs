//! The body of an answer with many messages: one line for each, and one for an error at the end.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame};

use super::{
    conversation::ConversationCall,
    encode, error,
    schema::{Schema, TypeId},
};
use http2::{
    call::CallError,
    ledger::{self, Charge},
};

/// A line is passed on in pieces of this size, of which the connection buffers no more than one or two.
const PIECE_BYTES: usize = 32 << 10;

/// The lines of a call.
pub struct Lines {
    /// None: the last line is being sent.
    call: Option<ConversationCall>,
    encoder: LineEncoder,
    /// What is left of the current line.
    rest: Bytes,
    charge: Charge,
}

/// Encodes the responses of a method.
pub struct LineEncoder {
    pub schema: Arc<Schema>,
    pub response: TypeId,
}

/// How a call has begun.
pub enum Beginning {
    /// With a message.
    Message(Lines),
    /// It ended without any.
    End,
    /// It failed without any.
    Error(CallError),
}

impl Lines {
    /// Waits for the first message or the end. `charge` is for what is held.
    pub async fn begin(mut call: ConversationCall, encoder: LineEncoder, charge: Charge) -> Beginning {
        match std::future::poll_fn(|context| call.poll_message(context)).await {
            Ok(Some(message)) => {
                let mut lines = Self { call: Some(call), encoder, rest: Bytes::new(), charge };
                lines.set_line(&message);
                Beginning::Message(lines)
            }
            Ok(None) => Beginning::End,
            Err(error) => Beginning::Error(error),
        }
    }

    fn set_line(&mut self, message: &[u8]) {
        let (encoder, charge) = (&self.encoder, &mut self.charge);
        charge.set(message.len());
        let line = encode::encode_line(&encoder.schema, encoder.response, message, &mut |more| charge.try_grow(more));
        match line {
            Ok(line) => {
                charge.set(line.len());
                self.rest = line.into();
            }
            Err(encode::OverLimit) => self.set_error(&ledger::response_over_limit()),
        }
    }

    fn set_error(&mut self, error: &CallError) {
        self.call = None;
        self.rest = error::line(error).into();
        self.charge.set(self.rest.len());
    }
}

impl Body for Lines {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.rest.is_empty() {
            self.charge.set(0);
            let Some(call) = &mut self.call else { return Poll::Ready(None) };
            match ready!(call.poll_message(context)) {
                Ok(Some(message)) => self.set_line(&message),
                Ok(None) => {
                    self.call = None;
                    return Poll::Ready(None);
                }
                Err(error) => self.set_error(&error),
            }
        }
        let length = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }
}
