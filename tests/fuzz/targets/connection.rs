//! A whole connection, fed with anything. The same is done to three of them:
//!
//! * one gets what comes in one piece, one in arbitrary pieces: both write the same, byte for byte;
//! * the third acts and writes between the pieces too, as it happens on a network.
//!
//! None of them panics, holds more than its limits, or keeps a call that has ended; and what each of them writes keeps the
//! rules that [`Witness`] knows.

use std::{
    collections::HashMap,
    io::IoSlice,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use metastore::{
    http2::{
        connection::Connection,
        frame::{self, DEFAULT_WINDOW, Frame, HEAD_BYTES, MAX_PAYLOAD, PREFACE, flag, kind, setting},
        hpack::{Decoder, decoder::Fields},
        limits::{Limits, Shared},
        sender::SATURATED_BYTES,
    },
    ledger::Ledger,
};

use super::{
    input::{Cuts, Input},
    server::{Seen, Server},
    wire,
};

const MOST_ACTS: usize = 200;
/// As much is read at a time.
const MOST_READ: usize = 64 << 10;
const MAX_HELD: usize = 64 << 10;
const MAX_MESSAGE: usize = 4 << 10;
const MAX_STREAMS: u32 = 8;
/// Reading stops where so much is to be written; a last read may add some more.
const MOST_OUTPUT: usize = 4 * SATURATED_BYTES + 16 * MOST_READ;
/// A connection that has nothing new to do comes to rest.
const MOST_TURNS: usize = 10_000;

/// Something that happens to all connections.
enum Act {
    Receive(Vec<u8>),
    Run,
    /// The other side takes so many bytes.
    Write(usize),
    /// Somebody answers a call that waits.
    Answer(usize),
    Wait(Duration),
    Leave,
}

/// Decisions: how to cut, whether it begins as it must, then acts.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (seed, start) = (input.short(), Instant::now());
    let mut whole = Side::new(start, None);
    let mut cut = Side::new(start, Some(Cuts::new(seed)));
    let mut busy = Side::new(start, Some(Cuts::new(seed)));
    busy.acts_between = true;
    let (mut newest, mut last) = (u32::MAX, Vec::new());
    let mut compared = 0;
    let mut next = Some(Act::Receive(beginning(&mut input)));
    for _ in 0..MOST_ACTS {
        let Some(act) = next else { break };
        for side in [&mut whole, &mut cut, &mut busy] {
            side.act(&act);
            side.check_bounds();
        }
        assert_eq!(whole.state(), cut.state(), "cuts make no difference");
        let same = whole.written[compared..] == cut.written[compared..];
        assert!(same, "cuts make no difference to what is written");
        compared = whole.written.len();
        next = (!input.is_empty()).then(|| decide(&mut input, &mut newest, &mut last));
    }
    [whole, cut, busy].into_iter().for_each(Side::end);
}

fn beginning(input: &mut Input) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    if input.byte() & 0xf == 0xf {
        return input.piece().to_vec();
    }
    frame::write_head(&mut bytes, 0, kind::SETTINGS, 0, 0);
    bytes
}

fn decide(input: &mut Input, newest: &mut u32, last: &mut Vec<u8>) -> Act {
    match input.below(16) {
        0..=7 => {
            last.clear();
            for _ in 0..=input.below(6) {
                wire::frame(input, newest, last);
            }
            last.truncate(MOST_READ);
            Act::Receive(last.clone())
        }
        8 => {
            let times = usize::from(input.byte()) + 1;
            Act::Receive(last.iter().copied().cycle().take((last.len() * times).min(MOST_READ)).collect())
        }
        9 | 10 => Act::Run,
        11 => Act::Write(usize::from(input.short())),
        12 => Act::Write(usize::MAX),
        13 => Act::Answer(input.byte().into()),
        14 => Act::Wait(Duration::from_millis(input.pick(&[1, 60, 1100, 11_000]))),
        _ if input.below(8) == 0 => Act::Leave,
        _ => Act::Run,
    }
}

/// A connection, and everything around it.
struct Side {
    connection: Connection,
    shared: Arc<Shared>,
    seen: Arc<Seen>,
    now: Instant,
    cuts: Option<Cuts>,
    acts_between: bool,
    received: Vec<u8>,
    written: Vec<u8>,
}

