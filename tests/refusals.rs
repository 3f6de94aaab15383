//! Conditions under which a server refuses to start: it logs one clear line, exits with an error code, and changes nothing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

use metastore::{
    node::data_dir::DataDir,
    proto::etcdserverpb::{PutRequest, RangeRequest},
};
use test_support::Server;

const REFUSED: i32 = 1;
const ANY_PORT: &str = "http://127.0.0.1:0";

/// Everything below a directory: files with their contents, directories with `None`.
fn tree(path: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        all.insert(path.clone(), fs::read(&path).ok());
        if path.is_dir() {
            all.extend(tree(&path));
        }
    }
    all
}

#[track_caller]
fn assert_untouched(before: &BTreeMap<PathBuf, Option<Vec<u8>>>, path: &Path) {
    let after = tree(path);
    let names = |tree: &BTreeMap<PathBuf, Option<Vec<u8>>>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&after), names(before), "no file was created or removed");
    let changed: Vec<_> = before.keys().filter(|path| before[*path] != after[*path]).collect();
    assert!(changed.is_empty(), "{changed:?} have changed");
}

/// A server that is not started yet.
fn server(data_dir: &Path, client_url: &str) -> Server {
    let mut server = Server::single(&["--listen-client-urls", client_url]);
    server.set_data_dir(data_dir);
    server
}

/// Starts a server that must exit by itself; returns the error of its one fatal log line.
#[track_caller]
fn refusal(data_dir: &Path, client_url: &str) -> String {
    let (status, log) = server(data_dir, client_url).run_to_end();
    assert_eq!(status.code(), Some(REFUSED), "{log}");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let errors: Vec<_> =
        lines.iter().filter(|line| !["debug", "info", "warn"].contains(&field(line, "level"))).collect();
    let [fatal_line] = errors.as_slice() else { panic!("expected one error line, got {errors:?}") };
    assert_eq!(field(fatal_line, "level"), "fatal");
    assert!(!field(fatal_line, "error").contains('\n'), "{fatal_line}");
    field(fatal_line, "error").to_owned()
}

fn field<'a>(line: &'a serde_json::Value, name: &str) -> &'a str {
    line[name].as_str().unwrap_or_default()
}

#[track_caller]
fn assert_contains(message: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| message.contains(part)), "{message:?} does not contain all of {parts:?}");
}

async fn put(server: &Server, key: &str, value: &str) {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    server.kv().await.put(PutRequest { key, value, ..PutRequest::default() }).await.unwrap();
}

async fn count(server: &Server) -> i64 {
    let all = RangeRequest { key: vec![0].into(), range_end: vec![0].into(), ..RangeRequest::default() };
    server.kv().await.range(all).await.unwrap().into_inner().count
}

/// A stopped member with its data directory.
fn stopped_member() -> Server {
    let mut server = Server::start(&[]);
    server.stop();
    server
}

#[test]
fn a_newer_format_is_refused() {
    let server = stopped_member();
    let version = server.data_dir().join("member/VERSION");
    fs::write(&version, "metastore 2\n").unwrap();
    let before = tree(&server.data_dir());
    let message = refusal(&server.data_dir(), ANY_PORT);
    assert_contains(&message, &["VERSION", "format 2", "newer"]);
    assert_untouched(&before, &server.data_dir());
}

#[test]
fn etcds_own_directory_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("default.etcd");
    fs::create_dir_all(data.join("member/wal")).unwrap();
    fs::create_dir_all(data.join("member/snap")).unwrap();
    fs::write(data.join("member/wal/0000000000000000-0000000000000000.wal"), "a log of etcd's").unwrap();
    fs::write(data.join("member/snap/db"), "a database of etcd's").unwrap();
    let before = tree(root.path());
    assert_contains(&refusal(&data, ANY_PORT), &["default.etcd/member", "is not metastore's, but etcd's"]);
    assert_untouched(&before, root.path());
}

#[test]
fn a_directory_with_foreign_files_is_refused() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("thesis.tex"), "all of it").unwrap();
    let before = tree(root.path());
    assert_contains(&refusal(root.path(), ANY_PORT), &["is not metastore's", "thesis.tex"]);
    assert_untouched(&before, root.path());
}

