//! Every RPC as every kind of user, with authentication off and on: denied by default.
//!
//! The methods are those of the compiled descriptors, so a method that is added has to get a request here, and an expectation.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use bytes::Bytes;
use metastore::proto::authpb::Permission;
use metastore::proto::{
    DESCRIPTORS,
    etcdserverpb::{
        AlarmRequest, AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGetRequest, AuthRoleGrantPermissionRequest,
        AuthRoleRevokePermissionRequest, AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest,
        AuthUserGetRequest, AuthUserGrantRoleRequest, AuthUserRevokeRoleRequest, AuthenticateRequest,
        CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
        LeaseTimeToLiveRequest, MemberAddRequest, MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest,
        MoveLeaderRequest, PutRequest, RangeRequest, RequestOp, StatusRequest, StatusResponse, TxnRequest,
        WatchCreateRequest, WatchRequest, WatchResponse, request_op::Request, watch_request::RequestUnion,
    },
    v3electionpb::{CampaignRequest, LeaderKey, LeaderRequest, ProclaimRequest, ResignRequest},
    v3lockpb::{LockRequest, UnlockRequest},
};
use prost::Message;
use prost_types::FileDescriptorSet;
use test_support::{Server, program, requirements::etcd};
use tonic::transport::Channel;

use super::calls::{call, enable, log_in, must, set_up_users};

const USERS: [&str; 6] = ["anonymous", "invalid", "idle", "reader", "writer", "root"];

/// Methods that this server does not implement yet: their answers to root differ.
const NOT_IMPLEMENTED: [&str; 2] = ["/etcdserverpb.Maintenance/Snapshot", "/etcdserverpb.Maintenance/Downgrade"];
/// Called last, because it ends the authentication.
const LAST: &str = "/etcdserverpb.Auth/AuthDisable";

/// All methods of etcd's services, in the order of the descriptors.
fn methods() -> Vec<String> {
    let files = FileDescriptorSet::decode(DESCRIPTORS).unwrap().file;
    let mut found = Vec::new();
    for file in files {
        for service in &file.service {
            let names = service.method.iter().map(|method| method.name().to_owned());
            found.extend(names.map(|name| format!("/{}.{}/{name}", file.package(), service.name())));
        }
    }
    found.retain(|path| path != LAST && !path.starts_with("/grpc."));
    found.push(LAST.to_owned());
    found
}

