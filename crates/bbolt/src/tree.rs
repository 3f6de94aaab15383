//! A bucket's tree, built from left to right: when a page is full, and what its parent learns of it.
//!
//! The same code measures and writes. It decides by lengths alone; bytes are copied where there are any.

use crate::{
    error::WriteError,
    format::{ELEMENT_SIZE, MAX_ELEMENTS, PageHeader, kind},
};

/// A leaf of several pages is no larger than this, unless it has only one entry.
const MAX_SHARED_SIZE: usize = 64 << 10;
/// A leaf of several pages has no more entries than this: bbolt would split it when it changes it.
const MAX_SHARED_ENTRIES: usize = 4;

/// A key or a value: its length and, unless a file is only measured, its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    pub length: usize,
    pub bytes: &'a [u8],
}

impl<'a> Piece<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { length: bytes.len(), bytes }
    }

    pub fn of_length(length: usize) -> Self {
        Self { length, bytes: &[] }
    }
}

/// An element of a node that is built.
#[derive(Debug, Clone, Copy)]
pub struct Element {
    pub key_length: usize,
    pub value_length: usize,
    /// Of a leaf the flags, of a branch the child.
    pub link: u64,
}

impl Element {
    fn size(&self) -> usize {
        ELEMENT_SIZE + self.key_length + self.value_length
    }
}

/// A node that is built.
#[derive(Debug)]
pub struct NodeBuilder {
    elements: Vec<Element>,
    /// Keys and values, unless a file is only measured.
    data: Vec<u8>,
    size: usize,
}

impl NodeBuilder {
    fn new() -> Self {
        Self { elements: Vec::new(), data: Vec::new(), size: PageHeader::SIZE }
    }

    fn push(&mut self, key: Piece<'_>, value: Piece<'_>, link: u64) {
        let element = Element { key_length: key.length, value_length: value.length, link };
        self.size += element.size();
        self.elements.push(element);
        self.data.extend_from_slice(key.bytes);
        self.data.extend_from_slice(value.bytes);
    }

    fn clear(&mut self) {
        self.elements.clear();
        self.data.clear();
        self.size = PageHeader::SIZE;
    }

    /// Removes the first elements and returns them.
    fn take_first(&mut self, count: usize) -> Self {
        let rest = self.elements.split_off(count);
        let elements = std::mem::replace(&mut self.elements, rest);
        let length = elements.iter().map(|element| element.key_length + element.value_length).sum();
        let rest = self.data.split_off(self.data.len().min(length));
        let data = std::mem::replace(&mut self.data, rest);
        let size = elements.iter().map(Element::size).sum::<usize>() + PageHeader::SIZE;
        self.size -= size - PageHeader::SIZE;
        Self { elements, data, size }
    }

    fn first_key(&self) -> Piece<'_> {
        let length = self.elements[0].key_length;
        Piece { length, bytes: self.data.get(..length).unwrap_or_default() }
    }

    fn write(&self, kind: u16, out: &mut impl Output) -> Result<u64, WriteError> {
        out.node(&FinishedNode { kind, size: self.size, elements: &self.elements, data: [&self.data, &[]] })
    }
}

/// A finished node.
#[derive(Debug)]
pub struct FinishedNode<'a> {
    pub kind: u16,
    /// Bytes with the header and the table.
    pub size: usize,
    pub elements: &'a [Element],
    /// Keys and values, in two parts.
    pub data: [&'a [u8]; 2],
}

impl FinishedNode<'_> {
    /// Appends the header, the table, and the first part of the data.
    pub fn append_to(&self, page: u64, overflow: u32, out: &mut Vec<u8>) {
        let count = u16::try_from(self.elements.len()).expect("at most MAX_ELEMENTS");
        PageHeader { page, kind: self.kind, count, overflow }.append_to(out);
        let short = |length: usize| u32::try_from(length).expect("the lengths are limited").to_le_bytes();
        // From an element to its data.
        let mut position = ELEMENT_SIZE * self.elements.len();
        for element in self.elements {
            if self.kind == kind::LEAF {
                let flags = u32::try_from(element.link).expect("the flags have 32 bits");
                out.extend_from_slice(&flags.to_le_bytes());
                out.extend_from_slice(&short(position));
                out.extend_from_slice(&short(element.key_length));
                out.extend_from_slice(&short(element.value_length));
            } else {
                out.extend_from_slice(&short(position));
                out.extend_from_slice(&short(element.key_length));
                out.extend_from_slice(&element.link.to_le_bytes());
            }
            position = position + element.key_length + element.value_length - ELEMENT_SIZE;
        }
        out.extend_from_slice(self.data[0]);
    }
}

/// Where finished nodes go.
pub trait Output {
    fn page_size(&self) -> usize;

    /// The pages so far.
    fn pages(&self) -> u64;

    /// Takes a node, and returns its page.
    fn node(&mut self, node: &FinishedNode<'_>) -> Result<u64, WriteError>;
}

/// The tree of one bucket: the leaf that is being filled, and above it a branch for each level.
#[derive(Debug)]
pub struct Tree {
    leaf: NodeBuilder,
    branches: Vec<Branch>,
}

impl Tree {
    pub fn new() -> Self {
        Self { leaf: NodeBuilder::new(), branches: Vec::new() }
    }

