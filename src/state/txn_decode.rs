//! Decodes deeply nested transactions.
//!
//! prost decodes nested messages to a depth of 100, which is 49 transactions. etcd limits only the number of operations, 128 by
//! default. (prost can be built without a limit, but only for all messages, and then a client could overflow
//! the stack with a deeply nested message.) A transaction that is too deep for prost is decoded again, one level at a time.

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op::Request,
};

/// Everything that traverses a transaction is recursive; this many levels fit easily on a thread's stack.
pub const MAX_LEVELS: usize = 500;
/// prost's message for a message that is nested too deeply. prost has no other way to distinguish this error.
const PROST_RECURSION_ERROR: &str = "recursion limit reached";

/// Why a transaction cannot be decoded.
#[derive(Debug)]
pub enum TxnDecodeError {
    Malformed(DecodeError),
    /// It has too many levels of nesting.
    TooDeep(DecodeError),
}

impl From<TxnDecodeError> for DecodeError {
    fn from(unreadable: TxnDecodeError) -> Self {
        match unreadable {
            TxnDecodeError::Malformed(error) | TxnDecodeError::TooDeep(error) => error,
        }
    }
}

pub fn decode(message: Bytes) -> Result<TxnRequest, TxnDecodeError> {
    let error = match TxnRequest::decode(message.clone()) {
        Ok(txn) => return Ok(txn),
        Err(error) => error,
    };
    if !error.to_string().contains(PROST_RECURSION_ERROR) {
        return Err(TxnDecodeError::Malformed(error));
    }
    decode_level(message, MAX_LEVELS).map_err(|cause| match cause {
        LevelError::TooDeep => TxnDecodeError::TooDeep(error),
        LevelError::Ambiguous => TxnDecodeError::Malformed(error),
        LevelError::Malformed(error) => TxnDecodeError::Malformed(error),
    })
}

/// A transaction whose nested transactions are not decoded yet. Has the fields of [`TxnRequest`].
#[derive(Clone, PartialEq, Message)]
struct Level {
    #[prost(message, repeated, tag = "1")]
    compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    success: Vec<Op>,
    #[prost(message, repeated, tag = "3")]
    failure: Vec<Op>,
}

/// Has the fields of [`RequestOp`].
#[derive(Clone, PartialEq, Message)]
struct Op {
    #[prost(message, optional, tag = "1")]
    range: Option<RangeRequest>,
    #[prost(message, optional, tag = "2")]
    put: Option<PutRequest>,
    #[prost(message, optional, tag = "3")]
    delete: Option<DeleteRangeRequest>,
    #[prost(bytes = "bytes", repeated, tag = "4")]
    txn: Vec<Bytes>,
}

/// Why a level cannot be decoded.
enum LevelError {
    Malformed(DecodeError),
    TooDeep,
    /// An operation has more than one field of the oneof. Which one is valid depends on their order; clients do not send this.
    Ambiguous,
}

/// Decodes a level and those nested in it, at most `max_levels`. (Plain loops, because iterator adapters would use more stack
/// per level.)
fn decode_level(message: Bytes, max_levels: usize) -> Result<TxnRequest, LevelError> {
    let levels_left = max_levels.checked_sub(1).ok_or(LevelError::TooDeep)?;
    let Level { compare, success, failure } = Level::decode(message).map_err(LevelError::Malformed)?;
    Ok(TxnRequest {
        compare,
        success: decode_branch(success, levels_left)?,
        failure: decode_branch(failure, levels_left)?,
    })
}

fn decode_branch(ops: Vec<Op>, max_levels: usize) -> Result<Vec<RequestOp>, LevelError> {
    let mut decoded = Vec::with_capacity(ops.len());
    for op in ops {
        let request = match op.nested_txn()? {
            Some(message) => Some(Request::RequestTxn(decode_level(message, max_levels)?)),
            None => op.into_request(),
        };
        decoded.push(RequestOp { request });
    }
    Ok(decoded)
}

