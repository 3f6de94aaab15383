//! Compaction, and the hash that shows whether all members hold the same history.
//!
//! A compaction at R reads only the records written since the last one at P: every record that it removes either lies between
//! P and R or was superseded by a record between P and R. So its cost is proportional to the changes, not to the size of the
//! database, and no defragmentation is needed. Removal is done in steps, in the background, long after R was written as the
//! compact revision.
//!
//! ```text
//! records   … │a b c d e f … │a b a b a b a b a b c a b│…          kept: the last of a, b and c; and d, e and f
//!             ╰────┬─────────P──────────┬──────────────R
//!       removed one by one, when the    removed in the order of the scan: short runs one by one, long runs
//!       scan meets their successor      with a range delete
//! ```
//!
//! Where the same keys are written over and over, nearly everything between P and R is removed, and a range delete costs as
//! much as the deletion of one record.
//!
//! INVARIANTS
//! * The records of one key are removed oldest first. If a tombstone were removed before the put that it hides, a crash in
//!   between would bring the deleted key back.
//! * Nothing is removed that a registered view can see.

use std::{
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;

use super::{
    Interval, Reader, RecordKey, RemovedChange, Revision, Scheduled, Shared, ViewGuard, read::ReadError, record_bytes,
};
use crate::{
    error::{Error, Halt},
    storage::{Batch, Table, schema::meta},
};

/// Other writes to the database have to wait for a batch of this one, so batches are kept small.
const MAX_DELETES_PER_BATCH: usize = 128;
/// The shortest run of adjacent records that is removed with a range delete. Every range delete slows down later reads
/// until the database has rewritten its files, so short runs are deleted record by record.
pub const RANGE_DELETE_MIN: usize = 1024;

/// A compaction in progress.
pub struct Compaction {
    shared: Arc<Shared>,
    at: i64,
    /// The last compaction's revision, where this one's scan starts.
    from: i64,
    /// How this compaction was scheduled; None if it was scheduled before this process started, or if this one does the work of
    /// several.
    scheduled: Option<Scheduled>,
    /// The shortest run that is removed with a range delete.
    range: usize,
    /// Where the scan continues; empty once it has reached its end.
    next: Vec<u8>,
    run: Run,
    batch: Batch,
    /// Bytes of the records that the batch removes.
    batch_bytes: u64,
    removed: u64,
    used_range_deletes: bool,
}

/// A run of adjacent records that are to be removed.
#[derive(Default)]
struct Run {
    count: usize,
    /// The first records of the run, at most as many as make it long enough for a range delete, each with its bytes.
    keys: Vec<(RecordKey, u32)>,
    last: Option<RecordKey>,
    /// The total length of all records of the run.
    bytes: u64,
}

/// The result of one step of a compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompactionProgress {
    /// A view below this compaction's revision is registered; try again later.
    Blocked,
    /// There are more records to scan.
    More,
    /// Everything is removed, and the database records that the compaction is finished.
    Done,
}

impl Compaction {
    /// The next compaction that is not finished, if any. Those that were scheduled before this process opened the database are
    /// done together.
    #[must_use]
    pub fn pending(shared: &Arc<Shared>) -> Option<Self> {
        let finished = shared.compaction_finished.load(Ordering::Acquire);
        let (at, scheduled) = {
            let mut scheduled = shared.scheduled.lock();
            while scheduled.front().is_some_and(|first| first.at <= finished) {
                scheduled.pop_front();
            }
            let first = scheduled.front().copied();
            (first.map_or_else(|| shared.compacted(), |first| first.at), first)
        };
        // A tombstone at the last compact revision was kept then and is removed now, so the scan starts at that revision.
        let from = finished.max(0);
        (at > finished).then(|| Self {
            shared: shared.clone(),
            at,
            from,
            scheduled: scheduled.filter(|scheduled| scheduled.previous == finished),
            range: RANGE_DELETE_MIN,
            next: RecordKey::first_of(from).as_ref().to_vec(),
            run: Run::default(),
            batch: Batch::default(),
            batch_bytes: 0,
            removed: 0,
            used_range_deletes: false,
        })
    }

    /// Overrides [`RANGE_DELETE_MIN`].
    #[must_use]
    pub fn with_range_delete_min(self, range: usize) -> Self {
        Self { range, ..self }
    }

    #[must_use]
    pub fn at(&self) -> i64 {
        self.at
    }

    /// The number of records removed so far.
    #[must_use]
    pub fn removed(&self) -> u64 {
        self.removed
    }

