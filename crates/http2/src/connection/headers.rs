//! Opening and closing of streams: header blocks, in one frame or several, and what happens to a request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;

use super::{Block, Connection, Phase};
use crate::{
    call::{Code as Status, Metadata},
    closed_streams::ClosedBy,
    fault::{Code, Fault},
    handler::Handler,
    http_handler::HttpHandler,
    ledger,
    limits::{self, Flood, MAX_BLOCK_FRAMES, MAX_STREAMS, STREAM_BYTES},
    outbox::StreamWaker,
    request::{self, Refused, Request, Target},
    request_body::BodySender,
    sender::{Ending, Outbound},
    service::{Method, Shape},
    stream_handler::StreamHandler,
    streams::{Inbound, Stream},
};

/// How long a client may take to end a stream whose response is complete.
const LINGER: Duration = Duration::from_secs(1);

/// A call with a shorter timeout has expired on arrival.
const MIN_TIMEOUT: Duration = Duration::from_micros(1);

impl Connection {
    /// The first frame of a header block, and usually all of it.
    pub(super) fn headers(
        &mut self,
        stream: u32,
        block: &[u8],
        end: bool,
        complete: bool,
        depends_on_itself: bool,
        now: Instant,
    ) -> Result<(), Fault> {
        if complete {
            return self.block(stream, block, end, depends_on_itself, now);
        }
        self.timers.begin_block(now);
        self.block = Some(Block { stream, end, depends_on_itself, bytes: BytesMut::from(block), frames: 1 });
        Ok(())
    }

    /// A CONTINUATION frame of a header block.
    pub(super) fn continuation(&mut self, more: &[u8], complete: bool, now: Instant) -> Result<(), Fault> {
        let max_bytes = self.limits().max_header_list;
        let Some(block) = &mut self.block else {
            return Err(Fault::connection(Code::Protocol, "CONTINUATION without HEADERS"));
        };
        block.frames += 1;
        block.bytes.extend_from_slice(more);
        if block.bytes.len() > max_bytes || block.frames > MAX_BLOCK_FRAMES {
            limits::count_refusal("continuation");
            return Err(Fault::connection(Code::EnhanceYourCalm, "too many or too large CONTINUATION frames"));
        }
        if complete && let Some(block) = self.block.take() {
            self.timers.end_block();
            return self.block(block.stream, &block.bytes, block.end, block.depends_on_itself, now);
        }
        Ok(())
    }

    /// A whole block: a new stream, or the trailers of an open one.
    fn block(&mut self, id: u32, block: &[u8], end: bool, depends_on_itself: bool, now: Instant) -> Result<(), Fault> {
        if id.is_multiple_of(2) {
            return Err(Fault::connection(Code::Protocol, "stream ID of a client must be odd"));
        }
        if id <= self.highest {
            return self.block_of_known_stream(id, block, end);
        }
        self.highest = id;
        if !self.accepts(id) {
            return self.decode(block); // The dynamic table has to stay in sync.
        }
        let request = self.parse_request(id, block)?;
        if depends_on_itself {
            return Err(Fault::stream(id, Code::Protocol, "stream depends on itself"));
        }
        if self.streams.len() >= self.limits().max_streams.min(MAX_STREAMS) as usize {
            limits::count_refusal("streams");
            return Err(Fault::stream(id, Code::RefusedStream, "too many streams"));
        }
        if !self.admits(STREAM_BYTES + request.weight) {
            self.refuse_unopened(id, end);
            return Ok(());
        }
        let slot = self.open(id, request, now);
        if end { self.end_stream(slot, id) } else { Ok(()) }
    }

    /// Decodes a request. A block is decoded even if its stream will be refused, because the dynamic table has to stay in sync.
    fn parse_request(&mut self, id: u32, block: &[u8]) -> Result<Arc<Request>, Fault> {
        if let Some(request) = self.block_cache.get(block, self.decoder.table_changes()) {
            return Ok(request.clone());
        }
        self.decode(block)?;
        let request = request::read(&self.fields, &*self.service)
            .map_err(|request::Malformed(why)| Fault::stream(id, Code::Protocol, why))?;
        let request = Arc::new(request);
        if self.fields.only_indexed() {
            self.block_cache.insert(block, &request, self.decoder.table_changes());
        }
        Ok(request)
    }

    fn decode(&mut self, block: &[u8]) -> Result<(), Fault> {
        let max_list = self.shared.limits.max_header_list;
        let read = self.decoder.decode(block, max_list, &mut self.fields);
        read.map_err(|malformed| Fault::connection(Code::Compression, malformed.0))
    }

