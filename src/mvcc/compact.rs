//! Forgetting, and the hash that proves replicas forgot alike.
//!
//! A compaction at R touches only what changed since the last one at P: what it forgets is overwritten by, or is itself, a
//! record between P and R. So its cost follows change, not size, and nothing has to be defragmented. It is done in pieces,
//! by whoever has time: the mark that makes R the compact revision is written long before.
//!
//! ```text
//! records   … │a b c d e f … │a b a b a b a b a b c a b│…          the last ones of a, b and c stay, and d, e and f
//!             ╰────┬─────────P──────────┬──────────────R
//!       one by one, with the first      in the order of the scan: few neighbours one by one, many as a range
//!       record that displaces them
//! ```
//!
//! Where keys are written over and over nearly everything between P and R goes, and a range costs as much as one record.
//!
//! INVARIANTS
//! * What is forgotten of one key goes oldest first. A deletion that vanished before the put it hides would bring the key
//!   back to life after a crash.
//! * Nothing is forgotten that a registered view can see.

use std::{
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;

use super::{
    Forgotten, Interval, Reader, RecordKey, Revision, Scheduled, Shared, ViewGuard, read::Failure, record_bytes,
};
use crate::{
    error::{Error, Halt},
    storage::{Batch, Table, schema::meta},
};

/// Whoever writes to the database waits for a batch before its own, so none is larger than this.
const REMOVED_AT_ONCE: usize = 128;
/// So many neighbours go as a range: later reads pay for each range, until the database has rewritten its files.
pub const RANGE: usize = 1024;

/// A compaction in progress.
pub struct Compaction {
    shared: Arc<Shared>,
    at: i64,
    /// The last compaction's revision: this one's scan begins there.
    from: i64,
    /// How it was agreed; None if this process was not there, or if it does the work of several.
    scheduled: Option<Scheduled>,
    /// So many neighbours go as a range.
    range: usize,
    /// Where the scan goes on.
    next: Vec<u8>,
    run: Run,
    batch: Batch,
    /// Bytes of the records that the batch removes.
    batch_bytes: u64,
    /// Records removed so far.
    removed: u64,
    /// Something went as a range.
    has_ranges: bool,
}

/// Neighbours that go, and were not removed yet.
#[derive(Default)]
struct Run {
    count: usize,
    /// All of them, or as many as a range has, with the bytes of each record.
    keys: Vec<(RecordKey, u32)>,
    last: Option<RecordKey>,
    /// Of all of them.
    bytes: u64,
}

/// What one piece of a compaction came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Somebody still reads below; try again later.
    Blocked,
    /// There is more to do.
    More,
    /// All is removed and marked so.
    Done,
}

impl Compaction {
    /// What is left to do: nothing, or to finish the next compaction. Those that were agreed before this process opened the
    /// database are done in one go.
    #[must_use]
    pub fn pending(shared: &Arc<Shared>) -> Option<Self> {
        let finished = shared.finished.load(Ordering::Acquire);
        let (at, scheduled) = {
            let mut scheduled = shared.scheduled.lock();
            while scheduled.front().is_some_and(|first| first.at <= finished) {
                scheduled.pop_front();
            }
            let first = scheduled.front().copied();
            (first.map_or_else(|| shared.compacted(), |first| first.at), first)
        };
        // A deletion at the last compact revision was kept then and goes now, so the scan starts there, not behind it.
        let from = finished.max(0);
        (at > finished).then(|| Self {
            shared: shared.clone(),
            at,
            from,
            scheduled: scheduled.filter(|scheduled| scheduled.previous == finished),
            range: RANGE,
            next: RecordKey::first_of(from).as_ref().to_vec(),
            run: Run::default(),
            batch: Batch::default(),
            batch_bytes: 0,
            removed: 0,
            has_ranges: false,
        })
    }

    /// The same, but so many neighbours go as a range.
    #[must_use]
    pub fn with_ranges_of(self, range: usize) -> Self {
        Self { range, ..self }
    }

    /// The revision that is compacted at.
    #[must_use]
    pub fn at(&self) -> i64 {
        self.at
    }

    /// Records removed so far.
    #[must_use]
    pub fn removed(&self) -> u64 {
        self.removed
    }

