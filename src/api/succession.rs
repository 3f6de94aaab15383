//! Lines of succession: what locks and elections have in common.
//!
//! A line is all keys below a name; whose key was created first has what the line is for, and the others follow in the order
//! of their creation. Each waits for the one before it only, so that a place that becomes free wakes one of them. Keys
//! that others put there stand in line like anybody's.
//!
//! ```text
//! lock "a"   a/694d71ddb1f31e02   create 5   has it
//!            a/694d71ddb1f31e0c   create 7   follows the one at 5
//!            a/-8                 create 9   follows the one at 7
//! ```

use std::{fmt::Write, sync::Arc};

use bytes::Bytes;

use super::{Api, recipe::Caller};
use crate::{
    call::Refusal,
    mvcc::Interval,
    proto::{
        etcdserverpb::{
            Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseGrantResponse, PutRequest, RangeRequest,
            RangeResponse, RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
            compare::{CompareResult, CompareTarget, TargetUnion},
            range_request::{SortOrder, SortTarget},
            request_op, response_op,
        },
        mvccpb::{KeyValue, event::EventType},
    },
};

/// The time of a lease that is granted to who brings none. Nobody here keeps it alive.
const LEASE_SECONDS: i64 = 60;

/// The keys of a line, as a start and an end.
#[must_use]
pub fn prefix(name: &[u8]) -> (Bytes, Bytes) {
    const BEHIND_SLASH: u8 = b'/' + 1;
    ([name, b"/"].concat().into(), [name, &[BEHIND_SLASH]].concat().into())
}

/// The key with which a lease stands in line.
#[must_use]
pub fn key_of(name: &[u8], lease: i64) -> Bytes {
    let mut digits = String::from(if lease < 0 { "/-" } else { "/" });
    write!(digits, "{:x}", lease.unsigned_abs()).expect("a string takes everything");
    [name, digits.as_bytes()].concat().into()
}

/// The lease that was brought, unseen; or a new one.
pub async fn lease_or_new(caller: &Caller, lease: i64) -> Result<i64, Refusal> {
    if lease != 0 {
        return Ok(lease);
    }
    let grant = LeaseGrantRequest { ttl: LEASE_SECONDS, id: 0 };
    let granted: LeaseGrantResponse = caller.ask(Api::lease_grant, &grant).await?;
    Ok(granted.id)
}

/// Asks for the oldest key of a line.
#[must_use]
pub fn oldest(name: &[u8]) -> RangeRequest {
    let (key, range_end) = prefix(name);
    RangeRequest {
        key,
        range_end,
        limit: 1,
        sort_order: SortOrder::Ascend as i32,
        sort_target: SortTarget::Create as i32,
        ..RangeRequest::default()
    }
}

/// What a comparison of a key's create revision looks like.
#[must_use]
pub fn created(key: &Bytes, result: CompareResult, revision: i64) -> Compare {
    Compare {
        key: key.clone(),
        result: result as i32,
        target: CompareTarget::Create as i32,
        target_union: Some(TargetUnion::CreateRevision(revision)),
        ..Compare::default()
    }
}

/// A read in a transaction.
#[must_use]
pub fn range_op(range: RangeRequest) -> RequestOp {
    RequestOp { request: Some(request_op::Request::RequestRange(range)) }
}

/// A put in a transaction.
#[must_use]
pub fn put_op(key: &Bytes, value: Bytes, lease: i64) -> RequestOp {
    let put = PutRequest { key: key.clone(), value, lease, ..PutRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestPut(put)) }
}

/// A deletion in a transaction.
#[must_use]
pub fn delete_op(key: &Bytes) -> RequestOp {
    let delete = DeleteRangeRequest { key: key.clone(), ..DeleteRangeRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestDeleteRange(delete)) }
}

/// The first key that an operation of a transaction read.
#[must_use]
pub fn first_of(response: Option<ResponseOp>) -> Option<KeyValue> {
    match response?.response? {
        response_op::Response::ResponseRange(range) => range.kvs.into_iter().next(),
        response_op::Response::ResponsePut(_)
        | response_op::Response::ResponseDeleteRange(_)
        | response_op::Response::ResponseTxn(_) => None,
    }
}

