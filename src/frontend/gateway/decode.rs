//! Decodes a JSON value into a message's wire format.
//!
//! The value has passed the [scanner](super::scanner), so commas, colons and literals stand where they may. What is left to be
//! wrong are types, fields that occur twice, and the content of strings. The error texts are those of protojson, with a position.
//!
//! Nested messages cost neither stack nor copies: open messages are kept in a list, and what they contain is appended to one
//! buffer. Their lengths, which stand before them on the wire, are inserted at the end, all in one pass.

use std::borrow::Cow;

use base64::{
    Engine,
    alphabet::{self, Alphabet},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use super::{
    number::{integer, number_in},
    quote::quote,
    schema::{Field, Kind, MessageType, Schema, TypeId},
};

/// Why a value is no message.
#[derive(Debug, PartialEq, Eq)]
pub enum DecodeError {
    Invalid(String),
    /// It has more nested messages than can fit.
    TooLarge,
}

/// Decodes a value, of which a message of at most `max_bytes` is wanted. (It may be a little longer; a message that is not even
/// close ends the decoding.)
pub fn decode(schema: &Schema, id: TypeId, value: &[u8], max_bytes: usize) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = Decoder {
        schema,
        input: value,
        at: 0,
        out: Vec::with_capacity(value.len() / 2),
        lengths: Vec::new(),
        length_bytes: 0,
        max_messages: max_bytes / 2,
    };
    decoder.run(id)?;
    Ok(decoder.with_lengths())
}

struct Decoder<'a> {
    schema: &'a Schema,
    input: &'a [u8],
    at: usize,
    /// The message, but for the lengths of the messages in it.
    out: Vec<u8>,
    /// Where in `out` each nested message begins, and its length; in the order of their beginnings.
    lengths: Vec<(usize, usize)>,
    /// How many bytes the known lengths take.
    length_bytes: usize,
    max_messages: usize,
}

/// A message that is not complete yet.
struct Open {
    id: TypeId,
    /// The fields that have occurred, and the oneofs that are set, as bits.
    seen: u64,
    set_oneofs: u64,
    /// The list of messages that is being read.
    list: Option<usize>,
    /// Its place among the lengths; None for the outermost message.
    length: Option<usize>,
    /// How many bytes the known lengths took before it.
    length_bytes_before: usize,
}

