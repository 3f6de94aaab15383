//! What happens because time passes. One coarse alarm serves a whole connection: whoever owns it asks when the next one is
//! ([`Connection::next_alarm`]), and rings not much later.

use std::time::{Duration, Instant};

use super::{Connection, Phase, UNREAD_BYTES};
use crate::http2::{
    fault::{Code, Fault},
    frame::kind,
    limits::{self, LEAST_RATE_BYTES, Limits},
    past::End,
    sender::ROOM_BYTES,
    streams::{Role, Stream},
};

/// Deadlines of calls are looked at so often.
const SWEEP: Duration = Duration::from_millis(50);
/// How long a client that is told of our leaving may take to hear it.
const FAREWELL: Duration = Duration::from_millis(100);
/// How often it is seen whether others have made room.
const ROOM: Duration = Duration::from_millis(250);
/// What our own pings carry.
const STILL_THERE: u64 = u64::from_be_bytes(*b"there???");
const LEAVING: u64 = u64::from_be_bytes(*b"leaving.");

/// Everything that has a time.
#[derive(Debug)]
pub struct Clock {
    patience: Duration,
    keepalive_interval: Duration,
    keepalive_timeout: Duration,
    slow_reader: Duration,
    idle_timeout: Option<Duration>,
    /// Since when there is no call.
    idle: Instant,
    /// When the preface is late, or a header block.
    late: Option<(Instant, &'static str)>,
    heard: Instant,
    /// When an unanswered ping means that nobody is there.
    silent: Option<Instant>,
    /// When a client that reads too slowly is given up, and how much it has read in this time.
    stuck: Option<(Instant, usize)>,
    /// When a client whose windows open too slowly is given up, and how much they had let through before.
    unread: Option<(Instant, u64)>,
    /// When what was asked for before the client closed its side is given up.
    half_closed: Option<Instant>,
    /// When the beginning of a frame is late. Of data it never is: that is counted.
    begun: Option<Instant>,
    /// When it is to be seen whether others have made room for what we have to send.
    room: Option<Instant>,
    /// When the farewell is taken as heard.
    farewell: Option<Instant>,
    /// When the first deadline of a call is to be looked at.
    sweep: Option<Instant>,
    is_peer_leaving: bool,
    /// It is of no use to write anything more.
    is_dead: bool,
}

impl Clock {
    /// A connection begins.
    #[must_use]
    pub fn new(now: Instant, limits: &Limits) -> Self {
        Self {
            patience: limits.patience,
            keepalive_interval: limits.keepalive_interval,
            keepalive_timeout: limits.keepalive_timeout,
            slow_reader: limits.slow_reader,
            idle_timeout: limits.idle_timeout,
            idle: now,
            late: Some((now + limits.patience, "a preface that does not come")),
            heard: now,
            silent: None,
            stuck: None,
            unread: None,
            half_closed: None,
            begun: None,
            room: None,
            farewell: None,
            sweep: None,
            is_peer_leaving: false,
            is_dead: false,
        }
    }

    pub(super) fn hear(&mut self, now: Instant) {
        self.heard = now;
        self.silent = None;
    }

    pub(super) fn begin_block(&mut self, now: Instant) {
        self.late = Some((now + self.patience, "a header block that does not end"));
    }

    pub(super) fn end_block(&mut self) {
        self.late = None;
    }

    /// Sees whether the beginning of a frame lies there, and whether it is another one than before.
    pub(super) fn begin_frame(&mut self, begins: bool, is_new: bool, now: Instant) {
        if !begins {
            self.begun = None;
        } else if is_new || self.begun.is_none() {
            self.begun = Some(now + self.patience);
        }
    }

    /// Streams wait for room that may be made elsewhere, or none does.
    pub(super) fn wait_for_room(&mut self, waits: bool, now: Instant) {
        self.room = waits.then(|| now + ROOM);
    }

    pub(super) fn expect(&mut self, deadline: Instant) {
        if self.sweep.is_none_or(|sweep| deadline < sweep) {
            self.sweep = Some(deadline);
        }
    }