    /// Adds an entry behind all others.
    pub fn push(
        &mut self,
        key: Piece<'_>,
        value: Piece<'_>,
        flags: u32,
        out: &mut impl Output,
    ) -> Result<(), WriteError> {
        let element = Element { key_length: key.length, value_length: value.length, link: u64::from(flags) };
        if !self.leaf.elements.is_empty() && !self.leaf_has_space(element.size(), out.page_size()) {
            self.write_leaf(out)?;
        }
        let size = PageHeader::SIZE + element.size();
        if self.leaf.elements.is_empty() && size > MAX_SHARED_SIZE.max(out.page_size()) {
            // No other entry joins it: it is written without a copy.
            let data = [key.bytes, value.bytes];
            let page = out.node(&FinishedNode { kind: kind::LEAF, size, elements: &[element], data })?;
            return add_child(&mut self.branches, 0, key, page, out);
        }
        self.leaf.push(key, value, element.link);
        Ok(())
    }

    fn leaf_has_space(&self, more: usize, page_size: usize) -> bool {
        let (count, now, then) = (self.leaf.elements.len(), self.leaf.size, self.leaf.size + more);
        if then < page_size {
            return count < MAX_ELEMENTS;
        }
        // Entries share pages if that fills the pages better.
        let fills_better = then * now.div_ceil(page_size) > now * then.div_ceil(page_size);
        count < MAX_SHARED_ENTRIES && then <= MAX_SHARED_SIZE && fills_better
    }

    fn write_leaf(&mut self, out: &mut impl Output) -> Result<(), WriteError> {
        let page = self.leaf.write(kind::LEAF, out)?;
        add_child(&mut self.branches, 0, self.leaf.first_key(), page, out)?;
        self.leaf.clear();
        Ok(())
    }

    /// The only node, if bbolt would make the bucket inline.
    pub fn inline(&self, page_size: usize) -> Option<FinishedNode<'_>> {
        let NodeBuilder { elements, data, size } = &self.leaf;
        let is_small =
            self.branches.is_empty() && *size <= page_size / 4 && elements.iter().all(|element| element.link == 0);
        is_small.then_some(FinishedNode { kind: kind::LEAF, size: *size, elements, data: [data, &[]] })
    }

    /// Writes what is left. The root's page.
    pub fn finish(mut self, out: &mut impl Output) -> Result<u64, WriteError> {
        if self.branches.is_empty() {
            return self.leaf.write(kind::LEAF, out);
        }
        if !self.leaf.elements.is_empty() {
            self.write_leaf(out)?;
        }
        let mut level = 0;
        loop {
            if let [only] = self.branches[level].node.elements[..] {
                return Ok(only.link);
            }
            for node in self.branches[level].take_rest().into_iter().flatten() {
                let page = node.write(kind::BRANCH, out)?;
                add_child(&mut self.branches, level + 1, node.first_key(), page, out)?;
            }
            level += 1;
        }
    }
}

/// A branch that is being filled.
///
/// INVARIANT: once the level has a page, at least two elements are here. So no page of it will have less than two.
#[derive(Debug)]
struct Branch {
    node: NodeBuilder,
    /// How many elements fill a page; zero while there is space for more.
    full: usize,
}

impl Branch {
    /// Adds a child. The elements that fill a page, once two others are there for the next page.
    fn push(&mut self, key: Piece<'_>, child: u64, page_size: usize) -> Option<NodeBuilder> {
        self.node.push(key, Piece::of_length(0), child);
        let count = self.node.elements.len();
        if self.full == 0 && count > 2 && (self.node.size >= page_size || count > MAX_ELEMENTS) {
            self.full = count - 1;
        }
        if self.full == 0 || count < self.full + 2 {
            return None;
        }
        Some(self.node.take_first(std::mem::take(&mut self.full)))
    }

    /// All elements that are here, in one page or two.
    fn take_rest(&mut self) -> [Option<NodeBuilder>; 2] {
        let first = match self.full {
            // Nothing is full; or there are three large keys, which stay together in a node of several pages.
            0..3 => None,
            full => Some(self.node.take_first(full - 1)),
        };
        [first, Some(std::mem::replace(&mut self.node, NodeBuilder::new()))]
    }
}

/// Adds a child to the branch of a level, and that branch to the next level if it is full.
fn add_child(
    branches: &mut Vec<Branch>,
    level: usize,
    key: Piece<'_>,
    page: u64,
    out: &mut impl Output,
) -> Result<(), WriteError> {
    if branches.len() == level {
        branches.push(Branch { node: NodeBuilder::new(), full: 0 });
    }
    let Some(full) = branches[level].push(key, page, out.page_size()) else { return Ok(()) };
    let page = full.write(kind::BRANCH, out)?;
    add_child(branches, level + 1, full.first_key(), page, out)
}
