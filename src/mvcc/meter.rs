//! Reads that are stopped when they cost too much: the index knows how many records a read needs, but not their lengths.

use std::{cell::Cell, ops::ControlFlow};

use bytes::Bytes;

use super::{
    Hit, Interval, Revision, Shared,
    source::{CHUNK, Source},
};
use crate::error::Halt;

/// The most bytes that a short read may fetch.
pub const SHORT_BYTES: usize = 1 << 20;
/// The fixed cost of a record, in addition to its length.
const RECORD_BYTES: usize = 256;
/// How many records a short read fetches from the database before it checks their cost.
pub const SHORT_BATCH: usize = 8;
/// The same for a long one.
pub const LONG_BATCH: usize = 16;

/// Called with the cost of each batch of records in bytes; returns whether the read may continue.
pub type Meter<'a> = &'a dyn Fn(usize) -> bool;

/// A meter that allows `bytes` in total.
pub fn at_most(bytes: usize) -> impl Fn(usize) -> bool {
    let left = Cell::new(bytes);
    move |cost| match left.get().checked_sub(cost) {
        Some(rest) => {
            left.set(rest);
            true
        }
        None => false,
    }
}

/// The published key space, for a read that its meter may stop. A read of a single record is never stopped.
pub struct Metered<'a> {
    shared: &'a Shared,
    meter: Meter<'a>,
    /// How many records are fetched from the database between two calls of the meter.
    batch: usize,
}

impl<'a> Metered<'a> {
    /// A source that calls the meter after every `batch` records from the database.
    #[must_use]
    pub fn new(shared: &'a Shared, meter: Meter<'a>, batch: usize) -> Self {
        Self { shared, meter, batch }
    }

    fn spend<'b>(&self, records: impl Iterator<Item = &'b Bytes>) -> bool {
        (self.meter)(records.map(|record| record.len() + RECORD_BYTES).sum())
    }
}

impl Source for Metered<'_> {
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        self.shared.visit(interval, at, visit);
    }

    fn count(&self, interval: &Interval, at: i64) -> usize {
        self.shared.count(interval, at)
    }

    /// Returns None for all of them if the meter stops the read.
    fn records(&self, revisions: &[Revision]) -> Result<Vec<Option<Bytes>>, Halt> {
        let too_much = || Ok(vec![None; revisions.len()]);
        let mut found = self.shared.cached(revisions);
        if !self.spend(found.iter().flatten()) && revisions.len() > 1 {
            return too_much();
        }
        let missing = Shared::missing(revisions, &found);
        for batch in missing.chunks(self.batch) {
            self.shared.fetch(revisions, batch, &mut found, missing.len() > CHUNK)?;
            if !self.spend(batch.iter().filter_map(|&nth| found[nth].as_ref())) && revisions.len() > 1 {
                return too_much();
            }
        }
        Ok(found)
    }
}
