//! The key space: the bytes of each key, and the values that are written.
//!
//! A key is a prefix and a number with leading zeros, so that the keys are ordered by their numbers. Values are slices of one
//! pool of random bytes: creating one needs neither an allocation nor a copy, and they cannot be compressed.

use bytes::{BufMut, Bytes, BytesMut};

/// Values start at a random offset within this many bytes of the pool.
const VALUE_POOL_BYTES: usize = 1 << 20;
/// Keys are slices of blocks of this size.
const KEY_BLOCK_BYTES: usize = 64 << 10;

/// The keys and values of a run. Clones share the pool.
#[derive(Debug, Clone)]
pub(super) struct KeySpace {
    prefix: Bytes,
    digits: usize,
    count: u64,
    value_size: usize,
    seed: u64,
    value_pool: Bytes,
}

impl KeySpace {
    /// A key space of `count` keys of `key_size` bytes each.
    pub(super) fn new(prefix: &str, key_size: u32, count: u64, value_size: u32, seed: u64) -> Result<Self, String> {
        // The end of a range that includes the last key is key number `count`, which must fit as well.
        let needed = count.to_string().len();
        let digits = (key_size as usize).checked_sub(prefix.len()).filter(|digits| *digits >= needed).ok_or_else(|| {
            let least = prefix.len() + needed;
            format!("--key-size {key_size} is too small for --prefix {prefix:?} and --key-space {count}: {least} or more")
        })?;
        let mut random = Random::new(seed);
        let value_size = value_size as usize;
        let mut value_pool = BytesMut::with_capacity(VALUE_POOL_BYTES + value_size + 8);
        while value_pool.len() < VALUE_POOL_BYTES + value_size {
            value_pool.put_u64(random.next());
        }
        let prefix = Bytes::copy_from_slice(prefix.as_bytes());
        Ok(Self { prefix, digits, count, value_size, seed, value_pool: value_pool.freeze() })
    }

    /// The number of keys.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn value_size(&self) -> usize {
        self.value_size
    }

    pub(super) fn key_size(&self) -> usize {
        self.prefix.len() + self.digits
    }

    /// The random number generator of caller `number`.
    pub(super) fn random(&self, number: u32) -> Random {
        Random::new(mix(self.seed).wrapping_add(u64::from(number)))
    }

    /// Key `number`, as a slice of `block`, which is replaced when it is full.
    pub(super) fn key(&self, number: u64, block: &mut BytesMut) -> Bytes {
        debug_assert!(number <= self.count, "there is no key {number}");
        let size = self.key_size();
        if block.capacity() < size {
            *block = BytesMut::with_capacity(KEY_BLOCK_BYTES.max(size));
        }
        block.put_slice(&self.prefix);
        block.put_bytes(b'0', self.digits);
        let mut rest = number;
        for digit in block.iter_mut().rev() {
            if rest == 0 {
                break;
            }
            *digit = b'0' + u8::try_from(rest % 10).expect("a digit is below ten");
            rest /= 10;
        }
        block.split().freeze()
    }

    /// A random value.
    pub(super) fn value(&self, random: &mut Random) -> Bytes {
        let start = usize::try_from(random.below(VALUE_POOL_BYTES as u64)).expect("the pool is in memory");
        self.value_pool.slice(start..start + self.value_size)
    }

    /// The key that is written as number `number` when all keys are written once in shuffled order.
    pub(super) fn shuffled(&self, number: u64) -> u64 {
        permute(number, self.count, self.seed)
    }
}

/// A random number generator that is determined by its seed (`SplitMix64`).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// The next number below `bound`, which must not be zero.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        // Scaled rather than divided; the bias is one in 2^64 / bound.
        u64::try_from((u128::from(self.next()) * u128::from(bound)) >> 64).expect("below the bound")
    }
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Entry `index` of the shuffled numbers below `count`: a Feistel network over the next even power of two, applied repeatedly
/// until the result is below `count`, so that each number occurs exactly once.
fn permute(index: u64, count: u64, seed: u64) -> u64 {
    assert!(index < count, "{index} is not one of {count}");
    let half = (64 - (count - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut number = index;
    loop {
        let (mut left, mut right) = (number >> half, number & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(right ^ mix(seed ^ (round << 32))) & mask));
        }
        number = (left << half) | right;
        if number < count {
            return number;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn keys(count: u64) -> KeySpace {
        KeySpace::new("k/", 10, count, 16, 1).unwrap()
    }

    #[test]
    fn keys_are_in_the_order_of_their_numbers() {
        let (keys, mut block) = (keys(1000), BytesMut::new());
        assert_eq!(keys.key(0, &mut block), "k/00000000");
        assert_eq!(keys.key(42, &mut block), "k/00000042");
        assert_eq!(keys.key(1000, &mut block), "k/00001000");
    }

    #[test]
    fn a_key_space_must_fit_its_keys() {
        assert!(KeySpace::new("k/", 5, 999, 16, 1).is_ok());
        assert!(KeySpace::new("k/", 5, 1000, 16, 1).unwrap_err().ends_with("6 or more"));
        assert!(KeySpace::new("too long", 5, 1, 16, 1).is_err());
    }

    #[test]
    fn values_have_the_size_and_differ() {
        let keys = keys(10);
        let mut random = keys.random(0);
        let (first, second) = (keys.value(&mut random), keys.value(&mut random));
        assert_eq!((first.len(), second.len()), (16, 16));
        assert_ne!(first, second);
    }

    #[test]
    fn equal_seeds_give_equal_numbers_and_callers_differ() {
        let keys = keys(10);
        assert_eq!(keys.random(1).next(), keys.random(1).next());
        assert_ne!(keys.random(1).next(), keys.random(2).next());
    }

    #[test]
    fn random_numbers_cover_the_range_below_their_bound() {
        let mut random = Random::new(7);
        let seen: BTreeSet<u64> = (0..1000).map(|_| random.below(10)).collect();
        assert_eq!(seen, (0..10).collect());
    }

    #[test]
    fn a_shuffle_contains_every_number_once_in_another_order() {
        for count in [1, 2, 3, 10, 1000, 4096, 4097] {
            let order: Vec<u64> = (0..count).map(|index| permute(index, count, 3)).collect();
            assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), (0..count).collect());
            assert!(count < 10 || !order.is_sorted());
        }
    }
}
