//! Floods of expensive requests: what they make the server hold is bounded, and a healthy client is served beside them. Its requests
//! cover what must never wait for a flood: writes (so raft and the log), reads, keep-alives of a short lease, alarms, and the health
//! page. The latencies are printed, beside the flood and without it; what is asserted leaves room for a machine that does other
//! things.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{
    AlarmRequest, AuthEnableRequest, AuthRoleAddRequest, AuthUserAddRequest, AuthUserGrantRoleRequest,
    AuthenticateRequest, AuthenticateResponse, HashKvRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    LeaseKeepAliveResponse, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest,
    request_op, watch_request::RequestUnion,
};
use prost::Message;

use crate::{
    floods::{peak_bytes, put, reset_peak},
    raw::{self, Raw, call, frame, framed, setting},
    support::{Server, scaled},
};

const RANGE: &str = "/etcdserverpb.KV/Range";
const PUT: &str = "/etcdserverpb.KV/Put";
const TXN: &str = "/etcdserverpb.KV/Txn";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const LEASE_GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const LEASE_KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
const ALARM: &str = "/etcdserverpb.Maintenance/Alarm";
const HASH_KV: &str = "/etcdserverpb.Maintenance/HashKV";
const AUTHENTICATE: &str = "/etcdserverpb.Auth/Authenticate";

const MEBIBYTE: usize = 1 << 20;
/// The clients of a flood, and how many calls each of them has under way.
const FLOODING: usize = 4;
const AT_ONCE: u32 = 8;
/// How long the healthy client is measured at least, if that is long enough for [`MIN_REQUESTS`].
const MEASURED: Duration = Duration::from_secs(4);
const MIN_REQUESTS: usize = 200;
/// The healthy client's p99 beside a flood must be below this.
const MAX_P99: Duration = Duration::from_secs(2);
/// The healthy client renews its lease much more often; it is lost only if renewals are not served.
const LEASE_SECONDS: i64 = 10;
const KEEP_ALIVE_STREAM: u32 = 1;

/// A client that makes cheap requests, one after another.
struct Healthy<'a> {
    server: &'a Server,
    raw: Raw,
    next_stream: u32,
    /// An additional header field of all calls.
    field: Vec<u8>,
    lease: i64,
    latencies: Vec<Duration>,
}

impl<'a> Healthy<'a> {
    fn connect(server: &'a Server, token: &str, lease: i64) -> Self {
        let field = header_field("token", token);
        let mut raw = open_wide(server);
        let open = [raw::block(LEASE_KEEP_ALIVE), field.clone()].concat();
        raw.send(&frame(raw::HEADERS, raw::END_HEADERS, KEEP_ALIVE_STREAM, &open)).unwrap();
        let mut client = Self { server, raw, next_stream: 3, field, lease, latencies: Vec::new() };
        client.unary(LEASE_GRANT, &LeaseGrantRequest { id: lease, ttl: LEASE_SECONDS });
        client
    }

    /// The message that a call is answered with; it must be.
    fn unary(&mut self, path: &str, message: &impl Message) -> Vec<u8> {
        let stream = self.next_stream;
        self.next_stream += 2;
        let block = [raw::block(path), self.field.clone()].concat();
        let message = framed(&message.encode_to_vec());
        let headers = frame(raw::HEADERS, raw::END_HEADERS, stream, &block);
        self.raw.send(&[headers, frame(raw::DATA, raw::END_STREAM, stream, &message)].concat()).unwrap();
        let mut data = Vec::new();
        loop {
            let frame = self.raw.next().expect("the connection stays open");
            if frame.stream == stream && frame.kind == raw::DATA {
                data.extend(frame.payload);
            } else if frame.stream == stream && frame.flags & raw::END_STREAM != 0 {
                break;
            }
        }
        assert!(!data.is_empty(), "{path} is refused");
        data.split_off(5)
    }

    fn keep_alive(&mut self) {
        let renew = framed(&LeaseKeepAliveRequest { id: self.lease }.encode_to_vec());
        self.raw.send(&frame(raw::DATA, 0, KEEP_ALIVE_STREAM, &renew)).unwrap();
        let answer = loop {
            let data = self.raw.wait_for(raw::DATA).expect("the connection stays open");
            if data.stream == KEEP_ALIVE_STREAM {
                break LeaseKeepAliveResponse::decode(&data.payload[5..]).unwrap();
            }
        };
        assert!(answer.ttl > 0, "the lease is lost");
    }

    fn measure(&mut self, request: impl FnOnce(&mut Self)) {
        let started = Instant::now();
        request(self);
        self.latencies.push(started.elapsed());
    }

