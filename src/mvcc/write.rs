//! The writer: one transaction after another, gathered into batches.
//!
//! A transaction reads through the overlay, so it sees its own changes and those of earlier transactions in the batch, and it
//! writes its records into the batch. Readers see none of this until [`Store::publish`], which the owner calls after the batch
//! was written to the database.

use std::{
    collections::BTreeMap,
    ops::{Bound, ControlFlow},
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use prost::Message;
use quick_cache::sync::Cache;

use super::{
    Change, Event, Hit, Index, Interval, KeyMetadata, NEVER_COMPACTED, RecordKey, RecordWeight, Revision, Scheduled,
    Shared, read::Reader, record_bytes, source::Source,
};
use crate::{
    error::Halt,
    proto::mvccpb::KeyValue,
    storage::{
        Batch, Engine, Table,
        schema::{decode_u64, meta},
    },
};

/// The maximum number of compactions in the queue, each of which runs on its own. When the queue is longer, its oldest are done
/// together with the first that is left.
const MAX_SCHEDULED: usize = 10;

/// Expected mean size of a cached record. Used only to size the cache's hash table.
const CACHED_RECORD_BYTES: u64 = 256;

/// A put with value and lease as they are to be stored.
#[derive(Debug, Clone)]
pub struct Put {
    pub key: Bytes,
    pub value: Bytes,
    /// Zero for none.
    pub lease: i64,
}

/// The live version of a key that a put or a deletion displaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Displaced {
    pub key: Bytes,
    pub revision: Revision,
    /// The lease that the key had, or zero.
    pub lease: i64,
}

/// The single writer of the key space.
pub struct Store {
    shared: Arc<Shared>,
    /// The changes of the current batch, by key, oldest first; and their records.
    overlay: BTreeMap<Bytes, Vec<Change>>,
    records: BTreeMap<Revision, Bytes>,
    events: Vec<Event>,
    /// The revision of the last transaction that changed something.
    head: i64,
    /// The number of changes made by the current transaction.
    changes: u32,
    compacted: i64,
    /// The compactions of the current batch.
    scheduled: Vec<Scheduled>,
    /// Bytes of all records since the database was opened, including those that it held then and those of the current batch.
    /// Between two entries, the count is the same on every member.
    written_bytes: u64,
}

