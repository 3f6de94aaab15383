//! What members say to each other before and between messages, byte for byte.
//!
//! ```text
//! hello     preface, kind (1), cluster, from, to, life, largest request (8 each, big-endian), version and oldest version
//!           that it works with (major and minor, 1 each), length (2), the caller's URLs with commas between
//! verdict   code (1), length (2), text
//! frame     length (4), CRC-32C of the rest (4), then messages: length (4), raft's encoding
//! ```
//!
//! The largest request is the largest that the caller has in its log or may have: a frame holds an entry whole, so its bound
//! follows from that. A stream carries frames in one direction only; after the verdict its receiver says nothing. A frame without messages says
//! that the sender is still there.

use std::io::{self, ErrorKind, Read, Write};

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::Message;

/// Begins every connection of a member; its last byte is the version of all this. No HTTP request begins so.
pub const PREFACE: &[u8; 16] = b"metastore raft 3";
/// Frames may be this large whatever requests are allowed: the largest request fits many times, unless it is set otherwise.
pub(super) const FRAME_BYTES_ALLOWED: usize = 64 << 20;
/// What a frame may hold beside the largest request: messages that were put together with it, and what is around them.
const FRAME_BYTES_BESIDE: usize = 2 << 20;
/// No frame may be larger than this, whatever a caller says of its requests.
const FRAME_BYTES_MOST: usize = 512 << 20;
/// The largest request that needs to be announced.
pub(super) const REQUEST_BYTES_MOST: u64 = (FRAME_BYTES_MOST - FRAME_BYTES_BESIDE) as u64;
const HEADER_BYTES: usize = 8;

/// How large a frame may be if the largest request is this large.
pub(super) fn max_bytes(largest_request: u64) -> usize {
    let request = usize::try_from(largest_request.min(REQUEST_BYTES_MOST)).unwrap_or(usize::MAX);
    FRAME_BYTES_ALLOWED.max(request + FRAME_BYTES_BESIDE)
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Raft's messages.
    Messages = 1,
    /// A copy of the database.
    Snapshot = 2,
}

/// A version of the whole program: major and minor.
pub type Release = (u8, u8);

/// Which members can work together: neither is older than what the other works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speech {
    /// What a member is.
    pub version: Release,
    /// The oldest that it works with.
    pub oldest: Release,
}

impl Speech {
    pub(super) fn agrees_with(self, other: Self) -> bool {
        self.version >= other.oldest && other.version >= self.oldest
    }
}

/// Who calls, and whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// What for.
    pub purpose: Purpose,
    /// The caller's cluster.
    pub cluster: u64,
    /// The caller.
    pub from: u64,
    /// Whom it wants.
    pub to: u64,
    /// Which of the processes that this member has been it is.
    pub life: u64,
    /// The largest request that it may pass on, in bytes.
    pub largest_request: u64,
    /// What it speaks.
    pub speech: Speech,
    /// Where it can be reached, as far as it knows.
    pub urls: Vec<String>,
}

impl Hello {
    /// Says it.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = PREFACE.to_vec();
        bytes.push(self.purpose as u8);
        for number in [self.cluster, self.from, self.to, self.life, self.largest_request] {
            bytes.extend(number.to_be_bytes());
        }
        let Speech { version, oldest } = self.speech;
        bytes.extend([version.0, version.1, oldest.0, oldest.1]);
        let urls = self.urls.join(",");
        bytes.extend(u16::try_from(urls.len()).map_err(io::Error::other)?.to_be_bytes());
        bytes.extend(urls.into_bytes());
        to.write_all(&bytes)
    }

    /// Hears it.
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
            other => return Err(invalid(format!("nothing is known about connections of kind {other}"))),
        };
        let mut urls = vec![0; usize::from(u16::from_be_bytes([rest[45], rest[46]]))];
        from.read_exact(&mut urls)?;
        let urls = String::from_utf8(urls).map_err(|_| invalid("the caller's URLs are not text".to_owned()))?;
        let urls = urls.split(',').filter(|url| !url.is_empty()).map(str::to_owned).collect();
        let speech = Speech { version: (rest[41], rest[42]), oldest: (rest[43], rest[44]) };
        let [cluster, from, to, life, largest_request] = [1, 9, 17, 25, 33].map(number);
        Ok(Self { purpose, cluster, from, to, life, largest_request, speech, urls })
    }
}

/// What comes of a call, or of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Go on; or: it is in place.
    Welcome,
    /// The caller was removed from the cluster and must not come back.
    Removed,
    /// Something else is wrong.
    Refused(String),
}

impl Verdict {
    /// What is wrong, in words.
    pub fn text(&self) -> &str {
        match self {
            Self::Welcome => "",
            Self::Removed => "this member was removed from the cluster",
            Self::Refused(text) => text,
        }
    }

    /// Says it.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let code = match self {
            Self::Welcome => 0,
            Self::Removed => 1,
            Self::Refused(_) => 2,
        };
        let text = self.text();
        let text = &text.as_bytes()[..text.len().min(usize::from(u16::MAX))];
        let length = u16::try_from(text.len()).expect("it was cut to fit");
        to.write_all(&[&[code], length.to_be_bytes().as_slice(), text].concat())
    }

    /// Hears it.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 3];
        from.read_exact(&mut head)?;
        if head[0] > 2 {
            return Err(invalid("it does not answer as a metastore does: is it an etcd?".to_owned()));
        }
        let mut text = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
        from.read_exact(&mut text)?;
        Ok(match head[0] {
            0 => Self::Welcome,
            1 => Self::Removed,
            _ => Self::Refused(String::from_utf8_lossy(&text).into_owned()),
        })
    }
}

