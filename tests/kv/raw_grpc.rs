//! A server without any flags, in a network namespace of its own, because it uses etcd's default ports.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{self, KillOnDrop, TIMEOUT};

/// A program in a network namespace of its own, with only the loopback interface.
fn in_namespace(program: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--net", "--map-root-user", "sh", "-c", "ip link set lo up && exec \"$0\"", program]);
    command
}

fn namespaces_are_available() -> bool {
    in_namespace("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Runs the client of the program under test in the server's namespace.
fn run_client(server: &KillOnDrop, arguments: &[&str]) -> String {
    let output = Command::new("nsenter")
        .args(["--preserve-credentials", "--user", "--net", "--target", &server.0.id().to_string()])
        .arg(test_support::program())
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_server_starts_without_flags() {
    if !namespaces_are_available() {
        return support::skip("network namespaces are not available");
    }
    let directory = tempfile::tempdir().unwrap();
    let child = in_namespace(test_support::program().to_str().unwrap())
        .current_dir(directory.path())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = KillOnDrop(child);
    // Before its first log line it may not be in its namespace yet.
    let (sender, lines) = mpsc::channel();
    let errors = BufReader::new(server.0.stderr.take().unwrap());
    thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let mut log = Vec::new();
    while !log.last().is_some_and(|line: &String| line.contains("serving client traffic insecurely")) {
        log.push(lines.recv_timeout(TIMEOUT).unwrap_or_else(|error| panic!("{error}: {log:#?}")));
    }
    let pid = server.0.id().to_string();
    run_client(&server, &["bench", "ready", "--endpoint", "127.0.0.1:2379", "--server-pid", &pid]);
    let report = run_client(&server, &["bench", "put", "--total", "10", "--warmup", "0s", "--json"]);
    assert!(report.contains("\"operations\":10"), "{report}");
    assert!(
        directory.path().join("default.metastore/member").is_dir(),
        "{:?}",
        fs::read_dir(directory.path()).unwrap()
    );
    let peers = "\"listen-peer-urls\":[\"http://localhost:2380\"]";
    assert!(log.iter().any(|line| line.contains(peers)), "{log:#?}");

    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    assert_eq!(server.0.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
}
