//! Every change to every key, until compaction forgets it.
//!
//! ```text
//! revision      2      3      4        5
//! key a        a=1    a=2   delete    a=3
//! version       1      2      -        1
//!              └──── one life ────┘   └ another
//! ```
//!
//! A transaction takes the next revision, however many keys it changes; its changes are numbered from zero below it. Each
//! change is a *record* in the history table, immutable: the encoded `mvccpb.KeyValue`, exactly as a Range sends it. The
//! [`index`] knows which records a key has. Reading is: ask the index which record is visible at a revision, then fetch it.
//!
//! One thread writes ([`write::Store`]); any number read ([`read::Reader`]). They share [`Shared`]:
//!
//! * Changes of the running batch sit in an overlay that only the writer sees. The batch is written to the database, then
//!   merged into the index under one short lock, then the *head* is published. A reader loads the head once and never looks
//!   above it, so it sees whole transactions only.
//! * Readers lock the index for at most [`read::CHUNK`] keys at a time.
//!
//! INVARIANTS
//! * Revisions never repeat or go back; a transaction takes exactly one, or none if it changes nothing.
//! * At and above the compact revision, the index names a record if and only if the database holds it.
//! * Nothing at or above the revision of a registered view is forgotten.

pub mod compact;
pub mod history;
pub mod index;
pub mod meter;
pub mod query;
pub mod read;
pub mod revision;
pub mod write;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use quick_cache::{Weighter, sync::Cache};

use crate::storage::Engine;
pub use index::{Change, Forgotten, Hit, Index, Life};
pub use query::Query;
pub use read::Reader;
pub use revision::{RecordKey, Revision};
pub use write::Store;

/// Which keys a request means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interval {
    /// This one.
    Key(Bytes),
    /// From the first one on, up to but without the second. Empty if they are not in order.
    Range(Bytes, Bytes),
    /// This one and all behind it.
    From(Bytes),
}

impl Interval {
    /// Reads `key` and `range_end` as every request means them: no end is one key, an end of one zero byte is no bound.
    #[must_use]
    pub fn new(key: Bytes, range_end: Bytes) -> Self {
        match range_end.as_ref() {
            [] => Self::Key(key),
            [0] => Self::From(key),
            _ => Self::Range(key, range_end),
        }
    }

    /// The first key that can be inside.
    #[must_use]
    pub fn start(&self) -> &[u8] {
        match self {
            Self::Key(key) | Self::Range(key, _) | Self::From(key) => key,
        }
    }

    /// Whether `key` and all behind it are outside. Only asked of keys from [`Interval::start`] on.
    #[must_use]
    pub fn is_past(&self, key: &[u8]) -> bool {
        match self {
            Self::Key(only) => key > only.as_ref(),
            Self::Range(_, end) => key >= end.as_ref(),
            Self::From(_) => false,
        }
    }

    /// Whether `key` is inside.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start() && !self.is_past(key)
    }

    /// The same interval without the keys before `start`, which must lie inside.
    #[must_use]
    pub fn starting_at(&self, start: Bytes) -> Self {
        match self {
            Self::Key(_) => Self::Key(start),
            Self::Range(_, end) => Self::Range(start, end.clone()),
            Self::From(_) => Self::From(start),
        }
    }
}

/// A record, as watchers need it: what happened to one key, and where to find what was there before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The key.
    pub key: Bytes,
    /// When.
    pub revision: Revision,
    /// Whether the key was deleted.
    pub deletion: bool,
    /// The record's value: an encoded `mvccpb.KeyValue`.
    pub record: Bytes,
    /// The encoded `mvccpb.KeyValue` that was current before this event's transaction; for a client that asks for it.
    pub previous: Option<Revision>,
}

/// What the writer and all readers share.
pub struct Shared {
    engine: Arc<dyn Engine>,
    index: RwLock<Index>,
    /// The newest revision that readers may see.
    head: AtomicI64,
    /// The compact revision; [`NEVER_COMPACTED`] before the first compaction.
    compacted: AtomicI64,
    /// The compactions that this process has seen scheduled and that are not done yet, in order. The compact revision changes
    /// under this lock.
    scheduled: Mutex<VecDeque<Scheduled>>,
    /// The newest main revision whose removals are done.
    finished: AtomicI64,
    /// Bytes of all records that the history table has held since it was opened.
    written_bytes: AtomicU64,
    /// Bytes of those that were removed since.
    removed_bytes: AtomicU64,
    /// The hashes of the last compactions, by revision.
    hashes: Mutex<BTreeMap<i64, compact::KeyHash>>,
    cache: Cache<Revision, Bytes, RecordWeight>,
    /// Revisions that somebody reads at, and how many do.
    views: Mutex<BTreeMap<i64, usize>>,
}

/// The compact revision of a store that never was.
pub const NEVER_COMPACTED: i64 = -1;

/// A compaction that was agreed.
#[derive(Debug, Clone, Copy)]
struct Scheduled {
    at: i64,
    /// The compact revision before it.
    previous: i64,
    /// What [`Shared::written_bytes`] was when it was agreed.
    written_bytes: u64,
}

/// How long a record is, with its key in the history table.
fn record_bytes(record: &[u8], deletion: bool) -> u32 {
    let bytes = record.len() + revision::record_key_len(deletion);
    u32::try_from(bytes).unwrap_or(u32::MAX).min(index::MAX_RECORD_BYTES)
}

/// What a cached record costs beside its bytes: key, links, allocation headers.
const RECORD_OVERHEAD_BYTES: u64 = 96;

#[derive(Clone)]
struct RecordWeight;

impl Weighter<Revision, Bytes> for RecordWeight {
    fn weight(&self, _: &Revision, record: &Bytes) -> u64 {
        record.len() as u64 + RECORD_OVERHEAD_BYTES
    }
}

impl Shared {
    /// The newest revision that may be read.
    pub fn head(&self) -> i64 {
        self.head.load(Ordering::Acquire)
    }

    /// The compact revision.
    pub fn compacted(&self) -> i64 {
        self.compacted.load(Ordering::Acquire)
    }

    /// How many bytes of records the history table holds: all that compaction has not removed.
    pub fn history_bytes(&self) -> u64 {
        // What is removed was written before: read in this order the difference is none below zero.
        let removed = self.removed_bytes.load(Ordering::Acquire);
        self.written_bytes.load(Ordering::Acquire).saturating_sub(removed)
    }

    /// About how much memory the index takes, and cached records.
    pub fn memory(&self) -> (u64, u64) {
        (self.index.read().bytes() as u64, self.cache.weight())
    }

    /// Registers a view: compaction stays behind it until the guard is dropped.
    fn register(self: &Arc<Self>, at: i64) -> ViewGuard {
        *self.views.lock().entry(at).or_default() += 1;
        ViewGuard { shared: self.clone(), at }
    }

    /// The oldest revision that somebody reads at.
    fn oldest_view(&self) -> Option<i64> {
        self.views.lock().keys().next().copied()
    }
}

/// Keeps compaction from forgetting what a view at a revision needs.
pub struct ViewGuard {
    shared: Arc<Shared>,
    at: i64,
}

impl Drop for ViewGuard {
    fn drop(&mut self) {
        let mut views = self.shared.views.lock();
        let count = views.get_mut(&self.at).expect("a guard is registered until it is dropped");
        *count -= 1;
        if *count == 0 {
            views.remove(&self.at);
        }
    }
}

#[cfg(test)]
mod tests;
