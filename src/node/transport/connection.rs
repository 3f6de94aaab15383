//! The outgoing connection to one member: connects, sends the handshake, writes the content of the outbox, and reconnects.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use prometheus::IntCounter;

use super::{
    super::messages::{Input, Peer},
    Transport,
    frame::{self, Hello, Purpose, Verdict},
    outbox::Outbox,
};
use crate::metrics::METRICS;
use crate::net::stream::BlockingStream;

/// The delay before reconnecting: doubled after each failure, from the first value up to the second.
const MIN_RECONNECT_DELAY: Duration = Duration::from_millis(50);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);
/// An empty frame is sent after this long without messages.
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait for the reason a peer gave before it closed the stream.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(100);
/// The target size of a frame. It is limited because a received entry keeps its whole frame in memory.
const TARGET_FRAME_BYTES: usize = 1 << 20;
/// An unreachable member is logged again after this many attempts, or when the reason changes.
const LOG_EVERY_FAILURES: u32 = 60;

/// The outgoing connection to a peer, with its queue and its thread.
pub(super) struct PeerConnection {
    pub peer: Peer,
    /// It has connected to this member, but is not in this member's member list.
    pub is_unknown: bool,
    pub outbox: Outbox,
    /// The largest frame that was announced to the peer.
    frame_max_bytes: AtomicUsize,
}

enum ConnectError {
    /// The connection could not be established; it is retried.
    Failed(String),
    /// The peer says that this member was removed from the cluster.
    Removed,
}

impl PeerConnection {
    /// Starts the thread that connects to the peer.
    pub fn start(transport: Arc<Transport>, peer: Peer, is_unknown: bool) -> Arc<Self> {
        let outbox = Outbox::new(transport.parts.limits.queue_bytes);
        let connection = Arc::new(Self { peer, is_unknown, outbox, frame_max_bytes: AtomicUsize::new(0) });
        let running = connection.clone();
        thread::Builder::new()
            .name(format!("to-{:x}", connection.peer.id))
            .spawn(move || running.run(&transport))
            .expect("the system can start a thread per member");
        connection
    }

    /// Stops the thread, without waiting for it. It sends nothing to raft from now on. Returns whether it was connected.
    pub fn close(&self) -> bool {
        self.outbox.close()
    }

    fn run(&self, transport: &Arc<Transport>) {
        let (mut delay, mut failures, mut reported) = (MIN_RECONNECT_DELAY, 0_u32, String::new());
        let member = format!("{:x}", self.peer.id);
        loop {
            let reason = match self.connect(transport) {
                Ok(stream) => {
                    (delay, failures) = (MIN_RECONNECT_DELAY, 0);
                    tracing::info!("remote-peer-id" = member, "established a stream with peer");
                    match self.serve(transport, stream, &member) {
                        Ok(()) => return,
                        Err(error) => error.to_string(),
                    }
                }
                Err(ConnectError::Removed) => {
                    let message = "the member has been permanently removed from the cluster";
                    tracing::warn!("remote-peer-id" = member, "{message}");
                    (transport.parts.on_removed)();
                    "removed".to_owned()
                }
                Err(ConnectError::Failed(error)) => error,
            };
            if reason != reported || failures.is_multiple_of(LOG_EVERY_FAILURES) {
                tracing::warn!("remote-peer-id" = member, error = reason, "lost or cannot reach a peer");
                reported = reason;
            }
            failures = failures.wrapping_add(1);
            if self.outbox.wait_closed(delay) {
                return;
            }
            delay = (delay * 2).min(MAX_RECONNECT_DELAY);
        }
    }

    /// Sends messages until the connection fails; returns `Ok` if [`close`](Self::close) was called.
    ///
    /// After `close` nothing is reported to raft: there may be a new connection to the same member, and raft could not tell the
    /// reports apart.
    fn serve(&self, transport: &Transport, stream: BlockingStream, member: &str) -> io::Result<()> {
        let since = Instant::now();
        let local = format!("{:x}", transport.parts.identity.member_id);
        let names = [local.as_str(), member];
        let others = transport.peer_connections.lock().len();
        self.outbox.set_connected(true);
        let on_up = || {
            transport.on_connected(self.peer.id, since, others);
            METRICS.active_peers.with_label_values(&names).set(1);
        };
        if !self.outbox.run_if_open(on_up) {
            return Ok(());
        }
        let end = self.write_frames(transport, stream, &METRICS.peer_sent_bytes.with_label_values(&names[1..]));
        transport.parts.connectivity.disconnected(self.peer.id, since);
        let on_down = || {
            METRICS.active_peers.with_label_values(&names).set(0);
            METRICS.disconnected_peers.with_label_values(&names).inc();
            let _ = transport.parts.raft.send(Input::Unreachable(self.peer.id));
        };
        let is_open = self.outbox.run_if_open(on_down);
        self.outbox.set_connected(false);
        if is_open { end } else { Ok(()) }
    }

