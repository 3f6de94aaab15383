//! Which permissions a request needs: of the user, for keys.
//!
//! Used twice: by the member that a client asks, and again when the entry is applied, because users may have changed meanwhile.
//! A transaction needs the permissions for both of its branches, and for those of the transactions nested in it, whichever runs.
//!
//! | request | needs |
//! | --- | --- |
//! | Range | to read the range |
//! | Put | to write the key; all keys that are attached to the lease, if it names one; to read the key for `prev_kv` |
//! | DeleteRange | to write the range; to read it for `prev_kv` |
//! | Txn | to read what is compared; what its operations need |
//! | LeaseRevoke, LeaseKeepAlive | to write all keys that are attached to the lease |
//! | LeaseTimeToLive with keys, LeaseLeases | to read them |

use crate::{
    auth::{Auth, Requester, permission::OPEN_END},
    error::Error,
    lease::{self, LeaseId},
    proto::etcdserverpb::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op},
};

/// What is to be done with keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// Checks requests of one user. All are allowed while authentication is disabled.
#[derive(Clone, Copy)]
pub struct PermissionCheck<'a> {
    pub auth: &'a Auth,
    pub leases: &'a lease::Reader,
    pub requester: Requester<'a>,
}

impl PermissionCheck<'_> {
    /// One key if `range_end` is empty, otherwise a range.
    pub fn keys(&self, access: Access, key: &[u8], range_end: &[u8]) -> Result<(), Error> {
        let Some(permissions) = self.auth.permissions_of(self.requester)? else { return Ok(()) };
        let is_allowed = match access {
            Access::Read => permissions.may_read(key, range_end),
            Access::Write => permissions.may_write(key, range_end),
        };
        if is_allowed { Ok(()) } else { Err(Error::PermissionDenied) }
    }

    pub fn range(&self, range: &RangeRequest) -> Result<(), Error> {
        self.keys(Access::Read, &range.key, &range.range_end)
    }

    pub fn put(&self, put: &PutRequest) -> Result<(), Error> {
        self.keys(Access::Write, &put.key, &[])?;
        if put.lease != 0 {
            self.attached_keys(Access::Write, LeaseId(put.lease))?;
        }
        if put.prev_kv { self.keys(Access::Read, &put.key, &[]) } else { Ok(()) }
    }

    pub fn delete_range(&self, delete: &DeleteRangeRequest) -> Result<(), Error> {
        if delete.prev_kv {
            self.keys(Access::Read, &delete.key, &delete.range_end)?;
        }
        self.keys(Access::Write, &delete.key, &delete.range_end)
    }

    /// A transaction that neither compares nor does anything needs no user, as in etcd.
    pub fn txn(&self, txn: &TxnRequest) -> Result<(), Error> {
        let compared = |compare: &Compare| self.keys(Access::Read, &compare.key, &compare.range_end);
        txn.compare.iter().try_for_each(compared)?;
        txn.success.iter().chain(&txn.failure).try_for_each(|op| self.op(op))
    }

    fn op(&self, op: &RequestOp) -> Result<(), Error> {
        match &op.request {
            Some(request_op::Request::RequestRange(range)) => self.range(range),
            Some(request_op::Request::RequestPut(put)) => self.put(put),
            Some(request_op::Request::RequestDeleteRange(delete)) => self.delete_range(delete),
            Some(request_op::Request::RequestTxn(txn)) => self.txn(txn),
            None => Ok(()),
        }
    }

    /// All keys that are attached to a lease.
    pub fn attached_keys(&self, access: Access, lease: LeaseId) -> Result<(), Error> {
        if !self.auth.is_enabled() {
            return Ok(());
        }
        // There may be many keys, and usually one permission covers all of them.
        let Some((first, last)) = self.leases.key_bounds(lease) else { return Ok(()) };
        let after_last = [&last, OPEN_END].concat();
        match self.keys(access, &first, &after_last) {
            Err(Error::PermissionDenied) => {
                let keys = self.leases.keys(lease).unwrap_or_default();
                keys.iter().try_for_each(|key| self.keys(access, key, &[]))
            }
            outcome => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{
        auth::{Change, ROOT},
        lease::Leases,
        proto::{
            authpb::{Permission, permission::Type},
            etcdserverpb::{
                AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthUserAddRequest, AuthUserGrantRoleRequest,
            },
        },
        storage::{Batch, memory::Memory},
    };

    /// The user `ann` may read `a` to `c`, and write `b` to `d`.
    fn users() -> Auth {
        let mut auth = Auth::default();
        let permit = |kind: Type, key: &'static str, end: &'static str| {
            let perm = Permission { perm_type: kind as i32, key: key.into(), range_end: end.into() };
            Change::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: "r".into(), perm: Some(perm) })
        };
        let add = |name: &str| Change::UserAdd(AuthUserAddRequest { name: name.into(), ..Default::default() });
        let grant = |user: &str, role: &str| {
            Change::UserGrantRole(AuthUserGrantRoleRequest { user: user.into(), role: role.into() })
        };
        let changes = [
            add(ROOT),
            add("ann"),
            Change::RoleAdd(AuthRoleAddRequest { name: "r".into() }),
            permit(Type::Read, "a", "c"),
            permit(Type::Write, "b", "d"),
            grant(ROOT, ROOT),
            grant("ann", "r"),
            Change::Enable,
        ];
        for change in changes {
            auth.apply(&mut Batch::default(), Requester::default(), change, 1).unwrap();
        }
        auth
    }

    /// Lease 1 has keys `b` and `c`, lease 2 the key `x`, lease 3 none.
    fn leases() -> Leases {
        let mut leases = Leases::restore(&Memory::default()).unwrap();
        for (id, keys) in [(1, &["b", "c"][..]), (2, &["x"]), (3, &[])] {
            leases.grant(&mut Batch::default(), LeaseId(id), 60).unwrap();
            for key in keys {
                leases.attach(LeaseId(id), key.as_bytes()).unwrap();
            }
        }
        leases
    }

    fn put(key: &'static str) -> PutRequest {
        PutRequest { key: key.into(), ..PutRequest::default() }
    }

    fn delete(key: &'static str, range_end: &'static str) -> DeleteRangeRequest {
        DeleteRangeRequest { key: key.into(), range_end: range_end.into(), ..DeleteRangeRequest::default() }
    }

    fn op(request: request_op::Request) -> RequestOp {
        RequestOp { request: Some(request) }
    }

    fn with_ann<T>(run: impl FnOnce(PermissionCheck<'_>) -> T) -> T {
        let (auth, leases) = (users(), leases());
        let requester = Requester { user: "ann", auth_revision: auth.revision() };
        run(PermissionCheck { auth: &auth, leases: leases.reader(), requester })
    }

    const DENIED: Result<(), Error> = Err(Error::PermissionDenied);

    #[test]
    fn a_put_needs_its_key_the_keys_of_its_lease_and_the_previous_value() {
        with_ann(|check| {
            assert_eq!(check.put(&put("b")), Ok(()));
            assert_eq!(check.put(&put("a")), DENIED);
            assert_eq!(check.put(&PutRequest { prev_kv: true, ..put("b") }), Ok(()));
            assert_eq!(check.put(&PutRequest { prev_kv: true, ..put("c") }), DENIED, "it must not be read");
            for (lease, expected) in [(1, Ok(())), (2, DENIED), (3, Ok(())), (4, Ok(()))] {
                assert_eq!(check.put(&PutRequest { lease, ..put("b") }), expected, "lease {lease}");
            }
        });
    }

    #[test]
    fn a_deletion_needs_its_range_and_the_previous_values() {
        with_ann(|check| {
            assert_eq!(check.delete_range(&delete("b", "d")), Ok(()));
            assert_eq!(check.delete_range(&delete("b", "e")), DENIED);
            assert_eq!(check.delete_range(&DeleteRangeRequest { prev_kv: true, ..delete("b", "c") }), Ok(()));
            assert_eq!(check.delete_range(&DeleteRangeRequest { prev_kv: true, ..delete("b", "d") }), DENIED);
        });
    }

    /// FAULT-42, FAULT-44.
    #[test]
    fn every_part_of_a_transaction_is_checked_whichever_runs() {
        let compare = |key: &'static str| Compare { key: key.into(), ..Compare::default() };
        let txn = |compare, success, failure| TxnRequest { compare, success, failure };
        let write = |key| op(request_op::Request::RequestPut(put(key)));
        let nested = |txn| op(request_op::Request::RequestTxn(txn));
        with_ann(|check| {
            assert_eq!(check.txn(&txn(vec![compare("a")], vec![write("b")], vec![write("c")])), Ok(()));
            assert_eq!(check.txn(&txn(vec![compare("c")], vec![], vec![])), DENIED);
            assert_eq!(check.txn(&txn(vec![], vec![write("a")], vec![])), DENIED);
            assert_eq!(check.txn(&txn(vec![], vec![], vec![write("a")])), DENIED);
            let inner = txn(vec![], vec![], vec![write("a")]);
            assert_eq!(check.txn(&txn(vec![], vec![nested(inner)], vec![])), DENIED);
            let previous = op(request_op::Request::RequestPut(PutRequest { prev_kv: true, ..put("c") }));
            assert_eq!(check.txn(&txn(vec![], vec![], vec![previous])), DENIED);
            let leased = op(request_op::Request::RequestPut(PutRequest { lease: 2, ..put("b") }));
            assert_eq!(check.txn(&txn(vec![], vec![leased], vec![])), DENIED);
            let read = RangeRequest { key: "b".into(), range_end: "d".into(), ..RangeRequest::default() };
            assert_eq!(check.txn(&txn(vec![], vec![op(request_op::Request::RequestRange(read))], vec![])), DENIED);
        });
    }

    /// KV-56.
    #[test]
    fn an_empty_transaction_needs_no_user() {
        let (auth, leases) = (users(), leases());
        let check = PermissionCheck { auth: &auth, leases: leases.reader(), requester: Requester::default() };
        assert_eq!(check.txn(&TxnRequest::default()), Ok(()));
        assert_eq!(check.put(&put("b")), Err(Error::UserEmpty));
    }

    #[test]
    fn the_keys_of_a_lease_are_checked_one_by_one_if_not_together() {
        with_ann(|check| {
            for (lease, access, expected) in [
                (1, Access::Write, Ok(())),
                (1, Access::Read, DENIED),
                (2, Access::Write, DENIED),
                (3, Access::Write, Ok(())),
                (9, Access::Read, Ok(())),
            ] {
                assert_eq!(check.attached_keys(access, LeaseId(lease)), expected, "{access:?} lease {lease}");
            }
        });
    }

    #[test]
    fn a_command_names_the_user_in_etcds_header() {
        use crate::{
            proto::etcdserverpb::{InternalRaftRequest, RequestHeader},
            state::{Command, Kind},
        };
        let requester = Requester { user: "ann", auth_revision: 7 };
        let entry = Command::encode_for(requester, 1, Kind::Put, &put("b").encode_to_vec());
        let decoded = InternalRaftRequest::decode(entry).unwrap();
        let header = RequestHeader { id: 1, username: "ann".into(), auth_revision: 7 };
        assert_eq!((decoded.header, decoded.put), (Some(header), Some(put("b"))));
    }
}
