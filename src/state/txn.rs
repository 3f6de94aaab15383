//! Transactions: comparisons decide which of two branches is executed.
//!
//! There are three passes. First all comparisons are evaluated on the state *before* the transaction, including those of
//! nested transactions in the branches taken: this decides the path. Then every operation on the path is checked against that
//! state; the first refusal is the outcome. Only then are the operations executed, in order; each sees the changes of those
//! before it.

use std::{cell::Cell, cmp::Ordering, ops::ControlFlow};

use prost::encoding::{WireType, encode_key, encode_varint};

use super::{Machine, Response, apply::Outcome};
use crate::{
    error::{Error, Halt},
    mvcc::{
        Hit, Interval, KeyMetadata, Query, Reader,
        meter::{self, Meter},
        read::{self, ReadError, Rows, View},
        source::Source,
    },
    proto::etcdserverpb::{
        Compare, RangeRequest, RequestOp, ResponseHeader, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op,
    },
};

/// The branch that a transaction takes, and the paths of the nested transactions in that branch, in order.
struct TxnPath {
    succeeded: bool,
    nested: Vec<TxnPath>,
}

fn branch<'a>(txn: &'a TxnRequest, path: &TxnPath) -> &'a [RequestOp] {
    if path.succeeded { &txn.success } else { &txn.failure }
}

impl Machine {
    pub(super) fn txn(&mut self, txn: TxnRequest) -> Outcome<Response> {
        let path = self.decide_path(&txn)?;
        if let Err(error) = self.check_ops(&txn, &path) {
            return Ok(Err(error));
        }
        let before = self.counts.operations();
        let body = self.execute_ops(txn, path)?;
        self.counts.add_txn_since(before);
        Ok(Ok(Response { revision: self.store.end_transaction(), body }))
    }

    fn decide_path(&self, txn: &TxnRequest) -> Result<TxnPath, Halt> {
        let mut path = TxnPath { succeeded: true, nested: Vec::new() };
        for compare in &txn.compare {
            if !holds(&self.store, compare, self.store.head())? {
                path.succeeded = false;
                break;
            }
        }
        for op in branch(txn, &path) {
            if let Some(request_op::Request::RequestTxn(nested)) = &op.request {
                path.nested.push(self.decide_path(nested)?);
            }
        }
        Ok(path)
    }

    fn check_ops(&self, txn: &TxnRequest, path: &TxnPath) -> Result<(), Error> {
        let mut nested = path.nested.iter();
        for op in branch(txn, path) {
            match &op.request {
                Some(request_op::Request::RequestRange(range)) => {
                    check_revision(range.revision, self.store.head(), self.store.compacted())?;
                }
                Some(request_op::Request::RequestPut(put)) => self.check_put(put)?,
                Some(request_op::Request::RequestDeleteRange(_)) => (),
                Some(request_op::Request::RequestTxn(txn)) => {
                    let path = nested.next().expect("a path was decided for each nested transaction");
                    self.check_ops(txn, path)?;
                }
                None => return Err(Error::KeyNotFound),
            }
        }
        Ok(())
    }

    fn execute_ops(&mut self, txn: TxnRequest, path: TxnPath) -> Result<Vec<u8>, Halt> {
        let mut body = Vec::new();
        if path.succeeded {
            prost::encoding::bool::encode(SUCCEEDED_FIELD, &true, &mut body);
        }
        let mut nested = path.nested.into_iter();
        let ops = if path.succeeded { txn.success } else { txn.failure };
        for op in ops {
            let (field, response) = match op.request.expect("operations without a request were refused") {
                request_op::Request::RequestRange(range) => (RANGE_FIELD, self.execute_range(range)?),
                request_op::Request::RequestPut(put) => (PUT_FIELD, self.execute_put(put)?),
                request_op::Request::RequestDeleteRange(delete) => (DELETE_FIELD, self.execute_delete_range(&delete)?),
                request_op::Request::RequestTxn(txn) => {
                    let path = nested.next().expect("a path was decided for each nested transaction");
                    (TXN_FIELD, self.execute_ops(txn, path)?)
                }
            };
            // A nested transaction's header is there, but empty.
            let revision = if field == TXN_FIELD { 0 } else { self.store.head() + i64::from(self.store.has_changes()) };
            encode_response(&mut body, field, revision, &response);
        }
        Ok(body)
    }

    fn execute_range(&mut self, range: RangeRequest) -> Result<Vec<u8>, Halt> {
        self.counts.ranges += 1;
        // The changes of this transaction so far are visible, unless the range requests an older revision.
        let at = if range.revision > 0 { range.revision } else { i64::MAX };
        let rows = read::range(&self.store, &query(range), at)?;
        let rows = rows.ok_or_else(|| {
            Halt::InvalidData("the database is corrupt: a record read by a transaction is missing".into())
        })?;
        let mut body = Vec::with_capacity(rows.encoded_len());
        rows.encode(&mut body);
        Ok(body)
    }
}

