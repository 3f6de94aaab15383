//! Everything besides the operations: unusual or malformed calls, and the names of metrics.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
};

use test_support::{Server, program, requirements::etcd};

use super::odd_calls;

/// The test of our own server expects the same answers.
#[test]
fn etcd_still_answers_odd_calls_as_recorded() {
    let Some(etcd) = etcd() else { return };
    let etcd = Server::start_program(&etcd, &[]);
    for call in odd_calls::all() {
        assert_eq!(call.ask(etcd.address()), call.answer, "{}", call.name());
    }
}

/// Every `grpc_server_*` series, with its labels.
fn series(address: &str) -> BTreeSet<String> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let lines = page.lines().filter(|line| line.starts_with("grpc_server_"));
    lines.map(|line| line.split_once("} ").expect("every series has labels").0.to_owned()).collect()
}

#[test]
fn every_call_that_etcd_counts_from_the_start_is_counted_here() {
    let Some(etcd) = etcd() else { return };
    let (ours, etcd) = (Server::start_program(&program(), &[]), Server::start_program(&etcd, &[]));
    let (ours, theirs) = (series(ours.address()), series(etcd.address()));
    assert_eq!(theirs.len(), 900);
    let missing: Vec<_> = theirs.difference(&ours).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    let services = ["v3lockpb.Lock", "v3electionpb.Election"].map(|name| format!("grpc_service=\"{name}\""));
    let more: Vec<_> =
        ours.difference(&theirs).filter(|series| !services.iter().any(|name| series.contains(name))).collect();
    assert!(more.is_empty(), "{more:#?}");
}
