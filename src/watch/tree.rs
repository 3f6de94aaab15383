//! An interval tree: finds the intervals that contain any of some keys.
//!
//! It is a search tree over distinct intervals, ordered by start, then by end. Each node also stores which node of its subtree
//! has the last end, so that a subtree whose intervals all end before the keys is skipped.
//!
//! Clients choose the intervals and the order in which they are added and removed, so the balance must not depend on either.
//! This is an AVL tree: whatever the operations, the heights of two siblings differ by at most one, and `n` intervals have a
//! depth of at most 1.44 · log₂ n. It needs no random numbers, hence no seed that would have to be kept secret. Every traversal
//! keeps its path in an array of that size and does not recurse.
//!
//! INVARIANTS
//! * In order, intervals ascend strictly; none has an empty group.
//! * The heights of the two children of a node differ by at most one.

use std::{cmp::Ordering, ops::Range};

use bytes::Bytes;

/// The index that stands for no node.
const NIL: u32 = u32::MAX;

/// The maximum length of a path: the height of an AVL tree with as many nodes as 32 bits can number.
const MAX_HEIGHT: usize = 46;

/// A half-open interval of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// The first key.
    pub start: Bytes,
    /// The exclusive end; None if there is no upper bound.
    pub end: Option<Bytes>,
}

impl Bounds {
    fn compare(&self, other: &Self) -> Ordering {
        self.start.cmp(&other.start).then_with(|| compare_ends(self.end.as_ref(), other.end.as_ref()))
    }

    fn ends_after(&self, key: &[u8]) -> bool {
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
    left: u32,
    right: u32,
    /// The node in this subtree whose interval has the last end.
    furthest: u32,
    height: u8,
}

/// A stack with a fixed capacity of one entry per level of the tree.
struct Path<T> {
    entries: [T; MAX_HEIGHT],
    len: usize,
}

impl<T: Copy> Path<T> {
    fn new(unused: T) -> Self {
        Self { entries: [unused; MAX_HEIGHT], len: 0 }
    }

    fn push(&mut self, entry: T) {
        self.entries[self.len] = entry;
        self.len += 1;
    }

    fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        Some(self.entries[self.len])
    }
}

impl Path<u32> {
    /// The lowest node of the path, or `NIL`.
    fn last(&self) -> u32 {
        self.len.checked_sub(1).map_or(NIL, |last| self.entries[last])
    }
}

/// Groups of watches, given as numbers, by interval.
pub struct IntervalTree {
    nodes: Vec<Node>,
    free: Vec<u32>,
    root: u32,
}

impl Default for IntervalTree {
    fn default() -> Self {
        Self { nodes: Vec::new(), free: Vec::new(), root: NIL }
    }
}