fn bytes(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// A request for a method that a user is to make. What it changes belongs to that user alone.
fn request(path: &str, user: &str, nth: i64, member: u64) -> Bytes {
    let key = || Bytes::from(format!("a/{user}"));
    let (lease, name) = (100 + nth, format!("victim-{user}"));
    let leader = || LeaderKey { name: key(), key: key(), rev: 1, lease };
    let put = || PutRequest { key: key(), value: "v".into(), ..PutRequest::default() };
    match path.rsplit_once('.').unwrap().1 {
        "KV/Range" | "KV/RangeStream" => bytes(&RangeRequest { key: key(), ..RangeRequest::default() }),
        "KV/Put" => bytes(&put()),
        "KV/DeleteRange" => bytes(&DeleteRangeRequest { key: key(), prev_kv: true, ..Default::default() }),
        "KV/Txn" => bytes(&TxnRequest {
            compare: vec![Compare { key: key(), ..Compare::default() }],
            success: vec![RequestOp { request: Some(Request::RequestPut(put())) }],
            failure: Vec::new(),
        }),
        "KV/Compact" => bytes(&CompactionRequest { revision: 1 << 40, physical: false }),
        "Watch/Watch" => {
            let create = WatchCreateRequest { key: key(), ..WatchCreateRequest::default() };
            bytes(&WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) })
        }
        "Lease/LeaseGrant" => bytes(&LeaseGrantRequest { id: 1000 + nth, ttl: 600 }),
        "Lease/LeaseRevoke" => bytes(&LeaseRevokeRequest { id: 200 + nth }),
        "Lease/LeaseKeepAlive" => bytes(&LeaseKeepAliveRequest { id: lease }),
        "Lease/LeaseTimeToLive" => bytes(&LeaseTimeToLiveRequest { id: lease, keys: true }),
        "Auth/Authenticate" => bytes(&AuthenticateRequest { name: "reader".into(), password: "wrong".into() }),
        "Auth/UserAdd" => bytes(&AuthUserAddRequest { name: format!("new-{user}"), ..Default::default() }),
        "Auth/UserGet" => bytes(&AuthUserGetRequest { name: "reader".into() }),
        "Auth/UserDelete" => bytes(&AuthUserDeleteRequest { name: format!("new-{user}") }),
        "Auth/UserChangePassword" => {
            bytes(&AuthUserChangePasswordRequest { name, password: "p".into(), ..Default::default() })
        }
        "Auth/UserGrantRole" => bytes(&AuthUserGrantRoleRequest { user: name, role: "r".into() }),
        "Auth/UserRevokeRole" => bytes(&AuthUserRevokeRoleRequest { name, role: "r".into() }),
        "Auth/RoleAdd" => bytes(&AuthRoleAddRequest { name: format!("role-{user}") }),
        "Auth/RoleGet" => bytes(&AuthRoleGetRequest { role: "r".into() }),
        "Auth/RoleDelete" => bytes(&AuthRoleDeleteRequest { role: format!("role-{user}") }),
        "Auth/RoleGrantPermission" => {
            let perm = Some(Permission { key: "z".into(), ..Permission::default() });
            bytes(&AuthRoleGrantPermissionRequest { name: "r".into(), perm })
        }
        "Auth/RoleRevokePermission" => {
            bytes(&AuthRoleRevokePermissionRequest { role: "r".into(), key: "z".into(), range_end: Bytes::new() })
        }
        "Cluster/MemberAdd" => {
            let peer_ur_ls = vec!["http://localhost:2380".to_owned()];
            bytes(&MemberAddRequest { peer_ur_ls, is_learner: true })
        }
        "Cluster/MemberRemove" => bytes(&MemberRemoveRequest { id: 1 }),
        "Cluster/MemberUpdate" => {
            bytes(&MemberUpdateRequest { id: 1, peer_ur_ls: vec!["http://localhost:1".to_owned()] })
        }
        "Cluster/MemberPromote" => bytes(&MemberPromoteRequest { id: 1 }),
        "Maintenance/Alarm" => bytes(&AlarmRequest { action: 2, member_id: 1, alarm: 1 }),
        "Maintenance/MoveLeader" => bytes(&MoveLeaderRequest { target_id: member }),
        "Lock/Lock" => bytes(&LockRequest { name: format!("a/lock-{user}").into(), lease }),
        "Lock/Unlock" => bytes(&UnlockRequest { key: key() }),
        "Election/Campaign" => {
            bytes(&CampaignRequest { name: format!("a/election-{user}").into(), lease, value: "v".into() })
        }
        "Election/Proclaim" => bytes(&ProclaimRequest { leader: Some(leader()), value: "v".into() }),
        "Election/Leader" | "Election/Observe" => bytes(&LeaderRequest { name: format!("a/election-{user}").into() }),
        "Election/Resign" => bytes(&ResignRequest { leader: Some(leader()) }),
        "Lease/LeaseLeases"
        | "Auth/AuthEnable"
        | "Auth/AuthDisable"
        | "Auth/AuthStatus"
        | "Auth/UserList"
        | "Auth/RoleList"
        | "Cluster/MemberList"
        | "Maintenance/Status"
        | "Maintenance/Defragment"
        | "Maintenance/Hash"
        | "Maintenance/HashKV"
        | "Maintenance/Snapshot"
        | "Maintenance/Downgrade" => Bytes::new(),
        other => panic!("{other} has no request in this test"),
    }
}

