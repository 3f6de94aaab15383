//! Streams that come in.

use std::{
    io::{self, Read},
    net::{Shutdown, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    super::driver::Input,
    Transport,
    callers::Floor,
    frame::{self, Hello, Purpose, Speech, Verdict},
    manners, prepared, ship,
    streams::MOST_STREAMS,
};
use crate::metrics::METRICS;

/// A sender that has said nothing for so long is gone: it would have said that it has nothing to say.
const SILENCE: Duration = Duration::from_secs(10);

/// Who is refused gets to read why, unless it goes on talking for longer than this.
const LAST_WORDS_BYTES: u64 = 1 << 20;

impl Transport {
    /// Serves a connection that begins with the [`PREFACE`](super::PREFACE), on a thread of its own.
    pub fn receive(self: &Arc<Self>, stream: TcpStream) {
        let Some(served) = self.streams.enter(&stream) else {
            return tracing::warn!(
                most = MOST_STREAMS,
                "a peer's stream is closed: there are too many, or this member ends"
            );
        };
        let this = self.clone();
        let serve = move || {
            let _served = served;
            let address = stream.peer_addr().map_or_else(|_| "somebody".to_owned(), |address| address.to_string());
            if let Err(error) = this.serve(stream, &address) {
                tracing::warn!("remote-addr" = address, %error, "lost a peer's stream");
            }
        };
        if let Err(error) = thread::Builder::new().name("from-peer".to_owned()).spawn(serve) {
            tracing::warn!(%error, "cannot start a thread for a peer's stream");
        }
    }

    fn serve(self: Arc<Self>, stream: TcpStream, address: &str) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let mut stream = prepared(stream, self.parts.patience)?;
        let hello = match Hello::read(&mut stream) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(dismiss(stream, error)),
            hello => hello?,
        };
        let verdict = self.judge(&hello);
        if verdict != Verdict::Welcome {
            return self.refuse(&hello, &verdict, stream);
        }
        match hello.purpose {
            Purpose::Messages => {
                let floor = match self.callers.enter(hello.from, hello.life, address) {
                    Ok(floor) => floor,
                    Err(why) => return self.refuse(&hello, &Verdict::Refused(why), stream),
                };
                verdict.write(&mut stream)?;
                self.greet(&hello);
                let end = self.listen(&hello, &floor, &mut stream);
                if let Err(error) = &end
                    && error.kind() == io::ErrorKind::InvalidData
                {
                    // It learns of it when its next frame finds the stream closed.
                    let _ = Verdict::Refused(error.to_string()).write(&mut stream);
                }
                end
            }
            Purpose::Snapshot => {
                verdict.write(&mut stream)?;
                ship::receive(&self, &hello, stream)
            }
        }
    }

    fn refuse(&self, hello: &Hello, verdict: &Verdict, mut stream: TcpStream) -> io::Result<()> {
        let why = verdict.text().to_owned();
        if let Some(repeated) = self.refusals.lock().is_news(hello.from, &why, Instant::now()) {
            let from = format!("{:x}", hello.from);
            tracing::warn!({ "remote-peer-id" = from, reason = why, repeated }, "refused a peer");
        }
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
        if hello.to != ours.member_id {
            let text = format!("member ID mismatch: this is {:x}, not {:x}", ours.member_id, hello.to);
            return Verdict::Refused(text);
        }
        Verdict::Welcome
    }

    fn listen(&self, hello: &Hello, floor: &Floor<'_>, mut stream: &mut TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(SILENCE))?;
        let received = METRICS.peer_received_bytes.with_label_values(&[format!("{:x}", hello.from)]);
        loop {
            let (mut messages, bytes) = frame::read(&mut stream)?;
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
        }
    }
}

/// Tells a caller that cannot be understood what is wrong. Whatever else it has said is read first: a connection that is
/// closed with something unread takes the answer with it.
fn dismiss(mut stream: TcpStream, error: io::Error) -> io::Error {
    let told = Verdict::Refused(error.to_string()).write(&mut stream).and_then(|()| stream.shutdown(Shutdown::Write));
    let _ = told.and_then(|()| io::copy(&mut stream.take(LAST_WORDS_BYTES), &mut io::sink()));
    error
}