impl Op {
    /// The encoded nested transaction, if the operation is one.
    fn nested_txn(&self) -> Result<Option<Bytes>, LevelError> {
        let is_set = [self.range.is_some(), self.put.is_some(), self.delete.is_some()];
        let set_fields = is_set.into_iter().filter(|&is_set| is_set).count() + self.txn.len();
        if set_fields > 1 { Err(LevelError::Ambiguous) } else { Ok(self.txn.first().cloned()) }
    }

    /// The request of an operation that is not a transaction.
    fn into_request(self) -> Option<Request> {
        let (range, put) = (self.range.map(Request::RequestRange), self.put.map(Request::RequestPut));
        range.or(put).or(self.delete.map(Request::RequestDeleteRange))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(request: Request) -> RequestOp {
        RequestOp { request: Some(request) }
    }

    /// A transaction with this many levels, each in the success branch of the one above, with all kinds of operations.
    fn nested(levels: usize) -> TxnRequest {
        let put = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() };
        let mut txn = TxnRequest { success: vec![op(Request::RequestPut(put))], ..TxnRequest::default() };
        for _ in 1..levels {
            let range = op(Request::RequestRange(RangeRequest { key: "r".into(), ..RangeRequest::default() }));
            let delete = op(Request::RequestDeleteRange(DeleteRangeRequest { key: "d".into(), ..Default::default() }));
            let compare = vec![Compare { key: "c".into(), ..Compare::default() }];
            let success = vec![range, op(Request::RequestTxn(txn))];
            txn = TxnRequest { compare, success, failure: vec![delete, RequestOp::default()] };
        }
        txn
    }

    #[test]
    fn a_transaction_of_any_allowed_depth_decodes() {
        for levels in [1, 2, 49, 50, 51, 128, MAX_LEVELS] {
            let txn = nested(levels);
            assert!(decode(txn.encode_to_vec().into()).unwrap() == txn, "{levels} levels");
        }
    }

    #[test]
    fn too_deep_and_malformed_transactions_are_distinguished() {
        let deeper = nested(MAX_LEVELS + 1).encode_to_vec();
        assert!(matches!(decode(deeper.into()), Err(TxnDecodeError::TooDeep(_))));
        // Each level is only a few bytes: this must not be decoded to its end.
        let mut bottomless = Vec::new();
        while bottomless.len() < 100_000 {
            bottomless = wrap(&wrap(&bottomless, 4), 2);
        }
        assert!(matches!(decode(bottomless.into()), Err(TxnDecodeError::TooDeep(_))));
        let mut broken = nested(60).encode_to_vec();
        *broken.last_mut().unwrap() = 0xff;
        assert!(matches!(decode(broken.into()), Err(TxnDecodeError::Malformed(_))));
        // Operations with two transactions: a deep and a flat one; an invalid and a valid one.
        let (deep, flat) = (wrap(&nested(60).encode_to_vec(), 4), wrap(&nested(1).encode_to_vec(), 4));
        for two in [[&deep[..], &flat].concat(), [&wrap(&[0xff], 4)[..], &flat].concat()] {
            assert!(matches!(decode(wrap(&two, 2).into()), Err(TxnDecodeError::Malformed(_))));
        }
    }

    /// A message with one field that contains another message.
    fn wrap(message: &[u8], field: u32) -> Vec<u8> {
        let mut wrapped = Vec::new();
        prost::encoding::bytes::encode(field, &message.to_vec(), &mut wrapped);
        wrapped
    }

    /// Half the stack size of our threads.
    #[test]
    fn the_deepest_transaction_fits_on_a_small_stack() {
        let small = std::thread::Builder::new().stack_size(1 << 20);
        let thread = small.spawn(|| {
            let txn = decode(nested(MAX_LEVELS).encode_to_vec().into()).unwrap();
            crate::state::command::txn_cost(&txn)
        });
        assert!(thread.unwrap().join().unwrap() > 0);
    }
}
