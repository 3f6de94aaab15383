//! A client that writes frames by hand.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body::Body as _;
use http_body_util::BodyExt as _;

use super::*;
use crate::{
    call::{self, Reply},
    frame::{self, HEAD_BYTES},
    hpack::Encoder,
    ledger::Ledger,
    message::{self, PREFIX_BYTES},
    request_body::RequestBody,
    service::{Response, ResponseBody},
};
use test_service::{Seen, TestService};

mod abuse;
mod calls;
mod flow;
mod ledger;
mod protocol;
mod test_service;

/// Ordinary HTTP requests.
fn page(request: http::Request<RequestBody>) -> Response {
    Box::pin(async move {
        let mut builder = http::Response::builder().status(if request.uri().path() == "/gone" { 404 } else { 200 });
        builder = builder.header("x-method", request.method().as_str());
        let body: ResponseBody = if request.uri().path() == "/large" {
            Box::pin(http_body_util::Full::new(vec![b'x'; 50_000].into()).map_err(|never| match never {}))
        } else if request.body().is_end_stream() {
            Box::pin(http_body_util::Full::new(Bytes::from_static(b"page")).map_err(|never| match never {}))
        } else {
            Box::pin(request.into_body())
        };
        builder.body(body).unwrap()
    })
}

fn service(seen: &Arc<Seen>) -> Arc<TestService> {
    Arc::new(TestService { seen: seen.clone(), handle_http: page, keeps_what_it_gets: true })
}

/// A received frame.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ReceivedFrame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

struct Client {
    connection: Connection,
    seen: Arc<Seen>,
    encoder: Encoder,
    decoder: Decoder,
    now: Instant,
}

