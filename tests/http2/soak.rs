//! Ten thousand connections for ten minutes: memory and file descriptors stay constant.

use std::{
    fs,
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::RangeRequest;
use prost::Message;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    raw::{self, Raw, call, frame},
    support::Server,
};

const RANGE: &str = "/etcdserverpb.KV/Range";
const WATCH: &str = "/etcdserverpb.Watch/Watch";

fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

fn measure(server: &Server) -> (usize, usize) {
    let process = format!("/proc/{}", server.pid());
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kibibytes = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    (kibibytes, fs::read_dir(format!("{process}/fd")).unwrap().count())
}

/// Every connection needs a descriptor, here and in the server, which raises its own limit.
fn raise_file_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
        .expect("a process may raise its limit to the maximum");
}

/// `SOAK_SECONDS` and `SOAK_CONNECTIONS` make it shorter.
#[test]
#[ignore = "long"]
fn ten_thousand_connections_for_ten_minutes() {
    raise_file_limit();
    let (seconds, connections) = (number("SOAK_SECONDS", 600), number("SOAK_CONNECTIONS", 10_000));
    let server = Server::start(&[]);
    let mut open: Vec<_> = (0..connections).map(|_| (Raw::handshake(server.address()), 1)).collect();
    let range = RangeRequest { key: "a".into(), ..RangeRequest::default() }.encode_to_vec();
    let round = |open: &mut Vec<(Raw, u32)>| {
        for (raw, stream) in open.iter_mut() {
            let mut bytes = frame(raw::HEADERS, raw::END_HEADERS, *stream, &raw::block(WATCH));
            bytes.extend(frame(raw::RST_STREAM, 0, *stream, &[0, 0, 0, 8]));
            bytes.extend(call(*stream + 2, RANGE, &range));
            raw.send(&bytes).unwrap();
            *stream += 4;
        }
        for (raw, stream) in open.iter_mut() {
            while raw.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM == 0 {}
            raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &100_u32.to_be_bytes())).unwrap();
            if *stream % 4001 == 0 {
                (*raw, *stream) = (Raw::handshake(server.address()), 1); // Some connections are replaced.
            }
        }
    };
    for _ in 0..40 {
        round(&mut open);
    }
    let (started, before) = (Instant::now(), measure(&server));
    let mut rounds = 0;
    while started.elapsed() < Duration::from_secs(seconds as u64) {
        round(&mut open);
        rounds += 1;
    }
    let after = measure(&server);
    eprintln!("{rounds} rounds of {connections} connections: {before:?} → {after:?} (KiB, descriptors)");
    assert!(after.0 < before.0 + before.0 / 10 + 10_000, "memory: {before:?} → {after:?}");
    assert!(after.1 <= before.1 + 10, "descriptors: {before:?} → {after:?}");
}
