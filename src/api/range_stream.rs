//! RangeStream: a Range in several messages.
//!
//! One that names a sort target other than the key is sorted by it, ascending, as a Range is; its rows are read at once and then
//! sent in chunks. (etcd sorts each chunk for itself and goes on behind the last key of it, so beyond ten keys some are missing
//! and some come twice.)
//!
//! The revision is fixed by the first chunk; each chunk then reads on from where the one before ended. Between chunks
//! nothing is held but one of them, and none is read before there is room for it, so that a client which stops reading holds
//! up no compaction: if one overtakes the revision, the stream ends with `Compacted`, as etcd's does. Only the last chunk has
//! a header, `more` and `count`.

use std::{cell::RefCell, collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};

use super::{
    Api,
    barrier::{self, Barrier},
    decode_streamed, refuse, validate,
};
use crate::{
    call::{Conversation, Line, Metadata, Refusal, Step},
    error::Error,
    ledger::{self, Charge},
    metrics::METRICS,
    mvcc::{
        Interval, Query, meter,
        read::{Failure, Rows},
    },
    proto::etcdserverpb::RangeRequest,
    state::txn,
};

const FIRST_CHUNK_KEYS: usize = 10;
const MAX_CHUNK_KEYS: usize = 1024;
/// A chunk that turns out to be longer is read again with fewer keys.
const MAX_CHUNK_BYTES: usize = 4 << 20;
const RANGE_RESPONSE_FIELD: u32 = 1;

enum Stage {
    /// No request yet.
    Listening,
    /// Waiting until everything that was acknowledged before is visible here.
    Waiting(Barrier, Query),
    /// Sending.
    Sending(Sending),
    /// Waiting for keys that take long.
    Reading(Barrier<Result<Option<Found>, Failure>>, Sending),
    /// Sending what had to be read whole, because it is sorted.
    Sorted(Sorted),
    /// All is said.
    Over,
}

struct Sending {
    query: Query,
    /// The revision that is read and the head at the first chunk.
    at: i64,
    head: i64,
    /// What the caller's limit still allows.
    left: usize,
    sent: usize,
    chunk_keys: usize,
}

/// What was read.
struct Found {
    rows: Rows,
    /// How many keys were wanted.
    wanted: usize,
    /// What it is counted for until it is passed on.
    _charge: Option<Charge>,
}

/// Rows that were read whole.
struct Sorted {
    rest: std::vec::IntoIter<Bytes>,
    /// How long they are together.
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
        Box::new(RangeStream { api: self.clone(), stage: Stage::Listening, outbox: VecDeque::new() })
    }
}

impl Conversation for RangeStream {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        loop {
            while line.has_room() {
                let Some(message) = self.outbox.pop_front() else { break };
                line.send(message);
            }
            if !self.outbox.is_empty() || !self.may_read(line) {
                return Step::Wait;
            }
            match self.advance(line) {
                Ok(true) => (),
                Ok(false) => return Step::Wait,
                Err(end) => return Step::End(end),
            }
        }
    }

    fn held(&self) -> usize {
        let sorted = if let Stage::Sorted(sorted) = &self.stage { sorted.bytes } else { 0 };
        sorted + self.outbox.iter().map(Bytes::len).sum::<usize>()
    }
}

impl RangeStream {
    /// Whether a chunk, if that is what comes next, can be sent when it is there.
    fn may_read(&self, line: &dyn Line) -> bool {
        !matches!(self.stage, Stage::Sending(_) | Stage::Sorted(_)) || line.has_room()
    }

