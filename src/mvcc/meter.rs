//! Reads that end where they cost too much: the index knows how many records a read needs, but not how long they are.

use std::{cell::Cell, ops::ControlFlow};

use bytes::Bytes;

use super::{
    Hit, Interval, Revision, Shared,
    read::{CHUNK, Source},
};
use crate::error::Halt;

/// A short read fetches records of so many bytes.
pub const SHORT_BYTES: usize = 1 << 20;
/// What a record counts for beside its bytes.
const RECORD_BYTES: usize = 256;
/// Records that a short read fetches from the database before it looks how long they are.
pub const SHORT_BATCH: usize = 8;
/// The same for a long one.
pub const LONG_BATCH: usize = 16;

/// Is told what each batch of records costs in bytes, and says whether the read may go on.
pub type Meter<'a> = &'a dyn Fn(usize) -> bool;

/// A meter that lets a read go on for so many bytes.
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

/// What is published, for a read that its meter may stop. A single record is never too much.
pub struct Metered<'a> {
    shared: &'a Shared,
    meter: Meter<'a>,
    /// How many records are fetched from the database between two looks at the meter.
    batch: usize,
}

impl<'a> Metered<'a> {
    /// Reads that look at the meter after so many records from the database.
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

    /// All of them are missing if they are too much.
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
