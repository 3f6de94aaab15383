//! The one place where an operation is let in. The checks, in this order:
//!
//! | check | refuses with |
//! | --- | --- |
//! | learner or leader | `NotSupportedForLearner`, `NoLeader` |
//! | quota | `NoSpace` |
//! | limits: what the request alone tells | the errors of [`validate`] |
//! | identity | `InvalidAuthToken` |
//! | permission: what [`Rule`] says, and for keys that of the user | `UserEmpty`, `PermissionDenied`, `AuthOldRevision` |
//!
//! That is etcd's order, and clients see it when two of them fail. What depends on the state (an unknown lease, a compacted
//! revision) is decided where the request is executed.
//!
//! **Denied by default** (FAULT-41): every operation has a rule here, and every RPC is an operation. Permissions for keys are checked here
//! for writes, and again where the entry is applied; for reads where the keys are read, because only then it is known what this
//! member has applied.

use std::sync::Arc;

use super::{
    Caller, Reply, RequestLimits, Service,
    auth::{Identity, audit},
    validate,
};
use crate::{
    error::Error,
    lease::LeaseId,
    metrics,
    proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, TxnRequest},
    state::{
        CORRUPT, NOSPACE, command,
        permission::{Access, PermissionCheck},
    },
};

/// What is to be done, as far as admission has to know.
#[derive(Debug, Clone, Copy)]
pub enum Operation<'a> {
    Range(&'a RangeRequest),
    Put(&'a PutRequest),
    DeleteRange(&'a DeleteRangeRequest),
    Txn(&'a TxnRequest),
    Compact,
    /// Opens a stream of Ranges, of which each is checked where it is read.
    RangeStream,
    /// Opens a stream of watches, of which each is checked when it is created.
    Watch,
    LeaseGrant,
    LeaseRevoke(LeaseId),
    /// Opens a stream of renewals, of which each is checked.
    LeaseKeepAlive,
    /// Asks for the TTL alone, or also for the attached keys.
    LeaseTimeToLive(Option<LeaseId>),
    /// Which leases there are: checked where they are read.
    LeaseLeases,
    /// A lock or an election. Its steps are operations of their own, on the caller's behalf.
    Concurrency,
    /// Follows the leader of an election.
    Observe,
    AuthEnable,
    AuthDisable,
    AuthStatus,
    Authenticate,
    UserAdd,
    UserGet,
    UserList,
    UserDelete,
    UserChangePassword,
    UserGrantRole,
    UserRevokeRole,
    RoleAdd,
    RoleGet,
    RoleList,
    RoleDelete,
    RoleGrantPermission,
    RoleRevokePermission,
    MemberList,
    MemberAdd,
    MemberRemove,
    MemberUpdate,
    MemberPromote,
    AlarmGet,
    AlarmChange,
    Status,
    Defragment,
    Hash,
    HashKv,
    Snapshot,
    MoveLeader,
    Downgrade,
    /// Whether the server serves.
    Health,
}

/// What an operation needs of its caller, while authentication is enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Nothing: even an invalid token is no reason to refuse it.
    Anyone,
    /// No invalid token. What the caller may see is decided by the operation.
    Identified,
    /// Permissions for keys.
    Keys,
    /// Any user.
    Login,
    /// A user with the role `root`.
    Root,
}

impl Operation<'_> {
    #[must_use]
    pub fn rule(&self) -> Rule {
        match self {
            Self::Authenticate | Self::Health => Rule::Anyone,
            Self::AuthStatus | Self::UserGet | Self::RoleGet => Rule::Identified,
            Self::Range(_)
            | Self::Put(_)
            | Self::DeleteRange(_)
            | Self::Txn(_)
            | Self::RangeStream
            | Self::Watch
            | Self::LeaseKeepAlive
            | Self::LeaseLeases
            | Self::Concurrency
            | Self::Observe => Rule::Keys,
            Self::LeaseGrant
            | Self::LeaseRevoke(_)
            | Self::LeaseTimeToLive(_)
            | Self::MemberList
            | Self::AlarmGet
            | Self::Status => Rule::Login,
            Self::Compact
            | Self::AuthEnable
            | Self::AuthDisable
            | Self::UserAdd
            | Self::UserList
            | Self::UserDelete
            | Self::UserChangePassword
            | Self::UserGrantRole
            | Self::UserRevokeRole
            | Self::RoleAdd
            | Self::RoleList
            | Self::RoleDelete
            | Self::RoleGrantPermission
            | Self::RoleRevokePermission
            | Self::MemberAdd
            | Self::MemberRemove
            | Self::MemberUpdate
            | Self::MemberPromote
            | Self::AlarmChange
            | Self::Defragment
            | Self::Hash
            | Self::HashKv
            | Self::Snapshot
            | Self::MoveLeader
            | Self::Downgrade => Rule::Root,
        }
    }

    /// Its name in the audit log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Range(_) => "Range",
            Self::Put(_) => "Put",
            Self::DeleteRange(_) => "DeleteRange",
            Self::Txn(_) => "Txn",
            Self::Compact => "Compact",
            Self::RangeStream => "RangeStream",
            Self::Watch => "Watch",
            Self::LeaseGrant => "LeaseGrant",
            Self::LeaseRevoke(_) => "LeaseRevoke",
            Self::LeaseKeepAlive => "LeaseKeepAlive",
            Self::LeaseTimeToLive(_) => "LeaseTimeToLive",
            Self::LeaseLeases => "LeaseLeases",
            Self::Concurrency => "Concurrency",
            Self::Observe => "Observe",
            Self::AuthEnable => "AuthEnable",
            Self::AuthDisable => "AuthDisable",
            Self::AuthStatus => "AuthStatus",
            Self::Authenticate => "Authenticate",
            Self::UserAdd => "UserAdd",
            Self::UserGet => "UserGet",
            Self::UserList => "UserList",
            Self::UserDelete => "UserDelete",
            Self::UserChangePassword => "UserChangePassword",
            Self::UserGrantRole => "UserGrantRole",
            Self::UserRevokeRole => "UserRevokeRole",
            Self::RoleAdd => "RoleAdd",
            Self::RoleGet => "RoleGet",
            Self::RoleList => "RoleList",
            Self::RoleDelete => "RoleDelete",
            Self::RoleGrantPermission => "RoleGrantPermission",
            Self::RoleRevokePermission => "RoleRevokePermission",
            Self::MemberList => "MemberList",
            Self::MemberAdd => "MemberAdd",
            Self::MemberRemove => "MemberRemove",
            Self::MemberUpdate => "MemberUpdate",
            Self::MemberPromote => "MemberPromote",
            Self::AlarmGet => "AlarmGet",
            Self::AlarmChange => "AlarmChange",
            Self::Status => "Status",
            Self::Defragment => "Defragment",
            Self::Hash => "Hash",
            Self::HashKv => "HashKv",
            Self::Snapshot => "Snapshot",
            Self::MoveLeader => "MoveLeader",
            Self::Downgrade => "Downgrade",
            Self::Health => "Health",
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "it is a property of few operations")]
    fn is_served_by_learners(&self) -> bool {
        match self {
            Self::Range(range) => range.serializable,
            Self::Status | Self::Snapshot => true,
            _ => false,
        }
    }

    /// What it adds to the database; None if it may run when that is full.
    #[expect(clippy::wildcard_enum_match_arm, reason = "it is a property of few operations")]
    fn cost(&self) -> Option<u64> {
        match self {
            Self::Put(put) => Some(command::put_cost(put)),
            Self::Txn(txn) => Some(command::txn_cost(txn)),
            Self::LeaseGrant => Some(command::lease_cost()),
            _ => None,
        }
    }

    /// Checks the request by itself.
    #[expect(clippy::wildcard_enum_match_arm, reason = "it is a property of few operations")]
    fn validate(&self, limits: &RequestLimits) -> Result<(), Error> {
        match self {
            Self::Range(range) => validate::range(range),
            Self::Put(put) => validate::put(put),
            Self::DeleteRange(delete) => validate::delete_range(delete),
            Self::Txn(txn) => validate::txn(txn, limits.max_txn_ops, limits.max_txn_depth),
            _ => Ok(()),
        }
    }

    /// The permissions for keys that can be checked before the operation is carried out.
    #[expect(clippy::wildcard_enum_match_arm, reason = "it is a property of few operations")]
    fn check_keys(&self, check: PermissionCheck<'_>) -> Result<(), Error> {
        match self {
            Self::Put(put) => check.put(put),
            Self::DeleteRange(delete) => check.delete_range(delete),
            Self::Txn(txn) => check.txn(txn),
            Self::LeaseRevoke(lease) => check.attached_keys(Access::Write, *lease),
            Self::LeaseTimeToLive(Some(lease)) => check.attached_keys(Access::Read, *lease),
            _ => Ok(()),
        }
    }
}

