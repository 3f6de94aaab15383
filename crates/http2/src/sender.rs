//! Outgoing frames of streams, within flow control (RFC 9113 §5.2).
//!
//! Nearly always both windows, the stream's and the connection's, have room for a whole message, and it is written at once. What
//! does not fit waits in the queue of its stream. Streams that have data to send and an open window of their own wait in a
//! round-robin queue for the connection's window and send one frame per turn, so that a large response does not delay small ones.
//!
//! INVARIANTS
//! * Frames of a stream are never reordered: while its queue is not empty, everything new is appended to the queue.
//! * A queue holds at least one byte; an empty queue is removed.
//! * `held` is the sum of all queues.

use std::{borrow::Cow, collections::VecDeque, sync::Arc};

use bytes::Bytes;
use http::HeaderMap;

use super::{
    fault,
    frame::{self, DEFAULT_WINDOW, MAX_PAYLOAD, flag, kind},
    hpack::Encoder,
    message::{self, PREFIX_BYTES},
    output::{Mark, Output},
};
use crate::call::{CallError, Code};

/// While at least this much waits for the socket, no frame is produced that can wait.
pub const SATURATED_BYTES: usize = 256 << 10;
/// The limit of a stream's queue for conversations and HTTP handlers.
pub const MAX_QUEUED_BYTES: usize = 64 << 10;
/// Larger messages are not compressed on the connection's thread: it takes too long.
const MAX_INLINE_COMPRESSION_BYTES: usize = 64 << 10;
/// Messages up to this size share a frame.
const MAX_COALESCED_BYTES: usize = 2 << 10;
/// A frame with less payload than this, although more was queued, counts as tiny.
const TINY_FRAME_BYTES: usize = 256;

/// The sending side of a stream.
pub struct Outbound {
    /// The stream's send window.
    pub window: i64,
    /// The content type of a gRPC response, if it is not the default.
    pub content_type: Option<Arc<[u8]>>,
    /// Whether messages are compressed.
    is_compressed: bool,
    /// Whether the stream is a unary call: new calls wait while too much is queued for calls.
    is_call: bool,
    stage: Stage,
    queue: Option<Box<Queue>>,
    /// The stream is in the round-robin queue.
    is_scheduled: bool,
}

/// What has been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    Nothing,
    /// The response headers.
    Begun,
    /// The end of the stream.
    Over,
    /// A reset before the end.
    Reset,
}

/// Data that waits for a window.
#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    ending: Option<Ending>,
}

/// How a stream ends.
#[derive(Debug, Clone)]
pub enum Ending {
    /// With a gRPC status.
    Status(Result<(), CallError>),
    /// With an empty frame that has `END_STREAM` set.
    Plain,
    /// With a reset, because the handler failed.
    Broken,
    /// With these trailers.
    Trailers(HeaderMap),
}

impl Outbound {
    #[must_use]
    pub fn new(window: i64, is_compressed: bool, is_call: bool) -> Self {
        Self {
            window,
            content_type: None,
            is_compressed,
            is_call,
            stage: Stage::Nothing,
            queue: None,
            is_scheduled: false,
        }
    }

    /// How many bytes wait for a window.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.bytes)
    }

    /// Whether this message has to be compressed and is too large for the connection's thread.
    #[must_use]
    pub fn is_slow_to_compress(&self, message: &[u8]) -> bool {
        self.is_compressed && message.len() > MAX_INLINE_COMPRESSION_BYTES
    }

    /// Whether the end of the stream has been sent.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stage >= Stage::Over
    }

    /// Whether the stream was reset before its end.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.stage == Stage::Reset
    }

    /// Whether the end has been sent or is queued.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.is_over() || self.queue.as_ref().is_some_and(|queue| queue.ending.is_some())
    }

    fn is_sendable(&self) -> bool {
        self.queue.is_some() && self.window > 0
    }
}

/// The sending side of a connection.
pub struct Sender {
    /// What is to be written to the socket.
    pub output: Output,
    pub encoder: Encoder,
    /// The connection's send window.
    pub window: i64,
    /// The largest payload that the client accepts.
    pub max_payload: usize,
    /// Bytes in all queues.
    pub held: usize,
    /// Bytes that the socket did not accept at the last write.
    pub unwritten: usize,
    /// Bytes in the queues of unary calls.
    pub held_of_calls: usize,
    /// Conversations and HTTP handlers send nothing while this much is held.
    pub held_limit: usize,
    /// All bytes that the windows have let through.
    pub sent: u64,
    /// How many tiny frames had to be sent.
    pub tiny_frames: u32,
    /// Streams that wait for the connection's window, in order.
    scheduled: VecDeque<u64>,
    block: Vec<u8>,
    /// The last frame of messages that was started.
    last: Option<LastFrame>,
}

