//! Reading: which records a [`Query`] means, in what order, and their bytes.
//!
//! The index answers which keys there are; records are fetched by revision, from the cache or in one sorted batch from the
//! database, and handed on as they are stored. Nothing decodes a value, unless a sort looks at it.
//!
//! A short read takes no view ([`Reader::range_at_once`]). A long one, and one of which compaction forgot a record between
//! index and database, registers first ([`Reader::range`]). The index knows how many records a read needs, but not how
//! long they are: a short read is given up where they turn out to be long, and done again as a long one; a long one may
//! be given up, too ([`Reader::range_metered`]).

use std::{cell::Cell, cmp::Ordering, ops::ControlFlow, sync::Arc};

use bytes::Bytes;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};

use super::{
    Hit, Interval, Life, RecordKey, Revision, Shared, ViewGuard,
    meter::{self, Meter, Metered},
    query::{Order, Query, Target},
};
use crate::{
    error::{Error, Halt},
    proto::mvccpb::KeyValue,
    storage::Table,
};

/// Readers hold the index lock for at most so many keys; a read of no more is short, and one of more is a scan.
pub const CHUNK: usize = 256;
/// The answer to a Range, but for the header.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Rows {
    /// Encoded `mvccpb.KeyValue`s.
    pub records: Vec<Bytes>,
    /// Whether the limit cut something off.
    pub more: bool,
    /// Keys in the interval, whatever limit and filters left of them.
    pub count: i64,
}

const KVS_FIELD: u32 = 2;
const MORE_FIELD: u32 = 3;
const COUNT_FIELD: u32 = 4;

impl Rows {
    /// How many bytes [`Rows::encode`] appends.
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

    /// Appends field 2 alone: all that most parts of a RangeStream have.
    pub fn encode_records(&self, out: &mut Vec<u8>) {
        for record in &self.records {
            encode_key(KVS_FIELD, WireType::LengthDelimited, out);
            encode_varint(record.len() as u64, out);
            out.extend_from_slice(record);
        }
    }
}

/// Somewhere to read keys from: what is published, or the writer's view of the running batch.
pub trait Source {
    /// Visits the live keys of an interval at `at`, ascending, until told to stop.
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>);
    /// How many keys of an interval are alive at `at`.
    fn count(&self, interval: &Interval, at: i64) -> usize;
    /// Encoded records; None where compaction has forgotten one.
    fn records(&self, revisions: &[Revision]) -> Result<Vec<Option<Bytes>>, Halt>;
}

impl Source for Shared {
    fn visit(&self, interval: &Interval, at: i64, visit: &mut dyn FnMut(&[u8], Hit) -> ControlFlow<()>) {
        let mut rest = interval.clone();
        loop {
            let next = self.index.read().visit_piece(&rest, at, CHUNK, visit);
            let Some(key) = next else { return };
            rest = rest.starting_at(key);
        }
    }

