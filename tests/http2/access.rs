//! `--cors` and `--host-whitelist`: metastore, and a real etcd where there is one, give the expected responses.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
};

use metastore::proto::etcdserverpb::RangeRequest;
use prost::Message;

use crate::{
    raw::{self, Raw, call, frame},
    support::{
        Server, free_url, program,
        requirements::{etcd, installed},
        time_limit,
    },
};

/// Origins that are listed.
const A: Option<&str> = Some("http://a.example:8080");
const B: Option<&str> = Some("https://b.example:443");
const LISTED: &[&str] = &["--cors=http://a.example:8080,https://b.example:443", "--host-whitelist=a.example,b.example"];

/// A request, and what the response to it says: its status, and the origin that may read it.
struct Case(&'static str, u16, Option<&'static str>);

impl Case {
    /// The request, of which each line is separated by `|`.
    fn request(&self) -> String {
        let Self(request, ..) = self;
        let last = if request.contains("HTTP/1.1") { "Connection: close\r\n\r\n" } else { "\r\n" };
        request.split('|').flat_map(|line| [line, "\r\n"]).chain([last]).collect()
    }
}

const CASES: &[(&[&str], &[Case])] = &[
    (
        LISTED,
        &[
            Case("GET /version HTTP/1.1|Host: a.example:2379", 200, None),
            Case("GET /version HTTP/1.1|Host: b.example", 200, None),
            Case("GET /version HTTP/1.1|Host: a.example|Origin: http://a.example:8080", 200, A),
            Case("GET /version HTTP/1.1|Host: a.example|Origin: http://a.example", 200, None),
            Case("GET /nowhere HTTP/1.1|Host: a.example|Origin: https://b.example:443", 404, B),
            Case("POST /version HTTP/1.1|Host: a.example|Content-Length: 0|Origin: https://b.example:443", 405, B),
            Case("OPTIONS /version HTTP/1.1|Host: a.example|Origin: https://b.example:443", 200, B),
            Case("OPTIONS /nowhere HTTP/1.1|Host: a.example", 200, None),
            Case("GET /version HTTP/1.1|Host: c.example", 421, None),
            Case("GET /version HTTP/1.1|Host: A.example", 421, None),
            Case("GET /version HTTP/1.1|Host: [::1]:2379", 421, None),
            Case("GET /nowhere HTTP/1.1|Host: c.example|Origin: https://b.example:443", 421, None),
            Case("OPTIONS /version HTTP/1.1|Host: c.example|Origin: https://b.example:443", 421, None),
            Case("GET http://a.example/version HTTP/1.1|Host: c.example", 200, None),
            Case("GET http://c.example/version HTTP/1.1|Host: a.example", 421, None),
            Case("GET /version HTTP/1.0", 421, None),
            Case(
                "POST /v3/auth/status HTTP/1.1|Host: a.example|Content-Length: 0|Origin: https://b.example:443",
                200,
                B,
            ),
            Case(
                "POST /v3/auth/status HTTP/1.1|Host: c.example|Content-Length: 0|Origin: https://b.example:443",
                421,
                None,
            ),
            Case("OPTIONS /v3/auth/status HTTP/1.1|Host: a.example|Origin: https://b.example:443", 200, B),
            Case("GET //version HTTP/1.1|Host: a.example|Origin: https://b.example:443", 307, B),
            Case("GET //version HTTP/1.1|Host: c.example", 421, None),
        ],
    ),
    (
        &["--host-whitelist="],
        &[
            Case("GET /version HTTP/1.1|Host: a.example|Origin: http://c.example:1", 421, None),
            Case("GET /version HTTP/1.0|Origin: http://c.example:1", 200, Some("*")),
        ],
    ),
    (
        &[],
        &[
            Case("GET /version HTTP/1.1|Host: c.example", 200, Some("*")),
            Case("GET /version HTTP/1.1|Host: c.example|Origin: http://c.example:1", 200, Some("*")),
            Case("OPTIONS /health HTTP/1.1|Host: c.example", 200, Some("*")),
        ],
    ),
];

