//! A reader that does not wait for ever for a sender that is slow on purpose.

use std::{
    io::{self, ErrorKind, Read},
    time::{Duration, Instant},
};

/// Reads what a sender has to send at some pace. Only waiting for it counts, not what is done with it in between.
///
/// The time is looked at after each read, so the reader below must end each by itself, sooner or later.
pub(super) struct Paced<R> {
    from: R,
    /// So long it may keep us waiting in any case.
    grace: Duration,
    /// And a second for so many bytes.
    bytes_per_second: u64,
    waited: Duration,
    bytes: u64,
}

impl<R: Read> Paced<R> {
    pub fn new(from: R, grace: Duration, bytes_per_second: u64) -> Self {
        Self { from, grace, bytes_per_second: bytes_per_second.max(1), waited: Duration::ZERO, bytes: 0 }
    }

    /// What comes now is counted from the beginning.
    pub fn start_over(&mut self) {
        (self.waited, self.bytes) = (Duration::ZERO, 0);
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let started = Instant::now();
        let count = self.from.read(into)?;
        self.waited += started.elapsed();
        self.bytes += count as u64;
        let allowed = Duration::from_millis(self.bytes.saturating_mul(1000) / self.bytes_per_second);
        if self.waited > self.grace.saturating_add(allowed) {
            let (bytes, waited) = (self.bytes, self.waited);
            let text = format!("the sender is too slow: {bytes} bytes in {waited:?}");
            return Err(io::Error::new(ErrorKind::TimedOut, text));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a byte at a time, so many milliseconds apart.
    struct Drip(u64);

    impl Read for Drip {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(self.0));
            into[0] = 7;
            Ok(1)
        }
    }

    #[test]
    fn a_sender_that_drips_is_given_up_and_one_that_keeps_the_pace_is_not() {
        let grace = Duration::from_millis(30);
        let mut slow = Paced::new(Drip(10), grace, 1000);
        let error = slow.read_exact(&mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().starts_with("the sender is too slow: "), "{error}");
        let mut steady = Paced::new(Drip(1), Duration::from_secs(20), 1000);
        steady.read_exact(&mut [0; 50]).unwrap();
        steady.start_over();
        assert_eq!(steady.bytes, 0);
    }
}
