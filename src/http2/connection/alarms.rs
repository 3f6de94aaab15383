//! What happens because time passes. One coarse alarm serves a whole connection: whoever owns it asks when the next one is
//! ([`Connection::next_alarm`]), and rings not much later.

use std::time::{Duration, Instant};

use super::{Connection, Phase};
use crate::{
    call::{Code as Status, Refusal},
    http2::{
        fault::{Code, Fault},
        frame::kind,
        limits::Limits,
        streams::{Role, Stream},
    },
};

/// Deadlines of calls are looked at so often.
const SWEEP: Duration = Duration::from_millis(50);
/// How long a client that is told of our leaving may take to hear it.
const FAREWELL: Duration = Duration::from_millis(100);
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
        let idle = clock.silent.unwrap_or(clock.heard + clock.keepalive_interval);
        let late = clock.late.map(|(when, _)| when);
        [late, clock.stuck, clock.farewell, clock.sweep].into_iter().flatten().fold(idle, Instant::min)
    }

    /// Does what is due by now.
    pub fn alarm(&mut self, now: Instant) {
        self.now = now;
        let is_due = |when: Option<Instant>| when.is_some_and(|when| when <= now);
        if is_due(self.clock.stuck) || is_due(self.clock.silent) {
            tracing::debug!("a client that does not read, or does not answer, was given up");
            self.clock.is_dead = true;
            return self.end();
        }
        if let Some((when, why)) = self.clock.late
            && when <= now
        {
            if matches!(self.phase, Phase::Preface(_)) || self.block.is_some() {
                return self.fail(Fault::connection(Code::EnhanceYourCalm, why));
            }
            self.clock.late = None;
        }
        if is_due(self.clock.farewell) {
            self.say_farewell();
        }
        if is_due(self.clock.sweep) {
            self.sweep(now);
        }
        if self.clock.silent.is_none() && self.clock.heard + self.clock.keepalive_interval <= now && !self.is_over() {
            self.sender.control(kind::PING, 0, 0, &STILL_THERE.to_be_bytes());
            self.clock.silent = Some(now + self.clock.keepalive_timeout);
        }
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
            if self.streams.get(slot).is_some_and(|stream| stream.outbound.is_over()) {
                self.stop_listening(slot);
                continue;
            }
            let message = "context deadline exceeded".into();
            self.refuse(slot, Refusal { code: Status::DeadlineExceeded, message });
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

    /// The socket has taken something of what is to be written, or nothing, or there is nothing.
    pub fn wrote(&mut self, progress: bool, now: Instant) {
        if self.sender.output.is_empty() {
            self.clock.stuck = None;
        } else if progress || self.clock.stuck.is_none() {
            self.clock.stuck = Some(now + self.clock.slow_reader);
        }
    }

    /// Whether it is of no use to write anything more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.clock.is_dead
    }
}