    /// The last stream has ended.
    pub(super) fn begin_idling(&mut self, now: Instant) {
        self.idle = now;
    }

    pub(super) fn peer_leaves(&mut self) {
        self.is_peer_leaving = true;
    }

    pub(super) fn is_peer_leaving(&self) -> bool {
        self.is_peer_leaving
    }
}

impl Connection {
    /// When [`Connection::alarm`] is to be called next.
    #[must_use]
    pub fn next_alarm(&self) -> Instant {
        let clock = &self.clock;
        if self.is_over() {
            return clock.stuck.map_or(self.now + clock.slow_reader, |(when, _)| when);
        }
        let silent = clock.silent.unwrap_or(clock.heard + clock.keepalive_interval);
        let late = clock.late.map(|(when, _)| when);
        let stuck = clock.stuck.map(|(when, _)| when);
        let unread = clock.unread.map(|(when, _)| when);
        let all = [late, clock.begun, stuck, unread, clock.half_closed, clock.farewell, clock.sweep, clock.room];
        all.into_iter().chain([self.idle_alarm()]).flatten().fold(silent, Instant::min)
    }

    /// When a connection without calls has been so for too long.
    fn idle_alarm(&self) -> Option<Instant> {
        let is_open = matches!(self.phase, Phase::Settings | Phase::Open);
        let timeout = self.clock.idle_timeout.filter(|_| is_open && self.streams.is_empty())?;
        Some(self.clock.idle + timeout)
    }

    /// Does what is due by now.
    pub fn alarm(&mut self, now: Instant) {
        self.now = now;
        let is_due = |when: Option<Instant>| when.is_some_and(|when| when <= now);
        if is_due(self.clock.stuck.map(|(when, _)| when)) || is_due(self.clock.unread.map(|(when, _)| when)) {
            return self.give_up("slow_reader");
        }
        if self.is_over() {
            return;
        }
        if is_due(self.clock.half_closed) {
            tracing::debug!("connection closed: the client has closed its side, and calls are still not answered");
            self.clock.is_dead = true;
            return self.end();
        }
        if is_due(self.idle_alarm()) {
            tracing::debug!("connection closed: no call within the idle timeout");
            return self.leave(now);
        }
        if is_due(self.clock.silent) {
            return self.give_up("keepalive");
        }
        if let Some((when, why)) = self.clock.late
            && when <= now
        {
            if matches!(self.phase, Phase::Preface(_) | Phase::Settings) || self.block.is_some() {
                limits::note("slow_beginning");
                return self.fail(Fault::connection(Code::EnhanceYourCalm, why));
            }
            self.clock.late = None;
        }
        if is_due(self.clock.begun) {
            limits::note("slow_beginning");
            return self.fail(Fault::connection(Code::EnhanceYourCalm, "a frame that does not end"));
        }
        if is_due(self.clock.room) {
            self.clock.room = None; // Whoever rings looks again.
        }
        if is_due(self.clock.farewell) {
            self.say_farewell();
        }
        if is_due(self.clock.sweep) {
            self.sweep(now);
        }
        if self.clock.silent.is_none() && self.clock.heard + self.clock.keepalive_interval <= now {
            self.sender.control(kind::PING, 0, 0, &STILL_THERE.to_be_bytes());
            self.clock.silent = Some(now + self.clock.keepalive_timeout);
        }
    }

    /// Nobody is there who would read anything more.
    fn give_up(&mut self, reason: &'static str) {
        limits::note(reason);
        self.clock.is_dead = true;
        self.end();
    }

