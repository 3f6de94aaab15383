//! Members over TLS: mutual, generated, joining, snapshots, and certificates that do not match.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use etcd_client::{Client, MemberAddOptions};
use rcgen::ExtendedKeyUsagePurpose;

use super::authority::{Authority, Wanted};
use crate::support::{Server, eventually_async, free_url, program, time_limit};

/// The flags of a member that shows `<file>.pem` to others, and demands certificates of this authority from them.
fn mutual(authority: &Authority, file: &str) -> Vec<String> {
    vec![
        authority.flag("peer-cert-file", &format!("{file}.pem")),
        authority.flag("peer-key-file", &format!("{file}.key")),
        authority.flag("peer-trusted-ca-file", "ca.pem"),
        "--peer-client-cert-auth".to_owned(),
    ]
}

pub fn secure_url() -> String {
    free_url().replace("http://", "https://")
}

/// A member that listens for others at its peer URL, not started yet.
pub fn member(name: &str, url: &str, initial_cluster: &str, state: &str, more: &[String]) -> Server {
    let identity = [
        ("--name", name),
        ("--listen-client-urls", "http://127.0.0.1:0"),
        ("--advertise-client-urls", "http://127.0.0.1:2379"),
        ("--listen-peer-urls", url),
        ("--initial-advertise-peer-urls", url),
        ("--initial-cluster", initial_cluster),
        ("--initial-cluster-state", state),
    ];
    Server::new(&program(), &identity, &more.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The members of a new cluster, not started yet, with the flags that `flags` returns for each.
pub fn cluster(urls: &[String], flags: impl Fn(usize) -> Vec<String>) -> Vec<Server> {
    let all: Vec<_> = urls.iter().enumerate().map(|(nth, url)| format!("m{nth}={url}")).collect();
    let start = |(nth, url): (usize, &String)| member(&format!("m{nth}"), url, &all.join(","), "new", &flags(nth));
    urls.iter().enumerate().map(start).collect()
}

pub fn start_all(servers: &mut [Server]) {
    servers.iter_mut().for_each(Server::launch);
    servers.iter_mut().for_each(Server::await_serving);
}

fn secure_cluster(flags: impl Fn(usize) -> Vec<String>) -> Vec<Server> {
    let urls: Vec<_> = (0..3).map(|_| secure_url()).collect();
    let mut servers = cluster(&urls, flags);
    start_all(&mut servers);
    servers
}

/// Every member has the value, so messages have gone through all of them.
async fn assert_replicates(servers: &[Server], value: &str) {
    servers[0].client().await.put("replicated", value, None).await.unwrap();
    for server in servers {
        let found = server.client().await.get("replicated", None).await.unwrap();
        assert_eq!(found.kvs()[0].value_str().unwrap(), value);
    }
}

/// What a port answers to a request without TLS.
fn plain_request(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(time_limit())).unwrap();
    stream.write_all(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer); // The connection may be reset.
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn members_replicate_with_mutual_tls_and_send_snapshots() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    let short_log = ["--snapshot-count=100", "--snapshot-catchup-entries=10"].map(str::to_owned);
    let mut servers = secure_cluster(|_| [&mutual(&authority, "member")[..], &short_log].concat());
    assert_replicates(&servers, "first").await;
    servers[2].kill();
    let mut client = servers[0].client().await;
    let first_index = || servers[0].http("GET", "/metrics").metric("metastore_log_first_index");
    let (before, mut written) = (first_index(), 0);
    eventually_async("the log is truncated", time_limit(), async || {
        for _ in 0..100 {
            // It may fail while there is no leader: the one that was killed may have led.
            let put = client.put(format!("key/{written}"), vec![b'x'; 1000], None).await;
            written += usize::from(put.is_ok());
        }
        first_index() > before + 200.0
    })
    .await;
    servers[2].restart();
    servers[2].wait_for_log("received and saved a snapshot");
    assert_replicates(&servers, "second").await;
    let answer = plain_request(&servers[0].peer_address());
    assert!(!answer.contains("etcdserver"), "the port answers only over TLS: {answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_generate_their_certificates() {
    let mut servers = secure_cluster(|_| vec!["--peer-auto-tls".to_owned()]);
    assert!(servers[0].data_dir().join("fixtures/peer/key.pem").exists());
    assert_replicates(&servers, "first").await;
    servers[1].kill_and_restart();
    assert_replicates(&servers, "second").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_join_over_tls() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    let first = secure_url();
    let mut servers = cluster(std::slice::from_ref(&first), |_| mutual(&authority, "member"));
    start_all(&mut servers);
    let second = secure_url();
    let mut client = servers[0].client().await;
    let options = MemberAddOptions::new().with_is_learner();
    let added = client.member_add([second.clone()], Some(options)).await.unwrap();
    let id = added.member().unwrap().id();
    let all = format!("m0={first},m1={second}");
    servers.push(member("m1", &second, &all, "existing", &mutual(&authority, "member")));
    servers[1].launch();
    servers[1].await_serving();
    promote(&mut client, id).await;
    assert_replicates(&servers, "both").await;
}

/// A learner can be promoted once it has caught up.
async fn promote(client: &mut Client, id: u64) {
    let client = &*client;
    eventually_async("the learner is promoted", time_limit(), async || {
        client.clone().member_promote(id).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}

/// Starts a cluster of which the last member has other flags, and returns the servers once the two others have elected a leader.
async fn with_odd_member(authority: &Authority, usual: &[&str], odd: Vec<String>) -> Vec<Server> {
    let urls: Vec<_> = (0..3).map(|_| secure_url()).collect();
    let mut servers = cluster(&urls, |nth| {
        if nth == 2 {
            return odd.clone();
        }
        mutual(authority, "member").into_iter().chain(usual.iter().map(|&flag| flag.to_owned())).collect()
    });
    servers.iter_mut().for_each(Server::launch);
    servers[..2].iter_mut().for_each(Server::await_serving);
    servers[0].client().await.put("without", "the odd one", None).await.unwrap();
    servers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_foreign_certificate_is_refused_on_both_sides() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    authority.issue("member", Wanted::default());
    foreign.issue_into(&authority, "foreign", Wanted::default());
    let servers = with_odd_member(&authority, &[], mutual(&authority, "foreign")).await;
    let line = servers[0].wait_for_log("rejected connection on peer endpoint");
    assert!(
        line.contains("tls: failed to verify certificate: x509: certificate signed by unknown authority"),
        "{line}"
    );
    servers[2].wait_for_log("remote error: tls: unknown certificate authority");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_an_expired_certificate_is_refused() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    authority.issue("expired", Wanted { has_expired: true, ..Wanted::default() });
    let servers = with_odd_member(&authority, &[], mutual(&authority, "expired")).await;
    servers[0].wait_for_log("x509: certificate has expired or is not yet valid: current time");
    servers[2].wait_for_log("the TLS certificate has expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_revoked_certificate_is_refused() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    authority.issue("revoked", Wanted { serial: 66, ..Wanted::default() });
    authority.revoke("crl", &[66]);
    let list = authority.flag("peer-crl-file", "crl");
    let servers = with_odd_member(&authority, &[&list], mutual(&authority, "revoked")).await;
    servers[0].wait_for_log("transport: certificate serial 42 revoked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_common_name_that_is_not_allowed_is_refused() {
    let authority = Authority::new();
    authority.issue("member", Wanted { common_name: "etcd-a", ..Wanted::default() });
    authority.issue("odd", Wanted { common_name: "etcd-z", ..Wanted::default() });
    let allowed = "--peer-cert-allowed-cn=etcd-a,etcd-b";
    let servers = with_odd_member(&authority, &[allowed], mutual(&authority, "odd")).await;
    let line = servers[0].wait_for_log("client certificate authentication failed");
    assert!(line.contains("etcd-z") && line.contains("etcd-b"), "it names what it has and what was expected: {line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_certificate_is_for_another_address_is_refused_unless_told_otherwise() {
    let authority = Authority::new();
    let client = [ExtendedKeyUsagePurpose::ClientAuth];
    authority.issue("member", Wanted::default());
    authority.issue("elsewhere", Wanted { hosts: &["10.9.8.7"], purposes: &client, ..Wanted::default() });
    let odd = || {
        let shown = [
            authority.flag("peer-client-cert-file", "elsewhere.pem"),
            authority.flag("peer-client-key-file", "elsewhere.key"),
        ];
        mutual(&authority, "member").into_iter().chain(shown).collect::<Vec<_>>()
    };
    let servers = with_odd_member(&authority, &[], odd()).await;
    servers[0].wait_for_log("x509: certificate is valid for 10.9.8.7, not 127.0.0.1");
    drop(servers);
    let skip = "--peer-skip-client-san-verification";
    let mut servers = with_odd_member(&authority, &[skip], odd()).await;
    servers[2].await_serving();
    assert_replicates(&servers, "all").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_the_expected_one_is_not_spoken_to() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    authority.issue("elsewhere", Wanted { hosts: &["10.9.8.7"], ..Wanted::default() });
    let odd: Vec<_> = mutual(&authority, "elsewhere");
    let servers = with_odd_member(&authority, &["--peer-skip-client-san-verification"], odd).await;
    servers[0].wait_for_log("x509: certificate is valid for 10.9.8.7, not 127.0.0.1");
}

/// A member that speaks plainly to a port with TLS is told nothing, and the port says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_connection_to_a_secure_port_is_rejected() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    let mut servers = cluster(&[secure_url()], |_| mutual(&authority, "member"));
    start_all(&mut servers);
    plain_request(&servers[0].peer_address());
    let line = servers[0].wait_for_log("rejected connection on peer endpoint");
    assert!(line.contains("tls: first record does not look like a TLS handshake"), "{line}");
    let silent = TcpStream::connect(servers[0].peer_address()).unwrap();
    servers[0].wait_for_log("tls: the handshake was not completed in time");
    drop(silent);
}
