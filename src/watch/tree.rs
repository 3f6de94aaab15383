//! Which of many intervals contain a key.
//!
//! A search tree over distinct intervals, ordered by start, then by end. Each node also knows which node below it (or
//! itself) ends last, so a whole subtree that ends before the key is passed over at once. It is kept in balance by giving
//! each node a random weight and the lighter ones a lower place.
//!
//! INVARIANTS
//! * In order, intervals ascend and none is there twice; none has an empty group.
//! * No node is heavier than its parent.

use std::cmp::Ordering;

use bytes::Bytes;

/// No node.
const NIL: u32 = u32::MAX;

/// A half-open interval of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// The first key inside.
    pub start: Bytes,
    /// The first key behind; None if nothing is.
    pub end: Option<Bytes>,
}

impl Bounds {
    fn compare(&self, other: &Self) -> Ordering {
        self.start.cmp(&other.start).then_with(|| compare_ends(self.end.as_ref(), other.end.as_ref()))
    }

    fn ends_behind(&self, key: &[u8]) -> bool {
        self.end.as_ref().is_none_or(|end| end.as_ref() > key)
    }
}

fn compare_ends(a: Option<&Bytes>, b: Option<&Bytes>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => a.cmp(b),
        (a, b) => a.is_none().cmp(&b.is_none()),
    }
}

struct Node {
    bounds: Bounds,
    group: Vec<u32>,
    weight: u64,
    left: u32,
    right: u32,
    /// The node at or below this one that ends last.
    furthest: u32,
}

/// Groups of numbers, by interval.
pub struct IntervalTree {
    nodes: Vec<Node>,
    free: Vec<u32>,
    root: u32,
    made: u64,
}

impl Default for IntervalTree {
    fn default() -> Self {
        Self { nodes: Vec::new(), free: Vec::new(), root: NIL, made: 0 }
    }
}

impl IntervalTree {
    /// Whether there is no interval.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.root == NIL
    }

    /// Visits the group of every interval that contains `key`, in order.
    pub fn visit(&self, key: &[u8], visit: &mut dyn FnMut(&[u32])) {
        self.visit_below(self.root, key, visit);
    }

    /// The group of an interval, made if need be.
    pub fn group(&mut self, bounds: &Bounds) -> &mut Vec<u32> {
        let found = match self.find(bounds) {
            NIL => self.insert(bounds),
            found => found,
        };
        &mut self.nodes[found as usize].group
    }

    /// Removes an interval and its group.
    pub fn remove(&mut self, bounds: &Bounds) {
        let (root, removed) = self.remove_below(self.root, bounds);
        self.root = root;
        if self.is_empty() {
            *self = Self::default(); // Nobody is left: neither shall the memory of a crowd be.
            return;
        }
        let node = &mut self.nodes[removed as usize];
        node.bounds = Bounds { start: Bytes::new(), end: None };
        node.group = Vec::new();
        self.free.push(removed);
    }

    fn visit_below(&self, at: u32, key: &[u8], visit: &mut dyn FnMut(&[u32])) {
        let Some(node) = self.nodes.get(at as usize) else { return };
        if !self.nodes[node.furthest as usize].bounds.ends_behind(key) {
            return;
        }
        self.visit_below(node.left, key, visit);
        if node.bounds.start.as_ref() <= key {
            if node.bounds.ends_behind(key) {
                visit(&node.group);
            }
            self.visit_below(node.right, key, visit);
        }
    }

    fn find(&self, bounds: &Bounds) -> u32 {
        let mut at = self.root;
        while let Some(node) = self.nodes.get(at as usize) {
            at = match bounds.compare(&node.bounds) {
                Ordering::Less => node.left,
                Ordering::Greater => node.right,
                Ordering::Equal => break,
            };
        }
        at
    }

    fn insert(&mut self, bounds: &Bounds) -> u32 {
        self.made += 1;
        let weight = scatter(self.made);
        let node = Node { bounds: bounds.clone(), group: Vec::new(), weight, left: NIL, right: NIL, furthest: NIL };
        let new = if let Some(free) = self.free.pop() {
            self.nodes[free as usize] = node;
            free
        } else {
            self.nodes.push(node);
            u32::try_from(self.nodes.len() - 1).expect("intervals are counted in 32 bits")
        };
        self.update(new);
        let (left, right) = self.split(self.root, bounds);
        let left = self.merge(left, new);
        self.root = self.merge(left, right);
        new
    }

    /// Parts a subtree into what comes before `bounds` and what comes behind.
    fn split(&mut self, at: u32, bounds: &Bounds) -> (u32, u32) {
        if at == NIL {
            return (NIL, NIL);
        }
        let node = &self.nodes[at as usize];
        if node.bounds.compare(bounds) == Ordering::Less {
            let (middle, right) = self.split(node.right, bounds);
            self.nodes[at as usize].right = middle;
            self.update(at);
            (at, right)
        } else {
            let (left, middle) = self.split(node.left, bounds);
            self.nodes[at as usize].left = middle;
            self.update(at);
            (left, at)
        }
    }

    /// Joins two subtrees; everything in the first comes before everything in the second.
    fn merge(&mut self, left: u32, right: u32) -> u32 {
        if left == NIL || right == NIL {
            return left.min(right);
        }
        let top = if self.nodes[left as usize].weight > self.nodes[right as usize].weight {
            let below = self.merge(self.nodes[left as usize].right, right);
            self.nodes[left as usize].right = below;
            left
        } else {
            let below = self.merge(left, self.nodes[right as usize].left);
            self.nodes[right as usize].left = below;
            right
        };
        self.update(top);
        top
    }

    /// Returns what the subtree is without `bounds`, and the node that went.
    fn remove_below(&mut self, at: u32, bounds: &Bounds) -> (u32, u32) {
        let node = self.nodes.get(at as usize).expect("only an interval that is there is removed");
        let (left, right) = (node.left, node.right);
        let removed = match bounds.compare(&node.bounds) {
            Ordering::Equal => return (self.merge(left, right), at),
            Ordering::Less => {
                let (left, removed) = self.remove_below(left, bounds);
                self.nodes[at as usize].left = left;
                removed
            }
            Ordering::Greater => {
                let (right, removed) = self.remove_below(right, bounds);
                self.nodes[at as usize].right = right;
                removed
            }
        };
        self.update(at);
        (at, removed)
    }

    fn update(&mut self, at: u32) {
        let node = &self.nodes[at as usize];
        let below = [node.left, node.right].into_iter().filter(|&child| child != NIL);
        let below = below.map(|child| self.nodes[child as usize].furthest);
        let end = |nth: &u32| self.nodes[*nth as usize].bounds.end.as_ref();
        let furthest = below.fold(at, |best, other| match compare_ends(end(&other), end(&best)) {
            Ordering::Greater => other,
            Ordering::Less | Ordering::Equal => best,
        });
        self.nodes[at as usize].furthest = furthest;
    }
}

