//! The committed history and its result: nothing that happens to a member may change it or make it shorter.

use std::{collections::BTreeMap, sync::Arc};

use metastore::{
    error::Error,
    mvcc::Reader,
    proto::etcdserverpb::{
        DeleteRangeResponse, LeaseGrantResponse, MemberAddResponse, MemberListResponse, PutResponse, TxnResponse,
        response_op::Response as OpResponse,
    },
    state::{self, Command, Machine, Members, Readers, Request, Response},
    storage::memory::Memory,
};
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType};

use super::{
    member::CLUSTER,
    model::{Answer, Model, Outcome},
};

/// The state at every n-th index is compared between members.
const COMPARE_EVERY: u64 = 3;

/// The committed history.
pub struct History {
    founders: Members,
    pub bootstrap_index: u64,
    entries: BTreeMap<u64, state::Entry>,
    pub model: Model,
    /// By the command's ID.
    outcomes: BTreeMap<u64, Outcome>,
    /// The state at an index, as the first member to reach it had it.
    digests: BTreeMap<u64, Digest>,
    /// Leases that were granted or revoked, not checked yet.
    pub lease_changes: Vec<LeaseChange>,
    /// Members that were added and not started yet.
    pub added_members: Vec<u64>,
    /// The index at which each removed member was removed.
    pub removals: BTreeMap<u64, u64>,
}

/// A lease was granted or revoked.
#[derive(Debug, Clone, Copy)]
pub enum LeaseChange {
    Granted { lease: i64, ttl_seconds: i64 },
    Revoked { lease: i64, command: u64 },
}

/// A state as hashes and counters.
type Digest = (u64, i64, i64, u32, u32);

