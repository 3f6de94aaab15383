//! The transport between members: one long-lived stream per pair of members and direction, and a separate connection for each
//! snapshot.
//!
//! ```text
//! raft, log ──send──▶ Outbox ──take──▶ sender thread ══ frames ══▶ receiver thread ──▶ raft inbox of the other member
//! ```
//!
//! One thread per peer writes the content of the peer's outbox, all of it with one system call; one thread per incoming stream
//! reads frame after frame. Both use blocking I/O, which is the cheapest way to wait, and a cluster has few members. A message
//! that cannot be sent is dropped and raft is told once; nothing here waits for a member that does not read, and the memory for
//! unsent messages is bounded.
//!
//! A connecting member states its cluster, its own ID and the ID of the member that it wants to reach. A member that was removed,
//! belongs to another cluster or has an incompatible protocol version is refused, with a log line on both sides. It also states
//! its peer URLs: a member that was down may not know them yet and, if the connecting member is the leader, can learn them from
//! no other member.

mod accepted;
mod connection;
mod frame;
mod inbound;
mod outbox;
mod paced;
mod peer_sessions;
mod snapshot_transfer;
#[cfg(test)]
mod tests;
mod validate;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::ToSocketAddrs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use raft::eraftpb::{Message, MessageType};

use super::{
    inbox::Inbox,
    messages::{Input, MessageSender, Peer},
    snapshot::{InboundSnapshot, OutboundSlot, Scratch},
    status::Connectivity,
};
use crate::net::{
    stream::BlockingStream,
    tls::ClientTls,
    url::{Url, UrlAddress},
};
use crate::raft_log::Identity;
use crate::{error::Halt, metrics::METRICS, repeats::Repeats};
use accepted::{AcceptedConnections, MAX_UNKNOWN_STREAMS};
pub use accepted::{AdmittedConnection, ConnectionKind, ConnectionLimits};
use connection::PeerConnection;
use frame::Hello;
pub use frame::{PREFACE, ProtocolVersion};
use peer_sessions::PeerSessions;
use snapshot_transfer::ReceiveSlot;
pub use validate::check;

/// Stores snapshots that are received from other members.
pub trait SnapshotStore: Send + Sync {
    /// The directory for the snapshot at an index. It does not exist yet.
    fn new_directory(&self, index: u64) -> Scratch;

    /// The free space on the disk.
    fn free_bytes(&self) -> io::Result<u64>;

    /// Opens a received snapshot, whose files have been synced.
    fn open(&self, files: Scratch) -> Result<InboundSnapshot, Halt>;
}

/// Timeouts, rates and queue sizes of the transport.
#[derive(Debug, Clone, Copy)]
pub struct TransportLimits {
    /// For connecting to a member.
    pub dial: Duration,
    /// How long a write may block before the connection counts as broken.
    pub write: Duration,
    /// How long either side of a snapshot transfer waits while the other one is busy with its disk.
    pub stall: Duration,
    /// The rate at which a snapshot is sent, in bytes per second.
    pub snapshot_rate: u64,
    /// The limit for the bytes queued for one member.
    pub queue_bytes: usize,
    /// A connection that sends a frame or a snapshot more slowly than this is closed.
    pub min_bytes_per_second: u64,
}

/// The parts from which a transport is built.
pub struct TransportParts {
    /// The cluster and the member that it belongs to.
    pub identity: Identity,
    /// The protocol versions that this member supports.
    pub protocol_version: ProtocolVersion,
    /// The inbox of the raft thread.
    pub raft: Arc<Inbox<Input>>,
    /// Records which members are connected.
    pub connectivity: Arc<Connectivity>,
    /// The snapshots that raft can send.
    pub outbound_slot: Arc<OutboundSlot>,
    /// Stores received snapshots.
    pub snapshot_store: Box<dyn SnapshotStore>,
    /// Called when another member reports that this one was removed from the cluster.
    pub on_removed: Arc<dyn Fn() + Send + Sync>,
    /// Whether raft is told to shorten the wait for its first election as soon as enough peers are connected.
    pub advance_first_election: bool,
    /// For connections to members whose URL asks for TLS.
    pub tls: Arc<ClientTls>,
    /// Timeouts, rates and queue sizes.
    pub limits: TransportLimits,
    /// Limits for incoming connections.
    pub connections: ConnectionLimits,
    /// The largest request that this member accepts, in bytes.
    pub max_request_bytes: u64,
}