    /// A block for a stream that was opened before.
    fn block_of_known_stream(&mut self, id: u32, block: &[u8], end: bool) -> Result<(), Fault> {
        self.decode(block)?;
        let Some(slot) = self.streams.find(id) else {
            return match self.closed_streams.find(id) {
                Some(ClosedBy::Server) => self.count(Flood::Stray, self.now),
                _ if !self.accepts(id) => self.count(Flood::Stray, self.now),
                Some(ClosedBy::Client) => Err(Fault::connection(Code::StreamClosed, "HEADERS on a closed stream")),
                None => Err(Fault::connection(Code::Protocol, "stream ID lower than earlier ones")),
            };
        };
        let stream = self.streams.get(slot).expect("it was found a moment ago");
        if stream.inbound.ended {
            return Err(Fault::stream(id, Code::StreamClosed, "HEADERS after END_STREAM"));
        }
        if !end {
            return Err(Fault::stream(id, Code::Protocol, "trailers without END_STREAM"));
        }
        request::check_trailers(&self.fields)
            .map_err(|request::Malformed(why)| Fault::stream(id, Code::Protocol, why))?;
        if let Handler::Http(_) = stream.handler {
            self.forward_trailers(slot, id)?;
        }
        self.end_stream(slot, id)
    }

    /// Passes the trailers of a plain HTTP request to its handler.
    fn forward_trailers(&mut self, slot: u64, id: u32) -> Result<(), Fault> {
        let read = request::trailers(&self.fields);
        let (trailers, weight) = read.map_err(|request::Malformed(why)| Fault::stream(id, Code::Protocol, why))?;
        if !self.admits(weight) {
            limits::count_refusal("held_bytes");
            return Err(Fault::stream(id, Code::EnhanceYourCalm, "too many bytes held to accept trailers"));
        }
        if let Some(stream) = self.streams.get(slot)
            && let Handler::Http(http_handler) = &stream.handler
        {
            http_handler.body_sender().set_trailers(trailers);
            stream.weight += weight;
            self.held_in += weight;
        }
        Ok(())
    }

    /// Opens a stream and starts its handler.
    fn open(&mut self, id: u32, request: Arc<Request>, now: Instant) -> u64 {
        let deadline = request.timeout.and_then(|timeout| now.checked_add(timeout));
        if let Some(deadline) = deadline {
            self.timers.schedule_deadline(deadline);
        }
        let is_compressed = request.compresses_responses;
        let is_call = matches!(&request.target, Target::Method(method) if method.shape() == Shape::Unary);
        let weight = STREAM_BYTES + request.weight;
        let mut outbound = Outbound::new(self.initial_window, is_compressed, is_call);
        outbound.content_type.clone_from(&request.content_type);
        let slot = self.streams.insert(Stream {
            id,
            request: request.clone(),
            deadline,
            inbound: Inbound::default(),
            outbound,
            handler: Handler::AwaitingMessage,
            is_due: false,
            is_stalled: false,
            weight,
            kept: 0,
        });
        self.held_in += weight;
        match &request.target {
            _ if request.timeout.is_some_and(|timeout| timeout < MIN_TIMEOUT) => {
                self.refuse_request(slot, &Refused::expired());
            }
            Target::Method(method) => {
                method.started();
                if method.shape() == Shape::Stream {
                    let connection = self.info.clone();
                    let metadata = Metadata { deadline, connection, ..request.metadata.clone() };
                    self.start_stream_handler(slot, method, metadata);
                }
            }
            Target::Http(parts) => self.start_http_handler(slot, (**parts).clone()),
            Target::Refused(refused) => self.refuse_request(slot, refused),
        }
        slot
    }

    /// Refuses a request for which there is no room, without keeping anything of it.
    fn refuse_unopened(&mut self, id: u32, end: bool) {
        let mut out = Outbound::new(0, false, false);
        self.sender.refuse(id, &mut out, 200, &ledger::request_over_limit(), false);
        if !end {
            self.sender.reset(id, Code::NoError);
        }
        self.closed_streams.remember(id, if end { ClosedBy::Client } else { ClosedBy::Server }, self.now);
    }

    /// Refuses a request because of its headers.
    fn refuse_request(&mut self, slot: u64, refused: &Refused) {
        let stream = self.streams.get(slot).expect("it was just added");
        limits::count_refusal(refused.reason);
        stream.handler = Handler::Answered;
        let is_for_encoding = refused.reason == "encoding";
        self.sender.refuse(stream.id, &mut stream.outbound, refused.status, &refused.refusal, is_for_encoding);
        self.due.push_back(slot); // Whether the client has ended it is known once this read is parsed.
    }