impl History {
    pub fn new(founders: Members) -> Self {
        Self {
            bootstrap_index: founders.iter().count() as u64,
            model: Model::new(founders.iter().map(|member| member.id)),
            founders,
            entries: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            digests: BTreeMap::new(),
            lease_changes: Vec::new(),
            added_members: Vec::new(),
            removals: BTreeMap::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn last_index(&self) -> u64 {
        self.entries.last_key_value().map_or(self.bootstrap_index, |(last, _)| *last)
    }

    /// The index and term of the last entry that was committed in an earlier term than this.
    pub fn last_before(&self, term: u64) -> Option<(u64, u64)> {
        let entry = self.entries.values().rev().find(|entry| entry.term < term)?;
        Some((entry.index, entry.term))
    }

    /// A member is about to apply an entry, as the first one or again.
    pub fn observe(&mut self, entry: &Entry) {
        let entry = to_state_entry(entry);
        if let Some(before) = self.entries.get(&entry.index) {
            let same =
                (before.term, &before.data, before.changes_members) == (entry.term, &entry.data, entry.changes_members);
            assert!(same, "entry {} was committed as {before:?}, and is now {entry:?}", entry.index);
            return;
        }
        let next = self.last_index() + 1;
        assert_eq!(entry.index, next, "entries are handed over without gaps");
        if !entry.data.is_empty() {
            let command = Command::decode(entry.data.clone()).expect("the simulation proposes only what it can decode");
            let outcome = self.model.apply(&command.request);
            if outcome.is_ok() {
                self.note(entry.index, command.id, &command.request);
            }
            let before = self.outcomes.insert(command.id, outcome);
            assert!(before.is_none(), "command {} is committed twice", command.id);
        }
        self.entries.insert(entry.index, entry);
    }

    fn note(&mut self, index: u64, id: u64, request: &Request) {
        match request {
            Request::LeaseGrant(grant) => {
                self.lease_changes.push(LeaseChange::Granted { lease: grant.id, ttl_seconds: grant.ttl });
            }
            Request::LeaseRevoke(revoke) => {
                self.lease_changes.push(LeaseChange::Revoked { lease: revoke.id, command: id });
            }
            Request::MemberAdd(newcomer) => self.added_members.push(newcomer.member.id),
            Request::MemberRemove(remove) => _ = self.removals.insert(remove.id, index),
            _ => (),
        }
    }

    /// Checks the answer to a command. Returns its revision if the command succeeded.
    pub fn check_answer(&self, id: u64, outcome: Result<Response, Error>) -> Option<i64> {
        let expected = self.outcomes.get(&id);
        let expected = expected.unwrap_or_else(|| panic!("command {id} is answered before it is committed"));
        let outcome = outcome.map(|response| {
            let expected_kind = expected.as_ref().map_or(&Answer::Nothing, |(_, answer)| answer);
            (response.revision, decode(expected_kind, &response.body))
        });
        assert_eq!(&outcome, expected, "the answer to command {id}");
        outcome.ok().map(|(revision, _)| revision)
    }

    /// A member has reached this state: at some indexes it is compared with the state of other members there.
    pub fn check_state(&mut self, index: u64, readers: &Readers) {
        if index.is_multiple_of(COMPARE_EVERY) {
            let digest = digest(index, readers);
            let first = *self.digests.entry(index).or_insert(digest);
            assert_eq!(digest, first, "members differ at index {index}");
        }
    }

    /// The state of a member that applies the whole history without any fault.
    pub fn replay(&self) -> Readers {
        let memory = Arc::new(Memory::default());
        Machine::bootstrap(memory.as_ref(), CLUSTER, &self.founders, (self.bootstrap_index, 1))
            .expect("memory does not fail");
        let mut machine = Machine::open(memory, 0).expect("memory does not fail");
        for entry in self.entries.values() {
            machine.apply(entry).expect("memory does not fail");
            machine.commit().expect("memory does not fail");
            machine.publish_head();
        }
        machine.readers()
    }
}

/// The entry as the state machine receives it.
fn to_state_entry(entry: &Entry) -> state::Entry {
    let changes_members = entry.entry_type != EntryType::EntryNormal;
    let data = if changes_members {
        ConfChange::parse_from_carllerche_bytes(&entry.data).expect("a membership change").context
    } else {
        entry.data.clone()
    };
    state::Entry { index: entry.index, term: entry.term, data, changes_members }
}

fn digest(index: u64, readers: &Readers) -> Digest {
    let Ok(hash) = readers.keys.hash_kv(0) else { panic!("the history at index {index} cannot be read") };
    let mut rest = 0;
    for (id, ttl) in readers.leases.all() {
        let mut keys = readers.leases.keys(id).unwrap_or_default();
        keys.sort_unstable();
        rest = crc32c::crc32c_append(rest, format!("{id:?} {ttl} {keys:?}").as_bytes());
    }
    let cluster = readers.cluster.read();
    for member in cluster.members.iter() {
        rest = crc32c::crc32c_append(rest, &member.encode_to_vec());
    }
    let removed: Vec<u64> = cluster.members.removed().collect();
    rest = crc32c::crc32c_append(rest, format!("{removed:?}").as_bytes());
    (index, readers.keys.head(), readers.keys.compacted(), hash.hash, rest)
}

/// Compares the hashes of two key spaces at every revision that can be read. Revisions with a stored compaction hash are left
/// out: in a replay that never removes anything, compactions store no hash to compare with.
pub fn check_hashes(ours: &Reader, theirs: &Reader) {
    let stored = ours.compaction_hashes();
    let has_stored_hash = |revision: i64| stored.iter().any(|hash| hash.hash_revision == revision);
    for revision in (ours.compacted().max(1)..=ours.head()).chain([0]).filter(|revision| !has_stored_hash(*revision)) {
        let (ours, theirs) = (ours.hash_kv(revision), theirs.hash_kv(revision));
        let equal = matches!((&ours, &theirs), (Ok(ours), Ok(theirs)) if ours == theirs);
        assert!(equal, "the hash at revision {revision}: {ours:?}, and without faults {theirs:?}");
    }
}

/// Decodes an answer, without headers.
fn decode(expected_kind: &Answer, body: &[u8]) -> Answer {
    match expected_kind {
        Answer::Put(_) => Answer::Put(PutResponse::decode(body).expect("an answer")),
        Answer::Delete(_) => Answer::Delete(DeleteRangeResponse::decode(body).expect("an answer")),
        Answer::Grant(_) => Answer::Grant(LeaseGrantResponse::decode(body).expect("an answer")),
        Answer::Nothing => Answer::Nothing,
        Answer::Members(Some(_), _) => {
            let response = MemberAddResponse::decode(body).expect("an answer");
            let members = response.members.iter().map(|member| (member.id, member.is_learner)).collect();
            Answer::Members(response.member.map(|member| member.id), members)
        }
        Answer::Members(None, _) => {
            let response = MemberListResponse::decode(body).expect("an answer");
            Answer::Members(None, response.members.iter().map(|member| (member.id, member.is_learner)).collect())
        }
        Answer::Txn(_) => {
            let mut txn = TxnResponse::decode(body).expect("an answer");
            for op in &mut txn.responses {
                match op.response.as_mut().expect("filled") {
                    OpResponse::ResponseRange(range) => range.header = None,
                    OpResponse::ResponsePut(put) => put.header = None,
                    OpResponse::ResponseDeleteRange(delete) => delete.header = None,
                    OpResponse::ResponseTxn(txn) => txn.header = None,
                }
            }
            Answer::Txn(txn)
        }
    }
}