impl Store {
    /// Reads the key space from the database. `head` is the revision in [`meta::APPLIED`]. Calls `live` with each live key that
    /// has a lease, in key order.
    pub fn open(
        engine: Arc<dyn Engine>,
        head: i64,
        cache_bytes: u64,
        live: &mut dyn FnMut(&[u8], i64),
    ) -> Result<Self, Halt> {
        let read_meta = |name| -> Result<i64, Halt> {
            let stored = engine.get(Table::Meta, name)?.and_then(|value| decode_u64(&value));
            Ok(stored.map_or(NEVER_COMPACTED, u64::cast_signed))
        };
        let (scheduled, finished) = (read_meta(meta::COMPACT_SCHEDULED)?, read_meta(meta::COMPACT_FINISHED)?);
        let (index, history_bytes) = read_index(engine.as_ref())?;
        index.visit(&Interval::From(Bytes::new()), i64::MAX, &mut |key, hit| {
            let lease = hit.metadata.map_or(0, |metadata| metadata.lease);
            if lease != 0 {
                live(key, lease);
            }
            ControlFlow::Continue(())
        });
        let head = head.max(scheduled).max(1);
        let items = usize::try_from(cache_bytes / CACHED_RECORD_BYTES).unwrap_or(usize::MAX).max(16);
        let shared = Shared {
            engine,
            index: RwLock::new(index),
            head: head.into(),
            compacted: scheduled.into(),
            scheduled: Mutex::default(),
            written_bytes: history_bytes.into(),
            removed_bytes: 0.into(),
            compaction_finished: finished.into(),
            stored_hashes: Mutex::default(),
            cache: Cache::with_weighter(items, cache_bytes, RecordWeight),
            views: Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            overlay: BTreeMap::new(),
            records: BTreeMap::new(),
            events: Vec::new(),
            head,
            changes: 0,
            compacted: scheduled,
            scheduled: Vec::new(),
            written_bytes: history_bytes,
        })
    }

    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(self.shared.clone())
    }

    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The revision of the newest change, including the current batch.
    #[must_use]
    pub fn head(&self) -> i64 {
        self.head
    }

    /// The compact revision, including the current batch.
    #[must_use]
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// The revision that the current transaction has, or would have if it changed something.
    #[must_use]
    pub fn next_revision(&self) -> i64 {
        self.head + 1
    }

    /// Whether the current transaction has changed anything yet.
    #[must_use]
    pub fn has_changes(&self) -> bool {
        self.changes > 0
    }

    /// Puts a key as part of the current transaction.
    pub fn put(&mut self, batch: &mut Batch, put: Put) -> Option<Displaced> {
        let newest = self.newest(&put.key);
        let revision = self.allocate_revision();
        let metadata = match newest.and_then(|change| change.metadata) {
            Some(metadata) => KeyMetadata { version: metadata.version + 1, lease: put.lease, ..metadata },
            None => KeyMetadata { create: revision.main, version: 1, lease: put.lease },
        };
        let record = KeyValue {
            key: put.key.clone(),
            create_revision: metadata.create,
            mod_revision: revision.main,
            version: metadata.version,
            value: put.value,
            lease: metadata.lease,
        };
        let record = Bytes::from(record.encode_to_vec());
        self.shared.cache.insert(revision, record.clone());
        self.record_change(batch, put.key, revision, Some(metadata), record, newest)
    }

    /// Deletes a key as part of the current transaction; None if the key is not live.
    pub fn delete(&mut self, batch: &mut Batch, key: &Bytes) -> Option<Displaced> {
        let newest = self.newest(key)?;
        newest.metadata?;
        let revision = self.allocate_revision();
        let record = Bytes::from(KeyValue { key: key.clone(), ..KeyValue::default() }.encode_to_vec());
        self.record_change(batch, key.clone(), revision, None, record, Some(newest))
    }

    fn record_change(
        &mut self,
        batch: &mut Batch,
        key: Bytes,
        revision: Revision,
        metadata: Option<KeyMetadata>,
        record: Bytes,
        newest: Option<Change>,
    ) -> Option<Displaced> {
        let deletion = metadata.is_none();
        let change = Change { revision, metadata, bytes: record_bytes(&record, deletion) };
        self.written_bytes += u64::from(change.bytes);
        batch.put(Table::History, RecordKey::new(revision, deletion).as_ref(), record.clone());
        let previous = match newest {
            // The transaction has changed this key before: look up what was current before the whole transaction.
            Some(change) if change.revision.main == revision.main => self.hit(&key, revision.main - 1),
            other => other.and_then(hit_of),
        };
        let previous = previous.map(|hit| hit.revision);
        self.overlay.entry(key.clone()).or_default().push(change);
        self.records.insert(revision, record.clone());
        self.events.push(Event { key: key.clone(), revision, deletion, record, previous });
        let newest = newest?;
        Some(Displaced { key, revision: newest.revision, lease: newest.metadata?.lease })
    }

    fn allocate_revision(&mut self) -> Revision {
        let revision = Revision { main: self.next_revision(), sub: self.changes };
        self.changes += 1;
        revision
    }

    /// Ends the current transaction; if it changed something, its revision becomes the head. Returns the head.
    pub fn end_transaction(&mut self) -> i64 {
        if std::mem::take(&mut self.changes) > 0 {
            self.head += 1;
        }
        self.head
    }

    /// Schedules a compaction: after the next [`Store::publish`], nothing below `at` can be read. Records are removed later, by
    /// [`super::compact`].
    pub fn schedule_compaction(&mut self, batch: &mut Batch, at: i64) {
        assert!(at > self.compacted, "compact revisions ascend");
        self.scheduled.push(Scheduled { at, previous: self.compacted, written_bytes: self.written_bytes });
        self.compacted = at;
        batch.put(Table::Meta, meta::COMPACT_SCHEDULED, at.to_be_bytes().to_vec());
    }

    /// Makes all changes since the last call visible in the index; the caller has written them to the database. Returns the
    /// events, in order.
    pub fn publish(&mut self) -> Vec<Event> {
        assert_eq!(self.changes, 0, "transactions are published whole");
        if !self.overlay.is_empty() {
            let mut index = self.shared.index.write();
            for (key, changes) in std::mem::take(&mut self.overlay) {
                for change in changes {
                    index.push(&key, change);
                }
            }
        }
        self.records.clear();
        self.shared.written_bytes.store(self.written_bytes, Ordering::Release);
        if !self.scheduled.is_empty() {
            let mut scheduled = self.shared.scheduled.lock();
            scheduled.extend(self.scheduled.drain(..));
            // The work of the dropped ones is done by the first that is left.
            let surplus = scheduled.len().saturating_sub(MAX_SCHEDULED);
            scheduled.drain(..surplus);
            self.shared.compacted.store(self.compacted, Ordering::Release);
        }
        std::mem::take(&mut self.events)
    }

    /// Publishes the head to readers. Separate from [`Store::publish`], because the events have to be passed to the watch hub in
    /// between: an event must be deliverable when its revision becomes readable.
    pub fn publish_head(&self) {
        self.shared.head.store(self.head, Ordering::Release);
    }

    /// The newest change to a key, including the current transaction.
    #[must_use]
    pub fn newest(&self, key: &[u8]) -> Option<Change> {
        let pending = self.overlay.get(key).and_then(|changes| changes.last().copied());
        pending.or_else(|| self.shared.index.read().newest(key))
    }

    /// The put of a key that was visible before the current transaction.
    #[must_use]
    pub fn visible_before(&self, key: &[u8]) -> Option<Revision> {
        self.hit(key, self.head).map(|hit| hit.revision)
    }

    fn hit(&self, key: &[u8], at: i64) -> Option<Hit> {
        match self.overlay.get(key).and_then(|changes| visible(changes, at)) {
            Some(change) => hit_of(change),
            None => self.shared.index.read().get(key, at),
        }
    }
}

