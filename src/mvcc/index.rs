//! Which revisions each key has: the part of the key space that is always in memory.
//!
//! An ordered list of *leaves*, each a sorted run of at most [`LEAF_MAX`] keys. Finding a key is one binary search over
//! the leaves and one inside a leaf. A leaf knows how many of its keys are alive and the newest revision in it, so counting
//! a range adds up leaves instead of visiting keys.
//!
//! ```text
//! leaves      ┌ from ""          ┌ from "fox"        ┌ from "owl"
//! entries     ant bee cat …      fox hen jay …       owl pig rat …
//! ```
//!
//! An entry holds its newest change in full, because that is what nearly everybody asks for. Of older ones it keeps only
//! the revision; who wants more of them reads the record. Most keys have neither a lease nor a second revision, so both
//! live out of line.
//!
//! INVARIANTS
//! * Keys ascend over all leaves, and no leaf is empty.
//! * The revisions of a key ascend; the newest one is in the entry, all others in `past.older`.
//! * `leaf.live` counts the entries whose newest change is not a deletion; `leaf.newest` is no less than any revision in it.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Interval, revision::Revision};

/// More keys than this split a leaf in two.
const LEAF_MAX: usize = 64;
/// A leaf below this joins its neighbour if the two fit with room to spare.
const LEAF_FEW: usize = 16;
/// How a leaf's room grows: just below the allocator's size classes, so that little is wasted.
const LEAF_ROOM: [usize; 8] = [4, 9, 18, 27, 36, 45, 54, LEAF_MAX];

/// What is true of a live key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// The revision that created the key.
    pub create: i64,
    /// Puts since then, that one included.
    pub version: i64,
    /// The attached lease, or zero.
    pub lease: i64,
}

/// One change to a key: a put with what became of the key, or a deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// When.
    pub revision: Revision,
    /// None for a deletion.
    pub life: Option<Life>,
    /// How long its record is, with the record's key.
    pub bytes: u32,
}

/// A change that a compaction forgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgotten {
    /// When it was made.
    pub revision: Revision,
    /// Whether it was a deletion.
    pub deletion: bool,
    /// How long its record is, with the record's key.
    pub bytes: u32,
}

/// A live key, as the index knows it at some revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// The revision of the newest put that is visible.
    pub revision: Revision,
    /// What is true of the key then; None where only its record knows, because newer changes followed.
    pub life: Option<Life>,
}

/// What a compaction does to a key.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// How many of its changes it forgets.
    pub forgotten: usize,
    /// The one that stays, of those up to the compaction's revision.
    pub kept: Option<Revision>,
}

struct Entry {
    key: Box<[u8]>,
    main: i64,
    create: i64,
    version: i64,
    sub: u32,
    shape: Shape,
    past: Option<Box<Past>>,
}

/// Whether a change is a deletion, and how long its record is: together in what the first alone would take.
#[derive(Clone, Copy)]
struct Shape(u32);

impl Shape {
    const DELETED: u32 = 1 << 31;

    fn of(change: Change) -> Self {
        let bytes = change.bytes.min(MAX_RECORD_BYTES);
        Self(if change.life.is_none() { bytes | Self::DELETED } else { bytes })
    }

    fn is_deleted(self) -> bool {
        self.0 & Self::DELETED != 0
    }

    fn bytes(self) -> u32 {
        self.0 & !Self::DELETED
    }
}

/// A longer record counts as one of this length.
pub const MAX_RECORD_BYTES: u32 = !Shape::DELETED;

/// What few keys have.
#[derive(Default)]
struct Past {
    lease: i64,
    older: Vec<Mark>,
}

/// An older change: when, whether it was a deletion, and how long its record is.
#[derive(Clone, Copy)]
struct Mark {
    main: i64,
    sub: u32,
    shape: Shape,
}

impl Mark {
    fn revision(self) -> Revision {
        Revision { main: self.main, sub: self.sub }
    }

    fn forgotten(self) -> Forgotten {
        Forgotten { revision: self.revision(), deletion: self.shape.is_deleted(), bytes: self.shape.bytes() }
    }
}

impl Entry {
    fn new(key: &[u8], change: Change) -> Self {
        let shape = Shape::of(change);
        let mut entry = Self { key: key.into(), main: 0, create: 0, version: 0, sub: 0, shape, past: None };
        entry.set_newest(change);
        entry
    }

    fn revision(&self) -> Revision {
        Revision { main: self.main, sub: self.sub }
    }

    fn is_deleted(&self) -> bool {
        self.shape.is_deleted()
    }

    fn newest(&self) -> Mark {
        Mark { main: self.main, sub: self.sub, shape: self.shape }
    }

    fn older(&self) -> &[Mark] {
        self.past.as_ref().map_or(&[], |past| &past.older)
    }

    /// How many changes there are.
    fn marks(&self) -> usize {
        self.older().len() + 1
    }

    fn mark(&self, nth: usize) -> Mark {
        self.older().get(nth).copied().unwrap_or_else(|| self.newest())
    }