    /// One round of requests.
    fn round(&mut self, nth: usize) {
        self.measure(|client| _ = client.unary(PUT, &PutRequest { key: "h".into(), ..PutRequest::default() }));
        self.measure(|client| _ = client.unary(RANGE, &RangeRequest { key: "h".into(), ..RangeRequest::default() }));
        if nth.is_multiple_of(5) {
            self.measure(Self::keep_alive);
            self.measure(|client| _ = client.unary(ALARM, &AlarmRequest::default()));
        }
        if nth.is_multiple_of(20) {
            self.measure(|client| {
                let page = client.server.http("GET", "/health");
                assert_eq!((page.status, page.body.as_str()), (200, r#"{"health":"true","reason":""}"#));
            });
        }
    }

    /// Makes requests for a while, and until it `is_enough`; their p99.
    fn p99(&mut self, is_enough: impl Fn() -> bool) -> Duration {
        self.latencies.clear();
        let started = Instant::now();
        let mut nth = 0;
        while started.elapsed() < MEASURED || self.latencies.len() < MIN_REQUESTS || !is_enough() {
            self.round(nth);
            nth += 1;
        }
        self.latencies.sort();
        self.latencies[self.latencies.len() * 99 / 100]
    }
}

/// A connection with wide windows.
fn open_wide(server: &Server) -> Raw {
    let mut raw = Raw::handshake(server.address());
    raw.send(&setting(raw::INITIAL_WINDOW, 1 << 30)).unwrap();
    raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes())).unwrap();
    raw
}

/// A header field that is in no table.
fn header_field(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u8::try_from(text.len()).ok().filter(|length| *length < 127).unwrap();
    [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
}

/// Ends the flood when it is dropped, also because of a failed assertion.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asserts that the healthy client is served beside a flood, and that the server never grows by more than `may_grow` meanwhile.
/// The flood ends when it is told so.
fn check(what: &str, server: &Server, token: &str, may_grow: usize, flood: impl Fn(&AtomicBool) + Sync) {
    check_until(|| true, what, server, token, may_grow, flood);
}

/// The same, at least until it `is_enough`.
fn check_until(
    is_enough: impl Fn() -> bool,
    what: &str,
    server: &Server,
    token: &str,
    may_grow: usize,
    flood: impl Fn(&AtomicBool) + Sync,
) {
    let mut healthy = Healthy::connect(server, token, 1);
    let quiet = healthy.p99(|| true);
    reset_peak(server);
    let before = peak_bytes(server);
    let is_over = AtomicBool::new(false);
    let beside = thread::scope(|scope| {
        let ends = Ends(&is_over);
        let flooding = scope.spawn(|| flood(&is_over));
        let beside = healthy.p99(is_enough);
        healthy.keep_alive();
        assert!(!flooding.is_finished(), "the flood ended before it was told to");
        drop(ends);
        beside
    });
    let grown = peak_bytes(server).saturating_sub(before);
    let factor = beside.as_secs_f64() / quiet.as_secs_f64();
    eprintln!("{what}: p99 {quiet:?} quiet, {beside:?} beside it ({factor:.1}×); {} MiB more", grown / MEBIBYTE);
    assert!(grown <= may_grow, "{what}: {} MiB more than before", grown / MEBIBYTE);
    assert!(beside < scaled(MAX_P99), "{what}: p99 {beside:?}");
}

/// Several connections that make `message` over and over, [`AT_ONCE`] at a time, and read the answers.
fn repeat(server: &Server, is_over: &AtomicBool, path: &str, message: impl Fn(usize, u32) -> Vec<u8> + Sync) {
    thread::scope(|scope| {
        for client in 0..FLOODING {
            let message = &message;
            scope.spawn(move || {
                let mut raw = open_wide(server);
                raw.wait_patiently();
                let mut nth = 0;
                while !is_over.load(Ordering::Relaxed) {
                    for _ in 0..AT_ONCE {
                        raw.send(&call(2 * nth + 1, path, &message(client, nth))).unwrap();
                        nth += 1;
                    }
                    let (mut ended, mut received) = (0, 0);
                    while ended < AT_ONCE {
                        let frame = raw.next().expect("the connection stays open");
                        received += if frame.kind == raw::DATA { frame.payload.len() } else { 0 };
                        ended += u32::from(frame.kind == raw::HEADERS && frame.flags & raw::END_STREAM != 0);
                    }
                    if received > 0 {
                        let received = u32::try_from(received).unwrap();
                        raw.send(&frame(raw::WINDOW_UPDATE, 0, 0, &received.to_be_bytes())).unwrap();
                    }
                }
            });
        }
    });
}

fn put_large(server: &Server, keys: usize) {
    for nth in 0..keys {
        put(server, &format!("large{nth:03}"), 100_000);
    }
}

/// A Range of all large keys.
fn everything() -> RangeRequest {
    RangeRequest { key: "large".into(), range_end: "largf".into(), ..RangeRequest::default() }
}

fn flood_ranges(server: &Server, is_over: &AtomicBool) {
    let range = everything().encode_to_vec();
    repeat(server, is_over, RANGE, |_, _| range.clone());
}

/// Transactions of as many operations as are allowed.
fn flood_txns(server: &Server, is_over: &AtomicBool) {
    repeat(server, is_over, TXN, |client, _| {
        let put = |nth| PutRequest {
            key: format!("t{client}{nth:03}").into(),
            value: "x".repeat(60).into(),
            ..PutRequest::default()
        };
        let op = |nth| RequestOp { request: Some(request_op::Request::RequestPut(put(nth))) };
        TxnRequest { success: (0..128).map(op).collect(), ..TxnRequest::default() }.encode_to_vec()
    });
}

fn flood_hashes(server: &Server, is_over: &AtomicBool) {
    repeat(server, is_over, HASH_KV, |_, _| HashKvRequest::default().encode_to_vec());
}

/// Logins with passwords that are all wrong, and all different.
fn flood_logins(server: &Server, is_over: &AtomicBool) {
    repeat(server, is_over, AUTHENTICATE, |client, nth| {
        let password = format!("wrong {client} {nth}");
        AuthenticateRequest { name: "root".into(), password }.encode_to_vec()
    });
}

/// Calls that are reset at once, on one connection after another.
fn flood_resets(server: &Server, is_over: &AtomicBool) {
    while !is_over.load(Ordering::Relaxed) {
        let code = Raw::handshake(server.address()).flood(|nth| {
            let mut bytes = call(2 * nth + 1, WATCH, b"");
            bytes.extend(frame(raw::RST_STREAM, 0, 2 * nth + 1, &[0, 0, 0, 8]));
            bytes
        });
        assert_eq!(code, raw::ENHANCE_YOUR_CALM);
    }
}

fn watch(key: &str, range_end: &str) -> Vec<u8> {
    let create = WatchCreateRequest {
        key: key.to_owned().into(),
        range_end: range_end.to_owned().into(),
        ..WatchCreateRequest::default()
    };
    framed(&WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }.encode_to_vec())
}

