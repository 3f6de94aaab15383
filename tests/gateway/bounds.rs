//! What clients can make the gateway hold, and how many calls they can have in progress.

use std::time::Duration;

use crate::{
    client::{Exchange, post},
    support::{Server, eventually, time_limit},
};

fn held(server: &Server) -> f64 {
    server.http("GET", "/metrics").metric("metastore_http2_held_bytes")
}

fn holds_almost_nothing(server: &Server) {
    eventually("nothing is held", time_limit(), || {
        let bytes = held(server);
        if bytes < 10_000.0 { Ok(()) } else { Err(bytes) }
    });
}

#[test]
fn a_body_is_refused_as_soon_as_it_is_too_long() {
    let server = Server::start(&["--max-request-bytes=100000"]);
    let mut exchange = Exchange::post_chunked(server.address(), "/v3/kv/put");
    exchange.send_chunk("{\"key\":\"Zm9v\",\"value\":\"");
    let piece = "A".repeat(100_000);
    for _ in 0..26 {
        exchange.send_chunk(&piece);
    }
    // It never ends, and is answered nevertheless.
    exchange.read_head();
    assert_eq!(exchange.head.status, 429, "{:?}", exchange.head);
    drop(exchange);
    let answer =
        post(server.address(), "/v3/kv/put", &[], format!("{{\"key\":\"Zm9v\",\"value\":\"{piece}\"}}").as_bytes());
    assert_eq!(answer.status, 200);
    // Space and what is unknown count as well, though not for the message.
    let padded = format!("{{\"key\":\"Zm9v\",\"unknown\":\"{}\"}}{}", "x".repeat(1_000_000), " ".repeat(3_000_000));
    assert_eq!(post(server.address(), "/v3/kv/put", &[], padded.as_bytes()).status, 200);
    holds_almost_nothing(&server);
}

#[test]
fn half_requests_are_counted_and_released() {
    let server = Server::start(&["--client-read-timeout=2s"]);
    let halves: Vec<_> = ["/v3/kv/put", "/v3/watch", "/v3/lease/keepalive"]
        .iter()
        .map(|path| {
            let mut exchange = Exchange::begin(server.address(), "POST", path, &[("Content-Length", "4000000")]);
            exchange.send_raw(format!("{{\"x\":\"{}", "A".repeat(1_000_000)).as_bytes());
            exchange
        })
        .collect();
    eventually("all of it is counted", time_limit(), || {
        let bytes = held(&server);
        if bytes > 3_000_000.0 { Ok(()) } else { Err(bytes) }
    });
    // A unary call has to be sent in time.
    let mut halves = halves.into_iter();
    let mut put = halves.next().unwrap();
    put.read_head();
    assert_eq!(put.head.status, 400);
    drop(halves);
    holds_almost_nothing(&server);
    // A client that stops in the middle of its request.
    let mut exchange = Exchange::begin(server.address(), "POST", "/v3/kv/put", &[("Content-Length", "100")]);
    exchange.send_raw(b"{\"key\":");
    drop(exchange);
    holds_almost_nothing(&server);
}

/// As in etcd, whose gateway is one client of its server.
#[test]
fn calls_share_one_limit_of_streams() {
    let server = Server::start(&["--max-concurrent-streams=2"]);
    let watches = [(); 2].map(|()| {
        let mut watch = Exchange::post(server.address(), "/v3/watch", &[], "{\"create_request\":{\"key\":\"Zm9v\"}}");
        watch.next_line().unwrap();
        watch
    });
    let range = || post(server.address(), "/v3/kv/range", &[("Grpc-Timeout", "300m")], b"{\"key\":\"Zm9v\"}");
    let refused = range();
    assert_eq!(
        (refused.status, refused.body.as_str()),
        (504, "{\"code\":4,\"message\":\"context deadline exceeded\"}")
    );
    let [one, _other] = watches;
    drop(one);
    eventually("there is room for a call", time_limit(), || range().status == 200);
}

/// A long answer is counted until the client has read it.
#[test]
fn answers_are_counted_until_they_are_read() {
    let server = Server::start(&["--max-held-bytes=67108864"]);
    let value = "A".repeat(1_000_000);
    for key in 0..20 {
        let body = format!("{{\"key\":\"aw{key:02}\",\"value\":\"{value}\"}}");
        assert_eq!(post(server.address(), "/v3/kv/put", &[], body.as_bytes()).status, 200);
    }
    let all = "{\"key\":\"AA==\",\"range_end\":\"AA==\"}";
    let mut slow = Exchange::post(server.address(), "/v3/kv/range", &[], all);
    slow.read_head();
    assert_eq!(slow.head.status, 200);
    eventually("the answer is counted", time_limit(), || {
        let bytes = held(&server);
        if bytes > 15_000_000.0 { Ok(()) } else { Err(bytes) }
    });
    let others: Vec<_> = [(); 5].iter().map(|()| Exchange::post(server.address(), "/v3/kv/range", &[], all)).collect();
    let statuses: Vec<_> = others
        .into_iter()
        .map(|mut other| {
            other.read_head();
            // What is not read stays counted, so connections stay open until all have been answered.
            (other.head.status, other)
        })
        .collect();
    assert!(statuses.iter().any(|(status, _)| *status == 429), "more is held than may be");
    drop(statuses);
    assert!(!slow.is_silent_for(Duration::from_secs(1)));
    drop(slow);
    holds_almost_nothing(&server);
}
