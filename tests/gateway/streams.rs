//! Watches, keep-alives and observers: many lines for one request, for as long as the client wants.

use std::time::Duration;

use crate::{
    client::{Exchange, post},
    pair::{Pair, comparable},
    support::{Server, eventually, time_limit},
};

fn put(server: &Server, key: &str, value: &str) {
    let body = format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}");
    assert_eq!(post(server.address(), "/v3/kv/put", &[], body.as_bytes()).status, 200);
}

/// The lines of a watch on each server, while both get the same requests.
#[test]
fn a_watch_has_etcds_lines() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    let requests = concat!(
        r#"{"create_request":{"key":"Zg==","range_end":"Zw==","prev_kv":true}} "#,
        r#"{"createRequest":{"key":"Zm9v","watch_id":"5","filters":["NOPUT"]}}"#,
        r#"{"create_request":{"key":"Zm9v","watch_id":"5"}}"#,
        r#"{"create_request":{}}{"unknown":{}}{}"#,
        r#"{"cancel_request":{"watch_id":9}}{"cancel_request":{"watch_id":"5"}}"#,
    );
    let path = "/v3/watch";
    let watches = [&pair.ours, &pair.etcd].map(|server| Exchange::post(server.address(), path, &[], requests));
    let [mut ours, mut theirs] = watches;
    for _ in 0..5 {
        let lines = [&mut ours, &mut theirs].map(|watch| comparable(&watch.next_line().unwrap(), &[]));
        let [line, expected] = lines;
        pair.compare("a line of a watch", line, expected);
    }
    pair.compare("the head of a watch", &ours.head, &theirs.head);
    for value in ["YQ==", "", "Yg=="] {
        put(&pair.ours, "Zm9v", value);
        put(&pair.etcd, "Zm9v", value);
        let [line, expected] = [&mut ours, &mut theirs].map(|watch| comparable(&watch.next_line().unwrap(), &[]));
        pair.compare("an event", line, expected);
    }
    let delete = br#"{"success":[{"request_delete_range":{"key":"Zm9v"}},{"request_put":{"key":"Zm8="}}]}"#;
    pair.post("/v3/kv/txn", &[], delete);
    let [line, expected] = [&mut ours, &mut theirs].map(|watch| comparable(&watch.next_line().unwrap(), &[]));
    assert!(line.contains("\"type\":\"DELETE\""), "{line}");
    pair.compare("events of one revision", line, expected);
    pair.finish();
}

#[test]
fn a_watch_of_compacted_history_is_canceled_as_by_etcd() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    for value in ["YQ==", "Yg==", "Yw=="] {
        put(&pair.ours, "Zm9v", value);
        put(&pair.etcd, "Zm9v", value);
    }
    pair.post("/v3/kv/compaction", &[], b"{\"revision\":\"3\"}");
    let body = r#"{"create_request":{"key":"Zm9v","start_revision":"2"}}"#;
    let lines = [&pair.ours, &pair.etcd].map(|server| {
        let mut watch = Exchange::post(server.address(), "/v3/watch", &[], body);
        [(); 2].map(|()| comparable(&watch.next_line().unwrap(), &[]))
    });
    let [ours, theirs] = lines;
    assert!(ours[1].contains("\"compact_revision\":\"3\""), "{ours:?}");
    pair.compare("the lines", ours, theirs);
    pair.finish();
}

