//! Copies of the database on their way from member to member, on connections of their own.
//!
//! ```text
//! message   length (4), raft's MsgSnapshot
//! file      length of the name (2), name, size (8), bytes, CRC-32C of the bytes (4)
//! end       0 (2)
//! verdict   as in [`frame`](super::frame), when the copy is in place or was refused
//! ```
//!
//! Raft holds everything back from a member that is being sent a copy until it hears how that ended; so it hears, whatever
//! happens.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    net::TcpStream,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use rustix::net::sockopt;

use super::{
    super::{
        driver::Input,
        inbox::Inbox,
        snapshot::{Incoming, Offer, conf_state},
    },
    Patience, Transport, dial,
    frame::{self, Hello, Purpose, Verdict},
};
use crate::metrics::METRICS;

const CHUNK_BYTES: usize = 256 << 10;
const MESSAGE_MAX_BYTES: usize = 1 << 20;
const NAME_MAX_BYTES: usize = 255;
/// Between two lines of the log about a copy under way.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// To check, open and install a copy.
const INSTALL_PATIENCE: Duration = Duration::from_mins(10);

/// Tells raft how it ended; badly, if nothing else was said.
struct Report {
    raft: Arc<Inbox<Input>>,
    to: u64,
    arrived: bool,
}

impl Drop for Report {
    fn drop(&mut self) {
        let _ = self.raft.send(Input::SnapshotSent { to: self.to, arrived: self.arrived });
    }
}

/// Sends the copy that a message of raft's is about.
pub(super) fn send(transport: &Arc<Transport>, message: Message) {
    let to = message.to;
    let report = Report { raft: transport.parts.raft.clone(), to, arrived: false };
    let index = message.get_snapshot().get_metadata().index;
    let Some(offer) = transport.parts.shelf.find(index) else {
        return tracing::warn!(
            to = format_args!("{to:x}"),
            index,
            "the snapshot to send is gone; there will be another"
        );
    };
    let transport = transport.clone();
    let run = move || {
        let mut report = report; // All of it: it tells raft when it goes.
        let to = format!("{:x}", report.to);
        tracing::info!(to, index, "sending a snapshot");
        match deliver(&transport, &message, &offer) {
            Ok((bytes, took)) => {
                report.arrived = true;
                METRICS.snapshots_sent.with_label_values(&[&to]).inc();
                tracing::info!(to, index, bytes, took = ?took, "sent a snapshot, which is in place there");
            }
            Err(trouble) => {
                METRICS.snapshot_send_failures.with_label_values(&[&to]).inc();
                tracing::warn!(to, index, error = trouble, "failed to send a snapshot");
            }
        }
    };
    if let Err(error) = thread::Builder::new().name(format!("snapshot-{to:x}")).spawn(run) {
        tracing::warn!(%error, "cannot start a thread to send a snapshot");
    }
}

fn deliver(transport: &Transport, message: &Message, offer: &Offer) -> Result<(u64, Duration), String> {
    let line = transport.line(message.to).ok_or("the member is not known any more")?;
    let patience = transport.parts.patience;
    let mut stream = dial(&line.peer, patience)?;
    let hello = transport.hello(Purpose::Snapshot, message.to);
    let started = Instant::now();
    let mut bytes = 0;
    let mut carry = || -> io::Result<Verdict> {
        hello.write(&mut stream)?;
        let welcome = Verdict::read(&mut stream)?;
        if welcome != Verdict::Welcome {
            return Ok(welcome);
        }
        be_patient(&stream, patience)?;
        let mut pace = Pace::new(offer, patience.snapshot_rate, message.to)?;
        let raft = message.write_to_bytes().map_err(|error| frame::invalid(error.to_string()))?;
        stream.write_all(&u32::try_from(raft.len()).map_err(io::Error::other)?.to_be_bytes())?;
        stream.write_all(&raft)?;
        for entry in fs::read_dir(offer.files.path())? {
            let entry = entry?;
            if entry.file_type()?.is_file() && is_data(&entry.file_name().to_string_lossy()) {
                send_file(&mut stream, &entry.path(), &mut pace)?;
            }
        }
        stream.write_all(&[0, 0])?;
        bytes = pace.sent;
        stream.set_read_timeout(Some(INSTALL_PATIENCE))?;
        Verdict::read(&mut stream)
    };
    match carry() {
        Ok(Verdict::Welcome) => Ok((bytes, started.elapsed())),
        Ok(Verdict::Removed) => Err("the receiver says that this member was removed".to_owned()),
        Ok(Verdict::Refused(text)) => Err(text),
        Err(error) => Err(error.to_string()),
    }
}