    fn fate(&self, at: i64) -> Fate {
        let visible = match self.older().partition_point(|mark| mark.main <= at) {
            older if older < self.older().len() || self.main > at => older,
            older => older + 1,
        };
        let Some(last) = visible.checked_sub(1) else { return Fate::default() };
        let mark = self.mark(last);
        if mark.shape.is_deleted() && mark.main < at {
            return Fate { forgotten: visible, kept: None };
        }
        Fate { forgotten: last, kept: Some(mark.revision()) }
    }

    fn lease(&self) -> i64 {
        self.past.as_ref().map_or(0, |past| past.lease)
    }

    fn change(&self) -> Change {
        let life = Life { create: self.create, version: self.version, lease: self.lease() };
        Change { revision: self.revision(), life: (!self.is_deleted()).then_some(life), bytes: self.shape.bytes() }
    }

    fn set_newest(&mut self, change: Change) {
        let life = change.life.unwrap_or(Life { create: 0, version: 0, lease: 0 });
        self.main = change.revision.main;
        self.sub = change.revision.sub;
        self.shape = Shape::of(change);
        self.create = life.create;
        self.version = life.version;
        match &mut self.past {
            Some(past) => past.lease = life.lease,
            None if life.lease == 0 => (),
            None => self.past = Some(Box::new(Past { lease: life.lease, older: Vec::new() })),
        }
        self.drop_empty_past();
    }

    fn push(&mut self, change: Change) {
        assert!(self.revision() < change.revision, "the changes of a key ascend");
        let mark = self.newest();
        self.past.get_or_insert_default().older.push(mark);
        self.set_newest(change);
    }

    fn drop_empty_past(&mut self) {
        if self.past.as_ref().is_some_and(|past| past.lease == 0 && past.older.is_empty()) {
            self.past = None;
        }
    }

    /// The put that is visible at `at`, if the key is alive then.
    fn hit(&self, at: i64) -> Option<Hit> {
        if self.main <= at {
            let change = self.change();
            return change.life.map(|life| Hit { revision: change.revision, life: Some(life) });
        }
        let older = self.older();
        let visible = older.partition_point(|mark| mark.main <= at).checked_sub(1).map(|last| older[last])?;
        (!visible.shape.is_deleted()).then(|| Hit { revision: visible.revision(), life: None })
    }
}

struct Leaf {
    /// No key of this leaf is smaller, no key of the leaf before is as large.
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

    fn insert(&mut self, place: usize, entry: Entry) {
        if self.entries.len() == self.entries.capacity() {
            let room = LEAF_ROOM.into_iter().find(|&room| room > self.entries.len()).unwrap_or(LEAF_MAX);
            self.entries.reserve_exact(room.saturating_sub(self.entries.len()).max(1));
        }
        self.live += u32::from(!entry.is_deleted());
        self.newest = self.newest.max(entry.main);
        self.entries.insert(place, entry);
    }
}

/// Where a key is, or belongs.
struct Place {
    leaf: usize,
    entry: Result<usize, usize>,
}

/// The ordered index of all keys.
#[derive(Default)]
pub struct Index {
    leaves: Vec<Leaf>,
    keys: usize,
    /// Of all keys together.
    key_bytes: usize,
}

