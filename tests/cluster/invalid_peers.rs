//! Connections to the peer port that are not from a member of the cluster, or that send invalid messages: refused with a log line
//! on both sides, without an effect on the cluster.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use protobuf::Message as _;
use raft::eraftpb::{Entry, Message, MessageType};

use metastore::proto::etcdserverpb::MemberAddRequest;

use super::{
    harness::Cluster,
    support::{scaled, time_limit},
};

pub const ACCEPTED: [u8; 3] = [0; 3];
pub const RELEASE: [u8; 4] = [3, 7, 3, 0];
pub const PREFACE: &[u8] = b"metastore raft 3";
pub const PURPOSE_MESSAGES: u8 = 1;
pub const PURPOSE_SNAPSHOT: u8 = 2;

/// The handshake.
#[derive(Clone, Copy)]
pub struct Hello {
    pub preface: &'static [u8],
    pub purpose: u8,
    pub cluster: u64,
    pub from: u64,
    pub to: u64,
    pub incarnation: u64,
    pub largest_request: u64,
    pub release: [u8; 4],
}

impl Hello {
    pub fn new(cluster: u64, from: u64, to: u64) -> Self {
        Self {
            preface: PREFACE,
            purpose: PURPOSE_MESSAGES,
            cluster,
            from,
            to,
            incarnation: 7,
            largest_request: 0,
            release: RELEASE,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let numbers =
            [self.cluster, self.from, self.to, self.incarnation, self.largest_request].map(u64::to_be_bytes).concat();
        [self.preface, &[self.purpose], &numbers, &self.release, &[0, 0]].concat()
    }

    pub fn send(&self, address: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(time_limit())).unwrap();
        stream.write_all(&self.bytes()).unwrap();
        stream
    }

    /// Connects, and asserts that the handshake is accepted.
    pub fn connect(&self, address: &str) -> TcpStream {
        let mut stream = self.send(address);
        let mut verdict = [9; 3];
        stream.read_exact(&mut verdict).unwrap();
        assert_eq!(verdict, ACCEPTED);
        stream
    }

    /// Connects, asserts that the handshake is refused, and returns the reason.
    fn refusal(&self, address: &str) -> String {
        let mut stream = self.send(address);
        stream.shutdown(Shutdown::Write).unwrap();
        let mut verdict = Vec::new();
        stream.read_to_end(&mut verdict).unwrap();
        assert_eq!(verdict[0], 2, "refused");
        String::from_utf8(verdict.split_off(3)).unwrap()
    }

    /// Connects, sends something that must be refused, and returns the reason.
    pub fn refused_after(&self, address: &str, frame: &[u8]) -> String {
        let mut stream = self.connect(address);
        stream.write_all(frame).unwrap();
        // The peer closes the connection, possibly before it has read everything.
        let mut verdict = Vec::new();
        let _ = stream.read_to_end(&mut verdict);
        assert_eq!(verdict[0], 2, "refused");
        String::from_utf8(verdict.split_off(3)).unwrap()
    }
}

