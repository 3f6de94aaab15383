//! Hostile clients over TLS: silent and half-open connections, garbage, foreign and expired certificates. Memory stays bounded, and
//! other clients are served.

use std::{
    io::Write,
    net::TcpStream as StdStream,
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{RangeRequest, kv_client::KvClient};
use rcgen::ExtendedKeyUsagePurpose;
use tonic::transport::Channel;

use super::authority::{Authority, SECURE, Wanted};
use crate::support::{Server, eventually, time_limit};

/// The beginning of a TLS handshake that is never continued: a record that announces more than it has.
const HALF_OPEN: [u8; 9] = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc];

fn half_open(server: &Server, count: usize) -> Vec<StdStream> {
    let open = |_| {
        let mut stream = StdStream::connect(server.address()).unwrap();
        stream.write_all(&HALF_OPEN).unwrap();
        stream
    };
    (0..count).map(open).collect()
}

async fn metric(authority: &Authority, server: &Server, name: &str) -> f64 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = authority.connect(server, &["http/1.1"], None).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// The slowest but two of a hundred reads, each through a connection of its own or through a given one.
async fn p99(authority: &Authority, server: &Server, channel: Option<&Channel>) -> Duration {
    let mut took = Vec::new();
    for _ in 0..100 {
        let started = Instant::now();
        let channel = match channel {
            Some(channel) => channel.clone(),
            None => authority.channel(server, None).await.expect("a client connects"),
        };
        let get = RangeRequest { key: "a".into(), ..RangeRequest::default() };
        KvClient::new(channel).range(get).await.expect("a client is served");
        took.push(started.elapsed());
    }
    took.sort_unstable();
    took[98]
}

/// FAULT-45, FAULT-47.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_keep_no_client_out() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &["--max-waiting-handshakes=100".to_owned()]);
    let connected = authority.channel(&server, None).await.unwrap();
    let quiet = [p99(&authority, &server, None).await, p99(&authority, &server, Some(&connected)).await];
    let memory = resident_bytes(&server);
    let files = open_files(&server);
    let held = half_open(&server, 1000);
    server.wait_for_log("100 handshakes are in progress, the maximum (--max-waiting-handshakes)");
    eventually("the server has closed the oldest", time_limit(), || {
        let open = open_files(&server);
        if open <= files + 110 { Ok(()) } else { Err(open) }
    });
    let beside = [p99(&authority, &server, None).await, p99(&authority, &server, Some(&connected)).await];
    println!(
        "p99 of a read on a new connection and on an open one: quiet {quiet:?}, beside 1,000 half-open handshakes {beside:?}"
    );
    assert!(beside.iter().all(|&took| took < time_limit() / 4), "{beside:?}");
    let grown = resident_bytes(&server).saturating_sub(memory);
    assert!(grown < 64 << 20, "{grown} bytes for 1,000 connections");
    let waiting = metric(&authority, &server, "metastore_tls_handshakes_waiting{side=\"client\"}").await;
    assert!(waiting <= 100.0, "{waiting} handshakes are in progress");
    let evicted =
        metric(&authority, &server, "metastore_tls_handshakes_total{outcome=\"evicted\",side=\"client\"}").await;
    assert!(evicted >= 900.0, "{evicted} were closed in favour of newer ones");
    drop(held);
}

fn open_files(server: &Server) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count()
}

fn resident_bytes(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// FAULT-45.
#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_has_a_deadline() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &["--client-begin-timeout=1s".to_owned()]);
    let mut silent = StdStream::connect(server.address()).unwrap();
    let mut half_open = half_open(&server, 1).remove(0);
    for stream in [&mut silent, &mut half_open] {
        stream.set_read_timeout(Some(time_limit())).unwrap();
        let ended = std::io::copy(stream, &mut std::io::sink());
        assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
    }
    server.wait_for_log("tls: the handshake was not completed in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_wrong_certificates_are_refused_with_a_reason() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let client = Wanted { purposes: &[ExtendedKeyUsagePurpose::ClientAuth], ..Wanted::default() };
    authority.issue("good", client);
    authority.issue("expired", Wanted { has_expired: true, ..client });
    authority.issue("server-only", Wanted { purposes: &[ExtendedKeyUsagePurpose::ServerAuth], ..client });
    foreign.issue_into(&authority, "foreign", client);
    let server = authority.server(SECURE, &[authority.flag("trusted-ca-file", "ca.pem")]);
    StdStream::connect(server.address()).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    server.wait_for_log("tls: first record does not look like a TLS handshake");
    for (shown, reason) in [
        (None, "tls: client didn't provide a certificate"),
        (Some("expired"), "x509: certificate has expired or is not yet valid"),
        (Some("foreign"), "x509: certificate signed by unknown authority"),
        (Some("server-only"), "x509: certificate specifies an incompatible key usage"),
    ] {
        for _ in 0..20 {
            let served = match authority.channel(&server, shown).await {
                Ok(channel) => {
                    KvClient::new(channel).range(RangeRequest { key: "a".into(), ..Default::default() }).await.is_ok()
                }
                Err(_) => false,
            };
            assert!(!served, "{shown:?}");
        }
        server.wait_for_log(reason);
    }
    let channel = authority.channel(&server, Some("good")).await.unwrap();
    KvClient::new(channel).range(RangeRequest { key: "a".into(), ..Default::default() }).await.unwrap();
}

/// Connections that end in the middle of a handshake leave nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_end_early_leave_nothing_behind() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &[]);
    for _ in 0..20 {
        drop(half_open(&server, 50));
    }
    server.wait_for_log("\"error\":\"EOF\"");
    eventually("the server has closed them", time_limit(), || {
        let open = open_files(&server);
        if open < 300 { Ok(()) } else { Err(open) }
    });
    assert!(p99(&authority, &server, None).await < time_limit());
}
