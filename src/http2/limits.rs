//! How much a client may ask of us, and who counts it.
//!
//! | flood | limit | what happens |
//! | --- | --- | --- |
//! | streams at a time | [`Limits::max_streams`] | the stream is refused |
//! | resets of calls in progress | [`Limits::max_resets`] a second | `ENHANCE_YOUR_CALM` |
//! | SETTINGS · PING · empty DATA · PRIORITY and unknown · frames for streams that are gone · `WINDOW_UPDATE` | [`Flood::per_second`] | `ENHANCE_YOUR_CALM` |
//! | one-byte windows | as [`Flood::TinyFrame`] | `ENHANCE_YOUR_CALM` |
//! | streams that we have to reset | as [`Flood::OwnReset`] | `ENHANCE_YOUR_CALM` |
//! | CONTINUATION | bytes and frames of a block | `ENHANCE_YOUR_CALM` |
//! | header list | [`Limits::max_header_list`] | HTTP status 431 |
//! | slow preface, no SETTINGS, slow header block or frame | [`Limits::patience`] | the connection ends |
//! | a socket that is read at less than [`LEAST_RATE_BYTES`] in [`Limits::slow_reader`] | calls wait | the connection ends |
//! | windows that open no faster | the same, for a client that holds more than a mebibyte (or 64 KiB while memory is scarce) | the connection ends |
//! | bytes held, per connection and in all | [`Limits::max_held`], the [`Ledger`]'s limit | streams wait, calls hear `RESOURCE_EXHAUSTED` |
//! | a connection without calls | [`Limits::idle_timeout`], if there is one | the connection ends |
//! | connections | counted where they are accepted | it waits |
//!
//! Held is what a client makes us keep: requests that are not complete or not answered, answers that are not read, what
//! conversations say that they keep, the heads of open streams, and a flat sum for each stream. All connections add it to
//! one [`Ledger`]. When they hold too much together, only those that hold more than a fair share are refused
//! ([`Shared::admits`]).

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::fault::{Code, Fault};
use crate::{ledger::Ledger, metrics::METRICS};

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
    /// How long a preface, or a header block once begun, may take.
    pub patience: Duration,
    /// How long a client may take to read [`LEAST_RATE_BYTES`] of what is written to it.
    pub slow_reader: Duration,
    /// How long a connection may be open without a call. None: for ever.
    pub idle_timeout: Option<Duration>,
    /// A client that is silent for so long is asked whether it is still there.
    pub keepalive_interval: Duration,
    /// And has so much time to answer.
    pub keepalive_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_streams: MAX_STREAMS,
            max_resets: 1000,
            max_header_list: 64 << 10,
            max_message: 2 << 20,
            max_held: 256 << 20,
            patience: Duration::from_secs(10),
            slow_reader: Duration::from_mins(1),
            idle_timeout: None,
            keepalive_interval: Duration::from_hours(2),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// More streams than this nobody gets, whatever is typed.
pub const MAX_STREAMS: u32 = 1 << 15;
/// Frames of one header block.
pub const MAX_BLOCK_FRAMES: u32 = 64;

/// What an open stream is counted for, whatever it asks.
pub const STREAM_BYTES: usize = 1 << 10;
/// What somebody who answers an ordinary request is counted for beside that.
pub const HTTP_HANDLER_BYTES: usize = 4 << 10;

/// A client that reads less than this in [`Limits::slow_reader`] is given up.
pub const LEAST_RATE_BYTES: usize = 64 << 10;
/// A connection that holds no more than this is never refused, so that small calls go on whatever others hold.
const ALWAYS_ADMITTED_BYTES: usize = 16 << 10;

/// Counts something that was refused or ended.
pub fn note(reason: &'static str) {
    tracing::debug!(reason, "refused");
    METRICS.refused.with_label_values(&[reason]).inc();
}

/// The limits, and what all connections together have taken of them.
#[derive(Debug)]
pub struct Shared {
    /// What is allowed.
    pub limits: Limits,
    /// Where all that is held is counted.
    pub ledger: Arc<Ledger>,
    connections: AtomicUsize,
}

impl Shared {
    /// Nothing is taken yet.
    #[must_use]
    pub fn new(limits: Limits, ledger: Arc<Ledger>) -> Self {
        Self { limits, ledger, connections: AtomicUsize::new(0) }
    }

