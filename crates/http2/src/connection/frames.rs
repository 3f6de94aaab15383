//! The effect of received frames on streams.

use std::time::Instant;

use bytes::{Buf, Bytes};

use super::{Connection, Phase};
use crate::{
    call::{CallError, Code as Status},
    closed_streams::ClosedBy,
    fault::{Code, Fault},
    frame::{Frame, LARGEST_PAYLOAD, MAX_PAYLOAD, MAX_WINDOW, kind, setting},
    handler::{Handler, ReadyCall},
    ledger,
    limits::{self, Flood},
    message::{Deframer, PREFIX_BYTES},
    recv_window::Overrun,
    sender::Sender,
    streams::Stream,
};

impl Connection {
    /// Handles one frame. Frames must be passed in order.
    pub(super) fn handle(&mut self, frame: Frame, now: Instant) -> Result<(), Fault> {
        match frame {
            Frame::Data { stream, data, counted, end } => self.data(stream, data, counted, end, now),
            Frame::Headers { stream, block, end, complete, depends_on_itself } => {
                self.headers(stream, &block, end, complete, depends_on_itself, now)
            }
            Frame::Continuation { block, complete, .. } => self.continuation(&block, complete, now),
            Frame::Priority | Frame::Unknown => self.count(Flood::Idle, now),
            Frame::Reset { stream, .. } => self.stream_reset(stream, now),
            Frame::Settings { pairs } => self.settings(pairs, now),
            Frame::SettingsAck => {
                self.limits_known = Some(now);
                self.count(Flood::Settings, now)
            }
            Frame::Ping { data, ack: false } => {
                self.acknowledge(kind::PING, &data.to_be_bytes());
                self.count(Flood::Ping, now)
            }
            Frame::Ping { data, ack: true } => {
                self.pong(data, now);
                self.count(Flood::Ping, now)
            }
            Frame::GoAway { code } => {
                tracing::debug!(code, "the client sent GOAWAY");
                self.timers.goaway_received();
                self.close_if_done();
                self.count(Flood::Settings, now)
            }
            Frame::WindowUpdate { stream, increment } => self.window_update(stream, i64::from(increment), now),
        }
    }

    pub(super) fn count(&mut self, what: Flood, now: Instant) -> Result<(), Fault> {
        self.counter.count(what, &self.shared.limits, now)
    }

    pub(super) fn is_idle(&self, id: u32) -> bool {
        id == 0 || id > self.highest || id.is_multiple_of(2)
    }

    fn data(&mut self, id: u32, data: Bytes, counted: usize, end: bool, now: Instant) -> Result<(), Fault> {
        self.recv_window.receive(counted).map_err(|Overrun| {
            Fault::connection(Code::FlowControl, "flow-control window of the connection exceeded")
        })?;
        self.widen_connection(now);
        if data.is_empty() && !end {
            self.count(Flood::EmptyData, now)?;
        }
        let Some(slot) = self.streams.find(id) else { return self.stray_data(id, now) };
        let stream = self.streams.get(slot).expect("it was found a moment ago");
        if stream.inbound.ended {
            return Err(Fault::stream(id, Code::StreamClosed, "DATA after END_STREAM"));
        }
        let inbound = &mut stream.inbound;
        let taken = inbound.recv_window.receive(counted);
        taken.map_err(|Overrun| Fault::stream(id, Code::FlowControl, "flow-control window of the stream exceeded"))?;
        inbound.received += data.len() as u64;
        if stream.request.content_length.is_some_and(|length| length < stream.inbound.received) {
            return Err(Fault::stream(id, Code::Protocol, "more data than the content-length"));
        }
        let is_padded = counted > data.len();
        self.take_data(slot, data);
        if is_padded {
            self.release_window(slot, 0);
        }
        if end { self.end_stream(slot, id) } else { Ok(()) }
    }

    /// DATA for a stream that is not open.
    fn stray_data(&mut self, id: u32, now: Instant) -> Result<(), Fault> {
        if self.is_idle(id) {
            return Err(Fault::connection(Code::Protocol, "DATA on an idle stream"));
        }
        if self.closed_streams.find(id) == Some(ClosedBy::Server) || !self.accepts(id) {
            return self.count(Flood::Stray, now);
        }
        Err(Fault::stream(id, Code::StreamClosed, "DATA on a closed stream"))
    }

