//! The writer: one transaction after another, gathered into batches.
//!
//! A transaction reads through the overlay, so it sees what it and its predecessors in the batch did, and writes records
//! into the batch. Nothing of it is visible to readers until [`Store::publish`], which the owner calls after the database
//! has taken the batch.

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
    Change, Event, Hit, Index, Interval, Life, NEVER_COMPACTED, RecordKey, RecordWeight, Revision, Scheduled, Shared,
    read::{Reader, Source},
    record_bytes,
};
use crate::{
    error::Halt,
    proto::mvccpb::KeyValue,
    storage::{
        Batch, Engine, Table,
        schema::{decode_u64, meta},
    },
};

/// So many compactions wait for their turn, each to be done on its own. Of a longer queue the oldest are done in one go.
const MAX_SCHEDULED: usize = 10;

/// Expected mean size of a cached record; only sizes the cache's own tables.
const CACHED_RECORD_BYTES: u64 = 256;

/// A put, as the store executes it: everything about it is decided.
#[derive(Debug, Clone)]
pub struct Put {
    /// The key.
    pub key: Bytes,
    /// Its new value.
    pub value: Bytes,
    /// Its lease from now on, or zero.
    pub lease: i64,
}

/// What a put or a deletion displaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Displaced {
    /// The key.
    pub key: Bytes,
    /// The put that was visible until now.
    pub revision: Revision,
    /// The lease that the key had, or zero.
    pub lease: i64,
}

/// The single writer of the key space.
pub struct Store {
    shared: Arc<Shared>,
    /// Changes of the running batch, per key in order, and their records.
    overlay: BTreeMap<Bytes, Vec<Change>>,
    records: BTreeMap<Revision, Bytes>,
    events: Vec<Event>,
    /// The revision of the last transaction that changed something.
    head: i64,
    /// The changes that the running transaction has made.
    changes: u32,
    compacted: i64,
    /// The compactions of the running batch.
    scheduled: Vec<Scheduled>,
    /// Bytes of all records since the database was opened, those that it held then and those of the running batch included.
    /// Every member counts the same between two entries.
    written_bytes: u64,
}

