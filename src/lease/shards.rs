//! A hash table keyed by lease ID, sharded so that it never has to grow all at once.
//!
//! A single table for a million leases moves all of them when it doubles, which takes 40 ms during which no lease can be
//! granted or renewed. Each shard moves only its own 16,000 leases, at a different time, in well under a millisecond.

use std::collections::HashMap;

use super::LeaseId;

const TABLES: usize = 64;

/// Iteration order is random, so nothing visible may depend on it.
#[derive(Debug)]
pub(super) struct Shards<V> {
    tables: Box<[HashMap<LeaseId, V>]>,
}

impl<V> Shards<V> {
    /// An empty map with capacity for this many leases.
    pub(super) fn with_capacity(leases: usize) -> Self {
        // IDs are not spread evenly: an eighth more capacity than the mean spares nearly all tables from growing soon.
        let each = leases / TABLES + leases / TABLES / 8;
        Self { tables: (0..TABLES).map(|_| HashMap::with_capacity(each)).collect() }
    }

    pub(super) fn get(&self, id: LeaseId) -> Option<&V> {
        self.tables[table_of(id)].get(&id)
    }

    pub(super) fn get_mut(&mut self, id: LeaseId) -> Option<&mut V> {
        self.tables[table_of(id)].get_mut(&id)
    }

    /// Sets the value of a lease; returns the previous one.
    pub(super) fn insert(&mut self, id: LeaseId, value: V) -> Option<V> {
        self.tables[table_of(id)].insert(id, value)
    }

    pub(super) fn remove(&mut self, id: LeaseId) -> Option<V> {
        self.tables[table_of(id)].remove(&id)
    }

    /// All leases, in no particular order.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (LeaseId, &V)> {
        self.tables.iter().flatten().map(|(&id, value)| (id, value))
    }
}

/// Spreads sequential IDs evenly, whichever of their bits are incremented. IDs chosen to collide only make one table large.
fn table_of(id: LeaseId) -> usize {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 divided by the golden ratio.
    let top_bits = id.0.cast_unsigned().wrapping_mul(ODD) >> (u64::BITS - TABLES.ilog2());
    usize::try_from(top_bits).expect("six bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_ids_spread_evenly() {
        for step in [1, 256, 1 << 20, 1 << 40] {
            let mut sizes = [0_usize; TABLES];
            for number in 0..64_000_i64 {
                sizes[table_of(LeaseId(number.wrapping_mul(step)))] += 1;
            }
            assert!(sizes.iter().all(|&size| (800..1200).contains(&size)), "in steps of {step}: {sizes:?}");
        }
    }

    #[test]
    fn shards_behave_like_one_map() {
        let mut shards = Shards::with_capacity(0);
        for id in [i64::MIN, -1, 1, i64::MAX] {
            assert_eq!(shards.insert(LeaseId(id), id), None);
        }
        assert_eq!(shards.insert(LeaseId(-1), 7), Some(-1));
        assert_eq!(shards.get(LeaseId(-1)), Some(&7));
        assert_eq!(shards.remove(LeaseId(-1)), Some(7));
        assert_eq!(shards.get_mut(LeaseId(-1)), None);
        let mut all: Vec<_> = shards.iter().collect();
        all.sort_unstable();
        assert_eq!(all, [(LeaseId(i64::MIN), &i64::MIN), (LeaseId(1), &1), (LeaseId(i64::MAX), &i64::MAX)]);
    }
}
