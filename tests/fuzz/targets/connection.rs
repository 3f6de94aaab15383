//! A whole connection with arbitrary input. The same actions are performed on three connections:
//!
//! * the first receives its input in one piece, the second in arbitrary pieces: both write the same bytes;
//! * the third also runs and writes between the pieces, as happens on a network.
//!
//! No connection may panic, hold more memory than its limits allow, or keep a call that has ended. What each one writes must
//! follow the rules that [`OutputChecker`] checks.

use std::{
    collections::HashMap,
    io::IoSlice,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use http2::{
    connection::Connection,
    frame::{self, DEFAULT_WINDOW, Frame, HEAD_BYTES, MAX_PAYLOAD, PREFACE, flag, kind, setting},
    hpack::{Decoder, decoder::Fields},
    ledger::Ledger,
    limits::{Limits, Shared},
    request_body::RequestBody,
    sender::SATURATED_BYTES,
    service::{Response, ResponseBody},
};

use super::{
    input::{Input, Splitter},
    test_service::{Seen, TestService},
    wire,
};

const MAX_ACTIONS: usize = 200;
/// The most that is read at a time.
const MAX_READ: usize = 64 << 10;
const MAX_HELD: usize = 64 << 10;
const MAX_MESSAGE: usize = 4 << 10;
const MAX_STREAMS: u32 = 8;
/// Reading stops when this much output is pending; the last read may add some more.
const MAX_OUTPUT: usize = 4 * SATURATED_BYTES + 16 * MAX_READ;
/// Without new input, a connection becomes idle within this many turns.
const MAX_IDLE_TURNS: usize = 10_000;

/// An action performed on all connections.
enum Action {
    Receive(Vec<u8>),
    Run,
    /// The peer reads this many bytes.
    Write(usize),
    /// The service answers a pending call.
    CallResult(usize),
    Wait(Duration),
    Shutdown,
}

/// Decisions: the seed of the splits, whether the connection starts with the preface, then actions.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (seed, start) = (input.short(), Instant::now());
    let mut whole = Instance::new(start, None);
    let mut split = Instance::new(start, Some(Splitter::new(seed)));
    let mut interleaved = Instance::new(start, Some(Splitter::new(seed)));
    interleaved.runs_between = true;
    let (mut newest, mut last) = (u32::MAX, Vec::new());
    let mut compared = 0;
    let mut next = Some(Action::Receive(preface(&mut input)));
    for _ in 0..MAX_ACTIONS {
        let Some(action) = next else { break };
        for instance in [&mut whole, &mut split, &mut interleaved] {
            instance.perform(&action);
            instance.check_bounds();
        }
        assert_eq!(whole.state(), split.state(), "splits make no difference");
        let same = whole.written[compared..] == split.written[compared..];
        assert!(same, "splits make no difference to the output");
        compared = whole.written.len();
        next = (!input.is_empty()).then(|| decide(&mut input, &mut newest, &mut last));
    }
    [whole, split, interleaved].into_iter().for_each(Instance::end);
}

fn preface(input: &mut Input) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    if input.byte() & 0xf == 0xf {
        return input.piece().to_vec();
    }
    frame::write_head(&mut bytes, 0, kind::SETTINGS, 0, 0);
    bytes
}

fn decide(input: &mut Input, newest: &mut u32, last: &mut Vec<u8>) -> Action {
    match input.below(16) {
        0..=7 => {
            last.clear();
            for _ in 0..=input.below(6) {
                wire::frame(input, newest, last);
            }
            last.truncate(MAX_READ);
            Action::Receive(last.clone())
        }
        8 => {
            let times = usize::from(input.byte()) + 1;
            Action::Receive(last.iter().copied().cycle().take((last.len() * times).min(MAX_READ)).collect())
        }
        9 | 10 => Action::Run,
        11 => Action::Write(usize::from(input.short())),
        12 => Action::Write(usize::MAX),
        13 => Action::CallResult(input.byte().into()),
        14 => Action::Wait(Duration::from_millis(input.pick(&[1, 60, 1100, 11_000]))),
        _ if input.below(8) == 0 => Action::Shutdown,
        _ => Action::Run,
    }
}

