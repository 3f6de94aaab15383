//! Range, Put, DeleteRange, Txn, Compact. (RangeStream is in [`super::range_stream`].)

use std::{cell::Cell, sync::Arc};

use super::{Caller, Operation, Outcome, Reply, Request, Service, read_error};
use crate::{
    error::Error,
    metrics::{self, METRICS},
    mvcc::{Query, read::Rows},
    proto::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
        RangeRequest, RequestOp, TxnRequest, TxnResponse, request_op,
    },
    slow_log::{ReadStart, request_text},
    state::{Command, Kind, txn},
};

/// What a Range found.
#[derive(Debug)]
pub struct RangeOutcome {
    pub rows: Rows,
    /// The newest revision when it was read.
    pub head: i64,
}

impl RangeOutcome {
    /// The number of rows, and their encoded size.
    fn size(&self) -> (usize, usize) {
        (self.rows.records.len(), self.rows.encoded_len())
    }
}

/// A Range and its response, for the log.
fn range_text(query: &Query, serializable: bool, (rows, bytes): (usize, usize)) -> [String; 2] {
    [request_text::query(query, serializable), format!("range_response_count:{rows} size:{bytes}")]
}

/// A read-only transaction and its response, for the log.
fn txn_text(txn: &TxnRequest, bytes: usize) -> [String; 2] {
    [request_text::txn_request(txn), format!("size:{bytes}")]
}

impl Service {
    pub fn range(self: &Arc<Self>, caller: &Caller, request: RangeRequest, reply: impl Reply<RangeOutcome>) {
        if let Err(error) = self.check_request(caller, &Operation::Range(&request)) {
            return reply.answer(Err(error));
        }
        METRICS.ranges.inc();
        let admitted = ReadStart::now();
        if self.can_read_now(request.serializable) {
            return self.run_range(caller, request, admitted, reply);
        }
        let (service, caller) = (self.clone(), caller.confirmed());
        self.await_read(reply, move |reply| service.run_range(&caller, request, admitted.confirmed(), reply));
    }

    /// A range that is short, and in memory or nearly so, is read here; any other one on the read pool.
    fn run_range(
        self: &Arc<Self>,
        caller: &Caller,
        request: RangeRequest,
        start: ReadStart,
        reply: impl Reply<RangeOutcome>,
    ) {
        let identity = match self.authorize_read(caller, |check| check.range(&request)) {
            Ok(identity) => identity,
            Err(error) => {
                return self.refuse(caller, "Range", error, reply, move |service, caller, reply| {
                    service.run_range(caller, request, start, reply);
                });
            }
        };
        let serializable = request.serializable;
        let query = txn::query(request);
        if let Some(found) = self.readers().keys.range_if_short(&query).transpose() {
            let found = found.map(|(rows, head)| RangeOutcome { rows, head }).map_err(read_error);
            let parts = start.ended();
            metrics::observe_range(found.is_ok(), parts.read, parts.total());
            let size = found.as_ref().map(RangeOutcome::size).unwrap_or_default();
            self.thresholds.note_read("read-only range ", &parts, || range_text(&query, serializable, size));
            return reply.answer(found.and_then(|found| self.unless_users_changed(&identity, found)));
        }
        let service = self.clone();
        self.run_long_read(caller, move || {
            let (start, size) = (start.dequeued(), Cell::new((0, 0)));
            let encoded_len = |found: &RangeOutcome| {
                size.set(found.size());
                size.get().1
            };
            let is_success = service.read_counted(&identity, reply, encoded_len, |meter| {
                let found = service.readers().keys.range_metered(&query, meter)?;
                Ok(found.map(|(rows, head)| RangeOutcome { rows, head }))
            });
            let parts = start.ended();
            metrics::observe_range(is_success, parts.read, parts.total());
            service.thresholds.note_read("read-only range ", &parts, || range_text(&query, serializable, size.get()));
        });
    }

