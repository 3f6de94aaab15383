//! Applies commands: from the entry to its outcome, from top to bottom.

use prost::Message;

use super::{
    Applied, CORRUPT, Command, Effect, Entry, Machine, MemberAttributes, Members, NOSPACE, Request, Response, command,
    permission::{Access, PermissionCheck},
};
use crate::{
    auth::{Change, Requester},
    error::{Error, Halt},
    lease::LeaseId,
    mvcc::{Interval, write},
    proto::{
        etcdserverpb::{
            AlarmMember, AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
            Member, PutRequest, alarm_request::AlarmAction,
        },
        membershippb::ClusterVersionSetRequest,
    },
    storage::{Batch, Table, schema::meta},
};

/// A refusal is the outcome of the command; a halt ends the process. They are nested so that they cannot be confused.
pub(super) type Outcome<T> = Result<Result<T, Error>, Halt>;

impl Machine {
    /// Applies the next committed entry. `Err` means that this process must end; a refused request is an ordinary outcome.
    pub fn apply(&mut self, entry: &Entry) -> Result<Applied, Halt> {
        assert_eq!(entry.index, self.applied.index + 1, "entries apply in order, without gaps");
        assert!(entry.term >= self.applied.term, "terms never go back");
        self.applied.index = entry.index;
        self.applied.term = entry.term;
        if entry.data.is_empty() && !entry.changes_members {
            return Ok(Applied {
                id: 0,
                cost: 0,
                operation: "",
                outcome: Ok(Response::header_only(self.store.head())),
            });
        }
        match Command::decode(entry.data.clone()) {
            // An entry of a kind that this member does not know is executed by those that do.
            Ok(command) if command.level > self.known_level => Err(self.unknown_entry(entry.index)),
            Ok(Command { id, request, .. }) if request.changes_members() != entry.changes_members => {
                let text = "etcdserver: an entry changes the members if and only if raft is told so";
                Ok(Applied { id, cost: 0, operation: "", outcome: Err(Error::Unknown(text.into())) })
            }
            Ok(command) => self.apply_command(command, entry.index),
            Err(error) => {
                Ok(Applied { id: 0, cost: 0, operation: "", outcome: Err(Error::Malformed(error.to_string())) })
            }
        }
    }

    fn apply_command(&mut self, command: Command, index: u64) -> Result<Applied, Halt> {
        let Command { id, user, auth_revision, level, request } = command;
        let operation = request.operation();
        let requester = Requester { user: &user, auth_revision };
        let checked = self.check_alarms(&request).and_then(|cost| {
            // The first entry of a level is the one that raises it.
            let is_raise = matches!(request, Request::CapabilityLevelSet(_));
            if level > self.cluster.capability_level && !is_raise {
                return Err(Error::NotCapable);
            }
            self.check_permission(requester, &request)?;
            Ok(cost)
        });
        let (cost, outcome) = match checked {
            Ok(cost) => (cost, self.execute(request, requester, index)?),
            Err(error) => (0, Err(error)),
        };
        Ok(Applied { id, cost: if outcome.is_ok() { cost } else { 0 }, operation, outcome })
    }

    fn execute(&mut self, request: Request, requester: Requester<'_>, index: u64) -> Outcome<Response> {
        match request {
            Request::Put(put) => self.put(put),
            Request::DeleteRange(delete) => self.delete_range(&delete),
            Request::Txn(txn) => self.txn(txn),
            Request::Compact(compact) => Ok(self.compact(compact)),
            Request::LeaseGrant(grant) => Ok(self.lease_grant(&grant)),
            Request::LeaseRevoke(revoke) | Request::LeaseExpire(revoke) => Ok(self.lease_revoke(&revoke)),
            Request::Alarm(alarm) => Ok(self.alarm(&alarm)),
            Request::Auth(change) => Ok(self.change_auth(requester, change, index)),
            Request::CapabilityLevelSet(request) => self.set_capability_level(request),
            Request::ClusterVersionSet(version) => Ok(Ok(self.set_cluster_version(version))),
            Request::MemberAttributesSet(attributes) => Ok(self.set_member_attributes(attributes)),
            Request::MemberAdd(newcomer) => {
                Ok(self.change_members(|members, batch| members.add(batch, newcomer).map(Some)))
            }
            Request::MemberRemove(remove) => {
                Ok(self.change_members(|members, batch| members.remove(batch, remove.id).map(|()| None)))
            }
            Request::MemberPromote(promote) => {
                Ok(self.change_members(|members, batch| members.promote(batch, promote.id).map(|()| None)))
            }
            Request::MemberUpdate(update) => Ok(self.change_members(|members, batch| {
                members.set_peer_urls(batch, update.id, update.peer_ur_ls).map(|()| None)
            })),
            Request::Unknown(_) => unreachable!("its level is above every level that is known"),
        }
    }

