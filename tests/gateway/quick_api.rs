//! The quick HTTP API of `--port`.

use serde_json::Value;

use crate::{
    client::{Exchange, post},
    support::{HttpResponse, Server, eventually, free_url, http, program, time_limit},
};

/// A server with the quick API, and the address of that.
fn start(arguments: &[&str]) -> (Server, String) {
    let address = free_url().trim_start_matches("http://").to_owned();
    let (_, port) = address.split_once(':').unwrap();
    let server = Server::start(&[&["--port", port], arguments].concat());
    (server, address)
}

fn ask(address: &str, method: &str, path: &str, body: &[u8]) -> HttpResponse {
    http(address, method, path, "", body)
}

#[track_caller]
fn expect(answer: &HttpResponse, status: u16, body: &str) {
    assert_eq!((answer.status, answer.body.as_str()), (status, body));
}

#[tokio::test]
async fn keys_are_put_read_and_deleted() {
    let (server, quick) = start(&[]);
    expect(&ask(&quick, "GET", "/a", b""), 404, "key not found\n");
    for (path, key, value) in [
        ("/a", &b"a"[..], &b"one"[..]),
        ("/dir/b", b"dir/b", b""),
        ("//c", b"/c", b"with\nlines and \"quotes\""),
        ("/%2Fd%20%C3%A4", "/d ä".as_bytes(), b"x=1&y=2"),
        ("/bytes%00%ff", b"bytes\0\xff", b"\x7f\0"),
        ("/4711", b"4711", b"a number"),
    ] {
        expect(&ask(&quick, "PUT", path, value), 204, "");
        let mut client = server.client().await;
        let found = client.get(key, None).await.unwrap();
        assert_eq!(found.kvs()[0].value(), value, "{path}");
        for query in ["", "?serializable", "?serializable=true", "?serializable=false"] {
            let answer = ask(&quick, "GET", &format!("{path}{query}"), b"");
            expect(&answer, 200, std::str::from_utf8(value).unwrap());
            assert!(answer.head.contains("content-type: application/octet-stream"), "{}", answer.head);
        }
        let head = ask(&quick, "HEAD", path, b"");
        expect(&head, 200, "");
        assert!(head.head.contains(&format!("content-length: {}", value.len())), "{}", head.head);
        for _ in 0..2 {
            expect(&ask(&quick, "DELETE", path, b""), 204, "");
        }
        expect(&ask(&quick, "GET", path, b""), 404, "key not found\n");
    }
}

#[test]
fn what_is_wrong_is_refused_with_the_reason() {
    let (server, quick) = start(&["--max-request-bytes=100000"]);
    for (method, path, status, text) in [
        ("GET", "/", 400, "etcdserver: key is not provided: it is the path, without its first slash"),
        ("GET", "/a%4", 400, "in a path, % must precede two hexadecimal digits"),
        ("GET", "/a?serializable=maybe", 400, "serializable=maybe: `true` or `false` is expected, or the name alone"),
        ("GET", "/a?x=1", 400, "unknown parameter \"x=1\": GET knows `serializable`, and there are no others"),
        (
            "PUT",
            "/a?serializable",
            400,
            "unknown parameter \"serializable\": GET knows `serializable`, and there are no others",
        ),
        ("POST", "/a", 405, "Method Not Allowed"),
        ("POST", "/5", 405, "Method Not Allowed"),
        ("PUT", "/-/members", 405, "Method Not Allowed"),
        ("GET", "/-/members/5", 405, "Method Not Allowed"),
        (
            "GET",
            "/-/other",
            404,
            "404 page not found: below /-/ there is only /-/members; keys that begin with -/ need another API",
        ),
        ("DELETE", "/-/members/xyz", 400, "\"xyz\" is no member ID: GET /-/members lists them"),
        ("DELETE", "/-/members/123", 404, "etcdserver: member not found"),
        ("POST", "/-/members", 400, "the body must be the peer URL of the new member, such as http://10.0.0.4:2380"),
    ] {
        let answer = ask(&quick, method, path, b"");
        expect(&answer, status, &format!("{text}\n"));
        assert_eq!(answer.head.contains("\r\nallow: "), status == 405, "{}", answer.head);
    }
    expect(&ask(&quick, "POST", "/-/members", b"no URL"), 400, "etcdserver: given member URLs are invalid\n");
    // A little too large for a value, and far too large for anything.
    for bytes in [100_001, 5_000_000] {
        let answer = ask(&quick, "PUT", "/a", &vec![b'x'; bytes]);
        expect(&answer, 413, "etcdserver: request is too large\n");
    }
    let mut endless = Exchange::begin(&quick, "PUT", "/a", &[("Transfer-Encoding", "chunked")]);
    for _ in 0..10 {
        endless.send_chunk(&"x".repeat(99_000));
    }
    endless.read_head();
    assert_eq!(endless.head.status, 413);
    // A body that never comes to its end.
    let mut half = Exchange::begin(&quick, "PUT", "/a", &[("Content-Length", "90000")]);
    half.send_raw("x".repeat(80_000).as_bytes());
    let held = || server.http("GET", "/metrics").metric("metastore_http2_held_bytes");
    eventually("it is counted", time_limit(), || if held() >= 80_000.0 { Ok(()) } else { Err(held()) });
    drop(half);
    eventually("nothing is held", time_limit(), || if held() < 10_000.0 { Ok(()) } else { Err(held()) });
    expect(&ask(&quick, "GET", "/a", b""), 404, "key not found\n");
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    let mut server = Server::single(&["--port-admin"]);
    let (status, log) = server.run_to_end();
    assert!(!status.success() && log.contains("--port-admin needs --port"), "{log}");
    let mut server = Server::single(&["--port=65536"]);
    let (status, log) = server.run_to_end();
    assert!(!status.success() && log.contains("--port must be from 0 to 65535 (set to 65536)"), "{log}");
}

