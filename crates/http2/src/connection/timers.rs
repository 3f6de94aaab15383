//! Timeouts of a connection. One coarse timer serves all of them: the owner of the connection asks for the next deadline
//! ([`Connection::next_timer`]) and calls [`Connection::on_timer`] soon after it.

use std::time::{Duration, Instant};

use super::{Connection, Phase, UNREAD_BYTES};
use crate::{
    closed_streams::ClosedBy,
    fault::{Code, Fault},
    frame::kind,
    handler::Handler,
    limits::{self, Limits, MIN_READ_BYTES},
    sender::MAX_QUEUED_BYTES,
    streams::Stream,
};

/// How often the deadlines of calls are checked.
const SWEEP_INTERVAL: Duration = Duration::from_millis(50);
/// How long a client may take to receive the first GOAWAY of a shutdown.
const FINAL_GOAWAY_DELAY: Duration = Duration::from_millis(100);
/// How often stalled streams check whether other connections have made room.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// The payloads of the server's own pings.
const KEEPALIVE_PING: u64 = u64::from_be_bytes(*b"there???");
const SHUTDOWN_PING: u64 = u64::from_be_bytes(*b"leaving.");

/// All deadlines of a connection.
#[derive(Debug)]
pub struct Timers {
    begin_timeout: Duration,
    keepalive_interval: Duration,
    keepalive_timeout: Duration,
    read_timeout: Duration,
    idle_timeout: Option<Duration>,
    /// Since when there has been no call.
    idle_since: Instant,
    /// When the preface or a header block is overdue, and the reason for the GOAWAY.
    begin_deadline: Option<(Instant, &'static str)>,
    last_received: Instant,
    /// When an unanswered ping means that the client is gone.
    keepalive_deadline: Option<Instant>,
    /// When a client that reads its socket too slowly is dropped, and how much it has read in the current period.
    write_deadline: Option<(Instant, usize)>,
    /// When a client whose windows open too slowly is dropped, and how much they had let through at the start of the period.
    window_deadline: Option<(Instant, u64)>,
    /// When calls that were pending at the client's half-close are given up.
    half_closed_deadline: Option<Instant>,
    /// When an incomplete frame is overdue. DATA frames have no such deadline: their bytes are counted instead.
    frame_deadline: Option<Instant>,
    /// When stalled streams check again whether other connections have made room.
    retry_at: Option<Instant>,
    /// When the final GOAWAY is sent even if the client has not answered the ping before it.
    goaway_deadline: Option<Instant>,
    /// When the first deadline of a call has to be checked.
    sweep: Option<Instant>,
    has_received_goaway: bool,
    /// Writing anything more is pointless.
    is_dead: bool,
}

impl Timers {
    #[must_use]
    pub fn new(now: Instant, limits: &Limits) -> Self {
        Self {
            begin_timeout: limits.begin_timeout,
            keepalive_interval: limits.keepalive_interval,
            keepalive_timeout: limits.keepalive_timeout,
            read_timeout: limits.read_timeout,
            idle_timeout: limits.idle_timeout,
            idle_since: now,
            begin_deadline: Some((now + limits.begin_timeout, "connection preface or SETTINGS not received in time")),
            last_received: now,
            keepalive_deadline: None,
            write_deadline: None,
            window_deadline: None,
            half_closed_deadline: None,
            frame_deadline: None,
            retry_at: None,
            goaway_deadline: None,
            sweep: None,
            has_received_goaway: false,
            is_dead: false,
        }
    }

    pub(super) fn data_received(&mut self, now: Instant) {
        self.last_received = now;
        self.keepalive_deadline = None;
    }

    pub(super) fn begin_block(&mut self, now: Instant) {
        self.begin_deadline = Some((now + self.begin_timeout, "header block not completed in time"));
    }

    pub(super) fn end_block(&mut self) {
        self.begin_deadline = None;
    }

    /// Starts or clears the deadline of an incomplete frame. `begins` if there is one, `is_new` if it is not the one of the last
    /// read.
    pub(super) fn begin_frame(&mut self, begins: bool, is_new: bool, now: Instant) {
        if !begins {
            self.frame_deadline = None;
        } else if is_new || self.frame_deadline.is_none() {
            self.frame_deadline = Some(now + self.begin_timeout);
        }
    }

    /// Streams wait for room that other connections have to make, or no stream does.
    pub(super) fn schedule_retry(&mut self, waits: bool, now: Instant) {
        self.retry_at = waits.then(|| now + RETRY_INTERVAL);
    }

