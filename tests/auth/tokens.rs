//! Tokens: how long they are valid, and what ends them; and JSON web tokens.

use std::{fs, time::Duration};

use metastore::proto::{
    authpb::permission::Type,
    etcdserverpb::{AuthUserChangePasswordRequest, AuthUserDeleteRequest, MemberListRequest, PutRequest},
};
use prost::Message;
use test_support::Server;
use tonic::{Code, Status, transport::Channel};

use super::calls::{add_user, call, enable, log_in, must, permit, set_up_users};

async fn put(channel: &Channel, token: &str, key: &str) -> Result<(), Status> {
    let put = PutRequest { key: key.to_owned().into(), ..PutRequest::default() };
    call(channel, "/etcdserverpb.KV/Put", Some(token), put.encode_to_vec()).await.map(drop)
}

async fn users_of(server: &Server) -> Channel {
    let channel = server.channel().await;
    set_up_users(&channel).await;
    enable(&channel).await;
    channel
}

fn assert_invalid(outcome: Result<(), Status>) {
    let refused = outcome.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "etcdserver: invalid auth token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_simple_token_ends_when_it_is_not_used() {
    let server = Server::start(&["--bcrypt-cost=4", "--auth-token-ttl=2"]);
    let channel = users_of(&server).await;
    let [used, unused] =
        [log_in(&channel, "writer", "writer").await.unwrap(), log_in(&channel, "writer", "writer").await.unwrap()];
    assert!(used.len() > 17 && used.as_bytes()[16] == b'.', "{used}");
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        put(&channel, &used, "a").await.unwrap();
    }
    assert_invalid(put(&channel, &unused, "a").await);
    put(&channel, &format!("Bearer {used}"), "a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_ends_with_the_password_the_user_and_the_authentication() {
    let server = Server::start(&["--bcrypt-cost=4"]);
    let channel = users_of(&server).await;
    let root = log_in(&channel, "root", "root").await.unwrap();
    let writer = log_in(&channel, "writer", "writer").await.unwrap();
    let request = AuthUserChangePasswordRequest { name: "writer".into(), password: "new".into(), ..Default::default() };
    must(&channel, "/etcdserverpb.Auth/UserChangePassword", Some(&root), &request).await;
    assert_invalid(put(&channel, &writer, "a").await);
    let old = log_in(&channel, "writer", "writer").await.unwrap_err();
    assert_eq!(old.message(), "etcdserver: authentication failed, invalid user ID or password");
    let writer = log_in(&channel, "writer", "new").await.unwrap();
    put(&channel, &writer, "a").await.unwrap();
    must(&channel, "/etcdserverpb.Auth/UserDelete", Some(&root), &AuthUserDeleteRequest { name: "writer".into() })
        .await;
    assert_invalid(put(&channel, &writer, "a").await);
    must(&channel, "/etcdserverpb.Auth/AuthDisable", Some(&root), &()).await;
    put(&channel, &root, "a").await.unwrap(); // A token is ignored now.
    enable(&channel).await;
    assert_invalid(put(&channel, &root, "a").await);
}

/// AUTH-14: a JSON web token is too old after any change of users, and only for keys.
#[tokio::test(flavor = "multi_thread")]
async fn a_json_web_token_ends_with_its_time_and_is_too_old_after_a_change() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("key");
    fs::write(&key, "a secret").unwrap();
    let tokens = format!("--auth-token=jwt,sign-method=HS256,priv-key={},ttl=3s", key.display());
    let mut server = Server::start(&["--bcrypt-cost=4", &tokens]);
    let channel = users_of(&server).await;
    let writer = log_in(&channel, "writer", "writer").await.unwrap();
    put(&channel, &writer, "a").await.unwrap();
    let root = log_in(&channel, "root", "root").await.unwrap();
    permit(&channel, Some(&root), "r", Type::Read, "x", "").await;
    let old = put(&channel, &writer, "a").await.unwrap_err();
    assert_eq!((old.code(), old.message()), (Code::InvalidArgument, "etcdserver: revision of auth store is old"));
    must(&channel, "/etcdserverpb.Cluster/MemberList", Some(&writer), &MemberListRequest::default()).await;
    let writer = log_in(&channel, "writer", "writer").await.unwrap();
    // It is stored nowhere, so it outlasts the process.
    server.kill();
    server.restart();
    let channel = server.channel().await;
    put(&channel, &writer, "a").await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_invalid(put(&channel, &writer, "a").await);
}