impl Client {
    /// A client that has exchanged prefaces with the server.
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let mut client = Self::before_preface(limits);
        client.send(PREFACE);
        client.frame(kind::SETTINGS, 0, 0, &[]);
        let greeting = client.take();
        let kinds: Vec<_> = greeting.iter().map(|frame| (frame.kind, frame.flags)).collect();
        assert_eq!(kinds, [(kind::SETTINGS, 0), (kind::WINDOW_UPDATE, 0), (kind::SETTINGS, flag::ACK)]);
        client.frame(kind::SETTINGS, flag::ACK, 0, &[]);
        client
    }

    /// A client that has not sent anything.
    fn before_preface(limits: Limits) -> Self {
        let (seen, now) = (Arc::new(Seen::default()), Instant::now());
        let shared = Arc::new(Shared::new(limits, Ledger::new(2 << 30)));
        let connection = Connection::new(service(&seen), shared, Arc::default(), now);
        Self { connection, seen, encoder: Encoder::default(), decoder: Decoder::default(), now }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.connection.receive(Bytes::copy_from_slice(bytes), self.now);
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let bytes = frame_bytes(kind, flags, stream, payload);
        self.send(&bytes);
    }

    fn block(&mut self, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        self.encoder.begin(&mut block);
        let usual = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "here"),
            ("content-type", "application/grpc"),
        ];
        for (name, value) in usual.iter().chain(more) {
            self.encoder.field(name, value.as_bytes(), &mut block);
        }
        block
    }

    fn open(&mut self, stream: u32, path: &str, more: &[(&str, &str)], end: bool) {
        let block = self.block(path, more);
        let flags = flag::END_HEADERS | if end { flag::END_STREAM } else { 0 };
        self.frame(kind::HEADERS, flags, stream, &block);
    }

    fn message(&mut self, stream: u32, message: &[u8], end: bool) {
        self.frame(kind::DATA, if end { flag::END_STREAM } else { 0 }, stream, &framed(message));
    }

    fn call(&mut self, stream: u32, path: &str, message: &[u8]) {
        self.open(stream, path, &[], false);
        self.message(stream, message, true);
    }

    fn grant(&mut self, stream: u32, increment: u32) {
        self.frame(kind::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes());
    }

    fn set(&mut self, setting: u16, value: u32) {
        let payload = [&setting.to_be_bytes()[..], &value.to_be_bytes()].concat();
        self.frame(kind::SETTINGS, 0, 0, &payload);
    }

    /// Lets the server do all that it can do, and returns the frames that it writes.
    fn take(&mut self) -> Vec<ReceivedFrame> {
        let mut bytes = Vec::new();
        loop {
            let goes_on = self.connection.run(self.now);
            let written = drain(self.connection.output());
            if written.is_empty() && !goes_on {
                break;
            }
            bytes.extend(written);
        }
        parse(&bytes)
    }

    fn fields(&mut self, got: &ReceivedFrame) -> Vec<String> {
        assert_eq!(got.flags & flag::END_HEADERS, flag::END_HEADERS);
        let mut fields = Fields::default();
        self.decoder.decode(&got.payload, usize::MAX, &mut fields).unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        fields.iter().map(|(name, value)| format!("{}={}", text(name), text(value))).collect()
    }

    /// The frames that the server writes, as one line of text each.
    fn received(&mut self) -> Vec<String> {
        let frames = self.take();
        let mut lines = Vec::new();
        for got in frames {
            let end = if got.flags & flag::END_STREAM != 0 { " end" } else { "" };
            lines.push(match got.kind {
                kind::HEADERS => format!("{} {}{end}", got.stream, self.fields(&got).join(" ")),
                kind::DATA => format!("{} data {}{end}", got.stream, got.payload.len()),
                kind::RST_STREAM => format!("{} reset {}", got.stream, number(&got.payload)),
                kind::GOAWAY => format!("goaway {} {}", number(&got.payload), number(&got.payload[4..])),
                kind::PING => format!("ping {}", got.flags),
                kind::SETTINGS => format!("settings {}", got.flags),
                kind::WINDOW_UPDATE => format!("{} window {}", got.stream, number(&got.payload)),
                other => format!("{} kind {other}", got.stream),
            });
        }
        lines
    }

    /// Asserts that the connection ends with this code.
    #[track_caller]
    fn assert_ended(&mut self, code: Code) {
        let received = self.received();
        let last = received.last().cloned().unwrap_or_default();
        assert!(last.starts_with("goaway ") && last.ends_with(&format!(" {}", code as u32)), "{code:?}: {received:?}");
        assert!(self.connection.is_closed());
    }

    /// Asserts that a stream ends with this code, and the connection stays usable.
    #[track_caller]
    fn assert_reset(&mut self, stream: u32, code: Code) {
        let received = self.received();
        assert!(received.contains(&format!("{stream} reset {}", code as u32)), "{code:?}: {received:?}");
        assert!(!self.connection.is_closed());
        self.assert_healthy(stream + 1000);
    }

    /// Asserts that calls still work.
    #[track_caller]
    fn assert_healthy(&mut self, near: u32) {
        let stream = (near | 1) + 2;
        self.call(stream, "/t/Echo", b"healthy");
        let received = self.received();
        assert!(received.contains(&format!("{stream} data 12")), "{received:?}");
    }
}

const HEAD: &str = ":status=200 content-type=application/grpc";

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&message::prefix(message.len(), false).unwrap()[..], message].concat()
}

fn frame_bytes(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&frame::head(payload.len(), kind, flags, stream)[..], payload].concat()
}

fn drain(output: &mut Output) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !output.is_empty() {
        let mut slices = [std::io::IoSlice::new(&[]); 8];
        let count = output.slices(&mut slices);
        let piece: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
        output.advance(piece.len());
        bytes.extend(piece);
    }
    bytes
}

fn parse(mut bytes: &[u8]) -> Vec<ReceivedFrame> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let [a, b, c, kind, flags, stream @ ..] = *bytes.first_chunk::<HEAD_BYTES>().unwrap();
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let payload = bytes[HEAD_BYTES..HEAD_BYTES + length].to_vec();
        frames.push(ReceivedFrame { kind, flags, stream: u32::from_be_bytes(stream), payload });
        bytes = &bytes[HEAD_BYTES + length..];
    }
    frames
}