/// A string of the input, without its escapes, and as it is written.
struct Text<'a> {
    content: Cow<'a, [u8]>,
    raw: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn run(&mut self, id: TypeId) -> Result<(), DecodeError> {
        let mut open = Vec::new();
        self.open(id, &mut open)?;
        while let Some(message) = open.last_mut() {
            self.skip(b" \t\r\n,");
            let definition = self.schema.get(message.id);
            if let Some(field) = message.list {
                if self.input[self.at] == b']' {
                    self.at += 1;
                    message.list = None;
                } else {
                    self.open_in(&definition.fields[field], &mut open)?;
                }
            } else if self.input[self.at] == b'}' {
                self.at += 1;
                self.close(&open.pop().expect("a message is open"));
            } else {
                self.field(definition, &mut open)?;
            }
        }
        Ok(())
    }

    /// Reads a field of the innermost message: all of it, or up to the beginning of a message.
    fn field(&mut self, definition: &'a MessageType, open: &mut Vec<Open>) -> Result<(), DecodeError> {
        let message = open.last_mut().expect("a field is read in a message");
        let name_at = self.at;
        let name = self.string()?;
        self.skip(b" \t\r\n:");
        let Some(index) = definition.field_named(&name.content) else { return self.skip_value() };
        let field = &definition.fields[index];
        if message.seen & (1 << index) != 0 {
            return Err(self.invalid_at(name_at, &format!("duplicate field {}", printed(name.raw))));
        }
        message.seen |= 1 << index;
        if self.input[self.at] == b'n' {
            self.at += "null".len();
            return Ok(());
        }
        if field.is_repeated {
            if self.input[self.at] != b'[' {
                return Err(self.unexpected_token());
            }
            self.at += 1;
            if let Kind::Message(_) = field.kind {
                message.list = Some(index);
                return Ok(());
            }
            return self.scalars(field);
        }
        if let Some(oneof) = field.oneof {
            if message.set_oneofs & (1 << oneof) != 0 {
                let name = printed(name.raw);
                let text = format!("error parsing {name}, oneof {} is already set", definition.oneofs[oneof]);
                return Err(self.invalid_at(name_at, &text));
            }
            message.set_oneofs |= 1 << oneof;
        }
        if let Kind::Message(_) = field.kind { self.open_in(field, open) } else { self.scalar(field) }
    }

    fn scalars(&mut self, field: &Field) -> Result<(), DecodeError> {
        loop {
            self.skip(b" \t\r\n,");
            if self.input[self.at] == b']' {
                self.at += 1;
                return Ok(());
            }
            self.scalar(field)?;
        }
    }

    fn open(&mut self, id: TypeId, open: &mut Vec<Open>) -> Result<(), DecodeError> {
        if self.input[self.at] != b'{' {
            return Err(self.unexpected_token());
        }
        self.at += 1;
        let length_bytes_before = self.length_bytes;
        open.push(Open { id, seen: 0, set_oneofs: 0, list: None, length: None, length_bytes_before });
        Ok(())
    }

    fn open_in(&mut self, field: &Field, open: &mut Vec<Open>) -> Result<(), DecodeError> {
        let Kind::Message(id) = field.kind else { unreachable!("only fields that are messages are opened") };
        self.open(id, open)?;
        if self.lengths.len() == self.max_messages {
            return Err(DecodeError::TooLarge);
        }
        encode_key(field.number, WireType::LengthDelimited, &mut self.out);
        open.last_mut().expect("it was just opened").length = Some(self.lengths.len());
        self.lengths.push((self.out.len(), 0));
        Ok(())
    }

    fn close(&mut self, message: &Open) {
        let Some(place) = message.length else { return };
        let (start, length) = &mut self.lengths[place];
        *length = self.out.len() - *start + self.length_bytes - message.length_bytes_before;
        self.length_bytes += encoded_len_varint(*length as u64);
    }

    fn with_lengths(self) -> Vec<u8> {
        if self.lengths.is_empty() {
            return self.out;
        }
        let mut message = Vec::with_capacity(self.out.len() + self.length_bytes);
        let mut copied = 0;
        for (start, length) in self.lengths {
            message.extend_from_slice(&self.out[copied..start]);
            encode_varint(length as u64, &mut message);
            copied = start;
        }
        message.extend_from_slice(&self.out[copied..]);
        message
    }

    /// Reads a value that is no message, and encodes it unless it says as little as its absence.
    fn scalar(&mut self, field: &Field) -> Result<(), DecodeError> {
        let at = self.at;
        let text = if self.input[at] == b'"' { Some(self.string()?) } else { None };
        let raw = match &text {
            Some(text) => text.raw,
            None => self.token(),
        };
        let is_written = field.is_repeated || field.has_presence();
        let out = &mut self.out;
        let is_valid = match (&field.kind, &text) {
            (Kind::Bytes, Some(text)) => match base64(&text.content) {
                Some(bytes) => {
                    put_bytes(out, field, is_written, &bytes);
                    true
                }
                None => false,
            },
            (Kind::String, Some(text)) => {
                put_bytes(out, field, is_written, &text.content);
                true
            }
            (Kind::Bool, None) if raw == b"true" || raw == b"false" => {
                put_varint(out, field, is_written, u64::from(raw == b"true"));
                true
            }
            // As in etcd, the name of an unknown value is ignored.
            (Kind::Enum(values), Some(text)) => {
                if let Some(number) = values.number(&text.content) {
                    put_varint(out, field, is_written, sign_extended(number));
                }
                true
            }
            (Kind::Bytes | Kind::String | Kind::Bool | Kind::Message(_), _) => false,
            (kind, text) => {
                let number = match text {
                    Some(text) => std::str::from_utf8(&text.content).ok().and_then(number_in),
                    None => raw.first().filter(|first| first.is_ascii_digit() || **first == b'-').map(|_| raw),
                };
                match number.and_then(|number| integer_bits(kind, number)) {
                    Some(bits) => {
                        put_varint(out, field, is_written, bits);
                        true
                    }
                    None => false,
                }
            }
        };
        if is_valid {
            return Ok(());
        }
        let (kind, name) = (kind_name(&field.kind), &field.json_name);
        let text = format!("invalid value for {kind} field {name}: {}", printed(raw));
        Err(self.invalid_at(at, &text))
    }

    fn skip(&mut self, insignificant: &[u8]) {
        while self.input.get(self.at).is_some_and(|byte| insignificant.contains(byte)) {
            self.at += 1;
        }
    }

    /// Passes over a value of any type. What its strings contain is checked.
    fn skip_value(&mut self) -> Result<(), DecodeError> {
        let mut depth = 0_usize;
        loop {
            self.skip(b" \t\r\n,:");
            match self.input[self.at] {
                b'"' => {
                    self.string()?;
                }
                b'{' | b'[' => (self.at, depth) = (self.at + 1, depth + 1),
                b'}' | b']' => (self.at, depth) = (self.at + 1, depth - 1),
                _ => {
                    self.token();
                }
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    /// Reads a bracket, a number or a literal.
    fn token(&mut self) -> &'a [u8] {
        let rest = &self.input[self.at..];
        let ends = |byte: &u8| b" \t\r\n,:[]{}\"".contains(byte);
        let length = rest.iter().position(ends).unwrap_or(rest.len()).max(1);
        self.at += length;
        &rest[..length]
    }

    /// Reads a string.
    fn string(&mut self) -> Result<Text<'a>, DecodeError> {
        let start = self.at;
        let mut content = Cow::Borrowed(&[][..]);
        let mut at = start + 1;
        loop {
            let rest = &self.input[at..];
            let length = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')).expect("strings end");
            if std::str::from_utf8(&rest[..length]).is_err() {
                return Err(self.syntax_error_at(start, "invalid UTF-8 in string"));
            }
            if content.is_empty() {
                content = Cow::Borrowed(&rest[..length]);
            } else {
                content.to_mut().extend_from_slice(&rest[..length]);
            }
            at += length;
            if self.input[at] == b'"' {
                self.at = at + 1;
                return Ok(Text { content, raw: &self.input[start..=at] });
            }
            let char = match self.input[at + 1] {
                b'b' => '\x08',
                b'f' => '\x0c',
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                b'u' => self.unicode(start, &mut at)?,
                other => char::from(other),
            };
            at += 2;
            content.to_mut().extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
        }
    }

    /// Reads `\uXXXX`, or two of them that are one character. Leaves `at` two bytes before its end.
    fn unicode(&self, start: usize, at: &mut usize) -> Result<char, DecodeError> {
        let first = hex(&self.input[*at + 2..]).expect("the scanner has seen four digits");
        *at += 4;
        if let Some(char) = char::from_u32(first) {
            return Ok(char);
        }
        let Some(following) = self.input.get(*at + 2..*at + 8) else {
            return Err(invalid("unexpected EOF"));
        };
        *at += 6;
        let second = following.strip_prefix(b"\\u").and_then(hex).filter(|second| (0xdc00..0xe000).contains(second));
        let char = second
            .filter(|_| first < 0xdc00)
            .and_then(|second| char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)));
        char.ok_or_else(|| self.syntax_error_at(start, &format!("invalid escape code {} in string", quote(following))))
    }

    /// The error for a value of the wrong type, where none can be named.
    fn unexpected_token(&mut self) -> DecodeError {
        let at = self.at;
        let raw = match self.input[at] {
            b'"' => match self.string() {
                Ok(text) => text.raw,
                Err(error) => return error,
            },
            _ => self.token(),
        };
        self.syntax_error_at(at, &format!("unexpected token {}", printed(raw)))
    }

    fn invalid_at(&self, at: usize, text: &str) -> DecodeError {
        let (line, column) = self.position(at);
        invalid(&format!("(line {line}:{column}): {text}"))
    }

    fn syntax_error_at(&self, at: usize, text: &str) -> DecodeError {
        let (line, column) = self.position(at);
        invalid(&format!("syntax error (line {line}:{column}): {text}"))
    }

    /// Line and column, counted from one, of a place in the input.
    fn position(&self, at: usize) -> (usize, usize) {
        let before = &self.input[..at];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let lines = before.split(|byte| *byte == b'\n').count();
        let chars =
            before[line_start..].utf8_chunks().map(|chunk| chunk.valid().chars().count() + chunk.invalid().len());
        (lines, chars.sum::<usize>() + 1)
    }
}

