//! h2spec, somebody else's test of HTTP/2 servers: all of it, and nothing is excepted.

use std::{env, process::Command};

use crate::support::Server;

#[test]
fn h2spec_finds_nothing() {
    let Some(program) = env::var_os("METASTORE_TEST_H2SPEC") else {
        eprintln!("\n*** THERE IS NO H2SPEC HERE: HTTP/2 WAS NOT HELD AGAINST IT ***\n");
        return;
    };
    if env::var_os("METASTORE_TEST_GRPC_SERVER").is_some_and(|name| name == "tonic") {
        return; // It is about our own loop.
    }
    let server = Server::start(&[]);
    let (host, port) = server.address().rsplit_once(':').unwrap();
    let output = Command::new(program).args(["--host", host, "--port", port, "--timeout", "5"]).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    let summary = report.lines().rev().find(|line| line.contains("tests,")).unwrap_or_default();
    assert!(summary.contains("0 skipped, 0 failed") && output.status.success(), "{report}");
    assert!(summary.split(' ').next().unwrap().parse::<u32>().unwrap() >= 140, "{summary}");
}
