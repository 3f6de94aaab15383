//! Finds where a JSON value ends, byte by byte, as a body arrives; and the first byte that cannot be part of one.
//!
//! etcd reads a body with two parsers, one after another: one that splits it into values and knows no types, and one that
//! decodes a value (here [`decode`](super::decode)). The texts of the first are `invalid character 'x' after object key`; they
//! contain no position.

use super::quote::quote_byte;

/// Arrays and objects may be nested this deeply.
const MAX_DEPTH: usize = 10_000;

/// What a byte did.
#[derive(Debug, PartialEq, Eq)]
pub enum Scanned {
    /// It belongs to the value, or to the space before it.
    More,
    /// It is the last byte of the value.
    Last,
    /// The value ended before it.
    EndedBefore,
}

/// What the end of the input meant.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// There was nothing but space.
    Empty,
    /// It ended a value.
    Complete,
    /// It came in the middle of a value.
    Truncated,
}

/// An array or an object that is not closed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nesting {
    Key,
    Value,
    Array,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    BeginValue,
    BeginValueOrEmpty,
    BeginKey,
    BeginKeyOrEmpty,
    EndValue,
    InString,
    Escape,
    /// So many hexadecimal digits are still expected.
    Unicode(u8),
    Minus,
    Zero,
    Digits,
    Dot,
    Fraction,
    ExponentSign,
    ExponentFirst,
    Exponent,
    /// How much of `true`, `false` or `null` has been seen.
    Literal(&'static str, usize),
}

/// Scans one value.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    open: Vec<Nesting>,
    has_begun: bool,
}

impl Default for Scanner {
    fn default() -> Self {
        Self { state: State::BeginValue, open: Vec::new(), has_begun: false }
    }
}

impl Scanner {
    /// Whether the next byte is one of a string's, so that all up to a quote, a backslash or a control character may be skipped.
    #[must_use]
    pub fn is_in_string(&self) -> bool {
        self.state == State::InString
    }

    /// Whether anything but space has been seen.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Takes the next byte. After an error nothing more can be scanned.
    pub fn step(&mut self, byte: u8) -> Result<Scanned, String> {
        if !self.has_begun && !is_space(byte) {
            self.has_begun = true;
        }
        match self.state {
            State::BeginValueOrEmpty if byte == b']' => self.end_value(byte),
            State::BeginValue | State::BeginValueOrEmpty => self.begin_value(byte),
            State::BeginKeyOrEmpty if byte == b'}' => {
                *self.open.last_mut().expect("an object is open") = Nesting::Value;
                self.end_value(byte)
            }
            State::BeginKey | State::BeginKeyOrEmpty => match byte {
                b'"' => self.to(State::InString),
                _ if is_space(byte) => Ok(Scanned::More),
                _ => refuse(byte, "looking for beginning of object key string"),
            },
            State::EndValue => self.end_value(byte),
            State::InString => match byte {
                b'"' => self.to(State::EndValue),
                b'\\' => self.to(State::Escape),
                0..b' ' => refuse(byte, "in string literal"),
                _ => Ok(Scanned::More),
            },
            State::Escape => match byte {
                b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => self.to(State::InString),
                b'u' => self.to(State::Unicode(4)),
                _ => refuse(byte, "in string escape code"),
            },
            State::Unicode(left) => match byte {
                b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' if left == 1 => self.to(State::InString),
                b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' => self.to(State::Unicode(left - 1)),
                _ => refuse(byte, "in \\u hexadecimal character escape"),
            },
            State::Literal(text, seen) => match text.as_bytes()[seen] {
                expected if expected != byte => {
                    let expected = char::from(expected);
                    refuse(byte, &format!("in literal {text} (expecting '{expected}')"))
                }
                _ if seen + 1 == text.len() => self.to(State::EndValue),
                _ => self.to(State::Literal(text, seen + 1)),
            },
            State::Minus
            | State::Zero
            | State::Digits
            | State::Dot
            | State::Fraction
            | State::ExponentSign
            | State::ExponentFirst
            | State::Exponent => self.number(byte),
        }
    }

    /// Takes the end of the input.
    #[must_use]
    pub fn end(&self) -> End {
        let may_end =
            matches!(self.state, State::EndValue | State::Zero | State::Digits | State::Fraction | State::Exponent);
        match self.has_begun {
            false => End::Empty,
            true if may_end && self.open.is_empty() => End::Complete,
            true => End::Truncated,
        }
    }

    #[allow(clippy::unnecessary_wraps, reason = "what a step that succeeds returns")]
    fn to(&mut self, state: State) -> Result<Scanned, String> {
        self.state = state;
        Ok(Scanned::More)
    }

    fn begin_value(&mut self, byte: u8) -> Result<Scanned, String> {
        match byte {
            b'{' => self.open(byte, Nesting::Key, State::BeginKeyOrEmpty),
            b'[' => self.open(byte, Nesting::Array, State::BeginValueOrEmpty),
            b'"' => self.to(State::InString),
            b'-' => self.to(State::Minus),
            b'0' => self.to(State::Zero),
            b'1'..=b'9' => self.to(State::Digits),
            b't' => self.to(State::Literal("true", 1)),
            b'f' => self.to(State::Literal("false", 1)),
            b'n' => self.to(State::Literal("null", 1)),
            _ if is_space(byte) => Ok(Scanned::More),
            _ => refuse(byte, "looking for beginning of value"),
        }
    }