    pub(super) fn schedule_deadline(&mut self, deadline: Instant) {
        if self.sweep.is_none_or(|sweep| deadline < sweep) {
            self.sweep = Some(deadline);
        }
    }

    /// Must be called when the last stream has ended.
    pub(super) fn became_idle(&mut self, now: Instant) {
        self.idle_since = now;
    }

    pub(super) fn goaway_received(&mut self) {
        self.has_received_goaway = true;
    }

    pub(super) fn has_received_goaway(&self) -> bool {
        self.has_received_goaway
    }
}

impl Connection {
    /// When [`Connection::on_timer`] must be called next.
    #[must_use]
    pub fn next_timer(&self) -> Instant {
        let timers = &self.timers;
        if self.is_closed() {
            return timers.write_deadline.map_or(self.now + timers.read_timeout, |(when, _)| when);
        }
        let keepalive = timers.keepalive_deadline.unwrap_or(timers.last_received + timers.keepalive_interval);
        let begin = timers.begin_deadline.map(|(when, _)| when);
        let write = timers.write_deadline.map(|(when, _)| when);
        let window = timers.window_deadline.map(|(when, _)| when);
        let all = [
            begin,
            timers.frame_deadline,
            write,
            window,
            timers.half_closed_deadline,
            timers.goaway_deadline,
            timers.sweep,
            timers.retry_at,
        ];
        all.into_iter().chain([self.idle_timer()]).flatten().fold(keepalive, Instant::min)
    }

    /// When the idle timeout of a connection without calls expires.
    fn idle_timer(&self) -> Option<Instant> {
        let is_open = matches!(self.phase, Phase::Settings | Phase::Open);
        let timeout = self.timers.idle_timeout.filter(|_| is_open && self.streams.is_empty())?;
        Some(self.timers.idle_since + timeout)
    }

    /// Handles the deadlines that have passed.
    pub fn on_timer(&mut self, now: Instant) {
        self.now = now;
        let is_due = |when: Option<Instant>| when.is_some_and(|when| when <= now);
        if is_due(self.timers.write_deadline.map(|(when, _)| when))
            || is_due(self.timers.window_deadline.map(|(when, _)| when))
        {
            return self.give_up("slow_reader");
        }
        if self.is_closed() {
            return;
        }
        if is_due(self.timers.half_closed_deadline) {
            tracing::debug!("connection closed: the client closed its side, and its calls were not answered in time");
            self.timers.is_dead = true;
            return self.end();
        }
        if is_due(self.idle_timer()) {
            tracing::debug!("connection closed: no call within the idle timeout");
            return self.shut_down(now);
        }
        if is_due(self.timers.keepalive_deadline) {
            return self.give_up("keepalive");
        }
        if let Some((when, why)) = self.timers.begin_deadline
            && when <= now
        {
            if matches!(self.phase, Phase::Preface(_) | Phase::Settings) || self.block.is_some() {
                limits::count_refusal("slow_beginning");
                return self.fail(Fault::connection(Code::EnhanceYourCalm, why));
            }
            self.timers.begin_deadline = None;
        }
        if is_due(self.timers.frame_deadline) {
            limits::count_refusal("slow_beginning");
            return self.fail(Fault::connection(Code::EnhanceYourCalm, "frame not completed in time"));
        }
        if is_due(self.timers.retry_at) {
            self.timers.retry_at = None; // The caller of `alarm` runs the connection again, which checks.
        }
        if is_due(self.timers.goaway_deadline) {
            self.send_final_goaway();
        }
        if is_due(self.timers.sweep) {
            self.sweep(now);
        }
        if self.timers.keepalive_deadline.is_none() && self.timers.last_received + self.timers.keepalive_interval <= now
        {
            self.sender.control(kind::PING, 0, 0, &KEEPALIVE_PING.to_be_bytes());
            self.timers.keepalive_deadline = Some(now + self.timers.keepalive_timeout);
        }
    }

    /// The client does not read: nothing more is written.
    fn give_up(&mut self, reason: &'static str) {
        limits::count_refusal(reason);
        self.timers.is_dead = true;
        self.end();
    }

