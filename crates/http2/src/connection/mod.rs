//! One connection as a value: bytes in, bytes out, and no clock, no socket and no task of its own.
//!
//! ```text
//!            receive                    run
//! bytes ──► frames ──► streams ──► calls · conversations ──► sender ──► output
//!                                     ▲                                   (written by the owner of the connection)
//!                          outbox ────┘  answers from elsewhere
//! ```
//!
//! [`Connection::receive`] parses all frames of a read first and collects the calls whose message is complete; then
//! [`Connection::run`] dispatches them together. So a call that is reset in the same read never runs, and all responses to a read
//! leave in one write.
//!
//! INVARIANTS
//! * A stream error ends the stream, a connection error ends the connection. No input can cause a panic.
//! * A closed stream is removed: what still arrives for it, from either side, is dropped.
//! * While more than [`CALLS_WAIT_BYTES`] of calls' responses wait to be written, no call is started. What other streams have
//!   queued does not delay calls: it has a limit of its own.
//! * Everything that a client makes the server keep is in `held`, and nothing is added beyond what [`Shared::admits`] allows.
//!   What a call keeps is counted until its reply is used, even after its stream or its connection has ended.

mod calls;
mod frames;
mod headers;
#[cfg(test)]
mod tests;
mod timers;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};

use super::{
    closed_streams::{ClosedBy, ClosedStreams},
    fault::{Code, Fault},
    frame::{self, DEFAULT_WINDOW, Frame, PREFACE, flag, kind, setting},
    handler::Handler,
    hpack::{Decoder, decoder::Fields},
    limits::{Flood, FloodCounter, Limits, MAX_STREAMS, Shared},
    outbox::{Deliveries, Outbox},
    output::Output,
    reads::Reads,
    recv_window::{RecvWindow, STREAM_WINDOW},
    request::BlockCache,
    sender::Sender,
    service::Service,
    streams::Streams,
};
use crate::{call::ConnectionInfo, metrics};
use calls::TurnCost;
use timers::Timers;

/// Calls wait while so much waits for the client to read.
const CALLS_WAIT_BYTES: usize = 16 << 20;
/// A client that holds less than this for closed windows may take its time to open them.
const UNREAD_BYTES: usize = 1 << 20;

pub struct Connection {
    service: Arc<dyn Service>,
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    /// What is attached to the connection.
    info: Option<ConnectionInfo>,
    phase: Phase,
    /// The time of the last call that passed one.
    now: Instant,
    timers: Timers,
    counter: FloodCounter,

    /// An incomplete frame.
    pending: Bytes,
    reads: Reads,
    decoder: Decoder,
    fields: Fields,
    block_cache: BlockCache,
    /// An incomplete header block.
    block: Option<Block>,
    recv_window: RecvWindow,

    streams: Streams<Handler>,
    /// The highest stream ID that the client has used.
    highest: u32,
    closed_streams: ClosedStreams,
    /// The initial send window of streams.
    initial_window: i64,
    sender: Sender,

    /// Unary calls whose message has arrived.
    ready: VecDeque<u64>,
    /// Streams to be stepped.
    due: VecDeque<u64>,
    /// Streams to be stepped once the output has been written.
    stalled: VecDeque<u64>,
    deliveries: Deliveries,
    /// An empty list whose capacity is reused.
    spare_deliveries: Deliveries,
    /// The cost of the current part of the turn.
    turn_cost: TurnCost,
    was_long: bool,
    woken: Vec<u64>,

    /// Received bytes that streams hold, and what streams are counted for themselves.
    held_in: usize,
    /// Calls in progress whose streams are gone, and what they are still counted for.
    orphans: HashMap<u64, usize>,
    /// When the client knows, or should know, how many streams it may open.
    limits_known: Option<Instant>,
    /// What was last reported to the ledger.
    held_reported: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// So many bytes of the preface have arrived.
    Preface(usize),
    /// The first frame must be SETTINGS.
    Settings,
    Open,
    /// GOAWAY was sent: streams above this ID are ignored.
    ShuttingDown(u32),
    Closed,
}

/// A header block in several frames.
struct Block {
    stream: u32,
    end: bool,
    depends_on_itself: bool,
    bytes: BytesMut,
    frames: u32,
}

impl Connection {
    /// Attaches something for the handlers of calls.
    pub fn set_info(&mut self, info: Option<ConnectionInfo>) {
        self.info = info;
    }

