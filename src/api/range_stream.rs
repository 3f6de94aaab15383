//! RangeStream: a Range in several messages.
//!
//! The first chunk fixes the revision. Each further chunk is read from where the previous one ended, and only when it can be
//! sent. Between chunks at most one of them is held, and no view, so a client that stops reading does not delay compaction: if
//! the revision is compacted meanwhile, the stream ends with `Compacted`, as etcd's does. Only the last chunk has a header,
//! `more` and `count`.
//!
//! A request that names a sort target other than the key is sorted by it, ascending, as a Range is: its rows are read together
//! and then sent in chunks. (etcd sorts each chunk by itself and continues after the chunk's last key, so that beyond ten keys
//! some are missing and some are sent twice.)

use std::{cell::RefCell, collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};

use super::{
    Api,
    barrier::{self, OneshotReceiver},
    decode_streamed, refuse, validate,
};
use crate::{
    call::{CallError, Conversation, Metadata, Step, StreamIo},
    error::Error,
    ledger::{self, Charge},
    metrics::METRICS,
    mvcc::{
        Interval, Query, meter,
        read::{ReadError, Rows},
    },
    proto::etcdserverpb::RangeRequest,
    state::txn,
};

const FIRST_CHUNK_KEYS: usize = 10;
const MAX_CHUNK_KEYS: usize = 1024;
/// A chunk that turns out to be larger is read again with fewer keys.
const MAX_CHUNK_BYTES: usize = 4 << 20;
const RANGE_RESPONSE_FIELD: u32 = 1;

enum Stage {
    /// No request yet.
    AwaitingRequest,
    /// Waiting until all writes that were acknowledged before are visible on this member.
    AwaitingReadBarrier(OneshotReceiver, Query),
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

struct RangeStream {
    api: Arc<Api>,
    stage: Stage,
    outbox: VecDeque<Bytes>,
}

impl Api {
    /// `KV/RangeStream`.
    pub fn range_stream(self: &Arc<Self>, _metadata: Metadata) -> Box<dyn Conversation> {
        Box::new(RangeStream { api: self.clone(), stage: Stage::AwaitingRequest, outbox: VecDeque::new() })
    }
}

impl Conversation for RangeStream {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        loop {
            while line.can_send() {
                let Some(message) = self.outbox.pop_front() else { break };
                line.send(message);
            }
            if !self.outbox.is_empty() || !self.can_advance(line) {
                return Step::Wait;
            }
            match self.advance(line) {
                Ok(true) => (),
                Ok(false) => return Step::Wait,
                Err(end) => return Step::End(end),
            }
        }
    }

    fn held_bytes(&self) -> usize {
        let sorted = if let Stage::Sorted(sorted) = &self.stage { sorted.bytes } else { 0 };
        sorted + self.outbox.iter().map(Bytes::len).sum::<usize>()
    }
}

impl RangeStream {
    /// False if the next thing is a chunk and the line has no capacity for it.
    fn can_advance(&self, line: &dyn StreamIo) -> bool {
        !matches!(self.stage, Stage::Sending(_) | Stage::Sorted(_)) || line.can_send()
    }