    /// Ends the calls whose deadline has passed.
    fn sweep(&mut self, now: Instant) {
        let mut over = Vec::new();
        let mut next: Option<Instant> = None;
        // A stream whose response is complete waits only for the client's end of stream.
        let waits =
            |stream: &Stream<Handler>| !matches!(stream.handler, Handler::Answered) || stream.outbound.is_over();
        for (slot, stream) in self.streams.iter_mut().filter(|(_, stream)| waits(stream)) {
            match stream.deadline {
                Some(deadline) if deadline <= now => over.push(slot),
                Some(deadline) => next = Some(next.map_or(deadline, |next| next.min(deadline))),
                None => (),
            }
        }
        self.timers.sweep = next.map(|next| next.max(now + SWEEP_INTERVAL));
        for slot in over {
            let Some(stream) = self.streams.get(slot) else { continue };
            let (id, is_over) = (stream.id, stream.outbound.is_over());
            if is_over {
                self.stop_receiving(slot);
            } else {
                self.reset(id, Code::Cancel); // As etcd does: the client knows its own deadline.
            }
        }
    }

    /// Starts a graceful shutdown: calls in progress may end, new ones have to go elsewhere.
    pub fn shut_down(&mut self, now: Instant) {
        self.now = now;
        match self.phase {
            Phase::Settings | Phase::Open => {
                // Streams that are in flight are still accepted.
                self.phase = Phase::ShuttingDown(u32::MAX);
                self.go_away(u32::MAX >> 1, Code::NoError, "");
                self.sender.control(kind::PING, 0, 0, &SHUTDOWN_PING.to_be_bytes());
                self.timers.goaway_deadline = Some(now + FINAL_GOAWAY_DELAY);
            }
            Phase::Preface(_) => self.end(),
            Phase::ShuttingDown(_) | Phase::Closed => (),
        }
    }

    fn send_final_goaway(&mut self) {
        self.timers.goaway_deadline = None;
        if self.phase == Phase::ShuttingDown(u32::MAX) {
            self.phase = Phase::ShuttingDown(self.highest);
            self.go_away(self.highest, Code::NoError, "");
            if self.streams.is_empty() {
                self.end();
            }
        }
    }

    /// Handles the answer to a ping of the server.
    pub(super) fn pong(&mut self, data: u64, _now: Instant) {
        if data == SHUTDOWN_PING {
            self.send_final_goaway();
        }
    }

    /// Must be called after a write. `is_done` if nothing is left to write, neither here nor in TLS buffers.
    pub fn wrote(&mut self, written: usize, is_done: bool, now: Instant) {
        let limit = now + self.timers.read_timeout;
        self.timers.write_deadline = match self.timers.write_deadline {
            _ if is_done => None,
            None => Some((limit, 0)),
            Some((_, before)) if before + written >= MIN_READ_BYTES => Some((limit, 0)),
            Some((when, before)) => Some((when, before + written)),
        };
        let unwritten = self.sender.output.len();
        if unwritten != self.sender.unwritten {
            self.sender.unwritten = unwritten;
            self.report_held();
        }
        let sent = self.sender.sent;
        if !self.is_unread() {
            self.timers.window_deadline = None;
        } else if self.timers.window_deadline.is_none_or(|(_, before)| sent - before >= MIN_READ_BYTES as u64) {
            self.timers.window_deadline = Some((limit, sent));
        }
    }

    /// Whether so much waits for windows that the client has to open them in time, or calls are waiting for that.
    fn is_unread(&self) -> bool {
        let held = self.sender.held;
        !self.ready.is_empty() || held >= UNREAD_BYTES || held > MAX_QUEUED_BYTES && self.shared.ledger.is_scarce()
    }

    /// The client has closed its sending side, or the whole connection. Complete requests are answered; calls that need more
    /// input end here.
    pub fn input_ended(&mut self, now: Instant) {
        self.now = now;
        let is_complete = |stream: &Stream<Handler>| {
            matches!(
                stream.handler,
                Handler::Ready(_) | Handler::Called { .. } | Handler::Compressing | Handler::Answered
            ) || matches!(stream.handler, Handler::Http(_)) && stream.inbound.ended
        };
        let mut ended = Vec::new();
        for (slot, stream) in self.streams.iter_mut() {
            let is_kept = is_complete(stream) && !stream.outbound.is_over();
            stream.inbound.ended = true;
            if !is_kept {
                ended.push(slot);
            }
        }
        for slot in ended {
            self.abandon(slot, ClosedBy::Client);
        }
        if self.is_closed() {
            return;
        }
        if self.streams.is_empty() {
            return self.end();
        }
        self.phase = Phase::ShuttingDown(self.highest);
        self.timers.half_closed_deadline = Some(now + self.timers.read_timeout);
        // The client cannot answer pings any more.
        (self.timers.last_received, self.timers.keepalive_deadline) = (now + self.timers.read_timeout, None);
        (self.timers.begin_deadline, self.timers.frame_deadline, self.timers.goaway_deadline) = (None, None, None);
    }

    /// Whether writing anything more is pointless.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.timers.is_dead
    }
}