    /// Passes data to the handler of its stream.
    fn take_data(&mut self, slot: u64, data: Bytes) {
        let is_too_much = !self.admits(data.len());
        let limits = &self.shared.limits;
        let stream = self.streams.get(slot).expect("the caller has it");
        let length = data.len();
        match &mut stream.handler {
            Handler::Answered if stream.outbound.is_over() && stream.inbound.recv_window.is_low() => {
                return self.stop_receiving(slot);
            }
            Handler::Answered | Handler::Ready(_) | Handler::Called { .. } | Handler::Compressing => return,
            _ if is_too_much => return self.refuse(slot, ledger::request_over_limit()),
            Handler::AwaitingMessage => {
                stream.inbound.deframer.push(data);
                return self.take_call_message(slot);
            }
            Handler::Stream(_) => {
                stream.inbound.deframer.push_copy(&data);
                widen_for_message(stream, &mut self.sender, limits.max_message);
            }
            Handler::Http(http_handler) => http_handler.body_sender().push(&data),
        }
        stream.inbound.held += length;
        self.held_in += length;
        self.make_due(slot);
    }

    /// Takes the message of a unary call, if all of it has arrived.
    fn take_call_message(&mut self, slot: u64) {
        let max_bytes = self.limits().max_message;
        let stream = self.streams.get(slot).expect("the caller has it");
        let inbound = &mut stream.inbound;
        let message = inbound.deframer.take_raw(stream.request.encoding, max_bytes);
        let kept = if let Ok(Some((message, _))) = &message {
            inbound.deframer = Deframer::default(); // Anything after the message is ignored.
            message.len()
        } else {
            inbound.deframer.detach();
            inbound.deframer.len()
        };
        self.held_in = self.held_in + kept - std::mem::replace(&mut inbound.held, kept);
        match message {
            Ok(Some((message, is_compressed))) => {
                stream.handler = Handler::Ready(ReadyCall { message, is_compressed, is_copy: false, since: self.now });
                self.ready.push_back(slot);
            }
            Ok(None) => widen_for_message(stream, &mut self.sender, max_bytes),
            Err(refusal) => self.refuse(slot, refusal),
        }
    }

    /// The client has ended a stream.
    pub(super) fn end_stream(&mut self, slot: u64, id: u32) -> Result<(), Fault> {
        let Some(stream) = self.streams.get(slot) else { return Ok(()) };
        stream.inbound.ended = true;
        let inbound = &stream.inbound;
        if stream.request.content_length.is_some_and(|length| length != inbound.received) {
            return Err(Fault::stream(id, Code::Protocol, "less data than the content-length"));
        }
        match &mut stream.handler {
            Handler::AwaitingMessage => {
                limits::count_refusal("message_length");
                let message = if inbound.deframer.wanted().is_some() { "unexpected EOF" } else { "EOF" };
                self.refuse(slot, CallError { code: Status::Unknown, message: message.into() });
            }
            Handler::Http(http_handler) => http_handler.body_sender().end(),
            Handler::Stream(_) => self.make_due(slot),
            Handler::Answered => self.finish(slot),
            Handler::Ready(_) | Handler::Called { .. } | Handler::Compressing => (),
        }
        Ok(())
    }

    /// The client has reset a stream.
    fn stream_reset(&mut self, id: u32, now: Instant) -> Result<(), Fault> {
        if self.is_idle(id) {
            return Err(Fault::connection(Code::Protocol, "RST_STREAM on an idle stream"));
        }
        let Some(slot) = self.streams.find(id) else {
            self.closed_streams.client_acknowledged(id, now);
            return self.count(Flood::Idle, now);
        };
        self.forget(slot, ClosedBy::Client);
        self.count(Flood::Reset, now)
    }

