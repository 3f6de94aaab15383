//! What handles a stream: a method of one kind or the other, or the HTTP service.

use std::time::Instant;

use bytes::Bytes;

use super::{http_handler::HttpHandler, stream_handler::StreamHandler};

/// What handles a stream, and its progress.
pub enum Handler {
    /// A unary call whose message has not arrived.
    AwaitingMessage,
    /// A unary call whose message has arrived, and whose method has not been called.
    Ready(ReadyCall),
    /// A unary call that waits for its response.
    Called {
        /// When its message arrived.
        since: Instant,
        /// The size of its message.
        bytes: usize,
    },
    /// A unary call whose response is being compressed.
    Compressing,
    /// A streaming call.
    Stream(Box<StreamHandler>),
    /// A request to the HTTP service.
    Http(Box<HttpHandler>),
    /// Nothing any more: the response is complete and may still be queued.
    Answered,
}

/// The message of a unary call whose method has not been called.
pub struct ReadyCall {
    /// As it arrived.
    pub message: Bytes,
    /// Whether it has to be decompressed.
    pub is_compressed: bool,
    /// It is a copy, and keeps no larger read buffer alive.
    pub is_copy: bool,
    /// When it arrived.
    pub since: Instant,
}
