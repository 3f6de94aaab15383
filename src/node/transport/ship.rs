//! Copies of the database on their way from member to member, on connections of their own.
//!
//! ```text
//! message   length (4), raft's MsgSnapshot
//! total     bytes of all files (8)
//! file      length of the name (2), name, size (8), bytes, CRC-32C of the bytes (4)
//! end       0 (2)
//! verdict   as in [`frame`](super::frame), when the copy is in place or was refused
//! ```
//!
//! Raft holds everything back from a member that is being sent a copy until it hears how that ended; so it hears, whatever
//! happens.
//!
//! A copy is received only if raft would take it, if it fits on the disk, and as long as it comes at some pace. One at a time
//! is; a copy from the leader that this member follows takes the place of any other.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use protobuf::Message as _;
use raft::eraftpb::Message;
use rustix::net::sockopt;

use super::{
    super::{
        driver::Input,
        inbox::Inbox,
        snapshot::{Incoming, Offer, conf_state},
    },
    Admitted, Patience, Transport, dial,
    frame::{self, Hello, Purpose, Verdict},
    manners,
    paced::Paced,
};
use crate::metrics::METRICS;

const CHUNK_BYTES: usize = 256 << 10;
const MESSAGE_MAX_BYTES: usize = 1 << 20;
const NAME_MAX_BYTES: usize = 255;
/// Between two lines of the log about a copy under way.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// A copy has no more files: the database's files have some megabytes each.
const MOST_FILES: usize = 1 << 16;
/// So much stays free on the disk when a copy is received: this member's own log and database go on growing.
const DISK_RESERVE_BYTES: u64 = 256 << 20;
/// For raft to say whether it would take a copy.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
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
        let files = data_files(offer.files.path())?;
        let mut pace = Pace::new(files.iter().map(|(_, size)| size).sum(), patience.snapshot_rate, message.to);
        let raft = message.write_to_bytes().map_err(|error| frame::invalid(error.to_string()))?;
        stream.write_all(&u32::try_from(raft.len()).map_err(io::Error::other)?.to_be_bytes())?;
        stream.write_all(&raft)?;
        stream.write_all(&pace.total.to_be_bytes())?;
        for (path, size) in &files {
            send_file(&mut stream, path, *size, &mut pace)?;
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

/// The files of a copy, and how large they are.
fn data_files(copy: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(copy)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && is_data(&entry.file_name().to_string_lossy()) {
            files.push((entry.path(), entry.metadata()?.len()));
        }
    }
    Ok(files)
}

fn send_file(stream: &mut TcpStream, path: &Path, size: u64, pace: &mut Pace) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut file = File::open(path)?;
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
    fn new(total: u64, rate: u64, to: u64) -> Self {
        let now = Instant::now();
        Self { started: now, told: now, rate: rate.max(1), sent: 0, total, to }
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

/// The copy that is coming in, if there is one.
#[derive(Default)]
pub(super) struct Receiving(Mutex<Option<Holder>>);

/// Whose copy it is.
struct Holder {
    number: u64,
    is_from_leader: bool,
    end: Box<dyn Fn() + Send>,
}

/// The right to receive a copy, until this is dropped.
struct Turn<'a> {
    receiving: &'a Receiving,
    number: u64,
}

impl Receiving {
    /// Gives the right to receive a copy, unless another one is coming in that has as good a right. `end` ends the one whose
    /// turn it becomes.
    fn enter(&self, number: u64, is_from_leader: bool, end: Box<dyn Fn() + Send>) -> Result<Turn<'_>, String> {
        let mut holder = self.0.lock();
        if let Some(other) = holder.as_ref() {
            if other.is_from_leader || !is_from_leader {
                return Err("another snapshot is coming in".to_owned());
            }
            (other.end)();
        }
        *holder = Some(Holder { number, is_from_leader, end });
        Ok(Turn { receiving: self, number })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.receiving.0.lock().take_if(|holder| holder.number == self.number);
    }
}