/// Spreads consecutive numbers over all 64 bits (the finaliser of splitmix64).
fn scatter(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::SmallRng};

    use super::*;

    impl IntervalTree {
        fn depth(&self, at: u32) -> usize {
            self.nodes.get(at as usize).map_or(0, |node| 1 + self.depth(node.left).max(self.depth(node.right)))
        }
    }

    fn bounds(start: u32, end: Option<u32>) -> Bounds {
        let key = |number: u32| Bytes::copy_from_slice(&number.to_be_bytes());
        Bounds { start: key(start), end: end.map(key) }
    }

    fn random(rng: &mut SmallRng) -> (u32, Option<u32>) {
        let start = rng.random_range(0..50);
        let end = rng.random_bool(0.9).then(|| start + rng.random_range(1..20));
        (start, end)
    }

    #[test]
    fn a_visit_finds_what_a_scan_of_all_intervals_finds() {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut tree = IntervalTree::default();
        let mut all: Vec<(u32, Option<u32>)> = Vec::new();
        for step in 0..4000 {
            let interval = random(&mut rng);
            match all.iter().position(|other| *other == interval) {
                Some(known) if rng.random_bool(0.7) => {
                    all.remove(known);
                    tree.remove(&bounds(interval.0, interval.1));
                }
                Some(_) => assert_eq!(tree.group(&bounds(interval.0, interval.1)).len(), 1, "step {step}"),
                None => {
                    all.push(interval);
                    tree.group(&bounds(interval.0, interval.1)).push(interval.0);
                }
            }
            let key: u32 = rng.random_range(0..75);
            let mut expected: Vec<_> =
                all.iter().filter(|(start, end)| *start <= key && end.is_none_or(|end| key < end)).collect();
            expected.sort_by_key(|(start, end)| (*start, end.unwrap_or(u32::MAX)));
            let mut found = Vec::new();
            tree.visit(&key.to_be_bytes(), &mut |group| found.extend_from_slice(group));
            assert_eq!(found, expected.iter().map(|(start, _)| *start).collect::<Vec<_>>(), "step {step}");
        }
        assert!(!tree.is_empty());
        for (start, end) in all {
            tree.remove(&bounds(start, end));
        }
        assert!(tree.is_empty());
    }

    #[test]
    fn intervals_that_come_in_order_make_no_deep_tree() {
        let mut tree = IntervalTree::default();
        for start in 0..10_000 {
            tree.group(&bounds(start, Some(start + 1))).push(start);
        }
        assert!(tree.depth(tree.root) < 50, "{}", tree.depth(tree.root));
    }
}