fn invalid(text: &str) -> DecodeError {
    DecodeError::Invalid(format!("proto: {text}"))
}

/// A piece of the input in an error text. Its strings have been checked.
fn printed(raw: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(raw)
}

fn hex(digits: &[u8]) -> Option<u32> {
    digits.get(..4)?.iter().try_fold(0, |number, digit| Some(number * 16 + char::from(*digit).to_digit(16)?))
}

fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Bool => "bool",
        Kind::Int32 => "int32",
        Kind::Int64 => "int64",
        Kind::Uint32 => "uint32",
        Kind::Uint64 => "uint64",
        Kind::String => "string",
        Kind::Bytes => "bytes",
        Kind::Enum(_) => "enum",
        Kind::Message(_) => "message",
    }
}

/// An integer as it is encoded, if it is one and in the range of its type.
fn integer_bits(kind: &Kind, number: &[u8]) -> Option<u64> {
    match kind {
        Kind::Int32 | Kind::Enum(_) => integer(number).map(sign_extended),
        Kind::Int64 => integer(number).map(i64::cast_unsigned),
        Kind::Uint32 => integer(number).map(|number: u32| u64::from(number)),
        Kind::Uint64 => integer(number),
        Kind::Bool | Kind::String | Kind::Bytes | Kind::Message(_) => None,
    }
}