/// What becomes of a call: `ok`, or code and text.
async fn outcome(channel: &Channel, path: &str, token: Option<&str>, message: Bytes) -> String {
    match call(channel, path, token, message).await {
        Ok(Some(answer)) if path.ends_with("/Watch") => {
            let response = WatchResponse::decode(answer).unwrap();
            if response.canceled { format!("canceled: {}", response.cancel_reason) } else { "ok".to_owned() }
        }
        Ok(_) => "ok".to_owned(),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// The outcomes of every method for every user, first with authentication off, then on.
async fn outcomes(server: &Server) -> BTreeMap<String, [String; USERS.len()]> {
    let channel = server.channel().await;
    let status = must(&channel, "/etcdserverpb.Maintenance/Status", None, &StatusRequest {}).await;
    let member = StatusResponse::decode(status).unwrap().leader;
    set_up_users(&channel).await;
    let mut table = BTreeMap::new();
    for enabled in [false, true] {
        for (user, nth) in USERS.iter().zip(if enabled { 20.. } else { 10.. }) {
            let name = format!("victim-{user}-{enabled}");
            super::calls::add_user(&channel, None, &name, "p").await;
            for id in [100 + nth, 200 + nth] {
                must(&channel, "/etcdserverpb.Lease/LeaseGrant", None, &LeaseGrantRequest { id, ttl: 600 }).await;
                let put = PutRequest { key: format!("a/held-{id}").into(), lease: id, ..PutRequest::default() };
                must(&channel, "/etcdserverpb.KV/Put", None, &put).await;
            }
        }
        // A lease with a key that only root may read.
        if !enabled {
            let id = 99;
            must(&channel, "/etcdserverpb.Lease/LeaseGrant", None, &LeaseGrantRequest { id, ttl: 600 }).await;
            let put = PutRequest { key: "z".into(), lease: id, ..PutRequest::default() };
            must(&channel, "/etcdserverpb.KV/Put", None, &put).await;
        }
        if enabled {
            enable(&channel).await;
        }
        let mut tokens = Vec::new();
        for user in USERS {
            tokens.push(match user {
                "anonymous" => None,
                "invalid" => Some("x.1".to_owned()),
                _ if enabled => Some(log_in(&channel, user, user).await.unwrap()),
                _ => None,
            });
        }
        for path in methods() {
            // Without authentication these would change what the other calls need.
            if !enabled && (path.ends_with("/AuthEnable") || path.ends_with("/AuthDisable")) {
                continue;
            }
            let mut row: [String; USERS.len()] = Default::default();
            for ((column, user), (token, nth)) in
                row.iter_mut().zip(USERS).zip(tokens.iter().zip(if enabled { 20.. } else { 10.. }))
            {
                let message = request(&path, &format!("{user}-{enabled}"), nth, member);
                *column = outcome(&channel, &path, token.as_deref(), message).await;
            }
            table.insert(format!("{} {path}", if enabled { "on" } else { "off" }), row);
        }
    }
    table
}

fn start(program: &Path) -> Server {
    Server::start_program(program, &["--bcrypt-cost=4"])
}

/// What a denied call gets.
const DENIALS: [&str; 5] = [
    "InvalidArgument: etcdserver: user name is empty",
    "PermissionDenied: etcdserver: permission denied",
    "Unauthenticated: etcdserver: invalid auth token",
    "Unknown: etcdserver: user name is empty",
    "Unknown: etcdserver: permission denied",
];

fn is_denied(outcome: &str) -> bool {
    DENIALS.contains(&outcome)
        || outcome == "Unknown: etcdserver: invalid auth token"
        || outcome.starts_with("canceled: rpc error: code = ")
}

/// FAULT-41, KV-42: what needs no user is listed here; everything else is denied to a client without one.
#[tokio::test(flavor = "multi_thread")]
async fn everything_is_denied_without_a_user_but_for_what_is_listed() {
    const FOR_ANYONE: [&str; 2] = ["/etcdserverpb.Auth/AuthStatus", "/etcdserverpb.Auth/Authenticate"];
    let table = outcomes(&start(&program())).await;
    for (method, row) in &table {
        let (enabled, path) = method.split_once(' ').unwrap();
        let [anonymous, invalid, idle, _, _, root] = row;
        // Whatever it cannot read it observes as nothing, as in etcd.
        if path.ends_with("/Observe") {
            continue;
        }
        let is_open = enabled == "off" || FOR_ANYONE.contains(&path);
        assert_eq!(!is_denied(anonymous), is_open, "{method} without a user: {anonymous}");
        let ignores_tokens = enabled == "off" || path.ends_with("/Authenticate");
        assert_eq!(!is_denied(invalid), ignores_tokens, "{method} with an invalid token: {invalid}");
        assert!(!is_denied(root), "{method} as root: {root}");
        if enabled == "on" && path.starts_with("/etcdserverpb.KV/") {
            assert!(is_denied(idle), "{method} without a role: {idle}");
        }
    }
}

/// The same table at both servers.
#[tokio::test(flavor = "multi_thread")]
async fn every_method_is_allowed_and_denied_as_by_etcd() {
    let Some(etcd) = etcd() else { return };
    let (ours, theirs) = (start(&program()), start(&etcd));
    let (ours, theirs) = tokio::join!(outcomes(&ours), outcomes(&theirs));
    let mut differences = String::new();
    for (method, row) in &theirs {
        for (nth, user) in USERS.iter().enumerate() {
            let is_missing = NOT_IMPLEMENTED.iter().any(|path| method.ends_with(path)) && !is_denied(&row[nth]);
            if row[nth] != ours[method][nth] && !is_missing {
                writeln!(differences, "{method} as {user}: {:?}, etcd: {:?}", ours[method][nth], row[nth]).unwrap();
            }
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}