/// Sends messages to the other members and receives theirs.
pub struct Transport {
    parts: TransportParts,
    peer_connections: Mutex<BTreeMap<u64, Arc<PeerConnection>>>,
    removed: Mutex<BTreeSet<u64>>,
    /// The peer URLs of this member, as listed in the member table.
    urls: Mutex<Vec<String>>,
    /// At most one snapshot is received at a time.
    receiving: ReceiveSlot,
    /// Held while reading a large frame from an unknown member, so that only one is in memory at a time.
    unknown_member_frame: Mutex<()>,
    /// Incoming connections that are open.
    accepted: AcceptedConnections,
    /// The largest request that any member is known to accept.
    largest_request: AtomicU64,
    /// The process that currently sends for each member.
    sessions: PeerSessions,
    /// Distinguishes this process from earlier ones of the same member, and from ones that run on a copy of its data.
    incarnation: u64,
    /// By member, and why.
    refusals: Mutex<Repeats<(u64, String)>>,
    /// Raft should shorten the wait for its first election, and has not been told yet.
    advance_first_election: AtomicBool,
}

impl Transport {
    /// A transport without peers.
    #[must_use]
    pub fn new(parts: TransportParts) -> Arc<Self> {
        let advance_first_election = AtomicBool::new(parts.advance_first_election);
        let accepted = AcceptedConnections::new(parts.connections);
        let largest_request = AtomicU64::new(parts.max_request_bytes.min(frame::MAX_REQUEST_BYTES));
        Arc::new(Self {
            parts,
            peer_connections: Mutex::default(),
            removed: Mutex::default(),
            urls: Mutex::default(),
            receiving: ReceiveSlot::default(),
            unknown_member_frame: Mutex::default(),
            accepted,
            largest_request,
            sessions: PeerSessions::default(),
            incarnation: rand::random(),
            refusals: Mutex::default(),
            advance_first_election,
        })
    }

    /// Closes all connections, outgoing and incoming.
    pub fn stop(&self) {
        self.accepted.close();
        for connection in std::mem::take(&mut *self.peer_connections.lock()).into_values() {
            connection.close();
        }
    }

    fn connection(&self, member: u64) -> Option<Arc<PeerConnection>> {
        self.peer_connections.lock().get(&member).cloned()
    }

    /// Connects back to an unknown member: it may have joined while this member was down, and be the only one that can send this
    /// member the log entries about it. If there are too many unknown members, the connections to those that no longer send are
    /// closed.
    fn connect_back(self: &Arc<Self>, hello: &Hello) {
        let mut peer_connections = self.peer_connections.lock();
        if hello.urls.is_empty() || peer_connections.contains_key(&hello.from) {
            return;
        }
        if peer_connections.values().filter(|connection| connection.is_unknown).count() >= MAX_UNKNOWN_STREAMS {
            let is_silent = |member: &u64, connection: &mut Arc<PeerConnection>| {
                connection.is_unknown && !self.sessions.is_open(*member)
            };
            for (member, connection) in peer_connections.extract_if(.., is_silent) {
                self.disconnect(member, &connection);
            }
        }
        let peer = Peer { id: hello.from, urls: hello.urls.clone() };
        peer_connections.insert(hello.from, PeerConnection::start(self.clone(), peer, true));
    }

    /// Closes the connection to a peer, and updates the metrics and raft.
    fn disconnect(&self, member: u64, connection: &PeerConnection) {
        if connection.close() {
            // Queued messages are lost, and nothing can be sent until there is another connection.
            METRICS
                .active_peers
                .with_label_values(&[&format!("{:x}", self.parts.identity.member_id), &format!("{member:x}")])
                .set(0);
            let _ = self.parts.raft.send(Input::Unreachable(member));
        }
    }