    /// Whether something went as a range: the database does not see by itself how much that is.
    #[must_use]
    pub fn has_ranges(&self) -> bool {
        self.has_ranges
    }

    /// What has to be done before the first step, so that `HashKV` at this revision goes on answering what it would have answered
    /// before. Whether it is done has to be the same on all members, or their answers could not be compared: it depends on what
    /// the log says alone, and on how much the history holds where the compaction was agreed, when the one before is done. Every
    /// member comes to the same count there, whenever it is that far, because removal at a revision leaves the same everywhere.
    pub fn hashing(&self, max_bytes: u64) -> Result<Hashing, Halt> {
        let shared = &self.shared;
        let Some(scheduled) = self.scheduled.filter(|_| self.at > 0) else { return Ok(Hashing::Unknown) };
        let history_bytes = scheduled.written_bytes - shared.removed_bytes.load(Ordering::Acquire);
        if history_bytes > max_bytes {
            return Ok(Hashing::TooLarge { history_bytes });
        }
        let is_empty = nothing_is_alive(shared, self.at) && !self.ends_with_a_deletion()?;
        let current_at = if is_empty { scheduled.previous } else { self.at };
        let records = RecordHash::new(self.at, scheduled.previous, current_at);
        Ok(Hashing::Due(HashPass { shared: shared.clone(), records, next: Vec::new() }))
    }

