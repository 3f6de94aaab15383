//! The index: the revisions of each key, always in memory.
//!
//! An ordered list of *leaves*, each a sorted run of at most [`LEAF_MAX`] keys. A lookup is one binary search over the leaves
//! and one inside a leaf. Each leaf stores how many of its keys are live and the newest revision in it, so counting a range
//! adds up leaves instead of visiting keys.
//!
//! ```text
//! leaves      ┌ from ""          ┌ from "fox"        ┌ from "owl"
//! entries     ant bee cat …      fox hen jay …       owl pig rat …
//! ```
//!
//! An entry holds its newest change in full, because nearly all requests read that one. Of older changes it keeps only the
//! revision; everything else has to be read from the record. Most keys have neither a lease nor a second revision, so both
//! are stored in a separate allocation.
//!
//! INVARIANTS
//! * Keys ascend over all leaves, and no leaf is empty.
//! * The revisions of a key ascend; the newest one is in the entry, all others in `extra.older`.
//! * `leaf.live` counts the entries whose newest change is not a deletion; `leaf.newest` is no less than any revision in it.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Interval, revision::Revision};

/// The maximum number of keys in a leaf; one more splits it.
const LEAF_MAX: usize = 64;
/// A leaf with fewer keys is merged with the next one if together they fill at most half a leaf.
const LEAF_MIN: usize = 16;
/// The capacities that a leaf grows through: just below the allocator's size classes, so that little memory is wasted.
const LEAF_CAPACITIES: [usize; 8] = [4, 9, 18, 27, 36, 45, 54, LEAF_MAX];

/// The metadata of a live key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyMetadata {
    /// The create revision.
    pub create: i64,
    /// The number of puts since the key was created, including that one.
    pub version: i64,
    /// Zero for none.
    pub lease: i64,
}

/// One change to a key: a put, with the metadata it resulted in, or a deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    pub revision: Revision,
    /// None for a deletion.
    pub metadata: Option<KeyMetadata>,
    /// Length of its record, including the record's key.
    pub bytes: u32,
}

/// A change that a compaction removed from the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemovedChange {
    pub revision: Revision,
    /// Whether it was a deletion.
    pub deletion: bool,
    /// Length of its record, including the record's key.
    pub bytes: u32,
}

/// The result of looking up a live key at some revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// The revision of the newest put that is visible.
    pub revision: Revision,
    /// The key's metadata at that revision; None if newer changes followed: then only the record has it.
    pub metadata: Option<KeyMetadata>,
}

/// What a compaction does to one key.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct KeyCompaction {
    /// How many of its changes are removed, oldest first.
    pub dropped: usize,
    /// The change at or below the compaction's revision that is kept, if any.
    pub kept: Option<Revision>,
}

struct Entry {
    key: Box<[u8]>,
    main: i64,
    create: i64,
    version: i64,
    sub: u32,
    shape: Shape,
    extra: Option<Box<EntryExtra>>,
}

/// Whether a change is a deletion, and the length of its record, packed into the four bytes that a `bool` would take here
/// anyway.
#[derive(Clone, Copy)]
struct Shape(u32);

impl Shape {
    const DELETED: u32 = 1 << 31;

    fn of(change: Change) -> Self {
        let bytes = change.bytes.min(MAX_RECORD_BYTES);
        Self(if change.metadata.is_none() { bytes | Self::DELETED } else { bytes })
    }

    fn is_deleted(self) -> bool {
        self.0 & Self::DELETED != 0
    }

    fn bytes(self) -> u32 {
        self.0 & !Self::DELETED
    }
}

/// Longer records count as this long.
pub const MAX_RECORD_BYTES: u32 = !Shape::DELETED;

/// Fields that only few keys need.
#[derive(Default)]
struct EntryExtra {
    lease: i64,
    older: Vec<PastChange>,
}

/// An older change: when, whether it was a deletion, and how long its record is.
#[derive(Clone, Copy)]
struct PastChange {
    main: i64,
    sub: u32,
    shape: Shape,
}

impl PastChange {
    fn revision(self) -> Revision {
        Revision { main: self.main, sub: self.sub }
    }

    fn removed(self) -> RemovedChange {
        RemovedChange { revision: self.revision(), deletion: self.shape.is_deleted(), bytes: self.shape.bytes() }
    }
}