    fn settings(&mut self, mut pairs: Bytes, now: Instant) -> Result<(), Fault> {
        let mut window = None;
        while pairs.has_remaining() {
            let (setting, value) = (pairs.get_u16(), pairs.get_u32());
            match setting {
                setting::HEADER_TABLE_SIZE => self.sender.encoder.set_max_size(value as usize),
                setting::ENABLE_PUSH if value > 1 => {
                    return Err(Fault::connection(Code::Protocol, "ENABLE_PUSH is neither 0 nor 1"));
                }
                setting::INITIAL_WINDOW_SIZE if i64::from(value) > MAX_WINDOW => {
                    return Err(Fault::connection(Code::FlowControl, "SETTINGS_INITIAL_WINDOW_SIZE too large"));
                }
                setting::INITIAL_WINDOW_SIZE => window = Some(i64::from(value)),
                setting::MAX_FRAME_SIZE if !(MAX_PAYLOAD..=LARGEST_PAYLOAD).contains(&(value as usize)) => {
                    return Err(Fault::connection(Code::Protocol, "SETTINGS_MAX_FRAME_SIZE out of range"));
                }
                setting::MAX_FRAME_SIZE => self.sender.max_payload = (value as usize).min(MAX_SENT_PAYLOAD),
                _ => (), // Settings that the server does not need or does not know.
            }
        }
        if let Some(window) = window {
            self.change_windows(window)?;
        }
        self.acknowledge(kind::SETTINGS, &[]);
        self.count(Flood::Settings, now)
    }

    /// The client has changed the initial window: the windows of open streams change by the same amount.
    fn change_windows(&mut self, window: i64) -> Result<(), Fault> {
        let change = window - std::mem::replace(&mut self.initial_window, window);
        for (slot, stream) in self.streams.iter_mut() {
            stream.outbound.window += change;
            if stream.outbound.window > MAX_WINDOW {
                return Err(Fault::connection(Code::FlowControl, "flow-control window too large"));
            }
            self.sender.window_changed(slot, &mut stream.outbound);
        }
        Ok(())
    }

    fn window_update(&mut self, id: u32, increment: i64, now: Instant) -> Result<(), Fault> {
        self.count(Flood::WindowUpdate, now)?;
        if id == 0 {
            self.sender.window += increment;
            if self.sender.window > MAX_WINDOW {
                return Err(Fault::connection(Code::FlowControl, "flow-control window too large"));
            }
            return Ok(());
        }
        if self.is_idle(id) {
            return Err(Fault::connection(Code::Protocol, "WINDOW_UPDATE on an idle stream"));
        }
        if let Some(slot) = self.streams.find(id) {
            let stream = self.streams.get(slot).expect("it was found a moment ago");
            stream.outbound.window += increment;
            if stream.outbound.window > MAX_WINDOW {
                return Err(Fault::stream(id, Code::FlowControl, "flow-control window too large"));
            }
            self.sender.window_changed(slot, &mut stream.outbound);
        }
        Ok(())
    }

    /// Releases consumed bytes of a stream's window. Sends a `WINDOW_UPDATE` if one is due and more data is still expected.
    pub(super) fn release_window(&mut self, slot: u64, consumed: usize) {
        let Some(stream) = self.streams.get(slot) else { return };
        let inbound = &mut stream.inbound;
        inbound.held -= consumed;
        self.held_in -= consumed;
        let has_reader = matches!(stream.handler, Handler::AwaitingMessage | Handler::Stream(_) | Handler::Http(_));
        if has_reader && !inbound.ended {
            let increment = inbound.recv_window.release(inbound.held, self.shared.ledger.is_scarce(), self.now);
            widen(stream.id, &mut self.sender, increment);
        }
    }

    /// Whether the connection accepts streams with this ID.
    pub(super) fn accepts(&self, id: u32) -> bool {
        !matches!(self.phase, Phase::ShuttingDown(last) if id > last)
    }
}

/// Frames are no larger than this, whatever the client allows, so that other streams get their turn.
const MAX_SENT_PAYLOAD: usize = 64 << 10;

/// Sends a `WINDOW_UPDATE`, for the whole connection if the stream is 0.
pub(super) fn widen(id: u32, sender: &mut Sender, increment: Option<u32>) {
    if let Some(increment) = increment {
        sender.control(kind::WINDOW_UPDATE, 0, id, &increment.to_be_bytes());
    }
}

/// Widens the window at once for a message that is longer than the window.
fn widen_for_message(stream: &mut Stream<Handler>, sender: &mut Sender, max_bytes: usize) {
    let deframer = &stream.inbound.deframer;
    let wanted = deframer.wanted().filter(|&wanted| wanted <= max_bytes + PREFIX_BYTES).unwrap_or(0);
    let increment = stream.inbound.recv_window.widen_for(wanted.saturating_sub(deframer.len()));
    widen(stream.id, sender, increment);
}