    fn start_stream_handler(&mut self, slot: u64, method: &Arc<dyn Method>, metadata: Metadata) {
        let opened = method.open(metadata);
        let stream = self.streams.get(slot).expect("it was just added");
        match opened {
            Ok(conversation) => {
                let stream_waker = StreamWaker::new(self.outbox.clone(), slot);
                stream.handler =
                    Handler::Stream(Box::new(StreamHandler::new(conversation, method.clone(), stream_waker)));
                self.make_due(slot);
            }
            Err(refusal) => {
                method.handled(refusal.code);
                stream.handler = Handler::Answered;
                self.sender.end(slot, stream.id, &mut stream.outbound, Ending::Status(Err(refusal)));
                self.due.push_back(slot);
            }
        }
    }

    /// The request gets what is attached to the connection, as an extension.
    fn start_http_handler(&mut self, slot: u64, mut parts: http::request::Parts) {
        let (body_sender, body) = BodySender::new();
        if let Some(info) = &self.info {
            parts.extensions.insert(info.clone());
        }
        let response = self.service.handle_http(http::Request::from_parts(parts, body));
        let stream_waker = StreamWaker::new(self.outbox.clone(), slot);
        let stream = self.streams.get(slot).expect("it was just added");
        stream.handler = Handler::Http(Box::new(HttpHandler::new(response, body_sender, stream_waker)));
        self.make_due(slot);
    }

    /// Removes a stream whose response is no longer wanted.
    pub(super) fn abandon(&mut self, slot: u64, closed_by: ClosedBy) {
        let Some(mut stream) = self.streams.remove(slot) else { return };
        if let (
            Target::Method(method),
            Handler::AwaitingMessage | Handler::Ready(_) | Handler::Called { .. } | Handler::Stream(_),
        ) = (&stream.request.target, &stream.handler)
        {
            method.handled(Status::Canceled);
        }
        self.sender.abandon(&mut stream.outbound);
        let held = stream.inbound.held + stream.weight + stream.kept;
        if let Handler::Called { .. } | Handler::Compressing = stream.handler {
            self.orphans.insert(slot, held); // The handler still keeps the message, and will use its reply.
        } else {
            self.held_in -= held;
        }
        self.closed_streams.remember(stream.id, closed_by, self.now);
    }

    /// Removes a stream whose response is complete. If the client has not ended it, its end is usually in flight, so it gets a
    /// moment to arrive; a client that keeps sending is told to stop.
    pub(super) fn finish(&mut self, slot: u64) {
        let Some(stream) = self.streams.get(slot) else { return };
        if !stream.outbound.is_over() {
            return;
        }
        if !stream.inbound.ended && !stream.outbound.is_reset() {
            let until = self.now + LINGER;
            stream.deadline = Some(until);
            return self.timers.schedule_deadline(until);
        }
        let closed_by = if stream.outbound.is_reset() { ClosedBy::Server } else { ClosedBy::Client };
        self.forget(slot, closed_by);
    }

    /// Tells the client to stop sending on a stream.
    pub(super) fn stop_receiving(&mut self, slot: u64) {
        let Some(stream) = self.streams.get(slot) else { return };
        self.sender.reset(stream.id, Code::NoError);
        self.forget(slot, ClosedBy::Server);
    }

    /// Removes a stream, and completes a shutdown if it was the last one.
    pub(super) fn forget(&mut self, slot: u64, closed_by: ClosedBy) {
        self.abandon(slot, closed_by);
        self.close_if_done();
    }

    /// Completes a shutdown, started by either side, if no stream is open.
    pub(super) fn close_if_done(&mut self) {
        if !self.streams.is_empty() {
            return;
        }
        self.timers.became_idle(self.now);
        match self.phase {
            Phase::ShuttingDown(last) if last != u32::MAX => self.end(),
            Phase::Settings | Phase::Open if self.timers.has_received_goaway() => {
                self.go_away(self.highest, Code::NoError, "");
                self.end();
            }
            Phase::Preface(_) | Phase::Settings | Phase::Open | Phase::ShuttingDown(_) | Phase::Closed => (),
        }
    }

    /// Schedules a stream to be stepped.
    pub(super) fn make_due(&mut self, slot: u64) {
        if let Some(stream) = self.streams.get(slot)
            && !std::mem::replace(&mut stream.is_due, true)
        {
            self.due.push_back(slot);
        }
    }

    /// Ends the connection if too many tiny frames had to be sent.
    pub(super) fn count_tiny_frames(&mut self, now: Instant) {
        let tiny_frames = std::mem::take(&mut self.sender.tiny_frames);
        if tiny_frames > 0
            && let Err(fault) = self.counter.add(Flood::TinyFrame, tiny_frames, &self.shared.limits, now)
        {
            self.fail(fault);
        }
    }
}
