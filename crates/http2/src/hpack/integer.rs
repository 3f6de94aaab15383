//! Integers with a prefix (RFC 7541 §5.1): what does not fit into the low bits of the first byte follows in groups of seven bits.

/// An integer that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// No valid index, length or size is larger.
const LIMIT: usize = u32::MAX as usize;

/// Decodes an integer with a prefix of `prefix` bits from the front of `input`.
pub fn decode(input: &mut &[u8], prefix: u32) -> Result<usize, Malformed> {
    let mask = (1_usize << prefix) - 1;
    let (first, mut rest) = input.split_first().ok_or(Malformed)?;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (byte, behind) = rest.split_first().ok_or(Malformed)?;
            rest = behind;
            // Five more bytes hold every allowed value; a longer encoding is not legitimate.
            if shift > 28 {
                return Err(Malformed);
            }
            value += usize::from(byte & 0x7f) << shift;
            if value > LIMIT {
                return Err(Malformed);
            }
            if byte & 0x80 == 0 {
                break;
            }
            shift += 7;
        }
    }
    *input = rest;
    Ok(value)
}

/// Encodes an integer with a prefix of `prefix` bits; the other bits of the first byte are those of `flags`.
pub fn encode(value: usize, prefix: u32, flags: u8, out: &mut Vec<u8>) {
    let mask = (1_usize << prefix) - 1;
    if value < mask {
        return out.push(flags | low(value));
    }
    out.push(flags | low(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(low(rest & 0x7f) | 0x80);
        rest >>= 7;
    }
    out.push(low(rest));
}

fn low(value: usize) -> u8 {
    u8::try_from(value).expect("the caller has masked it")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 7541, appendix C.1.
    #[test]
    fn the_examples_of_the_rfc() {
        for (value, prefix, bytes) in [(10, 5, &[0x0a][..]), (1337, 5, &[0x1f, 0x9a, 0x0a]), (42, 8, &[0x2a])] {
            let mut out = Vec::new();
            encode(value, prefix, 0, &mut out);
            assert_eq!(out, bytes);
            assert_eq!(decode(&mut &*out, prefix), Ok(value));
        }
    }

    #[test]
    fn truncated_and_overlong_integers_are_refused() {
        assert_eq!(decode(&mut &[][..], 7), Err(Malformed));
        assert_eq!(decode(&mut &[0x7f][..], 7), Err(Malformed));
        assert_eq!(decode(&mut &[0x7f, 0x80][..], 7), Err(Malformed));
        assert_eq!(decode(&mut &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01][..], 7), Err(Malformed));
        assert_eq!(decode(&mut &[0x7f, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00][..], 7), Err(Malformed));
    }

    proptest! {
        #[test]
        fn integers_can_be_encoded_and_decoded(value in 0_usize..=u32::MAX as usize, prefix in 1_u32..=8, tail: Vec<u8>) {
            let mut out = Vec::new();
            encode(value, prefix, 0, &mut out);
            out.extend(&tail);
            let mut input = &*out;
            prop_assert_eq!(decode(&mut input, prefix), Ok(value));
            prop_assert_eq!(input, &*tail);
        }
    }
}
