//! Finds the watches that match a changed key, without examining the others.
//!
//! Watches of a single key are in a hash map, all others in an interval tree. Watches of the same keys form one group, so that a
//! thousand watches of one prefix cost one lookup.

use std::{collections::HashMap, ops::Range};

use bytes::Bytes;

use super::tree::{Bounds, IntervalTree};
use crate::mvcc::Interval;

/// A set of watches, given as numbers, by the keys that they watch.
#[derive(Default)]
pub struct Matcher {
    keys: HashMap<Bytes, Vec<u32>>,
    ranges: IntervalTree,
}

impl Matcher {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.ranges.is_empty()
    }

    /// Adds a watch; returns its position in its group.
    pub fn insert(&mut self, interval: &Interval, watch: u32) -> usize {
        let group = match interval {
            Interval::Key(key) => self.keys.entry(key.clone()).or_default(),
            Interval::Range(..) | Interval::From(_) => self.ranges.group(&bounds(interval)),
        };
        group.push(watch);
        group.len() - 1
    }

    /// Removes the watch at a position of a group. Returns the watch that has moved to this position, if any.
    pub fn remove(&mut self, interval: &Interval, position: usize) -> Option<u32> {
        match interval {
            Interval::Key(key) => {
                let group = self.keys.get_mut(key).expect("a watch is in the group of its keys");
                group.swap_remove(position);
                let moved = group.get(position).copied();
                if group.is_empty() {
                    self.keys.remove(key);
                }
                moved
            }
            Interval::Range(..) | Interval::From(_) => {
                let bounds = bounds(interval);
                let group = self.ranges.group(&bounds);
                group.swap_remove(position);
                let moved = group.get(position).copied();
                if group.is_empty() {
                    self.ranges.remove(&bounds);
                }
                moved
            }
        }
    }

    /// Visits all watches that match `key`, group by group.
    pub fn visit(&self, key: &[u8], mut visit: impl FnMut(&[u32])) {
        if let Some(group) = self.keys.get(key) {
            visit(group);
        }
        self.ranges.visit_one(key, &mut visit);
    }

    /// Visits all watches that match any of the keys numbered `keys`, group by group, with the range of numbers that the group
    /// matches. `key` maps a number to its key; keys must ascend, and may repeat.
    pub fn visit_all<'a>(
        &self,
        keys: Range<usize>,
        key: impl Fn(usize) -> &'a [u8],
        visit: &mut impl FnMut(&[u32], Range<usize>),
    ) {
        if !self.keys.is_empty() {
            let mut next = keys.start;
            while next < keys.end {
                let (first, this) = (next, key(next));
                next += 1;
                while next < keys.end && key(next) == this {
                    next += 1;
                }
                if let Some(group) = self.keys.get(this) {
                    visit(group, first..next);
                }
            }
        }
        if !self.ranges.is_empty() {
            self.ranges.visit(keys, key, visit);
        }
    }
}

fn bounds(interval: &Interval) -> Bounds {
    match interval {
        Interval::Key(key) | Interval::From(key) => Bounds { start: key.clone(), end: None },
        Interval::Range(start, end) => Bounds { start: start.clone(), end: Some(end.clone()) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(key: &'static str, end: &'static str) -> Interval {
        Interval::new(key.into(), end.into())
    }

    fn watchers(matcher: &Matcher, key: &str) -> Vec<u32> {
        let mut found = Vec::new();
        matcher.visit(key.as_bytes(), |group| found.extend_from_slice(group));
        found
    }

    #[test]
    fn keys_prefixes_and_open_ends_are_distinguished() {
        let mut matcher = Matcher::default();
        let all = [interval("a", ""), interval("a", "b"), interval("aa", "\0"), interval("a", ""), interval("b", "c")];
        let positions: Vec<usize> = (0..).zip(&all).map(|(watch, interval)| matcher.insert(interval, watch)).collect();
        assert_eq!(positions, [0, 0, 0, 1, 0]);
        assert_eq!(watchers(&matcher, "a"), [0, 3, 1]);
        assert_eq!(watchers(&matcher, "ab"), [1, 2]);
        assert_eq!(watchers(&matcher, "b"), [2, 4]);
        assert!(watchers(&matcher, "A").is_empty());
        assert_eq!(matcher.remove(&all[0], 0), Some(3), "the last watch of the group takes the position");
        assert_eq!(watchers(&matcher, "a"), [3, 1]);
        for (interval, _) in all[1..].iter().zip(1..) {
            assert_eq!(matcher.remove(interval, 0), None);
        }
        assert!(matcher.is_empty());
    }
}
