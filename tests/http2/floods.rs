//! Abusive clients. Each is stopped, memory stays bounded, and the calls of a healthy client continue.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{PutRequest, RangeRequest};
use prost::Message;

use crate::{
    raw::{self, Raw, call, frame, framed, setting},
    support::{Server, eventually, http, scaled, time_limit},
};

const RANGE: &str = "/etcdserverpb.KV/Range";
const PUT: &str = "/etcdserverpb.KV/Put";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const MEBIBYTE: usize = 1 << 20;

/// The peak of the server's resident memory since [`reset_peak`].
pub fn peak_bytes(server: &Server) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

pub fn reset_peak(server: &Server) {
    fs::write(format!("/proc/{}/clear_refs", server.pid()), "5").unwrap();
}

/// Asserts that an abusive client never makes the server larger by more than `may_grow`, and that the server stays healthy.
fn check_memory(arguments: &[&str], may_grow: usize, act: impl FnOnce(&Server)) {
    let server = Server::start(arguments);
    reset_peak(&server);
    let before = peak_bytes(&server);
    act(&server);
    let grown = peak_bytes(&server).saturating_sub(before);
    assert!(grown <= may_grow, "{} MiB more than before", grown / MEBIBYTE);
    assert_healthy(&server);
}

/// The same, while a healthy client makes calls all the time.
fn check_bounded(arguments: &[&str], may_grow: usize, act: impl FnOnce(&Server)) {
    check_memory(arguments, may_grow, |server| {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let healthy = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    assert_healthy(server);
                    std::thread::park_timeout(Duration::from_millis(50));
                }
            });
            let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(server)));
            is_over.store(true, Ordering::Relaxed);
            healthy.thread().unpark();
            acted.unwrap();
        });
    });
}

/// Asserts that a call is answered soon.
pub fn assert_healthy(server: &Server) {
    let started = Instant::now();
    let mut healthy = Raw::handshake(server.address());
    healthy
        .send(&call(1, RANGE, &RangeRequest { key: "a".into(), ..RangeRequest::default() }.encode_to_vec()))
        .unwrap();
    let answer = healthy.wait_for(raw::DATA).expect("an answer");
    assert!(!answer.payload.is_empty());
    assert!(started.elapsed() < scaled(Duration::from_secs(3)), "it took {:?}", started.elapsed());
}

