//! The wire format of the handshake and of frames. Lengths in bytes are in parentheses.
//!
//! ```text
//! hello     preface, kind (1), cluster, from, to, incarnation, largest request (8 each, big-endian), version and oldest
//!           compatible version (major and minor, 1 each), length (2), the sender's peer URLs, separated by commas
//! verdict   code (1), length (2), text
//! frame     length (4), CRC-32C of the rest (4), then messages: length (4), raft's encoding
//! ```
//!
//! The largest request is the largest that the sender's log contains or may contain: a frame holds whole entries, so the limit
//! for a frame follows from it. A stream carries frames in one direction only; the receiver sends nothing after the verdict,
//! except another verdict if it closes the stream because of an error. A frame without messages is a keep-alive.

use std::io::{self, ErrorKind, Read, Write};

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::Message;

/// The first bytes of every connection of a member; the last byte is the version of this format. No HTTP request begins with
/// them.
pub const PREFACE: &[u8; 16] = b"metastore raft 3";
/// The limit for a frame, unless larger requests are allowed. It is many times the default limit for a request.
pub(super) const DEFAULT_MAX_FRAME_BYTES: usize = 64 << 20;
/// What a frame may hold in addition to a request of the largest size: other messages in the same frame, and framing.
const FRAME_OVERHEAD_BYTES: usize = 2 << 20;
/// The limit for a frame whatever request size the sender announces.
const MAX_FRAME_BYTES: usize = 512 << 20;
/// The largest request size that is announced.
pub(super) const MAX_REQUEST_BYTES: u64 = (MAX_FRAME_BYTES - FRAME_OVERHEAD_BYTES) as u64;
const HEADER_BYTES: usize = 8;

/// The limit for a frame, given the largest request.
pub(super) fn max_bytes(largest_request: u64) -> usize {
    let request = usize::try_from(largest_request.min(MAX_REQUEST_BYTES)).unwrap_or(usize::MAX);
    DEFAULT_MAX_FRAME_BYTES.max(request + FRAME_OVERHEAD_BYTES)
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Frames with raft's messages.
    Messages = 1,
    /// A snapshot, which is a copy of the database.
    Snapshot = 2,
}

/// A version of the program: major and minor.
pub type Release = (u8, u8);

/// Decides which members are compatible: neither is older than the oldest version that the other is compatible with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProtocolVersion {
    /// The member's own version.
    pub version: Release,
    /// The oldest version that it is compatible with.
    pub oldest: Release,
}

impl ProtocolVersion {
    pub(super) fn is_compatible_with(self, other: Self) -> bool {
        self.version >= other.oldest && other.version >= self.oldest
    }
}

/// The first message of every connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub purpose: Purpose,
    /// The sender's cluster ID.
    pub cluster: u64,
    /// The sender's member ID.
    pub from: u64,
    /// The ID of the member that the sender wants to reach.
    pub to: u64,
    /// A random number that identifies the sender's process.
    pub incarnation: u64,
    /// The largest request that it may forward, in bytes.
    pub largest_request: u64,
    pub protocol_version: ProtocolVersion,
    /// The sender's peer URLs, as far as it knows them.
    pub urls: Vec<String>,
}

impl Hello {
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = PREFACE.to_vec();
        bytes.push(self.purpose as u8);
        for number in [self.cluster, self.from, self.to, self.incarnation, self.largest_request] {
            bytes.extend(number.to_be_bytes());
        }
        let ProtocolVersion { version, oldest } = self.protocol_version;
        bytes.extend([version.0, version.1, oldest.0, oldest.1]);
        let urls = self.urls.join(",");
        bytes.extend(u16::try_from(urls.len()).map_err(io::Error::other)?.to_be_bytes());
        bytes.extend(urls.into_bytes());
        to.write_all(&bytes)
    }

    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut preface = [0; PREFACE.len()];
        from.read_exact(&mut preface)?;
        if preface != *PREFACE {
            let [ours, theirs] = [PREFACE, &preface].map(|preface| String::from_utf8_lossy(preface));
            return Err(invalid(format!("incompatible version: this member speaks {ours:?}, not {theirs:?}")));
        }
        let mut rest = [0; 47];
        from.read_exact(&mut rest)?;
        let number = |at: usize| u64::from_be_bytes(rest[at..at + 8].try_into().expect("eight bytes"));
        let purpose = match rest[0] {
            1 => Purpose::Messages,
            2 => Purpose::Snapshot,
            other => return Err(invalid(format!("unknown kind of connection: {other}"))),
        };
        let mut urls = vec![0; usize::from(u16::from_be_bytes([rest[45], rest[46]]))];
        from.read_exact(&mut urls)?;
        let urls = String::from_utf8(urls)
            .map_err(|_| invalid("the peer URLs in the handshake are not valid UTF-8".to_owned()))?;
        let urls = urls.split(',').filter(|url| !url.is_empty()).map(str::to_owned).collect();
        let protocol_version = ProtocolVersion { version: (rest[41], rest[42]), oldest: (rest[43], rest[44]) };
        let [cluster, from, to, incarnation, largest_request] = [1, 9, 17, 25, 33].map(number);
        Ok(Self { purpose, cluster, from, to, incarnation, largest_request, protocol_version, urls })
    }
}