/// Appends a frame of these messages.
pub fn encode(messages: &[Message], into: &mut Vec<u8>) {
    let start = into.len();
    into.extend([0; HEADER_BYTES]);
    for message in messages {
        let place = into.len();
        into.extend([0; 4]);
        message.write_to_vec(into).expect("a message of raft's making can be encoded");
        let length = length(into.len() - place - 4);
        into[place..place + 4].copy_from_slice(&length);
    }
    let body = start + HEADER_BYTES;
    let header = [length(into.len() - body), crc32c::crc32c(&into[body..]).to_be_bytes()].concat();
    into[start..body].copy_from_slice(&header);
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).expect("a frame is cut long before that").to_be_bytes()
}

/// What stands before a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Of the rest.
    pub length: usize,
    crc: u32,
}

impl Header {
    /// The next frame's. One of more than `max_bytes` is refused.
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

    /// The frame's messages, whose entries share its bytes, and how long all of it was.
    pub fn read_messages(self, from: &mut impl Read) -> io::Result<(Vec<Message>, u64)> {
        // Filled as it comes, so that a length alone takes no memory.
        let mut body = Vec::with_capacity(self.length.min(1 << 20));
        from.take(self.length as u64).read_to_end(&mut body)?;
        if body.len() < self.length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if crc32c::crc32c(&body) != self.crc {
            return Err(invalid("a frame was damaged on its way".to_owned()));
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

/// An error about what the other side has said.
pub fn invalid(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{Entry, MessageType};

    use super::*;

    fn read(from: &mut impl Read) -> io::Result<(Vec<Message>, u64)> {
        Header::read(from, FRAME_BYTES_ALLOWED)?.read_messages(from)
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
    fn frames_come_as_they_went() {
        let mut bytes = Vec::new();
        encode(&messages(), &mut bytes);
        encode(&[], &mut bytes);
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from).unwrap().0, messages());
        assert_eq!(read(&mut from).unwrap(), (Vec::new(), HEADER_BYTES as u64));
        assert_eq!(read(&mut from).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn no_damage_passes_and_nothing_panics() {
        let mut bytes = Vec::new();
        encode(&messages(), &mut bytes);
        for place in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[place] ^= 1 << (place % 8);
            assert!(read(&mut damaged.as_slice()).is_err(), "a flipped bit at {place}");
            assert!(read(&mut &bytes[..place]).is_err(), "cut at {place}");
        }
        assert!(decode(Bytes::from_static(&[0, 0, 0, 9, 1])).is_err());
        assert!(decode(Bytes::from_static(&[0, 0, 0])).is_err());
    }

    #[test]
    fn a_frame_is_as_large_as_requests_may_be() {
        for (request, allowed) in [(0, 64 << 20), (10 << 20, 64 << 20), (100 << 20, 102 << 20), (u64::MAX, 512 << 20)] {
            assert_eq!(max_bytes(request), allowed, "{request}");
        }
        let header = [(65_u32 << 20).to_be_bytes(), [0; 4]].concat();
        let refused = Header::read(&mut header.as_slice(), max_bytes(0)).unwrap_err();
        assert!(refused.to_string().starts_with("a frame of 68157440 bytes is too large: 67108864 are allowed"));
        assert_eq!(Header::read(&mut header.as_slice(), max_bytes(64 << 20)).unwrap().length, 65 << 20);
    }

    #[test]
    fn members_work_together_if_neither_is_too_old() {
        let speech = |version, oldest| Speech { version, oldest };
        let ours = speech((3, 7), (3, 5));
        for (theirs, agree) in [
            (speech((3, 7), (3, 5)), true),
            (speech((3, 5), (3, 0)), true),
            (speech((4, 0), (3, 7)), true),
            (speech((3, 4), (3, 0)), false),
            (speech((4, 0), (3, 8)), false),
        ] {
            assert_eq!((ours.agrees_with(theirs), theirs.agrees_with(ours)), (agree, agree), "{theirs:?}");
        }
    }

    #[test]
    fn who_calls_is_told_apart_from_who_does_not() {
        let urls = vec!["http://a:1".to_owned(), "http://b:2".to_owned()];
        let mut bytes = Vec::new();
        for urls in [Vec::new(), urls] {
            let speech = Speech { version: (3, 7), oldest: (3, 0) };
            let hello = Hello {
                purpose: Purpose::Snapshot,
                cluster: 1,
                from: 2,
                to: 3,
                life: 4,
                largest_request: 5,
                speech,
                urls,
            };
            bytes.clear();
            hello.write(&mut bytes).unwrap();
            assert_eq!(Hello::read(&mut bytes.as_slice()).unwrap(), hello);
        }
        for (place, byte) in [(15, b'1'), (16, 9)] {
            let mut other = bytes.clone();
            other[place] = byte;
            assert!(Hello::read(&mut other.as_slice()).is_err());
        }
        let other = Verdict::read(&mut b"HTTP/1.1 400 Bad Request\r\n".as_slice()).unwrap_err();
        assert!(other.to_string().contains("is it an etcd?"), "{other}");
        for verdict in [Verdict::Welcome, Verdict::Refused("no".repeat(40_000))] {
            let mut bytes = Vec::new();
            verdict.write(&mut bytes).unwrap();
            let heard = Verdict::read(&mut bytes.as_slice()).unwrap();
            assert!(heard == verdict || matches!(heard, Verdict::Refused(text) if text.len() == 65_535));
        }
    }
}
