//! The differences that are meant. Each names what differs and why, and says precisely whom it excuses.

use metastore::proto::etcdserverpb::RangeRequest;

use super::{
    answers::{Answer, Operation},
    chooser::Chooser,
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
        what: "HashKV at a revision that was compacted at: etcd answers from a memory of the ten newest compactions, as \
               before that compaction, and a restart forgets it; ours computes it, as etcd does after a restart.",
        excuses: remembered_hash,
    },
    Known {
        what: "A range sorted by something of which more than twelve keys may have the same: etcd leaves their order \
               open, ours is by key.",
        excuses: open_ties,
    },
    Known {
        what: "Downgrade: not yet.",
        excuses: |_, operation, ours, _| {
            matches!((operation, ours), (Operation::Downgrade(_), Answer::Refused(tonic::Code::Unimplemented, _)))
        },
    },
];

fn remembered_hash(before: &Chooser, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
    let (Operation::HashKv(request), Answer::HashKv(theirs)) = (operation, theirs) else { return false };
    let same = match ours {
        // Once 0 was compacted at, it is a revision of its own to etcd, and no longer a word for the head.
        Answer::HashKv(ours) => {
            ours.header == theirs.header && (ours.hash_revision == theirs.hash_revision || request.revision == 0)
        }
        Answer::Refused(_, text) => text.ends_with("has been compacted") && request.revision < before.compacted(),
        _ => false,
    };
    same && before.hash_is_remembered(request.revision)
}

fn open_ties(_: &Chooser, operation: &Operation, ours: &Answer, theirs: &Answer) -> bool {
    let (Operation::Range(request), Answer::Range(ours), Answer::Range(theirs)) = (operation, ours, theirs) else {
        return false;
    };
    let Some(rank) = rank(request) else { return false };
    let ranks = |kvs: &[_]| kvs.iter().map(rank).collect::<Vec<_>>();
    ours.count > 12
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
