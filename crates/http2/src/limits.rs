//! Limits on what a client may do, and the accounting for them.
//!
//! | flood or load | limit | consequence |
//! | --- | --- | --- |
//! | concurrent streams | [`Limits::max_streams`] | the stream is refused |
//! | resets of calls in progress | [`Limits::max_resets`] a second | `ENHANCE_YOUR_CALM` |
//! | SETTINGS · PING · empty DATA · PRIORITY and unknown · frames for closed streams · `WINDOW_UPDATE` | [`Flood::per_second`] | `ENHANCE_YOUR_CALM` |
//! | windows of a few bytes | as [`Flood::TinyFrame`] | `ENHANCE_YOUR_CALM` |
//! | streams that the server has to reset | as [`Flood::OwnReset`] | `ENHANCE_YOUR_CALM` |
//! | CONTINUATION | bytes and frames of a block | `ENHANCE_YOUR_CALM` |
//! | header list | [`Limits::max_header_list`] | HTTP status 431 |
//! | slow preface, no SETTINGS, slow header block or frame | [`Limits::begin_timeout`] | the connection ends |
//! | a socket that is read at less than [`MIN_READ_BYTES`] per [`Limits::read_timeout`] | calls wait | the connection ends |
//! | windows that open at less than that rate | the same, for a client that holds more than 1 MiB (or 64 KiB while memory is scarce) | the connection ends |
//! | bytes held, per connection and in total | [`Limits::max_held`], the limit of the [`Ledger`] | streams wait, calls fail with `RESOURCE_EXHAUSTED` |
//! | a connection without calls | [`Limits::idle_timeout`], if there is one | the connection ends |
//! | connections | counted where they are accepted | new ones wait |
//!
//! Held bytes are what a client makes the server keep: requests that are incomplete or not answered, responses that are not read,
//! what conversations say that they keep, the headers of open streams, and a flat amount for each stream. All connections report
//! them to one [`Ledger`]. When they hold too much together, only those above a fair share are refused ([`Shared::admits`]).

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::fault::{Code, Fault};
use crate::{ledger::Ledger, metrics};

/// Limits per connection.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Concurrent streams of a connection.
    pub max_streams: u32,
    /// Resets per second of calls in progress.
    pub max_resets: u32,
    /// Names, values, and 32 bytes for each field.
    pub max_header_list: usize,
    /// Bytes of one message.
    pub max_message: usize,
    /// Bytes that are kept for one connection: requests, responses that are not read, and what open streams are counted for.
    /// Conversations and HTTP responses may use half of it; the rest is for calls.
    pub max_held: usize,
    /// How long the preface, or a header block that has begun, may take.
    pub begin_timeout: Duration,
    /// How long a client may take to read [`MIN_READ_BYTES`] of what is written to it.
    pub read_timeout: Duration,
    /// How long a connection may be open without a call. `None`: forever.
    pub idle_timeout: Option<Duration>,
    /// A client that sends nothing for this long is pinged.
    pub keepalive_interval: Duration,
    /// How long it may take to answer the ping.
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
            begin_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_mins(1),
            idle_timeout: None,
            keepalive_interval: Duration::from_hours(2),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// The upper limit of [`Limits::max_streams`].
pub const MAX_STREAMS: u32 = 1 << 15;
/// Frames of one header block.
pub const MAX_BLOCK_FRAMES: u32 = 64;

/// The flat amount that an open stream is counted for.
pub const STREAM_BYTES: usize = 1 << 10;
/// What a handler of a plain HTTP request is counted for in addition.
pub const HTTP_HANDLER_BYTES: usize = 4 << 10;

/// A client that reads less than this per [`Limits::read_timeout`] is disconnected.
pub const MIN_READ_BYTES: usize = 64 << 10;
/// A connection that holds no more than this is never refused, so that small calls continue whatever other connections hold.
const ALWAYS_ADMITTED_BYTES: usize = 16 << 10;

/// Counts a request or connection that was refused or ended.
pub fn count_refusal(reason: &'static str) {
    tracing::debug!(reason, "refused a request or closed a connection");
    metrics::refused(reason);
}

/// The limits, and what all connections hold together.
#[derive(Debug)]
pub struct Shared {
    pub limits: Limits,
    /// Where everything that is held is counted.
    pub ledger: Arc<Ledger>,
    connections: AtomicUsize,
}

impl Shared {
    #[must_use]
    pub fn new(limits: Limits, ledger: Arc<Ledger>) -> Self {
        Self { limits, ledger, connections: AtomicUsize::new(0) }
    }