/// Answers a request with its own headers and body, and with its headers again as trailers.
fn mirror(request: Request<RequestBody>) -> Response {
    Box::pin(async move {
        let (parts, body) = request.into_parts();
        let trailers = parts.headers.clone();
        let body: ResponseBody = Box::pin(body.with_trailers(async move { Some(Ok(trailers)) }));
        let mut response = http::Response::new(body);
        *response.headers_mut() = parts.headers;
        response
    })
}

/// A connection under test and its environment.
struct Instance {
    connection: Connection,
    shared: Arc<Shared>,
    seen: Arc<Seen>,
    now: Instant,
    splitter: Option<Splitter>,
    runs_between: bool,
    received: Vec<u8>,
    written: Vec<u8>,
}

impl Instance {
    fn new(now: Instant, splitter: Option<Splitter>) -> Self {
        let limits = Limits {
            max_streams: MAX_STREAMS,
            max_header_list: 4 << 10,
            max_message: MAX_MESSAGE,
            max_held: MAX_HELD,
            ..Limits::default()
        };
        let (shared, seen) = (Arc::new(Shared::new(limits, Ledger::new(2 << 30))), Arc::new(Seen::default()));
        let service = TestService { seen: seen.clone(), handle_http: mirror, keeps_what_it_gets: false };
        let connection = Connection::new(Arc::new(service), shared.clone(), Arc::default(), now);
        let (received, written) = (Vec::new(), Vec::new());
        Self { connection, shared, seen, now, splitter, runs_between: false, received, written }
    }

    fn perform(&mut self, action: &Action) {
        match action {
            Action::Receive(bytes) => {
                if self.connection.must_not_read() {
                    self.write(usize::MAX); // Nothing is read until then.
                }
                self.received.extend_from_slice(bytes);
                self.receive(bytes);
            }
            Action::Run => _ = self.connection.run(self.now),
            Action::Write(most) => self.write(*most),
            Action::CallResult(nth) => {
                let mut replies = self.seen.replies.lock();
                if !replies.is_empty() {
                    let nth = nth % replies.len();
                    let (message, reply) = replies.remove(nth);
                    drop(replies);
                    reply.answer(Ok(message));
                }
            }
            Action::Wait(time) => {
                self.now += *time;
                if self.connection.next_timer() <= self.now {
                    self.connection.on_timer(self.now);
                }
            }
            Action::Shutdown => self.connection.shut_down(self.now),
        }
    }

    fn receive(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let piece = match &mut self.splitter {
                Some(splitter) => splitter.next(&mut bytes),
                None => std::mem::take(&mut bytes),
            };
            self.connection.receive(Bytes::copy_from_slice(piece), self.now);
            if self.runs_between {
                self.connection.run(self.now);
                self.check_bounds();
                let most = if self.connection.must_not_read() { usize::MAX } else { piece.len() * 7 };
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
                let limit = left - (self.written.len() - before);
                self.written.extend_from_slice(&slice[..slice.len().min(limit)]);
            }
            let taken = self.written.len() - before;
            assert!(taken > 0, "the output has as many bytes as it counts");
            output.advance(taken);
            left -= taken;
        }
        let is_done = self.connection.output().is_empty();
        self.connection.wrote(written, is_done, self.now);
    }

    fn check_bounds(&mut self) {
        let (output, held) = (self.connection.output().len(), self.shared.ledger.held());
        assert!(output <= MAX_OUTPUT, "{output} bytes of pending output");
        // One read and one message per stream may be held beyond the limit.
        let most = MAX_HELD + MAX_READ + 2 * MAX_STREAMS as usize * MAX_MESSAGE + MAX_OUTPUT;
        assert!(held <= most, "{held} bytes are held");
    }

    /// What must be the same however the input was split.
    fn state(&mut self) -> (usize, bool, bool, Instant, usize) {
        let connection = &mut self.connection;
        (
            connection.output().len(),
            connection.is_closed(),
            connection.is_dead(),
            connection.next_timer(),
            self.shared.ledger.held(),
        )
    }

    /// The peer reads everything and disconnects.
    fn end(mut self) {
        for turn in 0.. {
            let has_work = self.connection.run(self.now);
            if !has_work && self.connection.output().is_empty() {
                break;
            }
            self.write(usize::MAX);
            assert!(turn < MAX_IDLE_TURNS, "the connection does not become idle");
        }
        drop(self.connection);
        self.seen.replies.lock().clear(); // Pending calls hold counted memory.
        assert_eq!(self.shared.ledger.held(), 0, "a closed connection holds no memory");
        let (started, ended) = (self.seen.started.load(Ordering::Relaxed), self.seen.handled.lock().len());
        assert_eq!(started, ended, "each call ends once");
        assert_eq!(self.seen.conversations.load(Ordering::Relaxed), 0, "conversations end with their connection");
        OutputChecker::new(&self.received).read(&self.written);
    }
}