    /// Ends the calls whose time is over.
    fn sweep(&mut self, now: Instant) {
        let mut over = Vec::new();
        let mut next: Option<Instant> = None;
        // What was answered waits for the other side's end, if for anything.
        let waits = |stream: &Stream| !matches!(stream.role, Role::Answered) || stream.outbound.is_over();
        for (slot, stream) in self.streams.iter_mut().filter(|(_, stream)| waits(stream)) {
            match stream.deadline {
                Some(deadline) if deadline <= now => over.push(slot),
                Some(deadline) => next = Some(next.map_or(deadline, |next| next.min(deadline))),
                None => (),
            }
        }
        self.clock.sweep = next.map(|next| next.max(now + SWEEP));
        for slot in over {
            let Some(stream) = self.streams.get(slot) else { continue };
            let (id, is_over) = (stream.id, stream.outbound.is_over());
            if is_over {
                self.stop_listening(slot);
            } else {
                self.reset(id, Code::Cancel); // As etcd does: the client knows itself what time it is.
            }
        }
    }

    /// Says that we are leaving: calls in progress may end, new ones go elsewhere.
    pub fn leave(&mut self, now: Instant) {
        self.now = now;
        match self.phase {
            Phase::Settings | Phase::Open => {
                // Streams that are on their way are still taken.
                self.phase = Phase::Leaving(u32::MAX);
                self.go_away(u32::MAX >> 1, Code::NoError, "");
                self.sender.control(kind::PING, 0, 0, &LEAVING.to_be_bytes());
                self.clock.farewell = Some(now + FAREWELL);
            }
            Phase::Preface(_) => self.end(),
            Phase::Leaving(_) | Phase::Over => (),
        }
    }

    fn say_farewell(&mut self) {
        self.clock.farewell = None;
        if self.phase == Phase::Leaving(u32::MAX) {
            self.phase = Phase::Leaving(self.highest);
            self.go_away(self.highest, Code::NoError, "");
            if self.streams.is_empty() {
                self.end();
            }
        }
    }

    /// An answer to one of our pings.
    pub(super) fn pong(&mut self, data: u64, _now: Instant) {
        if data == LEAVING {
            self.say_farewell();
        }
    }

    /// The socket has taken so much of what is to be written. `is_done` if nothing is left of it, neither here nor where TLS
    /// keeps it.
    pub fn wrote(&mut self, written: usize, is_done: bool, now: Instant) {
        let limit = now + self.clock.slow_reader;
        self.clock.stuck = match self.clock.stuck {
            _ if is_done => None,
            None => Some((limit, 0)),
            Some((_, before)) if before + written >= LEAST_RATE_BYTES => Some((limit, 0)),
            Some((when, before)) => Some((when, before + written)),
        };
        let unwritten = self.sender.output.len();
        if unwritten != self.sender.unwritten {
            self.sender.unwritten = unwritten;
            self.tell_held();
        }
        let sent = self.sender.sent;
        if !self.is_unread() {
            self.clock.unread = None;
        } else if self.clock.unread.is_none_or(|(_, before)| sent - before >= LEAST_RATE_BYTES as u64) {
            self.clock.unread = Some((limit, sent));
        }
    }

    /// Whether so much waits for windows, or calls wait for that, that the client has to read it in time.
    fn is_unread(&self) -> bool {
        let held = self.sender.held;
        !self.ready.is_empty() || held >= UNREAD_BYTES || held > ROOM_BYTES && self.shared.ledger.is_scarce()
    }

    /// The client has closed its side, and perhaps all of it. Calls that it has asked for completely are answered; what it
    /// would have to say more for, or to take back, ends here.
    pub fn input_ended(&mut self, now: Instant) {
        self.now = now;
        let is_complete = |stream: &Stream| {
            matches!(stream.role, Role::Ready(_) | Role::Called { .. } | Role::Packing | Role::Answered)
                || matches!(stream.role, Role::Guest(_)) && stream.inbound.ended
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
            self.abandon(slot, End::Theirs);
        }
        if self.is_over() {
            return;
        }
        if self.streams.is_empty() {
            return self.end();
        }
        self.phase = Phase::Leaving(self.highest);
        self.clock.half_closed = Some(now + self.clock.slow_reader);
        // It cannot answer pings.
        (self.clock.heard, self.clock.silent) = (now + self.clock.slow_reader, None);
        (self.clock.late, self.clock.begun, self.clock.farewell) = (None, None, None);
    }

    /// Whether it is of no use to write anything more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.clock.is_dead
    }
}
