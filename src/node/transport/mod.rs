//! Between members: one long-lived stream per pair and direction, and a connection of its own for each snapshot.
//!
//! ```text
//! raft, log ──send──▶ Outbox ──take──▶ line's thread ══ frames ══▶ receiver's thread ──▶ the other's raft inbox
//! ```
//!
//! A thread for each line writes what its outbox holds, all of it with one system call; a thread for each stream that comes
//! in reads frame after frame. Both block, which is the cheapest way to wait, and a cluster has few members. What cannot be
//! carried is lost and raft is told so once; nothing here waits for a member that does not listen, and nothing that is sent
//! waits in unbounded memory.
//!
//! Who calls says to which cluster it belongs, who it is and whom it wants; who was removed, belongs elsewhere or speaks
//! another language is refused with a line on both sides. It also says where it can be reached: a member that was away may
//! not know it yet, and hears of it from nobody else if the caller leads.

mod callers;
mod connections;
mod frame;
mod line;
mod manners;
mod outbox;
mod paced;
mod receive;
mod refusals;
mod ship;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use parking_lot::Mutex;
use raft::eraftpb::{Message, MessageType};

use super::{
    driver::Input,
    inbox::Inbox,
    links::Links,
    log::Identity,
    peers::{Peer, Post},
    snapshot::{Incoming, Scratch, Shelf},
};
use crate::{error::Halt, metrics::METRICS};
use callers::Callers;
pub use connections::{Admitted, ConnectionLimits, Stage};
use connections::{Connections, MOST_GUESTS};
use frame::Hello;
pub use frame::{PREFACE, Speech};
use line::Line;
pub use manners::check;
use refusals::Refusals;
use ship::Receiving;

/// Where the copies of other members' databases go.
pub trait Depot: Send + Sync {
    /// A directory, not there yet, for the copy as of an index.
    fn place(&self, index: u64) -> Scratch;

    /// How many bytes the disk still takes.
    fn free_bytes(&self) -> std::io::Result<u64>;

    /// Opens what was put there, and has been made durable.
    fn open(&self, files: Scratch) -> Result<Incoming, Halt>;
}

/// How patient and how large the transport is.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// To connect to a member.
    pub dial: Duration,
    /// For a member to take what is sent to it, before the connection counts as broken.
    pub write: Duration,
    /// For either side of a snapshot, while the other one is busy with its disk.
    pub stall: Duration,
    /// Bytes of a snapshot per second.
    pub snapshot_rate: u64,
    /// Bytes that may wait for one member.
    pub queue_bytes: usize,
    /// A sender of a frame or of a snapshot that is slower than so many bytes a second is given up.
    pub min_bytes_per_second: u64,
}

/// What the transport is made of.
pub struct Parts {
    /// Whose it is.
    pub identity: Identity,
    /// What this member speaks.
    pub speech: Speech,
    /// The raft thread's ear.
    pub raft: Arc<Inbox<Input>>,
    /// Who is told which members are connected.
    pub links: Arc<Links>,
    /// Where copies of the database lie that raft wants sent.
    pub shelf: Arc<Shelf>,
    /// Where copies go that come in.
    pub depot: Box<dyn Depot>,
    /// Called when the others say that this member was removed.
    pub farewell: Arc<dyn Fn() + Send + Sync>,
    /// Whether raft is told that it need not wait for its first election, once there is company.
    pub hurries: bool,
    /// How long it waits.
    pub patience: Patience,
    /// How many connections there may be.
    pub connections: ConnectionLimits,
    /// The largest request that this member takes, in bytes.
    pub max_request_bytes: u64,
}

/// Carries messages between this member and all others.
pub struct Transport {
    parts: Parts,
    lines: Mutex<BTreeMap<u64, Arc<Line>>>,
    removed: Mutex<BTreeSet<u64>>,
    /// Where this member can be reached, as the others know it.
    urls: Mutex<Vec<String>>,
    /// A snapshot is coming in: one at a time.
    receiving: Receiving,
    /// Large frames of members that are not known here are read one at a time.
    large_guest_frame: Mutex<()>,
    /// Connections that are open.
    connections: Connections,
    /// The largest request that is known to be allowed anywhere among the members.
    largest_request: AtomicU64,
    /// Who speaks on them.
    callers: Callers,
    /// Tells this process from others that the member has been, or that think they are it.
    life: u64,
    /// Whoever was not welcome.
    refusals: Mutex<Refusals>,
    /// The first election may come sooner, and has not yet.
    hurries: AtomicBool,
}