/// Opens a watch stream that reads nothing, while large values are written that it watches.
fn flood_slow_watcher(server: &Server, is_over: &AtomicBool) {
    let mut slow = Raw::handshake(server.address());
    slow.send(&setting(raw::INITIAL_WINDOW, 0)).unwrap();
    slow.send(&frame(raw::HEADERS, raw::END_HEADERS, 1, &raw::block(WATCH))).unwrap();
    slow.send(&frame(raw::DATA, 0, 1, &watch("large", "largf"))).unwrap();
    let mut nth = 0;
    while !is_over.load(Ordering::Relaxed) {
        put(server, &format!("large{:03}", nth % 20), 100_000);
        nth += 1;
    }
}

/// What connections may hold is small here, so that the bounds show.
const LITTLE: [&str; 2] = ["--max-connection-bytes=33554432", "--max-held-bytes=67108864"];

#[test]
fn a_flood_of_large_ranges_delays_no_cheap_request() {
    let server = Server::start(&LITTLE);
    put_large(&server, 50);
    check("large ranges", &server, "", 180 * MEBIBYTE, |is_over| flood_ranges(&server, is_over));
}

#[test]
fn a_flood_of_large_transactions_delays_no_cheap_request() {
    let server = Server::start(&LITTLE);
    check("large transactions", &server, "", 250 * MEBIBYTE, |is_over| flood_txns(&server, is_over));
}

#[test]
fn a_flood_of_hashes_delays_no_cheap_request() {
    let server = Server::start(&LITTLE);
    put_large(&server, 100);
    check("hashes", &server, "", 80 * MEBIBYTE, |is_over| flood_hashes(&server, is_over));
    let refused = refused(&server, "hashes");
    assert!(refused > 0, "a few wait, and more are refused");
}

