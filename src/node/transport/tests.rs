use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
};

use super::{
    super::snapshot::{OutboundSnapshot, Scratch},
    frame::{Purpose, Verdict},
    *,
};
use crate::raft_log::Position;

const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

struct NoSnapshots;

impl SnapshotStore for NoSnapshots {
    fn new_directory(&self, _index: u64) -> Scratch {
        panic!("no snapshots are sent in these tests")
    }

    fn free_bytes(&self) -> std::io::Result<u64> {
        panic!("no snapshots are sent in these tests")
    }

    fn open(&self, _files: Scratch) -> Result<InboundSnapshot, Halt> {
        panic!("no snapshots are sent in these tests")
    }
}

/// The transport of one member, listening on its own port.
struct TestMember {
    transport: Arc<Transport>,
    raft: Arc<Inbox<Input>>,
    peer: Peer,
}

fn member(member_id: u64) -> TestMember {
    member_of_version((3, 7), member_id)
}

fn member_of_version(version: (u8, u8), member_id: u64) -> TestMember {
    let raft = Arc::new(Inbox::default());
    let transport = Transport::new(TransportParts {
        identity: Identity { cluster_id: 7, member_id },
        protocol_version: ProtocolVersion { version, oldest: (3, 0) },
        raft: raft.clone(),
        connectivity: Arc::default(),
        outbound_slot: Arc::default(),
        snapshot_store: Box::new(NoSnapshots),
        on_removed: Arc::new(|| ()),
        advance_first_election: false,
        tls: ClientTls::without_certificates(),
        limits: TransportLimits {
            dial: Duration::from_secs(5),
            write: WRITE_TIMEOUT,
            stall: Duration::from_mins(1),
            snapshot_rate: 1 << 30,
            queue_bytes: 1 << 20,
            min_bytes_per_second: 64 << 10,
        },
        connections: ConnectionLimits { per_address: 64, before_hello: 16, hello_timeout: Duration::from_secs(5) },
        max_request_bytes: 1 << 20,
    });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let urls = vec![format!("http://{}", listener.local_addr().unwrap())];
    let receiver = transport.clone();
    std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| receive(&receiver, stream)));
    TestMember { transport, raft, peer: Peer { id: member_id, urls } }
}

fn receive(transport: &Arc<Transport>, stream: TcpStream) {
    let address = stream.peer_addr().unwrap().ip();
    if let Some(admitted) = transport.admit(&stream, address) {
        transport.receive(BlockingStream::Plain(stream), admitted);
    }
}

impl TestMember {
    /// Sends heartbeats to another member until it has received one.
    fn reaches(&self, other: &Self) {
        let (from, to) = (self.peer.id, other.peer.id);
        let heartbeat = Message { msg_type: MessageType::MsgHeartbeat, from, to, term: 1, ..Message::default() };
        let mut received = Vec::new();
        while !received.iter().any(|input| matches!(input, Input::Messages(messages) if messages[0].from == from)) {
            self.transport.send(vec![heartbeat.clone()]);
            received.clear();
            other.raft.receive(&mut received, Some(std::time::Instant::now() + Duration::from_millis(20)));
        }
    }
}

#[test]
fn a_member_connects_back_to_one_that_it_does_not_know_yet() {
    let (new, outdated) = (member(1), member(2));
    new.transport.set_peers(vec![new.peer.clone(), outdated.peer.clone()], Vec::new());
    outdated.transport.set_peers(vec![outdated.peer.clone()], Vec::new());
    new.reaches(&outdated);
    outdated.reaches(&new);
    // A change of other members does not disconnect it; its removal does.
    outdated.transport.set_peers(vec![outdated.peer.clone()], vec![9]);
    outdated.reaches(&new);
    outdated.transport.set_peers(vec![outdated.peer.clone()], vec![1]);
    assert!(outdated.transport.connection(1).is_none());
    new.transport.stop();
    outdated.transport.stop();
}

fn await_message(member: &TestMember, matches: impl Fn(&Message) -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    let mut inputs = Vec::new();
    loop {
        assert!(std::time::Instant::now() < until, "the message does not arrive");
        member.raft.receive(&mut inputs, Some(std::time::Instant::now() + Duration::from_millis(20)));
        let messages = inputs
            .drain(..)
            .filter_map(|input| if let Input::Messages(messages) = input { Some(messages) } else { None });
        if messages.flatten().any(|message| matches(&message)) {
            return;
        }
    }
}

/// Raft forwards a proposal again, with the original sender's ID, if leadership has moved meanwhile.
#[test]
fn proposals_and_reads_of_other_members_are_forwarded_and_the_stream_stays_open() {
    let (follower, leader) = (member(1), member(2));
    follower.transport.set_peers(vec![follower.peer.clone(), leader.peer.clone()], Vec::new());
    leader.transport.set_peers(vec![leader.peer.clone(), follower.peer.clone()], vec![9]);
    follower.reaches(&leader);
    let open_since = std::time::Instant::now();
    let forwarded = |msg_type, from| {
        let entries = vec![raft::eraftpb::Entry { data: vec![1].into(), ..Default::default() }];
        Message { msg_type, from, to: 2, entries: entries.into(), ..Message::default() }
    };
    follower.transport.send(vec![forwarded(MessageType::MsgPropose, 9), forwarded(MessageType::MsgPropose, 3)]);
    await_message(&leader, |message| {
        assert_ne!(message.from, 9, "it was removed");
        message.msg_type == MessageType::MsgPropose && message.from == 3
    });
    follower.transport.send(vec![forwarded(MessageType::MsgReadIndex, 3)]);
    await_message(&leader, |message| message.msg_type == MessageType::MsgReadIndex);
    let open_for = open_since.elapsed();
    assert!(
        follower.transport.parts.connectivity.active_for(2).is_some_and(|time| time > open_for),
        "it is the same stream"
    );
    follower.transport.stop();
    leader.transport.stop();
}

