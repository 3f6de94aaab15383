//! A random number generator of our own, splitmix64: its sequence is the same on every machine and with every version of
//! every library, so that a seed that failed once can be kept.

use std::time::Duration;

/// The generator.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number of `0..limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).expect("below a usize")
    }

    /// A number of `first..=last`.
    pub fn between(&mut self, first: i64, last: i64) -> i64 {
        let span = usize::try_from(last - first + 1).expect("first comes before last");
        first + i64::try_from(self.below(span)).expect("below a span of i64")
    }

    /// True with a probability of `percent`.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// A duration of `from..to` milliseconds, in whole microseconds.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        let span = usize::try_from((to - from) * 1000).expect("a short time").max(1);
        Duration::from_micros(from * 1000 + self.below(span) as u64)
    }

    /// An independent generator, seeded from this one.
    pub fn split(&mut self) -> Self {
        Self(self.next())
    }

    /// An element of a slice.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
