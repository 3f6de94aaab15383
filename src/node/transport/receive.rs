//! Streams that come in.

use std::{
    io::{self, ErrorKind, Read},
    net::{IpAddr, Shutdown, TcpStream},
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{
    super::driver::Input,
    Admitted, Stage, Transport,
    callers::Floor,
    connections::Refusal,
    frame::{self, Header, Hello, Purpose, Speech, Verdict},
    manners,
    paced::Paced,
    prepared, ship,
};
use crate::metrics::METRICS;

/// A sender that has said nothing for so long is gone: it would have said that it has nothing to say.
const SILENCE: Duration = Duration::from_secs(10);
/// Who is refused gets to read why, unless it goes on talking for longer than this.
const LAST_WORDS_BYTES: u64 = 1 << 20;
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);
/// Members that are not known here take turns with frames larger than this.
const LARGE_FRAME_BYTES: usize = 4 << 20;

/// Said of a connection that does not say what it is.
const SILENT: &str = "it has not said in time what it is (--peer-hello-timeout)";

/// Why a stream ended, by the label of the metric.
fn reason(error: &io::Error) -> Option<&'static str> {
    let kind = error.kind();
    if kind == ErrorKind::InvalidData { Some("message") } else { (kind == ErrorKind::TimedOut).then_some("slow") }
}

impl Transport {
    /// Takes note of a connection that was accepted; None if it is one too many.
    pub fn admit(&self, socket: &impl AsFd, address: IpAddr) -> Option<Admitted> {
        match self.connections.admit(socket, address) {
            Ok(Ok((admitted, has_evicted))) => {
                if has_evicted {
                    let limit = self.connections.limits().before_hello;
                    let text = format!(
                        "another connection came before it had said what it is (at most {limit} may be silent)"
                    );
                    self.note_refusal("connections", 0, Some(address), &text);
                }
                Some(admitted)
            }
            Ok(Err(Refusal::Closed)) => None,
            Ok(Err(refusal)) => {
                self.note_refusal("connections", 0, Some(address), &refusal.to_string());
                None
            }
            Err(error) => {
                tracing::warn!(%error, "cannot take over a peer's connection");
                None
            }
        }
    }

    /// A connection to the port for members has ended before it had said what it is.
    pub fn note_silent(&self, address: IpAddr) {
        self.note_refusal("slow", 0, Some(address), SILENT);
    }

    /// Counts a refusal, and writes a line unless there was one about the same lately.
    pub(super) fn note_refusal(&self, reason: &str, member: u64, address: Option<IpAddr>, why: &str) {
        METRICS.peer_refused.with_label_values(&[reason]).inc();
        let address = address.map_or_else(String::new, |address| address.to_string());
        let key = if member == 0 { format!("{address}: {why}") } else { why.to_owned() };
        if let Some(repeated) = self.refusals.lock().is_news(member, &key, Instant::now()) {
            let from = format!("{member:x}");
            tracing::warn!(
                { "remote-peer-id" = from, "remote-addr" = address, reason = why, repeated },
                "refused a peer"
            );
        }
    }

    /// Serves a connection that begins with the [`PREFACE`](super::PREFACE), on a thread of its own.
    pub fn receive(self: &Arc<Self>, stream: TcpStream, admitted: Admitted) {
        let this = self.clone();
        let serve = move || {
            let address = admitted.address();
            let Err(error) = this.serve(stream, &admitted) else { return };
            if let Some(reason) = reason(&error) {
                return this.note_refusal(reason, 0, Some(address), &error.to_string());
            }
            let key = format!("{address}: {error}");
            if let Some(repeated) = this.refusals.lock().is_news(0, &key, Instant::now()) {
                let address = address.to_string();
                tracing::warn!({ "remote-addr" = address, %error, repeated }, "lost a peer's stream");
            }
        };
        if let Err(error) = thread::Builder::new().name("from-peer".to_owned()).spawn(serve) {
            tracing::warn!(%error, "cannot start a thread for a peer's stream");
        }
    }