    pub fn put(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<PutRequest>,
        reply: impl Reply<Outcome<PutResponse>>,
    ) {
        match self.admit(caller, &Operation::Put(&request.parsed)) {
            Ok(identity) => {
                self.propose(&identity, Kind::Put, &request.raw, reply);
            }
            Err(error) => {
                let error = self.too_large_or(error, Kind::Put, &request.raw);
                self.refuse(caller, "Put", error, reply, move |service, caller, reply| {
                    service.put(caller, request, reply);
                });
            }
        }
    }

    /// The error of a write that was not let in. Its size is looked at before the permissions of its user, as in etcd.
    fn too_large_or(&self, error: Error, kind: Kind, raw: &[u8]) -> Error {
        let is_by_permission = matches!(error, Error::PermissionDenied | Error::UserEmpty | Error::AuthOldRevision);
        let is_too_large = || Command::encode(u64::MAX, kind, raw).len() > self.limits.max_request_bytes;
        if is_by_permission && is_too_large() {
            metrics::refused("request_bytes");
            return Error::RequestTooLarge;
        }
        error
    }

    pub fn delete_range(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<DeleteRangeRequest>,
        reply: impl Reply<Outcome<DeleteRangeResponse>>,
    ) {
        match self.admit(caller, &Operation::DeleteRange(&request.parsed)) {
            Ok(identity) => {
                self.propose(&identity, Kind::DeleteRange, &request.raw, reply);
            }
            Err(error) => {
                let error = self.too_large_or(error, Kind::DeleteRange, &request.raw);
                self.refuse(caller, "DeleteRange", error, reply, move |service, caller, reply| {
                    service.delete_range(caller, request, reply);
                });
            }
        }
    }

    pub fn txn(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<TxnRequest>,
        reply: impl Reply<Outcome<TxnResponse>>,
    ) {
        let operation = Operation::Txn(&request.parsed);
        if is_read_only(&request.parsed) {
            if let Err(error) = self.check_request(caller, &operation) {
                return self.reject_write(error, reply);
            }
            return self.read_only_txn(caller, request.parsed, reply);
        }
        match self.admit(caller, &operation) {
            Ok(identity) => {
                self.propose(&identity, Kind::Txn, &request.raw, reply);
            }
            Err(error) => {
                let error = self.too_large_or(error, Kind::Txn, &request.raw);
                self.refuse(caller, "Txn", error, reply, move |service, caller, reply| {
                    service.txn(caller, request, reply);
                });
            }
        }
    }

    fn read_only_txn(self: &Arc<Self>, caller: &Caller, txn: TxnRequest, reply: impl Reply<Outcome<TxnResponse>>) {
        let admitted = ReadStart::now();
        if self.can_read_now(is_serializable(&txn)) {
            return self.run_read_only_txn(caller, txn, admitted, reply);
        }
        let (service, caller) = (self.clone(), caller.confirmed());
        self.await_read(reply, move |reply| service.run_read_only_txn(&caller, txn, admitted.confirmed(), reply));
    }

    fn run_read_only_txn(
        self: &Arc<Self>,
        caller: &Caller,
        txn: TxnRequest,
        start: ReadStart,
        reply: impl Reply<Outcome<TxnResponse>>,
    ) {
        let identity = match self.authorize_read(caller, |check| check.txn(&txn)) {
            Ok(identity) => identity,
            Err(error) => {
                return self.refuse(caller, "Txn", error, reply, move |service, caller, reply| {
                    service.run_read_only_txn(caller, txn, start, reply);
                });
            }
        };
        if self.is_short(&txn)
            && let Some(found) = txn::read_only_if_short(&self.readers().keys, &txn).transpose()
        {
            let found = found.map(Outcome::from).map_err(read_error);
            let parts = start.ended();
            metrics::observe_read_only_txn(found.is_ok(), parts.total());
            let bytes = found.as_ref().map_or(0, |found| found.body.len());
            self.thresholds.note_read("read-only txn ", &parts, || txn_text(&txn, bytes));
            return reply.answer(found.and_then(|found| self.unless_users_changed(&identity, found)));
        }
        let service = self.clone();
        self.run_long_read(caller, move || {
            let (start, bytes) = (start.dequeued(), Cell::new(0));
            let encoded_len = |outcome: &Outcome<TxnResponse>| {
                bytes.set(outcome.body.len());
                bytes.get()
            };
            let is_success = service.read_counted(&identity, reply, encoded_len, |meter| {
                Ok(txn::read_only(&service.readers().keys, &txn, meter)?.map(Into::into))
            });
            let parts = start.ended();
            metrics::observe_read_only_txn(is_success, parts.total());
            service.thresholds.note_read("read-only txn ", &parts, || txn_text(&txn, bytes.get()));
        });
    }