    /// A connection that was just accepted.
    #[must_use]
    pub fn new(service: Arc<dyn Service>, shared: Arc<Shared>, outbox: Arc<Outbox>, now: Instant) -> Self {
        let limits_known = now.checked_add(shared.limits.begin_timeout);
        let mut connection = Self {
            service,
            outbox,
            info: None,
            phase: Phase::Preface(0),
            now,
            timers: Timers::new(now, &shared.limits),
            shared,
            counter: FloodCounter::default(),
            pending: Bytes::new(),
            reads: Reads::default(),
            decoder: Decoder::default(),
            fields: Fields::default(),
            block_cache: BlockCache::default(),
            block: None,
            recv_window: RecvWindow::for_connection(),
            streams: Streams::default(),
            highest: 0,
            closed_streams: ClosedStreams::default(),
            initial_window: DEFAULT_WINDOW,
            sender: Sender::default(),
            ready: VecDeque::new(),
            due: VecDeque::new(),
            stalled: VecDeque::new(),
            deliveries: Vec::new(),
            spare_deliveries: Vec::new(),
            turn_cost: TurnCost::default(),
            was_long: false,
            woken: Vec::new(),
            held_in: 0,
            orphans: HashMap::new(),
            limits_known,
            held_reported: 0,
        };
        connection.shared.connection_opened();
        connection.send_server_preface(now);
        connection
    }