impl IntervalTree {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.root == NIL
    }

    /// Visits the group of every interval that contains `key`, in order. The common case of [`IntervalTree::visit`].
    pub fn visit_one(&self, key: &[u8], visit: &mut impl FnMut(&[u32])) {
        let mut path = Path::new(NIL);
        let mut at = self.root;
        loop {
            while let Some(node) = self.nodes.get(at as usize)
                && self.nodes[node.furthest as usize].bounds.ends_after(key)
            {
                path.push(at);
                at = node.left;
            }
            let Some(top) = path.pop() else { return };
            let Node { bounds, group, right, .. } = &self.nodes[top as usize];
            at = NIL;
            if bounds.start.as_ref() <= key {
                if bounds.ends_after(key) {
                    visit(group);
                }
                at = *right;
            }
        }
    }

    /// Visits the group of every interval that contains any of the keys numbered `keys`, in order, with the range of numbers
    /// that it contains. `key` maps a number to its key; keys must ascend, and may repeat.
    ///
    /// A subtree is visited only if it contains a hit or leads to the position of a key, so the cost is at most one path per key
    /// and per hit, and never more than the whole tree.
    pub fn visit<'a>(
        &self,
        keys: Range<usize>,
        key: impl Fn(usize) -> &'a [u8],
        visit: &mut impl FnMut(&[u32], Range<usize>),
    ) {
        // Nodes whose left subtree was visited or skipped, with the range of keys that they can contain.
        let mut path = Path::new((NIL, 0, 0));
        let (mut at, mut from, mut to) = (self.root, keys.start, keys.end);
        loop {
            while let Some(node) = self.nodes.get(at as usize) {
                let furthest = &self.nodes[node.furthest as usize].bounds;
                to = partition_point(from..to, |nth| furthest.ends_after(key(nth)));
                if from == to {
                    break;
                }
                path.push((at, from, to));
                at = node.left;
            }
            let Some((top, first, end)) = path.pop() else { return };
            let node = &self.nodes[top as usize];
            from = partition_point(first..end, |nth| key(nth) < node.bounds.start.as_ref());
            to = end;
            let inside_end = partition_point(from..to, |nth| node.bounds.ends_after(key(nth)));
            if from < inside_end {
                visit(&node.group, from..inside_end);
            }
            at = if from < to { node.right } else { NIL };
        }
    }

    /// The group of an interval. Adds the interval if it is new; the caller must then fill the group.
    pub fn group(&mut self, bounds: &Bounds) -> &mut Vec<u32> {
        let (found, path) = self.find(bounds);
        let found = if found == NIL { self.insert(bounds, path) } else { found };
        &mut self.nodes[found as usize].group
    }

    /// Removes an interval and its group.
    pub fn remove(&mut self, bounds: &Bounds) {
        let (removed, mut path) = self.find(bounds);
        assert!(removed != NIL, "only existing intervals are removed");
        let Node { left, right, .. } = self.nodes[removed as usize];
        let parent = path.last();
        let replacement =
            if left == NIL || right == NIL { left.min(right) } else { self.unlink_successor(removed, &mut path) };
        self.replace_child(parent, removed, replacement);
        self.rebalance(path);
        if self.is_empty() {
            *self = Self::default(); // Release the memory that many intervals needed.
            return;
        }
        let node = &mut self.nodes[removed as usize];
        node.bounds = Bounds { start: Bytes::new(), end: None };
        node.group = Vec::new();
        self.free.push(removed);
    }

    /// The node of an interval, or `NIL`; and the path of the nodes above it, or above the position where it would be inserted.
    fn find(&self, bounds: &Bounds) -> (u32, Path<u32>) {
        let mut path = Path::new(NIL);
        let mut at = self.root;
        while let Some(node) = self.nodes.get(at as usize) {
            let next = match bounds.compare(&node.bounds) {
                Ordering::Less => node.left,
                Ordering::Greater => node.right,
                Ordering::Equal => break,
            };
            path.push(at);
            at = next;
        }
        (at, path)
    }

    fn insert(&mut self, bounds: &Bounds, path: Path<u32>) -> u32 {
        let node = Node { bounds: bounds.clone(), group: Vec::new(), left: NIL, right: NIL, furthest: NIL, height: 0 };
        let new = if let Some(free) = self.free.pop() {
            self.nodes[free as usize] = node;
            free
        } else {
            self.nodes.push(node);
            u32::try_from(self.nodes.len() - 1).expect("intervals are counted in 32 bits")
        };
        self.update(new);
        match self.nodes.get_mut(path.last() as usize) {
            None => self.root = new,
            Some(parent) if bounds.compare(&parent.bounds) == Ordering::Less => parent.left = new,
            Some(parent) => parent.right = new,
        }
        self.rebalance(path);
        new
    }

    /// Unlinks the in-order successor of `removed` from its right subtree and makes it the parent of both subtrees. `path` leads
    /// to `removed`; afterwards it leads to the lowest node that may be unbalanced, with the successor instead of `removed`.
    fn unlink_successor(&mut self, removed: u32, path: &mut Path<u32>) -> u32 {
        let depth = path.len;
        path.push(removed);
        let Node { left, right, .. } = self.nodes[removed as usize];
        let mut successor = right;
        while self.nodes[successor as usize].left != NIL {
            path.push(successor);
            successor = self.nodes[successor as usize].left;
        }
        self.replace_child(path.last(), successor, self.nodes[successor as usize].right);
        // Read again: if the successor was the right child itself, it has just been replaced.
        let right = self.nodes[removed as usize].right;
        let node = &mut self.nodes[successor as usize];
        (node.left, node.right) = (left, right);
        path.entries[depth] = successor;
        successor
    }

    /// Replaces a child of a node, or the root if `parent` is `NIL`.
    fn replace_child(&mut self, parent: u32, child: u32, other: u32) {
        match self.nodes.get_mut(parent as usize) {
            None => self.root = other,
            Some(node) if node.left == child => node.left = other,
            Some(node) => node.right = other,
        }
    }

    /// Restores the balance and updates the nodes along a path, bottom up.
    fn rebalance(&mut self, mut path: Path<u32>) {
        while let Some(at) = path.pop() {
            let top = self.balance(at);
            if top != at {
                self.replace_child(path.last(), at, top);
            }
        }
    }

    /// Restores the balance of one node. Its subtrees must be balanced and their heights differ by at most two. Returns the new
    /// root of the subtree.
    fn balance(&mut self, at: u32) -> u32 {
        let Node { left, right, .. } = self.nodes[at as usize];
        if self.height(left) > self.height(right) + 1 {
            let Node { left: outer, right: inner, .. } = self.nodes[left as usize];
            if self.height(inner) > self.height(outer) {
                self.nodes[at as usize].left = self.rotate_left(left);
            }
            return self.rotate_right(at);
        }
        if self.height(right) > self.height(left) + 1 {
            let Node { left: inner, right: outer, .. } = self.nodes[right as usize];
            if self.height(inner) > self.height(outer) {
                self.nodes[at as usize].right = self.rotate_right(right);
            }
            return self.rotate_left(at);
        }
        self.update(at);
        at
    }

    /// Makes the left child of a node its parent; returns it.
    fn rotate_right(&mut self, at: u32) -> u32 {
        let top = self.nodes[at as usize].left;
        self.nodes[at as usize].left = self.nodes[top as usize].right;
        self.nodes[top as usize].right = at;
        self.update(at);
        self.update(top);
        top
    }

    /// Makes the right child of a node its parent; returns it.
    fn rotate_left(&mut self, at: u32) -> u32 {
        let top = self.nodes[at as usize].right;
        self.nodes[at as usize].right = self.nodes[top as usize].left;
        self.nodes[top as usize].left = at;
        self.update(at);
        self.update(top);
        top
    }

    fn height(&self, at: u32) -> u8 {
        self.nodes.get(at as usize).map_or(0, |node| node.height)
    }

    /// Computes `furthest` and `height` of a node from its children.
    fn update(&mut self, at: u32) {
        let Node { left, right, .. } = self.nodes[at as usize];
        let below = [left, right].into_iter().filter(|&child| child != NIL);
        let below = below.map(|child| self.nodes[child as usize].furthest);
        let end = |nth: &u32| self.nodes[*nth as usize].bounds.end.as_ref();
        let furthest = below.fold(at, |best, other| match compare_ends(end(&other), end(&best)) {
            Ordering::Greater => other,
            Ordering::Less | Ordering::Equal => best,
        });
        let height = 1 + self.height(left).max(self.height(right));
        let node = &mut self.nodes[at as usize];
        (node.furthest, node.height) = (furthest, height);
    }
}