/// Takes a copy in, checks and opens it, shows it to raft, and says what became of it.
pub(super) fn receive(
    transport: &Arc<Transport>,
    hello: &Hello,
    admitted: &Admitted,
    mut stream: TcpStream,
) -> io::Result<()> {
    be_patient(&stream, transport.parts.patience)?;
    let verdict = take_in(transport, hello, admitted, &stream).unwrap_or_else(|error| {
        METRICS.snapshot_receive_failures.with_label_values(&[&format!("{:x}", hello.from)]).inc();
        let what = format!("failed to receive a snapshot: {error}");
        transport.note_refusal("snapshot", hello.from, Some(admitted.address()), &what);
        Verdict::Refused(error.to_string())
    });
    verdict.write(&mut stream)
}

fn take_in(transport: &Transport, hello: &Hello, admitted: &Admitted, stream: &TcpStream) -> io::Result<Verdict> {
    let patience = transport.parts.patience;
    let mut stream = Paced::new(stream, patience.stall, patience.min_bytes_per_second);
    let length = u32::from_be_bytes(read_array(&mut stream)?) as usize;
    if length > MESSAGE_MAX_BYTES {
        return Err(frame::invalid(format!("a message of {length} bytes is too large")));
    }
    let mut raft = vec![0; length];
    stream.read_exact(&mut raft)?;
    let message = Message::parse_from_bytes(&raft).map_err(|error| frame::invalid(error.to_string()))?;
    manners::check_snapshot(&message, hello.from, hello.to).map_err(frame::invalid)?;
    let total = u64::from_be_bytes(read_array(&mut stream)?);
    let is_from_leader = ask_raft(transport, &message)?;
    let turn = transport.receiving.enter(admitted.number(), is_from_leader, Box::new(admitted.ender()));
    let _turn = turn.map_err(io::Error::other)?;
    check_room(total, transport.parts.depot.free_bytes()?)?;
    let index = message.get_snapshot().get_metadata().index;
    let (started, from) = (Instant::now(), format!("{:x}", hello.from));
    tracing::info!(from, index, bytes = total, "receiving a snapshot");
    let files = transport.parts.depot.place(index);
    take_files(files.path(), total, MOST_FILES, &mut stream)?;
    let incoming = transport.parts.depot.open(files).map_err(|halt| io::Error::other(halt.to_string()))?;
    METRICS.snapshots_received.with_label_values(&[&from]).inc();
    tracing::info!(from, index, bytes = total, took = ?started.elapsed(), "received and saved a snapshot");
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

/// Whether raft would take this snapshot, before anything of it is received; if so, whether it is from the leader that this
/// member follows.
fn ask_raft(transport: &Transport, message: &Message) -> io::Result<bool> {
    let (tell, told) = mpsc::channel();
    let answer = Box::new(move |answer| _ = tell.send(answer));
    let _ = transport.parts.raft.send(Input::SnapshotAnnounced { message: message.clone(), answer });
    match told.recv_timeout(ANSWER_PATIENCE) {
        Ok(answer) => answer.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("this member is busy or ends")),
    }
}

/// A copy must not take the last of the disk: this member could not go on.
fn check_room(total: u64, free: u64) -> io::Result<()> {
    if total.saturating_add(DISK_RESERVE_BYTES) > free {
        return Err(io::Error::other(format!(
            "a snapshot of {total} bytes does not fit on the disk: {free} bytes are free, of which {DISK_RESERVE_BYTES} have to \
             stay so"
        )));
    }
    Ok(())
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

/// Writes the files that come in, which must have so many bytes together; all of them are durable when this returns.
fn take_files(directory: &Path, total: u64, most_files: usize, stream: &mut impl Read) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut left = total;
    for _ in 0..=most_files {
        let name_len = usize::from(u16::from_be_bytes(read_array(stream)?));
        if name_len == 0 {
            if left > 0 {
                return Err(frame::invalid(format!("the snapshot ends {left} bytes before it should")));
            }
            return File::open(directory)?.sync_all();
        }
        let mut name = vec![0; name_len];
        stream.read_exact(&mut name)?;
        let name = String::from_utf8(name).ok().filter(|name| is_plain(name));
        let name = name.ok_or_else(|| frame::invalid("a snapshot names a file that it must not".to_owned()))?;
        take_file(&directory.join(name), &mut left, stream)?;
    }
    Err(frame::invalid(format!("the snapshot has more than {most_files} files")))
}