/// The answer to a [`Hello`] or to a snapshot, or the reason for closing a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The handshake succeeded, or the snapshot is installed.
    Accepted,
    /// The sender was removed from the cluster; it must not reconnect.
    Removed,
    /// Refused for any other reason.
    Refused(String),
}

impl Verdict {
    pub fn text(&self) -> &str {
        match self {
            Self::Accepted => "",
            Self::Removed => "this member was removed from the cluster",
            Self::Refused(text) => text,
        }
    }

    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let code = match self {
            Self::Accepted => 0,
            Self::Removed => 1,
            Self::Refused(_) => 2,
        };
        let text = self.text();
        let text = &text.as_bytes()[..text.len().min(usize::from(u16::MAX))];
        let length = u16::try_from(text.len()).expect("the text was truncated to fit");
        to.write_all(&[&[code], length.to_be_bytes().as_slice(), text].concat())
    }

    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 3];
        from.read_exact(&mut head)?;
        if head[0] > 2 {
            return Err(invalid("the reply is not that of a metastore: is it an etcd?".to_owned()));
        }
        let mut text = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
        from.read_exact(&mut text)?;
        Ok(match head[0] {
            0 => Self::Accepted,
            1 => Self::Removed,
            _ => Self::Refused(String::from_utf8_lossy(&text).into_owned()),
        })
    }
}

/// Appends a frame with these messages.
pub fn encode(messages: &[Message], into: &mut Vec<u8>) {
    let start = into.len();
    into.extend([0; HEADER_BYTES]);
    for message in messages {
        let at = into.len();
        into.extend([0; 4]);
        message.write_to_vec(into).expect("raft messages can be encoded");
        let length = length(into.len() - at - 4);
        into[at..at + 4].copy_from_slice(&length);
    }
    let body = start + HEADER_BYTES;
    let header = [length(into.len() - body), crc32c::crc32c(&into[body..]).to_be_bytes()].concat();
    into[start..body].copy_from_slice(&header);
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).expect("frames are far smaller than 4 GiB").to_be_bytes()
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The length of the frame after the header.
    pub length: usize,
    crc: u32,
}

impl Header {
    /// Reads the next frame's header. A frame of more than `max_bytes` is an error.
    pub fn read(from: &mut impl Read, max_bytes: usize) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        from.read_exact(&mut header)?;
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let length = number(0) as usize;
        if length > max_bytes {
            return Err(invalid(format!(
                "a frame of {length} bytes is too large: {max_bytes} are allowed (set --max-request-bytes alike on all \
                 members)"
            )));
        }
        Ok(Self { length, crc: number(4) })
    }

    /// Reads the frame's messages, whose entries share its memory, and returns them with the total length of the frame.
    pub fn read_messages(self, from: &mut impl Read) -> io::Result<(Vec<Message>, u64)> {
        // Grown as bytes arrive, so that a header with a large length alone does not allocate that much.
        let mut body = Vec::with_capacity(self.length.min(1 << 20));
        from.take(self.length as u64).read_to_end(&mut body)?;
        if body.len() < self.length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if crc32c::crc32c(&body) != self.crc {
            return Err(invalid("the checksum of a frame does not match".to_owned()));
        }
        Ok((decode(Bytes::from(body))?, (HEADER_BYTES + self.length) as u64))
    }
}

fn decode(mut body: Bytes) -> io::Result<Vec<Message>> {
    let mut messages = Vec::new();
    while !body.is_empty() {
        let malformed = || invalid("a frame is malformed".to_owned());
        let length =
            body.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize).ok_or_else(malformed)?;
        if length > body.len() - 4 {
            return Err(malformed());
        }
        let mut message = body.split_to(4 + length);
        let message = Message::parse_from_carllerche_bytes(&message.split_off(4));
        messages.push(message.map_err(|error| invalid(format!("a message cannot be read: {error}")))?);
    }
    Ok(messages)
}

