//! How much a client may ask of us, and who counts it.
//!
//! | flood | limit | what happens |
//! | --- | --- | --- |
//! | streams at a time | [`Limits::max_streams`] | the stream is refused |
//! | resets of calls in progress | [`Limits::max_resets`] a second | `ENHANCE_YOUR_CALM` |
//! | SETTINGS · PING · empty DATA · PRIORITY and unknown · `WINDOW_UPDATE` | [`Nuisance::per_second`] | `ENHANCE_YOUR_CALM` |
//! | one-byte windows | as [`Nuisance::Crumb`] | `ENHANCE_YOUR_CALM` |
//! | streams that we have to reset | as [`Nuisance::OwnReset`] | `ENHANCE_YOUR_CALM` |
//! | CONTINUATION | bytes and frames of a block | `ENHANCE_YOUR_CALM` |
//! | header list | [`Limits::max_header_list`] | HTTP status 431 |
//! | slow preface, no SETTINGS, slow header block or frame | [`Limits::patience`] | the connection ends |
//! | a socket that is not read | calls wait; [`Limits::slow_reader`] without progress | the connection ends |
//! | windows that do not open | the same, for who holds more than a mebibyte | the connection ends |
//! | bytes held, per connection and in all | [`Limits::max_held`], [`Limits::max_held_in_all`] | streams wait, calls hear `RESOURCE_EXHAUSTED` |
//! | connections | counted where they are accepted | it waits |
//!
//! Held is what a client makes us keep: requests that are not complete or not begun, answers that are not read, the heads of
//! open streams, a flat sum for each stream, and what conversations have kept elsewhere ([`Conversation::held`]): watches, and
//! events that wait for their stream. When all connections together hold too much, only those that hold more
//! than a fair share are refused ([`Shared::admits`]).

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::fault::{Code, Fault};
#[cfg(doc)]
use crate::call::Conversation;
use crate::metrics::METRICS;

/// The bounds of all connections.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Streams of a connection at a time.
    pub max_streams: u32,
    /// Calls in progress that a connection may take back, a second.
    pub max_resets: u32,
    /// Names, values, and 32 for each field.
    pub max_header_list: usize,
    /// Bytes of one message.
    pub max_message: usize,
    /// Bytes that are kept for one connection: requests, answers that are not read, and what open streams are counted for.
    /// Conversations and ordinary pages may fill half of it; the rest is for calls.
    pub max_held: usize,
    /// The same for all connections together. Beyond it a connection may still hold its fair share.
    pub max_held_in_all: usize,
    /// How long a preface, or a header block once begun, may take.
    pub patience: Duration,
    /// How long a client may take nothing of what is written to it.
    pub slow_reader: Duration,
    /// A client that is silent for so long is asked whether it is still there.
    pub keepalive_interval: Duration,
    /// And has so much time to answer.
    pub keepalive_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_streams: MOST_STREAMS,
            max_resets: 1000,
            max_header_list: 64 << 10,
            max_message: 2 << 20,
            max_held: 256 << 20,
            max_held_in_all: 2 << 30,
            patience: Duration::from_secs(10),
            slow_reader: Duration::from_mins(1),
            keepalive_interval: Duration::from_hours(2),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// More streams than this nobody gets, whatever is typed.
pub const MOST_STREAMS: u32 = 1 << 15;
/// Frames of one header block.
pub const MAX_BLOCK_FRAMES: u32 = 64;

/// What an open stream is counted for, whatever it asks.
pub const STREAM_BYTES: usize = 1 << 10;
/// What somebody who answers an ordinary request is counted for beside that.
pub const GUEST_BYTES: usize = 4 << 10;

/// Counts something that was refused or ended.
pub fn note(reason: &'static str) {
    tracing::debug!(reason, "refused");
    METRICS.refused.with_label_values(&[reason]).inc();
}

/// The limits, and what all connections together have taken of them.
#[derive(Debug, Default)]
pub struct Shared {
    /// What is allowed.
    pub limits: Limits,
    held: AtomicUsize,
    connections: AtomicUsize,
}