fn is_plain(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= NAME_MAX_BYTES && name.bytes().all(fine) && !name.starts_with('.')
}

fn take_file(path: &Path, left_of_all: &mut u64, stream: &mut impl Read) -> io::Result<()> {
    let size = u64::from_be_bytes(read_array(stream)?);
    *left_of_all = left_of_all.checked_sub(size).ok_or_else(|| {
        frame::invalid("the files of the snapshot have more bytes than it was said to have".to_owned())
    })?;
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
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn file(name: &str, bytes: &[u8]) -> Vec<u8> {
        let name_len = u16::try_from(name.len()).unwrap().to_be_bytes();
        let crc = crc32c::crc32c(bytes).to_be_bytes();
        [&name_len, name.as_bytes(), &(bytes.len() as u64).to_be_bytes(), bytes, &crc].concat()
    }

    fn take(total: u64, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("copy");
        take_files(&directory, total, 3, &mut &*bytes).map_err(|error| error.to_string())?;
        Ok(fs::read(directory.join("1.sst")).unwrap())
    }

    #[test]
    fn a_copy_has_as_many_bytes_as_it_was_said_to_have() {
        let copy = [file("1.sst", b"1234"), file("2.sst", b"56"), vec![0, 0]].concat();
        assert_eq!(take(6, &copy), Ok(b"1234".to_vec()));
        assert_eq!(take(7, &copy).unwrap_err(), "the snapshot ends 1 bytes before it should");
        assert!(take(5, &copy).unwrap_err().contains("more bytes than it was said to have"));
        for name in ["../1.sst", ".hidden", "a/b", ""] {
            assert!(take(4, &file(name, b"1234")).is_err(), "{name:?}");
        }
        let endless: Vec<u8> = (0..9).flat_map(|nth| file(&nth.to_string(), b"")).collect();
        assert_eq!(take(0, &endless).unwrap_err(), "the snapshot has more than 3 files");
    }

    #[test]
    fn a_copy_that_would_fill_the_disk_is_refused() {
        check_room(10, DISK_RESERVE_BYTES + 10).unwrap();
        for (total, free) in [(11, DISK_RESERVE_BYTES + 10), (0, 0), (u64::MAX, u64::MAX - 1)] {
            let refused = check_room(total, free).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("a snapshot of {total} bytes does not fit on the disk")), "{refused}");
        }
    }

    #[test]
    fn a_copy_from_the_leader_takes_the_place_of_any_other() {
        let (receiving, ended) = (Receiving::default(), Arc::new(AtomicUsize::new(0)));
        let enter = |number, is_from_leader| {
            let ended = ended.clone();
            receiving.enter(number, is_from_leader, Box::new(move || _ = ended.fetch_add(1, Ordering::Relaxed)))
        };
        let slow = enter(1, false).unwrap();
        assert!(enter(2, false).is_err(), "one at a time");
        let leaders = enter(3, true).unwrap();
        assert_eq!(ended.load(Ordering::Relaxed), 1, "the slow one is ended");
        drop(slow);
        assert!(enter(4, true).is_err() && enter(5, false).is_err(), "it was not its turn any more");
        drop(leaders);
        drop(enter(6, false).unwrap());
        assert_eq!(ended.load(Ordering::Relaxed), 1);
    }
}
