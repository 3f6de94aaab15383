//! Booleans and numbers as Go's flag package parses them, with its error texts.

/// Go's text for a value that cannot be parsed.
pub const PARSE_ERROR: &str = "parse error";

const OUT_OF_RANGE: &str = "value out of range";

/// A value that can be parsed from the text of a flag.
pub trait Value: Sized {
    /// # Errors
    /// With Go's text.
    fn read(text: &str) -> Result<Self, String>;
}

impl Value for bool {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(PARSE_ERROR.to_owned()),
        }
    }
}

impl Value for u64 {
    fn read(text: &str) -> Result<Self, String> {
        magnitude(text).map_err(str::to_owned)
    }
}

impl Value for i64 {
    fn read(text: &str) -> Result<Self, String> {
        let (negative, digits) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let magnitude = magnitude(digits)?;
        let value = if negative { 0_i64.checked_sub_unsigned(magnitude) } else { i64::try_from(magnitude).ok() };
        value.ok_or_else(|| OUT_OF_RANGE.to_owned())
    }
}

impl Value for String {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
}

/// Parses a 32-bit number. etcd parses these with another function, so the error texts differ.
///
/// # Errors
/// With Go's text.
pub fn unsigned_32(text: &str) -> Result<u32, String> {
    let error = |cause: &str| format!("strconv.ParseUint: parsing {text:?}: {cause}");
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(error("invalid syntax"));
    }
    text.parse().map_err(|_| error(OUT_OF_RANGE))
}

/// The number as a size in memory; one beyond the address space becomes the largest size.
pub fn count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Parses digits in Go's syntax: `0x1F`, `0o17`, `017`, `0b1`, `1_000`.
fn magnitude(text: &str) -> Result<u64, &'static str> {
    let lower = text.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let prefixed = digits.len() < lower.len();
    let digits = without_underscores(digits, prefixed).ok_or(PARSE_ERROR)?;
    if !digits.bytes().all(|byte| char::from(byte).is_digit(radix)) || digits.is_empty() {
        return Err(PARSE_ERROR);
    }
    u64::from_str_radix(&digits, radix).map_err(|_| OUT_OF_RANGE)
}

/// Removes underscores, which are allowed between two digits and between the prefix and the first digit.
fn without_underscores(digits: &str, prefixed: bool) -> Option<String> {
    let leading = digits.starts_with('_') && !prefixed;
    let misplaced = leading || digits.ends_with('_') || digits.contains("__");
    (!misplaced).then(|| digits.replace('_', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans_have_twelve_spellings() {
        for (text, expected) in [("1", true), ("t", true), ("TRUE", true), ("0", false), ("f", false), ("False", false)]
        {
            assert_eq!(bool::read(text), Ok(expected), "{text}");
        }
        for text in ["", "yes", "tRUE", " true"] {
            assert_eq!(bool::read(text), Err(PARSE_ERROR.to_owned()), "{text}");
        }
    }

    #[test]
    fn numbers_have_gos_syntax() {
        for (text, expected) in [
            ("0", 0),
            ("10", 10),
            ("0x10", 16),
            ("0X1f", 31),
            ("010", 8),
            ("0o10", 8),
            ("0b11", 3),
            ("1_000", 1000),
            ("0x_f", 15),
        ] {
            assert_eq!(u64::read(text), Ok(expected), "{text}");
        }
        for text in ["", "-1", "+1", "abc", "1.5", "_1", "1_", "1__0", "0x", "08", " 1"] {
            assert_eq!(u64::read(text), Err(PARSE_ERROR.to_owned()), "{text}");
        }
        assert_eq!(u64::read("99999999999999999999"), Err(OUT_OF_RANGE.to_owned()));
    }

    #[test]
    fn signed_numbers_have_their_full_range() {
        assert_eq!(i64::read("-9223372036854775808"), Ok(i64::MIN));
        assert_eq!(i64::read("+9223372036854775807"), Ok(i64::MAX));
        assert_eq!(i64::read("9223372036854775808"), Err(OUT_OF_RANGE.to_owned()));
        assert_eq!(i64::read("--1"), Err(PARSE_ERROR.to_owned()));
    }

    #[test]
    fn a_32_bit_number_has_its_own_error_texts() {
        assert_eq!(unsigned_32("4294967295"), Ok(u32::MAX));
        assert_eq!(
            unsigned_32("4294967296").unwrap_err(),
            "strconv.ParseUint: parsing \"4294967296\": value out of range"
        );
        assert_eq!(unsigned_32("x").unwrap_err(), "strconv.ParseUint: parsing \"x\": invalid syntax");
        assert_eq!(unsigned_32("-1").unwrap_err(), "strconv.ParseUint: parsing \"-1\": invalid syntax");
    }
}
