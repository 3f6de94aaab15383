//! Transfer of snapshots, which are copies of the database, between members. Each uses a connection of its own.
//!
//! ```text
//! message   length (4), raft's MsgSnapshot
//! total     bytes of all files (8)
//! file      length of the name (2), name, size (8), bytes, CRC-32C of the bytes (4)
//! end       0 (2)
//! verdict   as in [`frame`](super::frame), once the snapshot is installed or refused
//! ```
//!
//! Raft sends nothing else to a member while a snapshot is being sent to it, until the outcome is reported. So the outcome is
//! reported whatever happens.
//!
//! A snapshot is received only if raft would accept it, if it fits on the disk, and while it arrives at a minimum rate. At most
//! one is received at a time; a snapshot from the leader that this member follows replaces any other.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus::{IntGauge, IntGaugeVec};
use protobuf::Message as _;
use raft::eraftpb::Message;

use super::{
    super::{
        inbox::Inbox,
        messages::Input,
        snapshot::{InboundSnapshot, OutboundSnapshot, conf_state},
    },
    AdmittedConnection, Transport, TransportLimits,
    frame::{self, Hello, Purpose, Verdict},
    paced::Paced,
    validate,
};
use crate::metrics::METRICS;
use crate::net::stream::BlockingStream;

const CHUNK_BYTES: usize = 256 << 10;
const MESSAGE_MAX_BYTES: usize = 1 << 20;
const NAME_MAX_BYTES: usize = 255;
/// The interval of log lines about the progress of a transfer.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// The limit for the files of a snapshot. The database's files have some megabytes each.
const MAX_FILES: usize = 1 << 16;
/// The disk space that must stay free when a snapshot is received, because this member's own log and database keep growing.
const DISK_RESERVE_BYTES: u64 = 256 << 20;
/// For raft to answer whether it would accept a snapshot.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// For the receiver to check, open and install a snapshot.
const INSTALL_TIMEOUT: Duration = Duration::from_mins(10);

/// Reports the outcome of a transfer to raft when it is dropped: a failure, unless `arrived` was set.
struct OutcomeReport {
    raft: Arc<Inbox<Input>>,
    to: u64,
    arrived: bool,
}

impl Drop for OutcomeReport {
    fn drop(&mut self) {
        let _ = self.raft.send(Input::SnapshotSent { to: self.to, arrived: self.arrived });
    }
}

/// Sends the snapshot that is described by a message of raft's.
pub(super) fn send(transport: &Arc<Transport>, message: Message) {
    let to = message.to;
    let report = OutcomeReport { raft: transport.parts.raft.clone(), to, arrived: false };
    let index = message.get_snapshot().get_metadata().index;
    let Some(offer) = transport.parts.outbound_slot.find(index) else {
        return tracing::warn!(
            to = format_args!("{to:x}"),
            index,
            "the snapshot to send no longer exists; a newer one will be sent"
        );
    };
    let transport = transport.clone();
    let run = move || {
        let mut report = report; // Moves all of it: the outcome is reported when it is dropped.
        let to = format!("{:x}", report.to);
        tracing::info!(to, index, "sending a snapshot");
        let _in_flight = InFlight::begin(&METRICS.snapshots_sending, &to);
        match deliver(&transport, &message, &offer) {
            Ok((bytes, took)) => {
                report.arrived = true;
                METRICS.snapshots_sent.with_label_values(&[&to]).inc();
                METRICS.snapshot_send_seconds.with_label_values(&[&to]).observe(took.as_secs_f64());
                tracing::info!(to, index, bytes, took = ?took, "sent a snapshot; the receiver has installed it");
            }
            Err(reason) => {
                METRICS.snapshot_send_failures.with_label_values(&[&to]).inc();
                tracing::warn!(to, index, error = reason, "failed to send a snapshot");
            }
        }
    };
    if let Err(error) = thread::Builder::new().name(format!("snapshot-{to:x}")).spawn(run) {
        tracing::warn!(%error, "cannot start a thread to send a snapshot");
    }
}

/// Counts a transfer as long as it is under way.
struct InFlight(IntGauge);