impl Transport {
    /// A transport that knows nobody yet.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let hurries = AtomicBool::new(parts.hurries);
        let connections = Connections::new(parts.connections);
        let largest_request = AtomicU64::new(parts.max_request_bytes.min(frame::REQUEST_BYTES_MOST));
        Arc::new(Self {
            parts,
            lines: Mutex::default(),
            removed: Mutex::default(),
            urls: Mutex::default(),
            receiving: Receiving::default(),
            large_guest_frame: Mutex::default(),
            connections,
            largest_request,
            callers: Callers::default(),
            life: rand::random(),
            refusals: Mutex::default(),
            hurries,
        })
    }

    /// Ends all lines and all streams that come in.
    pub fn stop(&self) {
        self.connections.close();
        for line in std::mem::take(&mut *self.lines.lock()).into_values() {
            line.close();
        }
    }

    fn line(&self, member: u64) -> Option<Arc<Line>> {
        self.lines.lock().get(&member).cloned()
    }

    /// Lets a caller be answered that is not known here yet: it joined while this member was away, and may be the only one
    /// who can tell it so. Of those that were answered so far, the ones that call no longer give way.
    fn greet(self: &Arc<Self>, hello: &Hello) {
        let mut lines = self.lines.lock();
        if hello.urls.is_empty() || lines.contains_key(&hello.from) {
            return;
        }
        if lines.values().filter(|line| line.is_guest).count() >= MOST_GUESTS {
            let is_silent = |member: &u64, line: &mut Arc<Line>| line.is_guest && !self.callers.speaks(*member);
            for (member, line) in lines.extract_if(.., is_silent) {
                self.hang_up(member, &line);
            }
        }
        let peer = Peer { id: hello.from, urls: hello.urls.clone() };
        lines.insert(hello.from, Line::start(self.clone(), peer, true));
    }

    /// Ends a line, and says so to all who counted on it.
    fn hang_up(&self, member: u64, line: &Line) {
        if line.close() {
            // What waited is lost, and nothing can be sent until there is another line.
            METRICS
                .active_peers
                .with_label_values(&[&format!("{:x}", self.parts.identity.member_id), &format!("{member:x}")])
                .set(0);
            let _ = self.parts.raft.send(Input::Unreachable(member));
        }
    }

    /// Whether a caller is a member, as far as this one knows.
    fn is_known(&self, member: u64) -> bool {
        self.lines.lock().get(&member).is_some_and(|line| !line.is_guest)
    }

    fn is_removed(&self, member: u64) -> bool {
        self.removed.lock().contains(&member)
    }
}

impl Post for Arc<Transport> {
    fn send(&self, messages: Vec<Message>) {
        let mut letters: BTreeMap<u64, Vec<Message>> = BTreeMap::new();
        for message in messages {
            if message.msg_type == MessageType::MsgSnapshot {
                ship::send(self, message);
            } else {
                letters.entry(message.to).or_default().push(message);
            }
        }
        let lines = self.lines.lock();
        for (member, messages) in letters {
            if let Some(line) = lines.get(&member) {
                line.outbox.push(messages);
            }
        }
    }

    fn set_peers(&self, members: Vec<Peer>, removed: Vec<u64>) {
        let (own, peers): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|member| member.id == self.parts.identity.member_id);
        if let Some(own) = own.into_iter().next() {
            *self.urls.lock() = own.urls;
        }
        let mut lines = self.lines.lock();
        let gone = lines.extract_if(.., |member, line| match peers.iter().find(|peer| peer.id == *member) {
            Some(peer) => peer.urls != line.peer.urls,
            None => !line.is_guest || removed.contains(member),
        });
        for (member, line) in gone {
            self.hang_up(member, &line);
        }
        *self.removed.lock() = removed.into_iter().collect();
        for peer in peers {
            lines.entry(peer.id).or_insert_with(|| Line::start(self.clone(), peer, false));
        }
    }
}

/// The addresses behind a member's URL. Names are looked up each time: members move.
fn addresses(url: &str) -> Result<Vec<SocketAddr>, String> {
    let place =
        url.strip_prefix("http://").ok_or_else(|| format!("{url}: only http is supported between members yet"))?;
    let found = place.to_socket_addrs().map_err(|error| format!("{url}: {error}"))?;
    Ok(found.collect())
}

/// Connects to the first of a member's URLs that answers.
fn dial(peer: &Peer, patience: Patience) -> Result<TcpStream, String> {
    let mut trouble = format!("member {:x} has no URLs", peer.id);
    for url in &peer.urls {
        match addresses(url) {
            Ok(addresses) => {
                for address in addresses {
                    match TcpStream::connect_timeout(&address, patience.dial) {
                        Ok(stream) => return prepared(stream, patience).map_err(|error| format!("{url}: {error}")),
                        Err(error) => trouble = format!("{url}: {error}"),
                    }
                }
            }
            Err(error) => trouble = error,
        }
    }
    Err(trouble)
}

/// Sends at once, and notices when the other side has gone without a word.
fn prepared(stream: TcpStream, patience: Patience) -> std::io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience.dial))?;
    stream.set_write_timeout(Some(patience.write))?;
    let unacknowledged_ms = u32::try_from(patience.write.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(&stream, unacknowledged_ms)?;
    Ok(stream)
}