#[test]
fn permissions_hold() {
    let (server, quick) = start(&[]);
    for (path, body) in [
        ("/v3/auth/user/add", r#"{"name":"root","password":"root"}"#),
        ("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#),
        ("/v3/auth/user/add", r#"{"name":"ann","password":"ann"}"#),
        ("/v3/auth/role/add", r#"{"name":"reader"}"#),
        ("/v3/auth/role/grant", r#"{"name":"reader","perm":{"permType":"READ","key":"YQ=="}}"#),
        ("/v3/auth/user/grant", r#"{"user":"ann","role":"reader"}"#),
        ("/v3/auth/enable", "{}"),
    ] {
        let answer = post(server.address(), path, &[], body.as_bytes());
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
    let token = |name: &str| {
        let body = format!("{{\"name\":\"{name}\",\"password\":\"{name}\"}}");
        let answer = post(server.address(), "/v3/auth/authenticate", &[], body.as_bytes());
        let answer: Value = serde_json::from_str(&answer.body).unwrap();
        format!("Authorization: Bearer {}\r\n", answer["token"].as_str().unwrap())
    };
    let (root, ann) = (token("root"), token("ann"));
    let denied = "etcdserver: permission denied\n";
    expect(&http(&quick, "PUT", "/a", &root, b"x"), 204, "");
    expect(&http(&quick, "GET", "/a", &ann, b""), 200, "x");
    expect(&http(&quick, "PUT", "/a", &ann, b"y"), 403, denied);
    expect(&http(&quick, "GET", "/b", &ann, b""), 403, denied);
    expect(&http(&quick, "POST", "/-/members", &ann, b"http://127.0.0.1:1"), 403, denied);
    expect(&ask(&quick, "GET", "/a", b""), 400, "etcdserver: user name is empty\n");
    let invalid = http(&quick, "GET", "/a", "Authorization: Bearer x\r\n", b"");
    expect(&invalid, 401, "etcdserver: invalid auth token\n");
    assert!(invalid.head.contains("\r\nwww-authenticate: bearer"), "{}", invalid.head);
    expect(&http(&quick, "DELETE", "/a", &root, b""), 204, "");
}

/// A member that is started with the short form, and the address of its quick API.
struct Member {
    server: Server,
    quick: String,
}

impl Member {
    fn new(id: usize, cluster: &[String], arguments: &[&str]) -> Self {
        let [quick, clients] = [free_url(), free_url()].map(|url| url.trim_start_matches("http://").to_owned());
        let (_, port) = quick.split_once(':').unwrap();
        let (id, urls) = (id.to_string(), cluster.join(","));
        let identity = [("--id", id.as_str()), ("--cluster", &urls), ("--grpc-addr", &clients), ("--port", port)];
        Self { server: Server::new(&program(), &identity, arguments), quick }
    }
}

/// The members with a name, sorted by it: ID, name, peer URL.
fn listed(quick: &str) -> Vec<(String, String, String)> {
    let answer = ask(quick, "GET", "/-/members", b"");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let listed: Value = serde_json::from_str(&answer.body).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let member =
        |member: &Value| (text(&member["id"]), text(&member["name"]), text(&member["peerURLs"].as_array().unwrap()[0]));
    let mut members: Vec<_> = listed["members"].as_array().unwrap().iter().map(member).collect();
    members.sort_by(|a, b| a.1.cmp(&b.1));
    members
}

#[test]
fn members_are_added_and_removed() {
    let urls: Vec<_> = (0..5).map(|_| free_url()).collect();
    let mut members: Vec<_> = (1..=3).map(|id| Member::new(id, &urls[..3], &["--port-admin"])).collect();
    for member in &mut members {
        member.server.launch();
    }
    for member in &mut members {
        member.server.await_serving();
    }
    let quick = members[0].quick.clone();
    expect(&ask(&quick, "PUT", "/a", b"x"), 204, "");
    expect(&ask(&members[2].quick, "GET", "/a", b""), 200, "x");
    let names = |quick: &str| listed(quick).into_iter().map(|(_, name, _)| name).collect::<Vec<_>>();
    eventually("all have a name", time_limit(), || names(&quick) == ["node1", "node2", "node3"]);

    // By its URL, which answers with the new member.
    let added = eventually("a member can be added", time_limit(), || {
        let answer = ask(&quick, "POST", "/-/members", urls[3].as_bytes());
        if answer.status == 201 { Ok(answer.body) } else { Err(answer.body) }
    });
    let added: Value = serde_json::from_str(&added).unwrap();
    assert_eq!((&added["peerURLs"][0], &added["isLearner"]), (&urls[3].as_str().into(), &false.into()));
    let mut fourth = Member::new(4, &urls[..4], &["--join", "--port-admin"]);
    fourth.server.restart();
    expect(&ask(&fourth.quick, "GET", "/a", b""), 200, "x");
    let id = listed(&quick).into_iter().find(|(_, name, _)| name == "node4").unwrap().0;
    assert_eq!(added["id"], id.as_str());
    eventually("the URL is taken", time_limit(), || {
        let again = ask(&quick, "POST", "/-/members", urls[3].as_bytes());
        let taken = (400, "etcdserver: Peer URLs already exists\n");
        if (again.status, again.body.as_str()) == taken { Ok(()) } else { Err(again.body) }
    });

    // By its number.
    expect(
        &ask(&quick, "POST", "/4", urls[4].as_bytes()),
        409,
        &format!("member {id} has this number: its name is node4\n"),
    );
    expect(&ask(&quick, "DELETE", "/6", b""), 404, "no member is named node6: GET /-/members lists them\n");
    eventually("another one can be added", time_limit(), || {
        let answer = ask(&quick, "POST", "/5", urls[4].as_bytes());
        if answer.status == 204 { Ok(()) } else { Err(answer.body) }
    });
    let mut fifth = Member::new(5, &urls, &["--join"]);
    fifth.server.restart();
    eventually("it can be removed", time_limit(), || {
        let answer = ask(&quick, "DELETE", "/5", b"");
        if answer.status == 204 { Ok(()) } else { Err(answer.body) }
    });
    fifth.server.wait_for_end();
    eventually("the fourth can be removed by its ID", time_limit(), || {
        let answer = ask(&quick, "DELETE", &format!("/-/members/{id}"), b"");
        if answer.status == 204 { Ok(()) } else { Err(answer.body) }
    });
    assert_eq!(names(&quick), ["node1", "node2", "node3"]);

    // With --port-admin a number is a key only for GET and PUT.
    expect(&ask(&quick, "PUT", "/17", b"y"), 204, "");
    expect(&ask(&quick, "GET", "/17", b""), 200, "y");
    expect(&ask(&quick, "DELETE", "/17", b""), 404, "no member is named node17: GET /-/members lists them\n");
    expect(&ask(&quick, "DELETE", "/%317", b""), 404, "no member is named node17: GET /-/members lists them\n");
}