impl Index {
    /// How many keys the index knows, deleted ones that are not yet compacted included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys
    }

    /// About how much memory all of it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.leaves.len() * size_of::<Leaf>() + self.keys * size_of::<Entry>() + self.key_bytes
    }

    /// Whether no key was ever written, or all were forgotten.
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

    /// Visits the live keys of an interval at `at`, ascending, until told to stop.
    pub fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        let _ = self.visit_piece(interval, at, usize::MAX, visit);
    }

    /// The same, but looks at no more than so many keys, live or not. Returns where to go on if there is more.
    pub fn visit_piece(
        &self,
        interval: &Interval,
        at: i64,
        mut most: usize,
        visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>,
    ) -> Option<Bytes> {
        let place = self.place(interval.start());
        let mut first = place.entry.unwrap_or_else(|place| place);
        for leaf in self.leaves.get(place.leaf..).unwrap_or(&[]) {
            let dead = leaf.live == 0 && leaf.newest <= at;
            for entry in &leaf.entries[first..] {
                if interval.is_past(&entry.key) {
                    return None;
                }
                if most == 0 {
                    return Some(Bytes::copy_from_slice(&entry.key));
                }
                most -= 1;
                if dead {
                    break; // One look tells as much as a look at each.
                }
                if entry.hit(at).is_some_and(|hit| visit(&entry.key, hit).is_break()) {
                    return None;
                }
            }
            first = 0;
        }
        None
    }

    /// How many keys of an interval are alive at `at`.
    #[must_use]
    pub fn count(&self, interval: &Interval, at: i64) -> usize {
        self.count_piece(interval, at, usize::MAX).0
    }

    /// The same, but looks at no more than so many keys and leaves, at least at a leaf. Says where to go on if there is more.
    #[must_use]
    pub fn count_piece(&self, interval: &Interval, at: i64, mut most: usize) -> (usize, Option<Bytes>) {
        let place = self.place(interval.start());
        let mut first = place.entry.unwrap_or_else(|place| place);
        let mut count = 0;
        most = most.max(LEAF_MAX);
        for (nth, leaf) in self.leaves.iter().enumerate().skip(place.leaf) {
            // All of the next leaf's keys lie behind this leaf's, so its `from` tells whether this one is inside.
            let ends_inside = self.leaves.get(nth + 1).is_some_and(|next| !interval.is_past(&next.from));
            let adds_up = first == 0 && ends_inside && leaf.newest <= at;
            let rest = &leaf.entries[first..];
            let looks = if adds_up { 1 } else { rest.len() };
            if most < looks {
                return (count, Some(Bytes::copy_from_slice(&rest[0].key)).filter(|key| !interval.is_past(key)));
            }
            most -= looks;
            if adds_up {
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

    /// Adds a change, newer than all others of its key.
    pub fn push(&mut self, key: &[u8], change: Change) {
        let place = self.place(key);
        match place.entry {
            Ok(found) => {
                let leaf = &mut self.leaves[place.leaf];
                let entry = &mut leaf.entries[found];
                leaf.live -= u32::from(!entry.is_deleted());
                leaf.live += u32::from(change.life.is_some());
                leaf.newest = leaf.newest.max(change.revision.main);
                entry.push(change);
            }
            Err(missing) => self.insert(place.leaf, missing, Entry::new(key, change)),
        }
    }

    /// What compaction at `at` does to one key.
    #[must_use]
    pub fn fate(&self, key: &[u8], at: i64) -> Fate {
        self.entry(key).map_or(Fate::default(), |entry| entry.fate(at))
    }

    /// Forgets what compaction at `at` forgets of one key: every change at or before `at` but the newest of these, and that
    /// one too if it is a deletion before `at`. Appends what it forgets to `dead`, oldest first.
    pub fn compact(&mut self, key: &[u8], at: i64, dead: &mut Vec<Forgotten>) {
        let place = self.place(key);
        let Ok(found) = place.entry else { return };
        let entry = &mut self.leaves[place.leaf].entries[found];
        let forgotten = entry.fate(at).forgotten;
        dead.extend((0..forgotten).map(|nth| entry.mark(nth).forgotten()));
        if forgotten == entry.marks() {
            self.remove(place.leaf, found);
        } else if let Some(past) = &mut entry.past {
            past.older.drain(..forgotten);
            past.older.shrink_to_fit();
            entry.drop_empty_past();
        }
    }

    fn entry(&self, key: &[u8]) -> Option<&Entry> {
        let place = self.place(key);
        let found = place.entry.ok()?;
        Some(&self.leaves[place.leaf].entries[found])
    }

    fn place(&self, key: &[u8]) -> Place {
        let leaf = self.leaves.partition_point(|leaf| leaf.from.as_ref() <= key).saturating_sub(1);
        let entry = self.leaves.get(leaf).map_or(Err(0), |leaf| leaf.find(key));
        Place { leaf, entry }
    }

    fn insert(&mut self, leaf: usize, place: usize, entry: Entry) {
        self.keys += 1;
        self.key_bytes += entry.key.len();
        if self.leaves.is_empty() {
            self.leaves.push(Leaf::new(Box::default(), Vec::new()));
        }
        if self.leaves[leaf].entries.len() < LEAF_MAX {
            return self.leaves[leaf].insert(place, entry);
        }
        // Keys that arrive in order leave full leaves behind; anything else halves the leaf.
        let half = if place == LEAF_MAX { LEAF_MAX } else { LEAF_MAX / 2 };
        let mut right: Vec<Entry> = Vec::with_capacity(LEAF_ROOM[4]);
        right.extend(self.leaves[leaf].entries.drain(half..));
        let from = right.first().map_or_else(|| entry.key.clone(), |first| first.key.clone());
        let left = &mut self.leaves[leaf];
        left.entries.shrink_to(LEAF_ROOM[4]);
        *left = Leaf::new(std::mem::take(&mut left.from), std::mem::take(&mut left.entries));
        self.leaves.insert(leaf + 1, Leaf::new(from, right));
        // What belongs exactly between the halves is smaller than the right one's `from`.
        if place > half || half == LEAF_MAX {
            self.leaves[leaf + 1].insert(place - half, entry);
        } else {
            self.leaves[leaf].insert(place, entry);
        }
    }

    fn remove(&mut self, leaf: usize, place: usize) {
        self.keys -= 1;
        let removed = self.leaves[leaf].entries.remove(place);
        self.key_bytes -= removed.key.len();
        self.leaves[leaf].live -= u32::from(!removed.is_deleted());
        let len = self.leaves[leaf].entries.len();
        if len == 0 {
            self.leaves.remove(leaf);
            if let Some(first) = self.leaves.first_mut() {
                first.from = Box::default();
            }
        } else if len < LEAF_FEW
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
