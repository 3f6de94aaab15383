//! Header blocks: how we read them, compared with the `h2` crate.
//!
//! A server of the `h2` crate gets the same blocks as our decoder, each one as a request. The crate never sends
//! `COMPRESSION_ERROR`, and it interprets fields while it decodes them, so that some errors that are stream errors to us end the
//! connection there. Exactly the following is compared, block by block:
//!
//! * The crate ends the connection if and only if we refuse the block, or its types cannot represent a field
//!   ([`is_representable`]), or an integer is longer than the crate accepts ([`has_long_integer`]). Then the comparison ends.
//! * A request that the crate serves is the same request to us, and one that it resets is refused by us, except for the few
//!   rules that differ ([`we_are_stricter`], [`h2_is_stricter`]).
//!
//! The crate is configured to accept header lists of any size, because it computes the size of a list differently.

use std::{sync::Arc, task::Poll};

use bytes::Bytes;
use h2::{
    Reason,
    server::{Builder, Connection},
};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, request::Parts};
use http2::{
    call::CallError,
    frame::{self, Frame, PREFACE, flag, kind},
    hpack::{Decoder, decoder::Fields},
    request::{self, BlockCache, Target},
    request_body::RequestBody,
    service::{self, Response, Service},
};
use tokio::io::DuplexStream;

use super::{
    input::Input,
    pipe::{PIPE_BYTES, PipeEnd, context, poll},
    wire,
};

const MAX_BLOCKS: usize = 32;
const MAX_BLOCK_BYTES: usize = 4096;

/// Decisions: header blocks, each one generated from fields or used as bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (mut ours, mut theirs) = (OurDecoder::default(), H2Server::new());
    for _ in 0..MAX_BLOCKS {
        if input.is_empty() {
            break;
        }
        let mut block = Vec::new();
        match input.byte() % 4 {
            0 => block.extend_from_slice(input.piece()),
            1 => wire::block(&mut input, &mut block),
            _ => {
                wire::request(&mut input, &mut block);
                wire::block(&mut input, &mut block);
            }
        }
        block.truncate(MAX_BLOCK_BYTES);
        if !compare(&block, &mut ours, &mut theirs) {
            break;
        }
    }
}

/// Compares one block. False if it has ended the connection.
fn compare(block: &[u8], ours: &mut OurDecoder, theirs: &mut H2Server) -> bool {
    let is_read = ours.decode(block);
    let goes_on =
        is_read && !has_long_integer(block) && ours.fields.iter().all(|(name, value)| is_representable(name, value));
    let outcome = theirs.ask(block);
    assert_eq!(!matches!(outcome, Outcome::Ended), goes_on, "our decoder accepts it: {is_read}; {:?}", ours.fields);
    match (outcome, ours.parse(block)) {
        (Outcome::Ended, _) => return false,
        (Outcome::Served(theirs), Ok(Some(ours))) => {
            assert_eq!((theirs.method(), theirs.uri()), (&ours.method, &ours.uri));
            assert_eq!(theirs.headers(), &ours.headers);
        }
        (Outcome::Served(theirs), Err(why)) => assert!(we_are_stricter(&ours.fields), "{why} in {theirs:?}"),
        // gRPC has additional rules for requests that are calls.
        (Outcome::Served(theirs), Ok(None)) => assert!(theirs.headers().contains_key("content-type")),
        (Outcome::Reset, Ok(parts)) => assert!(h2_is_stricter(&ours.fields), "h2 reset it: {parts:?}"),
        (Outcome::Reset, Err(_)) => (),
    }
    true
}

/// A service without methods: every request is an ordinary HTTP request.
struct NoMethods;

impl Service for NoMethods {
    fn find(&self, _: &str) -> Option<Arc<dyn service::Method>> {
        None
    }

    fn refuse(&self, _: &str) -> Option<CallError> {
        None
    }

    fn run_blocking(&self, _: Box<dyn FnOnce() + Send>) {
        unreachable!("requests are only parsed here")
    }

    fn handle_http(&self, _: Request<RequestBody>) -> Response {
        unreachable!("requests are only parsed here")
    }
}

