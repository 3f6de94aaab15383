//! Reads: finds the records that a [`Query`] selects, in order, and fetches them.
//!
//! The index knows which keys there are. Records are fetched by revision, from the cache or in one sorted batch from the
//! database, and passed on as they are stored. They are decoded only if the query sorts by value or needs metadata that the
//! index no longer has.
//!
//! A short read registers no view ([`Reader::range_if_short`]). A long one does ([`Reader::range`]), and so does a short one
//! that is repeated because a compaction removed a record between the lookup in the index and the read from the database.
//! The index knows how many records a read needs, but not their lengths: a short read whose records turn out to be long is
//! abandoned and repeated as a long one; a long one may be abandoned as well ([`Reader::range_metered`]).

use std::{cell::Cell, cmp::Ordering, ops::ControlFlow, sync::Arc};

use bytes::Bytes;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};

use super::{
    Hit, Interval, KeyMetadata, Revision, Shared, ViewGuard,
    meter::{self, Meter, Metered},
    query::{Order, Query, Target},
    source::{CHUNK, Source},
};
use crate::{
    error::{Error, Halt},
    proto::mvccpb::KeyValue,
};

/// The response to a Range, without its header.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Rows {
    /// Encoded `mvccpb.KeyValue`s.
    pub records: Vec<Bytes>,
    /// Whether there are more keys than the limit allows.
    pub more: bool,
    /// The number of keys in the interval, regardless of limit and filters.
    pub count: i64,
}

const KVS_FIELD: u32 = 2;
const MORE_FIELD: u32 = 3;
const COUNT_FIELD: u32 = 4;

impl Rows {
    /// The number of bytes that [`Rows::encode`] appends.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let field = |record: &Bytes| key_len(KVS_FIELD) + encoded_len_varint(record.len() as u64) + record.len();
        let more = if self.more { key_len(MORE_FIELD) + 1 } else { 0 };
        let count = match self.count {
            0 => 0,
            count => key_len(COUNT_FIELD) + encoded_len_varint(count.cast_unsigned()),
        };
        self.records.iter().map(field).sum::<usize>() + more + count
    }

    /// Appends fields 2 to 4 of a `RangeResponse`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.encode_records(out);
        if self.more {
            encode_key(MORE_FIELD, WireType::Varint, out);
            encode_varint(1, out);
        }
        if self.count != 0 {
            encode_key(COUNT_FIELD, WireType::Varint, out);
            encode_varint(self.count.cast_unsigned(), out);
        }
    }

    /// Appends only field 2: most parts of a RangeStream have no other field.
    pub fn encode_records(&self, out: &mut Vec<u8>) {
        for record in &self.records {
            encode_key(KVS_FIELD, WireType::LengthDelimited, out);
            encode_varint(record.len() as u64, out);
            out.extend_from_slice(record);
        }
    }
}

/// A selected key.
struct Row {
    /// Empty unless the query needs the key itself.
    key: Bytes,
    hit: Hit,
    record: Option<KeyValue>,
}

impl Row {
    fn metadata(&self) -> KeyMetadata {
        self.hit.metadata.expect("metadata is fetched before it is used")
    }

    fn value(&self) -> &[u8] {
        &self.record.as_ref().expect("records are fetched before a sort by value").value
    }

    /// The record for `keys_only`: what the index knows. As in etcd, the lease is set only in a sort by value, which has the
    /// record at hand.
    fn encode_without_value(&self) -> Bytes {
        let metadata = self.metadata();
        let key_value = KeyValue {
            key: self.key.clone(),
            create_revision: metadata.create,
            mod_revision: self.hit.revision.main,
            version: metadata.version,
            value: Bytes::new(),
            lease: self.record.as_ref().map_or(0, |record| record.lease),
        };
        key_value.encode_to_vec().into()
    }
}

/// Executes `query` at revision `at`. None if a compaction removed a record in the meantime.
pub fn range(source: &dyn Source, query: &Query, at: i64) -> Result<Option<Rows>, Halt> {
    if query.count_only {
        let count = as_count(source.count(&query.interval, at));
        return Ok(Some(Rows { count, ..Rows::default() }));
    }
    let mut rows = visit_rows(source, query, at);
    let reached_limit = rows.len() >= query.fetch_limit();
    let count = if reached_limit && query.counts_rest { source.count(&query.interval, at) } else { rows.len() };
    let needs_records = query.needs_metadata() || query.target == Target::Value;
    if needs_records && !fetch_missing(source, query, &mut rows)? {
        return Ok(None);
    }
    if !query.filters.is_off() {
        rows.retain(|row| query.filters.matches(row.hit.revision.main, || row.metadata().create));
    }
    sort(&mut rows, query);
    let limit = usize::try_from(query.limit).unwrap_or(0);
    let more = limit > 0 && rows.len() > limit;
    if more {
        rows.truncate(limit);
    }
    let Some(records) = records_of(source, query, &rows)? else { return Ok(None) };
    Ok(Some(Rows { records, more, count: as_count(count) }))
}