    fn connect(&self, transport: &Transport) -> Result<BlockingStream, ConnectError> {
        let mut stream = transport.dial(&self.peer).map_err(ConnectError::Failed)?;
        let hello = transport.hello(Purpose::Messages, self.peer.id);
        self.frame_max_bytes.store(frame::max_bytes(hello.largest_request), Ordering::Relaxed);
        let verdict = hello.write(&mut stream).and_then(|()| Verdict::read(&mut stream));
        let handshake_error = |error: io::Error| {
            if error.kind() == io::ErrorKind::WouldBlock {
                "handshake failed: it sent no reply in time; it hangs, or is not a metastore".to_owned()
            } else if error.kind() == io::ErrorKind::UnexpectedEof {
                "handshake failed: it closed the connection".to_owned()
            } else {
                format!("handshake failed: {error}")
            }
        };
        match verdict.map_err(|error| ConnectError::Failed(handshake_error(error)))? {
            Verdict::Accepted => Ok(stream),
            Verdict::Removed => Err(ConnectError::Removed),
            Verdict::Refused(text) => Err(ConnectError::Failed(format!("the peer refused this member: {text}"))),
        }
    }

    /// Writes frames until [`close`](Self::close) is called or the connection fails.
    fn write_frames(&self, transport: &Transport, mut stream: BlockingStream, sent: &IntCounter) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            let batch = self.outbox.take(KEEPALIVE_INTERVAL);
            if batch.closed {
                return Ok(());
            }
            if batch.lost {
                METRICS.peer_sent_failures.with_label_values(&[format!("{:x}", self.peer.id)]).inc();
                let _ = transport.parts.raft.send(Input::Lost(self.peer.id));
            }
            let mut rest = batch.messages.as_slice();
            loop {
                let (frame, later) = rest.split_at(frame_len(rest));
                let begin = bytes.len();
                frame::encode(frame, &mut bytes);
                if bytes.len() - begin > self.frame_max_bytes.load(Ordering::Relaxed) {
                    // An entry from a member with a higher limit, which the peer may not know: the next handshake tells it.
                    transport.note_request_bytes((bytes.len() - begin) as u64);
                    return Err(io::Error::other(
                        "an entry exceeds the limit announced to the peer: announcing a higher one",
                    ));
                }
                rest = later;
                if bytes.len() >= TARGET_FRAME_BYTES || rest.is_empty() {
                    stream.write_all(&bytes).map_err(|error| refusal_reason(&mut stream, error))?;
                    sent.inc_by(bytes.len() as u64);
                    bytes.clear();
                }
                if rest.is_empty() {
                    break;
                }
            }
            bytes.shrink_to(2 * TARGET_FRAME_BYTES);
        }
    }
}

/// The reason that the peer gave for closing the stream, or else `error`.
fn refusal_reason(stream: &mut BlockingStream, error: io::Error) -> io::Error {
    let reply = stream.set_read_timeout(Some(REFUSAL_TIMEOUT)).and_then(|()| Verdict::read(stream));
    match reply {
        Ok(Verdict::Refused(text)) => io::Error::other(format!("the peer refused what it was sent: {text}")),
        _ => error,
    }
}

fn frame_len(messages: &[raft::eraftpb::Message]) -> usize {
    let mut bytes = 0;
    let fits = messages.iter().take_while(|message| {
        let first = bytes == 0;
        bytes += 64 + message.entries.iter().map(|entry| entry.data.len() + 32).sum::<usize>();
        first || bytes <= TARGET_FRAME_BYTES
    });
    fits.count()
}

impl Transport {
    pub(super) fn hello(&self, purpose: Purpose, to: u64) -> Hello {
        let identity = self.parts.identity;
        let (cluster, from) = (identity.cluster_id, identity.member_id);
        let (incarnation, protocol_version) = (self.incarnation, self.parts.protocol_version);
        let largest_request = self.largest_request.load(Ordering::Relaxed);
        Hello {
            purpose,
            cluster,
            from,
            to,
            incarnation,
            largest_request,
            protocol_version,
            urls: self.urls.lock().clone(),
        }
    }

    /// Notes that members may forward requests of this size.
    pub(super) fn note_request_bytes(&self, bytes: u64) {
        self.largest_request.fetch_max(bytes.min(frame::MAX_REQUEST_BYTES), Ordering::Relaxed);
    }

    /// A connection is established. With enough of them, a member that has just started need not wait for the others to call an
    /// election.
    fn on_connected(&self, member: u64, since: Instant, others: usize) {
        let active = self.parts.connectivity.connected(member, since);
        let _ = self.parts.raft.send(Input::Reachable(member));
        if active >= others.min(2) && self.advance_first_election.swap(false, Ordering::Relaxed) {
            let _ = self.parts.raft.send(Input::ShortenElection);
        }
    }
}