#[derive(Default)]
struct OurDecoder {
    decoder: Decoder,
    fields: Fields,
    memory: BlockCache,
}

impl OurDecoder {
    fn decode(&mut self, block: &[u8]) -> bool {
        self.decoder.decode(block, usize::MAX, &mut self.fields).is_ok()
    }

    /// The request in the block that was decoded last; `None` for a call that is refused. A request that was remembered for an
    /// identical block must be the same.
    fn parse(&mut self, block: &[u8]) -> Result<Option<Parts>, &'static str> {
        let changes = self.decoder.table_changes();
        let remembered = self.memory.get(block, changes).map(|request| parts(request));
        let request = Arc::new(request::read(&self.fields, &NoMethods).map_err(|malformed| malformed.0)?);
        let parts = parts(&request);
        if let Some(before) = remembered {
            let comparable = |parts: &Option<Parts>| {
                parts.as_ref().map(|parts| (parts.method.clone(), parts.uri.clone(), parts.headers.clone()))
            };
            assert_eq!(comparable(&before), comparable(&parts));
        } else if self.fields.only_indexed() {
            self.memory.insert(block, &request, changes);
        }
        Ok(parts)
    }
}

/// `None` for a call that is refused because of its headers.
fn parts(request: &request::Request) -> Option<Parts> {
    match &request.target {
        Target::Http(parts) => Some((**parts).clone()),
        Target::Refused(_) => None,
        Target::Method(_) => panic!("the service has no methods"),
    }
}

/// How the `h2` crate handled a block.
enum Outcome {
    Served(Box<Request<()>>),
    Reset,
    Ended,
}

struct H2Server {
    connection: Connection<DuplexStream, Bytes>,
    end: PipeEnd,
    stream: u32,
}

impl H2Server {
    fn new() -> Self {
        let (theirs, ours) = tokio::io::duplex(PIPE_BYTES);
        let mut end = PipeEnd(ours);
        let mut preface = PREFACE.to_vec();
        frame::write_head(&mut preface, 0, kind::SETTINGS, 0, 0);
        frame::write_head(&mut preface, 0, kind::SETTINGS, flag::ACK, 0);
        end.write(&preface);
        let mut handshake = Box::pin(Builder::new().max_header_list_size(1 << 30).handshake(theirs));
        let Poll::Ready(Ok(connection)) = poll(&mut handshake) else { panic!("the handshake completes at once") };
        let mut theirs = Self { connection, end, stream: 1 };
        assert!(theirs.connection.poll_accept(&mut context()).is_pending());
        theirs
    }

    fn ask(&mut self, block: &[u8]) -> Outcome {
        let mut bytes = Vec::new();
        frame::write_head(&mut bytes, block.len(), kind::HEADERS, flag::END_HEADERS, self.stream);
        bytes.extend_from_slice(block);
        self.end.write(&bytes);
        let id = self.stream;
        self.stream += 2;
        match self.connection.poll_accept(&mut context()) {
            Poll::Ready(Some(Ok((request, _)))) => return Outcome::Served(Box::new(request.map(drop))),
            Poll::Ready(Some(Err(error))) => {
                assert!(error.is_go_away() && error.reason() == Some(Reason::PROTOCOL_ERROR), "{error}");
                return Outcome::Ended;
            }
            Poll::Ready(None) | Poll::Pending => (),
        }
        let mut output = Bytes::from(self.end.read());
        while let Ok(Some(frame)) = frame::take(&mut output) {
            if matches!(frame, Frame::GoAway { .. }) {
                return Outcome::Ended;
            }
            if matches!(frame, Frame::Reset { stream, .. } if stream == id) {
                return Outcome::Reset;
            }
        }
        panic!("neither served nor reset")
    }
}

/// Whether the types of the `http` crate can represent a field: if they cannot, the `h2` crate ends the connection.
fn is_representable(name: &[u8], value: &[u8]) -> bool {
    match name {
        b":authority" | b":scheme" | b":path" | b":protocol" => std::str::from_utf8(value).is_ok(),
        b":method" => Method::from_bytes(value).is_ok(),
        b":status" => StatusCode::from_bytes(value).is_ok(),
        _ => HeaderName::from_lowercase(name).is_ok() && HeaderValue::from_bytes(value).is_ok(),
    }
}