fn counted(server: &Server, reason: &str) -> u64 {
    let metrics = server.http("GET", "/metrics").body;
    let name = format!("metastore_http2_refused_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

/// FAULT-46.
#[test]
fn floods_of_frames_end_the_connection_with_enhance_your_calm() {
    check_bounded(&[], 50 * MEBIBYTE, |server| {
        type Flood = (&'static str, fn(u32) -> Vec<u8>);
        let floods: [Flood; 8] = [
            ("resets", |nth| {
                let mut bytes = call(2 * nth + 1, WATCH, b"");
                bytes.extend(frame(raw::RST_STREAM, 0, 2 * nth + 1, &[0, 0, 0, 8]));
                bytes
            }),
            ("settings", |_| setting(raw::INITIAL_WINDOW, 100).repeat(10)),
            ("pings", |_| frame(raw::PING, 0, 0, &[0; 8]).repeat(1000)),
            ("idle_frames", |_| frame(0x77, 0, 0, b"nothing").repeat(1000)),
            ("idle_frames", |_| frame(raw::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]).repeat(1000)),
            ("window_updates", |_| frame(raw::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(5000)),
            ("own_resets", |nth| frame(raw::HEADERS, raw::END_HEADERS, 2 * nth + 1, &[0x83])),
            ("empty_data", |nth| {
                let open = frame(raw::HEADERS, raw::END_HEADERS, 1, &raw::block(WATCH));
                [if nth == 0 { open } else { Vec::new() }, frame(raw::DATA, 0, 1, &[]).repeat(1000)].concat()
            }),
        ];
        for (name, next) in floods {
            let before = counted(server, name);
            assert_eq!(Raw::handshake(server.address()).flood(next), raw::ENHANCE_YOUR_CALM, "{name}");
            assert_eq!(counted(server, name), before + 1, "{name}");
        }
    });
}

/// FAULT-46.
#[test]
fn an_endless_header_block_ends_the_connection_with_enhance_your_calm() {
    check_bounded(&[], 20 * MEBIBYTE, |server| {
        let piece = vec![0; 10_000];
        for piece in [&piece[..], &[]] {
            let next = |nth| frame(if nth == 0 { raw::HEADERS } else { raw::CONTINUATION }, 0, 1, piece);
            assert_eq!(Raw::handshake(server.address()).flood(next), raw::ENHANCE_YOUR_CALM);
        }
        assert_eq!(counted(server, "continuation"), 2);
    });
}

#[test]
fn a_header_list_that_is_too_long_is_refused() {
    check_bounded(&[], 20 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        let mut block = raw::block(RANGE);
        // One entry of the table, and then its index again and again: a byte each, and four thousand bytes when it is decoded.
        block.extend([&b"\x40\x01a\x7f\xa1\x1e"[..], &[b'x'; 4000]].concat());
        block.extend([0xbe; 1000]);
        raw.send(&frame(raw::HEADERS, raw::END_HEADERS | raw::END_STREAM, 1, &block)).unwrap();
        let answer = raw.wait_for(raw::HEADERS).unwrap();
        assert_eq!(answer.flags & raw::END_STREAM, raw::END_STREAM);
        raw.send(&call(3, RANGE, &[])).unwrap();
        assert_eq!(raw.wait_for(raw::HEADERS).unwrap().stream, 3, "the connection stays usable");
        assert_eq!(counted(server, "header_list"), 1);
    });
}

/// The limit holds for HTTP/1.1, too.
#[test]
fn the_limit_of_the_header_list_can_be_set() {
    let lengths = |server: &Server, length: usize| {
        let field = format!("X-Long: {}\r\n", "x".repeat(length));
        let http1 = http(server.address(), "GET", "/version", &field, b"").status;
        let mut raw = Raw::handshake(server.address());
        let length = u16::try_from(length - 127).unwrap();
        let [low, high] = [length.to_le_bytes()[0] & 0x7f | 0x80, u8::try_from(length >> 7).unwrap()];
        assert!(high < 128);
        let field =
            [&b"\x00\x06x-long\x7f"[..], &[low, high], "x".repeat(usize::from(length) + 127).as_bytes()].concat();
        let block = [raw::block(RANGE), field].concat();
        let range = framed(&RangeRequest { key: "a".into(), ..RangeRequest::default() }.encode_to_vec());
        let [headers, data] =
            [frame(raw::HEADERS, raw::END_HEADERS, 1, &block), frame(raw::DATA, raw::END_STREAM, 1, &range)];
        raw.send(&[headers, data].concat()).unwrap();
        (http1, raw.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM == 0)
    };
    let (little, usual) = (Server::start(&["--max-header-list-bytes=8192"]), Server::start(&[]));
    assert_eq!((lengths(&little, 6000), lengths(&little, 10_000)), ((200, true), (431, false)));
    assert_eq!(lengths(&usual, 10_000), (200, true));
    assert_eq!(counted(&little, "header_list"), 1);
}

/// Calls with large responses from a client that never reads them.
#[test]
fn unread_responses_do_not_accumulate() {
    check_bounded(&["--max-connection-bytes=33554432"], 150 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        raw.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
        let put = PutRequest { key: "large".into(), value: vec![b'x'; 1_000_000].into(), ..PutRequest::default() }
            .encode_to_vec();
        let mut bytes = frame(raw::HEADERS, raw::END_HEADERS, 1, &raw::block(PUT));
        let put = framed(&put);
        let mut chunks = put.chunks(16_384).peekable();
        while let Some(chunk) = chunks.next() {
            bytes.extend(frame(raw::DATA, if chunks.peek().is_none() { raw::END_STREAM } else { 0 }, 1, chunk));
        }
        // The window is wide enough for the message once its prefix has arrived: wait for that after the first frame.
        let (first, rest) = bytes.split_at(9 + raw::block(PUT).len() + 9 + 16_384);
        raw.send(first).unwrap();
        while raw.wait_for(raw::WINDOW_UPDATE).unwrap().stream != 1 {}
        raw.send(rest).unwrap();
        raw.wait_for(raw::HEADERS).unwrap();
        let range = RangeRequest { key: "large".into(), ..RangeRequest::default() }.encode_to_vec();
        for nth in 1..1000 {
            raw.send(&call(2 * nth + 1, RANGE, &range)).unwrap();
        }
        assert_healthy(server);
        // When the client opens the window at last, it gets what was waiting.
        raw.send(&frame(raw::WINDOW_UPDATE, 0, 3, &1_500_000_u32.to_be_bytes())).unwrap();
        raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &1_500_000_u32.to_be_bytes())).unwrap();
        let mut received = 0;
        while received < 1_000_000 {
            let data = raw.wait_for(raw::DATA).unwrap();
            assert_eq!(data.stream, 3);
            received += data.payload.len();
        }
    });
}

