//! What the headers of a request say about a call.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;

use super::values::invalid;
use crate::frontend::grpc::METADATA_FIELDS;
use http2::{
    call::{CallError, Code, Metadata},
    message::check_base64,
};

/// Headers with this prefix are metadata of the call.
const PREFIX: &str = "grpc-metadata-";
const TIMEOUT: &str = "grpc-timeout";
const AUTHORIZATION: &str = "authorization";

/// The metadata of a call. A client is never identified by its certificate here.
pub fn metadata(headers: &HeaderMap) -> Result<Metadata, CallError> {
    let mut fields = METADATA_FIELDS.map(|_| None);
    let deadline = headers.get(TIMEOUT).map_or(Ok(None), |timeout| deadline(timeout.as_bytes()))?;
    for (name, value) in headers {
        let field = name.as_str().strip_prefix(PREFIX);
        let value = value.as_bytes();
        if field.is_some_and(|field| field.ends_with("-bin"))
            && let Err(offset) = check_base64(value)
        {
            let name = canonical(name.as_str());
            let text = format!("invalid binary header {name}: illegal base64 data at input byte {offset}");
            return Err(invalid(text));
        }
        let is_text = value.iter().all(|byte| (b' '..=b'~').contains(byte));
        let field = match field {
            Some(field) if is_text => field,
            None if name == AUTHORIZATION && is_text => AUTHORIZATION,
            None if name == AUTHORIZATION => {
                let message = "header key \"authorization\" contains value with non-printable ASCII characters".into();
                return Err(CallError { code: Code::Internal, message });
            }
            _ => continue,
        };
        if let Some(index) = METADATA_FIELDS.iter().position(|known| *known == field) {
            let is_own = name == AUTHORIZATION;
            if is_own || fields[index].is_none() {
                fields[index] = Some(Bytes::copy_from_slice(value));
            }
        }
    }
    Ok(Metadata { fields, deadline, connection: None })
}

/// When a call with this timeout has to be answered. Unlike over gRPC, it may be negative, and then has passed already.
fn deadline(timeout: &[u8]) -> Result<Option<Instant>, CallError> {
    let text = String::from_utf8_lossy(timeout);
    let refuse = || invalid(format!("invalid grpc-timeout: {text}"));
    let (unit, digits) = timeout.split_last().filter(|(_, digits)| !digits.is_empty()).ok_or_else(refuse)?;
    let of_units: fn(u64) -> Duration = match unit {
        b'H' => |hours| Duration::from_secs(hours.saturating_mul(3600)),
        b'M' => |minutes| Duration::from_secs(minutes.saturating_mul(60)),
        b'S' => Duration::from_secs,
        b'm' => Duration::from_millis,
        b'u' => Duration::from_micros,
        b'n' => Duration::from_nanos,
        _ => return Err(refuse()),
    };
    let count: i64 = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).ok_or_else(refuse)?;
    if count == 0 {
        return Ok(None);
    }
    let now = Instant::now();
    // A time that cannot be represented never comes.
    Ok(match u64::try_from(count) {
        Ok(count) => now.checked_add(of_units(count)),
        Err(_) => Some(now),
    })
}

/// A header's name with upper-case letters at the beginning of its parts.
fn canonical(name: &str) -> String {
    let capitalised = name.split('-').map(|part| {
        let mut chars = part.chars();
        chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect()
    });
    capitalised.collect::<Vec<String>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&'static str, &'static str)]) -> Result<Metadata, String> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        metadata(&map).map_err(|error| error.message.into_owned())
    }

    #[test]
    fn headers_are_metadata() {
        let found = of(&[
            ("grpc-metadata-hasleader", "true"),
            ("authorization", "Bearer t"),
            ("grpc-metadata-authorization", "other"),
            ("token", "ignored"),
            ("grpc-metadata-client-api-version", "3.7"),
        ]);
        let fields = found.unwrap().fields.map(|field| field.map(|value| String::from_utf8(value.into()).unwrap()));
        let expected = [Some("true"), None, Some("Bearer t"), Some("3.7")];
        assert_eq!(fields.each_ref().map(Option::as_deref), expected);
        let refusal = of(&[("grpc-metadata-foo-bin", "!!")]).unwrap_err();
        assert_eq!(refusal, "invalid binary header Grpc-Metadata-Foo-Bin: illegal base64 data at input byte 0");
    }

    #[test]
    fn a_timeout_may_have_passed() {
        let left = |timeout: &'static str| {
            let deadline = of(&[("grpc-timeout", timeout)]).map(|metadata| metadata.deadline);
            deadline.map(|deadline| deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())))
        };
        assert_eq!(left("-5S"), Ok(Some(Duration::ZERO)));
        assert_eq!(left("0S"), Ok(None));
        assert!(left("5H").unwrap().unwrap() > Duration::from_hours(4));
        assert!(left("9223372036854775807H").unwrap().is_none_or(|left| !left.is_zero()));
        for wrong in ["5", "S", "5s", "x5S", "9223372036854775808S"] {
            assert_eq!(left(wrong), Err(format!("invalid grpc-timeout: {wrong}")));
        }
    }
}