impl Shared {
    /// Nothing is taken yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// A connection begins, which will have its share.
    pub fn enter(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// It ends.
    pub fn leave(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a connection that holds so much may hold more, and so many bytes of it. `told` is what it is known to hold.
    ///
    /// While all together hold too much, whoever holds less than a fair share still may: it was not him.
    #[must_use]
    pub fn admits(&self, told: usize, held: usize, bytes: usize) -> bool {
        let limits = &self.limits;
        held + bytes <= limits.max_held
            && (self.held().saturating_sub(told) + held + bytes <= limits.max_held_in_all || held < self.fair_share())
    }

    /// How many bytes more a conversation may have kept for it, on a connection that holds so much. Conversations leave half of
    /// what a connection may hold to its calls.
    #[must_use]
    pub fn spare(&self, told: usize, held: usize) -> usize {
        let limits = &self.limits;
        let of_all = limits.max_held_in_all.saturating_sub(self.held().saturating_sub(told) + held);
        let of_share = self.fair_share().saturating_sub(held);
        (limits.max_held / 2).saturating_sub(held).min(of_all.max(of_share))
    }

    fn fair_share(&self) -> usize {
        self.limits.max_held_in_all / self.connections.load(Ordering::Relaxed).max(1)
    }

    /// A connection holds more than before, or less.
    pub fn hold(&self, before: usize, now: usize) {
        if now >= before {
            self.held.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.held.fetch_sub(before - now, Ordering::Relaxed);
        }
        METRICS.held_bytes.add(now.cast_signed() as i64 - before.cast_signed() as i64);
    }

    /// What all connections hold.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether little more can be held.
    #[must_use]
    pub fn is_scarce(&self) -> bool {
        self.held() > self.limits.max_held_in_all / 2
    }
}

/// Frames that are cheap to send and lead to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is what it says")]
pub enum Nuisance {
    Reset,
    OwnReset,
    Settings,
    Ping,
    EmptyData,
    Idle,
    WindowUpdate,
    Crumb,
}

const KINDS: usize = 8;

impl Nuisance {
    /// How many are borne in a second. Clients that measure the line ping once a round trip, so pings are many.
    #[must_use]
    pub fn per_second(self, limits: &Limits) -> u32 {
        match self {
            Self::Reset => limits.max_resets,
            Self::OwnReset => 1000,
            Self::Settings => 100,
            Self::Ping | Self::Idle => 10_000,
            Self::EmptyData | Self::Crumb => 2000,
            Self::WindowUpdate => 200_000,
        }
    }

    /// The name in the metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "resets",
            Self::OwnReset => "own_resets",
            Self::Settings => "settings",
            Self::Ping => "pings",
            Self::EmptyData => "empty_data",
            Self::Idle => "idle_frames",
            Self::WindowUpdate => "window_updates",
            Self::Crumb => "crumbs",
        }
    }
}

/// Counts nuisances, second by second.
#[derive(Debug, Default)]
pub struct Counter {
    since: Option<Instant>,
    counts: [u32; KINDS],
}

impl Counter {
    /// Counts one.
    pub fn count(&mut self, what: Nuisance, limits: &Limits, now: Instant) -> Result<(), Fault> {
        self.add(what, 1, limits, now)
    }

    /// Counts some.
    pub fn add(&mut self, what: Nuisance, count: u32, limits: &Limits, now: Instant) -> Result<(), Fault> {
        if self.since.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), counts: [0; KINDS] };
        }
        let counted = &mut self.counts[what as usize];
        *counted = counted.saturating_add(count);
        if *counted <= what.per_second(limits) {
            return Ok(());
        }
        METRICS.refused.with_label_values(&[what.name()]).inc();
        Err(Fault::connection(Code::EnhanceYourCalm, what.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_a_second_and_no_more() {
        let (limits, start) = (Limits::default(), Instant::now());
        let mut counter = Counter::default();
        for _ in 0..3 {
            let later = start + Duration::from_secs(1);
            counter.add(Nuisance::Settings, 100, &limits, later).unwrap();
            assert_eq!(counter.count(Nuisance::Settings, &limits, later).unwrap_err().code, Code::EnhanceYourCalm);
            counter.count(Nuisance::Ping, &limits, later).unwrap();
            counter.since = Some(start); // A second passes.
        }
    }

    #[test]
    fn who_holds_less_than_a_fair_share_is_never_refused() {
        let shared = Shared::new(Limits { max_held: 80, max_held_in_all: 100, ..Limits::default() });
        shared.enter();
        shared.enter();
        assert!(shared.admits(0, 70, 10) && !shared.admits(0, 70, 11), "a connection has its own limit");
        shared.hold(0, 70);
        assert!(shared.admits(0, 20, 10) && shared.admits(0, 40, 10), "there is room, or it is not his fault");
        assert!(!shared.admits(70, 70, 31) && !shared.admits(0, 50, 1));
        shared.leave();
        assert!(shared.admits(0, 50, 1), "the share of one is larger");
    }

    #[test]
    fn conversations_have_half_of_a_connection_and_what_all_of_them_have_left() {
        let shared = Shared::new(Limits { max_held: 80, max_held_in_all: 100, ..Limits::default() });
        shared.enter();
        shared.enter();
        assert_eq!((shared.spare(0, 0), shared.spare(0, 30), shared.spare(0, 50)), (40, 10, 0));
        shared.hold(0, 90);
        assert_eq!((shared.spare(90, 20), shared.spare(90, 90)), (20, 0), "what it holds itself is not counted twice");
        assert_eq!((shared.spare(0, 0), shared.spare(0, 20)), (40, 20), "less than a fair share is always admitted");
        (0..3).for_each(|_| shared.enter());
        assert_eq!((shared.spare(0, 0), shared.spare(0, 15), shared.spare(0, 20)), (20, 5, 0));
    }

    #[test]
    fn what_is_held_is_known_to_all() {
        let shared = Shared::new(Limits { max_held_in_all: 100, ..Limits::default() });
        shared.hold(0, 60);
        assert!(shared.is_scarce());
        shared.hold(60, 10);
        assert_eq!((shared.held(), shared.is_scarce()), (10, false));
    }
}