impl InFlight {
    fn begin(gauges: &IntGaugeVec, member: &str) -> Self {
        let gauge = gauges.with_label_values(&[member]);
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn deliver(transport: &Transport, message: &Message, offer: &OutboundSnapshot) -> Result<(u64, Duration), String> {
    let connection = transport.connection(message.to).ok_or("the member is no longer in the member list")?;
    let limits = transport.parts.limits;
    let mut stream = transport.dial(&connection.peer)?;
    let hello = transport.hello(Purpose::Snapshot, message.to);
    let started = Instant::now();
    let mut bytes = 0;
    let mut transfer = || -> io::Result<Verdict> {
        hello.write(&mut stream)?;
        let verdict = Verdict::read(&mut stream)?;
        if verdict != Verdict::Accepted {
            return Ok(verdict);
        }
        set_stall_timeouts(&stream, limits)?;
        let files = data_files(offer.files.path())?;
        let mut limiter = RateLimiter::new(files.iter().map(|(_, size)| size).sum(), limits.snapshot_rate, message.to);
        let raft = message.write_to_bytes().map_err(|error| frame::invalid(error.to_string()))?;
        stream.write_all(&u32::try_from(raft.len()).map_err(io::Error::other)?.to_be_bytes())?;
        stream.write_all(&raft)?;
        stream.write_all(&limiter.total.to_be_bytes())?;
        for (path, size) in &files {
            send_file(&mut stream, path, *size, &mut limiter)?;
        }
        stream.write_all(&[0, 0])?;
        bytes = limiter.sent;
        stream.set_read_timeout(Some(INSTALL_TIMEOUT))?;
        Verdict::read(&mut stream)
    };
    match transfer() {
        Ok(Verdict::Accepted) => Ok((bytes, started.elapsed())),
        Ok(Verdict::Removed) => Err("the receiver says that this member was removed".to_owned()),
        Ok(Verdict::Refused(text)) => Err(text),
        Err(error) => Err(error.to_string()),
    }
}

/// Sets longer timeouts: while one side is busy with its disk the other receives nothing, which is not an error. A side that is
/// gone is detected by TCP keep-alives.
fn set_stall_timeouts(stream: &BlockingStream, limits: TransportLimits) -> io::Result<()> {
    stream.set_read_timeout(Some(limits.stall))?;
    stream.set_write_timeout(Some(limits.stall))?;
    stream.set_unacknowledged_timeout(limits.stall)?;
    stream.set_keepalive(limits.write)
}

/// Whether a file in a database's directory holds data. Its lock file and its own log do not.
fn is_data(name: &str) -> bool {
    name != "LOCK" && !name.starts_with("LOG")
}

/// The files of a snapshot, and their sizes.
fn data_files(snapshot: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(snapshot)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && is_data(&entry.file_name().to_string_lossy()) {
            files.push((entry.path(), entry.metadata()?.len()));
        }
    }
    Ok(files)
}

fn send_file(stream: &mut BlockingStream, path: &Path, size: u64, limiter: &mut RateLimiter) -> io::Result<()> {
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
        limiter.on_sent(length as u64);
    }
    stream.write_all(&crc.to_be_bytes())
}

/// Limits the rate of a transfer, so that it leaves disk and network bandwidth to everything else, and logs the progress.
struct RateLimiter {
    started: Instant,
    last_logged: Instant,
    rate: u64,
    sent: u64,
    total: u64,
    to: u64,
}

impl RateLimiter {
    fn new(total: u64, rate: u64, to: u64) -> Self {
        let now = Instant::now();
        Self { started: now, last_logged: now, rate: rate.max(1), sent: 0, total, to }
    }

    fn on_sent(&mut self, bytes: u64) {
        self.sent += bytes;
        let due = Duration::from_nanos(self.sent.saturating_mul(1_000_000_000 / 1024) / (self.rate / 1024).max(1));
        if let Some(early) = due.checked_sub(self.started.elapsed()) {
            thread::sleep(early);
        }
        if self.last_logged.elapsed() >= PROGRESS_EVERY {
            self.last_logged = Instant::now();
            let percent = self.sent * 100 / self.total.max(1);
            tracing::info!(to = format_args!("{:x}", self.to), percent, bytes = self.sent, "sending a snapshot");
        }
    }
}

/// The snapshot that is being received, if any.
#[derive(Default)]
pub(super) struct ReceiveSlot(Mutex<Option<ActiveTransfer>>);

/// The transfer of that snapshot.
struct ActiveTransfer {
    number: u64,
    is_from_leader: bool,
    abort: Box<dyn Fn() + Send>,
}

/// Permission to receive a snapshot, until this is dropped.
struct ReceiveGuard<'a> {
    receiving: &'a ReceiveSlot,
    number: u64,
}

impl ReceiveSlot {
    /// Grants permission to receive a snapshot, unless another one is being received; a snapshot from the leader replaces one
    /// from another member. `abort` must abort this transfer; it is called if another one replaces it.
    fn begin(
        &self,
        number: u64,
        is_from_leader: bool,
        abort: Box<dyn Fn() + Send>,
    ) -> Result<ReceiveGuard<'_>, String> {
        let mut active = self.0.lock();
        if let Some(other) = active.as_ref() {
            if other.is_from_leader || !is_from_leader {
                return Err("another snapshot is being received".to_owned());
            }
            (other.abort)();
        }
        *active = Some(ActiveTransfer { number, is_from_leader, abort });
        Ok(ReceiveGuard { receiving: self, number })
    }
}