/// Reports about the connection to the old address must not be taken for reports about the one to the new address.
#[test]
fn a_member_that_moves_is_unreachable_until_the_new_connection_is_established() {
    let (own, other) = (member(1), member(2));
    own.transport.set_peers(vec![own.peer.clone(), other.peer.clone()], Vec::new());
    own.reaches(&other);
    let second = TcpListener::bind("127.0.0.1:0").unwrap();
    let moved = Peer { id: 2, urls: vec![format!("http://{}", second.local_addr().unwrap())] };
    let receiver = other.transport.clone();
    std::thread::spawn(move || second.incoming().flatten().for_each(|stream| receive(&receiver, stream)));
    let mut inputs = Vec::new();
    own.raft.drain(&mut inputs);
    assert!(matches!(inputs[..], [Input::Reachable(2), ..]));
    inputs.clear();
    own.transport.set_peers(vec![own.peer.clone(), moved], Vec::new());
    own.reaches(&other);
    own.raft.drain(&mut inputs);
    assert!(matches!(inputs[..], [Input::Unreachable(2), Input::Reachable(2)]));
    own.transport.stop();
    other.transport.stop();
}

const FILE_BYTES: usize = 32 << 20;

/// Receives one snapshot, but is busy with its disk for a while first.
fn slow_receiver(listener: &TcpListener) {
    for mut stream in listener.incoming().flatten() {
        let hello = Hello::read(&mut stream).unwrap();
        Verdict::Accepted.write(&mut stream).unwrap();
        if hello.purpose == Purpose::Messages {
            std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
            continue;
        }
        std::thread::sleep(3 * WRITE_TIMEOUT); // Longer than a write of a message may block.
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let rest = u32::from_be_bytes(length) as usize + 8 + 2 + "1.sst".len() + 8 + FILE_BYTES + 4 + 2;
        stream.read_exact(&mut vec![0; rest]).unwrap();
        return Verdict::Accepted.write(&mut stream).unwrap();
    }
}

#[test]
fn a_snapshot_waits_for_a_receiver_that_is_busy_with_its_disk() {
    let own = member(1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let receiver = Peer { id: 2, urls: vec![format!("http://{}", listener.local_addr().unwrap())] };
    let busy = std::thread::spawn(move || slow_receiver(&listener));
    own.transport.set_peers(vec![own.peer.clone(), receiver], Vec::new());
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("1.sst"), vec![7; FILE_BYTES]).unwrap();
    let at = Position { index: 5, term: 1 };
    let files = Scratch::new(temp.path().to_path_buf());
    own.transport.parts.outbound_slot.put(Some(Arc::new(OutboundSnapshot {
        at,
        conf_state: raft::eraftpb::ConfState::default(),
        files,
    })));
    let mut snapshot = Message { msg_type: MessageType::MsgSnapshot, from: 1, to: 2, term: 1, ..Message::default() };
    snapshot.mut_snapshot().mut_metadata().index = 5;
    own.transport.send(vec![snapshot]);
    let mut inputs = Vec::new();
    while !inputs.iter().any(|input| matches!(input, Input::SnapshotSent { to: 2, .. })) {
        assert!(own.raft.receive(&mut inputs, None));
    }
    assert!(
        inputs.iter().any(|input| matches!(input, Input::SnapshotSent { arrived: true, .. })),
        "the transfer was aborted"
    );
    busy.join().unwrap();
    own.transport.stop();
}

/// A member's answer to a connection that begins with these bytes.
fn answer(member: &TestMember, bytes: &[u8]) -> Verdict {
    let mut stream = TcpStream::connect(member.peer.urls[0].strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    Verdict::read(&mut stream).unwrap()
}

#[test]
fn an_incompatible_version_is_refused_with_the_reason() {
    let (own, old) = (member(1), member_of_version((2, 9), 2));
    let mut bytes = Vec::new();
    old.transport.hello(Purpose::Messages, 1).write(&mut bytes).unwrap();
    let text = "incompatible version: this is 3.7, not 2.9";
    assert_eq!(answer(&own, &bytes), Verdict::Refused(text.to_owned()));
    bytes.clear();
    member_of_version((9, 9), 2).transport.hello(Purpose::Messages, 1).write(&mut bytes).unwrap();
    assert_eq!(answer(&own, &bytes), Verdict::Accepted);
    bytes[PREFACE.len() - 1] += 1;
    let text = r#"incompatible version: this member speaks "metastore raft 3", not "metastore raft 4""#;
    assert_eq!(answer(&own, &bytes), Verdict::Refused(text.to_owned()));
    own.transport.stop();
}
