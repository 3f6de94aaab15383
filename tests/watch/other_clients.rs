//! The effects of a misbehaving watch client on the other clients of a real server: how long they wait, how much memory the
//! server uses, and whether it still stops in time.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchProgressRequest,
    WatchRequest, WatchResponse, kv_client::KvClient, request_op, watch_client::WatchClient,
    watch_request::RequestUnion,
};
use rustix::process::Signal;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::{
    expensive::{hostile_order, key},
    support::{Server, eventually_async, scaled, time_limit},
    world::{between, from, on, owned},
};

/// The longest stall that other clients should see. It is reported; the tests fail at ten times as much, because other tests use
/// the same processors.
const WORST_STALL: Duration = Duration::from_millis(20);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A watch stream.
struct Stream {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Stream {
    /// Opens a stream with its first watch.
    async fn open(channel: Channel, create: WatchCreateRequest) -> Self {
        let (requests, outgoing) = mpsc::channel(1024);
        requests.send(request(RequestUnion::CreateRequest(create))).await.unwrap();
        let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
        let responses = client.watch(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        let mut stream = Self { requests, responses };
        assert!(stream.next().await.created);
        stream
    }

    async fn next(&mut self) -> WatchResponse {
        self.responses.message().await.unwrap().expect("the stream goes on")
    }

    /// Creates watches and waits for the responses to all of them; returns the reasons of refusals.
    async fn create_all(&mut self, creates: impl Iterator<Item = WatchCreateRequest>) -> Vec<String> {
        let creates: Vec<_> = creates.collect();
        let (count, requests) = (creates.len(), self.requests.clone());
        tokio::spawn(async move {
            for create in creates {
                requests.send(request(RequestUnion::CreateRequest(create))).await.unwrap();
            }
        });
        let mut refusals = Vec::new();
        for _ in 0..count {
            let answer = self.next().await;
            assert!(answer.created);
            if answer.canceled {
                refusals.push(answer.cancel_reason);
            }
        }
        refusals
    }
}

fn request(request: RequestUnion) -> WatchRequest {
    WatchRequest { request_union: Some(request) }
}

/// The first watch of a stream that will have many.
fn first() -> WatchCreateRequest {
    on("first")
}

async fn put(kv: &mut KvClient<Channel>, key: &str, value: &str) {
    kv.put(PutRequest { key: owned(key), value: owned(value), ..PutRequest::default() }).await.unwrap();
}

/// Puts `count` keys.
async fn fill(kv: &mut KvClient<Channel>, count: usize) {
    for first in (0..count).step_by(100) {
        let puts = (first..first + 100).map(|nth| {
            let put = PutRequest { key: owned(&key(nth)), value: owned("value"), ..PutRequest::default() };
            RequestOp { request: Some(request_op::Request::RequestPut(put)) }
        });
        kv.txn(TxnRequest { success: puts.collect(), ..TxnRequest::default() }).await.unwrap();
    }
}

/// Sends small reads one after another on a connection of its own while `attack` runs; returns the duration of the slowest.
fn probe(server: &Server, attack: impl AsyncFnOnce(&Server)) -> Duration {
    let finished = Arc::new(AtomicBool::new(false));
    let (url, is_finished) = (server.url(), finished.clone());
    let prober = std::thread::spawn(move || {
        runtime().block_on(async {
            let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
            let (mut kv, mut worst) = (KvClient::new(channel), Duration::ZERO);
            let range = RangeRequest { key: owned("first"), serializable: true, ..RangeRequest::default() };
            while !is_finished.load(Ordering::Relaxed) {
                let start = Instant::now();
                kv.range(range.clone()).await.unwrap();
                worst = worst.max(start.elapsed());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            worst
        })
    });
    runtime().block_on(attack(server));
    finished.store(true, Ordering::Relaxed);
    prober.join().unwrap()
}

fn assert_short(what: &str, worst: Duration) {
    println!("worst read during {what}: {worst:?} (goal: {WORST_STALL:?})");
    assert!(worst < scaled(WORST_STALL * 10), "{what} delays other clients by {worst:?}");
}

#[test]
fn other_clients_are_served_while_watches_are_created_and_removed_in_a_hostile_order() {
    let server = Server::start(&["--api-threads=1"]);
    let worst = probe(&server, async |server| {
        let mut stream = Stream::open(server.channel().await, first()).await;
        let creates = hostile_order(20_000).into_iter().map(|nth| between(&key(nth), &key(nth + 1)));
        assert!(stream.create_all(creates).await.is_empty());
        drop(stream);
        wait_for_metric(server, "etcd_debugging_mvcc_watcher_total", 0.0).await;
    });
    assert_short("creating and removing 20,000 ranges in a hostile order", worst);
}

#[test]
fn other_clients_are_served_while_a_deletion_reaches_many_watches() {
    let server = Server::start(&["--api-threads=1"]);
    runtime().block_on(async { fill(&mut server.kv().await, 10_000).await });
    let worst = probe(&server, async |server| {
        let mut stream = Stream::open(server.channel().await, first()).await;
        let creates = (0..400).map(|nth| between(&key(nth), &key(10_000)));
        assert!(stream.create_all(creates).await.is_empty());
        let range = DeleteRangeRequest { key: owned(&key(0)), range_end: owned(&key(10_000)), ..Default::default() };
        server.kv().await.delete_range(range).await.unwrap();
        let mut events = 0;
        while events < (0..400).map(|nth| 10_000 - nth).sum() {
            events += stream.next().await.events.len();
        }
    });
    assert_short("a deletion of 10,000 keys under 400 watches", worst);
}

#[test]
fn other_clients_are_served_while_a_stream_requests_progress() {
    let server = Server::start(&["--api-threads=1"]);
    let worst = probe(&server, async |server| {
        let mut stream = Stream::open(server.channel().await, first()).await;
        let creates = (0..50_000).map(|nth| on(&key(nth)));
        assert!(stream.create_all(creates).await.is_empty());
        let requests = stream.requests.clone();
        tokio::spawn(async move {
            for _ in 0..2000 {
                let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
                requests.send(request(progress)).await.unwrap();
            }
        });
        for _ in 0..2000 {
            assert_eq!(stream.next().await.watch_id, -1);
        }
    });
    assert_short("2,000 progress requests of a stream with 50,000 watches", worst);
}

async fn wait_for_metric(server: &Server, metric: &str, value: f64) {
    eventually_async(&format!("{metric} is at most {value}"), time_limit(), async || {
        let found = server.http("GET", "/metrics").metric(metric);
        if found <= value { Ok(()) } else { Err(found) }
    })
    .await;
}

/// The server's resident memory in bytes.
fn resident(server: &Server) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

fn held(server: &Server) -> usize {
    let page = server.http("GET", "/metrics").body;
    let line = page.lines().find_map(|line| line.strip_prefix("metastore_http2_held_bytes ")).unwrap();
    line.parse().unwrap()
}

/// Resident memory that is not counted: the database's caches, the pending output of connections, and what the allocator keeps.
const UNCOUNTED: usize = 64 << 20;

#[test]
fn the_memory_of_watches_is_counted_and_limited_per_connection() {
    let server = Server::start(&["--max-connection-bytes=16000000", "--max-held-bytes=1000000000"]);
    let before = resident(&server);
    runtime().block_on(async {
        let mut stream = Stream::open(server.channel().await, first()).await;
        // A key of a mebibyte is refused.
        let refusals = stream.create_all([on(&"k".repeat(1 << 20))].into_iter()).await;
        assert_eq!(refusals, ["etcdserver: request is too large"]);
        // A connection may hold 16 MB, half of it for watches: about 770 watches with keys of 10,000 bytes.
        let long = |nth: usize| key(nth) + &"k".repeat(9_989);
        let refusals = stream.create_all((0..3000).map(|nth| on(&long(nth)))).await;
        let watches = 3000 - refusals.len();
        assert!(refusals.iter().all(|reason| reason.contains("(--max-connection-bytes, --max-held-bytes)")));
        assert!((700..=770).contains(&watches), "{watches} watches");
        let (held, grown) = (held(&server), resident(&server).saturating_sub(before));
        println!("{watches} watches with keys of 10,000 bytes: {held} bytes held, {grown} resident");
        assert!((watches * 10_400..8_100_000).contains(&held), "{held} bytes held for {watches} watches");
        assert!(grown < held + UNCOUNTED, "{grown} bytes more are resident, {held} are counted");
        // Other calls, and watches of other connections, are not affected.
        put(&mut server.kv().await, "first", "1").await;
        assert_eq!(stream.next().await.events.len(), 1);
        let mut other = Stream::open(server.channel().await, first()).await;
        assert!(other.create_all((0..100).map(|nth| on(&key(nth)))).await.is_empty());
        drop((stream, other));
        wait_for_metric(&server, "metastore_http2_held_bytes", 100_000.0).await;
    });
}

#[test]
fn unread_streams_hold_no_more_memory_than_is_counted() {
    const STREAMS: usize = 100;
    let server = Server::start(&["--all-watch-pending-bytes=8388608", "--max-held-bytes=64000000"]);
    runtime().block_on(async {
        let mut kv = server.kv().await;
        for _ in 0..300 {
            put(&mut kv, "a", &"v".repeat(10 << 10)).await;
        }
        let before = resident(&server);
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            streams.push(Stream::open(server.channel().await, from(2, on("a"))).await);
        }
        // Until each stream holds its maximum: a message blocked by flow control, and the events pending after it.
        let mut max_held = 0;
        for _ in 0..20 {
            let (held, resident) = (held(&server), resident(&server).saturating_sub(before));
            max_held = max_held.max(held);
            assert!(resident < max_held + UNCOUNTED, "{resident} bytes more are resident, {held} are counted");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!("{STREAMS} streams that are not read: {max_held} bytes held");
        assert!(max_held < 64_000_000, "{max_held} bytes held");
        for stream in &mut streams {
            let mut received = 0;
            while received < 300 {
                received += stream.next().await.events.len();
            }
            assert_eq!(received, 300);
        }
    });
}

#[test]
fn a_server_stops_in_time_while_it_removes_watches() {
    let mut server = Server::start(&["--api-threads=1"]);
    let runtime = runtime();
    let stream = runtime.block_on(async {
        let mut stream = Stream::open(server.channel().await, first()).await;
        let creates = hostile_order(60_000).into_iter().map(|nth| between(&key(nth), &key(nth + 1)));
        assert!(stream.create_all(creates).await.is_empty());
        stream
    });
    drop((stream, runtime)); // Closes the connection, and with it all watches.
    let start = Instant::now();
    server.end_with(Signal::TERM);
    let took = start.elapsed();
    println!("a server that removes 60,000 watches stops in {took:?}");
    assert!(took < scaled(Duration::from_secs(5)), "it takes {took:?}");
}
