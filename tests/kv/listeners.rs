//! What each kind of listener serves: for clients, for gRPC alone, for HTTP alone, for metrics. Beside etcd where there is one.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
};

use crate::support::{
    HttpResponse, Server, eventually, free_url, http, program,
    requirements::{etcd, installed},
    time_limit,
};

const PATHS: [&str; 17] = [
    "/",
    "/health",
    "/health?serializable=true",
    "//health",
    "/livez",
    "/livez/serializable_read",
    "/readyz",
    "/readyz?verbose&exclude=linearizable_read&exclude=serializable_read&exclude=non_learner",
    "/readyz/nothing",
    "/version",
    "/metrics",
    "/debug/vars",
    "/debug/pprof/",
    "/v3",
    "/v3/kv/range",
    "/nowhere",
    "/members",
];
const COMPARED_HEADERS: [&str; 7] = [
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "allow",
    "content-type",
    "location",
    "x-content-type-options",
];

/// What can be compared of a response.
#[derive(Debug, PartialEq)]
struct Page {
    status: u16,
    headers: Vec<String>,
    body: String,
}

impl Page {
    fn of(response: &HttpResponse, path: &str) -> Self {
        let is_compared = |line: &&str| COMPARED_HEADERS.iter().any(|name| line.starts_with(&format!("{name}:")));
        let mut headers: Vec<_> = response.head.lines().filter(is_compared).map(str::to_owned).collect();
        headers.sort();
        // These are about the program, its data or the state of raft.
        let has_own_content = response.status == 200 && ["/metrics", "/debug/vars", "/v3/kv/range"].contains(&path);
        let body = if has_own_content { String::new() } else { response.body.replace(", ", ",") };
        Self { status: response.status, headers, body }
    }
}

/// A server, and the addresses that it serves beside the one for clients.
struct Listening {
    server: Server,
    http: String,
    metrics: String,
}

impl Listening {
    fn start(program: &Path, has_http: bool) -> Self {
        let [http, metrics] = [free_url(), free_url()];
        let mut arguments = vec!["--unsafe-no-fsync".to_owned(), format!("--listen-metrics-urls={metrics}")];
        arguments.extend(has_http.then(|| format!("--listen-client-http-urls={http}")));
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let server = Server::start_program(program, &arguments);
        let [http, metrics] = [http, metrics].map(|url| address(&url).to_owned());
        let listening = Self { server, http, metrics };
        eventually("the storage version is set", time_limit(), || {
            let page = http_page(if has_http { &listening.http } else { listening.server.address() }, "/version");
            if page.body.contains("\"storage\":\"3.7.0\"") { Ok(()) } else { Err(page) }
        });
        listening
    }
}

fn address(url: &str) -> &str {
    url.strip_prefix("http://").unwrap()
}

fn http_page(address: &str, path: &str) -> HttpResponse {
    http(address, "GET", path, "", b"")
}

/// What is received when these bytes are sent, until the server closes the connection, or has sent `enough` bytes.
fn exchange(address: &str, bytes: &[u8], enough: usize) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(time_limit())).unwrap();
    stream.write_all(bytes).unwrap();
    let (mut received, mut piece) = (Vec::new(), [0; 4096]);
    while received.len() < enough {
        match stream.read(&mut piece) {
            Ok(count @ 1..) => received.extend_from_slice(&piece[..count]),
            Ok(0) | Err(_) => break,
        }
    }
    received
}

/// Both programs, or only ours if there is no etcd.
fn programs() -> Vec<PathBuf> {
    [Some(program()), etcd()].into_iter().flatten().collect()
}