impl Drop for ReceiveGuard<'_> {
    fn drop(&mut self) {
        self.receiving.0.lock().take_if(|active| active.number == self.number);
    }
}

/// Receives a snapshot, checks and opens it, passes it to raft, and sends the outcome.
pub(super) fn receive(
    transport: &Arc<Transport>,
    hello: &Hello,
    admitted: &AdmittedConnection,
    mut stream: BlockingStream,
) -> io::Result<()> {
    set_stall_timeouts(&stream, transport.parts.limits)?;
    let verdict = receive_snapshot(transport, hello, admitted, &stream).unwrap_or_else(|error| {
        METRICS.snapshot_receive_failures.with_label_values(&[&format!("{:x}", hello.from)]).inc();
        let reason = format!("failed to receive a snapshot: {error}");
        transport.record_refusal("snapshot", hello.from, Some(admitted.address()), &reason);
        Verdict::Refused(error.to_string())
    });
    verdict.write(&mut stream)
}

fn receive_snapshot(
    transport: &Transport,
    hello: &Hello,
    admitted: &AdmittedConnection,
    stream: &BlockingStream,
) -> io::Result<Verdict> {
    let limits = transport.parts.limits;
    let mut stream = Paced::new(stream, limits.stall, limits.min_bytes_per_second);
    let length = u32::from_be_bytes(read_array(&mut stream)?) as usize;
    if length > MESSAGE_MAX_BYTES {
        return Err(frame::invalid(format!("a message of {length} bytes is too large")));
    }
    let mut raft = vec![0; length];
    stream.read_exact(&mut raft)?;
    let message = Message::parse_from_bytes(&raft).map_err(|error| frame::invalid(error.to_string()))?;
    validate::check_snapshot(&message, hello.from, hello.to).map_err(frame::invalid)?;
    let total = u64::from_be_bytes(read_array(&mut stream)?);
    let is_from_leader = ask_raft(transport, &message)?;
    let guard = transport.receiving.begin(admitted.number(), is_from_leader, Box::new(admitted.closer()));
    let _guard = guard.map_err(io::Error::other)?;
    check_free_space(total, transport.parts.snapshot_store.free_bytes()?)?;
    let index = message.get_snapshot().get_metadata().index;
    let (started, from) = (Instant::now(), format!("{:x}", hello.from));
    tracing::info!(from, index, bytes = total, "receiving a snapshot");
    let _in_flight = InFlight::begin(&METRICS.snapshots_receiving, &from);
    let files = transport.parts.snapshot_store.new_directory(index);
    receive_files(files.path(), total, MAX_FILES, &mut stream)?;
    let incoming = transport.parts.snapshot_store.open(files).map_err(|halt| io::Error::other(halt.to_string()))?;
    METRICS.snapshots_received.with_label_values(&[&from]).inc();
    METRICS.snapshot_receive_seconds.with_label_values(&[&from]).observe(started.elapsed().as_secs_f64());
    METRICS.snapshot_save.observe(started.elapsed().as_secs_f64());
    tracing::info!(from, index, bytes = total, took = ?started.elapsed(), "received and saved a snapshot");
    check_metadata(&message, &incoming)?;
    let (result, received) = mpsc::channel();
    let done = Box::new(move |installed| _ = result.send(installed));
    let input = Input::Snapshot { message, incoming: Box::new(incoming), done };
    let _ = transport.parts.raft.send(input);
    Ok(match received.recv_timeout(INSTALL_TIMEOUT) {
        Ok(true) => Verdict::Accepted,
        Ok(false) => Verdict::Refused("the snapshot was not needed".to_owned()),
        Err(_) => Verdict::Refused("the snapshot was not installed".to_owned()),
    })
}

/// Asks raft whether it would accept this snapshot, before any of its files are received. Returns whether it is from the leader
/// that this member follows.
fn ask_raft(transport: &Transport, message: &Message) -> io::Result<bool> {
    let (result, received) = mpsc::channel();
    let answer = Box::new(move |answer| _ = result.send(answer));
    let _ = transport.parts.raft.send(Input::SnapshotAnnounced { message: message.clone(), answer });
    match received.recv_timeout(ANSWER_TIMEOUT) {
        Ok(answer) => answer.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("raft did not answer: this member is busy or shutting down")),
    }
}

/// A snapshot must not fill the disk: this member could not continue to run.
fn check_free_space(total: u64, free: u64) -> io::Result<()> {
    if total.saturating_add(DISK_RESERVE_BYTES) > free {
        return Err(io::Error::other(format!(
            "a snapshot of {total} bytes does not fit on the disk: {free} bytes are free, of which {DISK_RESERVE_BYTES} must \
             stay free"
        )));
    }
    Ok(())
}

