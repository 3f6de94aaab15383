//! h2spec, a third-party conformance test of HTTP/2 servers: all of it, without exceptions.

use std::process::Command;

use crate::support::{Server, requirements::h2spec};

#[test]
fn h2spec_passes() {
    let Some(program) = h2spec() else { return };
    let server = Server::start(&[]);
    let (host, port) = server.address().rsplit_once(':').unwrap();
    let output = Command::new(program).args(["--host", host, "--port", port, "--timeout", "5"]).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    let summary = report.lines().rev().find(|line| line.contains("tests,")).unwrap_or_default();
    assert!(summary.contains("0 skipped, 0 failed") && output.status.success(), "{report}");
    assert!(summary.split(' ').next().unwrap().parse::<u32>().unwrap() >= 140, "{summary}");
}
