//! Incoming streams.

use std::{
    io::{self, ErrorKind, Read},
    net::{IpAddr, Shutdown},
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{
    super::messages::Input,
    AdmittedConnection, ConnectionKind, Transport,
    accepted::Refusal,
    frame::{self, Header, Hello, ProtocolVersion, Purpose, Verdict},
    paced::Paced,
    peer_sessions::SessionGuard,
    prepared, snapshot_transfer, validate,
};
use crate::metrics::METRICS;
use crate::net::stream::BlockingStream;

/// A sender that has sent nothing for this long is gone: an idle one sends keep-alives.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How much a refused peer may still send while it is told the reason.
const DRAIN_BYTES: u64 = 1 << 20;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Frames from unknown members that are larger than this are read one at a time.
const LARGE_FRAME_BYTES: usize = 4 << 20;

/// The reason for closing a connection that has not identified itself.
const NOT_IDENTIFIED: &str = "it did not identify itself in time (--peer-hello-timeout)";

/// The metric label for the error that ended a stream.
fn reason(error: &io::Error) -> Option<&'static str> {
    let kind = error.kind();
    if kind == ErrorKind::InvalidData { Some("message") } else { (kind == ErrorKind::TimedOut).then_some("slow") }
}

impl Transport {
    /// Registers a connection that was accepted; None if it is refused because of a limit.
    pub fn admit(&self, socket: &impl AsFd, address: IpAddr) -> Option<AdmittedConnection> {
        match self.accepted.admit(socket, address) {
            Ok(Ok((admitted, has_evicted))) => {
                if has_evicted {
                    let limit = self.accepted.limits().before_hello;
                    let text = format!(
                        "closed in favour of a newer one: it had not identified itself (at most {limit} such connections)"
                    );
                    self.record_refusal("connections", 0, Some(address), &text);
                }
                Some(admitted)
            }
            Ok(Err(Refusal::Closed)) => None,
            Ok(Err(refusal)) => {
                self.record_refusal("connections", 0, Some(address), &refusal.to_string());
                None
            }
            Err(error) => {
                tracing::warn!(%error, "cannot register a peer's connection");
                None
            }
        }
    }

    /// Records that a connection to the peer port was closed because it did not identify itself in time.
    pub fn record_hello_timeout(&self, address: IpAddr) {
        self.record_refusal("slow", 0, Some(address), NOT_IDENTIFIED);
    }

    /// Counts a refusal, and logs it unless the same one was logged lately.
    pub(super) fn record_refusal(&self, reason: &str, member: u64, address: Option<IpAddr>, why: &str) {
        METRICS.peer_refused.with_label_values(&[reason]).inc();
        let address = address.map_or_else(String::new, |address| address.to_string());
        let key = if member == 0 { format!("{address}: {why}") } else { why.to_owned() };
        if let Some(repeated) = self.refusals.lock().should_log((member, key), Instant::now()) {
            let from = format!("{member:x}");
            tracing::warn!(
                { "remote-peer-id" = from, "remote-addr" = address, reason = why, repeated },
                "refused a peer"
            );
        }
    }

    /// Serves a connection that begins with the [`PREFACE`](super::PREFACE), on a new thread.
    pub fn receive(self: &Arc<Self>, stream: BlockingStream, admitted: AdmittedConnection) {
        let this = self.clone();
        let serve = move || {
            let address = admitted.address();
            let Err(error) = this.serve(stream, &admitted) else { return };
            if let Some(reason) = reason(&error) {
                return this.record_refusal(reason, 0, Some(address), &error.to_string());
            }
            let key = format!("{address}: {error}");
            if let Some(repeated) = this.refusals.lock().should_log((0, key), Instant::now()) {
                let address = address.to_string();
                tracing::warn!({ "remote-addr" = address, %error, repeated }, "lost a peer's stream");
            }
        };
        if let Err(error) = thread::Builder::new().name("from-peer".to_owned()).spawn(serve) {
            tracing::warn!(%error, "cannot start a thread for a peer's stream");
        }
    }