#[test]
fn every_path_on_every_kind_of_listener_is_answered_as_by_etcd() {
    let Some(etcd) = etcd() else { return };
    for has_http in [false, true] {
        let both = [program(), etcd.clone()].map(|program| Listening::start(&program, has_http));
        let addresses = both.each_ref().map(|it| if has_http { &*it.http } else { it.server.address() });
        let metrics = both.each_ref().map(|it| &*it.metrics);
        for (kind, addresses) in [("for HTTP", addresses), ("for metrics", metrics)] {
            for method in ["GET", "POST", "HEAD", "PUT", "OPTIONS"] {
                for path in PATHS {
                    let origin = "Origin: http://a.example\r\n";
                    let body: &[u8] = if method == "POST" { b"{\"key\":\"YQ==\",\"serializable\":true}" } else { b"" };
                    let pages = addresses.map(|address| Page::of(&http(address, method, path, origin, body), path));
                    let [ours, theirs] = pages;
                    assert_eq!(ours, theirs, "{method} {path}, {kind} (separate: {has_http})");
                }
            }
        }
    }
}

#[test]
fn metrics_have_listeners_of_their_own_and_stay_on_the_others() {
    let listening = Listening::start(&program(), true);
    for address in [&listening.metrics, &listening.http] {
        let page = http_page(address, "/metrics");
        assert!(page.status == 200 && page.body.contains("\netcd_server_has_leader 1\n"), "{address}: {}", page.head);
    }
    assert_eq!(http_page(&listening.metrics, "/version").status, 404);
    let line = listening.server.wait_for_log("\"msg\":\"serving metrics\"");
    assert!(line.contains(&format!("\"address\":\"http://{}\"", listening.metrics)), "{line}");
    let line = listening.server.wait_for_log("now serving peer/client/metrics");
    assert!(line.contains(&format!("\"listen-metrics-urls\":[\"http://{}\"]", listening.metrics)), "{line}");
}

