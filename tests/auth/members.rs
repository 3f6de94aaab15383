//! Users in a cluster: through every member, over restarts and snapshots; and the capability level that they need.

use metastore::proto::{
    authpb::permission::Type,
    etcdserverpb::{AuthRoleAddRequest, AuthUserRevokeRoleRequest, DefragmentRequest, PutRequest, RangeRequest},
};
use prost::Message;
use test_support::{Server, eventually_async, program, time_limit};
use tonic::{Code, transport::Channel};

use super::calls::{add_user, call, enable, grant_role, log_in, must, permit, set_up_users};

const FLAGS: &[&str] = &["--bcrypt-cost=4", "--heartbeat-interval=50", "--election-timeout=500"];
const PUT: &str = "/etcdserverpb.KV/Put";
const RANGE: &str = "/etcdserverpb.KV/Range";

fn cluster(arguments: [&[&str]; 3]) -> Vec<Server> {
    let mut servers = Server::cluster_of(&program(), 3, FLAGS);
    for (server, arguments) in servers.iter_mut().zip(arguments) {
        server.set_arguments(&[FLAGS, arguments].concat());
        server.launch();
    }
    servers.iter_mut().for_each(Server::await_serving);
    servers
}

fn get(key: &str) -> Vec<u8> {
    RangeRequest { key: key.to_owned().into(), ..RangeRequest::default() }.encode_to_vec()
}

fn put(key: &str) -> Vec<u8> {
    PutRequest { key: key.to_owned().into(), value: "v".into(), ..PutRequest::default() }.encode_to_vec()
}

fn revoke(user: &str, role: &str) -> AuthUserRevokeRoleRequest {
    AuthUserRevokeRoleRequest { name: user.into(), role: role.into() }
}