/// Counts a request that reaches a limit by itself.
#[expect(clippy::wildcard_enum_match_arm, reason = "other errors are no limits")]
pub(super) fn count_refusal(error: &Error) {
    match error {
        Error::TooManyOps => metrics::refused("txn_ops"),
        Error::TxnTooDeep(_) => metrics::refused("txn_depth"),
        _ => (),
    }
}

impl Service {
    /// Lets an operation in and identifies its caller, or says why not.
    pub fn admit(&self, caller: &Caller, operation: &Operation<'_>) -> Result<Identity, Error> {
        self.check_request(caller, operation)?;
        self.authorize(caller, operation)
    }

    /// The checks that have nothing to do with users.
    pub fn check_request(&self, caller: &Caller, operation: &Operation<'_>) -> Result<(), Error> {
        self.check_member(caller, operation)?;
        if let Some(cost) = operation.cost()
            && !self.node().fits_quota(cost)
        {
            return Err(Error::NoSpace);
        }
        operation.validate(&self.limits).inspect_err(count_refusal)
    }

    pub(super) fn check_member(&self, caller: &Caller, operation: &Operation<'_>) -> Result<(), Error> {
        let status = self.node().status();
        if status.is_learner() && !operation.is_served_by_learners() {
            return Err(Error::NotSupportedForLearner);
        }
        if caller.require_leader && status.leader() == 0 {
            return Err(Error::NoLeader);
        }
        Ok(())
    }

