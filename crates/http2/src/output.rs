//! The bytes that a connection still has to write, in order: small ones copied into one buffer, large payloads attached without a
//! copy.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

/// Payloads of at least this size are not copied.
const LARGE_BYTES: usize = 4 << 10;
/// An idle connection keeps no buffer larger than this.
const KEPT_BYTES: usize = 4 << 10;
/// The largest initial capacity of a new buffer.
const RESERVED_BYTES: usize = 64 << 10;

/// A position in the tail buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    buffer: u64,
    offset: usize,
}

#[derive(Default)]
pub struct Output {
    sealed: VecDeque<Bytes>,
    tail: Vec<u8>,
    /// How many bytes of the tail are written.
    tail_sent: usize,
    /// Incremented whenever the tail starts anew.
    buffer: u64,
    len: usize,
    /// How many bytes the previous tail held.
    last_tail_bytes: usize,
}

impl Output {
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy of the bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.tail.capacity() == 0 {
            self.tail.reserve(self.last_tail_bytes.clamp(256, RESERVED_BYTES));
        }
        self.tail.extend_from_slice(bytes);
        self.len += bytes.len();
    }

    /// The position of the next copied bytes.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark { buffer: self.buffer, offset: self.tail.len() }
    }

    /// The copied bytes from `mark` on, if none of them has been written or sealed yet.
    pub fn since(&mut self, mark: Mark) -> Option<&mut [u8]> {
        let is_here = mark.buffer == self.buffer && self.tail_sent <= mark.offset;
        if is_here { self.tail.get_mut(mark.offset..) } else { None }
    }

    /// Appends a payload. A large one is not copied.
    pub fn attach(&mut self, payload: Bytes) {
        if payload.len() < LARGE_BYTES {
            return self.push(&payload);
        }
        self.len += payload.len();
        self.seal();
        self.sealed.push_back(payload);
    }

    fn seal(&mut self) {
        if self.tail_sent < self.tail.len() {
            let mut tail = Bytes::from(std::mem::take(&mut self.tail));
            tail.advance(self.tail_sent);
            self.sealed.push_back(tail);
        }
        self.begin_tail();
    }

    fn begin_tail(&mut self) {
        self.tail.clear();
        self.tail_sent = 0;
        self.buffer += 1;
    }

    /// Fills `slices` from the front; returns how many there are.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let tail = (self.tail_sent < self.tail.len()).then(|| &self.tail[self.tail_sent..]);
        let pieces = self.sealed.iter().map(|sealed| &sealed[..]).chain(tail);
        slices.iter_mut().zip(pieces).map(|(slice, piece)| *slice = IoSlice::new(piece)).count()
    }

    /// Removes bytes that were written.
    pub fn advance(&mut self, mut written: usize) {
        self.len -= written;
        while let Some(first) = self.sealed.front_mut() {
            if written < first.len() {
                return first.advance(written);
            }
            written -= first.len();
            self.sealed.pop_front();
        }
        self.tail_sent += written;
        if self.tail_sent == self.tail.len() {
            self.last_tail_bytes = self.tail.len();
            self.begin_tail();
            if self.tail.capacity() > KEPT_BYTES {
                self.tail = Vec::new();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_are_written_in_order(
            pieces in prop::collection::vec((0_usize..10_000, any::<bool>()), 0..20),
            steps in prop::collection::vec(1_usize..9000, 1..20),
        ) {
            let (mut output, mut expected, mut written) = (Output::default(), Vec::new(), Vec::new());
            let mut steps = steps.iter().cycle();
            for (nth, &(len, is_payload)) in pieces.iter().enumerate() {
                let piece = vec![u8::try_from(nth).unwrap(); len];
                expected.extend_from_slice(&piece);
                if is_payload { output.attach(piece.into()) } else { output.push(&piece) }
                write(&mut output, *steps.next().unwrap(), &mut written);
            }
            while !output.is_empty() {
                write(&mut output, *steps.next().unwrap(), &mut written);
            }
            prop_assert_eq!(written, expected);
        }
    }

    fn write(output: &mut Output, limit: usize, written: &mut Vec<u8>) {
        let mut slices = [IoSlice::new(&[]); 4];
        let count = output.slices(&mut slices);
        let all: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
        let taken = all.len().min(limit);
        written.extend_from_slice(&all[..taken]);
        output.advance(taken);
    }
}
