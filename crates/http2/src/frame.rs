//! Frames (RFC 9113 §4 and §6), parsed and checked one at a time, without the state of a connection.
//!
//! ```text
//! | length 24 | type 8 | flags 8 | stream 32 | payload |
//! ```

use bytes::{Buf, Bytes};

use super::fault::{Code, Fault};

/// The client connection preface.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The size of a frame header.
pub const HEAD_BYTES: usize = 9;
/// The offset of the frame type in the header.
pub const KIND_OFFSET: usize = 3;
/// The largest payload that the server accepts: the default, which it never changes.
pub const MAX_PAYLOAD: usize = 16_384;
/// The largest payload that can be negotiated.
pub const LARGEST_PAYLOAD: usize = (1 << 24) - 1;
/// The largest flow-control window.
pub const MAX_WINDOW: i64 = (1 << 31) - 1;
/// The initial flow-control window.
pub const DEFAULT_WINDOW: i64 = 65_535;

/// Frame types.
pub mod kind {
    #![allow(missing_docs, reason = "named by RFC 9113")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Frame flags.
pub mod flag {
    #![allow(missing_docs, reason = "named by RFC 9113")]
    pub const ACK: u8 = 0x1;
    pub const END_STREAM: u8 = 0x1;
    pub const END_HEADERS: u8 = 0x4;
    pub const PADDED: u8 = 0x8;
    pub const PRIORITY: u8 = 0x20;
}

/// Identifiers of settings.
pub mod setting {
    #![allow(missing_docs, reason = "named by RFC 9113")]
    pub const HEADER_TABLE_SIZE: u16 = 1;
    pub const ENABLE_PUSH: u16 = 2;
    pub const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub const INITIAL_WINDOW_SIZE: u16 = 4;
    pub const MAX_FRAME_SIZE: u16 = 5;
    pub const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// A frame from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "named by RFC 9113")]
pub enum Frame {
    /// `counted` is the length for flow control, which includes the padding.
    Data {
        stream: u32,
        data: Bytes,
        counted: usize,
        end: bool,
    },
    /// `depends_on_itself`: the priority names the stream itself as its parent.
    Headers {
        stream: u32,
        block: Bytes,
        end: bool,
        complete: bool,
        depends_on_itself: bool,
    },
    Priority,
    Reset {
        stream: u32,
        code: u32,
    },
    Settings {
        pairs: Bytes,
    },
    SettingsAck,
    Ping {
        data: u64,
        ack: bool,
    },
    GoAway {
        code: u32,
    },
    WindowUpdate {
        stream: u32,
        increment: u32,
    },
    Continuation {
        stream: u32,
        block: Bytes,
        complete: bool,
    },
    /// A frame of an unknown type.
    Unknown,
}

/// Takes the first frame out of `input`, if it is complete.
pub fn take(input: &mut Bytes) -> Result<Option<Frame>, Fault> {
    let Some(head) = input.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    let [a, b, c, kind, flags, stream @ ..] = *head;
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    if length > MAX_PAYLOAD {
        return Err(Fault::connection(Code::FrameSize, "frame larger than SETTINGS_MAX_FRAME_SIZE"));
    }
    if input.len() < HEAD_BYTES + length {
        return Ok(None);
    }
    let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
    input.advance(HEAD_BYTES);
    let payload = input.split_to(length);
    read(kind, flags, stream, payload).map(Some)
}

fn read(kind: u8, flags: u8, stream: u32, payload: Bytes) -> Result<Frame, Fault> {
    match kind {
        kind::DATA => data(flags, on_stream(stream)?, payload),
        kind::HEADERS => headers(flags, on_stream(stream)?, payload),
        kind::PRIORITY => priority(on_stream(stream)?, payload),
        kind::RST_STREAM => reset(on_stream(stream)?, payload),
        kind::SETTINGS => on_connection(stream).and_then(|()| settings(flags, payload)),
        kind::PUSH_PROMISE => Err(Fault::connection(Code::Protocol, "PUSH_PROMISE from a client")),
        kind::PING => on_connection(stream).and_then(|()| ping(flags, payload)),
        kind::GOAWAY => on_connection(stream).and_then(|()| go_away(payload)),
        kind::WINDOW_UPDATE => window_update(stream, payload),
        kind::CONTINUATION => {
            let complete = flags & flag::END_HEADERS != 0;
            Ok(Frame::Continuation { stream: on_stream(stream)?, block: payload, complete })
        }
        _ => Ok(Frame::Unknown),
    }
}

fn on_stream(stream: u32) -> Result<u32, Fault> {
    if stream == 0 {
        return Err(Fault::connection(Code::Protocol, "stream frame with stream ID 0"));
    }
    Ok(stream)
}

fn on_connection(stream: u32) -> Result<(), Fault> {
    if stream != 0 {
        return Err(Fault::connection(Code::Protocol, "connection frame with a stream ID"));
    }
    Ok(())
}

const WRONG_SIZE: Fault = Fault::connection(Code::FrameSize, "frame size invalid for its type");

fn exactly<const N: usize>(payload: &Bytes) -> Result<[u8; N], Fault> {
    payload[..].try_into().map_err(|_| WRONG_SIZE)
}

/// Removes the pad length and the padding.
fn without_padding(flags: u8, mut payload: Bytes) -> Result<Bytes, Fault> {
    if flags & flag::PADDED != 0 {
        let padding = usize::from(payload.try_get_u8().map_err(|_| WRONG_SIZE)?);
        let Some(length) = payload.len().checked_sub(padding) else {
            return Err(Fault::connection(Code::Protocol, "padding longer than its frame"));
        };
        payload.truncate(length);
    }
    Ok(payload)
}

fn data(flags: u8, stream: u32, payload: Bytes) -> Result<Frame, Fault> {
    let counted = payload.len();
    let data = without_padding(flags, payload)?;
    Ok(Frame::Data { stream, data, counted, end: flags & flag::END_STREAM != 0 })
}

fn headers(flags: u8, stream: u32, payload: Bytes) -> Result<Frame, Fault> {
    let mut block = without_padding(flags, payload)?;
    let mut depends_on_itself = false;
    if flags & flag::PRIORITY != 0 {
        depends_on_itself = block.try_get_u32().map_err(|_| WRONG_SIZE)? & 0x7fff_ffff == stream;
        block.try_get_u8().map_err(|_| WRONG_SIZE)?;
    }
    let (end, complete) = (flags & flag::END_STREAM != 0, flags & flag::END_HEADERS != 0);
    Ok(Frame::Headers { stream, block, end, complete, depends_on_itself })
}

/// Priorities are deprecated: checked and then ignored.
fn priority(stream: u32, payload: Bytes) -> Result<Frame, Fault> {
    let Ok([parent @ .., _weight]) = exactly::<5>(&payload) else {
        return Err(Fault::stream(stream, Code::FrameSize, "PRIORITY frame of invalid size"));
    };
    if u32::from_be_bytes(parent) & 0x7fff_ffff == stream {
        return Err(Fault::stream(stream, Code::Protocol, "stream depends on itself"));
    }
    Ok(Frame::Priority)
}

fn reset(stream: u32, payload: Bytes) -> Result<Frame, Fault> {
    Ok(Frame::Reset { stream, code: u32::from_be_bytes(exactly(&payload)?) })
}

fn settings(flags: u8, payload: Bytes) -> Result<Frame, Fault> {
    if flags & flag::ACK != 0 {
        return if payload.is_empty() { Ok(Frame::SettingsAck) } else { Err(WRONG_SIZE) };
    }
    if !payload.len().is_multiple_of(6) {
        return Err(WRONG_SIZE);
    }
    Ok(Frame::Settings { pairs: payload })
}

fn ping(flags: u8, payload: Bytes) -> Result<Frame, Fault> {
    Ok(Frame::Ping { data: u64::from_be_bytes(exactly(&payload)?), ack: flags & flag::ACK != 0 })
}

fn go_away(mut payload: Bytes) -> Result<Frame, Fault> {
    payload.try_get_u32().map_err(|_| WRONG_SIZE)?;
    Ok(Frame::GoAway { code: payload.try_get_u32().map_err(|_| WRONG_SIZE)? })
}

fn window_update(stream: u32, payload: Bytes) -> Result<Frame, Fault> {
    let increment = u32::from_be_bytes(exactly(&payload)?) & 0x7fff_ffff;
    if increment == 0 {
        return Err(Fault::stream(stream, Code::Protocol, "window increment of 0"));
    }
    Ok(Frame::WindowUpdate { stream, increment })
}

/// Writes a frame header.
pub fn write_head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    out.extend_from_slice(&head(length, kind, flags, stream));
}

/// A frame header.
#[must_use]
pub fn head(length: usize, kind: u8, flags: u8, stream: u32) -> [u8; HEAD_BYTES] {
    let length = u32::try_from(length).expect("the length of a payload fits into three bytes");
    let (length, stream) = (length.to_be_bytes(), stream.to_be_bytes());
    [length[1], length[2], length[3], kind, flags, stream[0], stream[1], stream[2], stream[3]]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Bytes {
        let mut out = head(payload.len(), kind, flags, stream).to_vec();
        out.extend_from_slice(payload);
        out.into()
    }

    #[track_caller]
    fn check(kind: u8, flags: u8, stream: u32, payload: &[u8], expected: Result<Frame, (u32, Code)>) {
        let taken = take(&mut frame(kind, flags, stream, payload));
        assert_eq!(taken.map(Option::unwrap).map_err(|fault| (fault.stream, fault.code)), expected);
    }

    #[test]
    fn a_frame_is_taken_when_all_of_it_has_come() {
        let whole = frame(kind::PING, 0, 0, &7_u64.to_be_bytes());
        for length in 0..whole.len() {
            let mut part = whole.slice(..length);
            assert_eq!(take(&mut part), Ok(None));
            assert_eq!(part.len(), length);
        }
        assert_eq!(take(&mut whole.clone()), Ok(Some(Frame::Ping { data: 7, ack: false })));
    }

    #[test]
    fn padding_and_priority_are_removed() {
        let data = |data: &'static [u8], counted| Frame::Data { stream: 1, data: data.into(), counted, end: false };
        check(kind::DATA, 0, 1, b"abc", Ok(data(b"abc", 3)));
        check(kind::DATA, flag::PADDED, 1, b"\x02abc..", Ok(data(b"abc", 6)));
        check(kind::DATA, flag::PADDED, 1, b"\x05abc..", Ok(data(b"", 6)));
        check(kind::DATA, flag::PADDED, 1, b"\x06abc..", Err((0, Code::Protocol)));
        check(kind::DATA, flag::PADDED, 1, b"", Err((0, Code::FrameSize)));
        let headers = |depends_on_itself| Frame::Headers {
            stream: 3,
            block: Bytes::from_static(b"block"),
            end: true,
            complete: true,
            depends_on_itself,
        };
        let flags = flag::PADDED | flag::PRIORITY | flag::END_STREAM | flag::END_HEADERS;
        check(kind::HEADERS, flags, 3, b"\x01\x80\0\0\x01\x10block.", Ok(headers(false)));
        check(kind::HEADERS, flags, 3, b"\x01\0\0\0\x03\x10block.", Ok(headers(true)));
        check(kind::HEADERS, flag::PRIORITY, 3, b"\0\0\0\x01", Err((0, Code::FrameSize)));
    }

    #[test]
    fn malformed_frames_are_refused() {
        let connection = |code| Err((0, code));
        check(kind::DATA, 0, 0, b"", connection(Code::Protocol));
        check(kind::HEADERS, 0, 0, b"", connection(Code::Protocol));
        check(kind::PRIORITY, 0, 0, b"12345", connection(Code::Protocol));
        check(kind::PRIORITY, 0, 5, b"1234", Err((5, Code::FrameSize)));
        check(kind::PRIORITY, 0, 5, b"\0\0\0\x05\0", Err((5, Code::Protocol)));
        check(kind::RST_STREAM, 0, 0, b"1234", connection(Code::Protocol));
        check(kind::RST_STREAM, 0, 1, b"123", connection(Code::FrameSize));
        check(kind::SETTINGS, 0, 1, b"", connection(Code::Protocol));
        check(kind::SETTINGS, 0, 0, b"12345", connection(Code::FrameSize));
        check(kind::SETTINGS, flag::ACK, 0, b"123456", connection(Code::FrameSize));
        check(kind::PUSH_PROMISE, 0, 1, b"1234", connection(Code::Protocol));
        check(kind::PING, 0, 1, b"12345678", connection(Code::Protocol));
        check(kind::PING, 0, 0, b"1234567", connection(Code::FrameSize));
        check(kind::GOAWAY, 0, 1, b"12345678", connection(Code::Protocol));
        check(kind::GOAWAY, 0, 0, b"1234567", connection(Code::FrameSize));
        check(kind::WINDOW_UPDATE, 0, 0, b"123", connection(Code::FrameSize));
        check(kind::WINDOW_UPDATE, 0, 0, b"\0\0\0\0", connection(Code::Protocol));
        check(kind::WINDOW_UPDATE, 0, 7, b"\x80\0\0\0", Err((7, Code::Protocol)));
        check(kind::CONTINUATION, 0, 0, b"", connection(Code::Protocol));
        check(0x77, 0xff, 9, b"whatever", Ok(Frame::Unknown));
    }

    #[test]
    fn a_frame_that_is_too_large_is_refused_by_its_header_alone() {
        let mut head = Bytes::copy_from_slice(&head(MAX_PAYLOAD + 1, kind::DATA, 0, 1));
        assert_eq!(take(&mut head).unwrap_err().code, Code::FrameSize);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
            let mut input = Bytes::from(bytes);
            loop {
                let before = input.len();
                match take(&mut input) {
                    Ok(Some(_)) => prop_assert!(input.len() < before),
                    Ok(None) | Err(_) => break,
                }
            }
        }
    }
}