/// The first number of a range for which `holds` is false. It must be true for all before and false for all after.
fn partition_point(range: Range<usize>, holds: impl Fn(usize) -> bool) -> usize {
    let Range { mut start, mut end } = range;
    while start < end {
        let middle = start + (end - start) / 2;
        if holds(middle) {
            start = middle + 1;
        } else {
            end = middle;
        }
    }
    start
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{RngExt, SeedableRng, rngs::SmallRng};

    use super::*;

    impl IntervalTree {
        /// Checks all invariants of a subtree; returns its height.
        fn check(&self, at: u32) -> u8 {
            let Some(node) = self.nodes.get(at as usize) else { return 0 };
            let (left, right) = (self.check(node.left), self.check(node.right));
            assert!(left.abs_diff(right) <= 1 && node.height == 1 + left.max(right));
            let is_in_order = |before: u32, after: u32| {
                let bounds = [before, after].map(|at| self.nodes.get(at as usize).map(|node| &node.bounds));
                !matches!(bounds, [Some(a), Some(b)] if a.compare(b) != Ordering::Less)
            };
            assert!(is_in_order(node.left, at) && is_in_order(at, node.right));
            let end = |at: u32| self.nodes[at as usize].bounds.end.as_ref();
            let below = [node.left, node.right].into_iter().filter(|&child| child != NIL);
            let furthest = below.map(|child| end(self.nodes[child as usize].furthest)).chain([end(at)]);
            let furthest = furthest.max_by(|a, b| compare_ends(*a, *b)).unwrap();
            assert_eq!(end(node.furthest), furthest);
            node.height
        }

        fn len(&self) -> usize {
            self.nodes.len() - self.free.len()
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
    fn a_visit_finds_the_same_as_a_scan_of_all_intervals() {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut tree = IntervalTree::default();
        // By start and end, where no end is the largest: the order in which intervals are visited.
        let mut all: BTreeMap<(u32, u32), u32> = BTreeMap::new();
        for step in 0..4000 {
            let (start, end) = random(&mut rng);
            let interval = (start, end.unwrap_or(u32::MAX));
            match all.get(&interval) {
                Some(_) if rng.random_bool(0.7) => {
                    all.remove(&interval);
                    tree.remove(&bounds(start, end));
                }
                Some(&watch) => assert_eq!(*tree.group(&bounds(start, end)), [watch], "step {step}"),
                None => {
                    all.insert(interval, step);
                    tree.group(&bounds(start, end)).push(step);
                }
            }
            assert_eq!(tree.len(), all.len());
            tree.check(tree.root);
            let mut keys: Vec<u32> = (0..rng.random_range(1..6)).map(|_| rng.random_range(0..75)).collect();
            keys.sort_unstable();
            let names: Vec<[u8; 4]> = keys.iter().map(|key| key.to_be_bytes()).collect();
            let expected = all.iter().filter_map(|((start, end), watch)| {
                let within = |key: &u32| start <= key && key < end;
                let first = keys.iter().position(within)?;
                Some((*watch, first..first + keys.iter().filter(|key| within(key)).count()))
            });
            let mut found = Vec::new();
            tree.visit(0..keys.len(), |nth| &names[nth], &mut |group, keys| found.push((group[0], keys)));
            assert_eq!(found, expected.collect::<Vec<_>>(), "step {step}, keys {keys:?}");
            let expected = all.iter().filter(|((start, end), _)| *start <= keys[0] && keys[0] < *end);
            let mut found = Vec::new();
            tree.visit_one(&names[0], &mut |group| found.extend_from_slice(group));
            assert_eq!(found, expected.map(|(_, watch)| *watch).collect::<Vec<_>>(), "step {step}, key {}", keys[0]);
        }
        assert!(!tree.is_empty());
        for (start, end) in all.into_keys() {
            tree.remove(&bounds(start, (end != u32::MAX).then_some(end)));
            tree.check(tree.root);
        }
        assert!(tree.is_empty());
    }

    /// Spreads consecutive numbers over all 64 bits (the finaliser of splitmix64).
    fn scatter(number: u64) -> u64 {
        let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Orders in which a client could add intervals: ascending, descending, from both ends towards the middle, and an order that
    /// would degrade a treap to a list if its priorities were this fixed sequence of pseudo-random numbers.
    fn hostile_orders(count: u32) -> Vec<Vec<u32>> {
        let weights: Vec<u64> = (1..=count).map(|nth| scatter(nth.into())).collect();
        let mut by_weight: Vec<usize> = (0..weights.len()).collect();
        by_weight.sort_unstable_by_key(|&nth| weights[nth]);
        let mut chosen = vec![0; weights.len()];
        for (rank, nth) in (0..).zip(by_weight) {
            chosen[nth] = rank;
        }
        let zigzag = (0..count).map(|nth| if nth % 2 == 0 { nth / 2 } else { count - 1 - nth / 2 });
        vec![(0..count).collect(), (0..count).rev().collect(), zigzag.collect(), chosen]
    }

    #[test]
    fn no_order_of_insertions_and_removals_makes_the_tree_deep() {
        const COUNT: u32 = 60_000;
        // The smallest stack of any thread: a recursion to the depth of a list would overflow it.
        let body = || {
            for order in hostile_orders(COUNT) {
                let mut tree = IntervalTree::default();
                for &start in &order {
                    tree.group(&bounds(start, Some(start + 1))).push(start);
                }
                let allowed = |tree: &IntervalTree| 4.0 * f64::from(u32::try_from(tree.len()).unwrap()).log2();
                assert!(f64::from(tree.check(tree.root)) <= allowed(&tree));
                // Remove all but a few, in the order of their insertion.
                for &start in &order[..order.len() - 100] {
                    tree.remove(&bounds(start, Some(start + 1)));
                }
                assert_eq!(tree.len(), 100);
                assert!(f64::from(tree.check(tree.root)) <= allowed(&tree));
                for &start in order[order.len() - 100..].iter().rev() {
                    tree.remove(&bounds(start, Some(start + 1)));
                }
                assert!(tree.is_empty());
            }
        };
        std::thread::Builder::new().stack_size(256 << 10).spawn(body).unwrap().join().unwrap();
    }
}
