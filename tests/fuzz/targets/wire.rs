//! Generates frames and header blocks from decisions: mostly well-formed ones, so that the code behind the parsers is reached.

use http2::{
    frame::{self, flag, kind, setting},
    hpack::{huffman, table::STATIC},
};

use super::input::Input;

/// Names that the server or the `h2` crate treats specially, and some that neither does.
const NAMES: [&str; 20] = [
    ":method",
    ":scheme",
    ":path",
    ":authority",
    ":status",
    ":protocol",
    "te",
    "connection",
    "content-type",
    "content-length",
    "grpc-timeout",
    "grpc-encoding",
    "grpc-status",
    "token",
    "hasleader",
    "x",
    "x-long-unknown-header",
    "Upper",
    "",
    "cookie",
];
const VALUES: [&str; 18] = [
    "",
    "GET",
    "POST",
    "CONNECT",
    "http",
    "/",
    "/t/Echo",
    "/t/Chat",
    "*",
    "a.b:1",
    "trailers",
    "application/grpc",
    "gzip",
    "0",
    "7",
    "1S",
    " edge",
    "a\u{e4}\n",
];
/// The paths of the test service, and one that it does not know.
const PATHS: [&str; 6] = ["/t/Echo", "/t/Later", "/t/Refuse", "/t/Chat", "/t/Pour", "/page"];

/// Appends an HPACK integer with a prefix of `prefix` bits.
pub fn integer(value: usize, prefix: u32, flags: u8, out: &mut Vec<u8>) {
    let mask = (1_usize << prefix) - 1;
    let low = |value: usize| u8::try_from(value & 0x7f).expect("seven bits");
    if value < mask {
        return out.push(flags | low(value));
    }
    out.push(flags | low(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(low(rest) | 0x80);
        rest >>= 7;
    }
    out.push(low(rest));
}

fn string(text: &[u8], is_huffman: bool, out: &mut Vec<u8>) {
    if is_huffman {
        integer(huffman::encoded_len(text), 7, 0x80, out);
        huffman::encode(text, out);
    } else {
        integer(text.len(), 7, 0, out);
        out.extend_from_slice(text);
    }
}

/// Appends a header block: fields, table size updates and arbitrary bytes.
pub fn block(input: &mut Input, out: &mut Vec<u8>) {
    for _ in 0..input.below(12) {
        match input.below(9) {
            0 => out.extend_from_slice(input.piece()),
            1 => integer(usize::from(input.byte()), 7, 0x80, out),
            2 => request(input, out),
            3 => integer(usize::from(input.short() & 0x1fff), 5, 0x20, out),
            4 => {
                integer(1 + input.below(STATIC.len() + 8), 6, 0x40, out);
                text(input, &VALUES, out);
            }
            5 => {
                let flags = input.pick(&[0, 0x10]);
                integer(1 + input.below(STATIC.len() + 8), 4, flags, out);
                text(input, &VALUES, out);
            }
            6 => {
                out.push(input.pick(&[0, 0x10, 0x40]));
                text(input, &NAMES, out);
                text(input, &VALUES, out);
            }
            7 => {
                // A string with arbitrary bytes as its Huffman code.
                out.push(input.pick(&[0, 0x40]));
                string(b"packed", true, out);
                let code = input.piece();
                integer(code.len(), 7, 0x80, out);
                out.extend_from_slice(code);
            }
            _ => {
                out.push(0x40);
                string(b"large", false, out);
                string(&vec![input.byte(); usize::from(input.short() & 0xfff)], false, out);
            }
        }
    }
}

fn text(input: &mut Input, known: &[&str], out: &mut Vec<u8>) {
    let is_huffman = input.byte() & 1 != 0;
    if input.below(4) == 0 {
        string(input.piece(), is_huffman, out);
    } else {
        string(input.pick(known).as_bytes(), is_huffman, out);
    }
}

/// Appends the fields that every request starts with.
pub fn request(input: &mut Input, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0x83, 0x86]); // POST, http.
    integer(4, 4, 0, out);
    string(input.pick(&PATHS).as_bytes(), false, out);
    integer(1, 4, 0, out);
    string(b"a.b:1", false, out);
    integer(31, 4, 0, out);
    string(b"application/grpc", true, out);
}