    /// Advances by one stage or one chunk. Returns false if there is nothing to do until the conversation is woken.
    fn advance(&mut self, line: &mut dyn StreamIo) -> Result<bool, Result<(), CallError>> {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::AwaitingRequest => {
                let Some(message) = line.receive() else {
                    self.stage = Stage::AwaitingRequest;
                    return Ok(false);
                };
                self.begin(message, line).map_err(Err)?;
            }
            Stage::AwaitingReadBarrier(receiver, query) => match receiver.outcome() {
                Some(Ok(())) => self.stage = Stage::Sending(self.start(query).map_err(|error| Err(error.into()))?),
                Some(Err(error)) => return Err(Err(error.into())),
                None => {
                    self.stage = Stage::AwaitingReadBarrier(receiver, query);
                    return Ok(false);
                }
            },
            Stage::Sending(sending) => self.stage = self.chunk(sending, line).map_err(Err)?,
            Stage::Reading(receiver, sending) => match receiver.outcome() {
                Some(Ok(found)) => {
                    let found = found.map_err(|failure| Err(refuse(failure)))?;
                    let found = found.ok_or_else(|| Err(ledger::response_over_limit()))?;
                    self.stage = self.process_found(sending, found, line).map_err(Err)?;
                }
                Some(Err(error)) => return Err(Err(error.into())),
                None => {
                    self.stage = Stage::Reading(receiver, sending);
                    return Ok(false);
                }
            },
            Stage::Sorted(sorted) => self.stage = self.send_sorted_chunk(sorted),
            Stage::Done => return Err(Ok(())),
        }
        Ok(true)
    }

    fn begin(&mut self, message: Bytes, line: &dyn StreamIo) -> Result<(), CallError> {
        let request: RangeRequest = decode_streamed(message)?;
        // A copy: the stream may wait, and must not keep the buffer in which its request was received.
        let request: RangeRequest = decode_streamed(request.encode_to_vec().into())?;
        validate::range_stream(&request)?;
        METRICS.ranges.inc();
        let serializable = request.serializable;
        let query = txn::query(RangeRequest { sort_order: 0, ..request });
        if serializable {
            self.stage = Stage::Sending(self.start(query)?);
            return Ok(());
        }
        let (receiver, callback) = barrier::channel(line.waker());
        self.stage = Stage::AwaitingReadBarrier(receiver, query);
        self.api.node.read_barrier(callback);
        Ok(())
    }

    fn start(&self, query: Query) -> Result<Sending, Error> {
        let (view, head) = self.api.readers().keys.view(query.revision)?;
        let left = if query.limit > 0 { usize::try_from(query.limit).unwrap_or(usize::MAX) } else { usize::MAX };
        Ok(Sending { query, at: view.at(), head, left, sent: 0, chunk_keys: FIRST_CHUNK_KEYS })
    }

    /// Reads a chunk, inline or on the read pool.
    fn chunk(&mut self, sending: Sending, line: &dyn StreamIo) -> Result<Stage, CallError> {
        let wanted = sending.chunk_keys.min(sending.left).min(MAX_CHUNK_KEYS);
        let chunk = sending.chunk(wanted);
        let found = self.api.readers().keys.range_if_short(&chunk).map_err(refuse)?;
        if let Some((rows, _)) = found {
            return self.process_found(sending, Found { rows, wanted, _charge: None }, line);
        }
        let (receiver, callback) = barrier::channel(line.waker());
        let (api, left) = (self.api.clone(), sending.left);
        self.api.pool.run(move || {
            let found =
                if chunk.is_sorted() { read_whole(&api, &chunk) } else { read_chunk(&api, chunk, wanted, left) };
            callback(Ok(found));
        });
        Ok(Stage::Reading(receiver, sending))
    }

    fn process_found(&mut self, sending: Sending, found: Found, line: &dyn StreamIo) -> Result<Stage, CallError> {
        let rows = found.rows;
        if !sending.query.is_sorted() {
            return Ok(self.send_chunk(sending, found.wanted, rows));
        }
        let bytes = rows.records.iter().map(Bytes::len).sum();
        if bytes > line.spare_bytes() {
            return Err(ledger::response_over_limit());
        }
        let (rest, more, count) = (rows.records.into_iter(), rows.more, rows.count);
        Ok(Stage::Sorted(Sorted { rest, bytes, more, count, head: sending.head, chunk_keys: FIRST_CHUNK_KEYS }))
    }

    fn send_sorted_chunk(&mut self, mut sorted: Sorted) -> Stage {
        let records: Vec<Bytes> = sorted.rest.by_ref().take(sorted.chunk_keys).collect();
        sorted.bytes -= records.iter().map(Bytes::len).sum::<usize>();
        let mut rows = Rows { records, ..Rows::default() };
        if sorted.rest.len() == 0 {
            (rows.more, rows.count) = (sorted.more, sorted.count);
            self.outbox.push_back(wrap(&self.api.header.rows(&rows, sorted.head)));
            return Stage::Done;
        }
        let mut out = Vec::with_capacity(rows.encoded_len());
        rows.encode_records(&mut out);
        sorted.chunk_keys = next_chunk(sorted.chunk_keys, out.len(), self.api.limits.max_request_bytes);
        self.outbox.push_back(wrap(&out));
        Stage::Sorted(sorted)
    }

    fn send_chunk(&mut self, mut sending: Sending, wanted: usize, mut rows: Rows) -> Stage {
        let more_to_send = rows.more && wanted < sending.left;
        sending.sent += rows.records.len();
        if more_to_send {
            let mut out = Vec::with_capacity(rows.encoded_len());
            rows.encode_records(&mut out);
            sending.chunk_keys = next_chunk(sending.chunk_keys, out.len(), self.api.limits.max_request_bytes);
            sending.left -= rows.records.len();
            let last = key_of(rows.records.last().expect("a chunk that is followed by more is not empty"));
            sending.query.interval = after(&sending.query.interval, &last);
            self.outbox.push_back(wrap(&out));
            return Stage::Sending(sending);
        }
        if !sending.query.count_only {
            // The count of this read begins with this chunk; add the keys of the previous chunks.
            rows.count += i64::try_from(sending.sent - rows.records.len()).expect("keys fit in memory");
        }
        self.outbox.push_back(wrap(&self.api.header.rows(&rows, sending.head)));
        Stage::Done
    }
}