    /// Whether a key was deleted at the very revision. Its record is kept until the next compaction.
    fn ends_with_a_deletion(&self) -> Result<bool, Halt> {
        let (from, to) = (RecordKey::first_of(self.at), RecordKey::first_of(self.at.saturating_add(1)));
        let mut found = false;
        self.shared.engine.scan(Table::History, from.as_ref(), to.as_ref(), &mut |key, _| {
            found |= RecordKey::decode(key).is_some_and(|(_, deletion)| deletion);
            if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(found)
    }

    /// Looks at records until these, and older ones that they have displaced, are about `limit`; removes what goes.
    pub fn step(&mut self, limit: usize) -> Result<Progress, Halt> {
        let shared = self.shared.clone();
        if shared.oldest_view().is_some_and(|view| view < self.at) {
            return Ok(Progress::Blocked);
        }
        let (mut left, mut outcome) = (limit, Ok(()));
        let start = std::mem::take(&mut self.next);
        let end = RecordKey::first_of(self.at.saturating_add(1));
        shared.engine.scan(Table::History, &start, end.as_ref(), &mut |key, value| {
            outcome = self.look_at(key, value).map(|displaced| left = left.saturating_sub(1 + displaced));
            if left > 0 && outcome.is_ok() {
                return ControlFlow::Continue(());
            }
            self.next = [key, &[0]].concat();
            ControlFlow::Break(())
        })?;
        outcome?;
        if !self.next.is_empty() {
            self.write()?;
            return Ok(Progress::More);
        }
        self.end_run()?;
        self.batch.put(Table::Meta, meta::COMPACT_FINISHED, self.at.to_be_bytes().to_vec());
        self.write()?;
        shared.finished.store(self.at, Ordering::Release);
        Ok(Progress::Done)
    }

    /// Sees to a record of the scan, and if it is the first of its key to what that displaces in older times. Returns how
    /// many these were.
    fn look_at(&mut self, key: &[u8], record: &[u8]) -> Result<usize, Halt> {
        let (Some((revision, deletion)), Some(name)) = (RecordKey::decode(key), key_of(record)) else {
            self.end_run()?; // Whatever it is, it stays.
            return Ok(0);
        };
        // Short locks; readers and the writer get in between.
        let fate = self.shared.index.read().fate(name, self.at);
        let mut dead = Vec::new();
        if fate.forgotten > 0 {
            self.shared.index.write().compact(name, self.at, &mut dead);
            dead.retain(|change| change.revision.main < self.from); // The scan meets the others.
        }
        for &Forgotten { revision, deletion, bytes } in &dead {
            self.delete(RecordKey::new(revision, deletion), bytes)?;
        }
        if fate.kept == Some(revision) {
            self.end_run()?;
        } else {
            self.run.push(RecordKey::new(revision, deletion), record_bytes(record, deletion), self.range);
        }
        Ok(dead.len())
    }

    /// Removes the neighbours that were found.
    fn end_run(&mut self) -> Result<(), Halt> {
        let Run { count, keys, last: Some(last), bytes } = std::mem::take(&mut self.run) else { return Ok(()) };
        if count < self.range {
            keys.iter().try_for_each(|&(key, bytes)| self.delete(key, bytes))?;
        } else {
            self.batch.delete_range(Table::History, keys[0].0.as_ref(), [last.as_ref(), &[0]].concat());
            self.batch_bytes += bytes;
            self.removed += count as u64;
            self.has_ranges = true;
        }
        Ok(())
    }

    fn delete(&mut self, key: RecordKey, bytes: u32) -> Result<(), Halt> {
        self.batch.delete(Table::History, key.as_ref());
        self.batch_bytes += u64::from(bytes);
        self.removed += 1;
        if self.batch.len() >= REMOVED_AT_ONCE { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), Halt> {
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

/// The key inside an encoded record, without decoding the rest: field 1 comes first. None for a record without a key, as a
/// restore with a bumped revision leaves one.
pub(super) fn key_of(record: &[u8]) -> Option<&[u8]> {
    const KEY_TAG: u8 = 0x0a;
    let mut rest = record.strip_prefix(&[KEY_TAG])?;
    let len = prost::encoding::decode_varint(&mut rest).ok()?;
    rest.get(..usize::try_from(len).ok()?)
}

/// A checksum of the key space up to a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash {
    /// CRC-32C over the records that count.
    pub hash: u32,
    /// The compact revision while it was made.
    pub compact_revision: i64,
    /// The revision up to which it was made.
    pub hash_revision: i64,
    /// The head while it was made.
    pub head: i64,
}

/// The hash that a compaction is to be remembered by.
pub enum Hashing {
    /// It is to be computed.
    Due(HashPass),
    /// It is left out, because the history is too large.
    TooLarge {
        /// So large.
        history_bytes: u64,
    },
    /// Not every member could come to the same one: this compaction was interrupted, or does the work of several.
    Unknown,
}

/// A remembered hash in the making. Between two steps nothing is held: all that it reads stays as it is until the compaction
/// itself begins.
pub struct HashPass {
    shared: Arc<Shared>,
    records: RecordHash,
    next: Vec<u8>,
}

impl HashPass {
    /// Looks at no more than so many records, and at few that are large. True when all is done and remembered.
    pub fn step(&mut self, limit: usize) -> Result<bool, Halt> {
        let (mut records, mut bytes) = (0, 0);
        let (start, mut next) = (std::mem::take(&mut self.next), Vec::new());
        let end = self.records.end();
        let (shared, hash, mut outcome) = (&self.shared, &mut self.records, Ok(()));
        shared.engine.scan(Table::History, &start, end.as_ref(), &mut |key, value| {
            outcome = hash.add(shared, key, value);
            (records, bytes) = (records + 1, bytes + value.len());
            if outcome.is_ok() && records < limit && bytes < HASHED_AT_ONCE {
                return ControlFlow::Continue(());
            }
            next = [key, &[0]].concat();
            ControlFlow::Break(())
        })?;
        outcome?;
        self.next = next;
        let is_done = self.next.is_empty();
        if is_done {
            self.remember();
        }
        Ok(is_done)
    }

    fn remember(&self) {
        let RecordHash { crc, at, compacted, .. } = self.records;
        let hash = KeyHash { hash: crc, compact_revision: compacted, hash_revision: at, head: self.shared.head() };
        let mut hashes = self.shared.hashes.lock();
        hashes.insert(at, hash);
        while hashes.len() > HASHES_REMEMBERED {
            hashes.pop_first();
        }
    }
}

/// A history of no more than so many bytes is hashed by each of its compactions.
pub const HASHED_BYTES: u64 = 64 << 20;
/// A step of that ends after so many bytes of records.
const HASHED_AT_ONCE: usize = 256 << 10;

/// The bucket in which etcd keeps records; its name is the seed of the hash.
const HASH_SEED: &[u8] = b"key";
/// So many compactions are remembered by their hashes, those of the highest revisions.
const HASHES_REMEMBERED: usize = 10;

impl Reader {
    /// The hash of all records up to `revision` (zero: now), equal on all members and to etcd's. Reads the whole history,
    /// unless a compaction has remembered it.
    pub fn hash_kv(&self, revision: i64) -> Result<KeyHash, Failure> {
        let shared = &self.shared;
        if let Some(remembered) = shared.hashes.lock().get(&revision) {
            return Ok(KeyHash { head: shared.head(), ..*remembered });
        }
        let (compacted, head, guard) = self.hold_compaction();
        if revision > head {
            return Err(Error::FutureRev.into());
        }
        // A negative revision is no error: nothing lies at or below it.
        let at = if revision == 0 { head } else { revision };
        if revision > 0 && revision < compacted {
            return Err(Error::Compacted.into());
        }
        // The revision at which a record that compaction looked at must be current to be part of the hash. But where nothing
        // is alive, etcd leaves this rule out, and all counts that compaction left.
        let current_at = if nothing_is_alive(shared, at) { compacted } else { at };
        let hash = hash_records(shared, at, compacted, current_at)?;
        drop(guard);
        Ok(KeyHash { hash, compact_revision: compacted, hash_revision: at, head })
    }

    /// The hashes that compactions have remembered, the newest first.
    #[must_use]
    pub fn compaction_hashes(&self) -> Vec<KeyHash> {
        self.shared.hashes.lock().values().rev().copied().collect()
    }

    /// The compact revision, a head that is not below it, and what keeps all later compactions from removing anything.
    fn hold_compaction(&self) -> (i64, i64, ViewGuard) {
        loop {
            let compacted = self.shared.compacted();
            let guard = self.shared.register(compacted.max(0));
            let head = self.shared.head();
            // Registering first and checking afterwards leaves compaction no moment in between. A compaction is published
            // shortly before the head that it was made at: a hash between the two would be of a revision that is compacted.
            if self.shared.compacted() == compacted && compacted <= head {
                return (compacted, head, guard);
            }
            std::hint::spin_loop();
        }
    }
}

fn nothing_is_alive(shared: &Shared, at: i64) -> bool {
    shared.index.read().count(&Interval::From(Bytes::new()), at) == 0
}

/// The hash of all records up to `at` that count.
fn hash_records(shared: &Shared, at: i64, compacted: i64, current_at: i64) -> Result<u32, Halt> {
    let mut hash = RecordHash::new(at, compacted, current_at);
    let mut outcome = Ok(());
    shared.engine.scan(Table::History, &[], hash.end().as_ref(), &mut |key, value| {
        outcome = hash.add(shared, key, value);
        if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    outcome.map(|()| hash.crc)
}

/// A hash that records are added to, in the order of the table.
struct RecordHash {
    crc: u32,
    /// The revision up to which it goes.
    at: i64,
    /// The compact revision. Above it all records count; at or below it only those that are current at `current_at`, as the others
    /// may be removed already, or not.
    compacted: i64,
    current_at: i64,
}

impl RecordHash {
    fn new(at: i64, compacted: i64, current_at: i64) -> Self {
        Self { crc: crc32c::crc32c(HASH_SEED), at, compacted, current_at }
    }

    /// What comes behind the last record that may count.
    fn end(&self) -> RecordKey {
        RecordKey::first_of(self.at.max(0).saturating_add(1))
    }

    fn add(&mut self, shared: &Shared, key: &[u8], value: &[u8]) -> Result<(), Halt> {
        let Some((revision, deletion)) = RecordKey::decode(key) else {
            return Err(Halt::Refused(format!("the history table has a key that is none: {key:02x?}")));
        };
        if self.counts(shared, revision, deletion, value) {
            self.crc = crc32c::crc32c_append(crc32c::crc32c_append(self.crc, key), value);
        }
        Ok(())
    }

    fn counts(&self, shared: &Shared, revision: Revision, deletion: bool, record: &[u8]) -> bool {
        if revision.main > self.compacted {
            return true;
        }
        let key = key_of(record).unwrap_or_default();
        !deletion && shared.index.read().get(key, self.current_at).is_some_and(|hit| hit.revision == revision)
    }
}
