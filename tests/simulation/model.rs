//! A minimal model of etcd's key space: ordered maps, with no sharing, durability or optimisation.
//!
//! It keeps every change for ever, so any revision can be read, and it computes the answer to each command.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use metastore::{
    error::Error,
    proto::{
        etcdserverpb::{
            Compare, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest, LeaseGrantResponse, Member,
            PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, ResponseOp, TxnRequest, TxnResponse,
            compare::{CompareResult, CompareTarget, TargetUnion},
            request_op, response_op,
        },
        mvccpb::KeyValue,
    },
    state::Request,
};

/// The answer to a command, without the revision of its header.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Put(PutResponse),
    Delete(DeleteRangeResponse),
    Txn(TxnResponse),
    Grant(LeaseGrantResponse),
    /// The member that was added, if any; and all members, with whether they are learners.
    Members(Option<u64>, Vec<(u64, bool)>),
    Nothing,
}

/// A revision and an answer, or an error.
pub type Outcome = Result<(i64, Answer), Error>;

/// The key space.
#[derive(Debug, Clone)]
pub struct Model {
    /// Each key's states, by the revision that created them; `None` means deleted.
    keys: BTreeMap<Bytes, BTreeMap<i64, Option<KeyValue>>>,
    pub leases: BTreeMap<i64, BTreeSet<Bytes>>,
    /// Members by ID; true for learners.
    pub members: BTreeMap<u64, bool>,
    removed: BTreeSet<u64>,
    pub head: i64,
    pub compacted: i64,
}

impl Model {
    /// A cluster of these voters.
    pub fn new(founders: impl IntoIterator<Item = u64>) -> Self {
        Self {
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            members: founders.into_iter().map(|id| (id, false)).collect(),
            removed: BTreeSet::new(),
            head: 1,
            compacted: -1,
        }
    }

    /// Executes a command.
    pub fn apply(&mut self, request: &Request) -> Outcome {
        // Other commands fail before they change anything.
        let before = matches!(request, Request::Txn(_)).then(|| self.clone());
        let outcome = self.execute(request);
        if let Some(before) = before.filter(|_| outcome.is_err()) {
            *self = before;
        }
        outcome
    }

    /// The changes of a revision, by key; `None` means deleted.
    pub fn changes_at(&self, revision: i64) -> Vec<(Bytes, Option<KeyValue>)> {
        let change =
            |(key, states): (&Bytes, &BTreeMap<i64, _>)| Some((key.clone(), Option::clone(states.get(&revision)?)));
        self.keys.iter().filter_map(change).collect()
    }

    /// All keys that exist at a revision.
    pub fn state_at(&self, revision: i64) -> Vec<KeyValue> {
        self.keys.keys().filter_map(|key| self.get(key, revision)).collect()
    }

    fn execute(&mut self, request: &Request) -> Outcome {
        let next = self.head + 1;
        let answer = match request {
            Request::Put(put) => Answer::Put(self.put(put, next)?),
            Request::DeleteRange(delete) => Answer::Delete(self.delete_range(delete, next)),
            Request::Txn(txn) => Answer::Txn(self.txn(txn, next)?),
            Request::Compact(compact) if compact.revision <= self.compacted => return Err(Error::Compacted),
            Request::Compact(compact) if compact.revision > self.head => return Err(Error::FutureRev),
            Request::Compact(compact) => {
                self.compacted = compact.revision;
                Answer::Nothing
            }
            Request::LeaseGrant(grant) => Answer::Grant(self.grant(grant)?),
            Request::LeaseRevoke(revoke) | Request::LeaseExpire(revoke) => {
                let keys = self.leases.remove(&revoke.id).ok_or(Error::LeaseNotFound)?;
                for key in keys {
                    self.set(&key, next, None);
                }
                Answer::Nothing
            }
            // The headers of these answers have no revision.
            Request::MemberAdd(newcomer) => {
                return self.add(&newcomer.member, newcomer.max_learners).map(|answer| (0, answer));
            }
            Request::MemberRemove(remove) => return self.remove(remove.id).map(|answer| (0, answer)),
            Request::MemberPromote(promote) => return self.promote(promote.id).map(|answer| (0, answer)),
            Request::Alarm(_)
            | Request::Auth(_)
            | Request::CapabilityLevelSet(_)
            | Request::ClusterVersionSet(_)
            | Request::MemberAttributesSet(_)
            | Request::MemberUpdate(_)
            | Request::Unknown(_) => panic!("the simulation proposes no {request:?}"),
        };
        let changed = self.keys.values().any(|states| states.contains_key(&next));
        self.head += i64::from(changed);
        Ok((self.head, answer))
    }

    fn listed(&self, added: Option<u64>) -> Answer {
        Answer::Members(added, self.members.iter().map(|(id, is_learner)| (*id, *is_learner)).collect())
    }

    fn add(&mut self, member: &Member, max_learners: Option<u64>) -> Result<Answer, Error> {
        if self.removed.contains(&member.id) {
            return Err(Error::MemberNotFound);
        }
        if self.members.contains_key(&member.id) {
            return Err(Error::MemberExists);
        }
        let learners = self.members.values().filter(|is_learner| **is_learner).count() as u64;
        if member.is_learner && max_learners.is_some_and(|most| learners >= most) {
            return Err(Error::TooManyLearners);
        }
        self.members.insert(member.id, member.is_learner);
        Ok(self.listed(Some(member.id)))
    }

