//! Read buffers that may still be referenced.
//!
//! A message that arrived in one piece is handed on as a slice of its read buffer, without a copy. A call that has to wait may
//! thus keep a whole buffer alive for a few bytes. Such buffers are counted here, also without a copy: a buffer that only this
//! list still references is not in use any more.

use std::collections::VecDeque;

use bytes::Bytes;

/// Smaller reads are covered by the flat amount that each stream is counted for.
const SMALL_BYTES: usize = 1 << 10;
/// How many reads are checked per turn.
const MAX_CHECKS: usize = 64;

#[derive(Debug, Default)]
pub struct Reads {
    reads: VecDeque<Bytes>,
    bytes: usize,
}

impl Reads {
    /// Adds a read, if a part of it is still referenced.
    pub fn add(&mut self, read: Bytes) {
        if read.len() > SMALL_BYTES && !read.is_unique() {
            self.bytes += read.len();
            self.reads.push_back(read);
        }
    }

    /// Drops reads that are not referenced any more. If there are many, only some of them are checked, in rotation.
    pub fn forget_unused(&mut self) {
        for _ in 0..self.reads.len().min(MAX_CHECKS) {
            let Some(read) = self.reads.pop_front() else { return };
            if read.is_unique() {
                self.bytes -= read.len();
            } else {
                self.reads.push_back(read);
            }
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The total size of the remembered reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_counts_while_a_part_of_it_is_referenced() {
        let mut reads = Reads::default();
        let mut read = Bytes::from(vec![b'x'; 2000]);
        reads.add(read.clone());
        let part = read.split_to(3);
        reads.add(Bytes::from(vec![b'x'; 2000]));
        let small = Bytes::from(vec![b'x'; 10]);
        reads.add(small.clone());
        drop(read);
        reads.forget_unused();
        assert_eq!(reads.bytes(), 2000);
        drop(part);
        reads.forget_unused();
        assert_eq!(reads.bytes(), 0);
    }

    #[test]
    fn many_reads_are_checked_a_few_at_a_time() {
        let mut reads = Reads::default();
        let parts: Vec<_> = (0..3 * MAX_CHECKS)
            .map(|_| {
                let read = Bytes::from(vec![b'x'; 2000]);
                reads.add(read.clone());
                read
            })
            .collect();
        reads.forget_unused();
        assert_eq!(reads.bytes(), 2000 * 3 * MAX_CHECKS);
        drop(parts);
        for left in [2, 1, 0] {
            reads.forget_unused();
            assert_eq!(reads.bytes(), 2000 * left * MAX_CHECKS);
        }
    }
}
