//! One connection as a value: bytes in, bytes out, and no clock, no socket and no task of its own.
//!
//! ```text
//!            receive                    run
//! bytes ──► frames ──► streams ──► calls · conversations ──► sender ──► output
//!                                     ▲                                   (written by whoever owns the connection)
//!                          outbox ────┘  answers from elsewhere
//! ```
//!
//! [`Connection::receive`] parses all frames of a read first; calls whose message is complete gather, and
//! [`Connection::run`] hands them out together. So a call that was taken back in the same read never runs, and all answers
//! of a read leave in one write.
//!
//! INVARIANTS
//! * A fault of a stream ends the stream, a fault of the connection ends everything. Nothing that comes in can panic.
//! * A stream that is gone is forgotten: what still arrives for it, from either side, is dropped.
//! * While more answers of calls wait to be written than [`CALLS_WAIT_BYTES`], no call begins. What streams have waiting
//!   keeps no call: they have a limit of their own.
//! * Everything that a client makes us keep is in `held`, and nothing is added beyond what [`Shared::admits`]. What a call
//!   keeps is counted until its reply is used, even if its stream has gone before, and even if the connection has.

mod alarms;
mod calls;
mod incoming;
mod opening;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};

use super::{
    fault::{Code, Fault},
    frame::{self, DEFAULT_WINDOW, Frame, PREFACE, flag, kind, setting},
    hpack::{Decoder, decoder::Fields},
    intake::{RecvWindow, STREAM_WINDOW},
    limits::{Flood, FloodCounter, Limits, MAX_STREAMS, Shared},
    outbox::{Deliveries, Outbox},
    output::Output,
    past::{ClosedBy, ClosedStreams},
    reads::Reads,
    request::Memory,
    sender::Sender,
    service::Service,
    streams::Streams,
};
use crate::metrics::METRICS;
use alarms::Timers;
use calls::TurnCost;

/// While so much waits for the other side to read, calls wait too.
const CALLS_WAIT_BYTES: usize = 16 << 20;
/// Who holds less than this for windows that do not open may take his time.
const UNREAD_BYTES: usize = 1 << 20;

/// A connection.
pub struct Connection {
    service: Arc<dyn Service>,
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    phase: Phase,
    /// What time it was when somebody last said so.
    now: Instant,
    timers: Timers,
    counter: FloodCounter,

    /// The beginning of a frame whose rest has not come.
    pending: Bytes,
    reads: Reads,
    decoder: Decoder,
    fields: Fields,
    block_cache: Memory,
    /// A header block whose rest has not come.
    block: Option<Block>,
    recv_window: RecvWindow,

    streams: Streams,
    /// The highest stream that the other side has opened.
    highest: u32,
    closed_streams: ClosedStreams,
    /// What a new stream may send.
    initial_window: i64,
    sender: Sender,

    /// Calls whose message has come.
    ready: VecDeque<u64>,
    /// Streams that are to be stepped.
    due: VecDeque<u64>,
    /// Streams that are to be stepped once the output has been written.
    stalled: VecDeque<u64>,
    deliveries: Deliveries,
    /// An empty list with room for the next ones.
    spare_deliveries: Deliveries,
    /// What this turn has cost so far.
    turn_cost: TurnCost,
    was_long: bool,
    woken: Vec<u64>,