const SUCCEEDED_FIELD: u32 = 2;
const RESPONSES_FIELD: u32 = 3;
const RANGE_FIELD: u32 = 1;
const PUT_FIELD: u32 = 2;
const DELETE_FIELD: u32 = 3;
const TXN_FIELD: u32 = 4;
const HEADER_FIELD: u32 = 1;

/// Appends a `ResponseOp` whose `field` is a response with a header that has only a revision, followed by `rest`.
fn encode_response(body: &mut Vec<u8>, field: u32, revision: i64, rest: &[u8]) {
    let header = ResponseHeader { revision, ..ResponseHeader::default() };
    let mut response = Vec::with_capacity(rest.len() + 16);
    prost::encoding::message::encode(HEADER_FIELD, &header, &mut response);
    response.extend_from_slice(rest);
    let mut op = Vec::with_capacity(response.len() + 8);
    encode_key(field, WireType::LengthDelimited, &mut op);
    encode_varint(response.len() as u64, &mut op);
    op.extend_from_slice(&response);
    encode_key(RESPONSES_FIELD, WireType::LengthDelimited, body);
    encode_varint(op.len() as u64, body);
    body.extend_from_slice(&op);
}

/// Executes a read-only transaction at the current head while the meter allows it; None if the meter stopped it. The
/// transaction must not have nested transactions.
pub fn read_only(keys: &Reader, txn: &TxnRequest, meter: Meter<'_>) -> Result<Option<Response>, ReadError> {
    read_only_with(keys, txn, |view, query| match query.revision {
        ..=0 => Ok(view.range_metered(query, meter)?),
        _ => Ok(keys.range_metered(query, meter)?.map(|(rows, _)| rows)),
    })
}

/// The same, but None if the reads are not short.
pub fn read_only_if_short(keys: &Reader, txn: &TxnRequest) -> Result<Option<Response>, ReadError> {
    let is_over = Cell::new(false);
    let fits = meter::at_most(meter::SHORT_BYTES);
    let meter = |cost| {
        is_over.set(is_over.get() || !fits(cost));
        !is_over.get()
    };
    read_only_with(keys, txn, |view, query| {
        let at = if query.revision > 0 { query.revision } else { view.at() };
        let rows = keys.range_short(query, at, &meter)?;
        Ok(rows.filter(|_| !is_over.get())) // Even a single long record is too much here.
    })
}

fn read_only_with(
    keys: &Reader,
    txn: &TxnRequest,
    read: impl Fn(&View, &Query) -> Result<Option<Rows>, ReadError>,
) -> Result<Option<Response>, ReadError> {
    let (view, head) = keys.view(0)?;
    let mut succeeded = true;
    for compare in &txn.compare {
        succeeded = succeeded && holds(&view, compare, view.at())?;
    }
    let ops = if succeeded { &txn.success } else { &txn.failure };
    let ranges = || {
        ops.iter().filter_map(|op| match &op.request {
            Some(request_op::Request::RequestRange(range)) => Some(range),
            _ => None,
        })
    };
    for range in ranges() {
        check_revision(range.revision, head, keys.compacted())?;
    }
    let mut body = Vec::new();
    if succeeded {
        prost::encoding::bool::encode(SUCCEEDED_FIELD, &true, &mut body);
    }
    for range in ranges() {
        let Some(rows) = read(&view, &query(range.clone()))? else { return Ok(None) };
        let mut response = Vec::with_capacity(rows.encoded_len());
        rows.encode(&mut response);
        encode_response(&mut body, RANGE_FIELD, head, &response);
    }
    Ok(Some(Response { revision: head, body }))
}

/// Checks the revision of a range inside a transaction. Unlike outside of one, a negative revision can be compacted.
pub fn check_revision(revision: i64, head: i64, compacted: i64) -> Result<(), Error> {
    if revision > head {
        return Err(Error::FutureRev);
    }
    if revision != 0 && revision < compacted {
        return Err(Error::Compacted);
    }
    Ok(())
}

/// Translates a Range request. Callers must have refused unknown enum values before.
#[must_use]
pub fn query(range: RangeRequest) -> Query {
    use crate::{
        mvcc::query::{Filters, Order, Target},
        proto::etcdserverpb::range_request::{SortOrder, SortTarget},
    };
    let order = match range.sort_order() {
        SortOrder::None => Order::None,
        SortOrder::Ascend => Order::Ascend,
        SortOrder::Descend => Order::Descend,
    };
    let target = match range.sort_target() {
        SortTarget::Key => Target::Key,
        SortTarget::Version => Target::Version,
        SortTarget::Create => Target::Create,
        SortTarget::Mod => Target::Mod,
        SortTarget::Value => Target::Value,
    };
    Query {
        interval: Interval::new(range.key, range.range_end),
        limit: range.limit,
        revision: range.revision,
        order,
        target,
        keys_only: range.keys_only,
        count_only: range.count_only,
        counts_rest: true,
        filters: Filters {
            min_mod: range.min_mod_revision,
            max_mod: range.max_mod_revision,
            min_create: range.min_create_revision,
            max_create: range.max_create_revision,
        },
    }
}

