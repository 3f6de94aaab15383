//! One session that uses each route, and requests that are wrong in each way that a client may get wrong, beside a real etcd.

use metastore::frontend::gateway::routes::ROUTES;

use crate::{
    client::{post, request},
    pair::Pair,
    support::Server,
};

/// Routes of methods that do not exist here yet.
const NOT_YET: [&str; 2] = ["/v3/maintenance/snapshot", "/v3/maintenance/downgrade"];

/// Paths and bodies, in this order.
const SESSION: &[(&str, &str)] = &[
    ("/v3/kv/put", r#"{"key":"Zm9v","value":"YmFy"}"#),
    ("/v3/kv/put", r#"{"key":"Zm9v","value":"YmF6","prev_kv":true}"#),
    ("/v3/kv/put", r#"{"key":"Zm8=","lease":"7"}"#),
    ("/v3/kv/range", r#"{"key":"Zm9v"}"#),
    ("/v3/kv/range", r#"{"key":"Zg==","range_end":"Zw==","sort_order":"DESCEND","sort_target":"MOD","limit":1}"#),
    ("/v3/kv/range", r#"{"key":"AA==","rangeEnd":"AA==","keysOnly":true}"#),
    ("/v3/kv/range", r#"{"key":"Zm9v","count_only":true}"#),
    ("/v3/kv/range", r#"{"key":"Zm9v","revision":"99"}"#),
    ("/v3/kv/range", ""),
    (
        "/v3/kv/txn",
        r#"{"compare":[{"key":"Zm9v","target":"VALUE","value":"YmF6"},{"key":"eA==","target":"VERSION","version":0}],
                "success":[{"request_range":{"key":"Zm9v"}},{"request_put":{"key":"eA=="}}],
                "failure":[{"request_delete_range":{"key":"Zm9v"}}]}"#,
    ),
    (
        "/v3/kv/txn",
        r#"{"success":[{"request_txn":{"success":[{"request_delete_range":{"key":"eA==","prev_kv":true}}]}}]}"#,
    ),
    ("/v3/kv/txn", r#"{"success":[{}]}"#),
    ("/v3/kv/deleterange", r#"{"key":"Zm9v","prev_kv":true}"#),
    ("/v3/kv/compaction", r#"{"revision":"3","physical":true}"#),
    ("/v3/kv/range", r#"{"key":"Zm9v","revision":"2"}"#),
    ("/v3/lease/grant", r#"{"TTL":100,"ID":"7"}"#),
    ("/v3/lease/grant", r#"{"TTL":"100","ID":7}"#),
    ("/v3/kv/put", r#"{"key":"Zm8=","lease":"7"}"#),
    ("/v3/lease/timetolive", r#"{"ID":"7","keys":true}"#),
    ("/v3/kv/lease/timetolive", r#"{"ID":"8"}"#),
    ("/v3/lease/leases", "{}"),
    ("/v3/kv/lease/leases", ""),
    ("/v3/lease/keepalive", r#"{"ID":"7"}{"ID":"8"}"#),
    ("/v3/lease/keepalive", ""),
    ("/v3/lease/keepalive", r#"{"ID":"7"}{"ID":x}"#),
    ("/v3/lease/revoke", r#"{"ID":"8"}"#),
    ("/v3/lock/lock", r#"{"name":"bG9jaw==","lease":"7"}"#),
    ("/v3/lock/lock", r#"{"name":"bG9jaw==","lease":"9"}"#),
    ("/v3/lock/unlock", r#"{"key":"bG9jay83"}"#),
    ("/v3/election/leader", r#"{"name":"ZQ=="}"#),
    ("/v3/election/campaign", r#"{"name":"ZQ==","lease":"7","value":"dg=="}"#),
    ("/v3/election/proclaim", r#"{"leader":{"name":"ZQ==","key":"ZS83","rev":"9","lease":"7"},"value":"dw=="}"#),
    ("/v3/election/proclaim", "{}"),
    ("/v3/election/leader", r#"{"name":"ZQ=="}"#),
    ("/v3/election/resign", r#"{"leader":{"name":"ZQ==","key":"ZS83","rev":"9","lease":"7"}}"#),
    ("/v3/lease/revoke", r#"{"ID":"7"}"#),
    ("/v3/kv/lease/revoke", r#"{"ID":"7"}"#),
    ("/v3/cluster/member/list", r#"{"linearizable":true}"#),
    ("/v3/cluster/member/update", r#"{"ID":"5","peerURLs":["http://127.0.0.1:9"]}"#),
    ("/v3/cluster/member/remove", r#"{"ID":"5"}"#),
    ("/v3/cluster/member/promote", r#"{"ID":"5"}"#),
    ("/v3/cluster/member/add", r#"{"peerURLs":[]}"#),
    ("/v3/maintenance/alarm", r#"{"action":"GET","alarm":"NOSPACE"}"#),
    ("/v3/maintenance/alarm", r#"{"action":"ACTIVATE","alarm":1,"memberID":"5"}"#),
    ("/v3/maintenance/alarm", "{}"),
    ("/v3/maintenance/alarm", r#"{"action":2,"alarm":"NOSPACE","member_id":"5","memberID":"5"}"#),
    ("/v3/maintenance/status", "{}"),
    ("/v3/maintenance/defragment", "{}"),
    ("/v3/maintenance/hashkv", "{}"),
    ("/v3/maintenance/transfer-leadership", r#"{"targetID":"5"}"#),
    ("/v3/auth/status", "{}"),
    ("/v3/auth/enable", "{}"),
    ("/v3/auth/disable", "{}"),
    ("/v3/auth/authenticate", r#"{"name":"u","password":"p"}"#),
    ("/v3/auth/user/add", r#"{"name":"u","password":"p"}"#),
    ("/v3/auth/user/add", r#"{"name":"n","options":{"no_password":true}}"#),
    ("/v3/auth/user/add", "{}"),
    ("/v3/auth/user/get", r#"{"name":"u"}"#),
    ("/v3/auth/user/list", "{}"),
    ("/v3/auth/user/changepw", r#"{"name":"u","password":"q"}"#),
    ("/v3/auth/role/add", r#"{"name":"r"}"#),
    ("/v3/auth/role/grant", r#"{"name":"r","perm":{"permType":"READWRITE","key":"Zg==","range_end":"Zw=="}}"#),
    ("/v3/auth/role/get", r#"{"role":"r"}"#),
    ("/v3/auth/role/list", "{}"),
    ("/v3/auth/user/grant", r#"{"user":"u","role":"r"}"#),
    ("/v3/auth/user/get", r#"{"name":"u"}"#),
    ("/v3/auth/user/revoke", r#"{"name":"u","role":"r"}"#),
    ("/v3/auth/role/revoke", r#"{"role":"r","key":"Zg==","range_end":"Zw=="}"#),
    ("/v3/auth/role/delete", r#"{"role":"r"}"#),
    ("/v3/auth/user/delete", r#"{"name":"u"}"#),
    ("/v3/auth/user/delete", r#"{"name":"u"}"#),
];

#[test]
fn each_route_answers_as_etcds() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    for (path, body) in SESSION {
        pair.post(path, &[], body.as_bytes());
    }
    pair.post_masked("/v3/maintenance/hash", &[], b"{}", &["hash"]);
    for path in NOT_YET {
        let answer = post(pair.ours.address(), path, &[], b"{}");
        assert_eq!((answer.status, answer.content_type.as_str()), (501, "application/json"), "{answer:?}");
        assert!(answer.body.contains("\"code\":12,"), "{answer:?}");
    }
    // What never ends is compared elsewhere.
    let elsewhere = NOT_YET.into_iter().chain(["/v3/watch", "/v3/election/observe"]);
    let asked: Vec<_> = pair.asked.iter().map(String::as_str).chain(elsewhere).collect();
    let missing: Vec<_> = ROUTES.iter().filter(|(path, _)| !asked.contains(path)).collect();
    assert!(missing.is_empty(), "the session leaves out {missing:?}");
    pair.finish();
}

#[test]
fn what_is_wrong_is_refused_as_by_etcd() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    let bodies = [
        "null",
        "[]",
        "5",
        "true",
        "\"x\"",
        "{",
        "{}}",
        "{} x",
        "x",
        " \n",
        "{\"key\":5}",
        "{\"key\":\"Zg=\"}",
        "{\"key\":\"_-8\"}",
        "{\"key\":\"Zm9v\",}",
        "{key:1}",
        "{\"key\" 1}",
        "{'key':1}",
        "{\"key\":\"Zm\\x9v\"}",
        "{\"key\":\"Zm9v\n\"}",
        "{\"key\":tru}",
        "{\"key\":01}",
        "{\"key\":\"Zm9v\",\"limit\":1.5}",
        "{\"key\":\"Zm9v\",\"limit\":\"1e1\"}",
        "{\"key\":\"Zm9v\",\"limit\":\" 1\"}",
        "{\"key\":\"Zm9v\",\"limit\":\"1,x\"}",
        "{\"key\":\"Zm9v\",\"limit\":\"1e,\"}",
        "{\"key\":\"Zm9v\",\"limit\":1e30}",
        "{\"key\":\"Zm9v\",\"limit\":-}",
        "{\"key\":\"Zm9v\",\"key\":\"Zm9v\"}",
        "{\"range_end\":\"Zg==\",\"rangeEnd\":\"Zg==\"}",
        "{\"key\":\"Zm9v\",\"sort_order\":7}",
        "{\"key\":\"Zm9v\",\"sort_order\":\"2\"}",
        "{\"key\":\"Zm9v\",\"sort_order\":\"NOPE\"}",
        "{\"key\":\"Zm9v\",\"sort_order\":[]}",
        "{\"key\":\"Zm9v\",\"serializable\":\"true\"}",
        "{\"key\":null}",
        "{\"nope\":{\"a\":[1,2,{}]},\"key\":\"Zm9v\"}",
        "{\"key\":\"\\u0041m9v\"}",
        "{\"key\":\"\\ud800\"}",
        "{\"x\":\"\\ud800\",\"key\":\"Zm9v\"}",
        "{\"x\":\"\\ud83d\\ude00\",\"key\":\"Zm9v\"}",
        "{\"x\":\"\\ude00\\ud83d\"}",
        "\n\n  {\"key\":\n 5}",
        "{\"é\":1,\"key\":5}",
        "\u{feff}{}",
        "{\"key\":\"é\"}",
        "{\"key\":\"Zm9v\\n\"}",
        "{\"key\":\"Zm9vZm\\r=\"}",
    ];
    for body in bodies {
        pair.post("/v3/kv/range", &[], body.as_bytes());
    }
    for body in [&b"{\"key\":\"\xff\"}"[..], b"{\"\xff\":1}", b"\xff", b"{\"x\":\"a\xc3\",\"key\":5}", b"{\"x\"\x01:1}"]
    {
        pair.post("/v3/kv/range", &[], body);
    }
    let value = "A".repeat(2_900_000);
    for length in [2_000_000, 2_090_000, 2_200_000, 2_796_200, 2_900_000] {
        pair.post(
            "/v3/kv/put",
            &[],
            format!("{{\"key\":\"Zm9v\",\"value\":\"{}\"}}", &value[..length / 4 * 4]).as_bytes(),
        );
    }
    for depth in [1, 50, 51, 400, 3333] {
        let nested = "{\"success\":[{\"request_txn\":".repeat(depth) + "{}" + &"}]}".repeat(depth);
        pair.post("/v3/kv/txn", &[], nested.as_bytes());
    }
    for body in [
        r#"{"compare":[{"key":"Zm9v","target":"VALUE","value":"YmFy","version":"1"}]}"#,
        r#"{"compare":[null]}"#,
        r#"{"compare":{}}"#,
        r#"{"success":[{"request_put":{"key":"Zm9v"},"request_range":null}]}"#,
        r#"{"success":[{"request_put":{"key":"Zm9v"},"request_range":{}}]}"#,
    ] {
        pair.post("/v3/kv/txn", &[], body.as_bytes());
    }
    pair.finish();
}

#[test]
fn paths_methods_and_headers_are_treated_as_by_etcd() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    let body = b"{\"key\":\"Zm9v\"}";
    for path in [
        "/v3/kv/rangex",
        "/v3/kv/range/",
        "/v3/",
        "/v3",
        "/v3?a=b",
        "//v3/kv/range",
        "/v3/./kv/range",
        "/v3/kv/../kv/range?x=1",
        "/v3//",
        "/v3/kv/range:",
        "/v3/kv%2Frange",
        "/v3/kv/ran%67e",
        "/v3beta/kv/range",
        "/v3alpha/kv/range",
        "/v3/kv/range?key=abc",
        "/v4",
        "/v3x",
    ] {
        pair.post(path, &[], body);
    }
    for method in ["GET", "PUT", "DELETE", "PATCH", "HEAD", "FOO"] {
        for path in ["/v3/kv/range", "/v3/kv/nope", "/v3/watch"] {
            pair.request(method, path, &[], b"", &[]);
        }
    }
    for headers in [
        &[("Grpc-Timeout", "abc")][..],
        &[("Grpc-Timeout", "1n")],
        &[("Grpc-Timeout", "-1S")],
        &[("Grpc-Timeout", "0S")],
        &[("Grpc-Timeout", "5S")],
        &[("Grpc-Timeout", "5")],
        &[("Content-Type", "text/plain"), ("Accept", "text/html")],
        &[("Content-Type", "application/x-www-form-urlencoded")],
        &[("Grpc-Metadata-Foo-Bin", "!!")],
        &[("Grpc-Metadata-Hasleader", "true")],
        &[("Authorization", "no token is needed")],
        &[("Authorization", "é")],
    ] {
        pair.post("/v3/kv/range", headers, body);
    }
    pair.post("/v3/watch", &[("Grpc-Timeout", "200m")], b"");
    pair.post("/v3/watch", &[("Grpc-Timeout", "abc")], b"");
    pair.post("/v3/election/observe", &[], b"{\"name\":5}");
    pair.finish();
}

#[test]
fn without_the_gateway_there_is_nothing() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    for server in [&mut pair.ours, &mut pair.etcd] {
        server.stop();
        server.restart_with(&["--unsafe-no-fsync", "--enable-grpc-gateway=false"]);
    }
    for path in ["/v3/kv/range", "/v3/", "/v3", "/v3/nope", "/v3beta/kv/range"] {
        pair.post(path, &[], b"{}");
    }
    pair.finish();
}

/// A client of HTTP/2 may use it, too: over TLS it is the protocol that `curl` negotiates.
#[tokio::test]
async fn it_is_served_over_http2() {
    let server = Server::start(&[]);
    let stream = tokio::net::TcpStream::connect(server.address()).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for (body, status, text) in [
        ("{\"key\":\"Zm9v\",\"value\":\"YmFy\"}", 200, "{\"header\":{"),
        ("{", 400, "{\"code\":3,\"message\":\"unexpected EOF\"}"),
    ] {
        let request = http::Request::post(format!("{}/v3/kv/put", server.url())).body(()).unwrap();
        let (response, mut sender) = client.send_request(request, false).unwrap();
        sender.send_data(body.into(), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["content-type"], "application/json");
        let mut body = response.into_body();
        let mut received = Vec::new();
        while let Some(piece) = body.data().await {
            received.extend_from_slice(&piece.unwrap());
        }
        let received = String::from_utf8(received).unwrap();
        assert!(received.starts_with(text), "{received}");
    }
    let metrics = request(server.address(), "GET", "/metrics", &[], b"").body;
    let counted = "grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 1";
    assert!(metrics.contains(counted), "calls of the gateway count as calls of gRPC");
}