pub fn put(server: &Server, key: &str, bytes: usize) {
    let value = vec![b'x'; bytes].into();
    let put = PutRequest { key: key.to_owned().into(), value, ..PutRequest::default() }.encode_to_vec();
    let mut raw = Raw::handshake(server.address());
    let mut frames = frame(raw::HEADERS, raw::END_HEADERS, 1, &raw::block(PUT));
    for chunk in framed(&put).chunks(16_384) {
        frames.extend(frame(raw::DATA, 0, 1, chunk));
    }
    raw.send(&frames).unwrap();
    raw.send(&frame(raw::DATA, raw::END_STREAM, 1, &[])).unwrap();
    raw.wait_for(raw::DATA).unwrap();
}

/// HTTP responses whose windows never open.
#[test]
fn unread_http_responses_do_not_accumulate() {
    check_bounded(&["--max-connection-bytes=33554432"], 100 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        raw.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
        let page = [&[0x82, 0x86, 0x04, 8][..], b"/metrics"].concat();
        let flags = raw::END_HEADERS | raw::END_STREAM;
        let asked: Vec<u8> = (0..20_000).flat_map(|nth| frame(raw::HEADERS, flags, 2 * nth + 1, &page)).collect();
        let mut writer = raw.clone_handle();
        let writing = std::thread::spawn(move || writer.send(&asked));
        let mut refused = 0;
        while refused < 10_000 {
            refused += u64::from(raw.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM != 0);
        }
        writing.join().unwrap().unwrap();
        assert!(counted(server, "held_bytes") >= refused);
    });
}

/// A client that holds most of what all clients may hold is refused, and no other client.
#[test]
fn only_the_largest_holders_are_refused() {
    check_bounded(&["--max-held-bytes=8388608"], 60 * MEBIBYTE, |server| {
        put(server, "large", 100_000);
        let range = RangeRequest { key: "large".into(), ..RangeRequest::default() }.encode_to_vec();
        let mut large_holders: Vec<_> = (0..4).map(|_| Raw::handshake(server.address())).collect();
        for raw in &mut large_holders {
            raw.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
            for nth in 0..200 {
                raw.send(&call(2 * nth + 1, RANGE, &range)).unwrap();
            }
        }
        for raw in &mut large_holders {
            let refused = (0..200).filter(|_| raw.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM != 0).count();
            assert!(refused > 100, "{refused} were refused");
            assert_healthy(server);
        }
        assert!(counted(server, "held_bytes") > 400);
    });
}

/// A client that sends requests and never reads its socket.
#[test]
fn an_unread_socket_uses_bounded_memory() {
    check_bounded(&[], 80 * MEBIBYTE, |server| {
        put(server, "large", 100_000);
        let range = RangeRequest { key: "large".into(), ..RangeRequest::default() }.encode_to_vec();
        let mut raw = Raw::handshake(server.address());
        raw.send(&setting(raw::INITIAL_WINDOW, 1 << 30)).unwrap();
        raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes())).unwrap();
        for nth in 0..2000 {
            raw.send(&call(2 * nth + 1, RANGE, &range)).unwrap();
        }
        for _ in 0..5 {
            assert_healthy(server);
        }
        // Nothing was lost.
        let ended = |frame: &raw::Frame| frame.flags & raw::END_STREAM != 0;
        assert_eq!((0..4000).filter(|_| ended(&raw.wait_for(raw::HEADERS).unwrap())).count(), 2000);
    });
}