fn visible(changes: &[Change], at: i64) -> Option<Change> {
    changes.iter().rfind(|change| change.revision.main <= at).copied()
}

fn hit_of(change: Change) -> Option<Hit> {
    change.metadata.map(|metadata| Hit { revision: change.revision, metadata: Some(metadata) })
}

/// The writer's own view: the published keys, overlaid with the current batch.
impl Source for Store {
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        let index = self.shared.index.read();
        let start = Bytes::copy_from_slice(interval.start());
        let pending = self.overlay.range::<Bytes, _>((Bound::Included(&start), Bound::Unbounded));
        let mut pending = pending
            .take_while(|(key, _)| !interval.is_past(key))
            .filter_map(|(key, changes)| Some((key, visible(changes, at)?)))
            .peekable();
        let mut stopped = false;
        index.visit(interval, at, &mut |key, hit| {
            while let Some((new, change)) = pending.next_if(|(new, _)| new.as_ref() < key) {
                if let Some(hit) = hit_of(change) {
                    visit(new, hit).inspect_break(&mut stopped)?;
                }
            }
            let hit = match pending.next_if(|(new, _)| new.as_ref() == key) {
                Some((_, change)) => hit_of(change),
                None => Some(hit),
            };
            hit.map_or(ControlFlow::Continue(()), |hit| visit(key, hit).inspect_break(&mut stopped))
        });
        while let Some((new, change)) = pending.next().filter(|_| !stopped) {
            if let Some(hit) = hit_of(change) {
                stopped = visit(new, hit).is_break();
            }
        }
    }

    fn count(&self, interval: &Interval, at: i64) -> usize {
        let mut count = self.shared.index.read().count(interval, at);
        let start = Bytes::copy_from_slice(interval.start());
        let pending = self.overlay.range::<Bytes, _>((Bound::Included(&start), Bound::Unbounded));
        for (key, changes) in pending.take_while(|(key, _)| !interval.is_past(key)) {
            if let Some(change) = visible(changes, at) {
                count += usize::from(change.metadata.is_some());
                count -= usize::from(self.shared.index.read().get(key, at).is_some());
            }
        }
        count
    }

    fn records(&self, revisions: &[Revision]) -> Result<Vec<Option<Bytes>>, Halt> {
        let mut found: Vec<Option<Bytes>> =
            revisions.iter().map(|revision| self.records.get(revision).cloned()).collect();
        let missing: Vec<usize> = (0..found.len()).filter(|&nth| found[nth].is_none()).collect();
        let stored: Vec<Revision> = missing.iter().map(|&nth| revisions[nth]).collect();
        for (nth, record) in missing.into_iter().zip(self.shared.records(&stored)?) {
            found[nth] = record;
        }
        Ok(found)
    }
}

/// Records that a visitor returned [`ControlFlow::Break`].
trait InspectBreak {
    fn inspect_break(self, stopped: &mut bool) -> Self;
}

impl InspectBreak for ControlFlow<()> {
    fn inspect_break(self, stopped: &mut bool) -> Self {
        *stopped |= self.is_break();
        self
    }
}

/// Builds the index from the history table, and counts the table's bytes.
fn read_index(engine: &dyn Engine) -> Result<(Index, u64), Halt> {
    let (mut index, mut bytes) = (Index::default(), 0);
    let mut damage = None;
    engine.scan(Table::History, &[], &[], &mut |key, value| {
        let decoded = RecordKey::decode(key).zip(KeyValue::decode(value).ok());
        let Some(((revision, deletion), record)) = decoded else {
            damage = Some(format!(
                "the database is corrupt: cannot decode the record with key {key:02x?} in the history table"
            ));
            return ControlFlow::Break(());
        };
        let metadata = KeyMetadata { create: record.create_revision, version: record.version, lease: record.lease };
        let change =
            Change { revision, metadata: (!deletion).then_some(metadata), bytes: record_bytes(value, deletion) };
        bytes += u64::from(change.bytes);
        index.push(&record.key, change);
        ControlFlow::Continue(())
    })?;
    damage.map_or(Ok((index, bytes)), |damage| Err(Halt::InvalidData(damage)))
}