    /// Whether any range delete was written. The database cannot tell how much data a range delete covers.
    #[must_use]
    pub fn used_range_deletes(&self) -> bool {
        self.used_range_deletes
    }

    /// What has to be done before the first step, so that `HashKV` at this revision keeps returning what it returned before.
    /// All members must decide alike, or their hashes could not be compared. The decision therefore depends only on the log, and
    /// on the size of the history at the entry that scheduled the compaction, less what all earlier compactions removed. That
    /// size is the same on every member, however late its compactions run, because a compaction leaves the same records
    /// everywhere.
    pub fn hashing(&self, max_bytes: u64) -> Result<Hashing, Halt> {
        let shared = &self.shared;
        let Some(scheduled) = self.scheduled.filter(|_| self.at > 0) else { return Ok(Hashing::Unknown) };
        let history_bytes = scheduled.written_bytes - shared.removed_bytes.load(Ordering::Acquire);
        if history_bytes > max_bytes {
            return Ok(Hashing::TooLarge { history_bytes });
        }
        let is_empty = has_no_live_keys(shared, self.at) && !self.has_tombstone_at_revision()?;
        let current_at = if is_empty { scheduled.previous } else { self.at };
        let records = RecordHash::new(self.at, scheduled.previous, current_at);
        Ok(Hashing::Due(HashPass { shared: shared.clone(), records, next: Vec::new() }))
    }

