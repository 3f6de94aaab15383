//! The official Go client, driven by our program in `tests/go`, against a real server process.
//!
//! The program prints the name of each check that has passed. When it prints `restart`, the server is killed and restarted
//! while the client stays connected. The same program also runs against a real etcd, to prove that its expectations are
//! etcd's behaviour and not ours.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use test_support::{
    Server, program,
    requirements::{etcd, installed},
};

#[test]
fn the_go_client_passes_against_metastore() {
    let Some(client) = client() else { return };
    drive(client, Server::start_program(&program(), &[]));
}

#[test]
fn the_go_client_passes_against_etcd() {
    let Some(client) = client() else { return };
    let Some(etcd) = etcd() else { return };
    drive(client, Server::start_program(&etcd, &[]));
}

/// The path of the built program; `None` on a machine without Go.
fn client() -> Option<&'static Path> {
    static CLIENT: OnceLock<PathBuf> = OnceLock::new();
    let go = installed("go", "go")?;
    Some(CLIENT.get_or_init(|| build(&go)))
}

fn build(go: &Path) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("goclient");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/go");
    let built = Command::new(go).args(["build", "-o"]).arg(&program).arg(".").current_dir(source).output().unwrap();
    assert!(built.status.success(), "go build: {}", String::from_utf8_lossy(&built.stderr));
    program
}

fn drive(client: &Path, mut server: Server) {
    let mut running = Command::new(client)
        .arg(server.url())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut to_client = running.stdin.take().unwrap();
    let mut passed = Vec::new();
    let mut restarts = 0;
    for line in BufReader::new(running.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == "restart" {
            server.kill_and_restart();
            restarts += 1;
            // Fails if the client has exited in the meantime; its error is reported below.
            let _ = to_client.write_all(b"restarted\n");
        } else {
            passed.push(line);
        }
    }
    let ended = running.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "the Go client failed: {errors}\nafter\n{}", passed.join("\n"));
    assert!(passed.len() >= 17 && restarts == 4, "only these checks ran, with {restarts} restarts: {passed:?}");
}
