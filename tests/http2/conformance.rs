//! Both HTTP/2 servers give the same responses: this project's own, and tonic, which serves the same method table as a plain
//! reference.

use std::fmt::Debug;

use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn, TxnOp, WatchOptions};
use metastore::proto::etcdserverpb::{PutRequest, RangeRequest, RangeStreamResponse, kv_client::KvClient};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, codec::CompressionEncoding, transport::Channel};

use crate::{
    odd_calls,
    support::{Server, time_limit},
};

async fn both() -> [(Server, KvClient<Channel>); 2] {
    let start = async |name| {
        let server = Server::start(&[&format!("--grpc-server={name}")]);
        let client = server.kv().await;
        (server, client)
    };
    [start("own").await, start("tonic").await]
}

#[tokio::test]
async fn compressed_calls_get_compressed_responses() {
    for (_server, client) in both().await {
        let mut client = client.send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
        let value = "repeated ".repeat(10_000);
        client.put(PutRequest { key: "a".into(), value: value.clone().into(), ..PutRequest::default() }).await.unwrap();
        let answer = client.range(RangeRequest { key: "a".into(), ..RangeRequest::default() }).await.unwrap();
        assert_eq!(answer.metadata().get("grpc-encoding").unwrap(), "gzip");
        assert_eq!(answer.into_inner().kvs[0].value, value.as_bytes());
    }
}

#[tokio::test]
async fn silent_clients_are_disconnected() {
    for name in ["own", "tonic"] {
        let server = Server::start(&[&format!("--grpc-server={name}"), "--client-begin-timeout=1s"]);
        for beginning in ["", "PRI * HTTP/2"] {
            let (mut silent, mut output) = (TcpStream::connect(server.address()).await.unwrap(), Vec::new());
            silent.write_all(beginning.as_bytes()).await.unwrap();
            let closed = tokio::time::timeout(time_limit(), silent.read_to_end(&mut output)).await;
            assert!(closed.expect("the server must close the connection").is_ok());
            // A server of HTTP/2 alone sends its SETTINGS at once; a client that has begun to speak it may receive a GOAWAY, too.
            let may_speak = name == "tonic" || !beginning.is_empty();
            assert!(output.is_empty() || may_speak && output.get(3) == Some(&4), "{output:?}");
        }
    }
}