    fn authorize(&self, caller: &Caller, operation: &Operation<'_>) -> Result<Identity, Error> {
        let readers = self.readers();
        if !readers.auth.is_enabled() || operation.rule() == Rule::Anyone {
            return Ok(Identity::default());
        }
        let identity = self.identify(caller)?;
        let auth = readers.auth.tables();
        match operation.rule() {
            Rule::Anyone | Rule::Identified => (),
            Rule::Login if identity.user().is_empty() => return Err(Error::UserEmpty),
            Rule::Root => auth.check_root(identity.requester())?,
            // Alarms come first, and are looked at where the entry is applied.
            Rule::Keys if self.has_alarm() => (),
            Rule::Login | Rule::Keys => {
                let requester = identity.requester();
                operation.check_keys(PermissionCheck { auth: &auth, leases: &readers.leases, requester })?;
            }
        }
        Ok(identity)
    }

    /// Refuses an operation that was not let in. This member may be behind: the user may have been given the permission, or the
    /// token, through another one. So before a denial is final, everything that was acknowledged before is applied here, and
    /// `again` makes the request once more.
    pub(super) fn refuse<T, R: Reply<T>>(
        self: &Arc<Self>,
        caller: &Caller,
        operation: &'static str,
        error: Error,
        reply: R,
        again: impl FnOnce(&Arc<Self>, &Caller, R) + Send + 'static,
    ) {
        if !audit::is_denial(&error) {
            return self.reject_write(error, reply);
        }
        if caller.is_confirmed || self.node().status().is_sole_leader() {
            let identity = self.identify(caller).unwrap_or_default();
            audit::denied(caller, &identity, operation, &error);
            return reply.answer(Err(error));
        }
        let (service, caller) = (self.clone(), caller.confirmed());
        self.await_read(reply, move |reply| again(&service, &caller, reply));
    }

    /// Identifies the caller of a read and checks its permission for what it reads, with what this member has applied.
    pub(super) fn authorize_read(
        &self,
        caller: &Caller,
        check: impl FnOnce(PermissionCheck<'_>) -> Result<(), Error>,
    ) -> Result<Identity, Error> {
        let readers = self.readers();
        if !readers.auth.is_enabled() {
            return Ok(Identity::default());
        }
        let identity = self.identify(caller)?;
        let auth = readers.auth.tables();
        check(PermissionCheck { auth: &auth, leases: &readers.leases, requester: identity.requester() })?;
        Ok(identity)
    }

    /// The outcome of a read, if no user has changed since its permission was checked.
    pub(super) fn unless_users_changed<T>(&self, identity: &Identity, outcome: T) -> Result<T, Error> {
        let auth_revision = identity.requester().auth_revision;
        if auth_revision == 0 || auth_revision == self.readers().auth.tables().revision() {
            Ok(outcome)
        } else {
            Err(Error::AuthOldRevision)
        }
    }

    /// Whether an alarm refuses changes, which is decided where they are applied, before permissions are.
    pub(super) fn has_alarm(&self) -> bool {
        let readers = self.readers();
        let cluster = readers.cluster.read();
        cluster.alarms.any(CORRUPT) || cluster.alarms.any(NOSPACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KV-35.
    #[test]
    fn a_learner_serves_status_and_serializable_reads_only() {
        let range = |serializable| RangeRequest { serializable, ..RangeRequest::default() };
        let (put, delete, txn) = (PutRequest::default(), DeleteRangeRequest::default(), TxnRequest::default());
        for served in [Operation::Range(&range(true)), Operation::Status, Operation::Snapshot] {
            assert!(served.is_served_by_learners(), "{served:?}");
        }
        for refused in [
            Operation::Range(&range(false)),
            Operation::Put(&put),
            Operation::DeleteRange(&delete),
            Operation::Txn(&txn),
            Operation::LeaseGrant,
            Operation::Watch,
            Operation::MemberList,
            Operation::Health,
            Operation::Authenticate,
        ] {
            assert!(!refused.is_served_by_learners(), "{refused:?}");
        }
    }
}
