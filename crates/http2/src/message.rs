//! gRPC message framing inside a stream (a five-byte prefix per message), and the small encodings used in headers.
//!
//! ```text
//! | compressed 8 | length 32 | message |
//! ```
//!
//! The length of a message is checked before any of it is kept, and a compressed message is decompressed only up to the allowed
//! length: a refused message costs nothing.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{Read, Write},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};

use super::limits;
use crate::call::{CallError, Code};

/// The size of the prefix of each message.
pub const PREFIX_BYTES: usize = 5;

/// A buffer larger than this is released after its message.
const KEPT_BYTES: usize = 4 << 10;

/// The compression of a stream's messages, from `grpc-encoding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// No compression.
    Identity,
    /// Gzip, for messages whose prefix says so.
    Gzip,
}

/// Splits a stream of bytes into messages.
///
/// A message that arrived in one piece is returned without a copy. Of a message in several pieces, each piece is copied once.
#[derive(Debug, Default)]
pub struct Deframer {
    whole: Bytes,
    pieces: BytesMut,
}

impl Deframer {
    pub fn push(&mut self, data: Bytes) {
        if self.is_empty() {
            self.whole = data;
        } else {
            self.detach();
            self.pieces.extend_from_slice(&data);
        }
    }

    /// Adds a copy of the bytes, so that the buffer they came in can be released.
    pub fn push_copy(&mut self, data: &[u8]) {
        self.detach();
        self.pieces.extend_from_slice(data);
    }

    /// Replaces what is left by a copy, so that the buffer it came in can be released.
    pub fn detach(&mut self) {
        let whole = std::mem::take(&mut self.whole);
        self.pieces.extend_from_slice(&whole);
    }

    /// How many bytes are buffered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.whole.len() + self.pieces.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of the first message including its prefix, if the prefix is complete.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        let mut prefix = self.buffer().get(1..PREFIX_BYTES)?;
        Some(PREFIX_BYTES + prefix.get_u32() as usize)
    }

    /// The next message, decompressed, if all of it has arrived.
    pub fn take(&mut self, encoding: Encoding, max_bytes: usize) -> Result<Option<Bytes>, CallError> {
        match self.take_raw(encoding, max_bytes)? {
            Some((message, true)) => decompress(&message, max_bytes).map(Some),
            Some((message, false)) => Ok(Some(message)),
            None => Ok(None),
        }
    }

    /// The next message as it arrived, and whether it is compressed.
    pub fn take_raw(&mut self, encoding: Encoding, max_bytes: usize) -> Result<Option<(Bytes, bool)>, CallError> {
        let Some(wanted) = self.wanted() else { return Ok(None) };
        let is_compressed = match (self.buffer()[0], encoding) {
            (0, _) => false,
            (1, Encoding::Gzip) => true,
            (1, Encoding::Identity) => {
                return Err(internal("message_flag", "grpc: compressed flag set with identity or empty encoding"));
            }
            (other, _) => {
                return Err(internal("message_flag", format!("grpc: received unexpected payload format {other}")));
            }
        };
        if wanted - PREFIX_BYTES > max_bytes {
            return Err(too_large(wanted - PREFIX_BYTES, max_bytes));
        }
        if self.len() < wanted {
            return Ok(None);
        }
        let mut message =
            if self.whole.is_empty() { self.pieces.split_to(wanted).freeze() } else { self.whole.split_to(wanted) };
        if wanted > KEPT_BYTES && self.is_empty() {
            self.pieces = BytesMut::new(); // It would keep the message's buffer alive.
        }
        message.advance(PREFIX_BYTES);
        Ok(Some((message, is_compressed)))
    }

    fn buffer(&self) -> &[u8] {
        if self.whole.is_empty() { &self.pieces } else { &self.whole }
    }
}

fn internal(reason: &'static str, text: impl Into<Cow<'static, str>>) -> CallError {
    limits::count_refusal(reason);
    CallError { code: Code::Internal, message: text.into() }
}

fn too_large(len: usize, max_bytes: usize) -> CallError {
    limits::count_refusal("message_length");
    let text = format!("grpc: received message larger than max ({len} vs. {max_bytes})");
    CallError { code: Code::ResourceExhausted, message: Cow::Owned(text) }
}

