//! The queue that locks and elections share.
//!
//! A queue is all keys below a name, in the order of their create revisions. The entry with the lowest one holds the lock or is
//! the leader. Each of the others waits for its predecessor only, so a deleted entry wakes one waiter. Keys that were put below
//! the name by other means are entries, too.
//!
//! ```text
//! lock "a"   a/694d71ddb1f31e02   create 5   holds the lock
//!            a/694d71ddb1f31e0c   create 7   waits for the entry at 5
//!            a/-8                 create 9   waits for the entry at 7
//! ```

use std::fmt::Write;

use bytes::Bytes;

use super::Session;
use crate::{
    error::Error,
    mvcc::Interval,
    proto::{
        etcdserverpb::{
            Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, ResponseOp,
            TxnRequest,
            compare::{CompareResult, CompareTarget, TargetUnion},
            range_request::{SortOrder, SortTarget},
            request_op, response_op,
        },
        mvccpb::{KeyValue, event::EventType},
    },
};

/// The TTL of the lease that is granted if the request names none. The server does not keep it alive.
const LEASE_SECONDS: i64 = 60;

/// The keys of a queue, as a start and an end.
#[must_use]
pub fn prefix(name: &[u8]) -> (Bytes, Bytes) {
    const AFTER_SLASH: u8 = b'/' + 1;
    ([name, b"/"].concat().into(), [name, &[AFTER_SLASH]].concat().into())
}

/// The key of a lease's entry.
#[must_use]
pub fn entry_key(name: &[u8], lease: i64) -> Bytes {
    let mut digits = String::from(if lease < 0 { "/-" } else { "/" });
    write!(digits, "{:x}", lease.unsigned_abs()).expect("writing to a string cannot fail");
    [name, digits.as_bytes()].concat().into()
}

/// The lease of the request, without checking that it exists; or a new one if the request names none.
pub async fn lease_or_new(session: &Session, lease: i64) -> Result<i64, Error> {
    if lease != 0 {
        return Ok(lease);
    }
    let grant = LeaseGrantRequest { ttl: LEASE_SECONDS, id: 0 };
    Ok(session.lease_grant(grant).await?.id)
}

/// A request for the oldest entry of a queue.
#[must_use]
pub fn oldest_entry(name: &[u8]) -> RangeRequest {
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

/// Compares a key's create revision.
#[must_use]
pub fn compare_create_revision(key: &Bytes, result: CompareResult, revision: i64) -> Compare {
    Compare {
        key: key.clone(),
        result: result as i32,
        target: CompareTarget::Create as i32,
        target_union: Some(TargetUnion::CreateRevision(revision)),
        ..Compare::default()
    }
}

/// A Range in a transaction.
#[must_use]
pub fn range_op(range: RangeRequest) -> RequestOp {
    RequestOp { request: Some(request_op::Request::RequestRange(range)) }
}

/// A Put in a transaction.
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
pub fn first_key_value(response: Option<ResponseOp>) -> Option<KeyValue> {
    match response?.response? {
        response_op::Response::ResponseRange(range) => range.kvs.into_iter().next(),
        response_op::Response::ResponsePut(_)
        | response_op::Response::ResponseDeleteRange(_)
        | response_op::Response::ResponseTxn(_) => None,
    }
}

/// An entry of a queue. Dropping it leaves the queue: the key is deleted, provided that it is still the one that this entry
/// created or found.
pub struct QueueEntry {
    session: Session,
    key: Bytes,
    /// The create revision of the key, or a lower bound while it is not known yet.
    created: (CompareResult, i64),
    kept: bool,
}

/// The outcome of joining a queue.
pub struct Enqueued {
    /// The revision of the transaction.
    pub revision: i64,
    /// The create revision of the key.
    pub created: i64,
    /// The key as it was, if this lease was in the queue before.
    pub before: Option<KeyValue>,
    /// The oldest entry of the queue.
    pub oldest: Option<KeyValue>,
}

impl QueueEntry {
    /// Joins the queue at its end, or finds the entry that this lease has already.
    pub async fn enqueue(session: &Session, name: &[u8], lease: i64, value: Bytes) -> Result<(Self, Enqueued), Error> {
        let key = entry_key(name, lease);
        let head = session.head();
        let txn = TxnRequest {
            compare: vec![compare_create_revision(&key, CompareResult::Equal, 0)],
            success: vec![put_op(&key, value, lease), range_op(oldest_entry(name))],
            failure: vec![
                range_op(RangeRequest { key: key.clone(), ..RangeRequest::default() }),
                range_op(oldest_entry(name)),
            ],
        };
        // If the call is canceled during the transaction, a key that it creates is deleted, but not an older one.
        let mut entry = Self { session: session.clone(), key, created: (CompareResult::Greater, head), kept: false };
        let (revision, response) = session.txn(txn).await?;
        let mut responses = response.responses.into_iter();
        let before = first_key_value(responses.next());
        let created = before.as_ref().map_or(revision, |key_value| key_value.create_revision);
        entry.created = (CompareResult::Equal, created);
        Ok((entry, Enqueued { revision, created, before, oldest: first_key_value(responses.next()) }))
    }

    /// The key of this entry.
    #[must_use]
    pub fn key(&self) -> &Bytes {
        &self.key
    }

    /// Keeps the entry in the queue after this value is dropped, and returns its key.
    pub fn keep(mut self) -> Bytes {
        self.kept = true;
        self.key.clone()
    }
}

impl Drop for QueueEntry {
    fn drop(&mut self) {
        if !self.kept {
            let (result, created) = self.created;
            let compare = vec![compare_create_revision(&self.key, result, created)];
            let delete = TxnRequest { compare, success: vec![delete_op(&self.key)], failure: Vec::new() };
            self.session.txn_detached(delete);
        }
    }
}

/// Waits until no entry is older than `mine`. Does not check that `mine` still exists then.
pub async fn await_turn(session: &Session, name: &[u8], mine: i64) -> Result<(), Error> {
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
        let (head, found) = session.range(predecessor.clone()).await?;
        let Some(predecessor) = found.into_iter().next() else { return Ok(()) };
        let mut changes = session.watch(Interval::Key(predecessor.key), head + 1);
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
    fn entry_keys_are_those_of_etcds_clients() {
        assert_eq!(entry_key(b"a", 0x694d_71dd_b1f3_1e02), "a/694d71ddb1f31e02");
        assert_eq!(entry_key(b"", 5), "/5");
        assert_eq!(entry_key(b"a/b", -8), "a/b/-8");
        assert_eq!(entry_key(b"a", i64::MIN), "a/-8000000000000000");
    }

    #[test]
    fn a_queue_does_not_contain_keys_of_names_that_begin_alike() {
        let (key, range_end) = prefix(b"test");
        let queue = Interval::new(key, range_end);
        assert!(queue.contains(&entry_key(b"test", 1)) && queue.contains(b"test/other/1"));
        assert!(!queue.contains(&entry_key(b"testa", 1)) && !queue.contains(b"test"));
    }
}