impl Side {
    fn new(now: Instant, cuts: Option<Cuts>) -> Self {
        let limits = Limits {
            max_streams: MAX_STREAMS,
            max_header_list: 4 << 10,
            max_message: MAX_MESSAGE,
            max_held: MAX_HELD,
            ..Limits::default()
        };
        let (shared, seen) = (Arc::new(Shared::new(limits, Ledger::new(2 << 30))), Arc::new(Seen::default()));
        let connection = Connection::new(Arc::new(Server(seen.clone())), shared.clone(), Arc::default(), now);
        let (received, written) = (Vec::new(), Vec::new());
        Self { connection, shared, seen, now, cuts, acts_between: false, received, written }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Receive(bytes) => {
                if self.connection.is_choked() {
                    self.write(usize::MAX); // Nothing is read before.
                }
                self.received.extend_from_slice(bytes);
                self.receive(bytes);
            }
            Act::Run => _ = self.connection.run(self.now),
            Act::Write(most) => self.write(*most),
            Act::Answer(nth) => {
                let mut replies = self.seen.replies.lock();
                if !replies.is_empty() {
                    let nth = nth % replies.len();
                    let (message, reply) = replies.remove(nth);
                    drop(replies);
                    reply.answer(Ok(message));
                }
            }
            Act::Wait(time) => {
                self.now += *time;
                if self.connection.next_alarm() <= self.now {
                    self.connection.alarm(self.now);
                }
            }
            Act::Leave => self.connection.leave(self.now),
        }
    }

    fn receive(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let piece = match &mut self.cuts {
                Some(cuts) => cuts.next(&mut bytes),
                None => std::mem::take(&mut bytes),
            };
            self.connection.receive(Bytes::copy_from_slice(piece), self.now);
            if self.acts_between {
                self.connection.run(self.now);
                self.check_bounds();
                let most = if self.connection.is_choked() { usize::MAX } else { piece.len() * 7 };
                self.write(most);
            }
        }
    }

    fn write(&mut self, most: usize) {
        let output = self.connection.output();
        let written = most.min(output.len());
        let mut left = written;
        while left > 0 {
            let mut slices = [IoSlice::new(&[]); 4];
            let count = output.slices(&mut slices);
            let before = self.written.len();
            for slice in &slices[..count] {
                let room = left - (self.written.len() - before);
                self.written.extend_from_slice(&slice[..slice.len().min(room)]);
            }
            let taken = self.written.len() - before;
            assert!(taken > 0, "what is counted is there");
            output.advance(taken);
            left -= taken;
        }
        let is_done = self.connection.output().is_empty();
        self.connection.wrote(written, is_done, self.now);
    }

    fn check_bounds(&mut self) {
        let (output, held) = (self.connection.output().len(), self.shared.ledger.held());
        assert!(output <= MOST_OUTPUT, "{output} bytes wait to be written");
        // One read may be held beside what is allowed, and one message for each stream.
        let most = MAX_HELD + MOST_READ + 2 * MAX_STREAMS as usize * MAX_MESSAGE + MOST_OUTPUT;
        assert!(held <= most, "{held} bytes are held");
    }

    /// What is to be the same, however the bytes were cut.
    fn state(&mut self) -> (usize, bool, bool, Instant, usize) {
        let connection = &mut self.connection;
        (
            connection.output().len(),
            connection.is_over(),
            connection.is_dead(),
            connection.next_alarm(),
            self.shared.ledger.held(),
        )
    }

    /// The other side reads everything; then it goes away.
    fn end(mut self) {
        for turn in 0.. {
            let goes_on = self.connection.run(self.now);
            if !goes_on && self.connection.output().is_empty() {
                break;
            }
            self.write(usize::MAX);
            assert!(turn < MOST_TURNS, "it does not come to rest");
        }
        drop(self.connection);
        self.seen.replies.lock().clear(); // What calls keep is counted until they are done.
        assert_eq!(self.shared.ledger.held(), 0, "nothing is held for a connection that is gone");
        let count = |counter: &std::sync::atomic::AtomicUsize| counter.load(Ordering::Relaxed);
        assert_eq!(count(&self.seen.started), count(&self.seen.ended), "each call ends once");
        assert_eq!(count(&self.seen.talks), 0, "conversations end with their connection");
        Witness::new(&self.received).read(&self.written);
    }
}

/// Knows what the other side has allowed at most, and the rules for what is written to it.
struct Witness {
    /// What may be sent in all.
    window: i64,
    /// What streams begin with at most, and what each of them got.
    first_window: i64,
    windows: HashMap<u32, i64>,
    max_payload: usize,
    decoder: Decoder,
    /// Streams whose head is out, and whether their end is.
    streams: HashMap<u32, bool>,
}

