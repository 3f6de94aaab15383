//! A server that was given no flag at all, in a network of its own, because it takes the ports that everybody takes.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{self, PATIENCE, Running};

/// A program in a network of its own, of which only the loopback is there.
fn alone(program: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--net", "--map-root-user", "sh", "-c", "ip link set lo up && exec \"$0\"", program]);
    command
}

fn can_be_alone() -> bool {
    alone("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Runs this program's own client where the server is.
fn beside(server: &Running, arguments: &[&str]) -> String {
    let output = Command::new("nsenter")
        .args(["--preserve-credentials", "--user", "--net", "--target", &server.0.id().to_string()])
        .arg(env!("CARGO_BIN_EXE_metastore"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn no_flag_is_needed() {
    if !can_be_alone() {
        return support::skip("no network of one's own can be made here");
    }
    let directory = tempfile::tempdir().unwrap();
    let child = alone(env!("CARGO_BIN_EXE_metastore"))
        .current_dir(directory.path())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Running(child);
    // Before it says anything it may not be in its own network yet.
    let (tell, lines) = mpsc::channel();
    let errors = BufReader::new(server.0.stderr.take().unwrap());
    thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
    let mut said = Vec::new();
    while !said.last().is_some_and(|line: &String| line.contains("serving client traffic insecurely")) {
        said.push(lines.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{error}: {said:#?}")));
    }
    let pid = server.0.id().to_string();
    beside(&server, &["bench", "ready", "--endpoint", "127.0.0.1:2379", "--server-pid", &pid]);
    let report = beside(&server, &["bench", "put", "--total", "10", "--warmup", "0s", "--json"]);
    assert!(report.contains("\"operations\":10"), "{report}");
    assert!(
        directory.path().join("default.metastore/member").is_dir(),
        "{:?}",
        fs::read_dir(directory.path()).unwrap()
    );
    let peers = "\"listen-peer-urls\":[\"http://localhost:2380\"]";
    assert!(said.iter().any(|line| line.contains(peers)), "{said:#?}");

    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    assert_eq!(server.0.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
}
