//! A hostile client at the peer port: whatever it sends, the members keep running, in the same term and with their streams open,
//! and it uses a bounded amount of their memory and disk.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::MemberAddRequest;
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};

use super::{
    harness::Cluster,
    invalid_peers::{Hello, PREFACE, PURPOSE_SNAPSHOT, frame},
    support::{Server, eventually, time_limit},
};

const MIB: u64 = 1 << 20;
/// A term that is too far ahead of the terms of a test to be the result of elections.
const TOO_FAR: u64 = (1 << 40) + 100;

/// State of a member that the hostile client must not change.
struct Baseline {
    term: u64,
    lost_streams: f64,
    disk_bytes: u64,
}

/// A number from the process's `/proc/<pid>/status`.
fn process_number(server: &Server, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The maximum of resident memory since the last [`reset_peak`].
fn peak_bytes(server: &Server) -> u64 {
    process_number(server, "VmHWM:") << 10
}

fn reset_peak(server: &Server) {
    fs::write(format!("/proc/{}/clear_refs", server.pid()), "5").unwrap();
}

fn bytes_below(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0, // It was removed in the meantime.
    });
    sizes.sum()
}

/// The sum of a metric over all its labels.
fn total(server: &Server, metric: &str) -> f64 {
    let page = server.http("GET", "/metrics");
    let lines = page.body.lines().filter(|line| line.starts_with(metric));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

async fn baseline(cluster: &Cluster, nth: usize) -> Baseline {
    let server = &cluster.servers[nth];
    Baseline {
        term: cluster.status(nth).await.unwrap().raft_term,
        lost_streams: total(server, "etcd_network_disconnected_peers_total"),
        disk_bytes: bytes_below(&server.data_dir()),
    }
}

/// A client that writes in the background. Every write must succeed.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Writer {
    async fn start(cluster: &Cluster, nth: usize) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, mut client) = (stop.clone(), written.clone(), cluster.client(nth).await);
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                client.put("load", "1", None).await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, written, task }
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.written.load(Ordering::Relaxed)
    }
}

/// More connections than the limit for unidentified ones: the oldest are closed in favour of new ones.
fn silent_connections(own: Hello, address: &str) {
    let mut silent: Vec<_> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    // Some have sent a part of the handshake.
    for stream in &mut silent[50..] {
        let _ = stream.write_all(&PREFACE[..7]);
    }
    own.connect(address);
    for stream in &mut silent[..50] {
        stream.set_read_timeout(Some(time_limit())).unwrap();
        match stream.read(&mut [0]) {
            Ok(0) => (),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "the oldest are closed"),
            Ok(_) => panic!("a connection that has sent nothing is answered"),
        }
    }
}

/// A handshake that is sent byte by byte is aborted.
fn slow_hello(own: Hello, address: &str) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let began = Instant::now();
    for byte in own.bytes() {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    stream.set_read_timeout(Some(time_limit())).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() && began.elapsed() < time_limit(), "the handshake was not accepted: {answer:?}");
}

/// Terms that are too high to be the result of elections, in every kind of message that can raise a term.
fn extreme_terms(own: Hello, address: &str, server: &Server) {
    let kinds = [
        MessageType::MsgHeartbeat,
        MessageType::MsgAppend,
        MessageType::MsgRequestVote,
        MessageType::MsgRequestPreVote,
        MessageType::MsgRequestVoteResponse,
        MessageType::MsgRequestPreVoteResponse,
        MessageType::MsgAppendResponse,
        MessageType::MsgHeartbeatResponse,
        MessageType::MsgTimeoutNow,
    ];
    let message = |msg_type, term| {
        let message = Message { msg_type, from: own.from, to: own.to, term, ..Message::default() };
        frame(&Message { reject: msg_type == MessageType::MsgRequestPreVoteResponse, ..message })
    };
    for kind in kinds {
        let reason = own.refused_after(address, &message(kind, u64::MAX));
        assert!(reason.contains("term or index out of range"), "{reason}");
    }
    let before = total(server, "metastore_peer_refused_total{reason=\"contradiction\"}");
    let mut stream = own.connect(address);
    for term in [1 << 62, TOO_FAR] {
        for kind in kinds {
            stream.write_all(&message(kind, term)).unwrap();
        }
    }
    let expected = before + 2.0 * f64::from(u32::try_from(kinds.len()).unwrap());
    eventually(&format!("{expected} refusals are counted"), time_limit(), || {
        let count = total(server, "metastore_peer_refused_total{reason=\"contradiction\"}");
        if count >= expected { Ok(()) } else { Err(count) }
    });
    server.wait_for_log("no election can have led from term");
}