    /// Bytes that streams hold of what has come, and what they are counted for themselves.
    held_in: usize,
    /// Calls in progress whose streams have gone, and what they are still counted for.
    orphans: HashMap<u64, usize>,
    /// From when on the client knows how many streams it may open.
    limits_known: Option<Instant>,
    /// What we told everybody that we hold.
    held_reported: usize,
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// So much of the preface has come.
    Preface(usize),
    /// The first frame is to be SETTINGS.
    Settings,
    Open,
    /// We have said that we are leaving: streams above this one are ignored.
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
    /// A connection that has just been accepted.
    #[must_use]
    pub fn new(service: Arc<dyn Service>, shared: Arc<Shared>, outbox: Arc<Outbox>, now: Instant) -> Self {
        let limits_known = now.checked_add(shared.limits.patience);
        let mut connection = Self {
            service,
            outbox,
            phase: Phase::Preface(0),
            now,
            timers: Timers::new(now, &shared.limits),
            shared,
            counter: FloodCounter::default(),
            pending: Bytes::new(),
            reads: Reads::default(),
            decoder: Decoder::default(),
            fields: Fields::default(),
            block_cache: Memory::default(),
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

    /// Our own settings, and a window to begin with.
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

    /// Takes what has come.
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
            self.pending = Bytes::copy_from_slice(&input); // Not the whole read that it came in.
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
            return Err(Fault::connection(Code::Protocol, "something other than the preface"));
        }
        input.advance(length);
        self.phase = if length == expected.len() { Phase::Settings } else { Phase::Preface(seen + length) };
        Ok(())
    }

    fn frame(&mut self, frame: Frame, now: Instant) -> Result<(), Fault> {
        if let Some(block) = &self.block
            && !matches!(frame, Frame::Continuation { stream, .. } if stream == block.stream)
        {
            return Err(Fault::connection(Code::Protocol, "a frame in the middle of a header block"));
        }
        if self.phase == Phase::Settings {
            if !matches!(frame, Frame::Settings { .. }) {
                return Err(Fault::connection(Code::Protocol, "a first frame other than SETTINGS"));
            }
            self.phase = Phase::Open;
        }
        self.handle(frame, now)
    }

    /// Ends what a fault ends.
    fn handle_fault(&mut self, fault: Fault, now: Instant) {
        // Of a stream that was never opened nothing may be said, not even that it ends.
        let is_idle = self.is_idle(fault.stream);
        if is_idle || self.block.is_some() || matches!(self.phase, Phase::Settings | Phase::Preface(_)) {
            return self.fail(Fault { stream: 0, ..fault });
        }
        tracing::debug!(stream = fault.stream, %fault, "a stream was reset");
        METRICS.refused.with_label_values(&[fault.code.name()]).inc();
        self.reset(fault.stream, fault.code);
        if fault.code == Code::RefusedStream && !self.knows_limits(now) {
            return; // It could not know.
        }
        if let Err(fault) = self.counter.count(Flood::OwnReset, &self.shared.limits, now) {
            self.fail(fault);
        }
    }

    /// Whether the client has heard our SETTINGS, or should have.
    fn knows_limits(&self, now: Instant) -> bool {
        self.limits_known.is_some_and(|since| since <= now)
    }

    /// Ends a stream from our side, at once.
    fn reset(&mut self, id: u32, code: Code) {
        self.sender.reset(id, code);
        match self.streams.find(id) {
            Some(slot) => self.forget(slot, ClosedBy::Us),
            None => self.closed_streams.remember(id, ClosedBy::Us, self.now),
        }
    }

    /// Ends the connection.
    fn fail(&mut self, fault: Fault) {
        if self.phase == Phase::Closed {
            return;
        }
        tracing::debug!(%fault, "a connection was ended");
        METRICS.refused.with_label_values(&[fault.code.name()]).inc();
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
            self.abandon(slot, ClosedBy::Us);
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

    /// Where answers from elsewhere go, and who wakes us.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// Whether nothing will come any more, but what is still to be written.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Whether so much is to be written that what can wait does.
    #[must_use]
    pub fn is_saturated(&self) -> bool {
        self.sender.is_saturated()
    }

    /// Whether so much is to be written that nothing more should be read before it is.
    #[must_use]
    pub fn is_choked(&self) -> bool {
        self.sender.output.len() >= 4 * super::sender::SATURATED_BYTES
    }

    fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// What is held for this connection.
    fn held(&self) -> usize {
        self.held_besides_output() + self.sender.held_bytes()
    }

    fn held_besides_output(&self) -> usize {
        let begun = self.pending.len() + self.block.as_ref().map_or(0, |block| block.bytes.len());
        self.held_in + self.reads.bytes() + begun
    }

    /// Whether so much more may be held for this connection.
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
        incoming::widen(0, &mut self.sender, increment);
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