    /// With the CORRUPT alarm all changes are refused, with NOSPACE all additions. Returns the bytes that the quota charges for
    /// the request.
    fn check_alarms(&self, request: &Request) -> Result<u64, Error> {
        let (changes, cost) = match request {
            Request::Put(put) => (true, command::put_cost(put)),
            Request::Txn(txn) => (true, command::txn_cost(txn)),
            Request::LeaseGrant(_) => (true, command::lease_cost()),
            Request::DeleteRange(_) | Request::Compact(_) | Request::LeaseRevoke(_) | Request::LeaseExpire(_) => {
                (true, 0)
            }
            Request::Alarm(_)
            | Request::Auth(_)
            | Request::CapabilityLevelSet(_)
            | Request::ClusterVersionSet(_)
            | Request::MemberAttributesSet(_)
            | Request::MemberAdd(_)
            | Request::MemberRemove(_)
            | Request::MemberPromote(_)
            | Request::MemberUpdate(_)
            | Request::Unknown(_) => (false, 0),
        };
        if changes && self.cluster.alarms.any(CORRUPT) {
            return Err(Error::Corrupt);
        }
        if cost > 0 && self.cluster.alarms.any(NOSPACE) {
            return Err(Error::NoSpace);
        }
        Ok(cost)
    }

    /// Whether the user of a request may make it. What is not checked here (leases, compactions, members) has been checked by the
    /// member that proposed it.
    fn check_permission(&self, requester: Requester<'_>, request: &Request) -> Result<(), Error> {
        let check = PermissionCheck { auth: &self.auth, leases: self.leases.reader(), requester };
        match request {
            Request::Put(put) => check.put(put),
            Request::DeleteRange(delete) => check.delete_range(delete),
            Request::Txn(txn) => check.txn(txn),
            Request::LeaseRevoke(revoke) => check.attached_keys(Access::Write, LeaseId(revoke.id)),
            Request::Compact(_)
            | Request::LeaseGrant(_)
            | Request::LeaseExpire(_)
            | Request::Alarm(_)
            | Request::Auth(_) // `Auth::apply` checks.
            | Request::CapabilityLevelSet(_)
            | Request::ClusterVersionSet(_)
            | Request::MemberAttributesSet(_)
            | Request::MemberAdd(_)
            | Request::MemberRemove(_)
            | Request::MemberPromote(_)
            | Request::MemberUpdate(_)
            | Request::Unknown(_) => Ok(()),
        }
    }

    fn change_auth(&mut self, requester: Requester<'_>, change: Change, index: u64) -> Result<Response, Error> {
        let outcome = self.auth.apply(&mut self.batch, requester, change, index)?;
        self.auth_changed = true;
        self.effects.extend(outcome.effect.map(Effect::Tokens));
        let mut body = Vec::new();
        if let Some(token) = outcome.token {
            prost::encoding::string::encode(TOKEN_FIELD, &token, &mut body);
        }
        Ok(Response { revision: self.store.head(), body })
    }

    fn put(&mut self, put: PutRequest) -> Outcome<Response> {
        if let Err(error) = self.check_put(&put) {
            return Ok(Err(error));
        }
        let body = self.execute_put(put)?;
        Ok(Ok(Response { revision: self.store.end_transaction(), body }))
    }

    /// Checks that the lease of a put exists, and its key if it has an `ignore` flag.
    pub(super) fn check_put(&self, put: &PutRequest) -> Result<(), Error> {
        if put.lease != 0 && !self.leases.reader().exists(LeaseId(put.lease)) {
            return Err(Error::LeaseNotFound);
        }
        let needs_key = put.ignore_value || put.ignore_lease;
        if needs_key && self.store.newest(&put.key).is_none_or(|change| change.metadata.is_none()) {
            return Err(Error::KeyNotFound);
        }
        Ok(())
    }