    /// Exports the IDs of all members, this one included.
    fn export_known_peers(&self, peers: impl Iterator<Item = u64>, removed: &[u64]) {
        let this = self.parts.identity.member_id;
        let local = format!("{this:x}");
        for member in peers.chain([this]) {
            METRICS.known_peers.with_label_values(&[&local, &format!("{member:x}")]).set(1);
        }
        for member in removed {
            // An error says that it was not exported.
            let _ = METRICS.known_peers.remove_label_values(&[&local, &format!("{member:x}")]);
        }
    }

    /// Whether a peer is in this member's member list.
    fn is_known(&self, member: u64) -> bool {
        self.peer_connections.lock().get(&member).is_some_and(|connection| !connection.is_unknown)
    }

    fn is_removed(&self, member: u64) -> bool {
        self.removed.lock().contains(&member)
    }
}

impl MessageSender for Arc<Transport> {
    fn send(&self, messages: Vec<Message>) {
        let mut by_member: BTreeMap<u64, Vec<Message>> = BTreeMap::new();
        for message in messages {
            if message.msg_type == MessageType::MsgSnapshot {
                snapshot_transfer::send(self, message);
            } else {
                by_member.entry(message.to).or_default().push(message);
            }
        }
        let peer_connections = self.peer_connections.lock();
        for (member, messages) in by_member {
            if let Some(connection) = peer_connections.get(&member) {
                connection.outbox.push(messages);
            }
        }
    }

    fn set_peers(&self, members: Vec<Peer>, removed: Vec<u64>) {
        let (own, peers): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|member| member.id == self.parts.identity.member_id);
        if let Some(own) = own.into_iter().next() {
            *self.urls.lock() = own.urls;
        }
        let mut peer_connections = self.peer_connections.lock();
        let gone =
            peer_connections.extract_if(.., |member, connection| match peers.iter().find(|peer| peer.id == *member) {
                Some(peer) => peer.urls != connection.peer.urls,
                None => !connection.is_unknown || removed.contains(member),
            });
        for (member, connection) in gone {
            self.disconnect(member, &connection);
        }
        self.export_known_peers(peers.iter().map(|peer| peer.id), &removed);
        *self.removed.lock() = removed.into_iter().collect();
        for peer in peers {
            peer_connections.entry(peer.id).or_insert_with(|| PeerConnection::start(self.clone(), peer, false));
        }
    }
}

impl Transport {
    /// Connects to the first of a member's URLs that accepts a connection.
    fn dial(&self, peer: &Peer) -> Result<BlockingStream, String> {
        let mut last_error = format!("member {:x} has no URLs", peer.id);
        for url in &peer.urls {
            match self.dial_url(url) {
                Ok(stream) => return Ok(stream),
                Err(error) => last_error = format!("{url}: {error}"),
            }
        }
        Err(last_error)
    }

    /// Host names are resolved each time, because a member may move.
    fn dial_url(&self, url: &str) -> io::Result<BlockingStream> {
        let limits = self.parts.limits;
        let url = Url::parse(url).map_err(io::Error::other)?;
        let UrlAddress::Tcp { host, port } = url.address() else {
            return Err(io::Error::other("unix sockets between members are not supported yet"));
        };
        let mut last_error = io::Error::other("the host has no addresses");
        for address in (host.as_str(), *port).to_socket_addrs()? {
            let connected = BlockingStream::connect(&address, limits.dial).and_then(|stream| {
                if url.is_secure() {
                    self.parts.tls.connect_blocking(stream, host, Instant::now() + limits.dial)
                } else {
                    Ok(stream)
                }
            });
            match connected {
                Ok(stream) => return prepared(stream, limits),
                Err(error) => last_error = error,
            }
        }
        Err(last_error)
    }
}

/// Sets the timeouts that detect a peer which is gone without closing the connection.
fn prepared(stream: BlockingStream, limits: TransportLimits) -> io::Result<BlockingStream> {
    stream.set_read_timeout(Some(limits.dial))?;
    stream.set_write_timeout(Some(limits.write))?;
    stream.set_unacknowledged_timeout(limits.write)?;
    Ok(stream)
}