fn refused(server: &Server, reason: &str) -> u64 {
    let metrics = server.http("GET", "/metrics").body;
    let name = format!("metastore_http2_refused_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

#[test]
fn a_flood_of_logins_delays_no_cheap_request() {
    let server = Server::start(&["--max-waiting-logins=16"]);
    let token = {
        let mut client = Healthy::connect(&server, "", 2);
        let (name, role) = (|| "root".to_owned(), || "root".to_owned());
        let user = AuthUserAddRequest { name: name(), password: "right".into(), ..AuthUserAddRequest::default() };
        client.unary("/etcdserverpb.Auth/UserAdd", &user);
        client.unary("/etcdserverpb.Auth/RoleAdd", &AuthRoleAddRequest { name: role() });
        client.unary("/etcdserverpb.Auth/UserGrantRole", &AuthUserGrantRoleRequest { user: name(), role: role() });
        client.unary("/etcdserverpb.Auth/AuthEnable", &AuthEnableRequest {});
        let login = AuthenticateRequest { name: name(), password: "right".into() };
        let answer = client.unary(AUTHENTICATE, &login);
        AuthenticateResponse::decode(&*answer).unwrap().token
    };
    check("logins", &server, &token, 50 * MEBIBYTE, |is_over| flood_logins(&server, is_over));
    assert!(refused(&server, "logins") > 0, "a few wait, and more are refused");
}

#[test]
fn a_flood_of_resets_delays_no_cheap_request() {
    let server = Server::start(&[]);
    check("rapid resets", &server, "", 50 * MEBIBYTE, |is_over| flood_resets(&server, is_over));
}

#[test]
fn a_slow_watcher_delays_no_cheap_request() {
    let server = Server::start(&[]);
    check("a slow watcher", &server, "", 120 * MEBIBYTE, |is_over| flood_slow_watcher(&server, is_over));
}

#[test]
fn all_floods_at_once_delay_no_cheap_request() {
    let server = Server::start(&LITTLE);
    put_large(&server, 20);
    check("all of them", &server, "", 400 * MEBIBYTE, |is_over| {
        thread::scope(|scope| {
            for flood in [flood_ranges, flood_txns, flood_hashes, flood_resets, flood_slow_watcher] {
                let server = &server;
                scope.spawn(move || flood(server, is_over));
            }
        });
    });
}

/// FAULT-47: 10,000 watches on a stream, and 100,000 leases.
#[test]
fn many_watches_and_leases_delay_no_cheap_request_and_take_little_memory() {
    const WATCHES: usize = 10_000;
    const LEASES: u32 = 100_000;
    let server = Server::start(&[]);
    let is_set_up = AtomicBool::new(false);
    let is_enough = || is_set_up.load(Ordering::Relaxed);
    let what = "10,000 watches on a stream, and 100,000 leases";
    check_until(is_enough, what, &server, "", 150 * MEBIBYTE, |is_over| {
        let mut watching = open_wide(&server);
        watching.send(&frame(raw::HEADERS, raw::END_HEADERS, 1, &raw::block(WATCH))).unwrap();
        let (mut created, mut data) = (0, Vec::new());
        for first in (0..WATCHES).step_by(100) {
            let creates = (first..first + 100).flat_map(|nth| frame(raw::DATA, 0, 1, &watch(&format!("w{nth}"), "")));
            watching.send(&creates.collect::<Vec<_>>()).unwrap();
            while created < first + 100 {
                data.extend(watching.wait_for(raw::DATA).unwrap().payload);
                created += take_messages(&mut data);
            }
        }
        let mut granting = Raw::handshake(server.address());
        for nth in 0..LEASES {
            // With no more under way than are answered soon: this is no flood, but what many clients have.
            if nth >= 100 {
                while granting.wait_for(raw::HEADERS).unwrap().flags & raw::END_STREAM == 0 {}
            }
            let grant = LeaseGrantRequest { id: i64::from(nth) + 1000, ttl: 3600 }.encode_to_vec();
            granting.send(&call(2 * nth + 1, LEASE_GRANT, &grant)).unwrap();
            if granting.needs_window_update() {
                granting.send(&frame(raw::WINDOW_UPDATE, 0, 0, &1_000_000_u32.to_be_bytes())).unwrap();
            }
        }
        is_set_up.store(true, Ordering::Relaxed);
        while !is_over.load(Ordering::Relaxed) {
            put(&server, "w1", 10);
        }
    });
}

/// Takes all complete messages out of received data; how many there are.
fn take_messages(data: &mut Vec<u8>) -> usize {
    let (mut rest, mut count) = (&data[..], 0);
    while let Some((prefix, message)) = rest.split_first_chunk::<5>() {
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        let Some(next) = message.get(length..) else { break };
        (rest, count) = (next, count + 1);
    }
    *data = rest.to_vec();
    count
}