    /// Executes a put that was checked; returns its response without the header.
    pub(super) fn execute_put(&mut self, put: PutRequest) -> Result<Vec<u8>, Halt> {
        let kept = if put.ignore_value || put.ignore_lease { self.state_before(&put.key)? } else { None };
        let kept = kept.unwrap_or_default();
        let value = if put.ignore_value { kept.value } else { put.value };
        let lease = if put.ignore_lease { kept.lease } else { put.lease };
        let key = put.key;
        self.counts.puts += 1;
        self.counts.put_bytes += (key.len() + value.len()) as u64;
        let displaced = self.store.put(&mut self.batch, write::Put { key: key.clone(), value, lease });
        let old_lease = displaced.as_ref().map_or(0, |displaced| displaced.lease);
        if old_lease != lease && old_lease != 0 {
            self.leases.detach(LeaseId(old_lease), &key);
        }
        if old_lease != lease && lease != 0 {
            // With `ignore_lease` the key may have a lease that no longer exists. It keeps it in its record and never expires.
            let _ = self.leases.attach(LeaseId(lease), &key);
        }
        let mut body = Vec::new();
        if let Some(displaced) = displaced.filter(|_| put.prev_kv) {
            let previous = self.load_record(displaced.revision)?;
            prost::encoding::bytes::encode(PREV_KV_FIELD, &previous, &mut body);
        }
        Ok(body)
    }

    /// The current record of a key or, if the current transaction has deleted the key, its record before the transaction.
    fn state_before(&self, key: &bytes::Bytes) -> Result<Option<crate::proto::mvccpb::KeyValue>, Halt> {
        let newest = self.store.newest(key);
        let revision = match newest {
            Some(change) if change.metadata.is_none() => self.store.visible_before(key),
            other => other.map(|change| change.revision),
        };
        let record = revision.map(|revision| self.load_record(revision)).transpose()?;
        record.map(crate::mvcc::read::decode).transpose()
    }

    /// Reads a record that must exist.
    fn load_record(&self, revision: crate::mvcc::Revision) -> Result<bytes::Bytes, Halt> {
        use crate::mvcc::source::Source;
        let record = self.store.records(&[revision])?.pop().flatten();
        record
            .ok_or_else(|| Halt::InvalidData(format!("the database is corrupt: the record of {revision:?} is missing")))
    }

    fn delete_range(&mut self, delete: &DeleteRangeRequest) -> Outcome<Response> {
        let body = self.execute_delete_range(delete)?;
        Ok(Ok(Response { revision: self.store.end_transaction(), body }))
    }

    /// Executes a deletion; returns its response without the header.
    pub(super) fn execute_delete_range(&mut self, delete: &DeleteRangeRequest) -> Result<Vec<u8>, Halt> {
        use crate::mvcc::source::Source;
        self.counts.deletes += 1;
        let interval = Interval::new(delete.key.clone(), delete.range_end.clone());
        let mut keys = Vec::new();
        self.store.visit(&interval, i64::MAX, &mut |key, _| {
            keys.push(bytes::Bytes::copy_from_slice(key));
            std::ops::ControlFlow::Continue(())
        });
        let mut previous = Vec::new();
        for key in &keys {
            let displaced = self.store.delete(&mut self.batch, key).expect("the key was just visited, so it is live");
            if displaced.lease != 0 {
                self.leases.detach(LeaseId(displaced.lease), key);
            }
            previous.push(displaced.revision);
        }
        let mut body = Vec::new();
        let deleted = i64::try_from(keys.len()).expect("keys fit in memory");
        if deleted != 0 {
            prost::encoding::int64::encode(DELETED_FIELD, &deleted, &mut body);
        }
        if delete.prev_kv {
            for record in self.store.records(&previous)? {
                let missing =
                    || Halt::InvalidData("the database is corrupt: the record of a live key is missing".into());
                prost::encoding::bytes::encode(PREV_KVS_FIELD, &record.ok_or_else(missing)?, &mut body);
            }
        }
        Ok(body)
    }

    fn compact(&mut self, compact: CompactionRequest) -> Result<Response, Error> {
        if compact.revision <= self.store.compacted() {
            return Err(Error::Compacted);
        }
        if compact.revision > self.store.head() {
            return Err(Error::FutureRev);
        }
        self.store.schedule_compaction(&mut self.batch, compact.revision);
        self.effects.push(Effect::CompactionScheduled { at: compact.revision });
        Ok(Response::header_only(self.store.head()))
    }

    fn lease_grant(&mut self, grant: &LeaseGrantRequest) -> Result<Response, Error> {
        use crate::proto::etcdserverpb::LeaseGrantResponse;
        self.leases.grant(&mut self.batch, LeaseId(grant.id), grant.ttl)?;
        self.effects.push(Effect::LeaseGranted { id: grant.id, ttl: grant.ttl });
        let response = LeaseGrantResponse { id: grant.id, ttl: grant.ttl, ..LeaseGrantResponse::default() };
        Ok(Response { revision: self.store.head(), body: response.encode_to_vec() })
    }

