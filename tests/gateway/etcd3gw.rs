//! Python's client of the JSON API, driven by `python_client.py`.

use std::{path::Path, process::Command};

use crate::support::{
    Server, program,
    requirements::{etcd, python},
};

fn drive(server: &Server) {
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gateway/python_client.py");
    let (host, port) = server.address().split_once(':').unwrap();
    let output = Command::new(python).arg(script).args([host, port]).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("all as expected"), "{text}");
}

#[test]
fn etcd3gw_works_with_metastore() {
    drive(&Server::start_program(&program(), &[]));
}

#[test]
fn etcd3gw_works_with_etcd() {
    let Some(etcd) = etcd() else { return };
    drive(&Server::start_program(&etcd, &[]));
}