    /// Sends the server preface: the settings, and the connection's window.
    fn send_server_preface(&mut self, now: Instant) {
        let limits = &self.shared.limits;
        let settings = [
            (setting::MAX_CONCURRENT_STREAMS, limits.max_streams.min(MAX_STREAMS)),
            (setting::INITIAL_WINDOW_SIZE, u32::try_from(STREAM_WINDOW).expect("it is a small number")),
            (setting::MAX_HEADER_LIST_SIZE, u32::try_from(limits.max_header_list).unwrap_or(u32::MAX)),
        ];
        let mut payload = Vec::new();
        for (setting, value) in settings {
            payload.extend_from_slice(&setting.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        self.sender.control(kind::SETTINGS, 0, 0, &payload);
        self.widen_connection(now);
    }

    /// Handles received bytes.
    pub fn receive(&mut self, bytes: Bytes, now: Instant) {
        self.now = now;
        self.timers.data_received(now);
        let mut input = if self.pending.is_empty() { bytes } else { [&self.pending[..], &bytes].concat().into() };
        self.pending = Bytes::new();
        let read = input.clone();
        if let Err(fault) = self.take_preface(&mut input) {
            return self.fail(fault);
        }
        let before = input.len();
        while self.phase != Phase::Closed {
            let fault = match frame::take(&mut input) {
                Ok(None) => break,
                Ok(Some(frame)) => self.frame(frame, now).err(),
                Err(fault) => Some(fault),
            };
            if let Some(fault) = fault {
                self.handle_fault(fault, now);
            }
        }
        if self.phase != Phase::Closed && !input.is_empty() {
            self.pending = Bytes::copy_from_slice(&input); // A copy, to release the read buffer.
        }
        let is_new = input.len() < before;
        drop(input);
        self.reads.add(read);
        let begins = !self.pending.is_empty() && self.pending.get(frame::KIND_OFFSET) != Some(&kind::DATA);
        self.timers.begin_frame(begins, is_new, now);
        self.report_held();
    }

    fn take_preface(&mut self, input: &mut Bytes) -> Result<(), Fault> {
        let Phase::Preface(seen) = self.phase else { return Ok(()) };
        let expected = &PREFACE[seen..];
        let length = expected.len().min(input.len());
        if input[..length] != expected[..length] {
            return Err(Fault::connection(Code::Protocol, "invalid connection preface"));
        }
        input.advance(length);
        self.phase = if length == expected.len() { Phase::Settings } else { Phase::Preface(seen + length) };
        Ok(())
    }

    fn frame(&mut self, frame: Frame, now: Instant) -> Result<(), Fault> {
        if let Some(block) = &self.block
            && !matches!(frame, Frame::Continuation { stream, .. } if stream == block.stream)
        {
            return Err(Fault::connection(Code::Protocol, "frame in the middle of a header block"));
        }
        if self.phase == Phase::Settings {
            if !matches!(frame, Frame::Settings { .. }) {
                return Err(Fault::connection(Code::Protocol, "first frame is not SETTINGS"));
            }
            self.phase = Phase::Open;
        }
        self.handle(frame, now)
    }

    /// Resets the stream or ends the connection, as the error says.
    fn handle_fault(&mut self, fault: Fault, now: Instant) {
        // A stream that was never opened cannot be reset: the error ends the connection.
        let is_idle = self.is_idle(fault.stream);
        if is_idle || self.block.is_some() || matches!(self.phase, Phase::Settings | Phase::Preface(_)) {
            return self.fail(Fault { stream: 0, ..fault });
        }
        tracing::debug!(stream = fault.stream, %fault, "stream reset because of an error");
        metrics::refused(fault.code.name());
        self.reset(fault.stream, fault.code);
        if fault.code == Code::RefusedStream && !self.knows_limits(now) {
            return; // The client could not know the limit yet.
        }
        if let Err(fault) = self.counter.count(Flood::OwnReset, &self.shared.limits, now) {
            self.fail(fault);
        }
    }

    /// Whether the client has acknowledged the settings, or should have.
    fn knows_limits(&self, now: Instant) -> bool {
        self.limits_known.is_some_and(|since| since <= now)
    }

    /// Resets a stream.
    fn reset(&mut self, id: u32, code: Code) {
        self.sender.reset(id, code);
        match self.streams.find(id) {
            Some(slot) => self.forget(slot, ClosedBy::Server),
            None => self.closed_streams.remember(id, ClosedBy::Server, self.now),
        }
    }

    /// Ends the connection with a GOAWAY.
    fn fail(&mut self, fault: Fault) {
        if self.phase == Phase::Closed {
            return;
        }
        tracing::debug!(%fault, "connection closed because of an error");
        metrics::refused(fault.code.name());
        let last = match self.phase {
            Phase::ShuttingDown(last) => last.min(self.highest),
            Phase::Preface(_) | Phase::Settings | Phase::Open | Phase::Closed => self.highest,
        };
        self.go_away(last, fault.code, fault.why);
        self.end();
    }

    fn end(&mut self) {
        self.phase = Phase::Closed;
        let slots: Vec<u64> = self.streams.iter_mut().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.abandon(slot, ClosedBy::Server);
        }
        (self.block, self.pending) = (None, Bytes::new());
        self.ready.clear();
        self.due.clear();
        self.stalled.clear();
        self.reads.clear();
        self.report_held();
    }

    fn go_away(&mut self, last: u32, code: Code, why: &str) {
        let payload = [&last.to_be_bytes()[..], &(code as u32).to_be_bytes(), why.as_bytes()].concat();
        self.sender.control(kind::GOAWAY, 0, 0, &payload);
    }

    /// What is to be written.
    pub fn output(&mut self) -> &mut Output {
        &mut self.sender.output
    }

    /// Where other threads put responses.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// Whether the connection has ended, apart from output that is still to be written.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Whether so much output waits that everything that can wait should.
    #[must_use]
    pub fn is_saturated(&self) -> bool {
        self.sender.is_saturated()
    }

    /// Whether nothing more should be read before output is written.
    #[must_use]
    pub fn must_not_read(&self) -> bool {
        self.sender.output.len() >= 4 * super::sender::SATURATED_BYTES
    }

    fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// How many bytes are held for this connection.
    fn held(&self) -> usize {
        self.held_besides_output() + self.sender.held_bytes()
    }

    fn held_besides_output(&self) -> usize {
        let begun = self.pending.len() + self.block.as_ref().map_or(0, |block| block.bytes.len());
        self.held_in + self.reads.bytes() + begun
    }

    /// Whether so many more bytes may be held for this connection.
    fn admits(&self, bytes: usize) -> bool {
        self.shared.admits(self.held_reported, self.held(), bytes)
    }

    fn report_held(&mut self) {
        let held = self.held();
        if held != self.held_reported {
            self.shared.ledger.change(self.held_reported, held);
            self.held_reported = held;
        }
    }

    fn widen_connection(&mut self, now: Instant) {
        let increment = self.recv_window.release(0, self.shared.ledger.is_scarce(), now);
        frames::widen(0, &mut self.sender, increment);
    }

    fn acknowledge(&mut self, kind: u8, payload: &[u8]) {
        self.sender.control(kind, flag::ACK, 0, payload);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
        self.shared.ledger.change(self.held_reported, 0);
        self.shared.connection_closed();
        let orphaned = self.orphans.values().sum();
        self.outbox.close((orphaned > 0).then(|| self.shared.ledger.charge(orphaned)));
    }
}
