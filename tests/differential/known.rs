//! The differences that are meant. Each names what differs and why, and says precisely whom it excuses.

use metastore::proto::etcdserverpb::{
    HashKvResponse, RangeRequest, StatusResponse, TxnRequest, TxnResponse, request_op::Request, response_op::Response,
};

use super::{
    Etcd,
    answers::{Answer, Operation},
    chooser::{self, Chooser},
};

/// One difference that is meant.
pub struct Known {
    /// What differs, and why that is right.
    pub what: &'static str,
    /// Whether it is this one: what was known before the operation, the operation, our answer, etcd's.
    pub excuses: fn(&Chooser, &Operation, &Answer, &Answer) -> bool,
}

/// All of them.
pub const KNOWN: &[Known] = &[
    Known {
        what: "HashKV at revision 0, once that was compacted at: etcd remembers the hash of it, and ours none.",
        excuses: remembered_hash,
    },
    Known {
        what: "HashKV at a revision that was compacted at before a restart: etcd has forgotten the hash, ours knows it again \
               where its log plays the compaction again.",
        excuses: known_again,
    },
    Known {
        what: "A range sorted by something of which more than twelve keys may have the same: etcd leaves their order \
               open, ours is by key.",
        excuses: |_, operation, ours, theirs| open_ties_beyond(12, operation, ours, theirs),
    },
    Known {
        what: "Downgrade: not yet.",
        excuses: |_, operation, ours, _| {
            matches!((operation, ours), (Operation::Downgrade(_), Answer::Refused(tonic::Code::Unimplemented, _)))
        },
    },
];

/// What an etcd older than 3.7 answers otherwise, beside all the rest.
pub const OF_OLD: &[Known] = &[
    Known {
        what: "RangeStream: new in 3.7.",
        excuses: |_, operation, _, theirs| {
            matches!((operation, theirs), (Operation::RangeStream(_), Answer::Refused(tonic::Code::Unimplemented, _)))
        },
    },
    Known {
        what: "HashKV does not say of which revision the hash is: that is new in 3.6.",
        excuses: |_, _, ours, theirs| {
            let (Answer::HashKv(ours), Answer::HashKv(theirs)) = (ours, theirs) else { return false };
            HashKvResponse { hash_revision: 0, ..*ours } == *theirs
        },
    },
    Known {
        what: "HashKV at the compact revision itself is refused as compacted.",
        excuses: |before, operation, ours, theirs| {
            let (Operation::HashKv(request), Answer::HashKv(_)) = (operation, ours) else { return false };
            request.revision <= before.compacted()
                && matches!(theirs, Answer::Refused(_, text) if text.ends_with("has been compacted"))
        },
    },
    Known {
        what: "The order of equals is open from seven keys on: an older Go sorts otherwise.",
        excuses: |_, operation, ours, theirs| open_ties_beyond(6, operation, ours, theirs),
    },
    Known {
        what: "The same in a transaction's ranges.",
        excuses: |_, _, ours, theirs| {
            let (Answer::Txn(ours), Answer::Txn(theirs)) = (ours, theirs) else { return false };
            in_key_order(ours) == in_key_order(theirs)
        },
    },
    Known {
        what: "Of a put in a transaction that lacks its lease and its key, the key is missed first.",
        excuses: |_, operation, ours, theirs| {
            let missed = |answer: &Answer, what| matches!(answer, Answer::Refused(_, text) if text.ends_with(what));
            matches!(operation, Operation::Txn(_)) && missed(ours, "lease not found") && missed(theirs, "key not found")
        },
    },
    Known {
        what: "Status has another version, and not what is new in 3.6: storage version, quota, downgrade.",
        excuses: |_, _, ours, theirs| {
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

/// Takes out of an operation what an old etcd does otherwise and what would drive the two apart. It takes a sort that does not
/// exist for none, where 3.7 refuses the request; with `keys_only` it still tells leases; a restart forgets leases with
/// negative IDs and the largest; an alarm of no known type ends it; and without space it takes nested transactions for free.
pub fn spare_old(operation: &mut Operation) {
    const CORRUPT: i32 = 2;
    match operation {
        Operation::Range(range) => spare_range(range),
        Operation::Txn(txn) => spare_txn(txn),
        Operation::Alarm(alarm) if alarm.action == 1 => alarm.alarm = CORRUPT,
        Operation::LeaseGrant(grant) if grant.id != 0 => grant.id = (grant.id & i64::MAX).clamp(1, i64::MAX - 1),
        _ => {}
    }
}

fn spare_txn(txn: &mut TxnRequest) {
    for request in chooser::operations(txn) {
        match request {
            Request::RequestRange(range) => spare_range(range),
            Request::RequestTxn(txn) => spare_txn(txn),
            Request::RequestPut(_) | Request::RequestDeleteRange(_) => {}
        }
    }
}

fn spare_range(range: &mut RangeRequest) {
    range.sort_order = range.sort_order.clamp(0, 2);
    range.sort_target = range.sort_target.clamp(0, 4);
    range.keys_only = false;
}

/// Those that count beside an etcd.
pub fn beside(etcd: &Etcd) -> Vec<&'static Known> {
    KNOWN.iter().chain(OF_OLD.iter().filter(|_| etcd.is_old)).collect()
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

fn remembered_hash(before: &Chooser, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
    let (Operation::HashKv(request), Answer::HashKv(ours), Answer::HashKv(theirs)) = (operation, ours, theirs) else {
        return false;
    };
    // It is a revision of its own to etcd then, and no longer a word for the head.
    request.revision == 0 && ours.header == theirs.header && before.hash_is_remembered(0)
}

fn known_again(before: &Chooser, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
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

fn open_ties_beyond(keys: i64, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
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

/// By what a range is sorted, if several keys can have the same of it.
fn rank(request: &RangeRequest) -> Option<Rank> {
    Some(match request.sort_target {
        1 => |kv| (kv.version, bytes::Bytes::new()),
        2 => |kv| (kv.create_revision, bytes::Bytes::new()),
        3 => |kv| (kv.mod_revision, bytes::Bytes::new()),
        4 => |kv| (0, kv.value.clone()),
        _ => return None,
    })
}
