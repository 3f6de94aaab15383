//! The keys attached to one lease: 16 bytes if there is one key (beside the key itself) or none.
//!
//! Nearly all leases have exactly one key, so that case has no tree. Keys are copied: a slice of the request that a key came in
//! would keep the whole request in memory for as long as the lease exists.

use std::collections::BTreeSet;
use std::ops::Bound;

use bytes::Bytes;

/// An ordered set of keys.
#[derive(Debug)]
pub(super) enum Keys {
    One(Box<[u8]>),
    /// Two or more, or none. A third variant for none would make every lease eight bytes larger.
    Several(Option<Box<Tree>>),
}

type Tree = BTreeSet<Box<[u8]>>;

impl Default for Keys {
    fn default() -> Self {
        Self::Several(None)
    }
}

impl Keys {
    pub(super) fn insert(&mut self, key: &[u8]) {
        match self {
            Self::Several(None) => *self = Self::One(key.into()),
            Self::Several(Some(tree)) => {
                tree.insert(key.into());
            }
            Self::One(only) if **only == *key => {}
            Self::One(only) => {
                let tree = Tree::from([std::mem::take(only), key.into()]);
                *self = Self::Several(Some(Box::new(tree)));
            }
        }
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        match self {
            Self::One(only) if **only == *key => *self = Self::Several(None),
            Self::One(_) | Self::Several(None) => {}
            Self::Several(Some(tree)) => {
                tree.remove(key);
                if tree.len() == 1 {
                    *self = Self::One(tree.pop_first().expect("one is left"));
                }
            }
        }
    }

    /// Appends up to `limit` keys to `found`, in ascending order: those above `last`, or all if None.
    pub(super) fn read_after(&self, last: Option<&[u8]>, limit: usize, found: &mut Vec<Bytes>) {
        match self {
            Self::One(only) if last.is_none_or(|last| **only > *last) => found.push(Bytes::copy_from_slice(only)),
            Self::One(_) | Self::Several(None) => {}
            Self::Several(Some(tree)) => {
                let from = last.map_or(Bound::Unbounded, Bound::Excluded);
                let chunk = tree.range::<[u8], _>((from, Bound::Unbounded)).take(limit);
                found.extend(chunk.map(|key| Bytes::copy_from_slice(key)));
            }
        }
    }

    /// The first and the last key; None if there are none.
    pub(super) fn bounds(&self) -> Option<(&[u8], &[u8])> {
        match self {
            Self::One(only) => Some((only, only)),
            Self::Several(None) => None,
            Self::Several(Some(tree)) => Some((tree.first()?, tree.last()?)),
        }
    }

    pub(super) fn into_ascending(self) -> Vec<Bytes> {
        match self {
            Self::One(only) => vec![only.into()],
            Self::Several(None) => Vec::new(),
            Self::Several(Some(tree)) => tree.into_iter().map(Bytes::from).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_set_takes_two_words() {
        assert_eq!(size_of::<Keys>(), 16);
    }

    proptest! {
        #[test]
        fn keys_behave_like_an_ordered_set(steps in prop::collection::vec((any::<bool>(), 0_u8..4), 0..40)) {
            let mut keys = Keys::default();
            let mut model = BTreeSet::new();
            for (insert, key) in steps {
                if insert {
                    keys.insert(&[key]);
                    model.insert(key);
                } else {
                    keys.remove(&[key]);
                    model.remove(&key);
                }
                for limit in 1..5 {
                    let mut found = Vec::new();
                    keys.read_after(Some(&[0]), limit, &mut found);
                    let expected: Vec<_> = model.range(1..).take(limit).map(|&key| vec![key]).collect();
                    prop_assert_eq!(found, expected);
                }
                let (first, last) = (model.first().map(|key| vec![*key]), model.last().map(|key| vec![*key]));
                let bounds = keys.bounds().map(|(first, last)| (first.to_vec(), last.to_vec()));
                prop_assert_eq!(bounds, first.zip(last));
                prop_assert_eq!(matches!(keys, Keys::One(_)), model.len() == 1);
            }
            prop_assert_eq!(keys.into_ascending(), model.into_iter().map(|key| vec![key]).collect::<Vec<_>>());
        }
    }
}