async fn channels(servers: &[Server]) -> Vec<Channel> {
    let mut channels = Vec::new();
    for server in servers {
        channels.push(server.channel().await);
    }
    channels
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_member_has_acknowledged_counts_at_all_others_at_once() {
    let servers = cluster([&[], &[], &[]]);
    let channels = channels(&servers).await;
    set_up_users(&channels[0]).await;
    enable(&channels[1]).await;
    let root = log_in(&channels[2], "root", "root").await.unwrap();
    for nth in 0..30 {
        let (here, there) = (&channels[nth % 3], &channels[(nth + 1) % 3]);
        // A token of one member, used at another one.
        let writer = log_in(here, "writer", "writer").await.unwrap();
        call(there, PUT, Some(&writer), put("a/1")).await.unwrap();
        call(there, RANGE, Some(&writer), get("a/1")).await.unwrap();
        // A permission that was granted through another member.
        let (key, root) = (format!("c/{nth}"), Some(root.as_str()));
        permit(here, root, "w", Type::Readwrite, &key, "").await;
        call(there, PUT, Some(&writer), put(&key)).await.unwrap();
        assert_eq!(call(there, PUT, Some(&writer), put("d")).await.unwrap_err().code(), Code::PermissionDenied);
        // A user and its login, through three members.
        let name = format!("user{nth}");
        add_user(here, root, &name, "pw").await;
        grant_role(there, root, &name, "r").await;
        let token = log_in(&channels[(nth + 2) % 3], &name, "pw").await.unwrap();
        call(here, RANGE, Some(&token), get("a/1")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_outlast_restarts_and_tokens_do_not() {
    let mut servers = cluster([&[], &[], &[]]);
    let all = channels(&servers).await;
    set_up_users(&all[0]).await;
    enable(&all[0]).await;
    let writer = log_in(&all[0], "writer", "writer").await.unwrap();
    servers[1].kill_and_restart();
    let restarted = servers[1].channel().await;
    let refused = call(&restarted, PUT, Some(&writer), put("a")).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "etcdserver: invalid auth token"));
    call(&all[0], PUT, Some(&writer), put("a")).await.unwrap();
    let again = log_in(&restarted, "writer", "writer").await.unwrap();
    call(&restarted, PUT, Some(&again), put("a")).await.unwrap();
    assert_eq!(call(&restarted, PUT, None, put("a")).await.unwrap_err().message(), "etcdserver: user name is empty");
}

/// FAULT-10, FAULT-2: a snapshot carries the users, and the member uses them at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_sent_a_snapshot_knows_the_users_in_it() {
    let few = ["--snapshot-count=10", "--snapshot-catchup-entries=5"];
    let mut servers = cluster([&few, &few, &few]);
    let all = channels(&servers).await;
    set_up_users(&all[0]).await;
    enable(&all[0]).await;
    let root = log_in(&all[0], "root", "root").await.unwrap();
    servers[2].kill();
    // It may have led, and what is on its way to it then is lost.
    eventually_async("there is a leader", time_limit(), async || {
        call(&all[0], PUT, Some(&root), put("fill")).await.map(drop).map_err(|status| status.to_string())
    })
    .await;
    permit(&all[0], Some(&root), "w", Type::Readwrite, "x", "").await;
    grant_role(&all[0], Some(&root), "idle", "w").await;
    must(&all[0], "/etcdserverpb.Auth/UserRevokeRole", Some(&root), &revoke("writer", "w")).await;
    for nth in 0..300 {
        call(&all[0], PUT, Some(&root), put(&format!("fill/{nth}"))).await.unwrap();
    }
    must(&all[0], "/etcdserverpb.Maintenance/Defragment", Some(&root), &DefragmentRequest {}).await; // Flushes, so the log is truncated.
    servers[2].restart();
    let behind = servers[2].channel().await;
    let idle = log_in(&behind, "idle", "idle").await.unwrap();
    call(&behind, PUT, Some(&idle), put("x")).await.unwrap();
    let writer = log_in(&behind, "writer", "writer").await.unwrap();
    assert_eq!(call(&behind, PUT, Some(&writer), put("a")).await.unwrap_err().code(), Code::PermissionDenied);
}

async fn can_have_users(channel: &Channel) -> Result<(), String> {
    let request = AuthRoleAddRequest { name: "probe".into() };
    match call(channel, "/etcdserverpb.Auth/RoleAdd", None, request.encode_to_vec()).await {
        Ok(_) => Ok(()),
        Err(status) if status.message() == "etcdserver: role name already exists" => Ok(()),
        Err(status) => Err(status.message().to_owned()),
    }
}

const OLD: &[&str] = &["--max-capability-level=0"];

/// An upgrade, member by member. Until all members know the new level they can go back.
#[tokio::test(flavor = "multi_thread")]
async fn users_can_be_added_once_all_members_know_them() {
    let mut servers = cluster([OLD, OLD, OLD]);
    for (nth, server) in servers.iter_mut().enumerate() {
        assert_eq!(can_have_users(&server.channel().await).await.unwrap_err(), "etcdserver: not capable");
        server.stop();
        server.restart_with(FLAGS);
        if nth == 1 {
            // Back to the old version, and forward again.
            server.stop();
            server.restart_with(&[FLAGS, OLD].concat());
            server.stop();
            server.restart_with(FLAGS);
        }
    }
    for server in &servers {
        let channel = server.channel().await;
        eventually_async("the level is raised", time_limit(), async || can_have_users(&channel).await).await;
    }
    // There is no way back now.
    servers[0].stop();
    servers[0].set_arguments(&[FLAGS, OLD].concat());
    servers[0].launch();
    servers[0].wait_for_refusal("the cluster uses capability level 1, and this member knows level 0 only");
}

/// A member that cannot be reached counts with what it has published; if it comes back with an older version, it stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_meets_what_it_does_not_know_stops() {
    let mut servers = cluster([&[], OLD, &[]]);
    servers[2].kill();
    let first = servers[0].channel().await;
    assert_eq!(can_have_users(&first).await.unwrap_err(), "etcdserver: not capable");
    servers[1].stop();
    servers[1].restart_with(FLAGS);
    eventually_async("the level is raised", time_limit(), async || can_have_users(&first).await).await;
    servers[2].set_arguments(&[FLAGS, OLD].concat());
    servers[2].launch();
    servers[2].wait_for_log("is of a kind that this member, which knows capability level 0, does not know");
    assert!(!servers[2].wait_for_end().success());
    servers[2].restart_with(FLAGS);
    can_have_users(&servers[2].channel().await).await.unwrap();
}
