//! The line to one member: connects, says who it is, writes what its outbox holds, and connects again.

use std::{
    io::{self, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use prometheus::IntCounter;

use super::{
    super::{driver::Input, peers::Peer},
    Transport, dial,
    frame::{self, Hello, Purpose, Verdict},
    outbox::Outbox,
};
use crate::metrics::METRICS;

/// Between two attempts to connect, at first and at most.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A line that has nothing to say says so this often.
pub(super) const SILENCE: Duration = Duration::from_secs(1);
/// What a peer said before it closed the stream is there by now.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// Frames are cut about here: entries keep the whole frame in memory that they came in.
const FRAME_BYTES: usize = 1 << 20;
/// A member that cannot be reached is reported again after so many attempts, or when there is another reason.
const REPORTED_EVERY: u32 = 60;

/// One member as it is reached from here.
pub(super) struct Line {
    pub peer: Peer,
    /// It has called, but is no member as far as this one knows.
    pub is_guest: bool,
    pub outbox: Outbox,
    /// What the peer was told that frames may have.
    frame_max_bytes: AtomicUsize,
}

/// Why a line does not stand.
enum Trouble {
    /// It may get better.
    Broken(String),
    /// The others have removed this member.
    Removed,
}

impl Line {
    /// Starts the thread of a line.
    pub fn start(transport: Arc<Transport>, peer: Peer, is_guest: bool) -> Arc<Self> {
        let outbox = Outbox::new(transport.parts.patience.queue_bytes);
        let line = Arc::new(Self { peer, is_guest, outbox, frame_max_bytes: AtomicUsize::new(0) });
        let running = line.clone();
        thread::Builder::new()
            .name(format!("to-{:x}", line.peer.id))
            .spawn(move || running.run(&transport))
            .expect("the system has room for a thread per member");
        line
    }

    /// Ends it, soon. From now on it says nothing to raft; says whether it had been connected.
    pub fn close(&self) -> bool {
        self.outbox.close()
    }

    fn run(&self, transport: &Arc<Transport>) {
        let (mut pause, mut failures, mut reported) = (PAUSE, 0_u32, String::new());
        let member = format!("{:x}", self.peer.id);
        loop {
            let trouble = match self.connect(transport) {
                Ok(stream) => {
                    (pause, failures) = (PAUSE, 0);
                    tracing::info!("remote-peer-id" = member, "established a stream with peer");
                    match self.serve(transport, stream, &member) {
                        Ok(()) => return,
                        Err(error) => error.to_string(),
                    }
                }
                Err(Trouble::Removed) => {
                    let message = "the member has been permanently removed from the cluster";
                    tracing::warn!("remote-peer-id" = member, "{message}");
                    (transport.parts.farewell)();
                    "removed".to_owned()
                }
                Err(Trouble::Broken(trouble)) => trouble,
            };
            if trouble != reported || failures.is_multiple_of(REPORTED_EVERY) {
                tracing::warn!("remote-peer-id" = member, error = trouble, "lost or cannot reach a peer");
                reported = trouble;
            }
            failures = failures.wrapping_add(1);
            if self.outbox.rest(pause) {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Carries messages as long as the connection stands; `Ok` if the line was closed.
    ///
    /// A line that was closed has a successor, or its member is gone: what it would still say to raft could be taken for
    /// news of its successor.
    fn serve(&self, transport: &Transport, stream: TcpStream, member: &str) -> io::Result<()> {
        let since = Instant::now();
        let local = format!("{:x}", transport.parts.identity.member_id);
        let names = [local.as_str(), member];
        let others = transport.lines.lock().len();
        self.outbox.set_connected(true);
        let stands = || {
            transport.linked(self.peer.id, since, others);
            METRICS.active_peers.with_label_values(&names).set(1);
        };
        if !self.outbox.while_open(stands) {
            return Ok(());
        }
        let end = self.pump(transport, stream, &METRICS.peer_sent_bytes.with_label_values(&names[1..]));
        transport.parts.links.down(self.peer.id, since);
        let fell = || {
            METRICS.active_peers.with_label_values(&names).set(0);
            METRICS.disconnected_peers.with_label_values(&names).inc();
            let _ = transport.parts.raft.send(Input::Unreachable(self.peer.id));
        };
        let is_open = self.outbox.while_open(fell);
        self.outbox.set_connected(false);
        if is_open { end } else { Ok(()) }
    }

    fn connect(&self, transport: &Transport) -> Result<TcpStream, Trouble> {
        let mut stream = dial(&self.peer, transport.parts.patience).map_err(Trouble::Broken)?;
        let hello = transport.hello(Purpose::Messages, self.peer.id);
        self.frame_max_bytes.store(frame::max_bytes(hello.largest_request), Ordering::Relaxed);
        let verdict = hello.write(&mut stream).and_then(|()| Verdict::read(&mut stream));
        let no_welcome = |error: io::Error| {
            if error.kind() == io::ErrorKind::WouldBlock {
                "no welcome: it hangs, or is no metastore".to_owned()
            } else if error.kind() == io::ErrorKind::UnexpectedEof {
                "no welcome: it closed the connection".to_owned()
            } else {
                format!("no welcome: {error}")
            }
        };
        match verdict.map_err(|error| Trouble::Broken(no_welcome(error)))? {
            Verdict::Welcome => Ok(stream),
            Verdict::Removed => Err(Trouble::Removed),
            Verdict::Refused(text) => Err(Trouble::Broken(format!("the peer refused this member: {text}"))),
        }
    }

    /// Writes until the line is closed or breaks.
    fn pump(&self, transport: &Transport, mut stream: TcpStream, sent: &IntCounter) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            let batch = self.outbox.take(SILENCE);
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
                    // An entry from a member that allows more, of which the peer may not have heard.
                    transport.note_request((bytes.len() - begin) as u64);
                    return Err(io::Error::other("an entry is larger than the peer was told: it has to be told first"));
                }
                rest = later;
                if bytes.len() >= FRAME_BYTES || rest.is_empty() {
                    stream.write_all(&bytes).map_err(|error| last_words(&mut stream, error))?;
                    sent.inc_by(bytes.len() as u64);
                    bytes.clear();
                }
                if rest.is_empty() {
                    break;
                }
            }
            bytes.shrink_to(2 * FRAME_BYTES);
        }
    }
}

/// Why the other side has closed the stream, if it has said so.
fn last_words(stream: &mut TcpStream, error: io::Error) -> io::Error {
    let heard = stream.set_read_timeout(Some(LAST_WORDS)).and_then(|()| Verdict::read(stream));
    match heard {
        Ok(Verdict::Refused(text)) => io::Error::other(format!("the peer refused what it was sent: {text}")),
        _ => error,
    }
}

fn frame_len(messages: &[raft::eraftpb::Message]) -> usize {
    let mut bytes = 0;
    let fits = messages.iter().take_while(|message| {
        let first = bytes == 0;
        bytes += 64 + message.entries.iter().map(|entry| entry.data.len() + 32).sum::<usize>();
        first || bytes <= FRAME_BYTES
    });
    fits.count()
}

impl Transport {
    pub(super) fn hello(&self, purpose: Purpose, to: u64) -> Hello {
        let identity = self.parts.identity;
        let (cluster, from) = (identity.cluster_id, identity.member_id);
        let (life, speech) = (self.life, self.parts.speech);
        let largest_request = self.largest_request.load(Ordering::Relaxed);
        Hello { purpose, cluster, from, to, life, largest_request, speech, urls: self.urls.lock().clone() }
    }

    /// Requests of so many bytes may be passed on between members.
    pub(super) fn note_request(&self, bytes: u64) {
        self.largest_request.fetch_max(bytes.min(frame::REQUEST_BYTES_MOST), Ordering::Relaxed);
    }

    /// A line stands. With company a member that has just started need not wait for the others to call an election.
    fn linked(&self, member: u64, since: Instant, others: usize) {
        let active = self.parts.links.up(member, since);
        let _ = self.parts.raft.send(Input::Reachable(member));
        if active >= others.min(2) && self.hurries.swap(false, Ordering::Relaxed) {
            let _ = self.parts.raft.send(Input::Hurry);
        }
    }
}