#[test]
fn the_json_api_and_redirections_are_for_listed_hosts_too() {
    let metrics = free_url();
    let flags = [format!("--listen-metrics-urls={metrics}"), "--host-whitelist=a.example".to_owned()];
    for program in programs() {
        let server = Server::start_program(&program, &flags.each_ref().map(String::as_str));
        let key = br#"{"key":"YQ=="}"#;
        for (method, path, body) in
            [("POST", "/v3/kv/range", &key[..]), ("GET", "//health", b""), ("GET", "/health", b"")]
        {
            let refused = http(server.address(), method, path, "", body);
            assert_eq!(refused.status, 421, "{path}: {}", refused.body);
        }
        assert_eq!(http_page(address(&metrics), "/health").status, 200, "probes name any host");
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
const GET_HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
const SETTINGS_FRAME: u8 = 4;

#[tokio::test]
async fn with_separate_urls_for_http_each_listener_refuses_the_other_protocol() {
    for program in programs() {
        let listening = Listening::start(&program, true);
        listening.server.client().await.put("a", "1", None).await.unwrap();
        let grpc = listening.server.address();
        assert_eq!(exchange(grpc, PREFACE, 9).get(3), Some(&SETTINGS_FRAME));
        let refused = exchange(grpc, GET_HEALTH, usize::MAX);
        assert!(!refused.starts_with(b"HTTP/1"), "{}", String::from_utf8_lossy(&refused));
        for address in [&listening.http, &listening.metrics] {
            let refused = exchange(address, PREFACE, usize::MAX);
            assert!(refused.get(3) != Some(&SETTINGS_FRAME), "{refused:?}");
            assert!(exchange(address, GET_HEALTH, usize::MAX).starts_with(b"HTTP/1.1 200"));
        }
        for traffic in ["grpc", "http"] {
            listening.server.wait_for_log(&format!("\"traffic\":\"{traffic}\""));
        }
    }
}

#[test]
fn a_request_of_http_on_a_listener_for_grpc_is_refused_as_by_etcd() {
    let Some(curl) = installed("curl", "curl") else { return };
    for program in programs() {
        let listening = Listening::start(&program, true);
        let ask = |arguments: &[&str]| {
            let url = format!("{}/health", listening.server.url());
            let mut command = std::process::Command::new(&curl);
            let output = command.args(["-si", "--http2-prior-knowledge", &url]).args(arguments).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        for (arguments, named) in
            [(&[][..], "\"\""), (&["-H", "Content-Type: application/json"], "\"application/json\"")]
        {
            let answer = ask(arguments);
            let message = format!("invalid gRPC request content-type {named}");
            for text in ["HTTP/2 415", "content-type: application/grpc", "grpc-status: 3", &message] {
                assert!(answer.contains(text), "{text}: {answer}");
            }
        }
    }
}

/// As kubeadm starts a member, whose probes ask the metrics listener.
#[test]
fn a_member_without_a_leader_answers_probes_on_the_metrics_listener() {
    for program in programs() {
        let metrics = free_url();
        let flags = [
            &*format!("--listen-metrics-urls={metrics}"),
            "--feature-gates=InitialCorruptCheck=true",
            "--watch-progress-notify-interval=5s",
        ];
        let mut members = Server::cluster_of(&program, 3, &flags[1..]);
        members[0].set_arguments(&flags);
        members[0].launch();
        let metrics = address(&metrics);
        eventually("the metrics listener is open", time_limit(), || TcpStream::connect(metrics).map(drop));
        let statuses = ["/livez", "/readyz", "/health", "/health?serializable=true", "/metrics"]
            .map(|path| http_page(metrics, path).status);
        assert_eq!(statuses, [200, 503, 503, 200, 200], "{}", program.display());
        members[1].launch();
        members[0].await_serving();
        eventually("the member is ready", time_limit(), || match http_page(metrics, "/readyz") {
            page if page.status == 200 => Ok(()),
            page => Err(page),
        });
    }
}

#[tokio::test]
async fn tonic_serves_grpc_beside_listeners_for_http() {
    let [http_url, metrics] = [free_url(), free_url()];
    let flags = [
        "--grpc-server=tonic".to_owned(),
        format!("--listen-client-http-urls={http_url}"),
        format!("--listen-metrics-urls={metrics}"),
    ];
    let server = Server::start(&flags.each_ref().map(String::as_str));
    server.client().await.put("a", "1", None).await.unwrap();
    for url in [&http_url, &metrics] {
        assert_eq!(http_page(address(url), "/health").status, 200);
    }
    let answer = http(address(&http_url), "POST", "/v3/kv/range", "", br#"{"key":"YQ=="}"#);
    assert!(answer.status == 200 && answer.body.contains("\"count\":\"1\""), "{}", answer.body);
}

#[test]
fn a_listener_for_metrics_closes_with_the_server_and_is_open_again_after_a_restart() {
    let mut listening = Listening::start(&program(), false);
    listening.server.stop();
    assert!(TcpStream::connect(&listening.metrics).is_err());
    listening.server.restart();
    assert_eq!(http_page(&listening.metrics, "/health").status, 200);
}

#[test]
fn the_variables_of_a_member_are_published() {
    for program in programs() {
        let listening = Listening::start(&program, true);
        let text = http_page(&listening.http, "/debug/vars").body;
        let page: serde_json::Value = serde_json::from_str(&text).unwrap();
        let arguments: Vec<_> = page["cmdline"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
        assert!(Path::new(arguments[0]).ends_with(program.file_name().unwrap()), "{arguments:?}");
        assert!(arguments.contains(&"--unsafe-no-fsync"), "{arguments:?}");
        assert!(page["file_descriptor_limit"].as_u64().unwrap() > 100);
        let raft = &page["raft.status"];
        let id = raft["id"].as_str().unwrap();
        for (name, expected) in [("vote", id), ("lead", id), ("raftState", "StateLeader"), ("leadtransferee", "0")] {
            assert_eq!(raft[name], expected, "{name}: {raft}");
        }
        let commit = raft["commit"].as_u64().unwrap();
        assert!(commit > 0 && raft["term"].as_u64().unwrap() > 0 && raft["applied"].as_u64().unwrap() <= commit);
        let progress = &raft["progress"][id];
        assert_eq!((&progress["state"], progress["match"].as_u64()), (&"StateReplicate".into(), Some(commit)));
        assert_eq!(progress["next"], commit + 1);
    }
}
