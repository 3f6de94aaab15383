//! A hash table by lease that never stops to grow as a whole.
//!
//! One table for a million leases moves all of them when it doubles, which takes 40 ms during which nobody can grant or
//! renew. Each of these moves its own 16,000 at another moment, in well under a millisecond.

use std::collections::HashMap;

use super::LeaseId;

const TABLES: usize = 64;

/// The tables. Their order is random, so nothing that shows may depend on it.
#[derive(Debug)]
pub(super) struct Shards<V> {
    tables: Box<[HashMap<LeaseId, V>]>,
}

impl<V> Shards<V> {
    /// With room for so many leases.
    pub(super) fn with_capacity(leases: usize) -> Self {
        // IDs do not fall evenly: an eighth more room than the mean spares nearly all tables from growing at once.
        let each = leases / TABLES + leases / TABLES / 8;
        Self { tables: (0..TABLES).map(|_| HashMap::with_capacity(each)).collect() }
    }

    pub(super) fn get(&self, id: LeaseId) -> Option<&V> {
        self.tables[table_of(id)].get(&id)
    }

    pub(super) fn get_mut(&mut self, id: LeaseId) -> Option<&mut V> {
        self.tables[table_of(id)].get_mut(&id)
    }

    /// Sets the value of a lease; returns the one it had.
    pub(super) fn insert(&mut self, id: LeaseId, value: V) -> Option<V> {
        self.tables[table_of(id)].insert(id, value)
    }

    pub(super) fn remove(&mut self, id: LeaseId) -> Option<V> {
        self.tables[table_of(id)].remove(&id)
    }

    /// All leases, in no order.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (LeaseId, &V)> {
        self.tables.iter().flatten().map(|(&id, value)| (id, value))
    }
}

/// Spreads IDs that count up, whichever of their bits does the counting. IDs chosen to meet in one table only make that one
/// large.
fn table_of(id: LeaseId) -> usize {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 divided by the golden ratio.
    let top_bits = id.0.cast_unsigned().wrapping_mul(ODD) >> (u64::BITS - TABLES.ilog2());
    usize::try_from(top_bits).expect("six bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_count_up_spread_evenly() {
        for step in [1, 256, 1 << 20, 1 << 40] {
            let mut sizes = [0_usize; TABLES];
            for number in 0..64_000_i64 {
                sizes[table_of(LeaseId(number.wrapping_mul(step)))] += 1;
            }
            assert!(sizes.iter().all(|&size| (800..1200).contains(&size)), "in steps of {step}: {sizes:?}");
        }
    }

    #[test]
    fn it_is_one_map() {
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