    /// Whether a key was deleted at exactly this revision. Its tombstone is kept until the next compaction.
    fn has_tombstone_at_revision(&self) -> Result<bool, Halt> {
        let (from, to) = (RecordKey::first_of(self.at), RecordKey::first_of(self.at.saturating_add(1)));
        let mut found = false;
        self.shared.engine.scan(Table::History, from.as_ref(), to.as_ref(), &mut |key, _| {
            found |= RecordKey::decode(key).is_some_and(|(_, deletion)| deletion);
            if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(found)
    }

    /// Scans on until about `limit` records were handled, counting older records that they superseded; removes what is to be
    /// removed.
    pub fn step(&mut self, limit: usize) -> Result<CompactionProgress, Halt> {
        let shared = self.shared.clone();
        if shared.oldest_view().is_some_and(|view| view < self.at) {
            return Ok(CompactionProgress::Blocked);
        }
        let (mut left, mut outcome) = (limit, Ok(()));
        let start = std::mem::take(&mut self.next);
        let end = RecordKey::first_of(self.at.saturating_add(1));
        shared.engine.scan(Table::History, &start, end.as_ref(), &mut |key, value| {
            outcome = self.process_record(key, value).map(|superseded| left = left.saturating_sub(1 + superseded));
            if left > 0 && outcome.is_ok() {
                return ControlFlow::Continue(());
            }
            self.next = [key, &[0]].concat();
            ControlFlow::Break(())
        })?;
        outcome?;
        if !self.next.is_empty() {
            self.write_batch()?;
            return Ok(CompactionProgress::More);
        }
        self.flush_run()?;
        self.batch.put(Table::Meta, meta::COMPACT_FINISHED, self.at.to_be_bytes().to_vec());
        self.write_batch()?;
        shared.compaction_finished.store(self.at, Ordering::Release);
        Ok(CompactionProgress::Done)
    }

    /// Handles one record of the scan and, if it is the first of its key, the records before the scan that it superseded.
    /// Returns how many of those there were.
    fn process_record(&mut self, key: &[u8], record: &[u8]) -> Result<usize, Halt> {
        let (Some((revision, deletion)), Some(name)) = (RecordKey::decode(key), key_of(record)) else {
            self.flush_run()?; // A record that cannot be decoded is kept.
            return Ok(0);
        };
        // Two short locks instead of one long one: readers and the writer can run in between.
        let plan = self.shared.index.read().plan_compaction(name, self.at);
        let mut removed = Vec::new();
        if plan.dropped > 0 {
            self.shared.index.write().compact(name, self.at, &mut removed);
            removed.retain(|change| change.revision.main < self.from); // The scan handles the others.
        }
        for &RemovedChange { revision, deletion, bytes } in &removed {
            self.delete(RecordKey::new(revision, deletion), bytes)?;
        }
        if plan.kept == Some(revision) {
            self.flush_run()?;
        } else {
            self.run.push(RecordKey::new(revision, deletion), record_bytes(record, deletion), self.range);
        }
        Ok(removed.len())
    }

    /// Removes the records of the current run.
    fn flush_run(&mut self) -> Result<(), Halt> {
        let Run { count, keys, last: Some(last), bytes } = std::mem::take(&mut self.run) else { return Ok(()) };
        if count < self.range {
            keys.iter().try_for_each(|&(key, bytes)| self.delete(key, bytes))?;
        } else {
            self.batch.delete_range(Table::History, keys[0].0.as_ref(), [last.as_ref(), &[0]].concat());
            self.batch_bytes += bytes;
            self.removed += count as u64;
            self.used_range_deletes = true;
        }
        Ok(())
    }

    fn delete(&mut self, key: RecordKey, bytes: u32) -> Result<(), Halt> {
        self.batch.delete(Table::History, key.as_ref());
        self.batch_bytes += u64::from(bytes);
        self.removed += 1;
        if self.batch.len() >= MAX_DELETES_PER_BATCH { self.write_batch() } else { Ok(()) }
    }

    fn write_batch(&mut self) -> Result<(), Halt> {
        if !self.batch.is_empty() {
            self.shared.engine.write(&self.batch)?;
            self.batch.clear();
            self.shared.removed_bytes.fetch_add(std::mem::take(&mut self.batch_bytes), Ordering::AcqRel);
        }
        Ok(())
    }
}

impl Run {
    fn push(&mut self, key: RecordKey, bytes: u32, range: usize) {
        self.count += 1;
        self.bytes += u64::from(bytes);
        self.last = Some(key);
        if self.keys.len() < range {
            self.keys.push((key, bytes));
        }
    }
}

/// The key of an encoded record, without decoding the rest: field 1 comes first. None for a record without a key, such as
/// the one that a restore with a bumped revision writes.
pub(super) fn key_of(record: &[u8]) -> Option<&[u8]> {
    const KEY_TAG: u8 = 0x0a;
    let mut rest = record.strip_prefix(&[KEY_TAG])?;
    let len = prost::encoding::decode_varint(&mut rest).ok()?;
    rest.get(..usize::try_from(len).ok()?)
}

/// A checksum of the key space up to a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash {
    /// CRC-32C of the records that are part of the hash.
    pub hash: u32,
    /// The compact revision when the hash was computed.
    pub compact_revision: i64,
    /// The last revision that the hash covers.
    pub hash_revision: i64,
    /// The head when the hash was computed.
    pub head: i64,
}

/// Whether a compaction is to store a hash.
pub enum Hashing {
    /// It is to be computed.
    Due(HashPass),
    /// It is omitted, because the history is too large.
    TooLarge { history_bytes: u64 },
    /// The members could not all compute the same hash: this compaction was interrupted, or does the work of several.
    Unknown,
}

/// Computes the hash that a compaction stores, step by step. It holds nothing between two steps: all that it reads stays as it
/// is until the compaction itself begins.
pub struct HashPass {
    shared: Arc<Shared>,
    records: RecordHash,
    next: Vec<u8>,
}

impl HashPass {
    /// Reads at most `limit` records, and fewer if they are large. Returns true when the hash is complete and stored.
    pub fn step(&mut self, limit: usize) -> Result<bool, Halt> {
        let (mut records, mut bytes) = (0, 0);
        let (start, mut next) = (std::mem::take(&mut self.next), Vec::new());
        let end = self.records.end();
        let (shared, hash, mut outcome) = (&self.shared, &mut self.records, Ok(()));
        shared.engine.scan(Table::History, &start, end.as_ref(), &mut |key, value| {
            outcome = hash.add(shared, key, value);
            (records, bytes) = (records + 1, bytes + value.len());
            if outcome.is_ok() && records < limit && bytes < HASH_STEP_BYTES {
                return ControlFlow::Continue(());
            }
            next = [key, &[0]].concat();
            ControlFlow::Break(())
        })?;
        outcome?;
        self.next = next;
        let is_done = self.next.is_empty();
        if is_done {
            self.store();
        }
        Ok(is_done)
    }