fn numbers(input: &mut Input) -> u32 {
    match input.below(4) {
        0 => input.long(),
        1 => u32::from(input.short()),
        2 => u32::from(input.byte()),
        _ => input.pick(&[0, 1, 16_384, 65_535, 1 << 20, (1 << 31) - 1]),
    }
}

/// A stream ID near the open ones: mostly the newest, sometimes a new one.
fn stream(input: &mut Input, newest: &mut u32) -> u32 {
    match input.below(8) {
        0 => input.long(),
        1 => input.byte().into(),
        2..=4 => *newest,
        5 => newest.saturating_sub(2),
        _ => {
            *newest = newest.wrapping_add(2) & 0x7fff_ffff | 1;
            *newest
        }
    }
}

fn push(kind: u8, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    let payload = &payload[..payload.len().min(frame::MAX_PAYLOAD)];
    frame::write_head(out, payload.len(), kind, flags, stream);
    out.extend_from_slice(payload);
}

fn settings(input: &mut Input) -> Vec<u8> {
    let mut payload = Vec::new();
    for _ in 0..input.below(4) {
        let all = [
            setting::HEADER_TABLE_SIZE,
            setting::INITIAL_WINDOW_SIZE,
            setting::MAX_FRAME_SIZE,
            setting::ENABLE_PUSH,
            setting::MAX_HEADER_LIST_SIZE,
            9,
        ];
        payload.extend_from_slice(&input.pick(&all).to_be_bytes());
        payload.extend_from_slice(&numbers(input).to_be_bytes());
    }
    payload
}

/// Appends one frame, or arbitrary bytes. `newest` is the stream that was opened last.
pub fn frame(input: &mut Input, newest: &mut u32, out: &mut Vec<u8>) {
    match input.below(14) {
        0 | 1 => {
            let mut payload = Vec::new();
            request(input, &mut payload);
            let flags = flag::END_HEADERS | input.byte() & flag::END_STREAM;
            *newest = newest.wrapping_add(2) & 0x7fff_ffff | 1;
            push(kind::HEADERS, flags, *newest, &payload, out);
        }
        2 => {
            let mut payload = Vec::new();
            block(input, &mut payload);
            let kind = input.pick(&[kind::HEADERS, kind::CONTINUATION]);
            let flags = input.byte();
            push(kind, flags, stream(input, newest), &payload, out);
        }
        3 | 4 => {
            // A gRPC message, complete or with a wrong length.
            let message = input.piece();
            let length = if input.below(8) == 0 { numbers(input) } else { u32::try_from(message.len()).unwrap_or(0) };
            let payload = [&[input.byte() & input.byte() & 1][..], &length.to_be_bytes(), message].concat();
            let flags = input.byte() & flag::END_STREAM;
            push(kind::DATA, flags, stream(input, newest), &payload, out);
        }
        5 => {
            let payload = vec![input.byte(); usize::from(input.short() & 0x3fff)];
            let flags = input.pick(&[0, flag::PADDED, flag::END_STREAM]);
            push(kind::DATA, flags, stream(input, newest), &payload, out);
        }
        6 => push(kind::RST_STREAM, 0, stream(input, newest), &numbers(input).to_be_bytes(), out),
        7 => {
            let flags = if input.below(8) == 0 { flag::ACK } else { 0 };
            push(kind::SETTINGS, flags, 0, &settings(input), out);
        }
        8 => push(kind::PING, input.byte() & flag::ACK, 0, b"leaving.", out),
        9 => {
            let stream = if input.byte() & 1 == 0 { 0 } else { stream(input, newest) };
            push(kind::WINDOW_UPDATE, 0, stream, &numbers(input).to_be_bytes(), out);
        }
        10 => push(kind::GOAWAY, 0, 0, &[0; 8], out),
        11 => push(kind::PRIORITY, 0, stream(input, newest), &[0, 0, 0, input.byte(), 1], out),
        12 => {
            let (kind, flags) = (input.byte() % 11, input.byte());
            let stream = if input.byte() & 1 == 0 { 0 } else { stream(input, newest) };
            push(kind, flags, stream, input.piece(), out);
        }
        _ => out.extend_from_slice(input.piece()),
    }
}