#[test]
fn a_directory_whose_database_is_gone_is_refused() {
    let server = stopped_member();
    let path = server.data_dir();
    fs::remove_dir_all(path.join("member/db")).unwrap();
    let before = tree(&path);
    assert_contains(&refusal(&path, ANY_PORT), &["the database", "member/db", "is not there", "Put it back"]);
    assert_untouched(&before, &path);
}

/// As if etcd had been started on the same directory.
#[test]
fn etcd_files_next_to_our_data_are_reported() {
    let mut server = stopped_member();
    fs::create_dir(server.data_dir().join("member/wal")).unwrap();
    server.restart();
    server.wait_for_log("the data directory contains files of etcd");
}

#[test]
fn a_port_in_use_is_refused_before_anything_is_created() {
    let root = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let message = refusal(&root.path().join("data"), &format!("http://{address}"));
    assert_contains(&message, &[&address, "address already in use"]);
    assert_untouched(&BTreeMap::new(), root.path());
}

#[test]
fn a_path_that_cannot_be_written_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let before = tree(root.path());
    // Not even root can create a directory at the second and third of these paths.
    for path in [file.clone(), file.join("data"), PathBuf::from("/proc/metastore")] {
        let message = refusal(&path, ANY_PORT);
        assert_contains(&message, &["data directory", path.to_str().unwrap()]);
    }
    assert_untouched(&before, root.path());
}

/// SIGTERM ends a process that has not started yet because it waits for the lock.
#[test]
fn a_process_waiting_for_the_lock_ends_on_sigterm() {
    let server = stopped_member();
    let path = server.data_dir();
    let first = DataDir::open(&path).unwrap();
    let mut second = self::server(&path, ANY_PORT);
    second.launch();
    second.wait_for_log("db file is flocked by another process");
    second.stop();
    drop(first);
}

/// As in etcd, it waits for the lock of the data directory, logs one line about it, and starts when the first process ends.
#[test]
fn a_second_process_waits_and_changes_nothing() {
    let server = stopped_member();
    let path = server.data_dir();
    let first = DataDir::open(&path).unwrap();
    let before = tree(&path);
    let mut second = self::server(&path, ANY_PORT);
    second.launch();
    second.wait_for_log("db file is flocked by another process");
    let log = second.log();
    assert!(!log.contains("serving client traffic") && !second.has_ended(), "it does not wait: {log}");
    assert_untouched(&before, &path);
    drop(first);
    second.await_serving();
    second.kill();
}

#[tokio::test]
async fn a_log_that_is_shorter_than_the_database_is_refused() {
    let mut server = Server::start(&[]);
    put(&server, "a", "1").await;
    server.stop();
    let (log, old) = (server.data_dir().join("member/log"), server.data_dir().parent().unwrap().join("old"));
    fs::create_dir(&old).unwrap();
    for entry in fs::read_dir(&log).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, old.join(path.file_name().unwrap())).unwrap();
    }
    server.restart();
    for key in ["b", "c", "d"] {
        put(&server, key, "2").await;
    }
    server.stop();

    let new = server.data_dir().parent().unwrap().join("new");
    fs::rename(&log, &new).unwrap();
    fs::rename(&old, &log).unwrap();
    let before = tree(&log);
    assert_contains(&refusal(&server.data_dir(), ANY_PORT), &["log", "database"]);
    assert_untouched(&before, &log);

    fs::remove_dir_all(&log).unwrap();
    fs::rename(&new, &log).unwrap();
    server.restart();
    assert_eq!(count(&server).await, 4, "with its own log the database is intact");
}

#[tokio::test]
async fn a_flipped_bit_in_the_middle_of_the_log_is_refused() {
    let mut server = Server::start(&[]);
    for nth in 0..20 {
        // One at a time, so that each is a group of its own.
        put(&server, &format!("key-{nth}"), &format!("needle-{nth};")).await;
    }
    server.kill();
    let segment = server.data_dir().join("member/log/00000000000000000001.segment");
    let mut bytes = fs::read(&segment).unwrap();
    let offset = bytes.windows(9).position(|window| window == b"needle-9;").unwrap();
    bytes[offset] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let before = tree(&server.data_dir());
    let message = refusal(&server.data_dir(), ANY_PORT);
    assert_contains(&message, &["00000000000000000001.segment", "damaged at offset", "Nothing was changed"]);
    assert_untouched(&before, &server.data_dir());

    bytes[offset] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    server.restart();
    assert_eq!(count(&server).await, 20);
}
