//! Receive windows: how much a client may send, on one stream and on all streams of its connection together.
//!
//! The connection's window is released as data arrives, whichever stream it is for, so that no stream blocks another one; what
//! streams hold is bounded by other limits. A stream's window is released only as its data is consumed. Both windows grow while
//! the client uses them up quickly, and shrink while memory is scarce.

use std::time::{Duration, Instant};

use super::frame::DEFAULT_WINDOW;

/// A window is used quickly if half of it is used within this time.
const FAST: Duration = Duration::from_millis(10);
/// The lower limit of a shrinking window.
const MIN_TARGET: i64 = 64 << 10;
/// The largest window of a connection, and of a stream.
const MAX_CONNECTION_TARGET: i64 = 16 << 20;
const MAX_STREAM_TARGET: i64 = 2 << 20;
/// The initial target of a connection.
const INITIAL_CONNECTION_TARGET: i64 = 1 << 20;
/// The initial window of a stream. A message that needs more gets more.
pub const STREAM_WINDOW: i64 = 128 << 10;

#[derive(Debug)]
pub struct RecvWindow {
    /// How much the client may still send.
    window: i64,
    /// How much may be in flight and waiting here together.
    target: i64,
    max_target: i64,
    last_release: Option<Instant>,
}

/// The client has sent more than the window allowed.
#[derive(Debug, PartialEq, Eq)]
pub struct Overrun;

impl RecvWindow {
    #[must_use]
    pub fn for_connection() -> Self {
        Self {
            window: DEFAULT_WINDOW,
            target: INITIAL_CONNECTION_TARGET,
            max_target: MAX_CONNECTION_TARGET,
            last_release: None,
        }
    }

    #[must_use]
    pub fn for_stream() -> Self {
        Self { window: STREAM_WINDOW, target: STREAM_WINDOW, max_target: MAX_STREAM_TARGET, last_release: None }
    }

    /// Must be called for received data.
    pub fn receive(&mut self, bytes: usize) -> Result<(), Overrun> {
        self.window -= i64::try_from(bytes).unwrap_or(i64::MAX);
        if self.window < 0 { Err(Overrun) } else { Ok(()) }
    }

    /// The increment for a `WINDOW_UPDATE`, if one is due while so many bytes are waiting here.
    pub fn release(&mut self, waiting: usize, is_scarce: bool, now: Instant) -> Option<u32> {
        let waiting = i64::try_from(waiting).unwrap_or(i64::MAX);
        if self.window.saturating_add(waiting) > self.target / 2 {
            return None;
        }
        if is_scarce {
            self.target = (self.target / 2).max(MIN_TARGET);
        } else if self.last_release.is_some_and(|before| now.duration_since(before) < FAST) {
            self.target = (self.target * 2).min(self.max_target);
        }
        self.last_release = Some(now);
        self.widen(self.target - self.window - waiting)
    }

    /// The increment for a message of which `missing` bytes have not arrived; at least half the initial window, because the next
    /// message may be as long.
    pub fn widen_for(&mut self, missing: usize) -> Option<u32> {
        let short = i64::try_from(missing).unwrap_or(i64::MAX).saturating_sub(self.window);
        if short > 0 { self.widen(short.max(STREAM_WINDOW / 2)) } else { None }
    }

    /// Whether the client has sent much that was not consumed.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.window < STREAM_WINDOW / 2
    }

    fn widen(&mut self, bytes: i64) -> Option<u32> {
        let increment = u32::try_from(bytes).ok().filter(|&increment| increment > 0)?;
        self.window += bytes;
        Some(increment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn increment(bytes: i64) -> Option<u32> {
        u32::try_from(bytes).ok()
    }

    #[test]
    fn the_window_of_a_connection_follows_the_load() {
        let (mut window, start) = (RecvWindow::for_connection(), Instant::now());
        assert_eq!(window.release(0, false, start), increment(INITIAL_CONNECTION_TARGET - DEFAULT_WINDOW));
        assert_eq!(window.release(0, false, start), None);
        window.receive(600 << 10).unwrap();
        assert_eq!(window.release(0, false, start), increment((600 << 10) + (1 << 20)), "fast: twice as large");
        window.receive(1200 << 10).unwrap();
        assert_eq!(window.release(0, false, start + FAST), increment(1200 << 10), "slow: as large as before");
        window.receive(1200 << 10).unwrap();
        assert_eq!(window.release(0, true, start + FAST), increment(176 << 10), "memory is scarce: half as large");
        assert_eq!(window.receive(2 << 20), Err(Overrun));
    }

    #[test]
    fn the_window_of_a_stream_follows_its_reader() {
        let (mut window, start) = (RecvWindow::for_stream(), Instant::now());
        window.receive(128 << 10).unwrap();
        assert_eq!(window.release(100 << 10, false, start), None, "little was read");
        assert_eq!(window.release(40 << 10, false, start), increment(88 << 10));
        window.receive(88 << 10).unwrap();
        assert_eq!(window.release(0, false, start), increment(256 << 10), "all of it was read quickly");
        for _ in 0..10 {
            let sent = usize::try_from(window.window).unwrap();
            window.receive(sent).unwrap();
            assert!(window.release(0, false, start).is_some());
        }
        assert_eq!(window.window, MAX_STREAM_TARGET, "the upper limit");
        window.receive(2 << 20).unwrap();
        assert_eq!(window.release(0, true, start), increment(1 << 20), "memory is scarce: half as large");
    }

    #[test]
    fn a_long_message_gets_the_window_that_it_needs() {
        let mut window = RecvWindow::for_stream();
        window.receive(28 << 10).unwrap();
        assert_eq!(window.widen_for(100 << 10), None);
        assert_eq!(window.widen_for(101 << 10), increment(64 << 10), "at least half the initial window");
        assert_eq!(window.widen_for(1 << 20), increment((1 << 20) - (164 << 10)));
        window.receive(1 << 20).unwrap();
        assert_eq!(window.release(0, false, Instant::now()), increment(128 << 10));
    }
}