    /// Must be called for a new connection, which gets a fair share.
    pub fn connection_opened(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Must be called when a connection ends.
    pub fn connection_closed(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a connection that holds `held` bytes may hold `bytes` more. `reported` is what it has reported to the ledger.
    ///
    /// The last quarter of the ledger is reserved for connections that hold less than a fair share: a client that fills the rest
    /// does not keep others from making calls. Beyond the limit a connection may hold only [`ALWAYS_ADMITTED_BYTES`].
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

    /// The same for the first response of a connection that has none waiting: up to a fair share, it may be larger than what a
    /// connection may hold otherwise.
    #[must_use]
    pub fn admits_first(&self, reported: usize, held: usize, bytes: usize) -> bool {
        let wanted = held.saturating_add(bytes);
        self.admits(reported, held, bytes)
            || self.in_all(reported, wanted) <= self.ledger.limit() && wanted <= self.fair_share()
    }

    /// How many more bytes may be kept for a conversation on a connection that holds `held` bytes. Conversations leave half of
    /// what a connection may hold to its calls.
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

    /// What all connections would hold if this one, which has reported `reported`, held `wanted`.
    fn in_all(&self, reported: usize, wanted: usize) -> usize {
        self.ledger.held().saturating_sub(reported).saturating_add(wanted)
    }

    fn fair_share(&self) -> usize {
        self.ledger.limit() / self.connections.load(Ordering::Relaxed).max(1)
    }
}

/// Frames that are cheap to send and that the server has to process for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say what they are")]
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
    /// How many are tolerated per second. Clients that estimate the bandwidth ping once per round trip, so pings are frequent.
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

    /// The label of the metric.
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
            Self::TinyFrame => "tiny_window_updates",
        }
    }
}

/// Counts floods, second by second.
#[derive(Debug, Default)]
pub struct FloodCounter {
    since: Option<Instant>,
    counts: [u32; FLOOD_KINDS],
}

impl FloodCounter {
    /// Counts one frame.
    pub fn count(&mut self, what: Flood, limits: &Limits, now: Instant) -> Result<(), Fault> {
        self.add(what, 1, limits, now)
    }

    /// Counts several frames.
    pub fn add(&mut self, what: Flood, count: u32, limits: &Limits, now: Instant) -> Result<(), Fault> {
        if self.since.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), counts: [0; FLOOD_KINDS] };
        }
        let counted = &mut self.counts[what as usize];
        *counted = counted.saturating_add(count);
        if *counted <= what.per_second(limits) {
            return Ok(());
        }
        metrics::refused(what.name());
        Err(Fault::connection(Code::EnhanceYourCalm, what.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floods_are_limited_per_second() {
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
    fn the_last_quarter_is_for_connections_below_their_fair_share() {
        let ledger = Ledger::new(400 * KIB);
        let shared = Shared::new(Limits { max_held: 350 * KIB, ..Limits::default() }, ledger.clone());
        shared.connection_opened();
        shared.connection_opened();
        assert!(shared.admits(0, 290 * KIB, 10 * KIB), "within the first three quarters");
        assert!(!shared.admits(0, 290 * KIB, 11 * KIB), "it is more than a fair share of the last quarter");
        ledger.change(0, 250 * KIB);
        assert!(shared.admits(0, 100 * KIB, 50 * KIB), "less than a fair share");
        assert!(!shared.admits(0, 100 * KIB, 51 * KIB), "but no more than the limit");
        assert!(shared.admits(250 * KIB, 250 * KIB, 50 * KIB), "what a connection holds is not counted twice");
        ledger.change(250 * KIB, 400 * KIB);
        assert!(
            shared.admits(0, 6 * KIB, 10 * KIB) && !shared.admits(0, 7 * KIB, 10 * KIB),
            "a small amount is always admitted"
        );
    }

    #[test]
    fn conversations_may_use_half_of_a_connection_and_what_the_ledger_has_left() {
        let ledger = Ledger::new(400 * KIB);
        let shared = Shared::new(Limits { max_held: 320 * KIB, ..Limits::default() }, ledger.clone());
        shared.connection_opened();
        shared.connection_opened();
        let spare = |reported, held| shared.spare(reported * KIB, held * KIB) / KIB;
        assert_eq!((spare(0, 0), spare(0, 120), spare(0, 200)), (160, 40, 0));
        ledger.change(0, 290 * KIB);
        assert_eq!((spare(0, 0), spare(0, 50), spare(290, 100)), (110, 60, 60), "what it holds is not counted twice");
        ledger.change(290 * KIB, 400 * KIB);
        assert_eq!((spare(0, 0), spare(0, 10), spare(0, 20)), (16, 6, 0), "a small amount is always admitted");
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
