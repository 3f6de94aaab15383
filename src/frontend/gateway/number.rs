//! Integers as JSON spells them: `1e1` and `10.0` are integers, `1.5` is none.
//!
//! A number may also stand in a string, of which etcd reads the first number only: `"1,x"` is 1.

use std::str::FromStr;

/// More digits than the largest integer has are not written out.
const MAX_DIGITS: usize = 20;

/// The integer in a JSON number.
#[must_use]
pub fn integer<T: FromStr>(number: &[u8]) -> Option<T> {
    let (is_negative, unsigned) = match number.strip_prefix(b"-") {
        Some(unsigned) => (true, unsigned),
        None => (false, number),
    };
    let (whole, rest) = split_digits(unsigned);
    let (fraction, rest) = rest.strip_prefix(b".").map_or((&[][..], rest), split_digits);
    let exponent = match rest {
        [b'e' | b'E', exponent @ ..] if !exponent.is_empty() => std::str::from_utf8(exponent).ok()?,
        _ => "0",
    };
    let whole = whole.trim_ascii_start_zeros();
    let fraction = fraction.trim_ascii_end_zeros();
    if whole.is_empty() && fraction.is_empty() {
        return "0".parse().ok();
    }
    let digits = shifted(whole, fraction, exponent.parse().ok()?)?;
    let digits = std::str::from_utf8(&digits).expect("digits are text");
    if is_negative { format!("-{digits}").parse().ok() } else { digits.parse().ok() }
}

/// The digits with the decimal point moved, if they are an integer then.
fn shifted(whole: &[u8], fraction: &[u8], exponent: i32) -> Option<Vec<u8>> {
    let distance = usize::try_from(exponent.unsigned_abs()).ok()?;
    if exponent >= 0 {
        let zeros = distance.checked_sub(fraction.len())?;
        if whole.len() + distance > MAX_DIGITS {
            return None;
        }
        return Some([whole, fraction, vec![b'0'; zeros].as_slice()].concat());
    }
    let (kept, dropped) = whole.split_at(whole.len().checked_sub(distance)?);
    (fraction.is_empty() && dropped.iter().all(|digit| *digit == b'0')).then(|| kept.to_vec())
}

/// The number at the beginning of a string's content, if there is one.
#[must_use]
pub fn number_in(text: &str) -> Option<&[u8]> {
    if text.trim().len() != text.len() {
        return None;
    }
    let text = text.as_bytes();
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let (whole, mut rest) = split_digits(unsigned);
    if whole.is_empty() {
        return None;
    }
    if whole[0] == b'0' {
        rest = &unsigned[1..];
    }
    if let [b'.', digit, ..] = rest
        && digit.is_ascii_digit()
    {
        rest = split_digits(&rest[1..]).1;
    }
    if let [b'e' | b'E', after @ ..] = rest
        && !after.is_empty()
    {
        let after = match after {
            [b'+' | b'-'] => return None,
            [b'+' | b'-', unsigned @ ..] => unsigned,
            _ => after,
        };
        rest = split_digits(after).1;
    }
    let is_delimited = !rest.first().is_some_and(|byte| byte.is_ascii_alphanumeric() || b"-+._".contains(byte));
    is_delimited.then(|| &text[..text.len() - rest.len()])
}

fn split_digits(text: &[u8]) -> (&[u8], &[u8]) {
    text.split_at(text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len()))
}

/// Digits without the zeros that say nothing.
trait TrimZeros {
    fn trim_ascii_start_zeros(&self) -> &[u8];
    fn trim_ascii_end_zeros(&self) -> &[u8];
}

impl TrimZeros for [u8] {
    fn trim_ascii_start_zeros(&self) -> &[u8] {
        &self[self.iter().position(|digit| *digit != b'0').unwrap_or(self.len())..]
    }

    fn trim_ascii_end_zeros(&self) -> &[u8] {
        &self[..self.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_may_have_a_fraction_and_an_exponent() {
        for (text, expected) in [
            ("0", 0),
            ("-0", 0),
            ("-0.0e9", 0),
            ("1e1", 10),
            ("10.0", 10),
            ("1.5e1", 15),
            ("0.5E+1", 5),
            ("100e-2", 1),
            ("0e-5", 0),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(integer(text.as_bytes()), Some(expected), "{text}");
        }
        for none in ["1.5", "1e30", "9223372036854775808", "10e-2", "1e-1", "1e99999999999", "0.5", "1.50e-1"] {
            assert_eq!(integer::<i64>(none.as_bytes()), None, "{none}");
        }
        assert_eq!(integer::<u64>(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!((integer::<u64>(b"-0"), integer::<u64>(b"-1")), (Some(0), None));
        assert_eq!((integer::<i32>(b"2147483647"), integer::<i32>(b"2147483648")), (Some(i32::MAX), None));
    }

    #[test]
    fn a_string_may_begin_with_a_number() {
        for (text, number) in
            [("12", "12"), ("1,x", "1"), ("1 2", "1"), ("-1.5e3]", "-1.5e3"), ("1e,", "1e"), ("0", "0")]
        {
            assert_eq!(number_in(text), Some(number.as_bytes()), "{text}");
        }
        for none in ["", " 1", "1 ", "x", "1x", "01", "1.", "1.,", "-", "+1", "1e", "1e+", "1_0", "\u{a0}1"] {
            assert_eq!(number_in(none), None, "{none}");
        }
    }
}
