//! Reading transactions inside transactions.
//!
//! prost follows messages inside messages to a depth of 100 and no further, which is 49 transactions; etcd's limit is the
//! number of operations, by default 128. (prost can be built without a limit, but for all messages alike, and then whoever
//! sends enough of them overflows the stack.) What prost refuses is read again, one level at a time.

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op::Request,
};

/// Whatever walks through a transaction does so on the stack of a thread: so many levels fit, and to spare.
const DEEPEST: usize = 500;
/// prost's words for what goes deeper than it follows. It has no others to tell this from other errors.
const TOO_DEEP_FOR_PROST: &str = "recursion limit reached";

/// Why a transaction cannot be read.
#[derive(Debug)]
pub enum Unreadable {
    /// It is not one.
    Malformed(DecodeError),
    /// It has too many levels.
    TooDeep(DecodeError),
}

impl From<Unreadable> for DecodeError {
    fn from(unreadable: Unreadable) -> Self {
        match unreadable {
            Unreadable::Malformed(error) | Unreadable::TooDeep(error) => error,
        }
    }
}

/// Reads a transaction.
pub fn decode(message: Bytes) -> Result<TxnRequest, Unreadable> {
    let error = match TxnRequest::decode(message.clone()) {
        Ok(txn) => return Ok(txn),
        Err(error) => error,
    };
    if !error.to_string().contains(TOO_DEEP_FOR_PROST) {
        return Err(Unreadable::Malformed(error));
    }
    level(message, DEEPEST).map_err(|obstacle| match obstacle {
        Obstacle::Depth => Unreadable::TooDeep(error),
        Obstacle::Ambiguity => Unreadable::Malformed(error),
        Obstacle::Bytes(error) => Unreadable::Malformed(error),
    })
}

/// A transaction whose inner ones are not read yet. Has the fields of [`TxnRequest`].
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

/// What is in the way of reading a level.
enum Obstacle {
    Bytes(DecodeError),
    /// There are more levels inside than may be.
    Depth,
    /// An operation says more than one thing. Which counts depends on their order; no client does that.
    Ambiguity,
}

/// Reads a level and those inside it, so many at most. (Plain loops: what iterators keep on the stack would be kept for each
/// level.)
fn level(message: Bytes, deepest: usize) -> Result<TxnRequest, Obstacle> {
    let deeper = deepest.checked_sub(1).ok_or(Obstacle::Depth)?;
    let Level { compare, success, failure } = Level::decode(message).map_err(Obstacle::Bytes)?;
    Ok(TxnRequest { compare, success: branch(success, deeper)?, failure: branch(failure, deeper)? })
}

fn branch(ops: Vec<Op>, deepest: usize) -> Result<Vec<RequestOp>, Obstacle> {
    let mut read = Vec::with_capacity(ops.len());
    for op in ops {
        let request = match op.inner()? {
            Some(message) => Some(Request::RequestTxn(level(message, deepest)?)),
            None => op.flat(),
        };
        read.push(RequestOp { request });
    }
    Ok(read)
}

impl Op {
    /// The transaction inside, if it is one.
    fn inner(&self) -> Result<Option<Bytes>, Obstacle> {
        let flat = [self.range.is_some(), self.put.is_some(), self.delete.is_some()];
        let said = flat.into_iter().filter(|&is_said| is_said).count() + self.txn.len();
        if said > 1 { Err(Obstacle::Ambiguity) } else { Ok(self.txn.first().cloned()) }
    }

    /// What it is otherwise.
    fn flat(self) -> Option<Request> {
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

    /// So many transactions, each inside the other's first branch, with something of every kind in each.
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
    fn a_transaction_reads_back_however_deep_it_is() {
        for levels in [1, 2, 49, 50, 51, 128, DEEPEST] {
            let txn = nested(levels);
            assert!(decode(txn.encode_to_vec().into()).unwrap() == txn, "{levels} levels");
        }
    }

    #[test]
    fn what_is_deeper_or_broken_is_told_apart() {
        let deeper = nested(DEEPEST + 1).encode_to_vec();
        assert!(matches!(decode(deeper.into()), Err(Unreadable::TooDeep(_))));
        // Each level is a few bytes: this must not be followed to its end.
        let mut bottomless = Vec::new();
        while bottomless.len() < 100_000 {
            bottomless = wrap(&wrap(&bottomless, 4), 2);
        }
        assert!(matches!(decode(bottomless.into()), Err(Unreadable::TooDeep(_))));
        let mut broken = nested(60).encode_to_vec();
        *broken.last_mut().unwrap() = 0xff;
        assert!(matches!(decode(broken.into()), Err(Unreadable::Malformed(_))));
        // A deep one and another in one operation, and one that is none beside one that is.
        let (deep, flat) = (wrap(&nested(60).encode_to_vec(), 4), wrap(&nested(1).encode_to_vec(), 4));
        for two in [[&deep[..], &flat].concat(), [&wrap(&[0xff], 4)[..], &flat].concat()] {
            assert!(matches!(decode(wrap(&two, 2).into()), Err(Unreadable::Malformed(_))));
        }
    }

    /// A message of one field that holds another message.
    fn wrap(message: &[u8], field: u32) -> Vec<u8> {
        let mut wrapped = Vec::new();
        prost::encoding::bytes::encode(field, &message.to_vec(), &mut wrapped);
        wrapped
    }

    /// Half of what our threads have.
    #[test]
    fn the_deepest_need_no_great_stack() {
        let small = std::thread::Builder::new().stack_size(1 << 20);
        let thread = small.spawn(|| {
            let txn = decode(nested(DEEPEST).encode_to_vec().into()).unwrap();
            crate::state::command::txn_cost(&txn)
        });
        assert!(thread.unwrap().join().unwrap() > 0);
    }
}