    /// A connection begins, which will have its share.
    pub fn connection_opened(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// It ends.
    pub fn connection_closed(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a connection that holds so much may hold more, and so many bytes of it. `reported` is what it is known to hold.
    ///
    /// The last quarter of what all may hold is kept for connections that hold less than a fair share: a client that fills
    /// the rest does not keep others from making calls. Beyond the limit only next to nothing may be held.
    #[must_use]
    pub fn admits(&self, reported: usize, held: usize, bytes: usize) -> bool {
        let wanted = held.saturating_add(bytes);
        if wanted <= ALWAYS_ADMITTED_BYTES {
            return true;
        }
        let (in_all, limit) = (self.in_all(reported, wanted), self.ledger.limit());
        wanted <= self.limits.max_held
            && (in_all <= limit - limit / 4 || in_all <= limit && wanted <= self.fair_share())
    }

    /// The same for the first answer of a connection that has none waiting: it may be larger than what a connection may
    /// hold otherwise, up to a fair share.
    #[must_use]
    pub fn admits_first(&self, reported: usize, held: usize, bytes: usize) -> bool {
        let wanted = held.saturating_add(bytes);
        self.admits(reported, held, bytes)
            || self.in_all(reported, wanted) <= self.ledger.limit() && wanted <= self.fair_share()
    }

    /// How many bytes more a conversation may have kept for it, on a connection that holds so much. Conversations leave half
    /// of what a connection may hold to its calls.
    #[must_use]
    pub fn spare(&self, reported: usize, held: usize) -> usize {
        let (in_all, limit) = (self.in_all(reported, held), self.ledger.limit());
        let free = (limit - limit / 4).saturating_sub(in_all);
        let share = limit.saturating_sub(in_all).min(self.fair_share().saturating_sub(held));
        (self.limits.max_held / 2)
            .saturating_sub(held)
            .min(free.max(share))
            .max(ALWAYS_ADMITTED_BYTES.saturating_sub(held))
    }

    /// What all would hold if this connection, known to hold `reported`, held `wanted`.
    fn in_all(&self, reported: usize, wanted: usize) -> usize {
        self.ledger.held().saturating_sub(reported).saturating_add(wanted)
    }

    fn fair_share(&self) -> usize {
        self.ledger.limit() / self.connections.load(Ordering::Relaxed).max(1)
    }
}

/// Frames that are cheap to send and lead to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is what it says")]
pub enum Flood {
    Reset,
    OwnReset,
    Settings,
    Ping,
    EmptyData,
    Idle,
    Stray,
    WindowUpdate,
    TinyFrame,
}

const FLOOD_KINDS: usize = 9;

impl Flood {
    /// How many are borne in a second. Clients that measure the line ping once a round trip, so pings are many.
    #[must_use]
    pub fn per_second(self, limits: &Limits) -> u32 {
        match self {
            Self::Reset => limits.max_resets,
            Self::OwnReset => 1000,
            Self::Settings => 100,
            Self::Ping | Self::Idle | Self::Stray => 10_000,
            Self::EmptyData | Self::TinyFrame => 2000,
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
            Self::Stray => "stray_frames",
            Self::WindowUpdate => "window_updates",
            Self::TinyFrame => "crumbs",
        }
    }
}

/// Counts nuisances, second by second.
#[derive(Debug, Default)]
pub struct FloodCounter {
    since: Option<Instant>,
    counts: [u32; FLOOD_KINDS],
}

impl FloodCounter {
    /// Counts one.
    pub fn count(&mut self, what: Flood, limits: &Limits, now: Instant) -> Result<(), Fault> {
        self.add(what, 1, limits, now)
    }

    /// Counts some.
    pub fn add(&mut self, what: Flood, count: u32, limits: &Limits, now: Instant) -> Result<(), Fault> {
        if self.since.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), counts: [0; FLOOD_KINDS] };
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
        let mut counter = FloodCounter::default();
        for _ in 0..3 {
            let later = start + Duration::from_secs(1);
            counter.add(Flood::Settings, 100, &limits, later).unwrap();
            assert_eq!(counter.count(Flood::Settings, &limits, later).unwrap_err().code, Code::EnhanceYourCalm);
            counter.count(Flood::Ping, &limits, later).unwrap();
            counter.since = Some(start); // A second passes.
        }
    }

    const KIB: usize = 1 << 10;

    #[test]
    fn the_last_quarter_is_for_those_that_hold_less_than_a_fair_share() {
        let ledger = Ledger::new(400 * KIB);
        let shared = Shared::new(Limits { max_held: 350 * KIB, ..Limits::default() }, ledger.clone());
        shared.connection_opened();
        shared.connection_opened();
        assert!(shared.admits(0, 290 * KIB, 10 * KIB), "there is room");
        assert!(!shared.admits(0, 290 * KIB, 11 * KIB), "it is more than a fair share of the last quarter");
        ledger.change(0, 250 * KIB);
        assert!(shared.admits(0, 100 * KIB, 50 * KIB), "less than a fair share");
        assert!(!shared.admits(0, 100 * KIB, 51 * KIB), "but no more than there is");
        assert!(shared.admits(250 * KIB, 250 * KIB, 50 * KIB), "what a connection holds is not counted twice");
        ledger.change(250 * KIB, 400 * KIB);
        assert!(shared.admits(0, 6 * KIB, 10 * KIB) && !shared.admits(0, 7 * KIB, 10 * KIB), "next to nothing always");
    }

    #[test]
    fn conversations_have_half_of_a_connection_and_what_all_of_them_have_left() {
        let ledger = Ledger::new(400 * KIB);
        let shared = Shared::new(Limits { max_held: 320 * KIB, ..Limits::default() }, ledger.clone());
        shared.connection_opened();
        shared.connection_opened();
        let spare = |reported, held| shared.spare(reported * KIB, held * KIB) / KIB;
        assert_eq!((spare(0, 0), spare(0, 120), spare(0, 200)), (160, 40, 0));
        ledger.change(0, 290 * KIB);
        assert_eq!((spare(0, 0), spare(0, 50), spare(290, 100)), (110, 60, 60), "what it holds is not counted twice");
        ledger.change(290 * KIB, 400 * KIB);
        assert_eq!((spare(0, 0), spare(0, 10), spare(0, 20)), (16, 6, 0), "next to nothing always");
    }

    #[test]
    fn a_first_answer_may_be_as_large_as_a_fair_share() {
        let ledger = Ledger::new(400 * KIB);
        let shared = Shared::new(Limits { max_held: 100 * KIB, ..Limits::default() }, ledger.clone());
        shared.connection_opened();
        shared.connection_opened();
        assert!(!shared.admits(0, 0, 150 * KIB) && shared.admits_first(0, 0, 150 * KIB));
        assert!(!shared.admits_first(0, 0, 201 * KIB), "the other connection has its share, too");
        ledger.change(0, 300 * KIB);
        assert!(shared.admits_first(0, 0, 100 * KIB) && !shared.admits_first(0, 0, 101 * KIB));
    }
}