fn as_count(count: usize) -> i64 {
    i64::try_from(count).expect("keys fit in memory, so their count fits in 63 bits")
}

fn visit_rows(source: &dyn Source, query: &Query, at: i64) -> Vec<Row> {
    let limit = query.fetch_limit();
    let mut rows = Vec::new();
    source.visit(&query.interval, at, &mut |key, hit| {
        let key = if query.keys_only { Bytes::copy_from_slice(key) } else { Bytes::new() };
        rows.push(Row { key, hit, record: None });
        if rows.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    rows
}

/// Fetches what the index does not have: values to sort by, and the metadata of keys that have newer changes. False if a
/// record is missing.
fn fetch_missing(source: &dyn Source, query: &Query, rows: &mut [Row]) -> Result<bool, Halt> {
    let wanted = |row: &Row| query.target == Target::Value || row.hit.metadata.is_none();
    let revisions: Vec<Revision> = rows.iter().filter(|row| wanted(row)).map(|row| row.hit.revision).collect();
    let records = source.records(&revisions)?;
    for (row, record) in rows.iter_mut().filter(|row| wanted(row)).zip(records) {
        let Some(record) = record else { return Ok(false) };
        let record = decode(record)?;
        row.hit.metadata =
            Some(KeyMetadata { create: record.create_revision, version: record.version, lease: record.lease });
        if query.target == Target::Value {
            row.record = Some(record);
        }
    }
    Ok(true)
}

/// Decodes a stored record.
pub fn decode(record: Bytes) -> Result<KeyValue, Halt> {
    KeyValue::decode(record).map_err(|error| {
        Halt::InvalidData(format!("the database is corrupt: cannot decode a record of the history table: {error}"))
    })
}

fn sort(rows: &mut [Row], query: &Query) {
    let compare = |a: &Row, b: &Row| match query.target {
        Target::Key => Ordering::Equal,
        Target::Version => a.metadata().version.cmp(&b.metadata().version),
        Target::Create => a.metadata().create.cmp(&b.metadata().create),
        Target::Mod => a.hit.revision.main.cmp(&b.hit.revision.main),
        Target::Value => a.value().cmp(b.value()),
    };
    match (query.order, query.target) {
        (Order::None | Order::Ascend, Target::Key) => (),
        (Order::Descend, Target::Key) => rows.reverse(),
        (Order::None | Order::Ascend, _) => rows.sort_by(compare),
        (Order::Descend, _) => rows.sort_by(|a, b| compare(b, a)),
    }
}

fn records_of(source: &dyn Source, query: &Query, rows: &[Row]) -> Result<Option<Vec<Bytes>>, Halt> {
    if query.keys_only {
        return Ok(Some(rows.iter().map(Row::encode_without_value).collect()));
    }
    let revisions: Vec<Revision> = rows.iter().map(|row| row.hit.revision).collect();
    Ok(source.records(&revisions)?.into_iter().collect())
}

/// Reads the published key space; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Reader {
    pub(super) shared: Arc<Shared>,
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The request is refused.
    #[error(transparent)]
    Refused(#[from] Error),
    /// The database failed or is corrupt, so this process must end.
    #[error(transparent)]
    Halt(#[from] Halt),
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The newest revision that can be read.
    #[must_use]
    pub fn head(&self) -> i64 {
        self.shared.head()
    }

    #[must_use]
    pub fn compacted(&self) -> i64 {
        self.shared.compacted()
    }

    /// The number of keys in the index, including deleted keys that are not compacted yet.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.shared.index.read().len()
    }

    /// Bytes of the records that compaction has not removed.
    #[must_use]
    pub fn history_bytes(&self) -> u64 {
        self.shared.history_bytes()
    }

    /// Approximate memory of the index and of the cached records.
    #[must_use]
    pub fn memory(&self) -> (u64, u64) {
        self.shared.memory()
    }

    /// How often a record was found in the cache, and how often it was not.
    #[must_use]
    pub fn cache_lookups(&self) -> (u64, u64) {
        self.shared.cache_lookups()
    }

    /// How many views keep their revision from being compacted.
    #[must_use]
    pub fn open_views(&self) -> usize {
        self.shared.open_views()
    }

    /// Whether a query visits few enough keys to be executed without delay. Keys that are live at the head are counted by adding
    /// up leaves; at an older revision each key has to be visited.
    #[must_use]
    pub fn is_short(&self, query: &Query) -> bool {
        let takes_few = query.count_only || query.fetch_limit() <= CHUNK + 1;
        let counts_slowly = query.revision > 0 && (query.count_only || query.counts_rest);
        if matches!(query.interval, Interval::Key(_)) || takes_few && !counts_slowly {
            return true;
        }
        let everything = &mut |_: &[u8], _| ControlFlow::Continue(());
        self.shared.index.read().visit_bounded(&query.interval, i64::MAX, CHUNK, everything).is_none()
    }

    /// Executes a query; also returns the head at that time. This may take long.
    pub fn range(&self, query: &Query) -> Result<(Rows, i64), ReadError> {
        let (view, head) = self.view(query.revision)?;
        Ok((view.range(query)?, head))
    }

    /// The same, but None if the query is not short, its records are long, or a compaction interferes.
    pub fn range_if_short(&self, query: &Query) -> Result<Option<(Rows, i64)>, ReadError> {
        if !self.is_short(query) {
            return Ok(None);
        }
        let head = self.head();
        let at = self.resolve_revision(query.revision, head)?;
        Ok(self.range_unguarded(query, at)?.map(|rows| (rows, head)))
    }

    /// Executes a query while the meter allows it, and returns the head it was executed at; None if the meter stopped it. This
    /// may take long.
    pub fn range_metered(&self, query: &Query, meter: Meter<'_>) -> Result<Option<(Rows, i64)>, ReadError> {
        let (view, head) = self.view(query.revision)?;
        Ok(view.range_metered(query, meter)?.map(|rows| (rows, head)))
    }

    /// Executes one of several short reads that share a meter, at revision `at`, without a registered view; None if they are not
    /// short after all, or if a compaction has passed `at` in the meantime. That has to be checked even if all records were
    /// found: compaction removes them from the index first, and then they are simply missing.
    pub fn range_short(&self, query: &Query, at: i64, meter: Meter<'_>) -> Result<Option<Rows>, Halt> {
        let source = Metered::new(&self.shared, meter, meter::SHORT_BATCH);
        let rows = range(&source, query, at)?;
        Ok(rows.filter(|_| at >= self.compacted()))
    }

    /// Executes a short query without a registered view: see [`Self::range_short`].
    pub(super) fn range_unguarded(&self, query: &Query, at: i64) -> Result<Option<Rows>, Halt> {
        self.range_short(query, at, &meter::at_most(meter::SHORT_BYTES))
    }

    /// A view at `revision` (zero or less: the head), and the current head. Compaction removes nothing that the view can see
    /// until it is dropped.
    pub fn view(&self, revision: i64) -> Result<(View, i64), Error> {
        // Register first, check afterwards: so no compaction can run in between.
        loop {
            let head = self.head();
            let at = if revision > 0 { revision } else { head };
            let guard = self.shared.register(at);
            match self.resolve_revision(revision, head) {
                Ok(_) if at >= self.compacted() => {
                    return Ok((View { shared: self.shared.clone(), at, _guard: guard }, head));
                }
                Ok(_) if revision <= 0 => (), // A compaction has passed this head: try again with the new one.
                Ok(_) => return Err(Error::Compacted),
                Err(error) => return Err(error),
            }
        }
    }

    fn resolve_revision(&self, revision: i64, head: i64) -> Result<i64, Error> {
        match revision {
            ..=0 => Ok(head),
            future if future > head => Err(Error::FutureRev),
            old if old < self.compacted() => Err(Error::Compacted),
            at => Ok(at),
        }
    }

    /// The record of a revision, unless compaction has removed it. Watchers read `prev_kv` with this.
    pub fn record(&self, revision: Revision) -> Result<Option<Bytes>, Halt> {
        Ok(self.shared.records(&[revision])?.pop().flatten())
    }
}

/// The key space at one revision. Blocks compactions above that revision until it is dropped.
pub struct View {
    shared: Arc<Shared>,
    at: i64,
    _guard: ViewGuard,
}

impl View {
    #[must_use]
    pub fn at(&self) -> i64 {
        self.at
    }

    /// Executes a query at this view's revision; the query's own revision is ignored.
    pub fn range(&self, query: &Query) -> Result<Rows, Halt> {
        let rows = range(self.shared.as_ref(), query, self.at)?;
        rows.ok_or_else(|| {
            Halt::InvalidData(format!("the database is corrupt: a record visible at revision {} is missing", self.at))
        })
    }

    /// The same while the meter allows it; None if the meter stopped it.
    pub fn range_metered(&self, query: &Query, meter: Meter<'_>) -> Result<Option<Rows>, Halt> {
        let is_stopped = Cell::new(false);
        let meter = |cost| {
            let goes_on = meter(cost);
            is_stopped.set(is_stopped.get() || !goes_on);
            goes_on
        };
        match range(&Metered::new(&self.shared, &meter, meter::LONG_BATCH), query, self.at)? {
            None if !is_stopped.get() => self.range(query).map(Some), // A record is missing: this returns the error.
            rows => Ok(rows),
        }
    }
}

impl Source for View {
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        Source::visit(self.shared.as_ref(), interval, at, visit);
    }

    fn count(&self, interval: &Interval, at: i64) -> usize {
        Source::count(self.shared.as_ref(), interval, at)
    }

    fn records(&self, revisions: &[Revision]) -> Result<Vec<Option<Bytes>>, Halt> {
        self.shared.records(revisions)
    }
}