    fn count(&self, interval: &Interval, at: i64) -> usize {
        let (mut total, mut rest) = (0, interval.clone());
        loop {
            let (count, next) = self.index.read().count_piece(&rest, at, CHUNK);
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
    /// Those records that are in memory.
    pub(super) fn cached(&self, revisions: &[Revision]) -> Vec<Option<Bytes>> {
        revisions.iter().map(|revision| self.cache.get(revision)).collect()
    }

    /// Which of them are not, in the order of the database.
    pub(super) fn missing(revisions: &[Revision], found: &[Option<Bytes>]) -> Vec<usize> {
        let mut missing: Vec<usize> = (0..found.len()).filter(|&nth| found[nth].is_none()).collect();
        missing.sort_unstable_by_key(|&nth| revisions[nth]);
        missing
    }

    /// Fetches those from the database.
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

/// A key on its way into an answer.
struct Row {
    /// Empty unless the query looks at keys.
    key: Bytes,
    hit: Hit,
    record: Option<KeyValue>,
}

impl Row {
    fn life(&self) -> Life {
        self.hit.life.expect("lives are filled in before anybody looks at one")
    }

    fn value(&self) -> &[u8] {
        &self.record.as_ref().expect("records are fetched before a sort by value").value
    }

    /// The answer to `keys_only`: all that the index knows. A sort by value has the record, and with it the lease.
    fn without_value(&self) -> Bytes {
        let life = self.life();
        let key_value = KeyValue {
            key: self.key.clone(),
            create_revision: life.create,
            mod_revision: self.hit.revision.main,
            version: life.version,
            value: Bytes::new(),
            lease: self.record.as_ref().map_or(0, |record| record.lease),
        };
        key_value.encode_to_vec().into()
    }
}

/// Answers `query` at revision `at`. None if a record was forgotten meanwhile.
pub fn range(source: &dyn Source, query: &Query, at: i64) -> Result<Option<Rows>, Halt> {
    if query.count_only {
        let count = as_count(source.count(&query.interval, at));
        return Ok(Some(Rows { count, ..Rows::default() }));
    }
    let mut rows = visit_rows(source, query, at);
    let is_cut = rows.len() >= query.fetch_limit();
    let count = if is_cut && query.counts_rest { source.count(&query.interval, at) } else { rows.len() };
    let looks_inside = query.needs_lives() || query.target == Target::Value;
    if looks_inside && !fill(source, query, &mut rows)? {
        return Ok(None);
    }
    if !query.filters.is_off() {
        rows.retain(|row| query.filters.admit(row.hit.revision.main, || row.life().create));
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

/// Fetches what the index does not know: values to sort by, and the lives of keys that have changed since.
fn fill(source: &dyn Source, query: &Query, rows: &mut [Row]) -> Result<bool, Halt> {
    let wanted = |row: &Row| query.target == Target::Value || row.hit.life.is_none();
    let revisions: Vec<Revision> = rows.iter().filter(|row| wanted(row)).map(|row| row.hit.revision).collect();
    let records = source.records(&revisions)?;
    for (row, record) in rows.iter_mut().filter(|row| wanted(row)).zip(records) {
        let Some(record) = record else { return Ok(false) };
        let record = decode(record)?;
        row.hit.life = Some(Life { create: record.create_revision, version: record.version, lease: record.lease });
        if query.target == Target::Value {
            row.record = Some(record);
        }
    }
    Ok(true)
}

/// Reads a stored record.
pub fn decode(record: Bytes) -> Result<KeyValue, Halt> {
    KeyValue::decode(record)
        .map_err(|error| Halt::Refused(format!("a record of the history table is damaged: {error}")))
}

fn sort(rows: &mut [Row], query: &Query) {
    let compare = |a: &Row, b: &Row| match query.target {
        Target::Key => Ordering::Equal,
        Target::Version => a.life().version.cmp(&b.life().version),
        Target::Create => a.life().create.cmp(&b.life().create),
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
        return Ok(Some(rows.iter().map(Row::without_value).collect()));
    }
    let revisions: Vec<Revision> = rows.iter().map(|row| row.hit.revision).collect();
    Ok(source.records(&revisions)?.into_iter().collect())
}

/// Reads what has been published; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Reader {
    pub(super) shared: Arc<Shared>,
}

/// Why a read gave no rows.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request asks for what cannot be had.
    #[error(transparent)]
    Refused(#[from] Error),
    /// The disk failed; this node cannot go on.
    #[error(transparent)]
    Halted(#[from] Halt),
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The newest revision that may be read.
    #[must_use]
    pub fn head(&self) -> i64 {
        self.shared.head()
    }

    /// The compact revision.
    #[must_use]
    pub fn compacted(&self) -> i64 {
        self.shared.compacted()
    }

    /// How many keys the index holds.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.shared.index.read().len()
    }

    /// How many bytes of records compaction has not removed.
    #[must_use]
    pub fn history_bytes(&self) -> u64 {
        self.shared.history_bytes()
    }

    /// About how much memory the index takes, and cached records.
    #[must_use]
    pub fn memory(&self) -> (u64, u64) {
        self.shared.memory()
    }

    /// Whether a query looks at few enough keys to be answered at once. What is alive now is counted by adding up; at an
    /// older revision it has to be looked at.
    #[must_use]
    pub fn is_short(&self, query: &Query) -> bool {
        let takes_few = query.count_only || query.fetch_limit() <= CHUNK + 1;
        let counts_slowly = query.revision > 0 && (query.count_only || query.counts_rest);
        if matches!(query.interval, Interval::Key(_)) || takes_few && !counts_slowly {
            return true;
        }
        let everything = &mut |_: &[u8], _| ControlFlow::Continue(());
        self.shared.index.read().visit_piece(&query.interval, i64::MAX, CHUNK, everything).is_none()
    }

    /// Answers a query, with the head that it was answered at. This may take long.
    pub fn range(&self, query: &Query) -> Result<(Rows, i64), Failure> {
        let (view, head) = self.view(query.revision)?;
        Ok((view.range(query)?, head))
    }

    /// The same if it is short, its records are, too, and compaction does not get in between; None otherwise.
    pub fn range_at_once(&self, query: &Query) -> Result<Option<(Rows, i64)>, Failure> {
        if !self.is_short(query) {
            return Ok(None);
        }
        let head = self.head();
        let at = self.resolve(query.revision, head)?;
        Ok(self.range_unguarded(query, at)?.map(|rows| (rows, head)))
    }

    /// Answers a query as long as the meter lets it, with the head that it was answered at; None where it does not. This may
    /// take long.
    pub fn range_metered(&self, query: &Query, meter: Meter<'_>) -> Result<Option<(Rows, i64)>, Failure> {
        let (view, head) = self.view(query.revision)?;
        Ok(view.range_metered(query, meter)?.map(|rows| (rows, head)))
    }

    /// One of several short reads that share a meter, at revision `at`. None if they are not short after all, or compaction
    /// got in between.
    pub fn range_short(&self, query: &Query, at: i64, meter: Meter<'_>) -> Result<Option<Rows>, Halt> {
        let source = Metered::new(&self.shared, meter, meter::SHORT_BATCH);
        let rows = range(&source, query, at)?;
        Ok(rows.filter(|_| at >= self.compacted()))
    }

    /// Answers a query without keeping compaction away from what it sees; None if one has come. The index forgets first,
    /// and without a trace.
    pub(super) fn range_unguarded(&self, query: &Query, at: i64) -> Result<Option<Rows>, Halt> {
        self.range_short(query, at, &meter::at_most(meter::SHORT_BYTES))
    }

    /// A view at `revision` (zero or less: now) and the head at this moment. Nothing it can see is forgotten while it lives.
    pub fn view(&self, revision: i64) -> Result<(View, i64), Error> {
        // Registering first and checking afterwards leaves compaction no moment in between.
        loop {
            let head = self.head();
            let at = if revision > 0 { revision } else { head };
            let guard = self.shared.register(at);
            match self.resolve(revision, head) {
                Ok(_) if at >= self.compacted() => {
                    return Ok((View { shared: self.shared.clone(), at, _guard: guard }, head));
                }
                Ok(_) if revision <= 0 => (), // A compaction at a newer head came in between: start over from there.
                Ok(_) => return Err(Error::Compacted),
                Err(error) => return Err(error),
            }
        }
    }

    fn resolve(&self, revision: i64, head: i64) -> Result<i64, Error> {
        match revision {
            ..=0 => Ok(head),
            future if future > head => Err(Error::FutureRev),
            old if old < self.compacted() => Err(Error::Compacted),
            at => Ok(at),
        }
    }

    /// The value of a key just before a transaction, if it is still known: what watchers call `prev_kv`.
    pub fn record(&self, revision: Revision) -> Result<Option<Bytes>, Halt> {
        Ok(self.shared.records(&[revision])?.pop().flatten())
    }
}

/// The key space at one revision, for as long as this lives.
pub struct View {
    shared: Arc<Shared>,
    at: i64,
    _guard: ViewGuard,
}

impl View {
    /// The revision of the view.
    #[must_use]
    pub fn at(&self) -> i64 {
        self.at
    }

    /// Answers a query at this view's revision, whatever revision the query names.
    pub fn range(&self, query: &Query) -> Result<Rows, Halt> {
        let rows = range(self.shared.as_ref(), query, self.at)?;
        rows.ok_or_else(|| Halt::Refused(format!("a record that is visible at revision {} is missing", self.at)))
    }

    /// The same as long as the meter lets it; None where it does not.
    pub fn range_metered(&self, query: &Query, meter: Meter<'_>) -> Result<Option<Rows>, Halt> {
        let is_stopped = Cell::new(false);
        let meter = |cost| {
            let goes_on = meter(cost);
            is_stopped.set(is_stopped.get() || !goes_on);
            goes_on
        };
        match range(&Metered::new(&self.shared, &meter, meter::LONG_BATCH), query, self.at)? {
            None if !is_stopped.get() => self.range(query).map(Some), // Which says what is missing.
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