/// Whether a valid block contains an integer of more than five bytes. The `h2` crate rejects these, even if they encode a small
/// number.
fn has_long_integer(mut block: &[u8]) -> bool {
    const LONGEST: usize = 5;
    let integer = |block: &mut &[u8], prefix: u32| {
        let mask = (1_u8 << prefix) - 1;
        let first = block.first().map_or(0, |first| first & mask);
        let more =
            if first == mask { 1 + block.iter().skip(1).take_while(|byte| **byte & 0x80 != 0).count() } else { 0 };
        let length = (1 + more).min(block.len());
        let value = block[..length].iter().skip(1).rev().fold(0, |sum, byte| sum << 7 | usize::from(byte & 0x7f));
        *block = &block[length..];
        (length, value + usize::from(first))
    };
    while let Some(&first) = block.first() {
        let (prefix, is_literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let (length, index) = integer(&mut block, prefix);
        let mut longest = length;
        for _ in 0..if is_literal { 1 + usize::from(index == 0) } else { 0 } {
            let (length, text) = integer(&mut block, 7);
            longest = longest.max(length);
            block = &block[text.min(block.len())..];
        }
        if longest > LONGEST {
            return true;
        }
    }
    false
}

fn any(fields: &Fields, is: impl Fn(&[u8], &[u8]) -> bool) -> bool {
    fields.iter().any(|(name, value)| is(name, value))
}

/// We refuse what RFC 9113 forbids and the `h2` crate accepts: spaces or tabs at the start or end of a value, a content length
/// that is not a number, a quotation mark in a name, a request without a path. (CONNECT has none: we do not offer tunnels.)
fn we_are_stricter(fields: &Fields) -> bool {
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let has_path = any(fields, |name, _| name == b":path");
    !has_path
        || any(fields, |name, value| {
            !name.starts_with(b":") && (is_blank(value.first()) || is_blank(value.last()))
                || name == b"content-length" && value.is_empty()
                || name.contains(&b'"')
        })
}

/// The `h2` crate refuses a content length of twenty digits, an invalid scheme, and CONNECT with scheme and path.
fn h2_is_stricter(fields: &Fields) -> bool {
    let is_scheme = |value: &[u8]| http::uri::Scheme::try_from(value).is_ok();
    any(fields, |name, value| {
        name == b"content-length" && value.len() > 19
            || name == b":scheme" && !is_scheme(value)
            || name == b":method" && value == b"CONNECT"
    })
}

/// Three fields of 34 bytes each for a table of 31 bytes plus `more`, then all three by index.
fn filled(more: u8) -> Vec<u8> {
    let first = [&[0, 20, 0x3f, more][..], b"\x82\x86\x84\x40\x01a\x011\x40\x01b\x012\x40\x01c\x013"].concat();
    [&first[..], b"\x00\x06\x82\x86\x84\xbe\xbf\xc0"].concat()
}

/// The requests of RFC 7541, appendix C, a table that is filled to its last byte, and decisions that generate many fields.
pub fn seeds() -> Vec<Vec<u8>> {
    let blocks: [&[u8]; 3] = [
        b"\x82\x86\x84\x41\x0fwww.example.com",
        b"\x82\x86\x84\xbe\x58\x86\xa8\xeb\x10\x64\x9c\xbf",
        b"\x82\x87\x85\xbf\x40\x88\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f\x89\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf",
    ];
    let standard =
        blocks.iter().flat_map(|block| [&[0, u8::try_from(block.len()).expect("it is short")][..], block].concat());
    let resized = b"\x00\x06\x3f\xe1\x1f\x20\x82\x86\x00\x04\x82\x86\x84\xbe".to_vec();
    let decisions = (0..200_u8).map(|byte| byte.wrapping_mul(29) ^ 0x5a);
    vec![standard.collect(), resized, filled(0x46), filled(0x47), decisions.collect()]
}
