//! Range, Put, DeleteRange, Txn, Compact. (RangeStream is in [`super::range_stream`].)

use std::{cell::RefCell, sync::Arc, time::Instant};

use bytes::Bytes;

use super::{Api, decode, decode_txn, refuse, validate};
use crate::{
    call::{Call, Reply},
    error::Error,
    ledger,
    metrics::METRICS,
    mvcc::{
        Query,
        meter::Meter,
        read::{ReadError, Rows},
    },
    proto::etcdserverpb::{
        CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op,
    },
    state::{self, Kind, command, txn},
};

impl Api {
    /// `KV/Range`.
    pub fn range(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = decode::<RangeRequest>(call.message);
        let request = match request.and_then(|request| validate::range(&request).map(|()| request)) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        METRICS.ranges.inc();
        let api = self.clone();
        let serializable = request.serializable;
        let query = txn::query(request);
        self.read(serializable, reply, move |reply| api.run_range(query, reply));
    }

    fn run_range(self: Arc<Self>, query: Query, reply: Reply) {
        if let Some(found) = self.readers().keys.range_if_short(&query).transpose() {
            return self.answer_range(found, reply);
        }
        let pool = self.pool.clone();
        pool.run(move || {
            let started = Instant::now();
            self.read_counted(reply, |meter| {
                let found = self.readers().keys.range_metered(&query, meter)?;
                Ok(found.map(|(rows, head)| self.header.rows(&rows, head)))
            });
            self.slow.note_read(started, "read-only range ");
        });
    }

    /// Answers a long read. The ledger counts what has been read until the answer is delivered, twice because the answer is a
    /// copy. The read ends when the ledger's limit is reached, before it can fill the memory.
    fn read_counted(&self, reply: Reply, read: impl FnOnce(Meter<'_>) -> Result<Option<Bytes>, ReadError>) {
        if !reply.is_wanted() {
            return;
        }
        let charge = RefCell::new(self.ledger.charge(0));
        let found = read(&|cost| charge.borrow_mut().try_grow(2 * cost));
        let answer = found.map_err(refuse).and_then(|found| found.ok_or_else(ledger::response_over_limit));
        // The rows are dropped by now; only the answer is left.
        charge.borrow_mut().set(answer.as_ref().map_or(0, Bytes::len));
        reply.answer(answer);
    }

    fn answer_range(&self, found: Result<(Rows, i64), ReadError>, reply: Reply) {
        reply.answer(found.map(|(rows, head)| self.header.rows(&rows, head)).map_err(refuse));
    }

    /// `KV/Put`.
    pub fn put(self: &Arc<Self>, call: Call, reply: Reply) {
        let admitted = decode::<PutRequest>(call.message.clone()).and_then(|put| {
            self.check_quota(command::put_cost(&put))?;
            validate::put(&put)
        });
        match admitted {
            Ok(()) => {
                METRICS.puts.inc();
                self.propose(Kind::Put, &call.message, reply);
            }
            Err(error) => self.reject_write(error, reply),
        }
    }

    /// `KV/DeleteRange`.
    pub fn delete_range(self: &Arc<Self>, call: Call, reply: Reply) {
        let admitted = decode::<DeleteRangeRequest>(call.message.clone());
        match admitted.and_then(|delete| validate::delete_range(&delete)) {
            Ok(()) => {
                METRICS.deletes.inc();
                self.propose(Kind::DeleteRange, &call.message, reply);
            }
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// `KV/Txn`.
    pub fn txn(self: &Arc<Self>, call: Call, reply: Reply) {
        let admitted = decode_txn(call.message.clone()).and_then(|txn| {
            self.check_quota(command::txn_cost(&txn))?;
            validate::txn(&txn, self.limits.max_txn_ops)?;
            Ok(txn)
        });
        let txn = match admitted {
            Ok(txn) => txn,
            Err(error) => return self.reject_write(error, reply),
        };
        METRICS.txns.inc();
        if !is_read_only(&txn) {
            return self.propose(Kind::Txn, &call.message, reply);
        }
        let api = self.clone();
        self.read(is_serializable(&txn), reply, move |reply| {
            let started = Instant::now();
            if api.is_short(&txn)
                && let Some(answer) = txn::read_only_if_short(&api.readers().keys, &txn).transpose()
            {
                reply.answer(answer.map(|response| api.encode(response)).map_err(refuse));
                return api.slow.note_read(started, "read-only txn ");
            }
            let pool = api.pool.clone();
            pool.run(move || {
                let started = Instant::now();
                api.read_counted(reply, |meter| {
                    let found = txn::read_only(&api.readers().keys, &txn, meter)?;
                    Ok(found.map(|response| api.encode(response)))
                });
                api.slow.note_read(started, "read-only txn ");
            });
        });
    }

    /// Whether a read-only transaction reads few enough keys to be answered inline.
    fn is_short(&self, txn: &TxnRequest) -> bool {
        let keys = &self.readers().keys;
        let is_short = |op: &RequestOp| match &op.request {
            Some(request_op::Request::RequestRange(range)) => keys.is_short(&txn::query(range.clone())),
            _ => false,
        };
        txn.compare.iter().all(|compare| compare.range_end.is_empty()) && ops(txn).all(is_short)
    }

    fn encode(&self, response: state::Response) -> Bytes {
        self.header.answer(Ok(response)).expect("a successful outcome has an answer")
    }

    /// `KV/Compact`.
    pub fn compact(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = match decode::<CompactionRequest>(call.message.clone()) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        if !request.physical {
            return self.propose(Kind::Compact, &call.message, reply);
        }
        let (api, id) = (self.clone(), self.ids.next());
        let when_applied = move |outcome: Result<state::Response, Error>| {
            let answer = api.header.answer(outcome);
            // Even if the revision was compacted before, wait until all compactions so far are finished.
            api.node.await_compaction(Box::new(move || reply.answer(answer)));
        };
        self.node.propose(id, Kind::Compact, &call.message, Box::new(when_applied));
    }
}

/// Whether a transaction only reads, so that it needs no log entry. One with nested transactions is proposed nevertheless, as
/// in etcd.
fn is_read_only(txn: &TxnRequest) -> bool {
    ops(txn).all(|op| matches!(op.request, Some(request_op::Request::RequestRange(_))))
}

/// Whether all reads of a read-only transaction are serializable. A transaction that only compares is not: it is answered
/// linearizably.
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

    /// Trap 51: in etcd, a transaction that only compares may read stale data. Here it never does.
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