/// An error for data from the peer that is invalid.
pub fn invalid(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{Entry, MessageType};

    use super::*;

    fn read(from: &mut impl Read) -> io::Result<(Vec<Message>, u64)> {
        Header::read(from, DEFAULT_MAX_FRAME_BYTES)?.read_messages(from)
    }

    fn messages() -> Vec<Message> {
        let entry = Entry { index: 9, term: 2, data: vec![7; 300].into(), ..Entry::default() };
        let append = Message {
            msg_type: MessageType::MsgAppend,
            to: 2,
            from: 1,
            entries: vec![entry].into(),
            ..Message::default()
        };
        vec![append, Message { msg_type: MessageType::MsgHeartbeat, to: 2, commit: 8, ..Message::default() }]
    }

    #[test]
    fn frames_are_decoded_to_what_was_encoded() {
        let mut bytes = Vec::new();
        encode(&messages(), &mut bytes);
        encode(&[], &mut bytes);
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from).unwrap().0, messages());
        assert_eq!(read(&mut from).unwrap(), (Vec::new(), HEADER_BYTES as u64));
        assert_eq!(read(&mut from).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_corrupt_or_truncated_frame_is_an_error_and_nothing_panics() {
        let mut bytes = Vec::new();
        encode(&messages(), &mut bytes);
        for at in 0..bytes.len() {
            let mut corrupt = bytes.clone();
            corrupt[at] ^= 1 << (at % 8);
            assert!(read(&mut corrupt.as_slice()).is_err(), "a flipped bit at {at}");
            assert!(read(&mut &bytes[..at]).is_err(), "truncated at {at}");
        }
        assert!(decode(Bytes::from_static(&[0, 0, 0, 9, 1])).is_err());
        assert!(decode(Bytes::from_static(&[0, 0, 0])).is_err());
    }

    /// RUSTSEC-2024-0437: a parser that calls itself for each group would use up the stack.
    #[test]
    fn nested_groups_are_refused_whatever_their_depth() {
        const GROUP_OF_UNKNOWN_FIELD: [u8; 2] = [0xa3, 0x06];
        let message = GROUP_OF_UNKNOWN_FIELD.repeat(1 << 20);
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        let refused = decode([length.as_slice(), &message].concat().into()).unwrap_err();
        assert!(refused.to_string().starts_with("a message cannot be read"), "{refused}");
    }

    #[test]
    fn the_frame_size_limit_follows_from_the_largest_request() {
        for (request, allowed) in [(0, 64 << 20), (10 << 20, 64 << 20), (100 << 20, 102 << 20), (u64::MAX, 512 << 20)] {
            assert_eq!(max_bytes(request), allowed, "{request}");
        }
        let header = [(65_u32 << 20).to_be_bytes(), [0; 4]].concat();
        let refused = Header::read(&mut header.as_slice(), max_bytes(0)).unwrap_err();
        assert!(refused.to_string().starts_with("a frame of 68157440 bytes is too large: 67108864 are allowed"));
        assert_eq!(Header::read(&mut header.as_slice(), max_bytes(64 << 20)).unwrap().length, 65 << 20);
    }

    #[test]
    fn members_are_compatible_if_neither_is_too_old() {
        let protocol_version = |version, oldest| ProtocolVersion { version, oldest };
        let ours = protocol_version((3, 7), (3, 5));
        for (theirs, compatible) in [
            (protocol_version((3, 7), (3, 5)), true),
            (protocol_version((3, 5), (3, 0)), true),
            (protocol_version((4, 0), (3, 7)), true),
            (protocol_version((3, 4), (3, 0)), false),
            (protocol_version((4, 0), (3, 8)), false),
        ] {
            let both = (ours.is_compatible_with(theirs), theirs.is_compatible_with(ours));
            assert_eq!(both, (compatible, compatible), "{theirs:?}");
        }
    }

    #[test]
    fn handshakes_round_trip_and_other_protocols_are_recognized() {
        let urls = vec!["http://a:1".to_owned(), "http://b:2".to_owned()];
        let mut bytes = Vec::new();
        for urls in [Vec::new(), urls] {
            let protocol_version = ProtocolVersion { version: (3, 7), oldest: (3, 0) };
            let hello = Hello {
                purpose: Purpose::Snapshot,
                cluster: 1,
                from: 2,
                to: 3,
                incarnation: 4,
                largest_request: 5,
                protocol_version,
                urls,
            };
            bytes.clear();
            hello.write(&mut bytes).unwrap();
            assert_eq!(Hello::read(&mut bytes.as_slice()).unwrap(), hello);
        }
        for (at, byte) in [(15, b'1'), (16, 9)] {
            let mut other = bytes.clone();
            other[at] = byte;
            assert!(Hello::read(&mut other.as_slice()).is_err());
        }
        let other = Verdict::read(&mut b"HTTP/1.1 400 Bad Request\r\n".as_slice()).unwrap_err();
        assert!(other.to_string().contains("is it an etcd?"), "{other}");
        for verdict in [Verdict::Accepted, Verdict::Refused("no".repeat(40_000))] {
            let mut bytes = Vec::new();
            verdict.write(&mut bytes).unwrap();
            let received = Verdict::read(&mut bytes.as_slice()).unwrap();
            assert!(received == verdict || matches!(received, Verdict::Refused(text) if text.len() == 65_535));
        }
    }
}