    /// Goes one stage further, or one chunk. False: nothing to do until something happens.
    fn advance(&mut self, line: &mut dyn Line) -> Result<bool, Result<(), Refusal>> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Listening => {
                let Some(message) = line.receive() else {
                    self.stage = Stage::Listening;
                    return Ok(false);
                };
                self.begin(message, line).map_err(Err)?;
            }
            Stage::Waiting(barrier, query) => match barrier.outcome() {
                Some(Ok(())) => self.stage = Stage::Sending(self.start(query).map_err(|error| Err(error.into()))?),
                Some(Err(error)) => return Err(Err(error.into())),
                None => {
                    self.stage = Stage::Waiting(barrier, query);
                    return Ok(false);
                }
            },
            Stage::Sending(sending) => self.stage = self.chunk(sending, line).map_err(Err)?,
            Stage::Reading(barrier, sending) => match barrier.outcome() {
                Some(Ok(found)) => {
                    let found = found.map_err(|failure| Err(refuse(failure)))?;
                    let found = found.ok_or_else(|| Err(ledger::unread()))?;
                    self.stage = self.found(sending, found, line).map_err(Err)?;
                }
                Some(Err(error)) => return Err(Err(error.into())),
                None => {
                    self.stage = Stage::Reading(barrier, sending);
                    return Ok(false);
                }
            },
            Stage::Sorted(sorted) => self.stage = self.pass_on_sorted(sorted),
            Stage::Over => return Err(Ok(())),
        }
        Ok(true)
    }

    fn begin(&mut self, message: Bytes, line: &dyn Line) -> Result<(), Refusal> {
        let request: RangeRequest = decode_streamed(message)?;
        // A copy: the stream may wait, and shall not keep the buffer in which its request came.
        let request: RangeRequest = decode_streamed(request.encode_to_vec().into())?;
        validate::range_stream(&request)?;
        METRICS.ranges.inc();
        let serializable = request.serializable;
        let query = txn::query(RangeRequest { sort_order: 0, ..request });
        if serializable {
            self.stage = Stage::Sending(self.start(query)?);
            return Ok(());
        }
        let (barrier, opener) = barrier::erect(line.waker());
        self.stage = Stage::Waiting(barrier, query);
        self.api.node.read_barrier(opener);
        Ok(())
    }

    fn start(&self, query: Query) -> Result<Sending, Error> {
        let (view, head) = self.api.readers().keys.view(query.revision)?;
        let left = if query.limit > 0 { usize::try_from(query.limit).unwrap_or(usize::MAX) } else { usize::MAX };
        Ok(Sending { query, at: view.at(), head, left, sent: 0, chunk_keys: FIRST_CHUNK_KEYS })
    }

    /// Reads a chunk: at once, or in the read pool.
    fn chunk(&mut self, sending: Sending, line: &dyn Line) -> Result<Stage, Refusal> {
        let wanted = sending.chunk_keys.min(sending.left).min(MAX_CHUNK_KEYS);
        let chunk = sending.chunk(wanted);
        let found = self.api.readers().keys.range_at_once(&chunk).map_err(refuse)?;
        if let Some((rows, _)) = found {
            return self.found(sending, Found { rows, wanted, _charge: None }, line);
        }
        let (barrier, opener) = barrier::erect(line.waker());
        let (api, left) = (self.api.clone(), sending.left);
        self.api.pool.run(move || {
            let found =
                if chunk.is_sorted() { read_whole(&api, &chunk) } else { read_chunk(&api, chunk, wanted, left) };
            opener(Ok(found));
        });
        Ok(Stage::Reading(barrier, sending))
    }

    fn found(&mut self, sending: Sending, found: Found, line: &dyn Line) -> Result<Stage, Refusal> {
        let rows = found.rows;
        if !sending.query.is_sorted() {
            return Ok(self.pass_on(sending, found.wanted, rows));
        }
        let bytes = rows.records.iter().map(Bytes::len).sum();
        if bytes > line.spare() {
            return Err(ledger::unread());
        }
        let (rest, more, count) = (rows.records.into_iter(), rows.more, rows.count);
        Ok(Stage::Sorted(Sorted { rest, bytes, more, count, head: sending.head, chunk_keys: FIRST_CHUNK_KEYS }))
    }

    fn pass_on_sorted(&mut self, mut sorted: Sorted) -> Stage {
        let records: Vec<Bytes> = sorted.rest.by_ref().take(sorted.chunk_keys).collect();
        sorted.bytes -= records.iter().map(Bytes::len).sum::<usize>();
        let mut rows = Rows { records, ..Rows::default() };
        if sorted.rest.len() == 0 {
            (rows.more, rows.count) = (sorted.more, sorted.count);
            self.outbox.push_back(wrap(&self.api.header.rows(&rows, sorted.head)));
            return Stage::Over;
        }
        let mut out = Vec::with_capacity(rows.encoded_len());
        rows.encode_records(&mut out);
        sorted.chunk_keys = next_chunk(sorted.chunk_keys, out.len(), self.api.limits.max_request_bytes);
        self.outbox.push_back(wrap(&out));
        Stage::Sorted(sorted)
    }

    fn pass_on(&mut self, mut sending: Sending, wanted: usize, mut rows: Rows) -> Stage {
        let more_to_send = rows.more && wanted < sending.left;
        sending.sent += rows.records.len();
        if more_to_send {
            let mut out = Vec::with_capacity(rows.encoded_len());
            rows.encode_records(&mut out);
            sending.chunk_keys = next_chunk(sending.chunk_keys, out.len(), self.api.limits.max_request_bytes);
            sending.left -= rows.records.len();
            let last = key_of(rows.records.last().expect("a chunk with more behind it is not empty"));
            sending.query.interval = after(&sending.query.interval, &last);
            self.outbox.push_back(wrap(&out));
            return Stage::Sending(sending);
        }
        if !sending.query.count_only {
            // What is counted is what lies ahead of this chunk; the chunks before it were counted as they were sent.
            rows.count += i64::try_from(sending.sent - rows.records.len()).expect("keys fit in memory");
        }
        self.outbox.push_back(wrap(&self.api.header.rows(&rows, sending.head)));
        Stage::Over
    }
}

impl Sending {
    /// Asks for the next chunk. What is sorted has to be read whole.
    fn chunk(&self, wanted: usize) -> Query {
        let mut query = Query { revision: self.at, ..self.query.clone() };
        if !query.is_sorted() {
            limit(&mut query, wanted, self.left);
        }
        query
    }
}

/// Makes a query one for the first `wanted` keys, of `left` that the caller may still have.
fn limit(query: &mut Query, wanted: usize, left: usize) {
    query.limit = i64::try_from(wanted).expect("a chunk is small");
    query.counts_rest = wanted == left; // Only a limit of the caller's leaves a rest that it hears of.
}

/// Reads a chunk with fewer keys than wanted where these would be too long together.
fn read_chunk(api: &Api, mut chunk: Query, mut wanted: usize, left: usize) -> Result<Option<Found>, Failure> {
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

/// Reads everything, as long as the ledger has room for it.
fn read_whole(api: &Api, query: &Query) -> Result<Option<Found>, Failure> {
    let charge = RefCell::new(api.ledger.charge(0));
    let found = api.readers().keys.range_metered(query, &|cost| charge.borrow_mut().try_grow(cost))?;
    let charge = Some(charge.into_inner());
    Ok(found.map(|(rows, _)| Found { rows, wanted: usize::MAX, _charge: charge }))
}

/// How many keys follow a chunk of so many: more after a small one, fewer after a large one.
fn next_chunk(keys: usize, bytes: usize, target: usize) -> usize {
    if bytes < target / 2 {
        keys.saturating_mul(2).min(MAX_CHUNK_KEYS)
    } else if bytes > target.saturating_mul(2) {
        (keys / 2).max(1)
    } else {
        keys
    }
}

/// The rest of an interval behind a key in it.
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