impl Witness {
    fn new(received: &[u8]) -> Self {
        let mut witness = Self {
            window: DEFAULT_WINDOW,
            first_window: DEFAULT_WINDOW,
            windows: HashMap::new(),
            max_payload: MAX_PAYLOAD,
            decoder: Decoder::default(),
            streams: HashMap::new(),
        };
        let mut input = Bytes::copy_from_slice(received.strip_prefix(PREFACE).unwrap_or_default());
        loop {
            match frame::take(&mut input) {
                Ok(Some(frame)) => witness.hear(&frame),
                Err(fault) if fault.stream != 0 => (),
                Ok(None) | Err(_) => return witness,
            }
        }
    }

    fn hear(&mut self, frame: &Frame) {
        if let Frame::WindowUpdate { stream, increment } = frame {
            let window = if *stream == 0 { &mut self.window } else { self.windows.entry(*stream).or_default() };
            *window += i64::from(*increment);
        }
        let Frame::Settings { pairs } = frame else { return };
        for pair in pairs.chunks_exact(6) {
            let value = u32::from_be_bytes([pair[2], pair[3], pair[4], pair[5]]);
            match u16::from_be_bytes([pair[0], pair[1]]) {
                setting::INITIAL_WINDOW_SIZE => self.first_window = self.first_window.max(value.into()),
                setting::MAX_FRAME_SIZE => self.max_payload = self.max_payload.max(value as usize),
                _ => (),
            }
        }
    }

    fn read(mut self, mut written: &[u8]) {
        while !written.is_empty() {
            let [a, b, c, kind, flags, stream @ ..] = *written.first_chunk::<HEAD_BYTES>().expect("frames are whole");
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            assert!(length <= self.max_payload, "a frame of {length} bytes");
            let payload = &written[HEAD_BYTES..HEAD_BYTES + length];
            written = &written[HEAD_BYTES + length..];
            self.frame(kind, flags, u32::from_be_bytes(stream), payload);
        }
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let is_end = flags & flag::END_STREAM != 0;
        match kind {
            kind::HEADERS => {
                assert_eq!((stream % 2, flags & flag::END_HEADERS), (1, flag::END_HEADERS));
                let mut fields = Fields::default();
                self.decoder.decode(payload, usize::MAX, &mut fields).expect("our blocks can be read");
                let has_status = fields.iter().next().is_some_and(|(name, _)| name == b":status");
                let before = self.streams.insert(stream, is_end);
                assert!(before != Some(true), "fields on stream {stream}, which was over");
                assert_eq!(has_status, before.is_none(), "a head, and then trailers");
                assert!(before.is_none() || is_end, "trailers end stream {stream}");
            }
            kind::DATA => {
                assert_eq!(self.streams.insert(stream, is_end), Some(false), "data on stream {stream}");
                let count = i64::try_from(payload.len()).expect("frames are short");
                self.window -= count;
                let own = self.windows.entry(stream).or_default();
                *own -= count;
                assert!(self.window >= 0 && *own + self.first_window >= 0, "more data than windows");
            }
            kind::RST_STREAM => {
                assert!(stream != 0 && payload.len() == 4);
                self.streams.insert(stream, true);
            }
            kind::WINDOW_UPDATE => assert!(payload.len() == 4 && payload != [0; 4]),
            kind::SETTINGS | kind::PING | kind::GOAWAY => assert_eq!(stream, 0),
            other => panic!("a frame of kind {other}"),
        }
    }
}

/// A call of each method, a message in two frames, windows that open late, and decisions that make anything.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut calls = vec![0, 3, 0];
    for path in 0..6 {
        // One act of two frames: a request that goes on, and its message, which ends it. Then it runs, and all is written.
        calls.extend_from_slice(&[0, 1, 0, path, 0, 3, 5, b'h', b'e', b'l', b'l', b'o', 1, 0, 0, 1, 2, 9, 12]);
    }
    let closed = [&[1, 1, 0, 0, 0, 7, 0, 1, 1, 3, 0, 0, 0][..], &calls[3..], &[0, 0, 9, 0, 3, 4, 9, 12]].concat();
    let decisions =
        |factor: u8| (0..=255_u8).map(move |byte| byte.wrapping_mul(factor) ^ byte >> 3).collect::<Vec<_>>();
    vec![calls, closed, decisions(29), decisions(113), decisions(201)]
}
