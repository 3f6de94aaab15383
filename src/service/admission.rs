//! The one place where an operation is let in. The checks, in this order:
//!
//! | check | refuses with |
//! | --- | --- |
//! | identity | nothing yet: there are no users |
//! | permission | nothing yet |
//! | learner or leader | `NotSupportedForLearner`, `NoLeader` |
//! | quota | `NoSpace` |
//! | limits: what the request alone tells | the errors of [`validate`] |
//!
//! A full database is reported before a malformed request, as etcd does. What depends on the state (an unknown lease, a
//! compacted revision) is decided where the request is executed.

use super::{Caller, Service, validate};
use crate::{
    error::Error,
    proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, TxnRequest},
    state::command,
};

/// What is to be done, as far as admission has to know.
#[derive(Debug, Clone, Copy)]
pub enum Operation<'a> {
    Range(&'a RangeRequest),
    Put(&'a PutRequest),
    DeleteRange(&'a DeleteRangeRequest),
    Txn(&'a TxnRequest),
    LeaseGrant,
    /// Opens a stream of the kind that a learner does not serve: a Watch, a RangeStream, keep-alives, an Observe.
    Stream,
    /// Reports or transfers what this member has, whatever its role: Status, Snapshot.
    Inspect,
    /// Any other request.
    Other,
}

impl Operation<'_> {
    fn is_served_by_learners(self) -> bool {
        match self {
            Self::Range(range) => range.serializable,
            Self::Inspect => true,
            Self::Put(_) | Self::DeleteRange(_) | Self::Txn(_) | Self::LeaseGrant | Self::Stream | Self::Other => false,
        }
    }

    /// What it adds to the database; None if it may run when that is full.
    fn cost(self) -> Option<u64> {
        match self {
            Self::Put(put) => Some(command::put_cost(put)),
            Self::Txn(txn) => Some(command::txn_cost(txn)),
            Self::LeaseGrant => Some(command::lease_cost()),
            Self::Range(_) | Self::DeleteRange(_) | Self::Stream | Self::Inspect | Self::Other => None,
        }
    }
}

impl Service {
    /// Lets an operation in, or says why not.
    pub fn admit(&self, caller: &Caller, operation: &Operation<'_>) -> Result<(), Error> {
        self.check_member(caller, *operation)?;
        if let Some(cost) = operation.cost()
            && !self.node().fits_quota(cost)
        {
            return Err(Error::NoSpace);
        }
        match operation {
            Operation::Range(range) => validate::range(range),
            Operation::Put(put) => validate::put(put),
            Operation::DeleteRange(delete) => validate::delete_range(delete),
            Operation::Txn(txn) => validate::txn(txn, self.limits.max_txn_ops),
            Operation::LeaseGrant | Operation::Stream | Operation::Inspect | Operation::Other => Ok(()),
        }
    }

    fn check_member(&self, caller: &Caller, operation: Operation<'_>) -> Result<(), Error> {
        let status = self.node().status();
        if status.is_learner() && !operation.is_served_by_learners() {
            return Err(Error::NotSupportedForLearner);
        }
        if caller.require_leader && status.leader() == 0 {
            return Err(Error::NoLeader);
        }
        Ok(())
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
        for served in [Operation::Range(&range(true)), Operation::Inspect] {
            assert!(served.is_served_by_learners(), "{served:?}");
        }
        for refused in [
            Operation::Range(&range(false)),
            Operation::Put(&put),
            Operation::DeleteRange(&delete),
            Operation::Txn(&txn),
            Operation::LeaseGrant,
            Operation::Stream,
            Operation::Other,
        ] {
            assert!(!refused.is_served_by_learners(), "{refused:?}");
        }
    }
}
