//! Range, Put, DeleteRange, Txn, Compact. (RangeStream is in [`super::range_stream`].)

use std::{sync::Arc, time::Instant};

use super::{Caller, Operation, Outcome, Reply, Request, Service, read_error};
use crate::{
    error::Error,
    metrics::METRICS,
    mvcc::{Query, read::Rows},
    proto::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
        RangeRequest, RequestOp, TxnRequest, TxnResponse, request_op,
    },
    state::{Kind, txn},
};

/// What a Range found.
#[derive(Debug)]
pub struct RangeOutcome {
    pub rows: Rows,
    /// The newest revision when it was read.
    pub head: i64,
}

impl Service {
    pub fn range(self: &Arc<Self>, caller: &Caller, request: RangeRequest, reply: impl Reply<RangeOutcome>) {
        if let Err(error) = self.admit(caller, &Operation::Range(&request)) {
            return reply.answer(Err(error));
        }
        METRICS.ranges.inc();
        let service = self.clone();
        let serializable = request.serializable;
        let query = txn::query(request);
        self.read(serializable, reply, move |reply| service.run_range(query, reply));
    }

    /// A range that is short, and in memory or nearly so, is read here; any other one on the read pool.
    fn run_range(self: Arc<Self>, query: Query, reply: impl Reply<RangeOutcome>) {
        if let Some(found) = self.readers().keys.range_if_short(&query).transpose() {
            return reply.answer(found.map(|(rows, head)| RangeOutcome { rows, head }).map_err(read_error));
        }
        let pool = self.read_pool().clone();
        pool.run(move || {
            let started = Instant::now();
            self.read_counted(reply, |meter| {
                let found = self.readers().keys.range_metered(&query, meter)?;
                Ok(found.map(|(rows, head)| RangeOutcome { rows, head }))
            });
            self.slow_log.note_read(started, "read-only range ");
        });
    }

    pub fn put(&self, caller: &Caller, request: &Request<PutRequest>, reply: impl Reply<Outcome<PutResponse>>) {
        match self.admit(caller, &Operation::Put(&request.parsed)) {
            Ok(()) => {
                METRICS.puts.inc();
                self.propose(Kind::Put, &request.raw, reply);
            }
            Err(error) => self.reject_write(error, reply),
        }
    }

    pub fn delete_range(
        &self,
        caller: &Caller,
        request: &Request<DeleteRangeRequest>,
        reply: impl Reply<Outcome<DeleteRangeResponse>>,
    ) {
        match self.admit(caller, &Operation::DeleteRange(&request.parsed)) {
            Ok(()) => {
                METRICS.deletes.inc();
                self.propose(Kind::DeleteRange, &request.raw, reply);
            }
            Err(error) => reply.answer(Err(error)),
        }
    }

    pub fn txn(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<TxnRequest>,
        reply: impl Reply<Outcome<TxnResponse>>,
    ) {
        if let Err(error) = self.admit(caller, &Operation::Txn(&request.parsed)) {
            return self.reject_write(error, reply);
        }
        METRICS.txns.inc();
        if !is_read_only(&request.parsed) {
            return self.propose(Kind::Txn, &request.raw, reply);
        }
        let (service, txn) = (self.clone(), request.parsed);
        self.read(is_serializable(&txn), reply, move |reply| service.run_read_only_txn(txn, reply));
    }

    fn run_read_only_txn(self: Arc<Self>, txn: TxnRequest, reply: impl Reply<Outcome<TxnResponse>>) {
        let started = Instant::now();
        if self.is_short(&txn)
            && let Some(found) = txn::read_only_if_short(&self.readers().keys, &txn).transpose()
        {
            reply.answer(found.map(Into::into).map_err(read_error));
            return self.slow_log.note_read(started, "read-only txn ");
        }
        let pool = self.read_pool().clone();
        pool.run(move || {
            let started = Instant::now();
            self.read_counted(reply, |meter| Ok(txn::read_only(&self.readers().keys, &txn, meter)?.map(Into::into)));
            self.slow_log.note_read(started, "read-only txn ");
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
        request: &Request<CompactionRequest>,
        reply: impl Reply<Outcome<CompactionResponse>>,
    ) {
        if let Err(error) = self.admit(caller, &Operation::Other) {
            return reply.answer(Err(error));
        }
        if !request.parsed.physical {
            return self.propose(Kind::Compact, &request.raw, reply);
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
