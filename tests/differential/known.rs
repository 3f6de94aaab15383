//! The intended differences. Each states what differs and why, and matches precisely the answers that it covers.

use metastore::proto::etcdserverpb::{
    HashKvResponse, RangeRequest, StatusResponse, TxnRequest, TxnResponse, request_op::Request, response_op::Response,
};

use super::{
    Etcd,
    answers::{Answer, Operation},
    generator::{self, Generator},
};

/// One intended difference.
pub struct KnownDifference {
    /// What differs, and why that is right.
    pub what: &'static str,
    /// Whether it covers this case, given the state before the operation, the operation, our answer, and etcd's.
    pub applies: fn(&Generator, &Operation, &Answer, &Answer) -> bool,
}

/// The differences from etcd 3.7.
pub const KNOWN: &[KnownDifference] = &[
    KnownDifference {
        what: "HashKV at revision 0 after a compaction at it: etcd stores the hash of that, ours does not.",
        applies: stored_compaction_hash,
    },
    KnownDifference {
        what: "HashKV at the revision of a compaction before a restart: etcd has lost the hash, ours has it again where the \
               compaction is replayed from its log.",
        applies: hash_stored_again,
    },
    KnownDifference {
        what: "A range of more than twelve keys sorted by something that can be equal: etcd leaves the order of ties \
               open, ours is by key.",
        applies: |_, operation, ours, theirs| unordered_ties_beyond(12, operation, ours, theirs),
    },
    KnownDifference {
        what: "Downgrade: not implemented yet.",
        applies: |_, operation, ours, _| {
            matches!((operation, ours), (Operation::Downgrade(_), Answer::Refused(tonic::Code::Unimplemented, _)))
        },
    },
];

/// The additional differences from an etcd older than 3.7.
pub const KNOWN_OF_OLD_ETCD: &[KnownDifference] = &[
    KnownDifference {
        what: "RangeStream: new in 3.7.",
        applies: |_, operation, _, theirs| {
            matches!((operation, theirs), (Operation::RangeStream(_), Answer::Refused(tonic::Code::Unimplemented, _)))
        },
    },
    KnownDifference {
        what: "HashKV has no hash revision: that is new in 3.6.",
        applies: |_, _, ours, theirs| {
            let (Answer::HashKv(ours), Answer::HashKv(theirs)) = (ours, theirs) else { return false };
            HashKvResponse { hash_revision: 0, ..*ours } == *theirs
        },
    },
    KnownDifference {
        what: "HashKV at the compact revision itself is refused as compacted.",
        applies: |before, operation, ours, theirs| {
            let (Operation::HashKv(request), Answer::HashKv(_)) = (operation, ours) else { return false };
            request.revision <= before.compacted()
                && matches!(theirs, Answer::Refused(_, text) if text.ends_with("has been compacted"))
        },
    },
    KnownDifference {
        what: "The order of ties is open from seven keys on: an older Go sorts differently.",
        applies: |_, operation, ours, theirs| unordered_ties_beyond(6, operation, ours, theirs),
    },
    KnownDifference {
        what: "The same in the ranges of a transaction.",
        applies: |_, _, ours, theirs| {
            let (Answer::Txn(ours), Answer::Txn(theirs)) = (ours, theirs) else { return false };
            in_key_order(ours) == in_key_order(theirs)
        },
    },
    KnownDifference {
        what: "A put in a transaction whose lease and key are both missing: the missing key is reported first.",
        applies: |_, operation, ours, theirs| {
            let missed = |answer: &Answer, what| matches!(answer, Answer::Refused(_, text) if text.ends_with(what));
            matches!(operation, Operation::Txn(_)) && missed(ours, "lease not found") && missed(theirs, "key not found")
        },
    },
    KnownDifference {
        what: "Status has another version, and lacks what is new in 3.6: storage version, quota, downgrade.",
        applies: |_, _, ours, theirs| {
            let (Answer::Status(ours), Answer::Status(theirs)) = (ours, theirs) else { return false };
            let old = StatusResponse {
                version: theirs.version.clone(),
                storage_version: String::new(),
                db_size_quota: 0,
                downgrade_info: None,
                ..ours.clone()
            };
            old == *theirs
        },
    },
];

