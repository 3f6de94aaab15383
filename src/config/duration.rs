//! Durations in Go's notation: `1h30m`, `1.5s`, `300µs`.
//!
//! Parsing returns signed nanoseconds, because Go's flags accept negative durations; callers decide what these mean. Printing
//! gives the form that etcd's logs show.

use std::{fmt, time::Duration};

const NANOSECOND: u64 = 1;
const MICROSECOND: u64 = 1_000;
const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// Parses a duration into signed nanoseconds.
///
/// # Errors
/// With the text of Go's `time` package.
pub fn parse(text: &str) -> Result<i64, String> {
    let (negative, unsigned) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if unsigned == "0" {
        return Ok(0);
    }
    let invalid = || format!("time: invalid duration {text:?}");
    if unsigned.is_empty() {
        return Err(invalid());
    }
    let mut total: u64 = 0;
    let mut rest = unsigned;
    while !rest.is_empty() {
        let part = Part::split(rest).ok_or_else(invalid)?;
        if part.unit.is_empty() {
            return Err(format!("time: missing unit in duration {text:?}"));
        }
        let unit =
            unit_nanos(part.unit).ok_or_else(|| format!("time: unknown unit {:?} in duration {text:?}", part.unit))?;
        total = part.nanos(unit).and_then(|nanos| total.checked_add(nanos)).ok_or_else(invalid)?;
        rest = part.rest;
    }
    let signed = if negative { 0_i64.checked_sub_unsigned(total) } else { i64::try_from(total).ok() };
    signed.ok_or_else(invalid)
}

/// A number with its unit, and the rest of the text.
struct Part<'a> {
    whole: &'a str,
    fraction: &'a str,
    unit: &'a str,
    rest: &'a str,
}

impl<'a> Part<'a> {
    /// None if the text does not begin with a number.
    fn split(text: &'a str) -> Option<Self> {
        let (whole, after) = text.split_at(digits(text));
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(digits(after)),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let unit_end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, rest) = after.split_at(unit_end);
        Some(Self { whole, fraction, unit, rest })
    }

    /// None on overflow.
    fn nanos(&self, unit: u64) -> Option<u64> {
        let whole: u64 = if self.whole.is_empty() { 0 } else { self.whole.parse().ok()? };
        // No unit has as many as 10^18 nanoseconds, so digits beyond the eighteenth do not matter.
        let fraction = &self.fraction[..self.fraction.len().min(18)];
        let numerator: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
        let denominator = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        let part = u64::try_from(numerator * u128::from(unit) / denominator).ok()?;
        whole.checked_mul(unit)?.checked_add(part)
    }
}

fn digits(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_digit).count()
}

fn unit_nanos(unit: &str) -> Option<u64> {
    Some(match unit {
        "ns" => NANOSECOND,
        "us" | "µs" | "μs" => MICROSECOND,
        "ms" => MILLISECOND,
        "s" => SECOND,
        "m" => 60 * SECOND,
        "h" => 3600 * SECOND,
        _ => return None,
    })
}

/// Prints a duration in Go's notation, for logs and messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoDuration(pub Duration);

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        match nanos {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{nanos}ns"),
            1_000..1_000_000 => decimal(f, nanos, MICROSECOND, "µs"),
            1_000_000..1_000_000_000 => decimal(f, nanos, MILLISECOND, "ms"),
            _ => {
                let minutes = self.0.as_secs() / 60;
                if minutes >= 60 {
                    write!(f, "{}h", minutes / 60)?;
                }
                if minutes > 0 {
                    write!(f, "{}m", minutes % 60)?;
                }
                decimal(f, nanos % u128::from(60 * SECOND), SECOND, "s")
            }
        }
    }
}

/// Prints as few decimals as necessary.
fn decimal(f: &mut fmt::Formatter<'_>, nanos: u128, unit: u64, name: &str) -> fmt::Result {
    let unit = u128::from(unit);
    let width = unit.ilog10() as usize;
    write!(f, "{}", nanos / unit)?;
    let fraction = format!("{:0width$}", nanos % unit);
    let fraction = fraction.trim_end_matches('0');
    if !fraction.is_empty() {
        write!(f, ".{fraction}")?;
    }
    f.write_str(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed_as_in_go() {
        for (text, nanos) in [
            ("0", 0),
            ("-0", 0),
            ("100ms", 100_000_000),
            ("1h30m", 5_400_000_000_000),
            ("1.5s", 1_500_000_000),
            (".5s", 500_000_000),
            ("5.s", 5_000_000_000),
            ("-1s", -1_000_000_000),
            ("+3us", 3_000),
            ("3µs2ns", 3_002),
            ("0.0000000000000000000000001s", 0),
            ("9223372036854775807ns", i64::MAX),
        ] {
            assert_eq!(parse(text), Ok(nanos), "{text}");
        }
    }

    #[test]
    fn invalid_durations_have_gos_error_texts() {
        for (text, error) in [
            ("", "time: invalid duration \"\""),
            ("abc", "time: invalid duration \"abc\""),
            ("-", "time: invalid duration \"-\""),
            (".s", "time: invalid duration \".s\""),
            ("5", "time: missing unit in duration \"5\""),
            ("-1", "time: missing unit in duration \"-1\""),
            ("1h5", "time: missing unit in duration \"1h5\""),
            ("5d", "time: unknown unit \"d\" in duration \"5d\""),
            ("9223372036854775808ns", "time: invalid duration \"9223372036854775808ns\""),
            ("99999999999999h", "time: invalid duration \"99999999999999h\""),
        ] {
            assert_eq!(parse(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn durations_are_printed_as_in_go() {
        for (nanos, text) in [
            (0, "0s"),
            (7, "7ns"),
            (1_500, "1.5µs"),
            (688_541, "688.541µs"),
            (1_276_538, "1.276538ms"),
            (100_000_000, "100ms"),
            (1_000_000_000, "1s"),
            (60_000_000_000, "1m0s"),
            (5_400_000_000_000, "1h30m0s"),
            (3_600_000_000_000 + 500_000_000, "1h0m0.5s"),
        ] {
            assert_eq!(GoDuration(Duration::from_nanos(nanos)).to_string(), text);
            assert_eq!(parse(text), Ok(i64::try_from(nanos).unwrap()), "a printed duration can be parsed");
        }
    }
}