    /// Whether a read-only transaction looks at few enough keys to be answered at once.
    fn is_short(&self, txn: &TxnRequest) -> bool {
        let keys = &self.readers().keys;
        let is_short = |op: &RequestOp| match &op.request {
            Some(request_op::Request::RequestRange(range)) => keys.is_short(&txn::query(range.clone())),
            _ => false,
        };
        txn.compare.iter().all(|compare| compare.range_end.is_empty()) && ops(txn).all(is_short)
    }

    pub fn compact(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<CompactionRequest>,
        reply: impl Reply<Outcome<CompactionResponse>>,
    ) {
        let identity = match self.admit(caller, &Operation::Compact) {
            Ok(identity) => identity,
            Err(error) => {
                return self.refuse(caller, "Compact", error, reply, move |service, caller, reply| {
                    service.compact(caller, request, reply);
                });
            }
        };
        if !request.parsed.physical {
            return self.propose(&identity, Kind::Compact, &request.raw, reply);
        }
        let node = self.node().clone();
        let committed = move |outcome: Result<_, Error>| {
            // Even if the revision was compacted before, the answer waits until that compaction is complete.
            node.await_compaction(Box::new(move || reply.answer(outcome.map(Into::into))));
        };
        self.node().propose(self.cluster.ids.next(), Kind::Compact, &request.raw, Box::new(committed));
    }
}

/// Whether a transaction can only read, and therefore needs no log entry. One with nested transactions gets an entry
/// nevertheless, as in etcd.
fn is_read_only(txn: &TxnRequest) -> bool {
    ops(txn).all(|op| matches!(op.request, Some(request_op::Request::RequestRange(_))))
}

/// Whether all reads of a read-only transaction are serializable. A transaction that only compares has not asked for that, and
/// is linearizable.
fn is_serializable(txn: &TxnRequest) -> bool {
    let mut reads = ops(txn).peekable();
    reads.peek().is_some()
        && reads.all(|op| matches!(&op.request, Some(request_op::Request::RequestRange(range)) if range.serializable))
}

fn ops(txn: &TxnRequest) -> impl Iterator<Item = &RequestOp> {
    txn.success.iter().chain(&txn.failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(serializable: bool) -> RequestOp {
        let range = RangeRequest { serializable, ..RangeRequest::default() };
        RequestOp { request: Some(request_op::Request::RequestRange(range)) }
    }

    fn branches(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> TxnRequest {
        TxnRequest { success, failure, ..TxnRequest::default() }
    }

    /// KV-51: in etcd, a transaction that only compares may read stale data. Here it never does.
    #[test]
    fn a_transaction_is_serializable_only_if_all_its_reads_are() {
        assert!(!is_serializable(&branches(vec![], vec![])));
        assert!(is_serializable(&branches(vec![read(true)], vec![read(true)])));
        assert!(!is_serializable(&branches(vec![read(true)], vec![read(false)])));
    }

    #[test]
    fn a_transaction_is_read_only_if_both_branches_only_read() {
        let put = || RequestOp { request: Some(request_op::Request::RequestPut(PutRequest::default())) };
        let nested = RequestOp { request: Some(request_op::Request::RequestTxn(TxnRequest::default())) };
        assert!(is_read_only(&branches(vec![], vec![])));
        assert!(is_read_only(&branches(vec![read(false)], vec![read(true)])));
        assert!(!is_read_only(&branches(vec![read(false)], vec![put()])));
        assert!(
            !is_read_only(&branches(vec![nested], vec![])),
            "as in etcd, even if the nested transaction only reads"
        );
    }
}