/// Changes what an old etcd would execute differently, so that the two servers keep the same state. An old etcd treats an
/// invalid sort as none, where 3.7 refuses the request; with `keys_only` it still returns leases; at a restart it loses leases
/// with negative IDs and with the largest one; an alarm of an unknown type crashes it; and without space it counts nested
/// transactions as free.
pub fn adapt_to_old_etcd(operation: &mut Operation) {
    const CORRUPT: i32 = 2;
    match operation {
        Operation::Range(range) => adapt_range(range),
        Operation::Txn(txn) => adapt_txn(txn),
        Operation::Alarm(alarm) if alarm.action == 1 => alarm.alarm = CORRUPT,
        Operation::LeaseGrant(grant) if grant.id != 0 => grant.id = (grant.id & i64::MAX).clamp(1, i64::MAX - 1),
        _ => {}
    }
}

fn adapt_txn(txn: &mut TxnRequest) {
    for request in generator::operations(txn) {
        match request {
            Request::RequestRange(range) => adapt_range(range),
            Request::RequestTxn(txn) => adapt_txn(txn),
            Request::RequestPut(_) | Request::RequestDeleteRange(_) => {}
        }
    }
}

fn adapt_range(range: &mut RangeRequest) {
    range.sort_order = range.sort_order.clamp(0, 2);
    range.sort_target = range.sort_target.clamp(0, 4);
    range.keys_only = false;
}

/// The differences to expect from this etcd.
pub fn applicable(etcd: &Etcd) -> Vec<&'static KnownDifference> {
    KNOWN.iter().chain(KNOWN_OF_OLD_ETCD.iter().filter(|_| etcd.is_old)).collect()
}

fn in_key_order(answer: &TxnResponse) -> TxnResponse {
    let mut answer = answer.clone();
    for response in answer.responses.iter_mut().filter_map(|op| op.response.as_mut()) {
        match response {
            Response::ResponseRange(range) => range.kvs.sort_by(|a, b| a.key.cmp(&b.key)),
            Response::ResponseTxn(txn) => *txn = in_key_order(txn),
            Response::ResponsePut(_) | Response::ResponseDeleteRange(_) => {}
        }
    }
    answer
}

fn stored_compaction_hash(before: &Generator, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
    let (Operation::HashKv(request), Answer::HashKv(ours), Answer::HashKv(theirs)) = (operation, ours, theirs) else {
        return false;
    };
    // To etcd it is then a revision of its own, and no longer a synonym for the head.
    request.revision == 0 && ours.header == theirs.header && before.etcd_may_have_stored_hash(0)
}

fn hash_stored_again(before: &Generator, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
    let (Operation::HashKv(request), Answer::HashKv(ours)) = (operation, ours) else { return false };
    let is_forgotten = match theirs {
        Answer::HashKv(theirs) => {
            (&ours.header, ours.hash_revision) == (&theirs.header, theirs.hash_revision)
                && ours.compact_revision < theirs.compact_revision
        }
        Answer::Refused(_, text) => text.ends_with("has been compacted") && request.revision < before.compacted(),
        _ => false,
    };
    is_forgotten && before.was_compacted_before_the_restart(request.revision)
}

fn unordered_ties_beyond(keys: i64, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
    let (Operation::Range(request), Answer::Range(ours), Answer::Range(theirs)) = (operation, ours, theirs) else {
        return false;
    };
    let Some(rank) = rank(request) else { return false };
    let ranks = |kvs: &[_]| kvs.iter().map(rank).collect::<Vec<_>>();
    ours.count > keys
        && (&ours.header, ours.more, ours.count) == (&theirs.header, theirs.more, theirs.count)
        && ranks(&ours.kvs) == ranks(&theirs.kvs)
}

type Rank = fn(&metastore::proto::mvccpb::KeyValue) -> (i64, bytes::Bytes);

/// The value by which a range is sorted, if it can be equal for several keys.
fn rank(request: &RangeRequest) -> Option<Rank> {
    Some(match request.sort_target {
        1 => |kv| (kv.version, bytes::Bytes::new()),
        2 => |kv| (kv.create_revision, bytes::Bytes::new()),
        3 => |kv| (kv.mod_revision, bytes::Bytes::new()),
        4 => |kv| (0, kv.value.clone()),
        _ => return None,
    })
}