    fn remove(&mut self, id: u64) -> Result<Answer, Error> {
        let is_learner = *self.members.get(&id).ok_or(Error::MemberNotFound)?;
        if !is_learner && self.members.values().filter(|is_learner| !**is_learner).count() == 1 {
            return Err(Error::MemberNotEnoughStarted);
        }
        self.members.remove(&id);
        self.removed.insert(id);
        Ok(self.listed(None))
    }

    fn promote(&mut self, id: u64) -> Result<Answer, Error> {
        let is_learner = self.members.get_mut(&id).ok_or(Error::MemberNotFound)?;
        if !std::mem::replace(is_learner, false) {
            return Err(Error::MemberNotLearner);
        }
        Ok(self.listed(None))
    }

    fn get(&self, key: &[u8], revision: i64) -> Option<KeyValue> {
        self.keys.get(key)?.range(..=revision).next_back()?.1.clone()
    }

    fn set(&mut self, key: &Bytes, revision: i64, state: Option<KeyValue>) {
        self.leases.values_mut().for_each(|keys| _ = keys.remove(key));
        if let Some(keys) = state.as_ref().and_then(|state| self.leases.get_mut(&state.lease)) {
            keys.insert(key.clone());
        }
        self.keys.entry(key.clone()).or_default().insert(revision, state);
    }

    fn put(&mut self, put: &PutRequest, revision: i64) -> Result<PutResponse, Error> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Error::LeaseNotFound);
        }
        let previous = self.get(&put.key, revision);
        if previous.is_none() && (put.ignore_value || put.ignore_lease) {
            return Err(Error::KeyNotFound);
        }
        let kept = previous.clone().unwrap_or_default();
        let state = KeyValue {
            key: put.key.clone(),
            create_revision: if previous.is_some() { kept.create_revision } else { revision },
            mod_revision: revision,
            version: kept.version + 1,
            value: if put.ignore_value { kept.value } else { put.value.clone() },
            lease: if put.ignore_lease { kept.lease } else { put.lease },
        };
        self.set(&put.key, revision, Some(state));
        Ok(PutResponse { prev_kv: previous.filter(|_| put.prev_kv), ..PutResponse::default() })
    }

    fn delete_range(&mut self, delete: &DeleteRangeRequest, revision: i64) -> DeleteRangeResponse {
        let gone = self.range(&delete.key, &delete.range_end, revision);
        for state in &gone {
            self.set(&state.key, revision, None);
        }
        let deleted = i64::try_from(gone.len()).expect("few");
        let prev_kvs = if delete.prev_kv { gone } else { Vec::new() };
        DeleteRangeResponse { deleted, prev_kvs, ..DeleteRangeResponse::default() }
    }

    fn range(&self, key: &[u8], end: &[u8], revision: i64) -> Vec<KeyValue> {
        let inside = |state: &KeyValue| match end {
            [] => state.key == key,
            [0] => state.key >= key,
            end => state.key >= key && state.key < end,
        };
        self.state_at(revision).into_iter().filter(inside).collect()
    }

    fn grant(&mut self, grant: &LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        if self.leases.contains_key(&grant.id) {
            return Err(Error::LeaseExists);
        }
        self.leases.insert(grant.id, BTreeSet::new());
        Ok(LeaseGrantResponse { id: grant.id, ttl: grant.ttl, ..LeaseGrantResponse::default() })
    }

    /// The real state machine checks all of a transaction before it executes any of it; here an error in the middle rolls it
    /// back, which is equivalent as long as its operations name no key twice.
    fn txn(&mut self, txn: &TxnRequest, revision: i64) -> Result<TxnResponse, Error> {
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let ops = if succeeded { &txn.success } else { &txn.failure };
        let responses = ops.iter().map(|op| self.op(op, revision)).collect::<Result<_, _>>()?;
        Ok(TxnResponse { header: None, succeeded, responses })
    }

    fn op(&mut self, op: &RequestOp, revision: i64) -> Result<ResponseOp, Error> {
        use response_op::Response;
        let response = match op.request.as_ref().expect("the simulation sends no empty operation") {
            request_op::Request::RequestRange(range) => Response::ResponseRange(self.read(range, revision)?),
            request_op::Request::RequestPut(put) => Response::ResponsePut(self.put(put, revision)?),
            request_op::Request::RequestDeleteRange(delete) => {
                Response::ResponseDeleteRange(self.delete_range(delete, revision))
            }
            request_op::Request::RequestTxn(_) => panic!("the simulation nests no transactions"),
        };
        Ok(ResponseOp { response: Some(response) })
    }

    fn read(&self, range: &RangeRequest, revision: i64) -> Result<RangeResponse, Error> {
        if range.revision > self.head {
            return Err(Error::FutureRev);
        }
        if range.revision != 0 && range.revision < self.compacted {
            return Err(Error::Compacted);
        }
        let at = if range.revision > 0 { range.revision } else { revision };
        let kvs = self.range(&range.key, &range.range_end, at);
        Ok(RangeResponse { header: None, count: i64::try_from(kvs.len()).expect("few"), kvs, more: false })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let state = self.get(&compare.key, self.head).unwrap_or_default();
        let order = match (compare.target(), compare.target_union.as_ref().expect("filled")) {
            (CompareTarget::Mod, TargetUnion::ModRevision(wanted)) => state.mod_revision.cmp(wanted),
            (CompareTarget::Version, TargetUnion::Version(wanted)) => state.version.cmp(wanted),
            other => panic!("the simulation compares no {other:?}"),
        };
        match compare.result() {
            CompareResult::Equal => order.is_eq(),
            CompareResult::NotEqual => order.is_ne(),
            CompareResult::Greater => order.is_gt(),
            CompareResult::Less => order.is_lt(),
        }
    }
}
