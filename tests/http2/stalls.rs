//! Expensive requests of one client do not delay another: with a single thread for all clients, a small range on one connection
//! is answered in time while another connection causes long work.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{RangeRequest, RequestOp, TxnRequest, request_op};
use prost::Message;

use crate::{
    floods::put,
    raw::{self, Raw, call, frame, framed, setting},
    support::{Server, scaled},
};

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
/// The worst latency should be lower; ten times as much fails the test.
const GOAL: Duration = Duration::from_millis(20);
const ROUNDS: u32 = 5;

/// The worst latency of a small range on its own connection during `act`.
fn worst_latency_while(server: &Server, act: impl FnOnce()) -> Duration {
    let is_over = AtomicBool::new(false);
    let tiny = RangeRequest { key: "tiny".into(), ..RangeRequest::default() }.encode_to_vec();
    std::thread::scope(|scope| {
        let probing = scope.spawn(|| {
            let (mut raw, mut worst, mut nth) = (Raw::handshake(server.address()), Duration::ZERO, 0);
            while !is_over.load(Ordering::Relaxed) {
                let started = Instant::now();
                raw.send(&call(2 * nth + 1, RANGE, &tiny)).unwrap();
                while raw.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM == 0 {}
                worst = worst.max(started.elapsed());
                if nth % 100 == 0 {
                    raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &100_000_u32.to_be_bytes())).unwrap();
                }
                nth += 1;
            }
            worst
        });
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        is_over.store(true, Ordering::Relaxed);
        let worst = probing.join().unwrap();
        acted.unwrap();
        worst
    })
}

/// The tests run one at a time, so that they do not disturb each other's measurements.
static SERIAL: Mutex<()> = Mutex::new(());

/// Asserts that a small range is answered in time during `act`. Delays by other processes come and go, those by the server occur
/// each time: so the best of a few rounds counts.
#[track_caller]
fn assert_no_stall(server: &Server, what: &str, act: impl Fn()) {
    let _serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        best = best.min(worst_latency_while(server, &act));
        eprintln!("the worst latency of a small range during {what}: {best:?}");
        if best < scaled(10 * GOAL) {
            return;
        }
    }
    panic!("{what}: {best:?}");
}

/// Makes the same call several times, and reads all of each response.
fn ask(server: &Server, path: &str, message: &[u8], fields: &[u8], times: u32) {
    let mut raw = Raw::handshake(server.address());
    raw.send(&setting(raw::INITIAL_WINDOW, 1 << 30)).unwrap();
    raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes())).unwrap();
    for nth in 0..times {
        let block = [&raw::block(path)[..], fields].concat();
        raw.send(&frame(raw::HEADERS, raw::END_HEADERS, 2 * nth + 1, &block)).unwrap();
        raw.send(&frame(raw::DATA, raw::END_STREAM, 2 * nth + 1, &framed(message))).unwrap();
        let mut received = 0;
        loop {
            let frame = raw.next().expect("an answer");
            received += if frame.kind == raw::DATA { frame.payload.len() } else { 0 };
            if frame.kind == raw::HEADERS && frame.flags & raw::END_STREAM != 0 {
                break;
            }
        }
        assert!(received > 1000, "{received} bytes came");
        raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &u32::try_from(received).unwrap().to_be_bytes())).unwrap();
    }
}

fn list() -> RangeRequest {
    RangeRequest { key: "k".into(), range_end: "l".into(), serializable: true, ..RangeRequest::default() }
}

#[test]
fn large_responses_do_not_stall_others() {
    let server = Server::start(&["--api-threads=1"]);
    for nth in 0..200 {
        put(&server, &format!("k{nth:03}"), 1_000_000);
    }
    put(&server, "tiny", 10);
    let range = list().encode_to_vec();
    assert_no_stall(&server, "a range of 200 MB", || ask(&server, RANGE, &range, b"", 3));
    let op = RequestOp { request: Some(request_op::Request::RequestRange(list())) };
    let txn = TxnRequest { success: vec![op], ..TxnRequest::default() }.encode_to_vec();
    assert_no_stall(&server, "a transaction that reads 200 MB", || ask(&server, TXN, &txn, b"", 3));
}

#[test]
fn large_compressed_responses_do_not_stall_others() {
    let server = Server::start(&["--api-threads=1"]);
    for nth in 0..20 {
        put(&server, &format!("k{nth:03}"), 1_000_000);
    }
    put(&server, "tiny", 10);
    let range = list().encode_to_vec();
    let gzip_fields = b"\x00\x0dgrpc-encoding\x04gzip\x00\x14grpc-accept-encoding\x04gzip";
    assert_no_stall(&server, "gzip of 20 MB", || ask(&server, RANGE, &range, gzip_fields, 3));
}

/// Many lists that are each short.
#[test]
fn many_short_lists_do_not_stall_others() {
    let server = Server::start(&["--api-threads=1"]);
    for nth in 0..250 {
        put(&server, &format!("k{nth:03}"), 100);
    }
    put(&server, "tiny", 10);
    let range = list().encode_to_vec();
    let load = || {
        let mut raw = Raw::handshake(server.address());
        raw.send(&setting(raw::INITIAL_WINDOW, 1 << 30)).unwrap();
        raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes())).unwrap();
        let asked: Vec<u8> = (0..2000).flat_map(|nth| call(2 * nth + 1, RANGE, &range)).collect();
        let mut writer = raw.clone_handle();
        let writing = std::thread::spawn(move || writer.send(&asked));
        for _ in 0..2000 {
            while raw.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM == 0 {}
        }
        writing.join().unwrap().unwrap();
    };
    assert_no_stall(&server, "2,000 lists of 250 keys", load);
}
