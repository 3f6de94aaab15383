//! What goes out on streams, as flow control allows (RFC 9113 §5.2).
//!
//! Nearly always both windows, the stream's and the connection's, have room for a whole message, and it is written at once.
//! What does not fit waits in its stream's queue. Streams that have something to send and a window of their own stand in
//! line for the connection's window, and send one frame in turn, so that a large answer does not keep small ones waiting.
//!
//! INVARIANTS
//! * Nothing overtakes on a stream: while a queue holds something, all that is new goes behind it.
//! * A queue holds at least one byte; what is empty is gone.
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
use crate::call::{Code, Refusal};

/// While so much waits for the socket, no frame is made that can wait.
pub const SATURATED_BYTES: usize = 256 << 10;
/// A conversation may have so much in its queue.
pub const MAX_QUEUED_BYTES: usize = 64 << 10;
/// A larger message is not packed on the connection's thread: that takes long.
const MAX_INLINE_COMPRESSION_BYTES: usize = 64 << 10;
/// Messages up to this size share a frame.
const MAX_COALESCED_BYTES: usize = 2 << 10;
/// A frame with less payload, though there would be more, is a crumb.
const TINY_FRAME_BYTES: usize = 256;

/// The sending side of one stream.
pub struct Outbound {
    /// How much the other side takes.
    pub window: i64,
    /// The content type of the answer to a call, if it is not the usual one.
    pub content_type: Option<Arc<[u8]>>,
    /// Whether its messages are packed.
    is_compressed: bool,
    /// Whether it is a unary call's: calls wait for what lies in the queues of calls.
    is_call: bool,
    stage: Stage,
    queue: Option<Box<Queue>>,
    /// It stands in the line for the connection's window.
    is_scheduled: bool,
}

/// What has gone out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    Nothing,
    /// The head.
    Begun,
    /// The end.
    Over,
    /// An end in the middle.
    Reset,
}

/// What waits for a window.
#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    ending: Option<Ending>,
}

/// How a stream ends.
#[derive(Debug, Clone)]
pub enum Ending {
    /// With the status of a call.
    Status(Result<(), Refusal>),
    /// With nothing but its end.
    Plain,
    /// In the middle, because whoever answered it failed.
    Broken,
    /// With these fields.
    Trailers(HeaderMap),
}

impl Outbound {
    /// Nothing is sent yet.
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

    /// Whether this message is to be packed, and too large for that to be done on the connection's thread.
    #[must_use]
    pub fn is_slow_to_compress(&self, message: &[u8]) -> bool {
        self.is_compressed && message.len() > MAX_INLINE_COMPRESSION_BYTES
    }

    /// Whether its end is out.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stage >= Stage::Over
    }

    /// Whether it ended in the middle, and the other side was told so.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.stage == Stage::Reset
    }

    /// Whether its end is out, or waits behind what is queued.
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
    /// What is to be written.
    pub output: Output,
    /// How fields are written.
    pub encoder: Encoder,
    /// How much the other side takes on all streams together.
    pub window: i64,
    /// The largest payload that the other side takes.
    pub max_payload: usize,
    /// What lies in all queues.
    pub held: usize,
    /// What the socket did not take when it was written to last.
    pub unwritten: usize,
    /// What lies in those of unary calls.
    pub held_of_calls: usize,
    /// Conversations and guests add nothing while so much is held.
    pub held_limit: usize,
    /// Everything that windows have let through.
    pub sent: u64,
    /// How many crumbs had to be sent.
    pub tiny_frames: u32,
    /// Streams that stand in line.
    scheduled: VecDeque<u64>,
    block: Vec<u8>,
    /// The frame of messages that was begun last.
    last: Option<LastFrame>,
}

/// A frame that may be at the end of the output, and then takes further messages of its stream.
#[derive(Debug, Clone, Copy)]
struct LastFrame {
    stream: u32,
    /// Where it begins.
    mark: Mark,
    /// Its payload, so far.
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
    /// Writes a frame that no window counts.
    pub fn control(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.output.push(&frame::head(payload.len(), kind, flags, stream));
        self.output.push(payload);
    }

    /// Ends a stream at once.
    pub fn reset(&mut self, id: u32, code: fault::Code) {
        self.control(kind::RST_STREAM, 0, id, &(code as u32).to_be_bytes());
    }

    /// Whether what could wait should.
    #[must_use]
    pub fn is_saturated(&self) -> bool {
        self.output.len() >= SATURATED_BYTES
    }