/// A frame that may still be the end of the output, and can then take further messages of its stream.
#[derive(Debug, Clone, Copy)]
struct LastFrame {
    stream: u32,
    /// Where the frame starts.
    mark: Mark,
    /// The length of its payload so far.
    length: usize,
}

impl Default for Sender {
    fn default() -> Self {
        Self {
            output: Output::default(),
            encoder: Encoder::default(),
            window: DEFAULT_WINDOW,
            max_payload: MAX_PAYLOAD,
            held: 0,
            unwritten: 0,
            held_of_calls: 0,
            held_limit: usize::MAX,
            sent: 0,
            tiny_frames: 0,
            scheduled: VecDeque::new(),
            block: Vec::new(),
            last: None,
        }
    }
}

impl Sender {
    /// Writes a frame that is not subject to flow control.
    pub fn control(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.output.push(&frame::head(payload.len(), kind, flags, stream));
        self.output.push(payload);
    }

    /// Resets a stream.
    pub fn reset(&mut self, id: u32, code: fault::Code) {
        self.control(kind::RST_STREAM, 0, id, &(code as u32).to_be_bytes());
    }

    /// Whether so much output is waiting that everything that can wait should.
    #[must_use]
    pub fn is_saturated(&self) -> bool {
        self.output.len() >= SATURATED_BYTES
    }

