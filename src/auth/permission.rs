//! Which keys a user may read and write: the union of the ranges that its roles grant.
//!
//! A request for a range is allowed if the union covers it without a gap; several roles may cover it together, and ranges that
//! touch are joined.

use bytes::Bytes;

use crate::proto::authpb::{Permission, permission::Type};

/// As the end of a range: there is no end.
pub const OPEN_END: &[u8] = &[0];

/// A set of keys: half-open ranges in ascending order, which neither overlap nor touch. An end of None is open.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct KeySet(Vec<(Bytes, Option<Bytes>)>);

impl KeySet {
    fn new(mut ranges: Vec<(Bytes, Option<Bytes>)>) -> Self {
        ranges.sort_unstable();
        let mut joined: Vec<(Bytes, Option<Bytes>)> = Vec::with_capacity(ranges.len());
        for (begin, end) in ranges {
            match joined.last_mut() {
                Some((_, last_end)) if last_end.as_ref().is_none_or(|last_end| *last_end >= begin) => {
                    if is_later(end.as_ref(), last_end.as_ref()) {
                        *last_end = end;
                    }
                }
                _ => joined.push((begin, end)),
            }
        }
        Self(joined)
    }

    /// Whether a key is in the set.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        let after = self.0.partition_point(|(begin, _)| begin <= key);
        after > 0 && self.0[after - 1].1.as_ref().is_none_or(|end| key < end)
    }

    /// Whether all keys of a request are in the set: one key if `range_end` is empty, otherwise a range. A range that contains no
    /// key, because its end is not after its beginning, must begin in the set.
    #[must_use]
    pub fn covers(&self, key: &[u8], range_end: &[u8]) -> bool {
        let is_open = range_end == OPEN_END;
        if !is_open && range_end <= key {
            return self.contains(key);
        }
        let after = self.0.partition_point(|(begin, _)| begin <= key);
        let Some((_, end)) = after.checked_sub(1).map(|at| &self.0[at]) else { return false };
        match end {
            None => true,
            Some(end) => !is_open && range_end <= end,
        }
    }
}

/// Whether the end `a` comes after the end `b`.
fn is_later(a: Option<&Bytes>, b: Option<&Bytes>) -> bool {
    match (a, b) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(a), Some(b)) => a > b,
    }
}

/// What a user may do with keys.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Permissions {
    /// Whether the user has the role `root`, which allows everything.
    pub is_root: bool,
    pub read: KeySet,
    pub write: KeySet,
}

impl Permissions {
    /// The permissions that roles grant together.
    pub fn merge<'a>(is_root: bool, granted: impl IntoIterator<Item = &'a Permission>) -> Self {
        let (mut read, mut write) = (Vec::new(), Vec::new());
        for permission in granted {
            let range = range(permission);
            let kind = Type::try_from(permission.perm_type);
            if matches!(kind, Ok(Type::Read | Type::Readwrite)) {
                read.push(range.clone());
            }
            if matches!(kind, Ok(Type::Write | Type::Readwrite)) {
                write.push(range);
            }
        }
        Self { is_root, read: KeySet::new(read), write: KeySet::new(write) }
    }

    #[must_use]
    pub fn may_read(&self, key: &[u8], range_end: &[u8]) -> bool {
        self.is_root || self.read.covers(key, range_end)
    }

    #[must_use]
    pub fn may_write(&self, key: &[u8], range_end: &[u8]) -> bool {
        self.is_root || self.write.covers(key, range_end)
    }
}

/// The keys of a permission. A single key is the range up to the next possible key.
fn range(permission: &Permission) -> (Bytes, Option<Bytes>) {
    let key = permission.key.clone();
    match permission.range_end.as_ref() {
        [] => {
            let end = [&key, OPEN_END].concat();
            (key, Some(end.into()))
        }
        OPEN_END => (key, None),
        _ => (key, Some(permission.range_end.clone())),
    }
}