/// Checks that the metadata in raft's message matches the content of the snapshot.
fn check_metadata(message: &Message, incoming: &InboundSnapshot) -> io::Result<()> {
    let (announced, applied) = (message.get_snapshot().get_metadata(), incoming.machine.applied());
    if (applied.index, applied.term) != (announced.index, announced.term) {
        let text = format!("the snapshot is at index {}, but {} was announced", applied.index, announced.index);
        return Err(frame::invalid(text));
    }
    if *announced.get_conf_state() != conf_state(&incoming.machine.members().voters_and_learners()) {
        return Err(frame::invalid("the members in the snapshot are not the ones that were announced".to_owned()));
    }
    Ok(())
}

fn read_array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Receives files into a directory. Their total size must be `total`; all of them are durable when this returns.
fn receive_files(directory: &Path, total: u64, max_files: usize, stream: &mut impl Read) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut left = total;
    for _ in 0..=max_files {
        let name_len = usize::from(u16::from_be_bytes(read_array(stream)?));
        if name_len == 0 {
            if left > 0 {
                return Err(frame::invalid(format!("the snapshot ends {left} bytes before the announced size")));
            }
            return File::open(directory)?.sync_all();
        }
        let mut name = vec![0; name_len];
        stream.read_exact(&mut name)?;
        let name = String::from_utf8(name).ok().filter(|name| is_valid_name(name));
        let name = name.ok_or_else(|| frame::invalid("a snapshot contains an invalid file name".to_owned()))?;
        receive_file(&directory.join(name), &mut left, stream)?;
    }
    Err(frame::invalid(format!("the snapshot has more than {max_files} files")))
}

fn is_valid_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= NAME_MAX_BYTES && name.bytes().all(is_allowed) && !name.starts_with('.')
}

fn receive_file(path: &Path, total_left: &mut u64, stream: &mut impl Read) -> io::Result<()> {
    let size = u64::from_be_bytes(read_array(stream)?);
    *total_left = total_left
        .checked_sub(size)
        .ok_or_else(|| frame::invalid("the files of the snapshot have more bytes than were announced".to_owned()))?;
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
        return Err(frame::invalid(format!("the checksum of {} does not match", path.display())));
    }
    let (file, started) = (file.into_inner().map_err(io::IntoInnerError::into_error)?, Instant::now());
    file.sync_all()?;
    METRICS.snapshot_sync.observe(started.elapsed().as_secs_f64());
    Ok(())
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
        let directory = temp.path().join("snapshot");
        receive_files(&directory, total, 3, &mut &*bytes).map_err(|error| error.to_string())?;
        Ok(fs::read(directory.join("1.sst")).unwrap())
    }

    #[test]
    fn a_snapshot_must_have_the_announced_size() {
        let snapshot = [file("1.sst", b"1234"), file("2.sst", b"56"), vec![0, 0]].concat();
        assert_eq!(take(6, &snapshot), Ok(b"1234".to_vec()));
        assert_eq!(take(7, &snapshot).unwrap_err(), "the snapshot ends 1 bytes before the announced size");
        assert!(take(5, &snapshot).unwrap_err().contains("more bytes than were announced"));
        for name in ["../1.sst", ".hidden", "a/b", ""] {
            assert!(take(4, &file(name, b"1234")).is_err(), "{name:?}");
        }
        let endless: Vec<u8> = (0..9).flat_map(|nth| file(&nth.to_string(), b"")).collect();
        assert_eq!(take(0, &endless).unwrap_err(), "the snapshot has more than 3 files");
    }

    #[test]
    fn a_snapshot_that_would_fill_the_disk_is_refused() {
        check_free_space(10, DISK_RESERVE_BYTES + 10).unwrap();
        for (total, free) in [(11, DISK_RESERVE_BYTES + 10), (0, 0), (u64::MAX, u64::MAX - 1)] {
            let refused = check_free_space(total, free).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("a snapshot of {total} bytes does not fit on the disk")), "{refused}");
        }
    }

    #[test]
    fn a_snapshot_from_the_leader_replaces_any_other() {
        let (receiving, aborted) = (ReceiveSlot::default(), Arc::new(AtomicUsize::new(0)));
        let begin = |number, is_from_leader| {
            let aborted = aborted.clone();
            receiving.begin(number, is_from_leader, Box::new(move || _ = aborted.fetch_add(1, Ordering::Relaxed)))
        };
        let slow = begin(1, false).unwrap();
        assert!(begin(2, false).is_err(), "one at a time");
        let from_leader = begin(3, true).unwrap();
        assert_eq!(aborted.load(Ordering::Relaxed), 1, "the slow one is aborted");
        drop(slow);
        assert!(
            begin(4, true).is_err() && begin(5, false).is_err(),
            "dropping the guard of an aborted transfer changes nothing"
        );
        drop(from_leader);
        drop(begin(6, false).unwrap());
        assert_eq!(aborted.load(Ordering::Relaxed), 1);
    }
}