#[test]
fn an_observer_has_etcds_lines() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    pair.post("/v3/lease/grant", &[], br#"{"TTL":100,"ID":"7"}"#);
    pair.post("/v3/election/campaign", &[], br#"{"name":"ZQ==","lease":"7","value":"dg=="}"#);
    let observers = [&pair.ours, &pair.etcd]
        .map(|server| Exchange::post(server.address(), "/v3/election/observe", &[], r#"{"name":"ZQ=="}"#));
    let [mut ours, mut theirs] = observers;
    let [line, expected] = [&mut ours, &mut theirs].map(|observer| comparable(&observer.next_line().unwrap(), &[]));
    pair.compare("the leader", line, expected);
    let proclaim = br#"{"leader":{"name":"ZQ==","key":"ZS83","rev":"2","lease":"7"},"value":"dw=="}"#;
    pair.post("/v3/election/proclaim", &[], proclaim);
    let [line, expected] = [&mut ours, &mut theirs].map(|observer| comparable(&observer.next_line().unwrap(), &[]));
    assert!(line.contains("\"value\":\"dw==\""), "{line}");
    pair.compare("what the leader proclaims", line, expected);
    pair.finish();
}

/// Requests may follow at any time: neither a slow body nor an idle connection ends a stream.
#[test]
fn streams_outlive_all_time_limits() {
    let limits = ["--client-read-timeout=1s", "--client-begin-timeout=1s", "--client-idle-timeout=1s"];
    let server = Server::start(&limits);
    let mut watch = Exchange::post_chunked(server.address(), "/v3/watch");
    let mut keep_alive = Exchange::post_chunked(server.address(), "/v3/lease/keepalive");
    watch.send_chunk("{\"create_request\":{\"key\":\"Zm9v\"");
    keep_alive.send_chunk("{\"ID\":\"");
    assert!(watch.is_silent_for(Duration::from_millis(2500)), "half a request is no request");
    watch.send_chunk("}}");
    keep_alive.send_chunk("7\"}");
    assert!(watch.next_line().unwrap().contains("\"created\":true"));
    assert!(keep_alive.next_line().unwrap().ends_with("\"ID\":\"7\"}}"));
    assert!(watch.is_silent_for(Duration::from_millis(2500)));
    put(&server, "Zm9v", "YQ==");
    assert!(watch.next_line().unwrap().contains("\"value\":\"YQ==\""));
    watch.send_chunk("{\"cancel_request\":{}}");
    assert!(watch.next_line().unwrap().contains("\"canceled\":true"));
    keep_alive.send_chunk("{\"ID\":\"8\"}");
    assert!(keep_alive.next_line().unwrap().ends_with("\"ID\":\"8\"}}"));
    keep_alive.send_chunk("");
    assert_eq!(keep_alive.next_line(), None, "the answer ends after the requests");
}

#[test]
fn a_watch_ends_when_its_client_disconnects_or_the_server_stops() {
    let mut server = Server::start(&[]);
    let count = |server: &Server, what: &str| {
        let of_watch = "grpc_method=\"Watch\",grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"";
        server.http("GET", "/metrics").metric(&format!("grpc_server_{what}{of_watch}}}"))
    };
    let becomes_two = |what: &str| {
        eventually("two watches are counted", time_limit(), || {
            let counted = count(&server, what);
            if counted.total_cmp(&2.0).is_eq() { Ok(()) } else { Err(counted) }
        });
    };
    let create = "{\"create_request\":{\"key\":\"Zm9v\"}}";
    let mut watch = Exchange::post(server.address(), "/v3/watch", &[], create);
    assert!(watch.next_line().unwrap().contains("\"created\":true"));
    // This one has no response that could show that its client is gone. It is gone only once the call has begun: before that,
    // nothing is counted.
    let silent = Exchange::post(server.address(), "/v3/watch", &[], "");
    becomes_two("started_total{");
    drop((watch, silent));
    becomes_two("handled_total{grpc_code=\"Canceled\",");
    let mut watch = Exchange::post(server.address(), "/v3/watch", &[], create);
    assert!(watch.next_line().unwrap().contains("\"created\":true"));
    server.stop();
    assert_eq!(watch.next_line().unwrap(), "{\"error\":{\"code\":14,\"message\":\"etcdserver: server stopped\"}}");
}

/// A client that reads slowly gets everything, and what it has not read is counted and released.
#[test]
fn what_a_watch_delivers_is_not_kept() {
    let server = Server::start(&[]);
    let held = || server.http("GET", "/metrics").metric("metastore_http2_held_bytes");
    let mut watch = Exchange::post(server.address(), "/v3/watch", &[], "{\"create_request\":{\"key\":\"Zm9v\"}}");
    watch.next_line().unwrap();
    let value = "A".repeat(100_000);
    for _ in 0..100 {
        put(&server, "Zm9v", &value);
    }
    let mut events = 0;
    while events < 100 {
        events += watch.next_line().unwrap().matches("\"value\":").count();
    }
    assert_eq!(events, 100);
    drop(watch);
    eventually("nothing is held", time_limit(), || if held() < 10_000.0 { Ok(()) } else { Err(held()) });
}