    /// Whether conversations and HTTP handlers have to wait because too much is held.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held >= self.held_limit
    }

    /// Whether a conversation or an HTTP handler may send more on its stream.
    #[must_use]
    pub fn can_send(&self, out: &Outbound) -> bool {
        out.queued() < MAX_QUEUED_BYTES && !self.is_saturated() && !self.is_full()
    }

    /// Bytes that wait for windows and for the socket.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.held + self.output.len()
    }

    /// How much of the backlog is counted as held. Output counts only if the socket refused it, or above [`SATURATED_BYTES`]:
    /// usually all of it is written at once.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let output = self.output.len();
        self.held + output.saturating_sub(SATURATED_BYTES).max(self.unwritten.min(output))
    }

    /// Sends a gRPC message, preceded by the response headers if it is the first. A large message is sent uncompressed, and its
    /// prefix says so.
    pub fn message(&mut self, slot: u64, id: u32, out: &mut Outbound, message: Bytes) {
        if out.is_compressed && message.len() <= MAX_INLINE_COMPRESSION_BYTES {
            self.message_as_is(slot, id, out, message::compress(&message), true);
        } else {
            self.message_as_is(slot, id, out, message, false);
        }
    }

    /// Sends a message that is already compressed, or that is sent uncompressed.
    pub fn message_as_is(&mut self, slot: u64, id: u32, out: &mut Outbound, message: Bytes, is_compressed: bool) {
        let Some(prefix) = message::prefix(message.len(), is_compressed) else {
            let text = format!("grpc: trying to send message larger than max ({} vs. {})", message.len(), u32::MAX);
            let refusal = CallError { code: Code::ResourceExhausted, message: Cow::Owned(text) };
            return self.end(slot, id, out, Ending::Status(Err(refusal)));
        };
        self.response_headers(id, out);
        if self.fits(out, PREFIX_BYTES + message.len()) {
            self.write_message(id, out, prefix, message);
        } else {
            self.enqueue(slot, out, [Bytes::copy_from_slice(&prefix), message]);
        }
    }

    /// Sends raw bytes.
    pub fn data(&mut self, slot: u64, id: u32, out: &mut Outbound, data: Bytes) {
        if data.is_empty() {
            return;
        }
        if data.len() <= self.max_payload && self.fits(out, data.len()) {
            self.spend(out, data.len());
            self.output.push(&frame::head(data.len(), kind::DATA, 0, id));
            self.output.attach(data);
        } else {
            self.enqueue(slot, out, [data]);
        }
    }

    /// Ends a stream after everything that was sent on it.
    pub fn end(&mut self, slot: u64, id: u32, out: &mut Outbound, ending: Ending) {
        if out.is_ending() {
            return;
        }
        match &mut out.queue {
            Some(queue) => {
                queue.ending = Some(ending);
                self.schedule(slot, out);
            }
            None => self.write_end(id, out, ending),
        }
    }

    /// Sends the headers of an HTTP response. `is_all` if there is no body.
    pub fn head(&mut self, id: u32, out: &mut Outbound, response: &http::response::Parts, is_all: bool) {
        out.stage = if is_all { Stage::Over } else { Stage::Begun };
        self.begin_block();
        self.encoder.field(":status", response.status.as_str().as_bytes(), &mut self.block);
        self.fields(&response.headers);
        self.write_block(id, if is_all { flag::END_STREAM } else { 0 });
    }

    /// Must be called after the window of a stream has changed.
    pub fn window_changed(&mut self, slot: u64, out: &mut Outbound) {
        self.schedule(slot, out);
    }

    /// The next stream that may send a frame, if anything can be sent at all.
    pub fn next_scheduled(&mut self) -> Option<u64> {
        if self.is_saturated() || self.window <= 0 { None } else { self.scheduled.pop_front() }
    }

    /// Sends one frame of a stream. If more is left, the stream is scheduled again.
    pub fn send_frame(&mut self, slot: u64, id: u32, out: &mut Outbound) {
        out.is_scheduled = false;
        let Some(queue) = &mut out.queue else { return };
        let allowed = usize::try_from(out.window.min(self.window)).unwrap_or(0);
        let length = queue.bytes.min(self.max_payload).min(allowed);
        if length > 0 {
            self.tiny_frames += u32::from(length < TINY_FRAME_BYTES && length < queue.bytes);
            self.output.push(&frame::head(length, kind::DATA, 0, id));
            queue.write(length, &mut self.output);
            self.release(out, length);
            self.spend(out, length);
        }
        if let Some(queue) = out.queue.take_if(|queue| queue.bytes == 0)
            && let Some(ending) = queue.ending
        {
            return self.write_end(id, out, ending);
        }
        self.schedule(slot, out);
    }

    /// Drops what a stream still had to send.
    pub fn abandon(&mut self, out: &mut Outbound) {
        self.release(out, out.queued());
        out.queue = None;
        out.stage = Stage::Over;
    }

    fn schedule(&mut self, slot: u64, out: &mut Outbound) {
        if !out.is_scheduled && out.is_sendable() {
            out.is_scheduled = true;
            self.scheduled.push_back(slot);
        }
    }

    /// Whether so many bytes can be sent at once, with nothing of the stream queued before them.
    fn fits(&self, out: &Outbound, length: usize) -> bool {
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        out.queue.is_none() && length <= out.window && length <= self.window && !self.is_saturated()
    }

    /// So many bytes of a queue are gone.
    fn release(&mut self, out: &Outbound, length: usize) {
        self.held -= length;
        self.held_of_calls -= if out.is_call { length } else { 0 };
    }

    fn spend(&mut self, out: &mut Outbound, length: usize) {
        self.sent += length as u64;
        let length = i64::try_from(length).expect("windows have 31 bits");
        out.window -= length;
        self.window -= length;
    }

    fn enqueue<const N: usize>(&mut self, slot: u64, out: &mut Outbound, pieces: [Bytes; N]) {
        let queue = out.queue.get_or_insert_default();
        for piece in pieces {
            queue.bytes += piece.len();
            self.held += piece.len();
            self.held_of_calls += if out.is_call { piece.len() } else { 0 };
            queue.pieces.push_back(piece);
        }
        self.schedule(slot, out);
    }

    /// Writes a whole message, in as many frames as needed.
    fn write_message(&mut self, id: u32, out: &mut Outbound, prefix: [u8; PREFIX_BYTES], mut message: Bytes) {
        self.spend(out, PREFIX_BYTES + message.len());
        if self.extend_last(id, prefix, &message) {
            return;
        }
        let length = PREFIX_BYTES + message.len();
        self.last = (length < MAX_COALESCED_BYTES).then(|| LastFrame { stream: id, mark: self.output.mark(), length });
        let first = message.split_to(message.len().min(self.max_payload - PREFIX_BYTES));
        self.output.push(&frame::head(PREFIX_BYTES + first.len(), kind::DATA, 0, id));
        self.output.push(&prefix);
        self.output.attach(first);
        while !message.is_empty() {
            let next = message.split_to(message.len().min(self.max_payload));
            self.output.push(&frame::head(next.len(), kind::DATA, 0, id));
            self.output.attach(next);
        }
    }

    /// Appends a small message to the previous frame if that belongs to the same stream: a client reads one frame faster than
    /// many.
    fn extend_last(&mut self, id: u32, prefix: [u8; PREFIX_BYTES], message: &[u8]) -> bool {
        let Some(last) = &mut self.last else { return false };
        let length = last.length + PREFIX_BYTES + message.len();
        if last.stream != id || message.len() >= MAX_COALESCED_BYTES || length > self.max_payload {
            return false;
        }
        let is_last = |frame: &&mut [u8]| frame.len() == frame::HEAD_BYTES + last.length;
        let Some(frame) = self.output.since(last.mark).filter(is_last) else { return false };
        frame[..frame::HEAD_BYTES].copy_from_slice(&frame::head(length, kind::DATA, 0, id));
        last.length = length;
        self.output.push(&prefix);
        self.output.push(message);
        true
    }

    fn response_headers(&mut self, id: u32, out: &mut Outbound) {
        if out.stage != Stage::Nothing {
            return;
        }
        out.stage = Stage::Begun;
        self.begin_block();
        self.grpc_response_headers(out);
        if out.is_compressed {
            self.encoder.field("grpc-encoding", b"gzip", &mut self.block);
        }
        self.write_block(id, 0);
    }

    /// The fields that every gRPC response starts with.
    fn grpc_response_headers(&mut self, out: &Outbound) {
        match &out.content_type {
            None => self.encoder.grpc_response_headers(&mut self.block),
            Some(content_type) => {
                self.encoder.field(":status", b"200", &mut self.block);
                self.encoder.field("content-type", content_type, &mut self.block);
            }
        }
    }

    fn write_end(&mut self, id: u32, out: &mut Outbound, ending: Ending) {
        let is_begun = std::mem::replace(&mut out.stage, Stage::Over) != Stage::Nothing;
        match ending {
            Ending::Plain => return self.control(kind::DATA, flag::END_STREAM, id, &[]),
            Ending::Broken => {
                out.stage = Stage::Reset;
                return self.reset(id, fault::Code::Internal);
            }
            Ending::Status(status) => {
                self.begin_block();
                if !is_begun {
                    self.grpc_response_headers(out);
                }
                self.status(&status);
            }
            Ending::Trailers(trailers) => {
                self.begin_block();
                self.fields(&trailers);
            }
        }
        self.write_block(id, flag::END_STREAM);
    }

    fn status(&mut self, status: &Result<(), CallError>) {
        match status {
            Ok(()) => self.encoder.ok_trailers(&mut self.block),
            Err(refusal) => {
                let code = (refusal.code as u8).to_string();
                self.encoder.field("grpc-status", code.as_bytes(), &mut self.block);
                let text = message::percent_encode(&refusal.message);
                self.encoder.field("grpc-message", text.as_bytes(), &mut self.block);
            }
        }
    }

    /// Refuses a request with a headers-only response and an HTTP status. If the reason was an unknown compression, the response
    /// lists the supported one.
    pub fn refuse(&mut self, id: u32, out: &mut Outbound, status: u16, refusal: &CallError, is_for_encoding: bool) {
        out.stage = Stage::Over;
        self.begin_block();
        self.encoder.field(":status", status.to_string().as_bytes(), &mut self.block);
        let content_type = out.content_type.as_deref().unwrap_or(b"application/grpc");
        self.encoder.field("content-type", content_type, &mut self.block);
        if is_for_encoding {
            self.encoder.field("grpc-accept-encoding", b"gzip", &mut self.block);
        }
        self.status(&Err(refusal.clone()));
        self.write_block(id, flag::END_STREAM);
    }

    fn fields(&mut self, fields: &HeaderMap) {
        for (name, value) in fields {
            self.encoder.field(name.as_str(), value.as_bytes(), &mut self.block);
        }
    }

    fn begin_block(&mut self) {
        self.block.clear();
        self.encoder.begin(&mut self.block);
    }

    /// Writes the header block, in as many frames as needed.
    fn write_block(&mut self, id: u32, flags: u8) {
        let block = std::mem::take(&mut self.block);
        let (first, mut rest) = block.split_at(block.len().min(self.max_payload));
        let complete = |rest: &[u8]| if rest.is_empty() { flag::END_HEADERS } else { 0 };
        self.control(kind::HEADERS, flags | complete(rest), id, first);
        while !rest.is_empty() {
            let (next, behind) = rest.split_at(rest.len().min(self.max_payload));
            rest = behind;
            self.control(kind::CONTINUATION, complete(rest), id, next);
        }
        self.block = block;
    }
}

impl Queue {
    /// Moves so many bytes from the front of the queue to the output.
    fn write(&mut self, mut length: usize, output: &mut Output) {
        self.bytes -= length;
        while length > 0 {
            let mut piece = self.pieces.pop_front().expect("the pieces are as long as `bytes` says");
            if piece.len() > length {
                self.pieces.push_front(piece.split_off(length));
            }
            length -= piece.len();
            output.attach(piece);
        }
    }
}