#[test]
fn a_token_option_that_cannot_be_used_stops_the_start() {
    for (option, reason) in [
        ("paseto", "unknown kind of token"),
        ("jwt", "unknown sign-method"),
        ("jwt,sign-method=RS256", "auth: missing key data"),
        ("jwt,sign-method=HS256,priv-key=/nonexistent", "/nonexistent"),
        ("jwt,sign-method=HS256,ttl=x", "ttl"),
        ("jwt,sign-method", "is not name=value"),
        ("jwt,ttl=1s,ttl=2s", "is given twice"),
    ] {
        let mut server = Server::single(&[&format!("--auth-token={option}")]);
        server.launch();
        server.wait_for_refusal(reason);
    }
}

/// FAULT-44: neither the log, nor the database, nor the log lines contain a password.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_written_nowhere() {
    const PASSWORD: &str = "correct-horse-battery";
    let server = Server::start(&["--bcrypt-cost=4", "--log-level=debug"]);
    let channel = users_of(&server).await;
    let root = log_in(&channel, "root", "root").await.unwrap();
    add_user(&channel, Some(&root), "ann", PASSWORD).await;
    log_in(&channel, "ann", PASSWORD).await.unwrap();
    log_in(&channel, "bob", PASSWORD).await.unwrap_err();
    let mut directories = vec![server.data_dir()];
    let mut files = 0;
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
                continue;
            }
            files += 1;
            let bytes = fs::read(entry.path()).unwrap();
            let is_found = bytes.windows(PASSWORD.len()).any(|window| window == PASSWORD.as_bytes());
            assert!(!is_found, "{}", entry.path().display());
        }
    }
    assert!(files > 3, "only {files} files were found");
    assert!(!server.log().contains(PASSWORD));
}

/// The audit log has what was administered and what was denied, in a file of its own.
#[tokio::test(flavor = "multi_thread")]
async fn denied_and_administrative_operations_are_in_the_audit_log() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("audit");
    let server = Server::start(&["--bcrypt-cost=4", &format!("--audit-log={}", file.display())]);
    let channel = users_of(&server).await;
    let reader = log_in(&channel, "reader", "reader").await.unwrap();
    put(&channel, &reader, "a").await.unwrap_err();
    log_in(&channel, "reader", "wrong").await.unwrap_err();
    let lines: Vec<serde_json::Value> =
        fs::read_to_string(&file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |user: &str, operation: &str, decision: &str, error: Option<&str>| {
        lines.iter().any(|line| {
            line["logger"] == "audit"
                && line["user"] == user
                && line["operation"] == operation
                && line["decision"] == decision
                && line["remote-addr"].as_str().is_some_and(|address| address.starts_with("127.0.0.1:"))
                && line.get("error").and_then(|error| error.as_str()) == error
        })
    };
    assert!(has("", "UserAdd", "allowed", None), "{lines:#?}");
    assert!(has("", "AuthEnable", "allowed", None), "{lines:#?}");
    assert!(has("reader", "Put", "denied", Some("etcdserver: permission denied")), "{lines:#?}");
    let failed = "etcdserver: authentication failed, invalid user ID or password";
    assert!(has("reader", "Authenticate", "denied", Some(failed)), "{lines:#?}");
    assert!(!server.log().contains(r#""logger":"audit""#));
}
