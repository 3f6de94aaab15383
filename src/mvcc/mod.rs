//! Every change to every key, until compaction removes it.
//!
//! ```text
//! revision      2      3      4        5
//! key a        a=1    a=2   delete    a=3
//! version       1      2      -        1
//! generation   └──── first ─────┘   └ second
//! ```
//!
//! A transaction takes the next revision, however many keys it changes; its changes get sub-revisions counted from zero. Each
//! change is an immutable *record* in the history table: the encoded `mvccpb.KeyValue`, exactly as a Range sends it. The
//! [`index`] maps each key to its records. A read asks the index which record is visible at a revision, then fetches it.
//!
//! One thread writes ([`write::Store`]); any number of threads read ([`read::Reader`]). They share [`Shared`]:
//!
//! * Changes of the current batch are kept in an overlay that only the writer sees. The batch is written to the database, then
//!   merged into the index under one short lock, then the *head* is published. A reader loads the head once and reads nothing
//!   above it, so it sees whole transactions only.
//! * Readers lock the index for at most [`source::CHUNK`] keys at a time.
//!
//! INVARIANTS
//! * Revisions never repeat or go back; a transaction takes exactly one, or none if it changes nothing.
//! * At and above the compact revision, the index names a record if and only if the database holds it.
//! * Compaction removes nothing that is visible at the revision of a registered view.

pub mod compact;
pub mod history;
pub mod index;
pub mod meter;
pub mod query;
pub mod read;
pub mod revision;
pub mod source;
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
pub use index::{Change, Hit, Index, KeyMetadata, RemovedChange};
pub use query::Query;
pub use read::Reader;
pub use revision::{RecordKey, Revision};
pub use write::Store;

/// The keys that a request selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interval {
    /// One key.
    Key(Bytes),
    /// From the first key (inclusive) to the second (exclusive). Empty if they are not in order.
    Range(Bytes, Bytes),
    /// This key and all after it.
    From(Bytes),
}

impl Interval {
    /// Interprets `key` and `range_end` as in every etcd request: an empty end means one key, an end of one zero byte means
    /// no upper bound.
    #[must_use]
    pub fn new(key: Bytes, range_end: Bytes) -> Self {
        match range_end.as_ref() {
            [] => Self::Key(key),
            [0] => Self::From(key),
            _ => Self::Range(key, range_end),
        }
    }

    /// The first key that the interval can contain.
    #[must_use]
    pub fn start(&self) -> &[u8] {
        match self {
            Self::Key(key) | Self::Range(key, _) | Self::From(key) => key,
        }
    }

    /// Whether `key` and all keys after it are outside. Callers must pass keys at or after [`Interval::start`].
    #[must_use]
    pub fn is_past(&self, key: &[u8]) -> bool {
        match self {
            Self::Key(only) => key > only.as_ref(),
            Self::Range(_, end) => key >= end.as_ref(),
            Self::From(_) => false,
        }
    }

    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start() && !self.is_past(key)
    }

    /// The same interval without the keys before `start`, which must be inside it.
    #[must_use]
    pub fn starting_at(&self, start: Bytes) -> Self {
        match self {
            Self::Key(_) => Self::Key(start),
            Self::Range(_, end) => Self::Range(start, end.clone()),
            Self::From(_) => Self::From(start),
        }
    }
}

/// One change to one key, as watchers need it, with the revision of the value it replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub key: Bytes,
    pub revision: Revision,
    pub deletion: bool,
    /// The record's value: an encoded `mvccpb.KeyValue`.
    pub record: Bytes,
    /// The revision that was current before this event's transaction, for clients that ask for `prev_kv`.
    pub previous: Option<Revision>,
}

/// State shared by the writer and all readers.
pub struct Shared {
    engine: Arc<dyn Engine>,
    index: RwLock<Index>,
    /// The newest revision that readers may see.
    head: AtomicI64,
    /// The compact revision; [`NEVER_COMPACTED`] before the first compaction.
    compacted: AtomicI64,
    /// The compactions that were scheduled while this process ran and are not finished, in order. The compact revision changes
    /// under this lock.
    scheduled: Mutex<VecDeque<Scheduled>>,
    /// The revision of the last compaction whose removals are done.
    compaction_finished: AtomicI64,
    /// Bytes of all records that the history table has held since it was opened.
    written_bytes: AtomicU64,
    /// Bytes of those that were removed since.
    removed_bytes: AtomicU64,
    /// The hashes that were stored by the last compactions, by revision.
    stored_hashes: Mutex<BTreeMap<i64, compact::KeyHash>>,
    cache: Cache<Revision, Bytes, RecordWeight>,
    /// The revisions of all registered views, with the number of views at each.
    views: Mutex<BTreeMap<i64, usize>>,
}

/// The compact revision of a store that was never compacted.
pub const NEVER_COMPACTED: i64 = -1;

/// A compaction that was applied from the log and whose removals may not have begun.
#[derive(Debug, Clone, Copy)]
struct Scheduled {
    at: i64,
    /// The compact revision before it.
    previous: i64,
    /// The value of [`Shared::written_bytes`] when it was scheduled.
    written_bytes: u64,
}

/// Length of a record, including its key in the history table.
fn record_bytes(record: &[u8], deletion: bool) -> u32 {
    let bytes = record.len() + revision::record_key_len(deletion);
    u32::try_from(bytes).unwrap_or(u32::MAX).min(index::MAX_RECORD_BYTES)
}

/// The memory that a cached record takes beside its bytes: key, links, allocation headers.
const RECORD_OVERHEAD_BYTES: u64 = 96;

#[derive(Clone)]
struct RecordWeight;

impl Weighter<Revision, Bytes> for RecordWeight {
    fn weight(&self, _: &Revision, record: &Bytes) -> u64 {
        record.len() as u64 + RECORD_OVERHEAD_BYTES
    }
}

impl Shared {
    /// The newest revision that readers may see.
    pub fn head(&self) -> i64 {
        self.head.load(Ordering::Acquire)
    }

    pub fn compacted(&self) -> i64 {
        self.compacted.load(Ordering::Acquire)
    }

    /// Bytes of the records in the history table: all that compaction has not removed.
    pub fn history_bytes(&self) -> u64 {
        // What is removed was written before: loaded in this order, the difference is never negative.
        let removed = self.removed_bytes.load(Ordering::Acquire);
        self.written_bytes.load(Ordering::Acquire).saturating_sub(removed)
    }

    /// Approximate memory of the index and of the cached records.
    pub fn memory(&self) -> (u64, u64) {
        (self.index.read().bytes() as u64, self.cache.weight())
    }

    /// How often a record was found in the cache, and how often it was not.
    pub fn cache_lookups(&self) -> (u64, u64) {
        (self.cache.hits(), self.cache.misses())
    }

    /// How many views are registered.
    pub fn open_views(&self) -> usize {
        self.views.lock().values().sum()
    }

    /// Registers a view: until the guard is dropped, compactions above `at` remove nothing.
    fn register(self: &Arc<Self>, at: i64) -> ViewGuard {
        *self.views.lock().entry(at).or_default() += 1;
        ViewGuard { shared: self.clone(), at }
    }

    /// The lowest revision of all registered views.
    fn oldest_view(&self) -> Option<i64> {
        self.views.lock().keys().next().copied()
    }
}

/// Keeps a view registered: compaction does not remove what is visible at its revision.
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
