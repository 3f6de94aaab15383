//! A reader with a minimum rate, so that a sender cannot occupy a connection by sending a byte at a time.

use std::{
    io::{self, ErrorKind, Read},
    time::{Duration, Instant},
};

/// A reader that fails below a minimum rate. Only the time spent in reads counts, not the time between them.
///
/// The rate is checked after each read, so reads of the underlying reader must have a timeout of their own.
pub(super) struct Paced<R> {
    from: R,
    /// The waiting time that is allowed in any case.
    grace: Duration,
    /// The minimum rate beyond that.
    bytes_per_second: u64,
    waited: Duration,
    bytes: u64,
}

impl<R: Read> Paced<R> {
    pub fn new(from: R, grace: Duration, bytes_per_second: u64) -> Self {
        Self { from, grace, bytes_per_second: bytes_per_second.max(1), waited: Duration::ZERO, bytes: 0 }
    }

    /// Measures the rate anew from now on.
    pub fn restart(&mut self) {
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

    /// Yields one byte per read, after this many milliseconds.
    struct SlowReader(u64);

    impl Read for SlowReader {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(self.0));
            into[0] = 7;
            Ok(1)
        }
    }

    #[test]
    fn a_sender_below_the_minimum_rate_fails_and_one_above_it_does_not() {
        let grace = Duration::from_millis(30);
        let mut slow = Paced::new(SlowReader(10), grace, 1000);
        let error = slow.read_exact(&mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().starts_with("the sender is too slow: "), "{error}");
        let mut steady = Paced::new(SlowReader(1), Duration::from_secs(20), 1000);
        steady.read_exact(&mut [0; 50]).unwrap();
        steady.restart();
        assert_eq!(steady.bytes, 0);
    }
}