impl Sending {
    /// The query for the next chunk. Sorted rows have to be read together.
    fn chunk(&self, wanted: usize) -> Query {
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
fn read_chunk(api: &Api, mut chunk: Query, mut wanted: usize, left: usize) -> Result<Option<Found>, ReadError> {
    let present = api.readers();
    let keys = &present.keys;
    let rows = loop {
        if wanted == 1 {
            break keys.range(&chunk)?.0;
        }
        if let Some((rows, _)) = keys.range_metered(&chunk, &meter::at_most(MAX_CHUNK_BYTES))? {
            break rows;
        }
        wanted = (wanted / 4).max(1);
        limit(&mut chunk, wanted, left);
    };
    Ok(Some(Found { rows, wanted, _charge: None }))
}

/// Reads all rows. The result is None if the ledger's limit is reached.
fn read_whole(api: &Api, query: &Query) -> Result<Option<Found>, ReadError> {
    let charge = RefCell::new(api.ledger.charge(0));
    let found = api.readers().keys.range_metered(query, &|cost| charge.borrow_mut().try_grow(cost))?;
    let charge = Some(charge.into_inner());
    Ok(found.map(|(rows, _)| Found { rows, wanted: usize::MAX, _charge: charge }))
}

/// The number of keys of the next chunk: more after a small chunk, fewer after a large one.
fn next_chunk(keys: usize, bytes: usize, target: usize) -> usize {
    if bytes < target / 2 {
        keys.saturating_mul(2).min(MAX_CHUNK_KEYS)
    } else if bytes > target.saturating_mul(2) {
        (keys / 2).max(1)
    } else {
        keys
    }
}

/// The rest of an interval after a key in it.
fn after(interval: &Interval, key: &[u8]) -> Interval {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.extend_from_slice(&[0]);
    interval.starting_at(next.freeze())
}

fn key_of(record: &Bytes) -> Bytes {
    let record = crate::proto::mvccpb::KeyValue::decode(record.clone());
    record.expect("records are read back as they were written").key
}

/// A `RangeStreamResponse` around an encoded `RangeResponse`.
fn wrap(response: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(response.len() + 8);
    encode_key(RANGE_RESPONSE_FIELD, WireType::LengthDelimited, &mut out);
    encode_varint(response.len() as u64, &mut out);
    out.extend_from_slice(response);
    out.into()
}