#[test]
fn a_window_that_opens_byte_by_byte_ends_the_connection_with_enhance_your_calm() {
    check_bounded(&[], 20 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        raw.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
        let put =
            PutRequest { key: "k".into(), value: vec![b'x'; 10_000].into(), ..PutRequest::default() }.encode_to_vec();
        raw.send(&call(1, PUT, &put)).unwrap();
        raw.wait_for(raw::HEADERS).unwrap();
        let range = RangeRequest { key: "k".into(), ..RangeRequest::default() }.encode_to_vec();
        raw.send(&call(3, RANGE, &range)).unwrap();
        raw.wait_for(raw::HEADERS).unwrap();
        let code = raw.flood(|_| frame(raw::WINDOW_UPDATE, 0, 3, &[0, 0, 0, 1]));
        // Either limit may be reached first: if the client is fast, a window is wider than one byte when the stream gets its
        // turn.
        let reasons = counted(server, "tiny_window_updates") + counted(server, "window_updates");
        assert_eq!((code, reasons), (raw::ENHANCE_YOUR_CALM, 1));
    });
}

#[test]
fn incomplete_requests_do_not_accumulate() {
    check_bounded(&["--max-connection-bytes=4194304"], 40 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        let part = &framed(&[b'x'; 16_000])[..15_000];
        let mut refused = 0;
        for nth in 0..2000 {
            raw.send(&frame(raw::HEADERS, raw::END_HEADERS, 2 * nth + 1, &raw::block(PUT))).unwrap();
            raw.send(&frame(raw::DATA, 0, 2 * nth + 1, part)).unwrap();
            if nth > 300 {
                refused += u32::from(raw.wait_for(raw::HEADERS).is_some());
            }
        }
        assert!(refused > 1500, "{refused} were refused");
        assert!(counted(server, "held_bytes") >= u64::from(refused));
    });
}

#[test]
fn concurrent_streams_are_limited() {
    check_bounded(&["--max-concurrent-streams=10"], 20 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        for nth in 0..11 {
            raw.send(&frame(raw::HEADERS, raw::END_HEADERS, 2 * nth + 1, &raw::block(WATCH))).unwrap();
        }
        let reset = raw.wait_for(raw::RST_STREAM).unwrap();
        assert_eq!((reset.stream, &reset.payload[..]), (21, &[0, 0, 0, 7][..]));
        assert_eq!(counted(server, "streams"), 1);
    });
}

/// As in etcd.
#[test]
fn a_stream_limit_of_zero_means_no_limit() {
    check_bounded(&["--max-concurrent-streams=0"], 20 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        raw.send(&call(1, RANGE, &[])).unwrap();
        assert_eq!(raw.wait_for(raw::HEADERS).unwrap().stream, 1);
        assert_eq!(counted(server, "streams"), 0);
    });
}

#[test]
fn connections_are_limited() {
    check_memory(&["--max-connections=20"], 20 * MEBIBYTE, |server| {
        let mut healthy = Raw::handshake(server.address());
        let mut open: Vec<_> = (0..19).map(|_| Raw::handshake(server.address())).collect();
        for raw in &mut open {
            raw.wait_for(raw::SETTINGS).unwrap();
        }
        let mut late = Raw::handshake(server.address());
        server.wait_for_log("too many client connections; new ones wait until others end");
        healthy
            .send(&call(1, RANGE, &RangeRequest { key: "k".into(), ..RangeRequest::default() }.encode_to_vec()))
            .unwrap();
        healthy.wait_for(raw::DATA).expect("an open connection is still served");
        open.pop();
        late.wait_for(raw::SETTINGS).expect("a waiting connection is accepted");
        drop((open, late));
        assert!(counted(server, "connections") >= 1);
    });
}

/// One client opens no window, the other opens all windows and never reads its socket.
#[test]
fn clients_that_read_nothing_are_disconnected() {
    check_bounded(&["--client-read-timeout=1s"], 60 * MEBIBYTE, |server| {
        put(server, "large", 1_000_000);
        let range = RangeRequest { key: "large".into(), ..RangeRequest::default() }.encode_to_vec();
        let mut closed_window = Raw::handshake(server.address());
        closed_window.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
        let mut unread_socket = Raw::handshake(server.address());
        unread_socket.send(&setting(raw::INITIAL_WINDOW, 0x7fff_ffff)).unwrap();
        unread_socket.send(&frame(raw::WINDOW_UPDATE, 0, 0, &0x7000_0000_u32.to_be_bytes())).unwrap();
        for nth in 0..30 {
            for raw in [&mut closed_window, &mut unread_socket] {
                raw.send(&call(2 * nth + 1, RANGE, &range)).unwrap();
            }
        }
        eventually("both are disconnected", time_limit(), || counted(server, "slow_reader") >= 2);
        for raw in [&mut closed_window, &mut unread_socket] {
            while raw.next().is_some() {} // Until the connection is closed.
        }
    });
}