/// Decompresses a message of at most `max_bytes`.
pub fn decompress(compressed: &[u8], max_bytes: usize) -> Result<Bytes, CallError> {
    let mut out = Vec::new();
    let limit = max_bytes as u64 + 1;
    if let Err(error) = MultiGzDecoder::new(compressed).take(limit).read_to_end(&mut out) {
        return Err(internal("gzip", format!("grpc: failed to decompress the received message: {error}")));
    }
    if out.len() > max_bytes {
        limits::count_refusal("message_length");
        let text = format!("grpc: received message after decompression larger than max {max_bytes}");
        return Err(CallError { code: Code::ResourceExhausted, message: Cow::Owned(text) });
    }
    Ok(out.into())
}

#[must_use]
pub fn compress(message: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(message).expect("writing to memory cannot fail");
    encoder.finish().expect("writing to memory cannot fail").into()
}

/// The prefix of a message; `None` if the message is too long for it.
#[must_use]
pub fn prefix(len: usize, is_compressed: bool) -> Option<[u8; PREFIX_BYTES]> {
    let [a, b, c, d] = u32::try_from(len).ok()?.to_be_bytes();
    Some([u8::from(is_compressed), a, b, c, d])
}

/// Escapes a `grpc-message`: everything but printable ASCII, and the percent sign.
#[must_use]
pub fn percent_encode(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b'%';
    if text.bytes().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if is_plain(byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to memory cannot fail");
        }
    }
    Cow::Owned(out)
}

/// Parses `grpc-timeout`: up to eight digits and a unit. The error texts are grpc-go's.
pub fn timeout(text: &[u8]) -> Result<Duration, String> {
    let fault = |what| Err(format!("transport: {what}: {:?}", String::from_utf8_lossy(&text[..text.len().min(64)])));
    let (unit, digits) = match text {
        [] | [_] => return fault("timeout string is too short"),
        [digits @ .., unit] if digits.len() <= 8 => (unit, digits),
        _ => return fault("timeout string is too long"),
    };
    let of_units: fn(u64) -> Duration = match unit {
        b'H' => Duration::from_hours,
        b'M' => Duration::from_mins,
        b'S' => Duration::from_secs,
        b'm' => Duration::from_millis,
        b'u' => Duration::from_micros,
        b'n' => Duration::from_nanos,
        _ => return fault("timeout unit is not recognized"),
    };
    let digits = String::from_utf8_lossy(digits);
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    let count = digits.parse().ok().filter(|_| is_number); // `parse` would accept a plus sign.
    count.map(of_units).ok_or_else(|| format!("strconv.ParseUint: parsing {digits:?}: invalid syntax"))
}

