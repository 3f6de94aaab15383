//! What clients make the server keep is counted: memory grows by no more than the ledger says plus a constant.
//!
//! Each test is one way of making the server keep something. It measures the peak of the resident memory, so nothing may be kept
//! uncounted even for a moment.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use metastore::proto::{
    etcdserverpb::{PutRequest, RangeRequest},
    v3electionpb::CampaignRequest,
    v3lockpb::LockRequest,
};
use prost::Message;

use crate::{
    floods::{assert_healthy, peak_bytes, put, reset_peak},
    raw::{self, Raw, call, frame, framed, setting},
    support::{Server, eventually, scaled, time_limit},
};

const MEBIBYTE: usize = 1 << 20;
const RANGE: &str = "/etcdserverpb.KV/Range";
const RANGE_STREAM: &str = "/etcdserverpb.KV/RangeStream";
const PUT: &str = "/etcdserverpb.KV/Put";
const LOCK: &str = "/v3lockpb.Lock/Lock";
const CAMPAIGN: &str = "/v3electionpb.Election/Campaign";

/// The bytes that the server reports as held.
fn ledger(server: &Server) -> usize {
    // While almost nothing may be held, the metrics page may be refused.
    eventually("the server says what it holds", time_limit(), || {
        let page = server.http("GET", "/metrics").body;
        page.lines().find_map(|line| line.strip_prefix("metastore_http2_held_bytes ")?.parse().ok()).ok_or(page)
    })
}

/// Whether the server holds so many bytes, or else how many it holds.
fn holds(server: &Server, bytes: usize) -> Result<(), usize> {
    let held = ledger(server);
    if held >= bytes { Ok(()) } else { Err(held) }
}

/// Asserts that the server never grows by more than its ledger says plus a constant; returns the largest value of the ledger.
fn is_counted(server: &Server, constant: usize, act: impl FnOnce()) -> usize {
    ledger(server); // The first page makes the server larger permanently.
    reset_peak(server);
    let before = peak_bytes(server);
    let (is_over, most) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                most.fetch_max(ledger(server), Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(50));
            }
        });
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        most.fetch_max(ledger(server), Ordering::Relaxed);
        is_over.store(true, Ordering::Relaxed);
        watching.thread().unpark();
        acted.unwrap();
    });
    let (grown, most) = (peak_bytes(server).saturating_sub(before), most.into_inner());
    eprintln!("{} MiB more than before, the ledger said {} MiB", grown / MEBIBYTE, most / MEBIBYTE);
    let bound = most + constant;
    assert!(grown <= bound, "{} MiB more than before, the ledger says {}", grown / MEBIBYTE, most / MEBIBYTE);
    assert_healthy(server);
    most
}

/// A connection whose streams open no window.
fn closed(server: &Server) -> Raw {
    let mut raw = Raw::handshake(server.address());
    raw.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
    raw
}

fn put_many(server: &Server, keys: usize, bytes: usize) {
    for nth in 0..keys {
        put(server, &format!("k{nth:03}"), bytes);
    }
}

fn list(limit: i64) -> Vec<u8> {
    RangeRequest { key: "k".into(), range_end: "l".into(), limit, ..RangeRequest::default() }.encode_to_vec()
}

/// A message with an unknown field of so many bytes.
fn padded(message: Vec<u8>, bytes: usize) -> Vec<u8> {
    let mut message = message;
    prost::encoding::bytes::encode(1000, &vec![b'x'; bytes], &mut message);
    message
}

/// A call whose message is longer than a frame. The window has to be wide enough for it.
fn send_large(raw: &mut Raw, stream: u32, path: &str, message: &[u8]) {
    raw.send(&frame(raw::HEADERS, raw::END_HEADERS, stream, &raw::block(path))).unwrap();
    let message = framed(message);
    let (first, rest) = message.split_at(message.len().min(16_384));
    raw.send(&frame(raw::DATA, if rest.is_empty() { raw::END_STREAM } else { 0 }, stream, first)).unwrap();
    if rest.is_empty() {
        return;
    }
    while raw.wait_for(raw::WINDOW_UPDATE).unwrap().stream != stream {}
    let mut bytes = Vec::new();
    let mut chunks = rest.chunks(16_384).peekable();
    while let Some(chunk) = chunks.next() {
        bytes.extend(frame(raw::DATA, if chunks.peek().is_none() { raw::END_STREAM } else { 0 }, stream, chunk));
    }
    raw.send(&bytes).unwrap();
}

/// Whether the next response on the stream is a refusal because too much is held.
fn is_refused(raw: &mut Raw, stream: u32) -> bool {
    loop {
        let frame = raw.wait_for(raw::HEADERS).unwrap();
        if frame.stream == stream {
            return frame.flags & raw::END_STREAM != 0;
        }
    }
}

