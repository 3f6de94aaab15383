use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener},
};

use super::{
    super::{
        log::Position,
        snapshot::{Offer, Scratch},
    },
    frame::{Purpose, Verdict},
    *,
};

const WRITE_PATIENCE: Duration = Duration::from_secs(1);

struct Nowhere;

impl Depot for Nowhere {
    fn place(&self, _index: u64) -> Scratch {
        panic!("these members send no snapshots")
    }

    fn free_bytes(&self) -> std::io::Result<u64> {
        panic!("these members send no snapshots")
    }

    fn open(&self, _files: Scratch) -> Result<Incoming, Halt> {
        panic!("these members send no snapshots")
    }
}

/// A member that listens on a port of its own.
struct Place {
    transport: Arc<Transport>,
    raft: Arc<Inbox<Input>>,
    peer: Peer,
}

fn place(member_id: u64) -> Place {
    place_of((3, 7), member_id)
}

fn place_of(version: (u8, u8), member_id: u64) -> Place {
    let raft = Arc::new(Inbox::default());
    let transport = Transport::new(Parts {
        identity: Identity { cluster_id: 7, member_id },
        speech: Speech { version, oldest: (3, 0) },
        raft: raft.clone(),
        links: Arc::default(),
        shelf: Arc::default(),
        depot: Box::new(Nowhere),
        farewell: Arc::new(|| ()),
        hurries: false,
        patience: Patience {
            dial: Duration::from_secs(5),
            write: WRITE_PATIENCE,
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
    Place { transport, raft, peer: Peer { id: member_id, urls } }
}

fn receive(transport: &Arc<Transport>, stream: TcpStream) {
    let address = stream.peer_addr().unwrap().ip();
    if let Some(admitted) = transport.admit(&stream, address) {
        transport.receive(stream, admitted);
    }
}

impl Place {
    /// Says something to another member until `other` has heard it.
    fn reaches(&self, other: &Self) {
        let (from, to) = (self.peer.id, other.peer.id);
        let heartbeat = Message { msg_type: MessageType::MsgHeartbeat, from, to, term: 1, ..Message::default() };
        let mut heard = Vec::new();
        while !heard.iter().any(|input| matches!(input, Input::Messages(messages) if messages[0].from == from)) {
            self.transport.send(vec![heartbeat.clone()]);
            heard.clear();
            other.raft.receive(&mut heard, Some(std::time::Instant::now() + Duration::from_millis(20)));
        }
    }
}

#[test]
fn a_caller_is_answered_by_a_member_that_does_not_know_it_yet() {
    let (newcomer, laggard) = (place(1), place(2));
    newcomer.transport.set_peers(vec![newcomer.peer.clone(), laggard.peer.clone()], Vec::new());
    laggard.transport.set_peers(vec![laggard.peer.clone()], Vec::new());
    newcomer.reaches(&laggard);
    laggard.reaches(&newcomer);
    // A change of others does not cut it off; its removal does.
    laggard.transport.set_peers(vec![laggard.peer.clone()], vec![9]);
    laggard.reaches(&newcomer);
    laggard.transport.set_peers(vec![laggard.peer.clone()], vec![1]);
    assert!(laggard.transport.line(1).is_none());
    newcomer.transport.stop();
    laggard.transport.stop();
}

fn heard(place: &Place, what: impl Fn(&Message) -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    let mut inputs = Vec::new();
    loop {
        assert!(std::time::Instant::now() < until, "it is not heard");
        place.raft.receive(&mut inputs, Some(std::time::Instant::now() + Duration::from_millis(20)));
        let messages = inputs
            .drain(..)
            .filter_map(|input| if let Input::Messages(messages) = input { Some(messages) } else { None });
        if messages.flatten().any(|message| what(&message)) {
            return;
        }
    }
}

/// Raft passes a proposal on once more, under its first name, when leadership has moved meanwhile.
#[test]
fn what_others_wanted_is_passed_on_and_the_stream_stands() {
    let (follower, leader) = (place(1), place(2));
    follower.transport.set_peers(vec![follower.peer.clone(), leader.peer.clone()], Vec::new());
    leader.transport.set_peers(vec![leader.peer.clone(), follower.peer.clone()], vec![9]);
    follower.reaches(&leader);
    let stands_since = std::time::Instant::now();
    let passed_on = |msg_type, from| {
        let entries = vec![raft::eraftpb::Entry { data: vec![1].into(), ..Default::default() }];
        Message { msg_type, from, to: 2, entries: entries.into(), ..Message::default() }
    };
    follower.transport.send(vec![passed_on(MessageType::MsgPropose, 9), passed_on(MessageType::MsgPropose, 3)]);
    heard(&leader, |message| {
        assert_ne!(message.from, 9, "it was removed");
        message.msg_type == MessageType::MsgPropose && message.from == 3
    });
    follower.transport.send(vec![passed_on(MessageType::MsgReadIndex, 3)]);
    heard(&leader, |message| message.msg_type == MessageType::MsgReadIndex);
    let stood = stands_since.elapsed();
    assert!(follower.transport.parts.links.active_for(2).is_some_and(|time| time > stood), "it is the same stream");
    follower.transport.stop();
    leader.transport.stop();
}

/// What the line to the old place says must not be taken for news of the line to the new one.
#[test]
fn a_member_that_moves_is_out_of_reach_until_the_new_line_stands() {
    let (own, other) = (place(1), place(2));
    own.transport.set_peers(vec![own.peer.clone(), other.peer.clone()], Vec::new());
    own.reaches(&other);
    let second = TcpListener::bind("127.0.0.1:0").unwrap();
    let moved = Peer { id: 2, urls: vec![format!("http://{}", second.local_addr().unwrap())] };
    let receiver = other.transport.clone();
    std::thread::spawn(move || second.incoming().flatten().for_each(|stream| receive(&receiver, stream)));
    let mut news = Vec::new();
    own.raft.drain(&mut news);
    assert!(matches!(news[..], [Input::Reachable(2), ..]));
    news.clear();
    own.transport.set_peers(vec![own.peer.clone(), moved], Vec::new());
    own.reaches(&other);
    own.raft.drain(&mut news);
    assert!(matches!(news[..], [Input::Unreachable(2), Input::Reachable(2)]));
    own.transport.stop();
    other.transport.stop();
}

const FILE_BYTES: usize = 32 << 20;

/// Takes one copy in, but is busy with its disk for a while first.
fn slow_receiver(listener: &TcpListener) {
    for mut stream in listener.incoming().flatten() {
        let hello = Hello::read(&mut stream).unwrap();
        Verdict::Welcome.write(&mut stream).unwrap();
        if hello.purpose == Purpose::Messages {
            std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
            continue;
        }
        std::thread::sleep(3 * WRITE_PATIENCE); // Longer than any message may take.
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let rest = u32::from_be_bytes(length) as usize + 8 + 2 + "1.sst".len() + 8 + FILE_BYTES + 4 + 2;
        stream.read_exact(&mut vec![0; rest]).unwrap();
        return Verdict::Welcome.write(&mut stream).unwrap();
    }
}

#[test]
fn a_snapshot_waits_for_a_receiver_that_is_busy_with_its_disk() {
    let own = place(1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let receiver = Peer { id: 2, urls: vec![format!("http://{}", listener.local_addr().unwrap())] };
    let busy = std::thread::spawn(move || slow_receiver(&listener));
    own.transport.set_peers(vec![own.peer.clone(), receiver], Vec::new());
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("1.sst"), vec![7; FILE_BYTES]).unwrap();
    let at = Position { index: 5, term: 1 };
    let files = Scratch::new(temp.path().to_path_buf());
    own.transport.parts.shelf.put(Some(Arc::new(Offer { at, conf_state: raft::eraftpb::ConfState::default(), files })));
    let mut snapshot = Message { msg_type: MessageType::MsgSnapshot, from: 1, to: 2, term: 1, ..Message::default() };
    snapshot.mut_snapshot().mut_metadata().index = 5;
    own.transport.send(vec![snapshot]);
    let mut news = Vec::new();
    while !news.iter().any(|input| matches!(input, Input::SnapshotSent { to: 2, .. })) {
        assert!(own.raft.receive(&mut news, None));
    }
    assert!(news.iter().any(|input| matches!(input, Input::SnapshotSent { arrived: true, .. })), "it was given up");
    busy.join().unwrap();
    own.transport.stop();
}

/// What a member answers to whoever begins with these bytes.
fn answer(place: &Place, bytes: &[u8]) -> Verdict {
    let mut stream = TcpStream::connect(place.peer.urls[0].strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    Verdict::read(&mut stream).unwrap()
}

#[test]
fn another_version_is_told_so() {
    let (own, old) = (place(1), place_of((2, 9), 2));
    let mut bytes = Vec::new();
    old.transport.hello(Purpose::Messages, 1).write(&mut bytes).unwrap();
    let text = "incompatible version: this is 3.7, not 2.9";
    assert_eq!(answer(&own, &bytes), Verdict::Refused(text.to_owned()));
    bytes.clear();
    place_of((9, 9), 2).transport.hello(Purpose::Messages, 1).write(&mut bytes).unwrap();
    assert_eq!(answer(&own, &bytes), Verdict::Welcome);
    bytes[PREFACE.len() - 1] += 1;
    let text = r#"incompatible version: this member speaks "metastore raft 3", not "metastore raft 4""#;
    assert_eq!(answer(&own, &bytes), Verdict::Refused(text.to_owned()));
    own.transport.stop();
}
