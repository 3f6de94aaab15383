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
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        if let (b'%', Some(high), Some(low)) = (byte, digit(0), digit(1)) {
            out.push(u8::try_from(high * 16 + low).expect("two hexadecimal digits are a byte"));
            rest = &after[2..];
        } else {
            out.push(byte);
            rest = after;
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
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
        let values: Vec<_> = query_values("a=1&b=2&a=x%26+y&a", "a").collect();
        assert_eq!(values, ["1", "x& y", ""]);
    }
}