    fn open(&mut self, byte: u8, nesting: Nesting, state: State) -> Result<Scanned, String> {
        if self.open.len() == MAX_DEPTH {
            return refuse(byte, "exceeded max depth");
        }
        self.open.push(nesting);
        self.to(state)
    }

    fn number(&mut self, byte: u8) -> Result<Scanned, String> {
        let is_digit = byte.is_ascii_digit();
        match (self.state, byte) {
            (State::Minus, b'0') => self.to(State::Zero),
            (State::Minus, _) if is_digit => self.to(State::Digits),
            (State::Minus, _) => refuse(byte, "in numeric literal"),
            (State::Dot, _) if !is_digit => refuse(byte, "after decimal point in numeric literal"),
            (State::Dot, _) => self.to(State::Fraction),
            (State::ExponentSign, b'+' | b'-') => self.to(State::ExponentFirst),
            (State::ExponentSign | State::ExponentFirst, _) if !is_digit => {
                refuse(byte, "in exponent of numeric literal")
            }
            (State::ExponentSign | State::ExponentFirst, _) => self.to(State::Exponent),
            (State::Digits | State::Fraction | State::Exponent, _) if is_digit => Ok(Scanned::More),
            (State::Zero | State::Digits, b'.') => self.to(State::Dot),
            (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => self.to(State::ExponentSign),
            _ => self.end_value(byte),
        }
    }

    /// Takes the byte after a value.
    fn end_value(&mut self, byte: u8) -> Result<Scanned, String> {
        let Some(innermost) = self.open.last_mut() else { return Ok(Scanned::EndedBefore) };
        match (*innermost, byte) {
            (Nesting::Key, b':') => {
                *innermost = Nesting::Value;
                self.to(State::BeginValue)
            }
            (Nesting::Value, b',') => {
                *innermost = Nesting::Key;
                self.to(State::BeginKey)
            }
            (Nesting::Array, b',') => self.to(State::BeginValue),
            (Nesting::Value, b'}') | (Nesting::Array, b']') => {
                self.open.pop();
                self.state = State::EndValue;
                Ok(if self.open.is_empty() { Scanned::Last } else { Scanned::More })
            }
            _ if is_space(byte) => self.to(State::EndValue),
            (Nesting::Key, _) => refuse(byte, "after object key"),
            (Nesting::Value, _) => refuse(byte, "after object key:value pair"),
            (Nesting::Array, _) => refuse(byte, "after array element"),
        }
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn refuse(byte: u8, place: &str) -> Result<Scanned, String> {
    Err(format!("invalid character {} {place}", quote_byte(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many bytes of the input are the first value, or the error.
    fn scan(input: &str) -> Result<(usize, bool), String> {
        let mut scanner = Scanner::default();
        for (at, byte) in input.bytes().enumerate() {
            match scanner.step(byte)? {
                Scanned::More => (),
                Scanned::Last => return Ok((at + 1, true)),
                Scanned::EndedBefore => return Ok((at, true)),
            }
        }
        Ok((input.len(), scanner.end() == End::Complete))
    }

    #[test]
    fn a_value_ends_where_it_must() {
        for (input, length) in [
            ("{} x", 2),
            (" [1, {\"a\":[]}]]", 14),
            ("12 3", 2),
            ("-0.5e+1,", 7),
            ("\"a\\\"\\u00e9\"x", 11),
            ("true", 4),
            ("0", 1),
        ] {
            assert_eq!(scan(input), Ok((length, true)), "{input}");
        }
        for truncated in ["", "  ", "{", "[1,", "\"a", "tru", "1.", "-", "{\"a\"", "1e"] {
            assert_eq!(scan(truncated), Ok((truncated.len(), false)), "{truncated}");
        }
    }

    /// The texts are those that a real etcd gave.
    #[test]
    fn a_byte_that_cannot_be_is_named() {
        for (input, text) in [
            ("{\"a\":1,}", "invalid character '}' looking for beginning of object key string"),
            ("{\"a\" \"b\"}", "invalid character '\"' after object key"),
            ("{'a':1}", "invalid character '\\'' looking for beginning of object key string"),
            ("{\"a\":\"\\x\"}", "invalid character 'x' in string escape code"),
            ("{\"a\":\"\n\"}", "invalid character '\\n' in string literal"),
            ("{\"a\":tru}", "invalid character '}' in literal true (expecting 'e')"),
            ("{\"a\":01}", "invalid character '1' after object key:value pair"),
            ("{\"a\":-}", "invalid character '}' in numeric literal"),
            ("{\"a\":1.}", "invalid character '}' after decimal point in numeric literal"),
            ("{\"a\":1e}", "invalid character '}' in exponent of numeric literal"),
            ("{\"a\":\"\\u12\"}", "invalid character '\"' in \\u hexadecimal character escape"),
            ("[1 2]", "invalid character '2' after array element"),
            ("\u{e9}", "invalid character 'Ã' looking for beginning of value"),
            ("\0", "invalid character '\\x00' looking for beginning of value"),
        ] {
            assert_eq!(scan(input), Err(text.to_owned()), "{input}");
        }
    }

    #[test]
    fn nesting_is_limited() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert_eq!(scan(&nested(MAX_DEPTH)), Ok((2 * MAX_DEPTH, true)));
        assert_eq!(scan(&nested(MAX_DEPTH + 1)), Err("invalid character '[' exceeded max depth".to_owned()));
    }
}