/// Checks that the value of a `-bin` header is base64, padded or not. The error is the offset at which Go's decoder gives up.
pub fn check_base64(text: &[u8]) -> Result<(), usize> {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    let digits = text.iter().position(|byte| !is_digit(byte)).unwrap_or(text.len());
    let may_be_padded = text.len().is_multiple_of(4);
    match (&text[digits..], digits % 4) {
        ([], 1) => Err(digits - 1),
        ([], _) | ([b'='], 3) | ([b'=', b'='], 2) => Ok(()),
        ([b'=', b'=', ..], 2) if may_be_padded => Err(digits + 2),
        ([b'=', ..], 3) if may_be_padded => Err(digits + 1),
        _ => Err(digits),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        let mut out = prefix(message.len(), false).unwrap().to_vec();
        out[0] = flag;
        out.extend_from_slice(message);
        out
    }

    fn one(bytes: Vec<u8>, encoding: Encoding, max_bytes: usize) -> Result<Option<Bytes>, CallError> {
        let mut deframer = Deframer::default();
        deframer.push(bytes.into());
        deframer.take(encoding, max_bytes)
    }

    #[test]
    fn a_message_that_is_too_large_is_refused_by_its_prefix_alone() {
        let refusal = one(framed(0, b"message")[..5].to_vec(), Encoding::Identity, 6).unwrap_err();
        assert_eq!(refusal.code, Code::ResourceExhausted);
        assert_eq!(refusal.message, "grpc: received message larger than max (7 vs. 6)");
    }

    #[test]
    fn a_compressed_message_is_decompressed_only_up_to_the_limit() {
        let text = vec![b'x'; 100_000];
        let compressed = framed(1, &compress(&text));
        assert!(compressed.len() < 1000);
        assert_eq!(one(compressed.clone(), Encoding::Gzip, 100_000), Ok(Some(text.clone().into())));
        assert_eq!(one(compressed.clone(), Encoding::Gzip, 99_999).unwrap_err().code, Code::ResourceExhausted);
        assert_eq!(one(compressed, Encoding::Identity, 100_000).unwrap_err().code, Code::Internal);
        assert_eq!(one(framed(1, b"no gzip"), Encoding::Gzip, 100).unwrap_err().code, Code::Internal);
        assert_eq!(one(framed(2, b""), Encoding::Gzip, 100).unwrap_err().code, Code::Internal);
    }

    #[test]
    fn error_messages_are_escaped_in_headers() {
        assert_eq!(percent_encode("etcdserver: no leader"), "etcdserver: no leader");
        assert_eq!(percent_encode("50% \u{e9}\n"), "50%25 %C3%A9%0A");
    }

    #[test]
    fn timeouts_have_eight_digits_and_a_unit() {
        assert_eq!(timeout(b"5S"), Ok(Duration::from_secs(5)));
        assert_eq!(timeout(b"99999999H"), Ok(Duration::from_hours(99_999_999)));
        assert_eq!(timeout(b"250m"), Ok(Duration::from_millis(250)));
        for (wrong, fault) in [
            ("", "transport: timeout string is too short: \"\""),
            ("S", "transport: timeout string is too short: \"S\""),
            ("123456789S", "transport: timeout string is too long: \"123456789S\""),
            ("5s", "transport: timeout unit is not recognized: \"5s\""),
            ("-5S", "strconv.ParseUint: parsing \"-5\": invalid syntax"),
            ("+5S", "strconv.ParseUint: parsing \"+5\": invalid syntax"),
            ("5 S", "strconv.ParseUint: parsing \"5 \": invalid syntax"),
        ] {
            assert_eq!(timeout(wrong.as_bytes()).unwrap_err(), fault);
        }
    }

    /// The offsets are those of Go's `StdEncoding` where the length is a multiple of four, and of `RawStdEncoding` elsewhere.
    #[test]
    fn base64_may_be_padded_or_not() {
        for right in ["", "YQ==", "YQ", "YWI=", "YWI", "YWJj", "YR==", "+/+/"] {
            assert_eq!(check_base64(right.as_bytes()), Ok(()), "{right}");
        }
        for (wrong, place) in [
            ("Zg=", 2),
            ("!!", 0),
            ("Y", 0),
            ("YQ=", 2),
            ("YWJj,YQ==", 4),
            ("YWJjY", 4),
            ("Y===", 1),
            ("====", 0),
            ("YQ=a", 2),
            ("YWJjYQ==YWJj", 8),
            ("YWI=YWJj", 4),
            ("YWJjYW=", 6),
            ("YWJ=a", 3),
        ] {
            assert_eq!(check_base64(wrong.as_bytes()), Err(place), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn messages_are_independent_of_how_the_bytes_are_split(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10),
            cuts in prop::collection::vec((1_usize..40, any::<bool>()), 1..50),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|message| framed(0, message)).collect();
            let (mut rest, mut cuts) = (&bytes[..], cuts.iter().cycle());
            let (mut deframer, mut out) = (Deframer::default(), Vec::new());
            while !rest.is_empty() {
                let &(cut, copy) = cuts.next().unwrap();
                let (piece, behind) = rest.split_at(cut.min(rest.len()));
                if copy { deframer.push_copy(piece) } else { deframer.push(Bytes::copy_from_slice(piece)) }
                rest = behind;
                while let Some(message) = deframer.take(Encoding::Identity, 50).unwrap() {
                    out.push(message.to_vec());
                }
            }
            prop_assert_eq!(out, messages);
            prop_assert_eq!(deframer.len(), 0);
        }
    }
}
