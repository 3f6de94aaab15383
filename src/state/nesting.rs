//! Reading transactions inside transactions.
//!
//! prost follows messages inside messages to a depth of 100 and no further, which is 49 transactions; etcd's limit is the
//! number of operations, by default 128. (prost can be built without a limit, but for all messages alike, and then whoever
//! sends enough of them overflows the stack.) What prost refuses is read again, one level at a time.

use bytes::Bytes;
use prost::{DecodeError, Message, Oneof};

use crate::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op::Request,
};

/// Whatever walks through a transaction does so on the stack of a thread: this much it has room for, and to spare.
const DEEPEST: usize = 500;

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
    TxnRequest::decode(message.clone()).or_else(|error| {
        let read = level(message, DEEPEST).map_err(Unreadable::Malformed)?;
        read.ok_or(Unreadable::TooDeep(error))
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

#[derive(Clone, PartialEq, Message)]
struct Op {
    #[prost(oneof = "Form", tags = "1, 2, 3, 4")]
    form: Option<Form>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Form {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeRequest),
    #[prost(bytes = "bytes", tag = "4")]
    Txn(Bytes),
}

/// Reads a level and those inside it; None if there are more of them than that.
fn level(message: Bytes, deepest: usize) -> Result<Option<TxnRequest>, DecodeError> {
    let Some(deeper) = deepest.checked_sub(1) else { return Ok(None) };
    let Level { compare, success, failure } = Level::decode(message)?;
    let (Some(success), Some(failure)) = (branch(success, deeper)?, branch(failure, deeper)?) else { return Ok(None) };
    Ok(Some(TxnRequest { compare, success, failure }))
}

fn branch(ops: Vec<Op>, deepest: usize) -> Result<Option<Vec<RequestOp>>, DecodeError> {
    let mut read = Vec::with_capacity(ops.len());
    for Op { form } in ops {
        let request = match form {
            Some(Form::Range(range)) => Some(Request::RequestRange(range)),
            Some(Form::Put(put)) => Some(Request::RequestPut(put)),
            Some(Form::DeleteRange(delete)) => Some(Request::RequestDeleteRange(delete)),
            Some(Form::Txn(message)) => match level(message, deepest)? {
                Some(txn) => Some(Request::RequestTxn(txn)),
                None => return Ok(None),
            },
            None => None,
        };
        read.push(RequestOp { request });
    }
    Ok(Some(read))
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
    }

    /// A message of one field that holds another message.
    fn wrap(message: &[u8], field: u32) -> Vec<u8> {
        let mut wrapped = Vec::new();
        prost::encoding::bytes::encode(field, &message.to_vec(), &mut wrapped);
        wrapped
    }

    #[test]
    fn the_deepest_need_no_great_stack() {
        let small = std::thread::Builder::new().stack_size(512 << 10);
        let thread = small.spawn(|| {
            let txn = decode(nested(DEEPEST).encode_to_vec().into()).unwrap();
            crate::state::command::txn_cost(&txn)
        });
        assert!(thread.unwrap().join().unwrap() > 0);
    }
}
