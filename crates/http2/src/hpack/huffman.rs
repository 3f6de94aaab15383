//! Huffman coding of header strings (RFC 7541 §5.2 and appendix B).
//!
//! The code is canonical: sorted by length and then by symbol, codes are consecutive numbers. So the lengths determine the code,
//! and everything else is computed from them at compile time.
//!
//! Decoding looks up the next eight bits first: nearly every character in headers has a code that short. Longer codes are found
//! by comparing the next thirty bits with the first code of each length.

/// All bytes, and the end-of-string symbol. Only a prefix of the latter occurs, as padding.
const SYMBOLS: usize = 257;
const LONGEST: usize = 30;
/// Codes up to this length are looked up in a table.
const SHORT: usize = 8;

/// The length of each symbol's code, in bits.
#[rustfmt::skip]
const LENGTHS: [u8; SYMBOLS] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// A string that is not correctly encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// The code in the forms that encoding and decoding need.
struct Code {
    /// By symbol.
    codes: [u32; SYMBOLS],
    /// Symbols in the order of their codes.
    ordered: [u16; SYMBOLS],
    /// By length: the first code, and its place in `ordered`.
    first: [(u32, usize); LONGEST + 2],
    /// By the next eight bits: symbol and length, or length zero if the code is longer.
    short: [(u8, u8); 1 << SHORT],
}

static CODE: Code = compute();

const fn compute() -> Code {
    let mut all =
        Code { codes: [0; SYMBOLS], ordered: [0; SYMBOLS], first: [(0, 0); LONGEST + 2], short: [(0, 0); 1 << SHORT] };
    let (mut length, mut code, mut place) = (1, 0_u32, 0);
    while length <= LONGEST {
        all.first[length] = (code, place);
        let mut symbol = 0;
        while symbol < SYMBOLS {
            if LENGTHS[symbol] as usize == length {
                all.codes[symbol] = code;
                #[allow(clippy::cast_possible_truncation, reason = "there are 257 symbols")]
                {
                    all.ordered[place] = symbol as u16;
                }
                if length <= SHORT {
                    fill(&mut all.short, symbol, length, code);
                }
                code += 1;
                place += 1;
            }
            symbol += 1;
        }
        code <<= 1;
        length += 1;
    }
    all.first[LONGEST + 1] = (0, place);
    all
}

/// All bytes that begin with this code stand for its symbol.
#[allow(clippy::cast_possible_truncation, reason = "short codes are those of bytes, and at most eight bits long")]
const fn fill(short: &mut [(u8, u8); 1 << SHORT], symbol: usize, length: usize, code: u32) {
    let spare = SHORT - length;
    let mut tail = 0;
    while tail < 1 << spare {
        short[((code as usize) << spare) | tail] = (symbol as u8, length as u8);
        tail += 1;
    }
}

/// Decodes `encoded` onto the end of `out`.
pub fn decode(encoded: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let mut input = encoded.iter();
    // The bits not yet decoded are the lowest `count` ones.
    let (mut bits, mut count) = (0_u64, 0);
    loop {
        while count <= 56
            && let Some(byte) = input.next()
        {
            bits = bits << 8 | u64::from(*byte);
            count += 8;
        }
        if count == 0 {
            return Ok(());
        }
        // Past the end the window is filled with ones, like the padding.
        let window = if count >= LONGEST {
            bits >> (count - LONGEST)
        } else {
            bits << (LONGEST - count) | ((1 << (LONGEST - count)) - 1)
        };
        let window = u32::try_from(window & ((1 << LONGEST) - 1)).expect("thirty bits");
        let (symbol, length) = next(window);
        if length > count {
            return is_padding(bits, count).then_some(()).ok_or(Malformed);
        }
        out.push(u8::try_from(symbol).map_err(|_| Malformed)?);
        count -= length;
    }
}

/// Whether the remaining bits are padding: fewer than eight, all ones.
fn is_padding(bits: u64, count: usize) -> bool {
    let ones = (1 << count) - 1;
    count < 8 && bits & ones == ones
}

/// The symbol whose code the next thirty bits start with, and the length of that code.
fn next(window: u32) -> (usize, usize) {
    let (symbol, length) = CODE.short[(window >> (LONGEST - SHORT)) as usize];
    if length > 0 {
        return (usize::from(symbol), usize::from(length));
    }
    for length in SHORT + 1..=LONGEST {
        let code = window >> (LONGEST - length);
        let (first, place) = CODE.first[length];
        let offset = (code - first) as usize;
        if place + offset < CODE.first[length + 1].1 {
            return (usize::from(CODE.ordered[place + offset]), length);
        }
    }
    unreachable!("the code is complete: thirty bits begin with a symbol's code")
}

/// The length of `text` when it is encoded.
#[must_use]
pub fn encoded_len(text: &[u8]) -> usize {
    text.iter().map(|&byte| usize::from(LENGTHS[usize::from(byte)])).sum::<usize>().div_ceil(8)
}

/// Appends the encoding of `text` to `out`.
pub fn encode(text: &[u8], out: &mut Vec<u8>) {
    let (mut bits, mut count) = (0_u64, 0);
    for &byte in text {
        let length = LENGTHS[usize::from(byte)];
        bits = bits << length | u64::from(CODE.codes[usize::from(byte)]);
        count += u32::from(length);
        while count >= 8 {
            count -= 8;
            out.push((bits >> count & 0xff) as u8);
        }
    }
    if count > 0 {
        let padding = 8 - count;
        out.push(((bits << padding | ((1 << padding) - 1)) & 0xff) as u8);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(text, &mut out);
        assert_eq!(out.len(), encoded_len(text));
        out
    }

    fn decoded(bytes: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut out = Vec::new();
        decode(bytes, &mut out).map(|()| out)
    }

    /// The examples of RFC 7541, appendix C.4 and C.6.
    #[test]
    fn the_examples_of_the_rfc() {
        let examples: [(&str, &[u8]); 6] = [
            ("www.example.com", &[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff]),
            ("no-cache", &[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]),
            ("custom-key", &[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f]),
            ("custom-value", &[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf]),
            ("302", &[0x64, 0x02]),
            ("private", &[0xae, 0xc3, 0x77, 0x1a, 0x4b]),
        ];
        for (text, bytes) in examples {
            assert_eq!(encoded(text.as_bytes()), bytes);
            assert_eq!(decoded(bytes).as_deref(), Ok(text.as_bytes()));
        }
    }

    #[test]
    fn every_byte_can_be_encoded_and_decoded() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decoded(&encoded(&all)), Ok(all));
    }

    #[test]
    fn the_end_symbol_and_wrong_padding_are_refused() {
        assert_eq!(CODE.codes[SYMBOLS - 1], 0x3fff_ffff);
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xff]), Err(Malformed), "the end symbol, whole");
        assert_eq!(decoded(&[0xff]), Err(Malformed), "eight bits of padding");
        assert_eq!(decoded(&[0b0001_1000]), Err(Malformed), "padding with zeros");
        assert_eq!(decoded(&[0b0001_1111]), Ok(b"a".to_vec()));
        assert_eq!(decoded(&[]), Ok(vec![]));
    }

    proptest! {
        #[test]
        fn encoding_and_decoding_is_the_identity(text: Vec<u8>) {
            prop_assert_eq!(decoded(&encoded(&text)), Ok(text));
        }

        /// The encoding is unique: whatever decodes, encodes to the same bytes.
        #[test]
        fn only_encoded_strings_can_be_decoded(bytes: Vec<u8>) {
            if let Ok(text) = decoded(&bytes) {
                prop_assert_eq!(encoded(&text), bytes);
            }
        }
    }
}