/// The revision of a header that is always there.
#[must_use]
pub fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.expect("our own answers have a header").revision
}

/// A place in line. Dropped, it is given up: the key goes, if it is still the one that took the place.
pub struct Place {
    caller: Arc<Caller>,
    key: Bytes,
    /// When the key was created, or since when, if that is not known yet.
    created: (CompareResult, i64),
    kept: bool,
}

/// What came of taking a place.
pub struct Taken {
    /// The header of the transaction that took it.
    pub header: ResponseHeader,
    /// The create revision of the key.
    pub created: i64,
    /// The key, if this lease stood in line before.
    pub before: Option<KeyValue>,
    /// The oldest key of the line.
    pub oldest: Option<KeyValue>,
}

impl Place {
    /// Takes the last place in line, or the one that this lease has already.
    pub async fn take(caller: &Arc<Caller>, name: &[u8], lease: i64, value: Bytes) -> Result<(Self, Taken), Refusal> {
        let key = key_of(name, lease);
        let head = caller.api.readers().keys.head();
        let txn = TxnRequest {
            compare: vec![created(&key, CompareResult::Equal, 0)],
            success: vec![put_op(&key, value, lease), range_op(oldest(name))],
            failure: vec![
                range_op(RangeRequest { key: key.clone(), ..RangeRequest::default() }),
                range_op(oldest(name)),
            ],
        };
        // Should the caller go while this is under way, a key that it creates goes too, but no older one.
        let caller = caller.clone();
        let mut place = Self { caller, key, created: (CompareResult::Greater, head), kept: false };
        let response: TxnResponse = place.caller.ask(Api::txn, &txn).await?;
        let mut responses = response.responses.into_iter();
        let before = first_of(responses.next());
        let header = response.header.expect("our own answers have a header");
        let created = before.as_ref().map_or(header.revision, |key_value| key_value.create_revision);
        place.created = (CompareResult::Equal, created);
        Ok((place, Taken { header, created, before, oldest: first_of(responses.next()) }))
    }

    /// The key that stands in line.
    #[must_use]
    pub fn key(&self) -> &Bytes {
        &self.key
    }

    /// Stays, whatever becomes of the caller.
    pub fn keep(mut self) -> Bytes {
        self.kept = true;
        self.key.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.kept {
            let (result, revision) = self.created;
            let compare = vec![created(&self.key, result, revision)];
            let leave = TxnRequest { compare, success: vec![delete_op(&self.key)], failure: Vec::new() };
            self.caller.tell(Api::txn, &leave);
        }
    }
}

/// Waits until no key of the line is older than `mine`. Whether `mine` is still there then is another question.
pub async fn await_turn(caller: &Caller, name: &[u8], mine: i64) -> Result<(), Refusal> {
    let (key, range_end) = prefix(name);
    let predecessor = RangeRequest {
        key,
        range_end,
        limit: 1,
        sort_order: SortOrder::Descend as i32,
        sort_target: SortTarget::Create as i32,
        max_create_revision: mine - 1,
        keys_only: true,
        ..RangeRequest::default()
    };
    loop {
        let found: RangeResponse = caller.ask(Api::range, &predecessor).await?;
        let from = revision(found.header.as_ref()) + 1;
        let Some(predecessor) = found.kvs.into_iter().next() else { return Ok(()) };
        let mut changes = caller.follow(Interval::Key(predecessor.key), from);
        while let Some(change) = changes.next().await? {
            if change.events.iter().any(|event| event.r#type() == EventType::Delete) {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_named_as_etcds_clients_name_them() {
        assert_eq!(key_of(b"a", 0x694d_71dd_b1f3_1e02), "a/694d71ddb1f31e02");
        assert_eq!(key_of(b"", 5), "/5");
        assert_eq!(key_of(b"a/b", -8), "a/b/-8");
        assert_eq!(key_of(b"a", i64::MIN), "a/-8000000000000000");
    }

    #[test]
    fn a_line_is_told_from_others_whose_names_begin_alike() {
        let (key, range_end) = prefix(b"test");
        let line = Interval::new(key, range_end);
        assert!(line.contains(&key_of(b"test", 1)) && line.contains(b"test/other/1"));
        assert!(!line.contains(&key_of(b"testa", 1)) && !line.contains(b"test"));
    }
}
