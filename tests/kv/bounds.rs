//! Limits with flags of our own, as clients see them.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{
    AlarmRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op::Request,
};
use tonic::Code;

use crate::support::{Server, assert_refused, eventually, eventually_async, time_limit};

/// KV-50: if too many entries are committed but not applied, writes fail with "too many requests" and the code Unknown.
#[tokio::test(flavor = "multi_thread")]
async fn writes_are_refused_during_a_backlog_between_commit_and_apply() {
    const AT_ONCE: usize = 256;
    let server = Server::start(&["--max-apply-backlog=0"]);
    let kv = server.kv().await;
    let maintenance = server.maintenance().await;
    let refusal =
        eventually_async("a write arrives while others are committed but not applied", time_limit(), async || {
            let calls: Vec<_> = (0..AT_ONCE)
                .map(|nth| {
                    let (mut kv, mut maintenance) = (kv.clone(), maintenance.clone());
                    let put = PutRequest { key: format!("{nth}").into(), ..PutRequest::default() };
                    let put = tokio::spawn(async move { kv.put(put).await });
                    (put, tokio::spawn(async move { maintenance.alarm(AlarmRequest::default()).await }))
                })
                .collect();
            let mut refusal = None;
            for (put, alarms) in calls {
                refusal = put.await.unwrap().err().or(refusal);
                let alarms = alarms.await.unwrap().expect("a backlog does not stop clients from reading the alarms");
                assert!(alarms.into_inner().alarms.is_empty());
            }
            refusal
        })
        .await;
    assert_refused(Err::<(), _>(refusal), Code::Unknown, "etcdserver: too many requests");
}

#[tokio::test]
async fn watches_beyond_the_limit_of_a_stream_are_refused() {
    let server = Server::start(&["--max-watches-per-stream=2"]);
    let mut client = server.client().await;
    let mut stream = client.watch("a", None).await.unwrap();
    for key in ["b", "c"] {
        stream.watch(key, None).await.unwrap();
    }
    let refused = loop {
        let answer = stream.message().await.unwrap().expect("the stream goes on");
        if answer.canceled() {
            break answer;
        }
        assert!(answer.created() && answer.watch_id() < 2);
    };
    let too_many = "etcdserver: too many watches on this stream (--max-watches-per-stream=2)";
    assert_eq!((refused.watch_id(), refused.cancel_reason()), (-1, too_many));
    client.watch("d", None).await.expect("another stream has watches of its own");
}

#[test]
fn connections_beyond_the_limit_wait() {
    let server = Server::start(&["--max-connections=1"]);
    let mut first = TcpStream::connect(server.address()).unwrap();
    // Answered, and kept open.
    write!(first, "GET /version HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert!(first.read(&mut [0; 64]).unwrap() > 0);
    let mut second = TcpStream::connect(server.address()).unwrap();
    write!(second, "GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    server.wait_for_log("too many client connections");
    second.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(second.read(&mut [0; 1]).is_err(), "the connection is not answered yet");
    drop(first);
    second.set_read_timeout(Some(time_limit())).unwrap();
    let mut answer = String::new();
    second.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// The server closes connections that do not answer pings.
#[test]
fn a_connection_that_does_not_answer_a_ping_is_closed() {
    const PING: u8 = 6;
    let server = Server::start(&["--grpc-keepalive-interval=1s", "--grpc-keepalive-timeout=500ms"]);
    let mut client = TcpStream::connect(server.address()).unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    client.write_all(&settings).unwrap();
    client.set_read_timeout(Some(time_limit())).unwrap();
    let started = Instant::now();
    let mut received = Vec::new();
    // Reads up to the end of the connection, whether it is closed or reset.
    let _ = client.read_to_end(&mut received);
    let took = started.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(30)).contains(&took), "it was closed after {took:?}");
    let mut kinds = Vec::new();
    let mut rest = received.as_slice();
    while let [a, b, c, kind, more @ ..] = rest {
        kinds.push(*kind);
        rest = &more[5 + usize::from(*a) * 65_536 + usize::from(*b) * 256 + usize::from(*c)..];
    }
    assert!(kinds.contains(&PING), "{kinds:?}");
}

/// Calls that take longer than expected are logged.
#[tokio::test]
async fn slow_calls_are_logged() {
    let server = Server::start(&["--warning-unary-request-duration=1us"]);
    server.kv().await.put(PutRequest { key: "k".into(), ..PutRequest::default() }).await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&server.wait_for_log("request stats")).unwrap();
    assert_eq!((line["level"].as_str(), line["response type"].as_str()), (Some("warn"), Some("/etcdserverpb.KV/Put")));
    assert_eq!(line["request size"], 3);
}

