//! Encodes a message of this server as JSON, straight from its wire format.
//!
//! Fields appear in the order of their declaration, which is that of their numbers, in which the server encodes them, too. 64-bit
//! integers are strings, values that are zero or empty are left out, and there is no insignificant space.

use std::fmt::Write;

use base64::{Engine, engine::general_purpose::STANDARD};
use prost::encoding::{WireType, decode_key, decode_varint};

use super::schema::{Field, Kind, Schema, TypeId};

const OWN: &str = "the server can read what it has encoded";
/// The output is charged in steps of this size.
const CHARGE_BYTES: usize = 64 << 10;

/// Encodes messages.
pub struct Encoder<'a> {
    schema: &'a Schema,
    /// etcd writes the lines of streams with another encoder than other answers: one that escapes what HTML would interpret.
    is_line: bool,
    out: String,
    /// What of the output is charged.
    charged: usize,
    /// Charges so many bytes more; false if they must not be held.
    charge: &'a mut dyn FnMut(usize) -> bool,
}

/// Not all of the output may be held.
#[derive(Debug, PartialEq, Eq)]
pub struct OverLimit;

/// Encodes a message as the body of an answer.
pub fn encode_body(
    schema: &Schema,
    id: TypeId,
    message: &[u8],
    charge: &mut dyn FnMut(usize) -> bool,
) -> Result<String, OverLimit> {
    let mut encoder = Encoder { schema, is_line: false, out: String::new(), charged: 0, charge };
    encoder.message(id, message)?;
    Ok(encoder.out)
}

/// Encodes a message as a line of a stream.
pub fn encode_line(
    schema: &Schema,
    id: TypeId,
    message: &[u8],
    charge: &mut dyn FnMut(usize) -> bool,
) -> Result<String, OverLimit> {
    let mut encoder = Encoder { schema, is_line: true, out: String::from("{\"result\":"), charged: 0, charge };
    encoder.message(id, message)?;
    encoder.out.push_str("}\n");
    Ok(encoder.out)
}

/// Appends a string with its quotes.
pub fn push_string(out: &mut String, text: &str, escapes_html: bool) {
    out.push('"');
    let mut rest = text;
    while let Some(at) = rest.find(|char| needs_escape(char, escapes_html)) {
        out.push_str(&rest[..at]);
        let char = rest[at..].chars().next().expect("a character was found");
        match char {
            '"' | '\\' => out.extend(['\\', char]),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ => write!(out, "\\u{:04x}", u32::from(char)).expect("writing to memory cannot fail"),
        }
        rest = &rest[at + char.len_utf8()..];
    }
    out.push_str(rest);
    out.push('"');
}

fn needs_escape(char: char, escapes_html: bool) -> bool {
    matches!(char, '\0'..' ' | '"' | '\\') || escapes_html && matches!(char, '<' | '>' | '&' | '\u{2028}' | '\u{2029}')
}

impl Encoder<'_> {
    fn message(&mut self, id: TypeId, mut message: &[u8]) -> Result<(), OverLimit> {
        let schema = self.schema;
        let definition = schema.get(id);
        self.out.push('{');
        let (mut last, mut is_first) = (0, true);
        while !message.is_empty() {
            let (number, wire_type) = decode_key(&mut message).expect(OWN);
            let value = Value::read(wire_type, &mut message);
            let Some(field) = definition.field_numbered(number) else { continue };
            debug_assert!(last <= number, "fields are encoded in the order of their numbers");
            if !field.is_repeated && !field.has_presence() && value.is_empty() {
                continue;
            }
            let continues_list = field.is_repeated && last == number;
            if last != 0 && !continues_list && definition.field_numbered(last).is_some_and(|last| last.is_repeated) {
                self.out.push(']');
            }
            if !is_first {
                self.out.push(',');
            }
            if !continues_list {
                push_string(&mut self.out, &field.name, false);
                self.out.push_str(if field.is_repeated { ":[" } else { ":" });
            }
            self.field(field, value)?;
            (last, is_first) = (number, false);
        }
        if definition.field_numbered(last).is_some_and(|last| last.is_repeated) {
            self.out.push(']');
        }
        self.out.push('}');
        self.charge_output()
    }

    fn field(&mut self, field: &Field, value: Value<'_>) -> Result<(), OverLimit> {
        match (&field.kind, value) {
            (Kind::Message(id), Value::Bytes(message)) => return self.message(*id, message),
            (Kind::Bytes, Value::Bytes(bytes)) => {
                if !(self.charge)(bytes.len() / 3 * 4) {
                    return Err(OverLimit);
                }
                self.charged += bytes.len() / 3 * 4;
                self.out.push('"');
                STANDARD.encode_string(bytes, &mut self.out);
                self.out.push('"');
            }
            (Kind::String, Value::Bytes(text)) => {
                push_string(&mut self.out, &String::from_utf8_lossy(text), self.is_line);
            }
            (kind, Value::Varint(number)) => self.number(kind, number),
            // A list of numbers in one piece.
            (kind, Value::Bytes(mut packed)) => {
                let mut separator = "";
                while !packed.is_empty() {
                    self.out.push_str(separator);
                    self.number(kind, decode_varint(&mut packed).expect(OWN));
                    separator = ",";
                }
            }
        }
        Ok(())
    }

    fn number(&mut self, kind: &Kind, bits: u64) {
        let out = &mut self.out;
        let written = match kind {
            Kind::Bool => write!(out, "{}", bits != 0),
            Kind::Int32 => write!(out, "{}", truncated(bits)),
            Kind::Uint32 => write!(out, "{}", bits & u64::from(u32::MAX)),
            Kind::Int64 => write!(out, "\"{}\"", bits.cast_signed()),
            Kind::Uint64 => write!(out, "\"{bits}\""),
            Kind::Enum(values) => match values.name(truncated(bits)) {
                Some(name) => write!(out, "\"{name}\""),
                None => write!(out, "{}", truncated(bits)),
            },
            Kind::String | Kind::Bytes | Kind::Message(_) => unreachable!("{OWN}"),
        };
        written.expect("writing to memory cannot fail");
    }

    fn charge_output(&mut self) -> Result<(), OverLimit> {
        if self.out.len() < self.charged + CHARGE_BYTES {
            return Ok(());
        }
        let more = self.out.len() - self.charged;
        self.charged += more;
        if (self.charge)(more) { Ok(()) } else { Err(OverLimit) }
    }
}

/// A number of 32 bits, which is encoded with 64.
#[allow(clippy::cast_possible_truncation, reason = "the upper bits repeat the sign")]
fn truncated(bits: u64) -> i32 {
    bits as i32
}

/// What follows the key of a field.
enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    fn read(wire_type: WireType, message: &mut &'a [u8]) -> Self {
        match wire_type {
            WireType::Varint => Self::Varint(decode_varint(message).expect(OWN)),
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(message).expect(OWN)).expect(OWN);
                let (value, rest) = message.split_at(length);
                *message = rest;
                Self::Bytes(value)
            }
            WireType::ThirtyTwoBit | WireType::SixtyFourBit | WireType::StartGroup | WireType::EndGroup => {
                unreachable!("no message of a route has such fields")
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Varint(number) => *number == 0,
            Self::Bytes(bytes) => bytes.is_empty(),
        }
    }
}