impl Entry {
    fn new(key: &[u8], change: Change) -> Self {
        let shape = Shape::of(change);
        let mut entry = Self { key: key.into(), main: 0, create: 0, version: 0, sub: 0, shape, extra: None };
        entry.set_newest(change);
        entry
    }

    fn revision(&self) -> Revision {
        Revision { main: self.main, sub: self.sub }
    }

    fn is_deleted(&self) -> bool {
        self.shape.is_deleted()
    }

    fn newest(&self) -> PastChange {
        PastChange { main: self.main, sub: self.sub, shape: self.shape }
    }

    fn older(&self) -> &[PastChange] {
        self.extra.as_ref().map_or(&[], |extra| &extra.older)
    }

    fn change_count(&self) -> usize {
        self.older().len() + 1
    }

    fn nth_change(&self, nth: usize) -> PastChange {
        self.older().get(nth).copied().unwrap_or_else(|| self.newest())
    }

    fn plan_compaction(&self, at: i64) -> KeyCompaction {
        let visible = match self.older().partition_point(|change| change.main <= at) {
            older if older < self.older().len() || self.main > at => older,
            older => older + 1,
        };
        let Some(last) = visible.checked_sub(1) else { return KeyCompaction::default() };
        let change = self.nth_change(last);
        if change.shape.is_deleted() && change.main < at {
            return KeyCompaction { dropped: visible, kept: None };
        }
        KeyCompaction { dropped: last, kept: Some(change.revision()) }
    }

    fn lease(&self) -> i64 {
        self.extra.as_ref().map_or(0, |extra| extra.lease)
    }

    fn change(&self) -> Change {
        let metadata = KeyMetadata { create: self.create, version: self.version, lease: self.lease() };
        Change {
            revision: self.revision(),
            metadata: (!self.is_deleted()).then_some(metadata),
            bytes: self.shape.bytes(),
        }
    }

    fn set_newest(&mut self, change: Change) {
        let metadata = change.metadata.unwrap_or(KeyMetadata { create: 0, version: 0, lease: 0 });
        self.main = change.revision.main;
        self.sub = change.revision.sub;
        self.shape = Shape::of(change);
        self.create = metadata.create;
        self.version = metadata.version;
        match &mut self.extra {
            Some(extra) => extra.lease = metadata.lease,
            None if metadata.lease == 0 => (),
            None => self.extra = Some(Box::new(EntryExtra { lease: metadata.lease, older: Vec::new() })),
        }
        self.drop_empty_extra();
    }

    fn push(&mut self, change: Change) {
        assert!(self.revision() < change.revision, "the revisions of a key ascend");
        let replaced = self.newest();
        self.extra.get_or_insert_default().older.push(replaced);
        self.set_newest(change);
    }

    fn drop_empty_extra(&mut self) {
        if self.extra.as_ref().is_some_and(|extra| extra.lease == 0 && extra.older.is_empty()) {
            self.extra = None;
        }
    }

    /// The put that is visible at `at`, if the key is live at that revision.
    fn hit(&self, at: i64) -> Option<Hit> {
        if self.main <= at {
            let change = self.change();
            return change.metadata.map(|metadata| Hit { revision: change.revision, metadata: Some(metadata) });
        }
        let older = self.older();
        let visible = older.partition_point(|change| change.main <= at).checked_sub(1).map(|last| older[last])?;
        (!visible.shape.is_deleted()).then(|| Hit { revision: visible.revision(), metadata: None })
    }
}

struct Leaf {
    /// Lower bound of the keys in this leaf; all keys of the leaf before are smaller.
    from: Box<[u8]>,
    entries: Vec<Entry>,
    live: u32,
    newest: i64,
}

impl Leaf {
    fn new(from: Box<[u8]>, entries: Vec<Entry>) -> Self {
        let live = entries.iter().filter(|entry| !entry.is_deleted()).count();
        let newest = entries.iter().map(|entry| entry.main).max().unwrap_or(0);
        Self { from, entries, live: u32::try_from(live).expect("a leaf is small"), newest }
    }

    fn find(&self, key: &[u8]) -> Result<usize, usize> {
        self.entries.binary_search_by(|entry| entry.key.as_ref().cmp(key))
    }

