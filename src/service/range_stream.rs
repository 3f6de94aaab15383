//! RangeStream: a Range in several chunks.
//!
//! The first chunk fixes the revision. Each further chunk is read from where the previous one ended, and only when it can be
//! sent. Between chunks at most one of them is held, and no view, so a client that stops reading does not delay compaction: if
//! the revision is compacted meanwhile, the stream ends with `Compacted`, as etcd's does. Only the last chunk has a revision,
//! `more` and `count`.
//!
//! A request that names a sort target other than the key is sorted by it, ascending, as a Range is: its rows are read together
//! and then sent in chunks. (etcd sorts each chunk by itself and continues after the chunk's last key, so that beyond ten keys
//! some are missing and some are sent twice.)

use std::{
    cell::RefCell,
    sync::Arc,
    task::{Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use prost::Message;

use super::{
    Caller, Operation, Service,
    auth::audit,
    read_error,
    reply::{self, OneshotReceiver},
    validate,
};
use crate::{
    error::Error,
    metrics::METRICS,
    mvcc::{
        Interval, Query, meter,
        read::{ReadError, Rows},
    },
    proto::{etcdserverpb::RangeRequest, mvccpb::KeyValue},
    state::{permission::Access, txn},
};
use http2::ledger::Charge;

const FIRST_CHUNK_KEYS: usize = 10;
const MAX_CHUNK_KEYS: usize = 1024;
/// A chunk that turns out to be larger is read again with fewer keys.
const MAX_CHUNK_BYTES: usize = 4 << 20;

/// A part of the rows.
#[derive(Debug)]
pub struct Chunk {
    pub rows: Rows,
    /// In the last chunk: the newest revision when the first one was read.
    pub head: Option<i64>,
}

/// A RangeStream that is under way.
pub struct RangeStream {
    service: Arc<Service>,
    caller: Caller,
    /// The range, as it was sent.
    range: (Bytes, Bytes),
    stage: Stage,
}

enum Stage {
    /// Waiting until all writes that were acknowledged before are visible on this member.
    AwaitingReadBarrier(OneshotReceiver, Query),
    /// The next chunk can be read.
    Sending(Sending),
    /// Waiting for a chunk from the read pool.
    Reading(OneshotReceiver<Result<Option<Found>, ReadError>>, Sending),
    /// Sending rows that were read together, because they are sorted.
    Sorted(Sorted),
    /// Everything is sent.
    Done,
}

struct Sending {
    query: Query,
    /// The revision that is read, and the head at the first chunk.
    at: i64,
    head: i64,
    /// How many more keys the caller's limit allows.
    left: usize,
    sent: usize,
    chunk_keys: usize,
}

/// The result of a read.
struct Found {
    rows: Rows,
    /// How many keys were asked for.
    wanted: usize,
    /// Counts the rows in the ledger until they are passed on.
    _charge: Option<Charge>,
}

/// Sorted rows that are not sent yet.
struct Sorted {
    rest: std::vec::IntoIter<Bytes>,
    /// Their total size.
    bytes: usize,
    more: bool,
    count: i64,
    head: i64,
    chunk_keys: usize,
}

impl Service {
    /// Begins a RangeStream, in a stream that was admitted when it was opened.
    pub fn range_stream(
        self: &Arc<Self>,
        caller: &Caller,
        request: &RangeRequest,
        waker: &Waker,
    ) -> Result<RangeStream, Error> {
        validate::range_stream(request)?;
        METRICS.ranges.inc();
        // A copy: the stream may wait, and must not keep the buffer in which its request was received.
        let copy = RangeRequest::decode(Bytes::from(request.encode_to_vec()));
        let copy = copy.expect("it was just encoded");
        let range = (copy.key.clone(), copy.range_end.clone());
        let query = txn::query(RangeRequest { sort_order: 0, ..copy });
        let (service, caller) = (self.clone(), caller.clone());
        let mut stream = RangeStream { service, caller, range, stage: Stage::Done };
        stream.stage = if request.serializable && !self.must_await_token(&stream.caller) {
            stream.check_permission()?;
            Stage::Sending(self.begin_sending(query)?)
        } else {
            let (receiver, callback) = reply::channel(waker);
            self.node().read_barrier(callback);
            Stage::AwaitingReadBarrier(receiver, query)
        };
        Ok(stream)
    }

    fn begin_sending(&self, query: Query) -> Result<Sending, Error> {
        let (view, head) = self.readers().keys.view(query.revision)?;
        let left = if query.limit > 0 { usize::try_from(query.limit).unwrap_or(usize::MAX) } else { usize::MAX };
        Ok(Sending { query, at: view.at(), head, left, sent: 0, chunk_keys: FIRST_CHUNK_KEYS })
    }
}

impl RangeStream {
    /// Whether the caller may read the range now. Users may change while a stream is under way.
    fn check_permission(&self) -> Result<(), Error> {
        let (key, range_end) = &self.range;
        let checked = self.service.authorize_read(&self.caller, |check| check.keys(Access::Read, key, range_end));
        checked.map(drop).inspect_err(|error| {
            let identity = self.service.identify(&self.caller).unwrap_or_default();
            audit::denied(&self.caller, &identity, Operation::RangeStream.name(), error);
        })
    }

    /// The next chunk, or None after the last one. To be called when the chunk can be sent, or while [`Self::is_reading`]. `spare`
    /// is how many more bytes may be held for the client; `waker` is woken when there is something to do again.
    pub fn poll_next(&mut self, spare: usize, waker: &Waker) -> Poll<Result<Option<Chunk>, Error>> {
        loop {
            let (stage, chunk) = match std::mem::replace(&mut self.stage, Stage::Done) {
                Stage::AwaitingReadBarrier(receiver, query) => {
                    let Some(barrier) = receiver.outcome() else {
                        self.stage = Stage::AwaitingReadBarrier(receiver, query);
                        return Poll::Pending;
                    };
                    let permitted = barrier.and_then(|()| self.check_permission());
                    match permitted.and_then(|()| self.service.begin_sending(query)) {
                        Ok(sending) => (Stage::Sending(sending), None),
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                Stage::Sending(sending) => {
                    match self.check_permission().and_then(|()| self.read(sending, spare, waker)) {
                        Ok(next) => next,
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                Stage::Reading(receiver, sending) => {
                    let Some(outcome) = receiver.outcome() else {
                        self.stage = Stage::Reading(receiver, sending);
                        return Poll::Pending;
                    };
                    let found = outcome.and_then(|found| found.map_err(read_error));
                    let found = found.and_then(|found| found.ok_or(Error::TooManyBytesUnread));
                    match found.and_then(|found| self.process_found(sending, found, spare)) {
                        Ok(next) => next,
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                Stage::Sorted(sorted) => self.next_sorted(sorted),
                Stage::Done => return Poll::Ready(Ok(None)),
            };
            self.stage = stage;
            if let Some(chunk) = chunk {
                return Poll::Ready(Ok(Some(chunk)));
            }
        }
    }

    /// Whether a chunk is being read on the read pool, and has to be taken in when it is there.
    pub fn is_reading(&self) -> bool {
        matches!(self.stage, Stage::Reading(..))
    }

    /// The size of the rows that are held and not sent yet.
    #[must_use]
    pub fn held(&self) -> usize {
        if let Stage::Sorted(sorted) = &self.stage { sorted.bytes } else { 0 }
    }

    /// Reads a chunk, inline or on the read pool.
    fn read(&mut self, sending: Sending, spare: usize, waker: &Waker) -> Result<(Stage, Option<Chunk>), Error> {
        let wanted = sending.chunk_keys.min(sending.left).min(MAX_CHUNK_KEYS);
        let query = sending.chunk_query(wanted);
        let found = self.service.readers().keys.range_if_short(&query).map_err(read_error)?;
        if let Some((rows, _)) = found {
            return self.process_found(sending, Found { rows, wanted, _charge: None }, spare);
        }
        let (receiver, callback) = reply::channel(waker);
        let (service, left) = (self.service.clone(), sending.left);
        self.service.run_long_read(&self.caller, move || {
            callback(Ok(if query.is_sorted() {
                read_whole(&service, &query)
            } else {
                read_chunk(&service, query, wanted, left)
            }));
        });
        Ok((Stage::Reading(receiver, sending), None))
    }

    fn process_found(&self, sending: Sending, found: Found, spare: usize) -> Result<(Stage, Option<Chunk>), Error> {
        let rows = found.rows;
        if !sending.query.is_sorted() {
            return Ok(self.next_chunk(sending, found.wanted, rows));
        }
        let bytes = rows.records.iter().map(Bytes::len).sum();
        if bytes > spare {
            return Err(Error::TooManyBytesUnread);
        }
        let (rest, more, count) = (rows.records.into_iter(), rows.more, rows.count);
        let sorted = Sorted { rest, bytes, more, count, head: sending.head, chunk_keys: FIRST_CHUNK_KEYS };
        Ok((Stage::Sorted(sorted), None))
    }

    fn next_sorted(&self, mut sorted: Sorted) -> (Stage, Option<Chunk>) {
        let records: Vec<Bytes> = sorted.rest.by_ref().take(sorted.chunk_keys).collect();
        sorted.bytes -= records.iter().map(Bytes::len).sum::<usize>();
        let mut rows = Rows { records, ..Rows::default() };
        if sorted.rest.len() == 0 {
            (rows.more, rows.count) = (sorted.more, sorted.count);
            return (Stage::Done, Some(Chunk { rows, head: Some(sorted.head) }));
        }
        sorted.chunk_keys = self.next_chunk_keys(sorted.chunk_keys, &rows);
        (Stage::Sorted(sorted), Some(Chunk { rows, head: None }))
    }

    fn next_chunk(&self, mut sending: Sending, wanted: usize, mut rows: Rows) -> (Stage, Option<Chunk>) {
        let more_to_send = rows.more && wanted < sending.left;
        sending.sent += rows.records.len();
        if more_to_send {
            sending.chunk_keys = self.next_chunk_keys(sending.chunk_keys, &rows);
            sending.left -= rows.records.len();
            let last = key_of(rows.records.last().expect("a chunk that is followed by more is not empty"));
            sending.query.interval = after(&sending.query.interval, &last);
            rows.more = false;
            return (Stage::Sending(sending), Some(Chunk { rows, head: None }));
        }
        if !sending.query.count_only {
            // The count of this read begins with this chunk; add the keys of the previous chunks.
            rows.count += i64::try_from(sending.sent - rows.records.len()).expect("keys fit in memory");
        }
        (Stage::Done, Some(Chunk { rows, head: Some(sending.head) }))
    }

    /// The number of keys of the next chunk: more after a small chunk, fewer after a large one.
    fn next_chunk_keys(&self, keys: usize, rows: &Rows) -> usize {
        let (bytes, target) = (rows.encoded_len(), self.service.limits.max_request_bytes);
        if bytes < target / 2 {
            keys.saturating_mul(2).min(MAX_CHUNK_KEYS)
        } else if bytes > target.saturating_mul(2) {
            (keys / 2).max(1)
        } else {
            keys
        }
    }
}

impl Sending {
    /// The query for the next chunk. Sorted rows have to be read together.
    fn chunk_query(&self, wanted: usize) -> Query {
        let mut query = Query { revision: self.at, ..self.query.clone() };
        if !query.is_sorted() {
            limit(&mut query, wanted, self.left);
        }
        query
    }
}

/// Limits a query to the first `wanted` keys, of `left` that the caller's limit still allows.
fn limit(query: &mut Query, wanted: usize, left: usize) {
    query.limit = i64::try_from(wanted).expect("a chunk is small");
    query.counts_rest = wanted == left; // Only the caller's own limit leaves a rest to be reported.
}

/// Reads a chunk, with fewer keys than wanted if the chunk would be too large.
fn read_chunk(service: &Service, mut query: Query, mut wanted: usize, left: usize) -> Result<Option<Found>, ReadError> {
    let present = service.readers();
    let keys = &present.keys;
    let rows = loop {
        if wanted == 1 {
            break keys.range(&query)?.0;
        }
        if let Some((rows, _)) = keys.range_metered(&query, &meter::at_most(MAX_CHUNK_BYTES))? {
            break rows;
        }
        wanted = (wanted / 4).max(1);
        limit(&mut query, wanted, left);
    };
    Ok(Some(Found { rows, wanted, _charge: None }))
}

/// Reads all rows. The result is None if the ledger's limit is reached.
fn read_whole(service: &Service, query: &Query) -> Result<Option<Found>, ReadError> {
    let charge = RefCell::new(service.ledger.charge(0));
    let found = service.readers().keys.range_metered(query, &|cost| charge.borrow_mut().try_grow(cost))?;
    let charge = Some(charge.into_inner());
    Ok(found.map(|(rows, _)| Found { rows, wanted: usize::MAX, _charge: charge }))
}

/// The rest of an interval after a key in it.
fn after(interval: &Interval, key: &[u8]) -> Interval {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.extend_from_slice(&[0]);
    interval.starting_at(next.freeze())
}

fn key_of(record: &Bytes) -> Bytes {
    KeyValue::decode(record.clone()).expect("records are read back as they were written").key
}
