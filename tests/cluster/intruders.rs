//! Whoever calls the port for members and is none, or is one that has lost its mind: refused with a line on both sides, and
//! the cluster goes on untouched.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use protobuf::Message as _;
use raft::eraftpb::{Entry, Message, MessageType};

use metastore::proto::etcdserverpb::MemberAddRequest;

use super::harness::{Cluster, PATIENCE};

pub const WELCOME: [u8; 3] = [0; 3];
pub const RELEASE: [u8; 4] = [3, 7, 3, 0];
pub const PREFACE: &[u8] = b"metastore raft 3";
pub const FOR_MESSAGES: u8 = 1;
pub const FOR_A_SNAPSHOT: u8 = 2;

/// How a call begins.
#[derive(Clone, Copy)]
pub struct Hello {
    pub preface: &'static [u8],
    pub purpose: u8,
    pub cluster: u64,
    pub from: u64,
    pub to: u64,
    pub life: u64,
    pub largest_request: u64,
    pub release: [u8; 4],
}

impl Hello {
    pub fn new(cluster: u64, from: u64, to: u64) -> Self {
        Self {
            preface: PREFACE,
            purpose: FOR_MESSAGES,
            cluster,
            from,
            to,
            life: 7,
            largest_request: 0,
            release: RELEASE,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let numbers =
            [self.cluster, self.from, self.to, self.life, self.largest_request].map(u64::to_be_bytes).concat();
        [self.preface, &[self.purpose], &numbers, &self.release, &[0, 0]].concat()
    }

    pub fn call(&self, address: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&self.bytes()).unwrap();
        stream
    }

    /// A stream on which it may go on.
    pub fn is_welcome(&self, address: &str) -> TcpStream {
        let mut stream = self.call(address);
        let mut verdict = [9; 3];
        stream.read_exact(&mut verdict).unwrap();
        assert_eq!(verdict, WELCOME);
        stream
    }

    /// What it is told; nobody is welcome here.
    fn refusal(&self, address: &str) -> String {
        let mut stream = self.call(address);
        stream.shutdown(Shutdown::Write).unwrap();
        let mut verdict = Vec::new();
        stream.read_to_end(&mut verdict).unwrap();
        assert_eq!(verdict[0], 2, "refused");
        String::from_utf8(verdict.split_off(3)).unwrap()
    }

    /// Says something that ends the call; what it is told then.
    pub fn say(&self, address: &str, frame: &[u8]) -> String {
        let mut stream = self.is_welcome(address);
        stream.write_all(frame).unwrap();
        // Closed by the other side, with or without having read everything.
        let mut last_words = Vec::new();
        let _ = stream.read_to_end(&mut last_words);
        assert_eq!(last_words[0], 2, "refused");
        String::from_utf8(last_words.split_off(3)).unwrap()
    }
}

pub fn frame(message: &Message) -> Vec<u8> {
    let message = message.write_to_bytes().unwrap();
    let body = [&u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat();
    let header = [u32::try_from(body.len()).unwrap(), crc32c::crc32c(&body)].map(u32::to_be_bytes).concat();
    [header, body].concat()
}

/// Messages that can be read but make no sense, and what the log says to them.
fn nonsense(from: u64, to: u64, term: u64) -> Vec<(Message, &'static str)> {
    let says = |msg_type, term| Message { msg_type, from, to, term, ..Message::default() };
    let gap = vec![Entry { index: 90, term, ..Entry::default() }];
    let append = Message { index: 5, log_term: term, entries: gap.into(), ..says(MessageType::MsgAppend, term) };
    vec![
        (says(MessageType::MsgReadIndex, 0), "a MsgReadIndex must have one entry"),
        (says(MessageType::MsgPropose, 0), "a MsgPropose proposes nothing"),
        (says(MessageType::MsgSnapshot, term), "a MsgSnapshot comes with its files"),
        (says(MessageType::MsgHup, term), "a MsgHup is between a member and itself"),
        (says(MessageType::MsgHeartbeat, 0), "a MsgHeartbeat must have a term"),
        (Message { from: 99, ..says(MessageType::MsgHeartbeat, term) }, "from 63 to"),
        (append, "has entries that do not follow each other"),
        (says(MessageType::MsgHeartbeat, u64::MAX), "no term and no index"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_business_here_is_told_so_and_disturbs_nobody() {
    let cluster = Cluster::found(3, &["--strict-reconfig-check=false"]);
    let leader = cluster.leader().await;
    // A member that never starts: in the name of those that run nobody else may speak.
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
            (Hello { from: cluster.ids[other], ..own }, "another process speaks for member"),
            (Hello { cluster: 5, ..own }, "cluster ID mismatch"),
            (Hello { to: from, ..own }, "member ID mismatch: this is"),
            (Hello { from: to, ..own }, "member ID mismatch: the caller cannot be"),
            (Hello { from: 0, ..own }, "member ID mismatch: the caller cannot be 0"),
            (Hello { release: [2, 9, 2, 0], ..own }, "incompatible version"),
            (Hello { preface: b"metastore raft 7", ..own }, "incompatible version"),
        ] {
            let told = hello.refusal(&address);
            assert!(told.starts_with(refusal), "{told}");
            server.wait_for_log(refusal);
        }
        let mut bad = vec![
            (vec![0xff; 16], "a frame of 4294967295 bytes is too large"),
            (vec![0, 0, 0, 4, 1, 2, 3, 4, 5, 6, 7, 8], "a frame was damaged on its way"),
        ];
        let nonsense = nonsense(from, to, before.raft_term).into_iter();
        bad.extend(nonsense.map(|(message, line)| (frame(&message), line)));
        for (bytes, line) in bad {
            let told = own.say(&address, &bytes);
            assert!(told.contains(line), "{told}");
            server.wait_for_log(line);
        }
        // This one only the log gives the lie: the stream stands, and the message is ignored.
        let ahead = Message {
            msg_type: MessageType::MsgHeartbeat,
            from,
            to,
            term: before.raft_term,
            commit: 1 << 40,
            ..Message::default()
        };
        let mut stream = own.call(&address);
        stream.write_all(&frame(&ahead)).unwrap();
        server.wait_for_log("said to have been acknowledged");
    }
    cluster.client(leader).await.put("a", "2", None).await.unwrap();
    assert_eq!(cluster.leader().await, leader, "nobody was disturbed");
    assert_eq!(cluster.status(leader).await.unwrap().raft_term, before.raft_term);
    cluster.assert_all_equal().await;
    tokio::time::timeout(Duration::from_secs(5), cluster.client(leader).await.get("a", None)).await.unwrap().unwrap();
}