/// Whether a comparison holds at `at`; for a range of keys, whether it holds for all of them.
pub fn holds(source: &dyn Source, compare: &Compare, at: i64) -> Result<bool, Halt> {
    let interval = Interval::new(compare.key.clone(), compare.range_end.clone());
    let mut hits = Vec::new();
    source.visit(&interval, at, &mut |_, hit| {
        hits.push(hit);
        ControlFlow::Continue(())
    });
    let by_value = compare.target == CompareTarget::Value as i32;
    if hits.is_empty() {
        // A missing key has no value to compare, and its version, revisions and lease are zero.
        return Ok(!by_value && accepts(compare, compare_numbers(compare, None)));
    }
    if !by_value {
        fetch_metadata(source, &mut hits)?;
        return Ok(hits.iter().all(|hit| accepts(compare, compare_numbers(compare, Some(hit)))));
    }
    let revisions: Vec<_> = hits.iter().map(|hit| hit.revision).collect();
    for record in source.records(&revisions)? {
        let record = record.ok_or_else(|| {
            Halt::InvalidData("the database is corrupt: a record read by a comparison is missing".into())
        })?;
        if !accepts(compare, read::decode(record)?.value.as_ref().cmp(expected_value(compare))) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reads the metadata of keys that have newer changes from their records: the index no longer has it.
fn fetch_metadata(source: &dyn Source, hits: &mut [Hit]) -> Result<(), Halt> {
    for hit in hits.iter_mut().filter(|hit| hit.metadata.is_none()) {
        let record = source.records(&[hit.revision])?.pop().flatten();
        let record = record.ok_or_else(|| {
            Halt::InvalidData("the database is corrupt: a record read by a comparison is missing".into())
        })?;
        let record = read::decode(record)?;
        hit.metadata =
            Some(KeyMetadata { create: record.create_revision, version: record.version, lease: record.lease });
    }
    Ok(())
}

fn compare_numbers(compare: &Compare, hit: Option<&Hit>) -> Ordering {
    let metadata = hit.map(|hit| hit.metadata.expect("metadata is fetched before it is compared"));
    let union = compare.target_union.as_ref();
    let (found, wanted) = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Version) => (
            metadata.map(|metadata| metadata.version),
            operand_number(union, |union| if let TargetUnion::Version(number) = union { Some(*number) } else { None }),
        ),
        Ok(CompareTarget::Create) => (
            metadata.map(|metadata| metadata.create),
            operand_number(
                union,
                |union| if let TargetUnion::CreateRevision(number) = union { Some(*number) } else { None },
            ),
        ),
        Ok(CompareTarget::Mod) => (
            hit.map(|hit| hit.revision.main),
            operand_number(
                union,
                |union| if let TargetUnion::ModRevision(number) = union { Some(*number) } else { None },
            ),
        ),
        Ok(CompareTarget::Lease) => (
            metadata.map(|metadata| metadata.lease),
            operand_number(union, |union| if let TargetUnion::Lease(number) = union { Some(*number) } else { None }),
        ),
        // As in etcd, an unknown target compares as equal.
        Ok(CompareTarget::Value) | Err(_) => (None, 0),
    };
    found.unwrap_or(0).cmp(&wanted)
}

/// The number to compare with; zero if the union is of another target.
fn operand_number(union: Option<&TargetUnion>, of: impl Fn(&TargetUnion) -> Option<i64>) -> i64 {
    union.and_then(of).unwrap_or(0)
}

fn expected_value(compare: &Compare) -> &[u8] {
    match &compare.target_union {
        Some(TargetUnion::Value(value)) => value,
        Some(
            TargetUnion::Version(_)
            | TargetUnion::CreateRevision(_)
            | TargetUnion::ModRevision(_)
            | TargetUnion::Lease(_),
        )
        | None => &[],
    }
}

fn accepts(compare: &Compare, found: Ordering) -> bool {
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => found == Ordering::Equal,
        Ok(CompareResult::NotEqual) => found != Ordering::Equal,
        Ok(CompareResult::Greater) => found == Ordering::Greater,
        Ok(CompareResult::Less) => found == Ordering::Less,
        // As in etcd, an unknown operator always holds.
        Err(_) => true,
    }
}