pub fn frame(message: &Message) -> Vec<u8> {
    let message = message.write_to_bytes().unwrap();
    let body = [&u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat();
    let header = [u32::try_from(body.len()).unwrap(), crc32c::crc32c(&body)].map(u32::to_be_bytes).concat();
    [header, body].concat()
}

/// Messages that can be decoded but are invalid, and the reason in the log.
fn invalid_messages(from: u64, to: u64, term: u64) -> Vec<(Message, &'static str)> {
    let message = |msg_type, term| Message { msg_type, from, to, term, ..Message::default() };
    let gap = vec![Entry { index: 90, term, ..Entry::default() }];
    let append = Message { index: 5, log_term: term, entries: gap.into(), ..message(MessageType::MsgAppend, term) };
    vec![
        (message(MessageType::MsgReadIndex, 0), "a MsgReadIndex must have one entry"),
        (message(MessageType::MsgPropose, 0), "a MsgPropose proposes nothing"),
        (message(MessageType::MsgSnapshot, term), "a MsgSnapshot must be sent with its files"),
        (message(MessageType::MsgHup, term), "a MsgHup is only for use within a member"),
        (message(MessageType::MsgHeartbeat, 0), "a MsgHeartbeat must have a term"),
        (Message { from: 99, ..message(MessageType::MsgHeartbeat, term) }, "from 63 to"),
        (append, "has entries that are not contiguous"),
        (message(MessageType::MsgHeartbeat, u64::MAX), "term or index out of range"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_handshakes_and_messages_are_refused_without_disturbing_the_cluster() {
    let cluster = Cluster::bootstrap(3, &["--strict-reconfig-check=false"]);
    let leader = cluster.leader().await;
    // A member that never starts, because connections as a member that is running are refused.
    let request = MemberAddRequest { peer_ur_ls: vec!["http://127.0.0.1:1".to_owned()], is_learner: true };
    let added = cluster.servers[leader].cluster().await.member_add(request).await.unwrap().into_inner();
    let absent = added.member.unwrap().id;
    cluster.client(leader).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
    let before = cluster.status(leader).await.unwrap();
    let cluster_id = before.header.unwrap().cluster_id;
    for nth in 0..3 {
        let (server, other) = (&cluster.servers[nth], cluster.others(nth)[0]);
        let address = server.peer_address();
        let stands = format!("\"established a stream with peer\",\"remote-peer-id\":\"{:x}\"", cluster.ids[nth]);
        cluster.servers[other].wait_for_log(&stands);
        let (from, to) = (absent, cluster.ids[nth]);
        let own = Hello::new(cluster_id, from, to);
        for (hello, refusal) in [
            (Hello { from: cluster.ids[other], ..own }, "another process runs as member"),
            (Hello { cluster: 5, ..own }, "cluster ID mismatch"),
            (Hello { to: from, ..own }, "member ID mismatch: this is"),
            (Hello { from: to, ..own }, "member ID mismatch: the sender cannot be"),
            (Hello { from: 0, ..own }, "member ID mismatch: the sender cannot be 0"),
            (Hello { release: [2, 9, 2, 0], ..own }, "incompatible version"),
            (Hello { preface: b"metastore raft 7", ..own }, "incompatible version"),
        ] {
            let reason = hello.refusal(&address);
            assert!(reason.starts_with(refusal), "{reason}");
            server.wait_for_log(refusal);
        }
        let mut bad = vec![
            (vec![0xff; 16], "a frame of 4294967295 bytes is too large"),
            (vec![0, 0, 0, 4, 1, 2, 3, 4, 5, 6, 7, 8], "the checksum of a frame does not match"),
        ];
        let messages = invalid_messages(from, to, before.raft_term).into_iter();
        bad.extend(messages.map(|(message, line)| (frame(&message), line)));
        for (bytes, line) in bad {
            let reason = own.refused_after(&address, &bytes);
            assert!(reason.contains(line), "{reason}");
            server.wait_for_log(line);
        }
        // This one contradicts only the log: the message is ignored, and the stream stays open.
        let ahead = Message {
            msg_type: MessageType::MsgHeartbeat,
            from,
            to,
            term: before.raft_term,
            commit: 1 << 40,
            ..Message::default()
        };
        let mut stream = own.send(&address);
        stream.write_all(&frame(&ahead)).unwrap();
        server.wait_for_log("said to have been acknowledged");
    }
    cluster.client(leader).await.put("a", "2", None).await.unwrap();
    assert_eq!(cluster.leader().await, leader, "the leader has not changed");
    assert_eq!(cluster.status(leader).await.unwrap().raft_term, before.raft_term);
    cluster.assert_all_equal().await;
    tokio::time::timeout(scaled(Duration::from_secs(5)), cluster.client(leader).await.get("a", None))
        .await
        .unwrap()
        .unwrap();
}