/// Frames that are too large, and many frames of nearly the maximum size that are never completed.
fn large_frames(unknown: Hello, address: &str) {
    let header = |mib: u64| [u32::try_from(mib * MIB).unwrap().to_be_bytes(), [0; 4]].concat();
    let greedy = Hello { largest_request: u64::MAX, ..unknown };
    let reason = greedy.refused_after(address, &header(65));
    assert!(reason.contains("a frame of 68157440 bytes is too large: 67108864 are allowed"), "{reason}");
    thread::scope(|scope| {
        for nth in 0..12 {
            let hello = Hello { from: unknown.from + 1 + nth, ..unknown };
            let header = header(60);
            scope.spawn(move || {
                let mut stream = hello.send(address); // It may be closed in favour of the others.
                stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
                let piece = vec![7; 1 << 20];
                let sent = stream.write_all(&header).and_then(|()| (0..32).try_for_each(|_| stream.write_all(&piece)));
                drop(sent); // Most of them are not read yet.
            });
        }
    });
}

/// Connections of unknown members, which stay open.
fn unknown_members(unknown: Hello, address: &str) -> Vec<TcpStream> {
    let streams = (100..140).map(|nth| Hello { from: unknown.from + nth, ..unknown }.connect(address));
    streams.collect()
}

/// The beginning of a snapshot transfer: the message, and the size of all files.
fn snapshot(own: Hello, term: u64, bytes: u64) -> Vec<u8> {
    let mut message =
        Message { msg_type: MessageType::MsgSnapshot, from: own.from, to: own.to, term, ..Message::default() };
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (1 << 30, term.min(1 << 40));
    metadata.mut_conf_state().voters = vec![own.to];
    let message = message.write_to_bytes().unwrap();
    [&u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message, &bytes.to_be_bytes()].concat()
}

/// The beginning of a file in a snapshot transfer.
fn file(bytes: u64) -> Vec<u8> {
    [&5_u16.to_be_bytes()[..], b"1.sst", &bytes.to_be_bytes()].concat()
}

