//! Text as Go quotes it in error texts.

use std::fmt::Write;

/// A byte as a character in single quotes.
#[must_use]
pub fn quote_byte(byte: u8) -> String {
    match byte {
        b'\'' => r"'\''".to_owned(),
        b'"' => r#"'"'"#.to_owned(),
        _ => {
            let mut out = String::from("'");
            push_char(&mut out, char::from(byte));
            out.push('\'');
            out
        }
    }
}

/// Bytes in double quotes. Those that are no UTF-8 are written as numbers.
#[must_use]
pub fn quote(bytes: &[u8]) -> String {
    let mut out = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            if char == '"' { out.push_str("\\\"") } else { push_char(&mut out, char) }
        }
        for byte in chunk.invalid() {
            push_number(&mut out, 'x', u32::from(*byte), 2);
        }
    }
    out.push('"');
    out
}

fn push_char(out: &mut String, char: char) {
    let escape = match char {
        '\x07' => 'a',
        '\x08' => 'b',
        '\x0c' => 'f',
        '\n' => 'n',
        '\r' => 'r',
        '\t' => 't',
        '\x0b' => 'v',
        '\\' => '\\',
        '\0'..' ' | '\x7f' => return push_number(out, 'x', u32::from(char), 2),
        _ if is_printable(char) => return out.push(char),
        _ if char <= '\u{ffff}' => return push_number(out, 'u', u32::from(char), 4),
        _ => return push_number(out, 'U', u32::from(char), 8),
    };
    out.extend(['\\', escape]);
}

fn push_number(out: &mut String, kind: char, number: u32, digits: usize) {
    write!(out, "\\{kind}{number:0digits$x}").expect("writing to memory cannot fail");
}

fn is_printable(char: char) -> bool {
    matches!(char, ' '..='~') || !char.is_whitespace() && char.escape_debug().len() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_quoted_as_in_go() {
        assert_eq!(quote(b"\",\"key"), r#""\",\"key""#);
        assert_eq!(quote(b"a\\\n\x01\xff\xc3\xa9'"), r#""a\\\n\x01\xffé'""#);
        assert_eq!(quote("\u{a0}\u{ad}\u{2028}".as_bytes()), r#""\u00a0\u00ad\u2028""#);
        let bytes = [b'x', b'\'', b'"', b'\\', 0, b'\n', 0x7f, 0x80, 0xe9, 0xad];
        let quoted = ["'x'", r"'\''", "'\"'", r"'\\'", r"'\x00'", r"'\n'", r"'\x7f'", r"'\u0080'", "'é'", r"'\u00ad'"];
        assert_eq!(bytes.map(quote_byte), quoted);
    }
}
