//! Percent-encoding, in paths and queries.

use std::borrow::Cow;

/// The text, decoded. A percent sign that encodes nothing remains.
#[must_use]
pub fn percent_decoded(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return Cow::Borrowed(path);
    }
    let (mut out, mut rest) = (Vec::with_capacity(path.len()), path.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        let (byte, after) = escaped(rest).map_or((byte, after), |escaped| (escaped, &rest[3..]));
        out.push(byte);
        rest = after;
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

/// The bytes that a text stands for; None if a percent sign encodes nothing.
#[must_use]
pub fn decoded_bytes(text: &str) -> Option<Cow<'_, [u8]>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text.as_bytes()));
    }
    let (mut out, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        let (byte, after) = if byte == b'%' { (escaped(rest)?, &rest[3..]) } else { (byte, after) };
        out.push(byte);
        rest = after;
    }
    Some(Cow::Owned(out))
}

/// The byte that a percent sign and the two hexadecimal digits after it stand for.
fn escaped(text: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*text.get(at)?).to_digit(16);
    let value = digit(1)? * 16 + digit(2)?;
    (text[0] == b'%').then(|| u8::try_from(value).expect("two hexadecimal digits are a byte"))
}

/// The values of a parameter of a query, decoded.
pub fn query_values<'a>(query: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    query.split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (form_decoded(key) == name).then(|| form_decoded(value))
    })
}

fn form_decoded(text: &str) -> String {
    percent_decoded(&text.replace('+', " ")).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_decoded() {
        assert_eq!(percent_decoded("/a%2Fb%20%zz%4"), "/a/b %zz%4");
        assert_eq!(decoded_bytes("a%2Fb%ff").as_deref(), Some(&b"a/b\xff"[..]));
        assert!(["%", "a%4", "%zz", "%+1", "%%41"].into_iter().all(|wrong| decoded_bytes(wrong).is_none()));
        let values: Vec<_> = query_values("a=1&b=2&a=x%26+y&a", "a").collect();
        assert_eq!(values, ["1", "x& y", ""]);
    }
}
