//! Third-party clients, run as programs.

use std::{path::Path, process::Command};

use crate::support::{
    Server,
    requirements::{installed, python},
};

/// The output of a program, which must succeed.
fn run(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {text}", program.display());
    text
}

#[test]
fn curl_uses_both_protocols_on_one_port() {
    let Some(curl) = installed("curl", "curl") else { return };
    let server = Server::start(&[]);
    let url = format!("{}/health", server.url());
    for (option, first_line) in [("--http2-prior-knowledge", "HTTP/2 200"), ("--http1.1", "HTTP/1.1 200 OK")] {
        let output = run(&curl, &["-s", "-i", option, &url]);
        assert!(output.starts_with(first_line) && output.ends_with(r#"{"health":"true","reason":""}"#), "{output}");
    }
    let missing = run(&curl, &["-s", "-i", "--http2-prior-knowledge", &format!("{}/nowhere", server.url())]);
    assert!(missing.ends_with("404 page not found\n"), "{missing}");
    let metrics = run(&curl, &["-s", "--http2-prior-knowledge", &format!("{}/metrics", server.url())]);
    assert!(metrics.contains("etcd_server_has_leader 1"));
}

#[test]
fn nghttp_reads_several_pages_on_one_connection() {
    let Some(nghttp) = installed("nghttp2", "nghttp") else { return };
    let server = Server::start(&[]);
    let pages = ["/health", "/version", "/metrics"].map(|page| format!("{}{page}", server.url()));
    let output = run(&nghttp, &["-n", "-s", &pages[0], &pages[1], &pages[2]]);
    assert_eq!(output.lines().filter(|line| line.contains(" 200 ")).count(), 3, "{output}");
}

#[test]
fn all_requests_of_h2load_succeed() {
    let Some(h2load) = installed("nghttp2", "h2load") else { return };
    let server = Server::start(&[]);
    let url = format!("{}/etcdserverpb.KV/Range", server.url());
    let directory = tempfile::tempdir().unwrap();
    let body = directory.path().join("body");
    std::fs::write(&body, b"\0\0\0\0\x05\x0a\x01a\x38\x01").unwrap(); // A serializable range of one key.
    let body = body.to_str().unwrap();
    let header = "content-type: application/grpc";
    let arguments = ["-n", "50000", "-c", "10", "-m", "50", "-H", header, "-H", "te: trailers", "-d", body, &url];
    let output = run(&h2load, &arguments);
    assert!(output.contains("50000 succeeded, 0 failed, 0 errored, 0 timeout"), "{output}");
    let metrics = server.http("GET", "/metrics").body;
    let handled = r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 50000"#;
    assert!(metrics.contains(handled));
}

#[test]
fn python_clients_get_the_expected_responses() {
    let Some(python) = python() else { return };
    let server = Server::start(&[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/http2/clients.py");
    let output = Command::new(python).arg(script).arg(server.address()).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("all as expected"), "{text}");
}