    fn serve(self: &Arc<Self>, stream: BlockingStream, admitted: &AdmittedConnection) -> io::Result<()> {
        let mut stream = prepared(stream, self.parts.limits)?;
        let hello = match read_hello(&stream, admitted) {
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(refuse_unreadable(stream, error)),
            hello => hello?,
        };
        let verdict = self.check_hello(&hello);
        if verdict != Verdict::Accepted {
            return self.refuse(&hello, &verdict, admitted, stream);
        }
        let is_known = self.is_known(hello.from);
        if is_known {
            self.note_request_bytes(hello.largest_request);
        }
        match hello.purpose {
            Purpose::Messages => {
                let address = stream.peer_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
                let session = match self.sessions.open(hello.from, hello.incarnation, &address) {
                    Ok(session) => session,
                    Err(why) => return self.refuse(&hello, &Verdict::Refused(why), admitted, stream),
                };
                if is_known {
                    admitted.set_kind(ConnectionKind::Member);
                } else if admitted.set_unknown() {
                    self.record_refusal(
                        "connections",
                        0,
                        None,
                        "too many connections of members that are not in the member list",
                    );
                }
                verdict.write(&mut stream)?;
                self.connect_back(&hello);
                let end = self.receive_frames(&hello, &session, &stream);
                if let Err(error) = &end
                    && error.kind() == ErrorKind::InvalidData
                {
                    METRICS.peer_received_failures.with_label_values(&[format!("{:x}", hello.from)]).inc();
                    // The sender reads it when it finds the stream closed.
                    let _ = Verdict::Refused(error.to_string()).write(&mut stream);
                }
                end
            }
            Purpose::Snapshot => {
                admitted.set_kind(ConnectionKind::Member);
                verdict.write(&mut stream)?;
                snapshot_transfer::receive(self, &hello, admitted, stream)
            }
        }
    }

    fn refuse(
        &self,
        hello: &Hello,
        verdict: &Verdict,
        admitted: &AdmittedConnection,
        mut stream: BlockingStream,
    ) -> io::Result<()> {
        self.record_refusal("identity", hello.from, Some(admitted.address()), verdict.text());
        verdict.write(&mut stream)
    }

    fn check_hello(&self, hello: &Hello) -> Verdict {
        let ours = self.parts.identity;
        if !hello.protocol_version.is_compatible_with(self.parts.protocol_version) {
            let (ProtocolVersion { version: (major, minor), .. }, theirs) =
                (self.parts.protocol_version, hello.protocol_version.version);
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
            // Raft would take messages with this member's ID for its own.
            return Verdict::Refused(format!("member ID mismatch: the sender cannot be {:x}", hello.from));
        }
        if hello.to != ours.member_id {
            let text = format!("member ID mismatch: this is {:x}, not {:x}", ours.member_id, hello.to);
            return Verdict::Refused(text);
        }
        Verdict::Accepted
    }

    fn receive_frames(&self, hello: &Hello, session: &SessionGuard<'_>, stream: &BlockingStream) -> io::Result<()> {
        stream.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
        let received = METRICS.peer_received_bytes.with_label_values(&[format!("{:x}", hello.from)]);
        let mut stream = Paced::new(stream, RECEIVE_TIMEOUT, self.parts.limits.min_bytes_per_second);
        loop {
            stream.restart();
            let header = Header::read(&mut stream, frame::max_bytes(self.largest_request.load(Ordering::Relaxed)))?;
            let is_large = header.length > LARGE_FRAME_BYTES;
            // Limits the memory for frames of unknown members, however many of them connect.
            let guard = (is_large && !self.is_known(hello.from)).then(|| self.unknown_member_frame.lock());
            let (mut messages, bytes) = header.read_messages(&mut stream)?;
            session.touch()?;
            received.inc_by(bytes);
            messages.iter().try_for_each(|it| validate::check(it, hello.from, hello.to)).map_err(frame::invalid)?;
            if self.is_removed(hello.from) {
                return Err(frame::invalid("the sender was removed from the cluster".to_owned()));
            }
            messages.retain(|message| message.from == hello.from || !self.is_removed(message.from));
            if !messages.is_empty() && self.parts.raft.send(Input::Messages(messages)).is_err() {
                return Ok(());
            }
            drop(guard);
        }
    }
}

/// Reads the handshake, up to the deadline of the connection.
fn read_hello(stream: &BlockingStream, admitted: &AdmittedConnection) -> io::Result<Hello> {
    let left = admitted.hello_deadline().saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    Hello::read(&mut Paced::new(stream, left, u64::MAX)).map_err(|error| {
        let is_late = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        if is_late { io::Error::new(ErrorKind::TimedOut, NOT_IDENTIFIED) } else { error }
    })
}

/// Sends the reason to a peer whose handshake cannot be read. Then reads the rest of what it sent: closing a connection with
/// unread data would discard the reason as well.
fn refuse_unreadable(mut stream: BlockingStream, error: io::Error) -> io::Error {
    let sent = Verdict::Refused(error.to_string()).write(&mut stream).and_then(|()| stream.shutdown(Shutdown::Write));
    let rest = sent.and_then(|()| stream.set_read_timeout(Some(DRAIN_TIMEOUT)));
    let _ = rest.and_then(|()| {
        let paced = Paced::new(&stream, DRAIN_TIMEOUT, DRAIN_BYTES);
        io::copy(&mut paced.take(DRAIN_BYTES), &mut io::sink())
    });
    error
}
