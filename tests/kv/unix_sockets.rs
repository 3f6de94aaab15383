//! Unix socket files, and the notification of systemd.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixDatagram, UnixStream},
    process::Command,
};

use hyper_util::rt::TokioIo;
use metastore::proto::etcdserverpb::{PutRequest, kv_client::KvClient};
use tonic::transport::Endpoint;

use crate::support::{Server, requirements::etcdctl, time_limit};

#[tokio::test]
async fn clients_are_served_at_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("client.sock");
    let url = format!("unix://{}", path.display());
    let mut server = Server::start(&[&format!("--listen-client-urls={url}"), "--client-begin-timeout=1s"]);
    assert_eq!(server.address(), path.display().to_string());

    let socket = path.clone();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
    let put = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() };
    let answer = KvClient::new(channel).put(put).await.unwrap().into_inner();
    assert_eq!(answer.header.unwrap().revision, 2);

    let mut plain = UnixStream::connect(&path).unwrap();
    write!(plain, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    plain.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");

    let mut silent = UnixStream::connect(&path).unwrap();
    silent.set_read_timeout(Some(time_limit())).unwrap();
    let mut received = Vec::new();
    silent.read_to_end(&mut received).expect("a connection that sends nothing is closed");
    assert!(received.is_empty());

    server.stop();
    assert!(!path.exists(), "a clean stop removes the socket file");
    server.restart();
    server.kill();
    assert!(path.exists(), "a killed server leaves it behind");
    server.restart();
}

#[test]
fn etcdctl_is_served_at_a_unix_socket() {
    let Some(etcdctl) = etcdctl() else { return };
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix://{}", directory.path().join("client.sock").display());
    let _server = Server::start(&[&format!("--listen-client-urls={url}")]);
    let run = |arguments: &[&str]| {
        let output = Command::new(&etcdctl).env_clear().args(["--endpoints", &url]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run(&["put", "k", "v"]), "OK\n");
    assert_eq!(run(&["get", "k", "--print-value-only"]), "v\n");
}

#[test]
fn systemd_is_notified_when_clients_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    let server = Server::start_in(&[("NOTIFY_SOCKET", path.to_str().unwrap())], &[]);
    let mut message = [0; 64];
    let len = systemd.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"READY=1");
    assert_eq!(server.http("GET", "/health").status, 200);
}