fn snapshots(own: Hello, address: &str, term: u64, server: &Server) {
    let own = Hello { purpose: PURPOSE_SNAPSHOT, ..own };
    let next = term + 1;
    for (bytes, refusal) in [
        (snapshot(own, u64::MAX, MIB), "term or index out of range"),
        (snapshot(own, TOO_FAR, MIB), "no election can have led"),
        (snapshot(own, term - 1, MIB), "from a leader of term"),
        (snapshot(own, term, MIB), "not the sender of the snapshot"),
        (snapshot(own, next, u64::MAX), "does not fit on the disk"),
        ([snapshot(own, next, MIB), file(MIB + 1)].concat(), "more bytes than were announced"),
        ([snapshot(own, next, MIB), vec![0, 0]].concat(), "ends 1048576 bytes before the announced size"),
    ] {
        let reason = own.refused_after(address, &bytes);
        assert!(reason.contains(refusal), "{reason}");
        server.wait_for_log(refusal);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_client_does_not_disturb_the_cluster() {
    // Long election timeouts, so that an election on a busy machine is not taken for the effect of an attack.
    let slow_elections = ["--heartbeat-interval=100", "--election-timeout=10000", "--peer-hello-timeout=2s"];
    let cluster = Cluster::bootstrap(3, &[&["--strict-reconfig-check=false"], &slow_elections[..]].concat());
    let leader = cluster.leader().await;
    // A member that never starts: the most that a client at the peer port can pretend to be.
    let request = MemberAddRequest { peer_ur_ls: vec!["http://127.0.0.1:1".to_owned()], is_learner: true };
    let added = cluster.servers[leader].cluster().await.member_add(request).await.unwrap().into_inner();
    let absent = added.member.unwrap().id;
    let cluster_id = added.header.unwrap().cluster_id;
    cluster.client(leader).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
    for server in &cluster.servers {
        for _ in 0..2 {
            server.wait_for_log("established a stream with peer");
        }
    }
    let mut before = Vec::new();
    for nth in 0..3 {
        before.push(baseline(&cluster, nth).await);
    }
    let writer = Writer::start(&cluster, leader).await;
    for nth in [leader, cluster.others(leader)[0]] {
        let (server, term) = (&cluster.servers[nth], before[nth].term);
        let (address, own) = (server.peer_address(), Hello::new(cluster_id, absent, cluster.ids[nth]));
        let unknown = Hello { from: 0xbad_0000, ..own };
        let threads = process_number(server, "Threads:");
        reset_peak(server);
        let resident = peak_bytes(server);
        tokio::task::block_in_place(|| {
            silent_connections(own, &address);
            slow_hello(own, &address);
            extreme_terms(own, &address, server);
            large_frames(unknown, &address);
            let streams = unknown_members(unknown, &address);
            let now = process_number(server, "Threads:");
            assert!(now < threads + 60, "40 connections of unknown members: {now} threads, {threads} before");
            drop(streams);
            snapshots(own, &address, term, server);
        });
        let peak = peak_bytes(server);
        assert!(peak < resident + 200 * MIB, "member {nth} used {peak} bytes, {resident} before");
        let databases = fs::read_dir(server.data_dir().join("member")).unwrap().flatten();
        let databases = databases.filter(|entry| entry.file_name().to_string_lossy().starts_with("db"));
        assert_eq!(databases.count(), 1, "no received files are left");
        assert!(total(server, "metastore_peer_refused_total") > 30.0);
    }
    assert!(writer.stop().await > 10, "clients were served in the meantime");
    assert_eq!(cluster.leader().await, leader);
    for (nth, before) in before.iter().enumerate() {
        let after = baseline(&cluster, nth).await;
        assert_eq!(after.term, before.term, "the term of member {nth}");
        // The stream to the member that never started was never established.
        assert!(after.lost_streams <= before.lost_streams, "member {nth} has lost a stream");
        assert!(after.disk_bytes < before.disk_bytes + 100 * MIB, "the disk of member {nth}");
    }
    cluster.assert_all_equal().await;
}

/// Once, a sole voter accepted a snapshot, stopped in the middle of the install because it had no leader, and still seemed alive.
#[tokio::test(flavor = "multi_thread")]
async fn a_sole_voter_refuses_every_snapshot_and_keeps_serving() {
    let cluster = Cluster::bootstrap(1, &[]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let before = cluster.status(0).await.unwrap();
    let (server, cluster_id) = (&cluster.servers[0], before.header.as_ref().unwrap().cluster_id);
    let own = Hello { purpose: PURPOSE_SNAPSHOT, ..Hello::new(cluster_id, 5, cluster.ids[0]) };
    for term in [before.raft_term, before.raft_term + 1] {
        let reason = own.refused_after(&server.peer_address(), &snapshot(own, term, MIB));
        assert!(reason.contains("the only voter"), "{reason}");
    }
    cluster.client(0).await.put("a", "2", None).await.unwrap();
    assert_eq!(cluster.status(0).await.unwrap().raft_term, before.raft_term);
}
