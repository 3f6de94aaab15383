//! What happens because time passes. One coarse alarm serves a whole connection: whoever owns it asks when the next one is
//! ([`Connection::next_alarm`]), and rings not much later.

use std::time::{Duration, Instant};

use super::{Connection, Phase, UNREAD_BYTES};
use crate::http2::{
    fault::{Code, Fault},
    frame::kind,
    limits::{self, Limits},
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
    /// When the preface is late, or a header block.
    late: Option<(Instant, &'static str)>,
    heard: Instant,
    /// When an unanswered ping means that nobody is there.
    silent: Option<Instant>,
    /// When a reader who takes nothing is given up.
    stuck: Option<Instant>,
    /// When a reader who opens no window is given up, and how much windows had let through before.
    unread: Option<(Instant, u64)>,
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
            late: Some((now + limits.patience, "a preface that does not come")),
            heard: now,
            silent: None,
            stuck: None,
            unread: None,
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
            return clock.stuck.unwrap_or(self.now + clock.slow_reader);
        }
        let idle = clock.silent.unwrap_or(clock.heard + clock.keepalive_interval);
        let late = clock.late.map(|(when, _)| when);
        let unread = clock.unread.map(|(when, _)| when);
        let all = [late, clock.begun, clock.stuck, unread, clock.farewell, clock.sweep, clock.room];
        all.into_iter().flatten().fold(idle, Instant::min)
    }

    /// Does what is due by now.
    pub fn alarm(&mut self, now: Instant) {
        self.now = now;
        let is_due = |when: Option<Instant>| when.is_some_and(|when| when <= now);
        if is_due(self.clock.stuck) || is_due(self.clock.unread.map(|(when, _)| when)) {
            return self.give_up("slow_reader");
        }
        if self.is_over() {
            return;
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

    /// The socket has taken something of what is to be written, or nothing. `is_done` if nothing is left of it, neither here
    /// nor where TLS keeps it.
    pub fn wrote(&mut self, progress: bool, is_done: bool, now: Instant) {
        let limit = now + self.clock.slow_reader;
        if is_done {
            self.clock.stuck = None;
        } else if progress || self.clock.stuck.is_none() {
            self.clock.stuck = Some(limit);
        }
        let sent = self.sender.sent;
        if self.sender.held < UNREAD_BYTES && self.ready.is_empty() {
            self.clock.unread = None;
        } else if self.clock.unread.is_none_or(|(_, before)| before != sent) {
            self.clock.unread = Some((limit, sent));
        }
    }

    /// Whether it is of no use to write anything more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.clock.is_dead
    }
}
