//! A branch or a leaf that has been read, and found to be in order.

use std::cmp::Ordering;

use crate::{
    error::{Place, ReadError},
    format::{BUCKET_FLAG, ELEMENT_SIZE, PageHeader, kind, to_usize, u32_at, u64_at},
};

/// The keys that a node may hold, as its parent says: from the first one, and less than the second one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bounds<'a> {
    pub from: Option<&'a [u8]>,
    pub to: Option<&'a [u8]>,
}

/// INVARIANT: keys and values follow the table without gaps, and all are within the bytes; keys are not empty, ascend strictly, and
/// are within the bounds. (bbolt leaves no gaps. So a wrong count or length is noticed, but for the last lengths.)
#[derive(Debug, Clone)]
pub struct Node {
    place: Place,
    bytes: Vec<u8>,
    is_leaf: bool,
    count: usize,
}

impl Node {
    /// `bytes` are the node with its header, which must be there and say that this is a branch or a leaf. At most `unused` of them are
    /// not used.
    pub fn new(place: Place, bytes: Vec<u8>, unused: usize, bounds: Bounds<'_>) -> Result<Self, ReadError> {
        let header = PageHeader::decode(&bytes);
        let node = Self { place, bytes, is_leaf: header.kind == kind::LEAF, count: usize::from(header.count) };
        node.validate(bounds, unused as u64)?;
        Ok(node)
    }

    fn validate(&self, bounds: Bounds<'_>, unused: u64) -> Result<(), ReadError> {
        let size = self.bytes.len() as u64;
        let table_end = element_at(self.count);
        if table_end as u64 > size {
            return Err(self.damaged(0, format!("{} elements do not fit into {size} bytes", self.count)));
        }
        // Where the data of the elements before this one ends.
        let mut end = table_end as u64;
        for index in 0..self.count {
            let at = element_at(index);
            let (position, key_length, value_length) = if self.is_leaf {
                (u32_at(&self.bytes, at + 4), u32_at(&self.bytes, at + 8), u32_at(&self.bytes, at + 12))
            } else {
                (u32_at(&self.bytes, at), u32_at(&self.bytes, at + 4), 0)
            };
            let start = at as u64 + u64::from(position);
            if start != end {
                let problem = format!("element {index}: its data begins at byte {start} of the node instead of {end}");
                return Err(self.damaged(at, problem));
            }
            end = start + u64::from(key_length) + u64::from(value_length);
            if end > size {
                let problem = format!("element {index}: its data ends at byte {end}, but the node has {size} bytes");
                return Err(self.damaged(at, problem));
            }
            if key_length == 0 {
                return Err(self.damaged(at, format!("element {index}: an empty key")));
            }
            let flags = if self.is_leaf { u32_at(&self.bytes, at) } else { 0 };
            if flags & !BUCKET_FLAG != 0 {
                return Err(self.damaged(at, format!("element {index}: unknown flags {flags:#x}")));
            }
            if index > 0 && self.key(index - 1) >= self.key(index) {
                return Err(self.damaged(at, format!("element {index}: its key is not greater than the one before")));
            }
        }
        if size - end > unused {
            return Err(self.damaged(0, format!("its data ends at byte {end}, but the node has {size} bytes")));
        }
        let Some(last) = self.count.checked_sub(1) else { return Ok(()) };
        if bounds.from.is_some_and(|from| self.key(0) < from) {
            return Err(self.damaged(element_at(0), "the first key is less than the parent's key for this page"));
        }
        if bounds.to.is_some_and(|to| self.key(last) >= to) {
            return Err(
                self.damaged(element_at(last), "the last key is not less than the parent's key for the next page")
            );
        }
        Ok(())
    }

    /// An error about the byte at `at` of this node.
    fn damaged(&self, at: usize, problem: impl Into<String>) -> ReadError {
        ReadError::damaged(self.place_of(at), problem)
    }

    /// An error about an element.
    pub fn damaged_element(&self, index: usize, problem: &str) -> ReadError {
        self.damaged(element_at(index), format!("element {index}: {problem}"))
    }

    fn place_of(&self, at: usize) -> Place {
        Place { offset: self.place.offset + at as u64, ..self.place }
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub fn element_place(&self, index: usize) -> Place {
        self.place_of(element_at(index))
    }

    /// How many bytes it takes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_leaf(&self) -> bool {
        self.is_leaf
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// The bytes of the node, for another one.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub fn key(&self, index: usize) -> &[u8] {
        let (start, key_end, _) = self.extent(index);
        &self.bytes[start..key_end]
    }

    /// The value of a leaf's element, and where it is.
    pub fn value(&self, index: usize) -> (&[u8], Place) {
        let (_, key_end, end) = self.extent(index);
        (&self.bytes[key_end..end], self.place_of(key_end))
    }

    /// Whether the value of a leaf's element is a bucket.
    pub fn is_bucket(&self, index: usize) -> bool {
        u32_at(&self.bytes, element_at(index)) & BUCKET_FLAG != 0
    }

    /// The page below a branch's element.
    pub fn child(&self, index: usize) -> u64 {
        u64_at(&self.bytes, element_at(index) + 8)
    }

    /// The first element whose key is not less.
    pub fn lower_bound(&self, key: &[u8]) -> usize {
        self.partition_point(|ordering| ordering == Ordering::Less, key)
    }

    /// The branch's element below which the key would be.
    pub fn child_for(&self, key: &[u8]) -> usize {
        self.partition_point(|ordering| ordering != Ordering::Greater, key).saturating_sub(1)
    }

    /// How many elements come first, by how their keys compare to this one.
    fn partition_point(&self, comes_first: impl Fn(Ordering) -> bool, key: &[u8]) -> usize {
        let (mut from, mut to) = (0, self.count);
        while from < to {
            let middle = from.midpoint(to);
            if comes_first(self.key(middle).cmp(key)) { from = middle + 1 } else { to = middle }
        }
        from
    }

    /// Where the key begins, where it ends, and where the value ends.
    fn extent(&self, index: usize) -> (usize, usize, usize) {
        let at = element_at(index);
        let fields = if self.is_leaf { at + 4 } else { at };
        let start = at + to_usize(u32_at(&self.bytes, fields));
        let key_end = start + to_usize(u32_at(&self.bytes, fields + 4));
        let value_length = if self.is_leaf { to_usize(u32_at(&self.bytes, fields + 8)) } else { 0 };
        (start, key_end, key_end + value_length)
    }
}

fn element_at(index: usize) -> usize {
    PageHeader::SIZE + ELEMENT_SIZE * index
}
