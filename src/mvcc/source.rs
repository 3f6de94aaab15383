//! Where reads find keys and records: the index says which records there are, then these are fetched from the cache or the
//! database.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Hit, Interval, RecordKey, Revision, Shared};
use crate::{error::Halt, storage::Table};

/// The maximum number of keys that a reader visits while it holds the index lock. A read of at most this many is short, and one
/// of more is a scan.
pub const CHUNK: usize = 256;

/// A source of keys to read: the published key space, or the writer's view, which includes the current batch.
pub trait Source {
    /// Visits the keys of an interval that are live at `at`, in ascending order, until `visit` breaks.
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>);
    /// How many keys of an interval are live at `at`.
    fn count(&self, interval: &Interval, at: i64) -> usize;
    /// Encoded records; None for each that compaction has removed.
    fn records(&self, revisions: &[Revision]) -> Result<Vec<Option<Bytes>>, Halt>;
}

impl Source for Shared {
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        let mut rest = interval.clone();
        loop {
            let next = self.index.read().visit_bounded(&rest, at, CHUNK, visit);
            let Some(key) = next else { return };
            rest = rest.starting_at(key);
        }
    }

    fn count(&self, interval: &Interval, at: i64) -> usize {
        let (mut total, mut rest) = (0, interval.clone());
        loop {
            let (count, next) = self.index.read().count_bounded(&rest, at, CHUNK);
            total += count;
            let Some(key) = next else { return total };
            rest = rest.starting_at(key);
        }
    }

    fn records(&self, revisions: &[Revision]) -> Result<Vec<Option<Bytes>>, Halt> {
        let mut found = self.cached(revisions);
        let missing = Self::missing(revisions, &found);
        if !missing.is_empty() {
            self.fetch(revisions, &missing, &mut found, missing.len() > CHUNK)?;
        }
        Ok(found)
    }
}

impl Shared {
    /// The records of these revisions, as far as they are in the cache.
    pub(super) fn cached(&self, revisions: &[Revision]) -> Vec<Option<Bytes>> {
        revisions.iter().map(|revision| self.cache.get(revision)).collect()
    }

    /// The positions at which `found` has no record, sorted by revision, the order of the database.
    pub(super) fn missing(revisions: &[Revision], found: &[Option<Bytes>]) -> Vec<usize> {
        let mut missing: Vec<usize> = (0..found.len()).filter(|&nth| found[nth].is_none()).collect();
        missing.sort_unstable_by_key(|&nth| revisions[nth]);
        missing
    }

    /// Fetches the records at the positions `missing` from the database, and adds them to the cache and to `found`.
    pub(super) fn fetch(
        &self,
        revisions: &[Revision],
        missing: &[usize],
        found: &mut [Option<Bytes>],
        is_scan: bool,
    ) -> Result<(), Halt> {
        let keys: Vec<RecordKey> = missing.iter().map(|&nth| RecordKey::new(revisions[nth], false)).collect();
        let keys: Vec<&[u8]> = keys.iter().map(AsRef::as_ref).collect();
        for (&nth, record) in missing.iter().zip(self.engine.get_many(Table::History, &keys, is_scan)?) {
            if let Some(record) = &record {
                self.cache.insert(revisions[nth], record.clone());
            }
            found[nth] = record;
        }
        Ok(())
    }
}