    fn store(&self) {
        let RecordHash { crc, at, compacted, .. } = self.records;
        let hash = KeyHash { hash: crc, compact_revision: compacted, hash_revision: at, head: self.shared.head() };
        let mut hashes = self.shared.stored_hashes.lock();
        hashes.insert(at, hash);
        while hashes.len() > MAX_STORED_HASHES {
            hashes.pop_first();
        }
    }
}

/// A history of at most this many bytes is hashed by each of its compactions.
pub const MAX_HASHED_HISTORY_BYTES: u64 = 64 << 20;
/// A step of a [`HashPass`] ends after this many bytes of records.
const HASH_STEP_BYTES: usize = 256 << 10;

/// The name of etcd's bucket for records, which is the seed of its hash.
const HASH_SEED: &[u8] = b"key";
/// How many compaction hashes are kept: those of the highest revisions. etcd keeps as many.
const MAX_STORED_HASHES: usize = 10;

impl Reader {
    /// The hash of all records up to `revision` (zero: the head), equal on all members and to etcd's. Reads the whole history,
    /// unless a compaction has stored the hash.
    pub fn hash_kv(&self, revision: i64) -> Result<KeyHash, ReadError> {
        let shared = &self.shared;
        if let Some(stored) = shared.stored_hashes.lock().get(&revision) {
            return Ok(KeyHash { head: shared.head(), ..*stored });
        }
        let (compacted, head, guard) = self.block_compaction();
        if revision > head {
            return Err(Error::FutureRev.into());
        }
        // A negative revision is not an error: the hash of no records.
        let at = if revision == 0 { head } else { revision };
        if revision > 0 && revision < compacted {
            return Err(Error::Compacted.into());
        }
        // A record at or below the compact revision is part of the hash only if it is current at this revision. Where no key is
        // live, etcd does not apply this rule: then every record that compaction has left is part of the hash.
        let current_at = if has_no_live_keys(shared, at) { compacted } else { at };
        let hash = hash_records(shared, at, compacted, current_at)?;
        drop(guard);
        Ok(KeyHash { hash, compact_revision: compacted, hash_revision: at, head })
    }

    /// The hashes stored by compactions, newest first.
    #[must_use]
    pub fn compaction_hashes(&self) -> Vec<KeyHash> {
        self.shared.stored_hashes.lock().values().rev().copied().collect()
    }

    /// Returns the compact revision, a head that is not below it, and a guard that keeps later compactions from removing
    /// anything.
    fn block_compaction(&self) -> (i64, i64, ViewGuard) {
        loop {
            let compacted = self.shared.compacted();
            let guard = self.shared.register(compacted.max(0));
            let head = self.shared.head();
            // Register first, check afterwards: so no compaction can run in between. A compaction is published shortly before
            // the head that it was scheduled at: a hash between the two would be of a revision that is compacted.
            if self.shared.compacted() == compacted && compacted <= head {
                return (compacted, head, guard);
            }
            std::hint::spin_loop();
        }
    }
}

fn has_no_live_keys(shared: &Shared, at: i64) -> bool {
    shared.index.read().count(&Interval::From(Bytes::new()), at) == 0
}

/// The hash of the records up to `at`, as far as [`RecordHash::is_hashed`] includes them.
fn hash_records(shared: &Shared, at: i64, compacted: i64, current_at: i64) -> Result<u32, Halt> {
    let mut hash = RecordHash::new(at, compacted, current_at);
    let mut outcome = Ok(());
    shared.engine.scan(Table::History, &[], hash.end().as_ref(), &mut |key, value| {
        outcome = hash.add(shared, key, value);
        if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    outcome.map(|()| hash.crc)
}

/// A hash to which records are added in the order of the table.
struct RecordHash {
    crc: u32,
    /// The last revision that the hash covers.
    at: i64,
    /// The compact revision.
    compacted: i64,
    /// Records at or below the compact revision are included if they are current at this revision.
    current_at: i64,
}

impl RecordHash {
    fn new(at: i64, compacted: i64, current_at: i64) -> Self {
        Self { crc: crc32c::crc32c(HASH_SEED), at, compacted, current_at }
    }

    /// The exclusive end of the records that may be included.
    fn end(&self) -> RecordKey {
        RecordKey::first_of(self.at.max(0).saturating_add(1))
    }

    fn add(&mut self, shared: &Shared, key: &[u8], value: &[u8]) -> Result<(), Halt> {
        let Some((revision, deletion)) = RecordKey::decode(key) else {
            return Err(Halt::InvalidData(format!(
                "the database is corrupt: invalid record key {key:02x?} in the history table"
            )));
        };
        if self.is_hashed(shared, revision, deletion, value) {
            self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, key), value);
        }
        Ok(())
    }

    /// Whether a record is part of the hash. Above the compact revision every record is; at or below it only those that are
    /// current at `current_at`, because the others may or may not have been removed already.
    fn is_hashed(&self, shared: &Shared, revision: Revision, deletion: bool, record: &[u8]) -> bool {
        if revision.main > self.compacted {
            return true;
        }
        let key = key_of(record).unwrap_or_default();
        !deletion && shared.index.read().get(key, self.current_at).is_some_and(|hit| hit.revision == revision)
    }
}