/// Checks the output of a connection against the protocol and against the most that the peer has ever allowed.
struct OutputChecker {
    /// The connection's flow-control window.
    window: i64,
    /// The largest initial window of streams, and the changes of each stream's window.
    initial_window: i64,
    windows: HashMap<u32, i64>,
    max_payload: usize,
    decoder: Decoder,
    /// Streams whose response headers were written, and whether they have ended.
    streams: HashMap<u32, bool>,
}

impl OutputChecker {
    fn new(received: &[u8]) -> Self {
        let mut checker = Self {
            window: DEFAULT_WINDOW,
            initial_window: DEFAULT_WINDOW,
            windows: HashMap::new(),
            max_payload: MAX_PAYLOAD,
            decoder: Decoder::default(),
            streams: HashMap::new(),
        };
        let mut input = Bytes::copy_from_slice(received.strip_prefix(PREFACE).unwrap_or_default());
        loop {
            match frame::take(&mut input) {
                Ok(Some(frame)) => checker.apply(&frame),
                Err(fault) if fault.stream != 0 => (),
                Ok(None) | Err(_) => return checker,
            }
        }
    }

    /// Applies a frame of the peer.
    fn apply(&mut self, frame: &Frame) {
        if let Frame::WindowUpdate { stream, increment } = frame {
            let window = if *stream == 0 { &mut self.window } else { self.windows.entry(*stream).or_default() };
            *window += i64::from(*increment);
        }
        let Frame::Settings { pairs } = frame else { return };
        for pair in pairs.chunks_exact(6) {
            let value = u32::from_be_bytes([pair[2], pair[3], pair[4], pair[5]]);
            match u16::from_be_bytes([pair[0], pair[1]]) {
                setting::INITIAL_WINDOW_SIZE => self.initial_window = self.initial_window.max(value.into()),
                setting::MAX_FRAME_SIZE => self.max_payload = self.max_payload.max(value as usize),
                _ => (),
            }
        }
    }

    fn read(mut self, mut written: &[u8]) {
        while !written.is_empty() {
            let [a, b, c, kind, flags, stream @ ..] =
                *written.first_chunk::<HEAD_BYTES>().expect("frames are complete");
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
                self.decoder.decode(payload, usize::MAX, &mut fields).expect("our header blocks are valid");
                let has_status = fields.iter().next().is_some_and(|(name, _)| name == b":status");
                let before = self.streams.insert(stream, is_end);
                assert!(before != Some(true), "headers on stream {stream}, which had ended");
                assert_eq!(has_status, before.is_none(), "headers come first, then trailers");
                assert!(before.is_none() || is_end, "trailers end stream {stream}");
            }
            kind::DATA => {
                assert_eq!(self.streams.insert(stream, is_end), Some(false), "data on stream {stream}");
                let count = i64::try_from(payload.len()).expect("frames are short");
                self.window -= count;
                let own = self.windows.entry(stream).or_default();
                *own -= count;
                assert!(self.window >= 0 && *own + self.initial_window >= 0, "more data than the windows allow");
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

/// A call of each method with a message in two frames, windows that open late, and arbitrary decisions.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut calls = vec![0, 3, 0];
    for path in 0..6 {
        // One action with two frames: a request's headers, and its message, which ends it. Then run, and write everything.
        calls.extend_from_slice(&[0, 1, 0, path, 0, 3, 5, b'h', b'e', b'l', b'l', b'o', 1, 0, 0, 1, 2, 9, 12]);
    }
    let closed = [&[1, 1, 0, 0, 0, 7, 0, 1, 1, 3, 0, 0, 0][..], &calls[3..], &[0, 0, 9, 0, 3, 4, 9, 12]].concat();
    let decisions =
        |factor: u8| (0..=255_u8).map(move |byte| byte.wrapping_mul(factor) ^ byte >> 3).collect::<Vec<_>>();
    vec![calls, closed, decisions(29), decisions(113), decisions(201)]
}