/// Every thread that processes them has enough stack.
/// FAULT-47.
#[tokio::test]
async fn transactions_nest_up_to_the_documented_depth() {
    let server = Server::start(&["--max-txn-ops=1000"]);
    let mut kv = server.kv().await;
    let nested = |levels: usize| {
        let put = PutRequest { key: "deep".into(), value: levels.to_string().into(), ..PutRequest::default() };
        let outermost = (1..levels).fold(Request::RequestPut(put), |inner, _| {
            let success = vec![RequestOp { request: Some(inner) }];
            Request::RequestTxn(TxnRequest { success, ..TxnRequest::default() })
        });
        TxnRequest { success: vec![RequestOp { request: Some(outermost) }], ..TxnRequest::default() }
    };
    let answer = kv.txn(nested(500)).await.unwrap_err();
    assert!(answer.message().contains("recursion limit"), "this client cannot decode an answer that deep: {answer}");
    let found = kv.range(RangeRequest { key: "deep".into(), ..RangeRequest::default() }).await.unwrap().into_inner();
    assert_eq!(found.kvs[0].value, "500");
    let refusal = kv.txn(nested(501)).await;
    let too_deep = "etcdserver: too many levels of nested transactions (--max-txn-depth=500)";
    assert_refused(refusal, Code::InvalidArgument, too_deep);
    // A lower limit, with the default limit of operations, which is looked at first.
    let server = Server::start(&["--max-txn-depth=3"]);
    let mut kv = server.kv().await;
    kv.txn(nested(3)).await.unwrap();
    let too_deep = "etcdserver: too many levels of nested transactions (--max-txn-depth=3)";
    assert_refused(kv.txn(nested(4)).await, Code::InvalidArgument, too_deep);
    let too_many = "etcdserver: too many operations in txn request";
    assert_refused(kv.txn(nested(501)).await, Code::InvalidArgument, too_many);
    assert_eq!((counted(&server, "txn_depth"), counted(&server, "txn_ops")), (1, 1));
}

/// How many requests were refused for this reason.
fn counted(server: &Server, reason: &str) -> u64 {
    let metrics = server.http("GET", "/metrics").body;
    let name = format!("metastore_http2_refused_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

/// FAULT-47.
#[tokio::test]
async fn leases_beyond_the_limit_are_not_granted() {
    let server = Server::start(&["--max-leases=2"]);
    let mut client = server.client().await;
    let first = client.lease_grant(100, None).await.unwrap().id();
    client.lease_grant(100, None).await.unwrap();
    let etcd_client::Error::GRpcStatus(refusal) = client.lease_grant(100, None).await.unwrap_err() else {
        panic!("it is an error of the server")
    };
    assert_eq!(
        (refusal.code(), refusal.message()),
        (Code::ResourceExhausted, "etcdserver: too many leases (--max-leases=2)")
    );
    assert_eq!(counted(&server, "leases"), 1);
    client.lease_revoke(first).await.unwrap();
    client.lease_grant(100, None).await.unwrap();
}

/// FAULT-47.
#[tokio::test]
async fn answers_beyond_the_limit_are_refused_and_shorter_ones_are_not() {
    let server = Server::start(&["--max-request-bytes=524288", "--max-answer-bytes=1048576"]);
    let mut kv = server.kv().await;
    for key in ["a", "b", "c"] {
        let value = vec![b'x'; 500_000].into();
        kv.put(PutRequest { key: key.into(), value, ..PutRequest::default() }).await.unwrap();
    }
    let list = |limit| RangeRequest { key: "a".into(), range_end: "d".into(), limit, ..RangeRequest::default() };
    let text = "etcdserver: the answer is too large (--max-answer-bytes=1048576): ask for fewer keys with a limit, or use RangeStream";
    assert_refused(kv.range(list(0)).await, Code::ResourceExhausted, text);
    assert_eq!(kv.range(list(2)).await.unwrap().into_inner().kvs.len(), 2);
    let keys_only = RangeRequest { keys_only: true, ..list(0) };
    assert_eq!(
        kv.range(keys_only).await.unwrap().into_inner().kvs.len(),
        3,
        "what counts is the answer, not what is read"
    );
    let reads = |limit| {
        let op = RequestOp { request: Some(Request::RequestRange(list(limit))) };
        TxnRequest { success: vec![op], ..TxnRequest::default() }
    };
    assert_refused(kv.txn(reads(0)).await, Code::ResourceExhausted, text);
    kv.txn(reads(2)).await.unwrap();
    assert_eq!(counted(&server, "answer_bytes"), 2);
    let mut stream = kv.range_stream(list(0)).await.unwrap().into_inner();
    let mut streamed = 0;
    while let Some(part) = stream.message().await.unwrap() {
        streamed += part.range_response.unwrap().kvs.len();
    }
    assert_eq!(streamed, 3, "a stream is not limited");
}

/// FAULT-47.
#[test]
fn connections_beyond_the_limit_of_an_address_are_closed() {
    let server = Server::start(&["--max-connections-per-address=2"]);
    let connect = || {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(time_limit())).unwrap();
        // The connection may be closed before the request is written.
        let _ = write!(stream, "GET /version HTTP/1.1\r\nHost: a\r\n\r\n");
        let answered = stream.read(&mut [0; 64]).is_ok_and(|read| read > 0);
        (stream, answered)
    };
    let (first, second) = (connect(), connect());
    assert!(first.1 && second.1);
    assert!(!connect().1, "a third one is closed");
    server.wait_for_log("too many connections from one address; more are closed");
    drop(first);
    let (_third, metrics) = eventually("another one is served", time_limit(), || {
        let (mut stream, answered) = connect();
        let mut metrics = String::new();
        if answered {
            write!(stream, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
            stream.read_to_string(&mut metrics).unwrap();
        }
        answered.then_some((stream, metrics))
    });
    assert!(metrics.contains("metastore_http2_refused_total{reason=\"connections_per_address\"}"), "{metrics}");
}