/// hyper checks fewer of them than grpc-go does.
#[test]
fn odd_calls_get_the_responses_of_etcd() {
    for (name, calls) in [("own", odd_calls::all()), ("tonic", odd_calls::behind_hyper())] {
        let server = Server::start(&[&format!("--grpc-server={name}")]);
        let wrong: Vec<String> = calls
            .iter()
            .map(|call| (call, call.ask(server.address())))
            .filter(|(call, answer)| call.answer != *answer)
            .map(|(call, answer)| format!("{}\n    etcd: {}\n    {name}: {answer}", call.name(), call.answer))
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_with_the_same_text() {
    let mut messages = Vec::new();
    for (_server, mut client) in both().await {
        let value = vec![b'x'; 3 << 20].into();
        let refused = client.put(PutRequest { key: "a".into(), value, ..PutRequest::default() }).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        messages.push(refused.message().to_owned());
        client.range(RangeRequest { key: "a".into(), ..RangeRequest::default() }).await.unwrap();
    }
    assert_eq!(messages[0], messages[1]);
}

#[tokio::test]
async fn a_large_list_arrives_complete() {
    for (_server, mut client) in both().await {
        for nth in 0..20_u8 {
            let put =
                PutRequest { key: vec![b'k', nth].into(), value: vec![nth; 500_000].into(), ..PutRequest::default() };
            client.put(put).await.unwrap();
        }
        let range = RangeRequest { key: "k".into(), range_end: "l".into(), ..RangeRequest::default() };
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (mut client, range) = (client.clone(), range.clone());
            waiting.spawn(async move { client.range(range).await.unwrap().into_inner() });
        }
        for list in waiting.join_all().await {
            assert!(list.kvs.iter().zip(0..20_u8).all(|(kv, nth)| kv.value == vec![nth; 500_000]));
            assert_eq!(list.kvs.len(), 20);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn open_watches_are_told_that_the_server_stops() {
    for (mut server, _) in both().await {
        let mut client = server.client().await;
        let mut stream = client.watch("a", None).await.unwrap();
        tokio::task::block_in_place(|| server.stop());
        let mut last = stream.message().await;
        while let Ok(Some(_)) = last {
            last = stream.message().await;
        }
        assert!(last.as_ref().is_err_and(|error| error.to_string().contains("etcdserver: server stopped")), "{last:?}");
    }
}

/// What a client sees of a server, one line per response. Member IDs, cluster IDs and terms are left out: they differ between any
/// two servers.
struct Transcript(Vec<String>);

impl Transcript {
    fn add<T: Debug, E: Debug>(&mut self, what: &str, response: &Result<T, E>) {
        let mut text = format!("{response:?}");
        // The metadata of an error: tonic sends the date.
        if let Some((before, (_, behind))) =
            text.split_once("metadata: ").map(|(a, b)| (a, b.split_once("source: ").unwrap()))
        {
            text = format!("{before}{behind}");
        }
        let mut line = String::new();
        for part in text.split_inclusive([',', '{', '}', '(', ')', '[', ']']) {
            let is_local = ["cluster_id:", "member_id:", "raft_term:"];
            if !is_local.iter().any(|field| part.trim_start().starts_with(field)) {
                line.push_str(part);
            }
        }
        self.0.push(format!("{what}: {line}"));
    }
}

/// A call of each kind, with its errors.
async fn transcript(server: &Server) -> Vec<String> {
    let mut out = Transcript(Vec::new());
    let mut client = server.client().await;
    out.add("grant", &client.lease_grant(600, Some(etcd_client::LeaseGrantOptions::new().with_id(7))).await);
    out.add("grant again", &client.lease_grant(600, Some(etcd_client::LeaseGrantOptions::new().with_id(7))).await);
    let mut watch = client.watch("k", Some(WatchOptions::new().with_prefix().with_prev_key())).await.unwrap();
    out.add("watch", &watch.message().await);
    for key in ["k1", "k2", "k3"] {
        out.add("put", &client.put(key, "v", Some(PutOptions::new().with_lease(7).with_prev_key())).await);
        out.add("event", &watch.message().await);
    }
    out.add("put without a key", &client.put("", "v", None).await);
    out.add("range", &client.get("k", Some(GetOptions::new().with_prefix().with_limit(2))).await);
    out.add("range of a future revision", &client.get("k1", Some(GetOptions::new().with_revision(99))).await);
    let txn = Txn::new()
        .when([Compare::value("k1", CompareOp::Equal, "v")])
        .and_then([TxnOp::put("k1", "w", None), TxnOp::get("k2", None)])
        .or_else([TxnOp::delete("k3", None)]);
    out.add("txn", &client.txn(txn.clone()).await);
    out.add("event", &watch.message().await);
    out.add("txn that fails", &client.txn(txn).await);
    out.add("event", &watch.message().await);
    out.add("time to live", &client.lease_time_to_live(7, None).await.map(|response| response.granted_ttl()));
    let (mut keeper, mut renewed) = client.lease_keep_alive(7).await.unwrap();
    keeper.keep_alive().await.unwrap();
    out.add("keep-alive", &renewed.message().await);
    out.add("delete", &client.delete("k2", Some(DeleteOptions::new().with_prev_key())).await);
    out.add("event", &watch.message().await);
    out.add("compact", &client.compact(4, None).await);
    out.add("compact again", &client.compact(4, None).await);
    out.add("range of a compacted revision", &client.get("k1", Some(GetOptions::new().with_revision(2))).await);
    out.add("lock", &client.lock("l", Some(etcd_client::LockOptions::new().with_lease(7))).await);
    out.add("campaign", &client.campaign("e", "a", 7).await);
    out.add("leader", &client.leader("e").await);
    let mut observed = client.observe("e").await.unwrap();
    out.add("observe", &observed.message().await);
    out.add("revoke", &client.lease_revoke(7).await);
    out.add("revoke again", &client.lease_revoke(7).await);
    out.add("hash", &client.maintenance_client().hash_kv(0).await);
    out.add("alarms", &client.alarm(etcd_client::AlarmAction::Get, etcd_client::AlarmType::None, None).await);
    out.add("users", &client.user_list().await);
    let mut raw = server.kv().await;
    let list = RangeRequest { key: "k".into(), range_end: "l".into(), ..RangeRequest::default() };
    let mut stream = raw.range_stream(list).await.unwrap().into_inner();
    loop {
        let chunk: Result<Option<RangeStreamResponse>, _> = stream.message().await;
        out.add("range stream", &chunk);
        if !matches!(chunk, Ok(Some(_))) {
            break;
        }
    }
    out.0
}

#[tokio::test]
async fn every_kind_of_call_has_the_same_response() {
    let [(own, _), (tonic, _)] = both().await;
    let (own, tonic) = (transcript(&own).await, transcript(&tonic).await);
    assert!(own.len() > 30 && own.len() == tonic.len(), "{} and {} responses", own.len(), tonic.len());
    for (own, tonic) in own.iter().zip(&tonic) {
        assert_eq!(own, tonic);
    }
}

/// It serves gRPC alone.
#[tokio::test]
async fn tonic_serves_no_http1() {
    let server = Server::start(&["--grpc-server=tonic"]);
    let (mut client, mut output) = (TcpStream::connect(server.address()).await.unwrap(), Vec::new());
    client.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let closed = tokio::time::timeout(time_limit(), client.read_to_end(&mut output)).await;
    closed.expect("the server must close the connection").ok();
    assert!(!output.starts_with(b"HTTP/1"), "{}", String::from_utf8_lossy(&output));
}
