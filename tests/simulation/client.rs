//! The random commands of clients, and the membership changes of operators.

use bytes::Bytes;
use metastore::{
    proto::etcdserverpb::{
        CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, Member,
        MemberPromoteRequest, MemberRemoveRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op,
    },
    state::{Command, Kind, NewMember, Request},
};
use prost::Message;

use super::rng::Rng;

/// Numbers of keys: so few that commands contend, or so many that the index has more than one leaf.
pub const KEY_SPACES: [usize; 3] = [6, 12, 300];
const LEASES: i64 = 4;

/// A random command of a client that assumes the head revision to be about `head`.
pub fn command(rng: &mut Rng, keys: usize, id: u64, head: i64) -> Request {
    match rng.below(100) {
        0..50 => Request::Put(put(rng, keys, id)),
        50..62 => Request::DeleteRange(delete(rng, keys)),
        62..82 => Request::Txn(txn(rng, keys, id, head)),
        82..88 => {
            let revision = rng.between((head - 30).max(1), head + 2);
            Request::Compact(CompactionRequest { revision, physical: false })
        }
        88..95 => Request::LeaseGrant(LeaseGrantRequest { id: rng.between(1, LEASES), ttl: *rng.pick(&[2, 5, 60]) }),
        _ => Request::LeaseRevoke(LeaseRevokeRequest { id: rng.between(1, LEASES) }),
    }
}

/// The command as a client sends it.
pub fn encode(request: &Request) -> (Kind, Vec<u8>) {
    match request {
        Request::Put(put) => (Kind::Put, put.encode_to_vec()),
        Request::DeleteRange(delete) => (Kind::DeleteRange, delete.encode_to_vec()),
        Request::Txn(txn) => (Kind::Txn, txn.encode_to_vec()),
        Request::Compact(compact) => (Kind::Compact, compact.encode_to_vec()),
        Request::LeaseGrant(grant) => (Kind::LeaseGrant, grant.encode_to_vec()),
        Request::LeaseRevoke(revoke) => (Kind::LeaseRevoke, revoke.encode_to_vec()),
        Request::Alarm(_)
        | Request::Auth(_)
        | Request::CapabilityLevelSet(_)
        | Request::LeaseExpire(_)
        | Request::ClusterVersionSet(_)
        | Request::MemberAttributesSet(_)
        | Request::MemberAdd(_)
        | Request::MemberRemove(_)
        | Request::MemberPromote(_)
        | Request::MemberUpdate(_)
        | Request::Unknown(_) => panic!("clients of the simulation send no {request:?}"),
    }
}

/// A membership change requested by an operator.
#[derive(Debug, Clone, Copy)]
pub enum MembershipChange {
    Add { id: u64, learner: bool, max_learners: Option<u64> },
    Remove(u64),
    Promote(u64),
}

impl MembershipChange {
    /// The entry that proposes it.
    pub fn encode(self, request_id: u64) -> Bytes {
        let (kind, bytes) = match self {
            Self::Add { id, learner, max_learners } => {
                let peer_ur_ls = vec![format!("http://{id}")];
                let member = Member { id, peer_ur_ls, is_learner: learner, ..Member::default() };
                (Kind::MemberAdd, NewMember { member, max_learners }.encode())
            }
            Self::Remove(id) => (Kind::MemberRemove, MemberRemoveRequest { id }.encode_to_vec()),
            Self::Promote(id) => (Kind::MemberPromote, MemberPromoteRequest { id }.encode_to_vec()),
        };
        Command::encode(request_id, kind, &bytes)
    }
}

fn key(nth: usize) -> Bytes {
    Bytes::from(format!("key{nth:03}"))
}

fn put(rng: &mut Rng, keys: usize, id: u64) -> PutRequest {
    let nth = rng.below(keys);
    put_to(rng, id, nth)
}

fn put_to(rng: &mut Rng, id: u64, nth: usize) -> PutRequest {
    let lease = if rng.percent(20) { rng.between(1, LEASES) } else { 0 };
    let mut put = PutRequest { key: key(nth), value: format!("value {id}").into(), lease, ..PutRequest::default() };
    put.prev_kv = rng.percent(20);
    if rng.percent(5) {
        (put.ignore_value, put.value) = (true, Bytes::new());
    }
    if rng.percent(5) {
        (put.ignore_lease, put.lease) = (true, 0);
    }
    put
}

fn delete(rng: &mut Rng, keys: usize) -> DeleteRangeRequest {
    let first = rng.below(keys);
    let range_end = match rng.below(10) {
        0..7 => Bytes::new(),
        7..9 => key(first + rng.below(4)),
        _ => Bytes::from_static(&[0]),
    };
    DeleteRangeRequest { key: key(first), range_end, prev_kv: rng.percent(30) }
}

/// A transaction that names no key twice in one branch, as the API requires.
fn txn(rng: &mut Rng, keys: usize, id: u64, head: i64) -> TxnRequest {
    let compare = (0..rng.below(3)).map(|_| compare(rng, keys, head)).collect();
    let mut branch = || {
        let first = rng.below(keys);
        (first..(first + rng.below(4)).min(keys)).map(|nth| op(rng, id, nth, head)).collect()
    };
    TxnRequest { compare, success: branch(), failure: branch() }
}

fn op(rng: &mut Rng, id: u64, nth: usize, head: i64) -> RequestOp {
    use request_op::Request;
    let request = match rng.below(10) {
        0..6 => Request::RequestPut(put_to(rng, id, nth)),
        6..8 => Request::RequestDeleteRange(DeleteRangeRequest { key: key(nth), ..DeleteRangeRequest::default() }),
        _ => {
            let revision = if rng.percent(50) { 0 } else { rng.between((head - 10).max(1), head) };
            Request::RequestRange(RangeRequest {
                key: key(0),
                range_end: Bytes::from_static(&[0]),
                revision,
                ..RangeRequest::default()
            })
        }
    };
    RequestOp { request: Some(request) }
}

fn compare(rng: &mut Rng, keys: usize, head: i64) -> Compare {
    let results = [CompareResult::Equal, CompareResult::NotEqual, CompareResult::Greater, CompareResult::Less];
    let (target, union) = if rng.percent(50) {
        (CompareTarget::Mod, TargetUnion::ModRevision(rng.between((head - 20).max(0), head)))
    } else {
        (CompareTarget::Version, TargetUnion::Version(rng.between(0, 3)))
    };
    Compare {
        result: *rng.pick(&results) as i32,
        target: target as i32,
        key: key(rng.below(keys)),
        range_end: Bytes::new(),
        target_union: Some(union),
    }
}
