//! Frames: the result does not depend on how bytes are split, each frame takes exactly the bytes that its header announces, and
//! nothing panics.

use bytes::Bytes;
use http2::{
    fault::Fault,
    frame::{self, Frame, HEAD_BYTES, MAX_PAYLOAD},
};

use super::{
    input::{Input, Splitter},
    wire,
};

/// Decisions: the seed of the splits, then whether the rest is used as bytes or generates frames.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let seed = input.short();
    let mut bytes = Vec::new();
    if input.byte() & 1 == 0 {
        bytes.extend_from_slice(input.0);
    } else {
        let mut newest = 1;
        while !input.is_empty() && bytes.len() < 1 << 18 {
            wire::frame(&mut input, &mut newest, &mut bytes);
        }
    }
    let whole = read_whole(&bytes);
    check_sizes(&bytes, &whole);
    assert_eq!(whole, read_split(&bytes, Splitter::new(seed)), "splits make no difference");
}

/// Frames in order. A stream error is an element like any other; a connection error is the last one.
type Frames = Vec<Result<Frame, Fault>>;

/// Takes all complete frames. False after a connection error.
fn take_all(input: &mut Bytes, frames: &mut Frames) -> bool {
    loop {
        match frame::take(input).transpose() {
            None => return true,
            Some(Err(fault)) if fault.stream == 0 => {
                frames.push(Err(fault));
                return false;
            }
            Some(frame) => frames.push(frame),
        }
    }
}

fn read_whole(bytes: &[u8]) -> Frames {
    let mut frames = Vec::new();
    take_all(&mut Bytes::copy_from_slice(bytes), &mut frames);
    frames
}

fn read_split(mut bytes: &[u8], mut splitter: Splitter) -> Frames {
    let (mut frames, mut pending) = (Vec::new(), Bytes::new());
    while !bytes.is_empty() {
        pending = [&pending[..], splitter.next(&mut bytes)].concat().into();
        if !take_all(&mut pending, &mut frames) {
            break;
        }
    }
    frames
}

/// Checks that the frame headers alone determine where frames begin and end.
fn check_sizes(mut bytes: &[u8], frames: &Frames) {
    for frame in frames {
        let [a, b, c, ..] = *bytes.first_chunk::<HEAD_BYTES>().expect("a frame has a header");
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if length > MAX_PAYLOAD {
            return assert!(frame.is_err(), "a frame that is too large was taken");
        }
        let payload = &bytes[HEAD_BYTES..HEAD_BYTES + length];
        match frame {
            Ok(Frame::Data { data, counted, .. }) => {
                assert_eq!(*counted, length);
                assert!(data.is_empty() || payload.windows(data.len()).any(|part| part == data));
            }
            Ok(Frame::Headers { block, .. } | Frame::Continuation { block, .. }) => assert!(block.len() <= length),
            Ok(Frame::Settings { pairs }) => assert_eq!(pairs, payload),
            Ok(_) | Err(_) => (),
        }
        bytes = &bytes[HEAD_BYTES + length..];
    }
}

/// One frame of each type as bytes, and decisions that generate many frames.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut bytes = vec![0, 9, 0];
    for kind in 0..10 {
        let payload = [0, 0, 0, 7, 0, 0, 0, 1];
        let length = [8, 8, 5, 4, 6, 4, 8, 8, 4, 8][usize::from(kind)];
        let stream = u32::from(!matches!(kind, 4 | 6 | 7));
        if kind != frame::kind::PUSH_PROMISE {
            frame::write_head(&mut bytes, length, kind, 0, stream);
            bytes.extend_from_slice(&payload[..length]);
        }
    }
    let decisions = (0..=255_u8).map(|byte| byte.wrapping_mul(37)).collect::<Vec<_>>();
    vec![bytes, [&[1, 7, 1][..], &decisions].concat()]
}