/// While one side is busy with its disk the other hears nothing, and that is no trouble; a side that is gone is noticed all
/// the same, by what keeps the connection alive.
fn be_patient(stream: &TcpStream, patience: Patience) -> io::Result<()> {
    stream.set_read_timeout(Some(patience.stall))?;
    stream.set_write_timeout(Some(patience.stall))?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(patience.stall.as_millis()).unwrap_or(u32::MAX))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, patience.write.max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    Ok(())
}

/// A database's lock and its own log are not part of it.
fn is_data(name: &str) -> bool {
    name != "LOCK" && !name.starts_with("LOG")
}

fn send_file(stream: &mut TcpStream, path: &Path, pace: &mut Pace) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let name_len = u16::try_from(name.len()).map_err(io::Error::other)?;
    stream.write_all(&[&name_len.to_be_bytes(), name.as_bytes(), &size.to_be_bytes()].concat())?;
    let (mut chunk, mut left, mut crc) = (vec![0; CHUNK_BYTES], size, 0);
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        file.read_exact(&mut chunk[..length])?;
        crc = crc32c::crc32c_append(crc, &chunk[..length]);
        stream.write_all(&chunk[..length])?;
        left -= length as u64;
        pace.sent(length as u64);
    }
    stream.write_all(&crc.to_be_bytes())
}

/// Keeps to a rate, so that a copy does not take the disk and the network from everything else, and tells how far it is.
struct Pace {
    started: Instant,
    told: Instant,
    rate: u64,
    sent: u64,
    total: u64,
    to: u64,
}

impl Pace {
    fn new(offer: &Offer, rate: u64, to: u64) -> io::Result<Self> {
        let mut total = 0;
        for entry in fs::read_dir(offer.files.path())? {
            total += entry?.metadata()?.len();
        }
        let now = Instant::now();
        Ok(Self { started: now, told: now, rate: rate.max(1), sent: 0, total, to })
    }

    fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
        let due = Duration::from_nanos(self.sent.saturating_mul(1_000_000_000 / 1024) / (self.rate / 1024).max(1));
        if let Some(early) = due.checked_sub(self.started.elapsed()) {
            thread::sleep(early);
        }
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            let percent = self.sent * 100 / self.total.max(1);
            tracing::info!(to = format_args!("{:x}", self.to), percent, bytes = self.sent, "sending a snapshot");
        }
    }
}

/// Takes a copy in, checks and opens it, shows it to raft, and says what became of it.
pub(super) fn receive(transport: &Arc<Transport>, hello: &Hello, mut stream: TcpStream) -> io::Result<()> {
    be_patient(&stream, transport.parts.patience)?;
    let verdict = match transport.receiving.try_lock() {
        Some(_alone) => take_in(transport, hello, &mut stream).unwrap_or_else(|error| {
            let from = format!("{:x}", hello.from);
            METRICS.snapshot_receive_failures.with_label_values(&[&from]).inc();
            tracing::warn!(from, %error, "failed to receive a snapshot");
            Verdict::Refused(error.to_string())
        }),
        None => Verdict::Refused("another snapshot is coming in".to_owned()),
    };
    verdict.write(&mut stream)
}