fn sign_extended(number: i32) -> u64 {
    i64::from(number).cast_unsigned()
}

fn put_varint(out: &mut Vec<u8>, field: &Field, is_written: bool, value: u64) {
    if is_written || value != 0 {
        encode_key(field.number, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn put_bytes(out: &mut Vec<u8>, field: &Field, is_written: bool, value: &[u8]) {
    if is_written || !value.is_empty() {
        encode_key(field.number, WireType::LengthDelimited, out);
        encode_varint(value.len() as u64, out);
        out.extend_from_slice(value);
    }
}

const fn engine(alphabet: &Alphabet, padding: DecodePaddingMode) -> GeneralPurpose {
    let config = GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true);
    GeneralPurpose::new(alphabet, config.with_decode_padding_mode(padding))
}

/// With padding, without it, and both with the alphabet for URLs.
const ENGINES: [[GeneralPurpose; 2]; 2] = [
    [
        engine(&alphabet::STANDARD, DecodePaddingMode::RequireCanonical),
        engine(&alphabet::STANDARD, DecodePaddingMode::RequireNone),
    ],
    [
        engine(&alphabet::URL_SAFE, DecodePaddingMode::RequireCanonical),
        engine(&alphabet::URL_SAFE, DecodePaddingMode::RequireNone),
    ],
];

/// Bytes in base64, padded or not, in either alphabet. As Go does, line breaks are ignored, but count for the padding.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let is_for_urls = text.iter().any(|byte| matches!(byte, b'-' | b'_'));
    let engine = &ENGINES[usize::from(is_for_urls)][usize::from(!text.len().is_multiple_of(4))];
    let is_break = |byte: &u8| matches!(byte, b'\r' | b'\n');
    if text.iter().any(is_break) {
        let text: Vec<u8> = text.iter().filter(|byte| !is_break(byte)).copied().collect();
        return engine.decode(text).ok();
    }
    engine.decode(text).ok()
}
