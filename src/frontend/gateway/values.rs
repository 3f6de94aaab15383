//! Splits the body of a request into JSON values, as its pieces arrive.

use bytes::{Buf, Bytes};

use super::scanner::{End, Scanned, Scanner};
use http2::call::{CallError, Code};

/// The value that is being received.
#[derive(Debug)]
pub struct Values {
    scanner: Scanner,
    value: Vec<u8>,
    max_bytes: usize,
}

impl Values {
    /// Values longer than `max_bytes` are refused.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self { scanner: Scanner::default(), value: Vec::new(), max_bytes }
    }

    /// How many bytes the buffer takes.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.value.capacity()
    }

    /// Takes bytes up to the end of a value; returns the value if it is complete.
    pub fn push(&mut self, data: &mut Bytes) -> Result<Option<Vec<u8>>, CallError> {
        let (mut taken, mut is_complete) = (0, false);
        while let Some(&byte) = data.get(taken) {
            if self.scanner.is_in_string() {
                let special = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..b' ');
                let skipped = data[taken..].iter().position(special).unwrap_or(data.len() - taken);
                taken += skipped;
                if skipped > 0 {
                    continue;
                }
            }
            match self.scanner.step(byte).map_err(invalid)? {
                Scanned::More if !self.scanner.has_begun() => data.advance(1),
                Scanned::More => taken += 1,
                Scanned::Last => (taken, is_complete) = (taken + 1, true),
                Scanned::EndedBefore => is_complete = true,
            }
            if is_complete {
                break;
            }
        }
        let length = self.value.len() + taken;
        if length > self.max_bytes {
            return Err(too_large(length, self.max_bytes));
        }
        self.value.extend_from_slice(&data[..taken]);
        data.advance(taken);
        Ok(is_complete.then(|| self.take()))
    }

    /// Takes the end of the body; returns the last value, if there is one.
    pub fn end(&mut self) -> Result<Option<Vec<u8>>, CallError> {
        match self.scanner.end() {
            End::Empty => Ok(None),
            End::Complete => Ok(Some(self.take())),
            End::Truncated => Err(invalid("unexpected EOF".to_owned())),
        }
    }

    fn take(&mut self) -> Vec<u8> {
        self.scanner = Scanner::default();
        std::mem::take(&mut self.value)
    }
}

/// The error of a body that cannot be understood.
#[must_use]
pub fn invalid(message: String) -> CallError {
    CallError { code: Code::InvalidArgument, message: message.into() }
}

/// The error of a message that is too large, with the text of gRPC.
#[must_use]
pub fn too_large(bytes: usize, max_bytes: usize) -> CallError {
    http2::limits::count_refusal("message_length");
    let message = format!("grpc: received message larger than max ({bytes} vs. {max_bytes})").into();
    CallError { code: Code::ResourceExhausted, message }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(pieces: &[&[u8]]) -> Vec<Result<String, String>> {
        let (mut values, mut found) = (Values::new(100), Vec::new());
        for piece in pieces {
            let mut data = Bytes::copy_from_slice(piece);
            while !data.is_empty() {
                match values.push(&mut data) {
                    Ok(value) => found.extend(value.map(|value| Ok(String::from_utf8(value).unwrap()))),
                    Err(error) => {
                        found.push(Err(error.message.into_owned()));
                        return found;
                    }
                }
            }
        }
        match values.end() {
            Ok(value) => found.extend(value.map(|value| Ok(String::from_utf8(value).unwrap()))),
            Err(error) => found.push(Err(error.message.into_owned())),
        }
        found
    }

    #[test]
    fn values_follow_each_other() {
        let owned = |text: &str| Ok(text.to_owned());
        assert_eq!(split(&[b" {\"a\":1}\n{} 5"]), [owned("{\"a\":1}"), owned("{}"), owned("5")]);
        assert_eq!(split(&[b"  \n"]), []);
        assert_eq!(split(&[b"{}{"]), [owned("{}"), Err("unexpected EOF".to_owned())]);
        assert_eq!(
            split(&[b"{} x"]),
            [owned("{}"), Err("invalid character 'x' looking for beginning of value".to_owned())]
        );
    }

    #[test]
    fn a_value_that_is_too_long_is_refused_before_it_is_complete() {
        let long = [b"\"".as_slice(), &[b'x'; 100]].concat();
        assert_eq!(split(&[&long]), [Err("grpc: received message larger than max (101 vs. 100)".to_owned())]);
    }

    proptest! {
        #[test]
        fn values_are_independent_of_how_the_body_is_split(cuts in prop::collection::vec(1_usize..9, 1..20)) {
            let body: &[u8] = b" {\"a\\n\xc3\xa9\":[1.5e3,true,null]} 7 \"x\"[]{}";
            let (mut rest, mut cuts, mut pieces) = (body, cuts.iter().cycle(), Vec::new());
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                pieces.push(piece);
                rest = behind;
            }
            prop_assert_eq!(split(&pieces), split(&[body]));
        }
    }
}