fn take_in(transport: &Transport, hello: &Hello, stream: &mut TcpStream) -> io::Result<Verdict> {
    let length = u32::from_be_bytes(read_array(stream)?) as usize;
    if length > MESSAGE_MAX_BYTES {
        return Err(frame::invalid(format!("a message of {length} bytes is too large")));
    }
    let mut raft = vec![0; length];
    stream.read_exact(&mut raft)?;
    let message = Message::parse_from_bytes(&raft).map_err(|error| frame::invalid(error.to_string()))?;
    let is_snapshot = message.msg_type == MessageType::MsgSnapshot && message.term > 0;
    if !is_snapshot || message.from != hello.from || message.to != hello.to {
        return Err(frame::invalid("what comes with a snapshot is no message about it".to_owned()));
    }
    let index = message.get_snapshot().get_metadata().index;
    let (started, from) = (Instant::now(), format!("{:x}", hello.from));
    tracing::info!(from, index, "receiving a snapshot");
    let files = transport.parts.depot.place(index);
    let bytes = take_files(files.path(), stream)?;
    let incoming = transport.parts.depot.open(files).map_err(|halt| io::Error::other(halt.to_string()))?;
    METRICS.snapshots_received.with_label_values(&[&from]).inc();
    tracing::info!(from, index, bytes, took = ?started.elapsed(), "received and saved a snapshot");
    check_metadata(&message, &incoming)?;
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |installed| _ = tell.send(installed));
    let input = Input::Snapshot { message, incoming: Box::new(incoming), done };
    let _ = transport.parts.raft.send(input);
    Ok(match told.recv_timeout(INSTALL_PATIENCE) {
        Ok(true) => Verdict::Welcome,
        Ok(false) => Verdict::Refused("the snapshot was not needed".to_owned()),
        Err(_) => Verdict::Refused("the snapshot was not installed".to_owned()),
    })
}

/// What raft is told of a copy is what the copy says of itself.
fn check_metadata(message: &Message, incoming: &Incoming) -> io::Result<()> {
    let (told, applied) = (message.get_snapshot().get_metadata(), incoming.machine.applied());
    if (applied.index, applied.term) != (told.index, told.term) {
        let text = format!("the snapshot is of index {}, but was said to be of {}", applied.index, told.index);
        return Err(frame::invalid(text));
    }
    if *told.get_conf_state() != conf_state(&incoming.machine.members().electorate()) {
        return Err(frame::invalid("the snapshot names other members than it was said to".to_owned()));
    }
    Ok(())
}

fn read_array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Writes the files that come in; all of them are durable when this returns. Returns how many bytes they had.
fn take_files(directory: &Path, stream: &mut TcpStream) -> io::Result<u64> {
    fs::create_dir_all(directory)?;
    let mut total = 0;
    loop {
        let name_len = usize::from(u16::from_be_bytes(read_array(stream)?));
        if name_len == 0 {
            File::open(directory)?.sync_all()?;
            return Ok(total);
        }
        let mut name = vec![0; name_len];
        stream.read_exact(&mut name)?;
        let name = String::from_utf8(name).ok().filter(|name| is_plain(name));
        let name = name.ok_or_else(|| frame::invalid("a snapshot names a file that it must not".to_owned()))?;
        total += take_file(&directory.join(name), stream)?;
    }
}

fn is_plain(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= NAME_MAX_BYTES && name.bytes().all(fine) && !name.starts_with('.')
}

fn take_file(path: &Path, stream: &mut TcpStream) -> io::Result<u64> {
    let size = u64::from_be_bytes(read_array(stream)?);
    let mut file = BufWriter::new(File::create_new(path)?);
    let (mut chunk, mut left, mut crc) = (vec![0; CHUNK_BYTES], size, 0);
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        stream.read_exact(&mut chunk[..length])?;
        crc = crc32c::crc32c_append(crc, &chunk[..length]);
        file.write_all(&chunk[..length])?;
        left -= length as u64;
    }
    if crc != u32::from_be_bytes(read_array(stream)?) {
        return Err(frame::invalid(format!("{} was damaged on its way", path.display())));
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    Ok(size)
}