impl Store {
    /// Reads the key space from the database. `head` is what [`meta::APPLIED`] says. Calls `live` for each live key that
    /// has a lease, in key order.
    pub fn open(
        engine: Arc<dyn Engine>,
        head: i64,
        cache_bytes: u64,
        live: &mut dyn FnMut(&[u8], i64),
    ) -> Result<Self, Halt> {
        let mark = |name| -> Result<i64, Halt> {
            let stored = engine.get(Table::Meta, name)?.and_then(|value| decode_u64(&value));
            Ok(stored.map_or(NEVER_COMPACTED, u64::cast_signed))
        };
        let (scheduled, finished) = (mark(meta::COMPACT_SCHEDULED)?, mark(meta::COMPACT_FINISHED)?);
        let (index, history_bytes) = read_index(engine.as_ref())?;
        index.visit(&Interval::From(Bytes::new()), i64::MAX, &mut |key, hit| {
            let lease = hit.life.map_or(0, |life| life.lease);
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
            finished: finished.into(),
            hashes: Mutex::default(),
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

    /// A reader of what has been published.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(self.shared.clone())
    }

    /// What the store shares with its readers.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The revision of the newest change, in the running batch included.
    #[must_use]
    pub fn head(&self) -> i64 {
        self.head
    }

    /// The compact revision, in the running batch included.
    #[must_use]
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// The revision that the running transaction has, or would have if it changed something.
    #[must_use]
    pub fn next_revision(&self) -> i64 {
        self.head + 1
    }

    /// Whether the running transaction has changed anything yet.
    #[must_use]
    pub fn has_changes(&self) -> bool {
        self.changes > 0
    }

    /// Writes a key under the running transaction.
    pub fn put(&mut self, batch: &mut Batch, put: Put) -> Option<Displaced> {
        let newest = self.newest(&put.key);
        let revision = self.take_revision();
        let life = match newest.and_then(|change| change.life) {
            Some(life) => Life { version: life.version + 1, lease: put.lease, ..life },
            None => Life { create: revision.main, version: 1, lease: put.lease },
        };
        let record = KeyValue {
            key: put.key.clone(),
            create_revision: life.create,
            mod_revision: revision.main,
            version: life.version,
            value: put.value,
            lease: life.lease,
        };
        let record = Bytes::from(record.encode_to_vec());
        self.shared.cache.insert(revision, record.clone());
        self.record(batch, put.key, revision, Some(life), record, newest)
    }

    /// Deletes a key under the running transaction; None if it is not alive.
    pub fn delete(&mut self, batch: &mut Batch, key: &Bytes) -> Option<Displaced> {
        let newest = self.newest(key)?;
        newest.life?;
        let revision = self.take_revision();
        let record = Bytes::from(KeyValue { key: key.clone(), ..KeyValue::default() }.encode_to_vec());
        self.record(batch, key.clone(), revision, None, record, Some(newest))
    }

    fn record(
        &mut self,
        batch: &mut Batch,
        key: Bytes,
        revision: Revision,
        life: Option<Life>,
        record: Bytes,
        newest: Option<Change>,
    ) -> Option<Displaced> {
        let deletion = life.is_none();
        let change = Change { revision, life, bytes: record_bytes(&record, deletion) };
        self.written_bytes += u64::from(change.bytes);
        batch.put(Table::History, RecordKey::new(revision, deletion).as_ref(), record.clone());
        let previous = match newest {
            // The transaction changed this key before: what was current before all of it is further back.
            Some(change) if change.revision.main == revision.main => self.hit(&key, revision.main - 1),
            other => other.and_then(hit_of),
        };
        let previous = previous.map(|hit| hit.revision);
        self.overlay.entry(key.clone()).or_default().push(change);
        self.records.insert(revision, record.clone());
        self.events.push(Event { key: key.clone(), revision, deletion, record, previous });
        let newest = newest?;
        Some(Displaced { key, revision: newest.revision, lease: newest.life?.lease })
    }

    fn take_revision(&mut self) -> Revision {
        let revision = Revision { main: self.next_revision(), sub: self.changes };
        self.changes += 1;
        revision
    }

    /// Ends the running transaction: if it changed something, its revision is taken. Returns the head.
    pub fn end_transaction(&mut self) -> i64 {
        if std::mem::take(&mut self.changes) > 0 {
            self.head += 1;
        }
        self.head
    }

    /// Schedules a compaction: from the next publication on, nothing below `at` can be read. The removal itself is
    /// [`super::compact`]'s.
    pub fn schedule_compaction(&mut self, batch: &mut Batch, at: i64) {
        assert!(at > self.compacted, "compactions go forward");
        self.scheduled.push(Scheduled { at, previous: self.compacted, written_bytes: self.written_bytes });
        self.compacted = at;
        batch.put(Table::Meta, meta::COMPACT_SCHEDULED, at.to_be_bytes().to_vec());
    }

    /// Makes everything since the last call visible; the database holds it by now. Returns the events, in order.
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
            // What is missing in front is done together with the first that is left.
            let surplus = scheduled.len().saturating_sub(MAX_SCHEDULED);
            scheduled.drain(..surplus);
            self.shared.compacted.store(self.compacted, Ordering::Release);
        }
        std::mem::take(&mut self.events)
    }

    /// Lets readers see the head. Apart from [`Store::publish`], because whoever delivers events takes them in between: an
    /// event must be deliverable when its revision becomes readable.
    pub fn publish_head(&self) {
        self.shared.head.store(self.head, Ordering::Release);
    }

    /// The newest change to a key, in the running transaction included.
    #[must_use]
    pub fn newest(&self, key: &[u8]) -> Option<Change> {
        let pending = self.overlay.get(key).and_then(|changes| changes.last().copied());
        pending.or_else(|| self.shared.index.read().newest(key))
    }

    /// The put of a key that was visible before the running transaction.
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
    change.life.map(|life| Hit { revision: change.revision, life: Some(life) })
}

/// The writer's own view: published keys with the running batch laid over them.
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
                count += usize::from(change.life.is_some());
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

/// Notes that a visitor said stop.
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
            damage = Some(format!("the history table holds a record that cannot be read, under key {key:02x?}"));
            return ControlFlow::Break(());
        };
        let life = Life { create: record.create_revision, version: record.version, lease: record.lease };
        let change = Change { revision, life: (!deletion).then_some(life), bytes: record_bytes(value, deletion) };
        bytes += u64::from(change.bytes);
        index.push(&record.key, change);
        ControlFlow::Continue(())
    })?;
    damage.map_or(Ok((index, bytes)), |damage| Err(Halt::Refused(damage)))
}