/// The head of a response, in lower case, and its body.
fn ask(address: &str, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(time_limit())).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{request}: {response}"));
    (head.to_ascii_lowercase(), body.to_owned())
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn check(server: &Server, case: &Case) {
    let (request, Case(_, status, origin)) = (case.request(), case);
    let (head, body) = ask(server.address(), &request);
    assert_eq!(head.split(' ').nth(1), Some(status.to_string().as_str()), "{request}{head}");
    assert_eq!(field(&head, "access-control-allow-origin"), *origin, "{request}{head}");
    let others = [
        ("access-control-allow-methods", "post, get, options, put, delete"),
        ("access-control-allow-headers", "accept, content-type, authorization"),
    ];
    for (name, value) in others {
        assert_eq!(field(&head, name), origin.map(|_| value), "{request}{head}");
    }
    if request.starts_with("OPTIONS") && *status == 200 {
        assert_eq!((field(&head, "content-length"), body.as_str()), (Some("0"), ""), "{request}{head}");
    }
    if *status == 421 {
        assert!(body.contains("CVE-2018-5702") && body.contains("--host-whitelist \""), "{body}");
        assert_eq!(field(&head, "content-type"), Some("text/plain; charset=utf-8"), "{head}");
        assert_eq!(field(&head, "x-content-type-options"), Some("nosniff"), "{head}");
    }
}

fn check_all(program: &Path) {
    for (flags, cases) in CASES {
        let server = Server::start_program(program, flags);
        cases.iter().for_each(|case| check(&server, case));
    }
}

#[test]
fn requests_for_other_hosts_are_refused_and_listed_origins_may_read() {
    check_all(&program());
}

#[test]
fn etcd_gives_the_same_responses() {
    if let Some(etcd) = etcd() {
        check_all(&etcd);
    }
}

#[test]
fn grpc_may_be_addressed_to_any_host_and_other_requests_over_http2_may_not() {
    let server = Server::start(LISTED);
    let mut raw = Raw::handshake(server.address());
    let range = RangeRequest { key: "a".into(), ..RangeRequest::default() }.encode_to_vec();
    raw.send(&call(1, "/etcdserverpb.KV/Range", &range)).unwrap();
    assert!(!raw.wait_for(raw::DATA).unwrap().payload.is_empty());
    // GET http /version, of a host that is not listed.
    let page = b"\x82\x86\x04\x08/version\x01\x09c.example";
    raw.send(&frame(raw::HEADERS, raw::END_HEADERS | raw::END_STREAM, 3, page)).unwrap();
    let refused = loop {
        let data = raw.wait_for(raw::DATA).unwrap();
        if data.stream == 3 {
            break String::from_utf8(data.payload).unwrap();
        }
    };
    assert!(refused.contains("--host-whitelist \"c.example\""), "{refused}");
    server.wait_for_log("rejecting HTTP request to prevent DNS rebinding attacks");
    let (head, _) = ask(server.address(), "GET /metrics HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n");
    assert!(head.starts_with("http/1.1 200"), "{head}");
}

/// With TLS every host is accepted, and the headers of CORS are the same.
#[test]
fn hosts_are_not_checked_with_tls() {
    let Some(curl) = installed("curl", "curl") else { return };
    let directory = tempfile::tempdir().unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| directory.path().join(name));
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    for program in [Some(program()), etcd()].into_iter().flatten() {
        let url = free_url().replace("http://", "https://");
        let secure = [
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            format!("--cert-file={}", cert.display()),
            format!("--key-file={}", key.display()),
        ];
        let secure: Vec<_> = LISTED.iter().copied().chain(secure.iter().map(String::as_str)).collect();
        let _server = Server::start_program(&program, &secure);
        for version in ["--http1.1", "--http2"] {
            let asked = ["-sik", version, "-H", "Host: c.example", "-H", "Origin: https://b.example:443"];
            let output = Command::new(&curl).args(asked).arg(format!("{url}/version")).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).to_ascii_lowercase();
            assert!(text.lines().next().is_some_and(|first| first.contains(" 200")), "{}: {text}", program.display());
            assert_eq!(field(&text, "access-control-allow-origin"), B, "{text}");
        }
    }
}