/// It is counted once, as what it is.
#[test]
fn an_http1_client_that_reads_nothing_is_disconnected() {
    check_bounded(&["--client-read-timeout=1s"], 60 * MEBIBYTE, |server| {
        let mut unread = Raw::connect(server.address());
        unread.send("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n".repeat(2000).as_bytes()).unwrap();
        eventually("it is disconnected", time_limit(), || counted(server, "slow_reader") >= 1);
        assert_eq!(counted(server, "slow_beginning"), 0);
    });
}

/// FAULT-47.
#[test]
fn clients_that_are_slow_to_begin_are_disconnected() {
    check_bounded(&["--client-begin-timeout=2s"], 20 * MEBIBYTE, |server| {
        let mut silent = Raw::connect(server.address());
        let mut slow = Raw::connect(server.address());
        slow.send(b"PRI * HTTP/2.0").unwrap();
        let mut stuck = Raw::handshake(server.address());
        stuck.send(&frame(raw::HEADERS, 0, 1, &raw::block(RANGE))).unwrap();
        let mut unsettled = Raw::connect(server.address());
        unsettled.send(raw::PREFACE).unwrap();
        let mut byte_by_byte = Raw::handshake(server.address());
        byte_by_byte.wait_for(raw::SETTINGS).unwrap();
        while byte_by_byte.wait_for(raw::SETTINGS).unwrap().flags == 0 {} // Until the client's settings are acknowledged.
        byte_by_byte.send_slowly(&frame(raw::HEADERS, raw::END_HEADERS, 1, &[0x83; 1000]));
        for mut late in [unsettled, byte_by_byte] {
            assert_eq!(late.wait_for(raw::GOAWAY).unwrap().payload[7], 11);
        }
        assert_eq!(silent.next(), None);
        let goaway = slow.wait_for(raw::GOAWAY).unwrap();
        assert_eq!(goaway.payload[7], 11);
        assert_eq!(stuck.wait_for(raw::GOAWAY).unwrap().payload[7], 11);
        assert_eq!(stuck.next(), None);
        assert_eq!(counted(server, "slow_beginning"), 5);
    });
}

/// An HTTP/1.1 request head that does not end.
#[test]
fn clients_with_a_slow_first_http1_request_are_disconnected() {
    check_bounded(&["--client-begin-timeout=2s"], 20 * MEBIBYTE, |server| {
        let mut byte_by_byte = Raw::connect(server.address());
        let mut stuck = Raw::connect(server.address());
        stuck.send(b"GET /version HTTP/1.1\r\nX-a: ").unwrap();
        byte_by_byte.send_slowly(format!("GET /version HTTP/1.1\r\n{}", "X-a: b\r\n".repeat(1000)).as_bytes());
        for mut late in [stuck, byte_by_byte] {
            while late.next().is_some() {} // Until the connection is closed.
        }
        assert_eq!(counted(server, "slow_beginning"), 2);
    });
}

/// The backlog of one connection does not delay another connection.
#[test]
fn a_backlog_delays_only_its_own_connection() {
    check_bounded(&[], 100 * MEBIBYTE, |server| {
        let mut raw = Raw::handshake(server.address());
        let range = RangeRequest { key: "a".into(), ..RangeRequest::default() }.encode_to_vec();
        let mut bytes = Vec::new();
        for nth in 0..20_000 {
            bytes.extend(call(2 * nth + 1, RANGE, &range));
        }
        let mut writer = raw.clone_handle();
        let writing = std::thread::spawn(move || writer.send(&bytes));
        for _ in 0..20 {
            assert_healthy(server);
        }
        for _ in 0..20_000 {
            raw.wait_for(raw::DATA).unwrap();
            if raw.needs_window_update() {
                raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &1_000_000_u32.to_be_bytes())).unwrap();
            }
        }
        writing.join().unwrap().unwrap();
    });
}