    fn insert(&mut self, position: usize, entry: Entry) {
        if self.entries.len() == self.entries.capacity() {
            let capacity =
                LEAF_CAPACITIES.into_iter().find(|&capacity| capacity > self.entries.len()).unwrap_or(LEAF_MAX);
            self.entries.reserve_exact(capacity.saturating_sub(self.entries.len()).max(1));
        }
        self.live += u32::from(!entry.is_deleted());
        self.newest = self.newest.max(entry.main);
        self.entries.insert(position, entry);
    }
}

/// Where a key is, or would have to be inserted.
struct KeyPosition {
    leaf: usize,
    entry: Result<usize, usize>,
}

/// The ordered index of all keys.
#[derive(Default)]
pub struct Index {
    leaves: Vec<Leaf>,
    keys: usize,
    /// Total length of all keys.
    key_bytes: usize,
}

impl Index {
    /// The number of keys, including deleted keys that are not compacted yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys
    }

    /// Approximate memory of the whole index.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.leaves.len() * size_of::<Leaf>() + self.keys * size_of::<Entry>() + self.key_bytes
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys == 0
    }

    /// The newest change to `key`.
    #[must_use]
    pub fn newest(&self, key: &[u8]) -> Option<Change> {
        self.entry(key).map(Entry::change)
    }

    /// The put of `key` that is visible at `at`.
    #[must_use]
    pub fn get(&self, key: &[u8], at: i64) -> Option<Hit> {
        self.entry(key)?.hit(at)
    }

    /// Visits the keys of an interval that are live at `at`, in ascending order, until `visit` breaks.
    pub fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        let _ = self.visit_bounded(interval, at, usize::MAX, visit);
    }

    /// The same, but examines at most `budget` keys, live or not. Returns the key to continue from if there are more.
    pub fn visit_bounded(
        &self,
        interval: &Interval,
        at: i64,
        mut budget: usize,
        visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>,
    ) -> Option<Bytes> {
        let position = self.position(interval.start());
        let mut first = position.entry.unwrap_or_else(|position| position);
        for leaf in self.leaves.get(position.leaf..).unwrap_or(&[]) {
            let has_no_live_keys = leaf.live == 0 && leaf.newest <= at;
            for entry in &leaf.entries[first..] {
                if interval.is_past(&entry.key) {
                    return None;
                }
                if budget == 0 {
                    return Some(Bytes::copy_from_slice(&entry.key));
                }
                budget -= 1;
                if has_no_live_keys {
                    break; // No key of this leaf is live at `at`.
                }
                if entry.hit(at).is_some_and(|hit| visit(&entry.key, hit).is_break()) {
                    return None;
                }
            }
            first = 0;
        }
        None
    }

    /// How many keys of an interval are live at `at`.
    #[must_use]
    pub fn count(&self, interval: &Interval, at: i64) -> usize {
        self.count_bounded(interval, at, usize::MAX).0
    }

    /// The same, but examines at most `budget` keys and whole leaves, and at least one leaf. Also returns the key to continue
    /// from if there are more.
    #[must_use]
    pub fn count_bounded(&self, interval: &Interval, at: i64, mut budget: usize) -> (usize, Option<Bytes>) {
        let position = self.position(interval.start());
        let mut first = position.entry.unwrap_or_else(|position| position);
        let mut count = 0;
        budget = budget.max(LEAF_MAX);
        for (nth, leaf) in self.leaves.iter().enumerate().skip(position.leaf) {
            // If the next leaf starts inside the interval, all of this leaf's remaining keys are inside.
            let ends_inside = self.leaves.get(nth + 1).is_some_and(|next| !interval.is_past(&next.from));
            let counts_whole_leaf = first == 0 && ends_inside && leaf.newest <= at;
            let rest = &leaf.entries[first..];
            let cost = if counts_whole_leaf { 1 } else { rest.len() };
            if budget < cost {
                return (count, Some(Bytes::copy_from_slice(&rest[0].key)).filter(|key| !interval.is_past(key)));
            }
            budget -= cost;
            if counts_whole_leaf {
                count += leaf.live as usize;
            } else {
                let inside = rest.iter().take_while(|entry| !interval.is_past(&entry.key));
                count += inside.filter(|entry| entry.hit(at).is_some()).count();
                if !ends_inside {
                    break;
                }
            }
            first = 0;
        }
        (count, None)
    }

    /// Adds a change, which must be newer than all others of its key.
    pub fn push(&mut self, key: &[u8], change: Change) {
        let position = self.position(key);
        match position.entry {
            Ok(found) => {
                let leaf = &mut self.leaves[position.leaf];
                let entry = &mut leaf.entries[found];
                leaf.live -= u32::from(!entry.is_deleted());
                leaf.live += u32::from(change.metadata.is_some());
                leaf.newest = leaf.newest.max(change.revision.main);
                entry.push(change);
            }
            Err(missing) => self.insert(position.leaf, missing, Entry::new(key, change)),
        }
    }

    /// What a compaction at `at` does to one key.
    #[must_use]
    pub fn plan_compaction(&self, key: &[u8], at: i64) -> KeyCompaction {
        self.entry(key).map_or(KeyCompaction::default(), |entry| entry.plan_compaction(at))
    }

    /// Removes from the index what a compaction at `at` removes of one key: every change at or before `at` except the newest
    /// of these, and that one too if it is a deletion before `at`. Appends the removed changes to `removed`, oldest first.
    pub fn compact(&mut self, key: &[u8], at: i64, removed: &mut Vec<RemovedChange>) {
        let position = self.position(key);
        let Ok(found) = position.entry else { return };
        let entry = &mut self.leaves[position.leaf].entries[found];
        let dropped = entry.plan_compaction(at).dropped;
        removed.extend((0..dropped).map(|nth| entry.nth_change(nth).removed()));
        if dropped == entry.change_count() {
            self.remove(position.leaf, found);
        } else if let Some(extra) = &mut entry.extra {
            extra.older.drain(..dropped);
            extra.older.shrink_to_fit();
            entry.drop_empty_extra();
        }
    }

    fn entry(&self, key: &[u8]) -> Option<&Entry> {
        let position = self.position(key);
        let found = position.entry.ok()?;
        Some(&self.leaves[position.leaf].entries[found])
    }

    fn position(&self, key: &[u8]) -> KeyPosition {
        let leaf = self.leaves.partition_point(|leaf| leaf.from.as_ref() <= key).saturating_sub(1);
        let entry = self.leaves.get(leaf).map_or(Err(0), |leaf| leaf.find(key));
        KeyPosition { leaf, entry }
    }

    fn insert(&mut self, leaf: usize, position: usize, entry: Entry) {
        self.keys += 1;
        self.key_bytes += entry.key.len();
        if self.leaves.is_empty() {
            self.leaves.push(Leaf::new(Box::default(), Vec::new()));
        }
        if self.leaves[leaf].entries.len() < LEAF_MAX {
            return self.leaves[leaf].insert(position, entry);
        }
        // Keys inserted in ascending order leave full leaves behind; any other insertion splits the leaf in half.
        let half = if position == LEAF_MAX { LEAF_MAX } else { LEAF_MAX / 2 };
        let mut right: Vec<Entry> = Vec::with_capacity(LEAF_CAPACITIES[4]);
        right.extend(self.leaves[leaf].entries.drain(half..));
        let from = right.first().map_or_else(|| entry.key.clone(), |first| first.key.clone());
        let left = &mut self.leaves[leaf];
        left.entries.shrink_to(LEAF_CAPACITIES[4]);
        *left = Leaf::new(std::mem::take(&mut left.from), std::mem::take(&mut left.entries));
        self.leaves.insert(leaf + 1, Leaf::new(from, right));
        // A key exactly between the halves is smaller than `from` of the right one, so it goes to the left one.
        if position > half || half == LEAF_MAX {
            self.leaves[leaf + 1].insert(position - half, entry);
        } else {
            self.leaves[leaf].insert(position, entry);
        }
    }

    fn remove(&mut self, leaf: usize, position: usize) {
        self.keys -= 1;
        let removed = self.leaves[leaf].entries.remove(position);
        self.key_bytes -= removed.key.len();
        self.leaves[leaf].live -= u32::from(!removed.is_deleted());
        let len = self.leaves[leaf].entries.len();
        if len == 0 {
            self.leaves.remove(leaf);
            if let Some(first) = self.leaves.first_mut() {
                first.from = Box::default();
            }
        } else if len < LEAF_MIN
            && self.leaves.get(leaf + 1).is_some_and(|next| next.entries.len() + len <= LEAF_MAX / 2)
        {
            let next = self.leaves.remove(leaf + 1);
            for entry in next.entries {
                let end = self.leaves[leaf].entries.len();
                self.leaves[leaf].insert(end, entry);
            }
        }
    }
}

#[cfg(test)]
mod tests;
