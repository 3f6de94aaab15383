//! Reads of the socket of which something may still be in use.
//!
//! A message that came in one piece is handed on as a part of the read that it came in, without a copy. A call that has to
//! wait may so keep a whole read for a few bytes; that is seen here, and counted, without a copy either: a read that this
//! list alone still refers to is not in use any more.

use std::collections::VecDeque;

use bytes::Bytes;

/// The flat sum for a stream covers smaller reads.
const SMALL_BYTES: usize = 1 << 10;
/// So many reads are looked at in one turn.
const MAX_CHECKS: usize = 64;

/// The reads that may be in use.
#[derive(Debug, Default)]
pub struct Reads {
    reads: VecDeque<Bytes>,
    bytes: usize,
}

impl Reads {
    /// Adds a read, if something of it is in use.
    pub fn add(&mut self, read: Bytes) {
        if read.len() > SMALL_BYTES && !read.is_unique() {
            self.bytes += read.len();
            self.reads.push_back(read);
        }
    }

    /// Forgets those that are not in use any more. Of many it looks at some, in turn.
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

    /// Forgets all of them.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// How many bytes they have.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_counts_while_a_part_of_it_is_in_use() {
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
    fn of_many_reads_some_are_looked_at_in_turn() {
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