    fn serve(self: &Arc<Self>, stream: TcpStream, admitted: &Admitted) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let mut stream = prepared(stream, self.parts.patience)?;
        let hello = match read_hello(&stream, admitted) {
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(dismiss(stream, error)),
            hello => hello?,
        };
        let verdict = self.judge(&hello);
        if verdict != Verdict::Welcome {
            return self.refuse(&hello, &verdict, admitted, stream);
        }
        let is_known = self.is_known(hello.from);
        if is_known {
            self.note_request(hello.largest_request);
        }
        match hello.purpose {
            Purpose::Messages => {
                let address = stream.peer_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
                let floor = match self.callers.enter(hello.from, hello.life, &address) {
                    Ok(floor) => floor,
                    Err(why) => return self.refuse(&hello, &Verdict::Refused(why), admitted, stream),
                };
                if is_known {
                    admitted.set_stage(Stage::Stream);
                } else if admitted.set_guest() {
                    self.note_refusal("connections", 0, None, "too many members call that are not known here");
                }
                verdict.write(&mut stream)?;
                self.greet(&hello);
                let end = self.listen(&hello, &floor, &stream);
                if let Err(error) = &end
                    && error.kind() == ErrorKind::InvalidData
                {
                    // It learns of it when its next frame finds the stream closed.
                    let _ = Verdict::Refused(error.to_string()).write(&mut stream);
                }
                end
            }
            Purpose::Snapshot => {
                admitted.set_stage(Stage::Stream);
                verdict.write(&mut stream)?;
                ship::receive(self, &hello, admitted, stream)
            }
        }
    }

    fn refuse(&self, hello: &Hello, verdict: &Verdict, admitted: &Admitted, mut stream: TcpStream) -> io::Result<()> {
        self.note_refusal("identity", hello.from, Some(admitted.address()), verdict.text());
        verdict.write(&mut stream)
    }

    fn judge(&self, hello: &Hello) -> Verdict {
        let ours = self.parts.identity;
        if !hello.speech.agrees_with(self.parts.speech) {
            let (Speech { version: (major, minor), .. }, theirs) = (self.parts.speech, hello.speech.version);
            let text = format!("incompatible version: this is {major}.{minor}, not {}.{}", theirs.0, theirs.1);
            return Verdict::Refused(text);
        }
        if hello.cluster != ours.cluster_id {
            let text = format!("cluster ID mismatch: this is {:x}, not {:x}", ours.cluster_id, hello.cluster);
            return Verdict::Refused(text);
        }
        if self.is_removed(hello.from) {
            return Verdict::Removed;
        }
        if hello.from == 0 || hello.from == ours.member_id {
            // Raft takes what comes in this member's own name for its own.
            return Verdict::Refused(format!("member ID mismatch: the caller cannot be {:x}", hello.from));
        }
        if hello.to != ours.member_id {
            let text = format!("member ID mismatch: this is {:x}, not {:x}", ours.member_id, hello.to);
            return Verdict::Refused(text);
        }
        Verdict::Welcome
    }

    fn listen(&self, hello: &Hello, floor: &Floor<'_>, stream: &TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(SILENCE))?;
        let received = METRICS.peer_received_bytes.with_label_values(&[format!("{:x}", hello.from)]);
        let mut stream = Paced::new(stream, SILENCE, self.parts.patience.min_bytes_per_second);
        loop {
            stream.start_over();
            let header = Header::read(&mut stream, frame::max_bytes(self.largest_request.load(Ordering::Relaxed)))?;
            let is_large = header.length > LARGE_FRAME_BYTES;
            // So what callers without a name can make this member hold does not grow with their number.
            let turn = (is_large && !self.is_known(hello.from)).then(|| self.large_guest_frame.lock());
            let (mut messages, bytes) = header.read_messages(&mut stream)?;
            floor.heard()?;
            received.inc_by(bytes);
            messages.iter().try_for_each(|it| manners::check(it, hello.from, hello.to)).map_err(frame::invalid)?;
            if self.is_removed(hello.from) {
                return Err(frame::invalid("the sender was removed from the cluster".to_owned()));
            }
            messages.retain(|message| message.from == hello.from || !self.is_removed(message.from));
            if !messages.is_empty() && self.parts.raft.send(Input::Messages(messages)).is_err() {
                return Ok(());
            }
            drop(turn);
        }
    }
}

/// Who calls, if it says so in time.
fn read_hello(stream: &TcpStream, admitted: &Admitted) -> io::Result<Hello> {
    let left = admitted.hello_deadline().saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    Hello::read(&mut Paced::new(stream, left, u64::MAX)).map_err(|error| {
        let is_late = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        if is_late { io::Error::new(ErrorKind::TimedOut, SILENT) } else { error }
    })
}

/// Tells a caller that cannot be understood what is wrong. Whatever else it has said is read first: a connection that is
/// closed with something unread takes the answer with it.
fn dismiss(mut stream: TcpStream, error: io::Error) -> io::Error {
    let told = Verdict::Refused(error.to_string()).write(&mut stream).and_then(|()| stream.shutdown(Shutdown::Write));
    let rest = told.and_then(|()| stream.set_read_timeout(Some(LAST_WORDS_TIME)));
    let _ = rest.and_then(|()| {
        let paced = Paced::new(&stream, LAST_WORDS_TIME, LAST_WORDS_BYTES);
        io::copy(&mut paced.take(LAST_WORDS_BYTES), &mut io::sink())
    });
    error
}