/// gRPC is available over HTTP/2 only: below that there are no windows and nothing is counted. (etcd responds the same.)
#[test]
fn grpc_over_http1_is_not_found() {
    let server = Server::start(&[]);
    put_many(&server, 30, MEBIBYTE);
    let most = is_counted(&server, 40 * MEBIBYTE, || {
        let body = framed(&list(0));
        let asking: Vec<_> = (0..5)
            .map(|_| {
                let mut stream = TcpStream::connect(server.address()).unwrap();
                let head = format!(
                    "POST {RANGE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
                stream
            })
            .collect();
        for mut stream in asking {
            stream.set_read_timeout(Some(scaled(Duration::from_secs(30)))).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
            assert!(answer.ends_with("\r\n\r\n404 page not found\n"), "{answer}");
        }
    });
    assert!(most < MEBIBYTE, "{most}");
}

/// Each of many connections has one response that it does not read.
#[test]
fn a_large_unread_response_on_each_of_many_connections_is_counted() {
    let server = Server::start(&["--max-held-bytes=33554432", "--read-threads=2"]);
    put_many(&server, 50, MEBIBYTE);
    let mut kept = Vec::new();
    let most = is_counted(&server, 90 * MEBIBYTE, || {
        // All keys are too much for one connection, and a few keys are too much for all connections together.
        for (limit, connections) in [(0, 4), (6, 16)] {
            let mut refused = 0;
            for _ in 0..connections {
                let mut raw = closed(&server);
                raw.send(&call(1, RANGE, &list(limit))).unwrap();
                refused += usize::from(is_refused(&mut raw, 1));
                kept.push(raw);
            }
            assert!(if limit == 0 { refused == connections } else { (1..16).contains(&refused) }, "{refused}");
        }
    });
    assert!(most <= 33_554_432, "{most}");
    assert!(ledger(&server) >= 6 * MEBIBYTE, "some responses wait to be read");
}

/// Calls that wait for a lock or an election, with large messages of which little is needed.
#[test]
fn waiting_lock_and_campaign_calls_keep_only_what_they_need() {
    let server = Server::start(&[]);
    for (path, message) in [
        (LOCK, LockRequest { name: "lock".into(), ..LockRequest::default() }.encode_to_vec()),
        (
            CAMPAIGN,
            CampaignRequest { name: "race".into(), value: "me".into(), ..CampaignRequest::default() }.encode_to_vec(),
        ),
    ] {
        let mut raw = Raw::handshake(server.address());
        let most = is_counted(&server, 50 * MEBIBYTE, || {
            for nth in 0..100 {
                send_large(&mut raw, 2 * nth + 1, path, &padded(message.clone(), 1_900_000));
                if raw.needs_window_update() {
                    raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &1_000_000_u32.to_be_bytes())).unwrap();
                }
            }
            eventually("all of them wait", time_limit(), || holds(&server, 100 * 4096));
        });
        assert!(most < 20 * MEBIBYTE, "{most}");
    }
}

/// Streams whose responses are not read hold one chunk at most, and only while there is room.
#[test]
fn unread_range_streams_are_counted() {
    let server = Server::start(&["--max-held-bytes=67108864"]);
    put_many(&server, 20, MEBIBYTE);
    let mut kept = Vec::new();
    let most = is_counted(&server, 90 * MEBIBYTE, || {
        for _ in 0..4 {
            let mut raw = closed(&server);
            for nth in 0..40 {
                raw.send(&call(2 * nth + 1, RANGE_STREAM, &padded(list(0), 10_000))).unwrap();
            }
            kept.push(raw);
        }
        eventually("much waits to be read", time_limit(), || holds(&server, 30 * MEBIBYTE));
    });
    assert!(most <= 67_108_864, "{most}");
}

/// Pages that are requested while the socket accepts nothing are not generated.
#[test]
fn pages_behind_an_unread_socket_are_not_generated() {
    let server = Server::start(&[]);
    let mut raw = Raw::handshake(server.address());
    is_counted(&server, 40 * MEBIBYTE, || {
        raw.send(&setting(raw::INITIAL_WINDOW, 1 << 30)).unwrap();
        raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes())).unwrap();
        let page = [&[0x82, 0x86, 0x04, 8][..], b"/metrics"].concat();
        let flags = raw::END_HEADERS | raw::END_STREAM;
        let asked: Vec<u8> = (0..3000).flat_map(|nth| frame(raw::HEADERS, flags, 2 * nth + 1, &page)).collect();
        raw.send(&asked).unwrap();
        for _ in 0..10 {
            assert_healthy(&server);
        }
    });
}

/// Large messages of calls that complete, one after another and all at once.
#[test]
fn writes_in_progress_are_counted() {
    let server = Server::start(&["--max-connection-bytes=16777216"]);
    let mut raw = Raw::handshake(server.address());
    let put = PutRequest { key: "large".into(), value: vec![b'x'; 1_000_000].into(), ..PutRequest::default() };
    let put = put.encode_to_vec();
    let most = is_counted(&server, 150 * MEBIBYTE, || {
        for nth in 0..60 {
            send_large(&mut raw, 2 * nth + 1, PUT, &put);
        }
    });
    assert!(most <= 2 * 16_777_216, "{most}");
}