    fn lease_revoke(&mut self, revoke: &LeaseRevokeRequest) -> Result<Response, Error> {
        let before = self.counts.operations();
        // In ascending order of keys, so that all replicas assign the same sub-revisions.
        for key in self.leases.revoke(&mut self.batch, LeaseId(revoke.id))? {
            self.counts.deletes += 1;
            self.store.delete(&mut self.batch, &key).expect("an attached key is live");
        }
        self.counts.add_txn_since(before);
        self.effects.push(Effect::LeaseRevoked { id: revoke.id });
        Ok(Response::header_only(self.store.end_transaction()))
    }

    fn alarm(&mut self, request: &AlarmRequest) -> Result<Response, Error> {
        let (alarm, member_id) = (request.alarm, request.member_id);
        let changed = AlarmMember { member_id, alarm };
        let alarms = &mut self.cluster.alarms;
        let mut has_changed = false;
        let listed = match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => alarms.list(alarm),
            Ok(AlarmAction::Activate) if alarm == 0 => Vec::new(),
            Ok(AlarmAction::Activate) => {
                has_changed = alarms.raise(&mut self.batch, alarm, member_id);
                vec![changed]
            }
            Ok(AlarmAction::Deactivate) if alarms.clear(&mut self.batch, alarm, member_id) => {
                has_changed = true;
                vec![changed]
            }
            Ok(AlarmAction::Deactivate) => Vec::new(),
            Err(_) => return Err(Error::Unknown("etcdserver: unknown alarm action".into())),
        };
        if has_changed {
            self.cluster_changed = true;
            self.effects.push(Effect::AlarmsChanged);
        }
        let mut body = Vec::new();
        prost::encoding::message::encode_repeated(ALARMS_FIELD, &listed, &mut body);
        Ok(Response { revision: self.store.head(), body })
    }

    fn set_cluster_version(&mut self, request: ClusterVersionSetRequest) -> Response {
        self.batch.put(Table::Meta, meta::CLUSTER_VERSION, request.ver.clone().into_bytes());
        self.cluster.cluster_version = request.ver;
        self.cluster_changed = true;
        Response::header_only(self.store.head())
    }

    fn set_member_attributes(&mut self, published: MemberAttributes) -> Result<Response, Error> {
        let MemberAttributes { request, level, repeated } = published;
        let attributes = request.member_attributes.unwrap_or_default();
        let (id, name, client_urls) = (request.member_id, attributes.name, attributes.client_urls);
        self.cluster.members.set_attributes(&mut self.batch, id, name, client_urls, level)?;
        self.note_changed_members();
        if !repeated {
            self.effects.push(Effect::MemberStarted { id, level });
        }
        Ok(Response::header_only(self.store.head()))
    }

    /// Changes the member table. The response contains the whole table, and the added member if there is one; its header has no
    /// revision.
    fn change_members(
        &mut self,
        change: impl FnOnce(&mut Members, &mut Batch) -> Result<Option<Member>, Error>,
    ) -> Result<Response, Error> {
        let added = change(&mut self.cluster.members, &mut self.batch)?;
        self.note_changed_members();
        let mut body = Vec::new();
        let members: Vec<Member> = self.cluster.members.iter().cloned().collect();
        match added {
            Some(member) => {
                prost::encoding::message::encode(ADDED_FIELD, &member, &mut body);
                prost::encoding::message::encode_repeated(MEMBERS_AFTER_ADDED_FIELD, &members, &mut body);
            }
            None => prost::encoding::message::encode_repeated(MEMBERS_FIELD, &members, &mut body),
        }
        Ok(Response { revision: 0, body })
    }

    pub(super) fn note_changed_members(&mut self) {
        self.cluster_changed = true;
        self.effects.push(Effect::MembersChanged);
    }
}

const ADDED_FIELD: u32 = 2;
const MEMBERS_AFTER_ADDED_FIELD: u32 = 3;
const MEMBERS_FIELD: u32 = 2;
const PREV_KV_FIELD: u32 = 2;
const DELETED_FIELD: u32 = 2;
const PREV_KVS_FIELD: u32 = 3;
const ALARMS_FIELD: u32 = 2;
const TOKEN_FIELD: u32 = 2;
