//! A server without any flags, in a network namespace of its own, because it uses etcd's default ports.

use std::{fs, os::unix::process::ExitStatusExt};

use rustix::process::Signal;

use crate::support::{Process, network_namespace, program};

/// Runs the client of the program under test in the server's namespace.
fn run_client(server: &Process, arguments: &[&str]) -> String {
    let output = network_namespace::command_beside(server, &program()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_server_starts_without_flags() {
    let Some(mut command) = network_namespace::command(&program()) else { return };
    let directory = tempfile::tempdir().unwrap();
    command.current_dir(directory.path()).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mut server = Process::start(&mut command);
    server.wait_for_log("serving client traffic insecurely");
    let pid = server.pid().to_string();
    run_client(&server, &["bench", "ready", "--endpoint", "127.0.0.1:2379", "--server-pid", &pid]);
    let report = run_client(&server, &["bench", "put", "--total", "10", "--warmup", "0s", "--json"]);
    assert!(report.contains("\"operations\":10"), "{report}");
    assert!(
        directory.path().join("default.metastore/member").is_dir(),
        "{:?}",
        fs::read_dir(directory.path()).unwrap()
    );
    server.wait_for_log("\"listen-peer-urls\":[\"http://localhost:2380\"]");

    server.signal(Signal::TERM);
    assert_eq!(server.wait_for_end().signal(), Some(Signal::TERM.as_raw()));
}