/// Whether a permission can be granted: it must name a key, and its range must not be empty.
#[must_use]
pub fn is_valid(permission: &Permission) -> bool {
    let (key, end) = (&permission.key, &permission.range_end);
    !key.is_empty() && (end.is_empty() || key < end || end.as_ref() == OPEN_END)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn permission(kind: Type, key: &'static str, range_end: &'static str) -> Permission {
        Permission { perm_type: kind as i32, key: key.into(), range_end: range_end.into() }
    }

    /// FAULT-43.
    #[test]
    fn ranges_that_touch_cover_a_range_together() {
        let granted = [
            permission(Type::Read, "a", "c"),
            permission(Type::Readwrite, "c", "e"),
            permission(Type::Read, "x", "\0"),
        ];
        let permissions = Permissions::merge(false, &granted);
        for (key, end, may_read, may_write) in [
            ("a", "e", true, false),
            ("a", "f", false, false),
            ("b", "", true, false),
            ("c", "e", true, true),
            ("d", "", true, true),
            ("e", "", false, false),
            ("y", "\0", true, false),
            ("b", "\0", false, false),
            ("x", "z", true, false),
            ("b", "a", true, false),
            ("b", "b", true, false),
            ("f", "a", false, false),
        ] {
            let (key, end) = (key.as_bytes(), end.as_bytes());
            assert_eq!(permissions.may_read(key, end), may_read, "read {key:?} {end:?}");
            assert_eq!(permissions.may_write(key, end), may_write, "write {key:?} {end:?}");
        }
    }

    #[test]
    fn a_permission_names_a_key_and_a_range_that_is_not_empty() {
        let valid = |key, end| is_valid(&permission(Type::Read, key, end));
        assert!(valid("a", "") && valid("a", "b") && valid("b", "\0"));
        assert!(!valid("", "") && !valid("", "\0") && !valid("b", "b") && !valid("b", "a"));
    }

    /// Keys of up to two letters of {0, 1, 2}: few enough to try each of them.
    fn keys() -> Vec<Vec<u8>> {
        let letters = || 0..3_u8;
        let one = letters().map(|a| vec![a]);
        let two = letters().flat_map(|a| letters().map(move |b| vec![a, b]));
        one.chain(two).collect()
    }

    /// Whether a key is in a range, by definition.
    fn is_in(key: &[u8], begin: &[u8], end: &[u8]) -> bool {
        match end {
            [] => key == begin,
            OPEN_END => key >= begin,
            _ => key >= begin && key < end,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Against the definition: a range is covered if each of its keys is in one of the granted ranges. (The keys tried are the
        /// bounds that can occur, and their successors: between these nothing changes.)
        #[test]
        fn covering_is_what_checking_each_key_says(
            granted in prop::collection::vec((0..12_usize, 0..14_usize), 0..6), asked in (0..12_usize, 0..14_usize),
        ) {
            let keys = keys();
            let end_of = |at: usize| -> Vec<u8> { match at { 12 => Vec::new(), 13 => OPEN_END.to_vec(), at => keys[at].clone() } };
            let granted: Vec<Permission> = granted.into_iter().map(|(begin, end)| {
                Permission { perm_type: 0, key: keys[begin].clone().into(), range_end: end_of(end).into() }
            }).filter(is_valid).collect();
            let (mut key, mut end) = (keys[asked.0].clone(), end_of(asked.1));
            if !end.is_empty() && end != OPEN_END && key > end {
                std::mem::swap(&mut key, &mut end);
            }
            if key == end {
                return Ok(()); // A range without keys has a rule of its own.
            }
            let set = Permissions::merge(false, &granted).read;
            let successors = keys.iter().map(|key| [key.as_slice(), OPEN_END].concat());
            let beyond_all = vec![9];
            let tried = keys.iter().cloned().chain(successors).chain([beyond_all]);
            let by_definition = tried.filter(|tried| is_in(tried, &key, &end)).all(|tried| {
                granted.iter().any(|permission| is_in(&tried, &permission.key, &permission.range_end))
            });
            prop_assert_eq!(set.covers(&key, &end), by_definition);
        }
    }
}
