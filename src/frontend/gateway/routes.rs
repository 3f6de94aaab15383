//! The routes of the JSON API: those that etcd's `.proto` files declare with `google.api.http`.

use std::borrow::Cow;

use crate::frontend::http::percent::percent_decoded;

/// A path, and the method that it calls.
pub const ROUTES: &[(&str, &str)] = &[
    ("/v3/kv/range", "/etcdserverpb.KV/Range"),
    ("/v3/kv/put", "/etcdserverpb.KV/Put"),
    ("/v3/kv/deleterange", "/etcdserverpb.KV/DeleteRange"),
    ("/v3/kv/txn", "/etcdserverpb.KV/Txn"),
    ("/v3/kv/compaction", "/etcdserverpb.KV/Compact"),
    ("/v3/watch", "/etcdserverpb.Watch/Watch"),
    ("/v3/lease/grant", "/etcdserverpb.Lease/LeaseGrant"),
    ("/v3/lease/revoke", "/etcdserverpb.Lease/LeaseRevoke"),
    ("/v3/kv/lease/revoke", "/etcdserverpb.Lease/LeaseRevoke"),
    ("/v3/lease/keepalive", "/etcdserverpb.Lease/LeaseKeepAlive"),
    ("/v3/lease/timetolive", "/etcdserverpb.Lease/LeaseTimeToLive"),
    ("/v3/kv/lease/timetolive", "/etcdserverpb.Lease/LeaseTimeToLive"),
    ("/v3/lease/leases", "/etcdserverpb.Lease/LeaseLeases"),
    ("/v3/kv/lease/leases", "/etcdserverpb.Lease/LeaseLeases"),
    ("/v3/cluster/member/add", "/etcdserverpb.Cluster/MemberAdd"),
    ("/v3/cluster/member/remove", "/etcdserverpb.Cluster/MemberRemove"),
    ("/v3/cluster/member/update", "/etcdserverpb.Cluster/MemberUpdate"),
    ("/v3/cluster/member/list", "/etcdserverpb.Cluster/MemberList"),
    ("/v3/cluster/member/promote", "/etcdserverpb.Cluster/MemberPromote"),
    ("/v3/maintenance/alarm", "/etcdserverpb.Maintenance/Alarm"),
    ("/v3/maintenance/status", "/etcdserverpb.Maintenance/Status"),
    ("/v3/maintenance/defragment", "/etcdserverpb.Maintenance/Defragment"),
    ("/v3/maintenance/hash", "/etcdserverpb.Maintenance/Hash"),
    ("/v3/maintenance/hashkv", "/etcdserverpb.Maintenance/HashKV"),
    ("/v3/maintenance/snapshot", "/etcdserverpb.Maintenance/Snapshot"),
    ("/v3/maintenance/transfer-leadership", "/etcdserverpb.Maintenance/MoveLeader"),
    ("/v3/maintenance/downgrade", "/etcdserverpb.Maintenance/Downgrade"),
    ("/v3/auth/enable", "/etcdserverpb.Auth/AuthEnable"),
    ("/v3/auth/disable", "/etcdserverpb.Auth/AuthDisable"),
    ("/v3/auth/status", "/etcdserverpb.Auth/AuthStatus"),
    ("/v3/auth/authenticate", "/etcdserverpb.Auth/Authenticate"),
    ("/v3/auth/user/add", "/etcdserverpb.Auth/UserAdd"),
    ("/v3/auth/user/get", "/etcdserverpb.Auth/UserGet"),
    ("/v3/auth/user/list", "/etcdserverpb.Auth/UserList"),
    ("/v3/auth/user/delete", "/etcdserverpb.Auth/UserDelete"),
    ("/v3/auth/user/changepw", "/etcdserverpb.Auth/UserChangePassword"),
    ("/v3/auth/user/grant", "/etcdserverpb.Auth/UserGrantRole"),
    ("/v3/auth/user/revoke", "/etcdserverpb.Auth/UserRevokeRole"),
    ("/v3/auth/role/add", "/etcdserverpb.Auth/RoleAdd"),
    ("/v3/auth/role/get", "/etcdserverpb.Auth/RoleGet"),
    ("/v3/auth/role/list", "/etcdserverpb.Auth/RoleList"),
    ("/v3/auth/role/delete", "/etcdserverpb.Auth/RoleDelete"),
    ("/v3/auth/role/grant", "/etcdserverpb.Auth/RoleGrantPermission"),
    ("/v3/auth/role/revoke", "/etcdserverpb.Auth/RoleRevokePermission"),
    ("/v3/lock/lock", "/v3lockpb.Lock/Lock"),
    ("/v3/lock/unlock", "/v3lockpb.Lock/Unlock"),
    ("/v3/election/campaign", "/v3electionpb.Election/Campaign"),
    ("/v3/election/proclaim", "/v3electionpb.Election/Proclaim"),
    ("/v3/election/leader", "/v3electionpb.Election/Leader"),
    ("/v3/election/observe", "/v3electionpb.Election/Observe"),
    ("/v3/election/resign", "/v3electionpb.Election/Resign"),
];

/// The paths below which the JSON API is, the old one of which means the same.
const PREFIX: &str = "/v3/";
const OLD_PREFIX: &str = "/v3beta/";

/// Whether a path, as it was sent, is one of the JSON API, with a route or without.
#[must_use]
pub fn is_json_path(path: &str) -> bool {
    path.starts_with(PREFIX) || path.starts_with(OLD_PREFIX)
}

/// The path that a route has, for a path as it was sent.
#[must_use]
pub fn route_path(path: &str) -> Cow<'_, str> {
    let decoded = percent_decoded(path);
    match decoded.strip_prefix(OLD_PREFIX) {
        Some(rest) => Cow::Owned(format!("{PREFIX}{rest}")),
        None => decoded,
    }
}

/// Whether clients may send messages to this path for as long as they like.
#[must_use]
pub fn is_open_ended(path: &str) -> bool {
    is_json_path(path) && matches!(route_path(path).as_ref(), "/v3/watch" | "/v3/lease/keepalive")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_route_for_each_that_etcd_declares() {
        assert_eq!(ROUTES.len(), 51);
        let declared = include_str!("../../../docs/contract/wire-tables.md");
        for (path, method) in ROUTES {
            let (service, name) = method[1..].split_once('/').unwrap();
            let row = declared.lines().find(|line| line.starts_with(&format!("| `{service}` | {name} |")));
            assert!(row.is_some_and(|row| row.contains(&format!("`POST {path}`"))), "{method}: {row:?}");
        }
    }

    #[test]
    fn paths_are_decoded() {
        assert_eq!(route_path("/v3/kv%2Fran%67e"), "/v3/kv/range");
        assert_eq!(route_path("/v3beta/kv/put"), "/v3/kv/put");
        assert_eq!(route_path("/v3/a%2"), "/v3/a%2");
        assert!(is_open_ended("/v3/watch") && !is_open_ended("/v3/kv/put") && !is_open_ended("/watch"));
    }
}