    /// Whether whoever can wait should, because too much is held.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held >= self.held_limit
    }

    /// Whether a conversation or a guest may add to what waits on its stream.
    #[must_use]
    pub fn can_send(&self, out: &Outbound) -> bool {
        out.queued() < MAX_QUEUED_BYTES && !self.is_saturated() && !self.is_full()
    }

    /// How much waits for windows and for the socket.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.held + self.output.len()
    }

    /// What counts of that. Of the output only what the socket has refused, or what is much: mostly all of it is written at
    /// once.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let output = self.output.len();
        self.held + output.saturating_sub(SATURATED_BYTES).max(self.unwritten.min(output))
    }

    /// Sends a gRPC message, and the head before the first one. A large one goes unpacked, and its prefix says so.
    pub fn message(&mut self, slot: u64, id: u32, out: &mut Outbound, message: Bytes) {
        if out.is_compressed && message.len() <= MAX_INLINE_COMPRESSION_BYTES {
            self.message_as_is(slot, id, out, message::compress(&message), true);
        } else {
            self.message_as_is(slot, id, out, message, false);
        }
    }

    /// The same with one that is packed already, or goes unpacked.
    pub fn message_as_is(&mut self, slot: u64, id: u32, out: &mut Outbound, message: Bytes, is_compressed: bool) {
        let Some(prefix) = message::prefix(message.len(), is_compressed) else {
            let text = format!("grpc: trying to send message larger than max ({} vs. {})", message.len(), u32::MAX);
            let refusal = Refusal { code: Code::ResourceExhausted, message: Cow::Owned(text) };
            return self.end(slot, id, out, Ending::Status(Err(refusal)));
        };
        self.response_headers(id, out);
        if self.fits(out, PREFIX_BYTES + message.len()) {
            self.write_message(id, out, prefix, message);
        } else {
            self.enqueue(slot, out, [Bytes::copy_from_slice(&prefix), message]);
        }
    }

    /// Sends bytes as they are.
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

    /// Ends a stream, behind everything that was sent on it.
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

    /// Sends the head of an ordinary answer, which may be all of it.
    pub fn head(&mut self, id: u32, out: &mut Outbound, response: &http::response::Parts, is_all: bool) {
        out.stage = if is_all { Stage::Over } else { Stage::Begun };
        self.begin_block();
        self.encoder.field(":status", response.status.as_str().as_bytes(), &mut self.block);
        self.fields(&response.headers);
        self.write_block(id, if is_all { flag::END_STREAM } else { 0 });
    }

    /// The window of a stream has grown, or what it depends on.
    pub fn window_changed(&mut self, slot: u64, out: &mut Outbound) {
        self.schedule(slot, out);
    }

    /// The next stream in line, if anything can be sent at all.
    pub fn next_scheduled(&mut self) -> Option<u64> {
        if self.is_saturated() || self.window <= 0 { None } else { self.scheduled.pop_front() }
    }

    /// Sends one frame of a stream whose turn it is. It stands in line again if there is more.
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

    /// Forgets what a stream still had to send.
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

    /// Whether so much can be sent now, before anything else on this stream.
    fn fits(&self, out: &Outbound, length: usize) -> bool {
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        out.queue.is_none() && length <= out.window && length <= self.window && !self.is_saturated()
    }

    /// So much of a queue is gone.
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

    /// A whole message, in as many frames as it takes.
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

    /// Adds a small message to the frame before it, if that is one of its stream: a client reads one frame faster than many.
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

    /// The fields that every answer to a call begins with.
    fn grpc_response_headers(&mut self, out: &Outbound) {
        match &out.content_type {
            None => self.encoder.head_of_answer(&mut self.block),
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

    fn status(&mut self, status: &Result<(), Refusal>) {
        match status {
            Ok(()) => self.encoder.end_of_answer(&mut self.block),
            Err(refusal) => {
                let code = (refusal.code as u8).to_string();
                self.encoder.field("grpc-status", code.as_bytes(), &mut self.block);
                let text = message::percent_encode(&refusal.message);
                self.encoder.field("grpc-message", text.as_bytes(), &mut self.block);
            }
        }
    }

    /// Refuses a request by its head alone, with an HTTP status of its own. Where that was for how it is packed, the client is told
    /// what is understood.
    pub fn refuse(&mut self, id: u32, out: &mut Outbound, status: u16, refusal: &Refusal, is_for_encoding: bool) {
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

    /// Writes the block, in as many frames as it takes.
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
    /// Moves so many bytes from the front to the output.
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
