//! Entries of a bucket, in order.

use crate::{
    error::{Place, ReadError},
    file::PageFile,
    format::{BUCKET_HEADER_SIZE, MAX_DEPTH, PageHeader, kind, u64_at},
    node::{Bounds, Node},
    source::Source,
};

/// An entry of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    pub key: &'a [u8],
    pub value: Value<'a>,
}

/// What belongs to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    Bytes(&'a [u8]),
    /// A nested bucket: [`Bucket::bucket`](crate::Bucket::bucket) opens it by its name, which is the key.
    Bucket,
}

/// A position in a bucket, before an entry or at the end.
#[derive(Debug)]
pub struct Cursor<'a, S> {
    walk: Walk<'a, S, PageBudget>,
}

impl<'a, S: Source> Cursor<'a, S> {
    pub(crate) fn new(file: &'a PageFile<S>, root: Root) -> Self {
        Self { walk: Walk::new(file, root, PageBudget { pages_left: file.meta().pages }) }
    }

    /// The entry behind the position, which moves past it. `None` at the end, and after an error.
    pub fn next_entry(&mut self) -> Result<Option<Entry<'_>>, ReadError> {
        let Some((node, index)) = self.walk.next_element()? else { return Ok(None) };
        let value = if node.is_bucket(index) { Value::Bucket } else { Value::Bytes(node.value(index).0) };
        Ok(Some(Entry { key: node.key(index), value }))
    }

    /// Moves before the first entry whose key is not less than this one.
    pub fn seek(&mut self, key: &[u8]) -> Result<(), ReadError> {
        self.walk.visitor.pages_left = self.walk.file.meta().pages;
        self.walk.seek(key)
    }

    /// The bucket behind the position, if its name is this one; the position moves past it.
    pub(crate) fn next_root(&mut self, name: &[u8]) -> Result<Option<BucketHeader>, ReadError> {
        let Some((node, index)) = self.walk.next_element()? else { return Ok(None) };
        if node.key(index) != name || !node.is_bucket(index) {
            return Ok(None);
        }
        BucketHeader::decode(node, index).map(Some)
    }
}

/// Where a bucket's tree begins.
#[derive(Debug, Clone)]
pub enum Root {
    Page {
        page: u64,
        found_at: Place,
    },
    /// An inline bucket, whose only node is part of the value.
    Inline(Node),
}

/// The value of an entry that is a bucket.
#[derive(Debug)]
pub struct BucketHeader {
    pub root: Root,
    pub sequence: u64,
}

impl BucketHeader {
    /// Reads the value of an element that is a bucket.
    pub fn decode(node: &Node, index: usize) -> Result<Self, ReadError> {
        let (value, place) = node.value(index);
        if value.len() < BUCKET_HEADER_SIZE {
            return Err(node.damaged_element(index, "the value is too short for a bucket"));
        }
        let (header, inline) = value.split_at(BUCKET_HEADER_SIZE);
        let (page, sequence) = (u64_at(header, 0), u64_at(header, 8));
        if page != 0 {
            return Ok(Self { root: Root::Page { page, found_at: place }, sequence });
        }
        let is_leaf = inline.len() >= PageHeader::SIZE && {
            let header = PageHeader::decode(inline);
            (header.page, header.kind, header.overflow) == (0, kind::LEAF, 0)
        };
        if !is_leaf {
            return Err(node.damaged_element(index, "an inline bucket without a page"));
        }
        let place = Place { offset: place.offset + BUCKET_HEADER_SIZE as u64, ..place };
        let inline = Node::new(place, inline.to_vec(), 0, Bounds::default())?;
        if let Some(nested) = (0..inline.count()).find(|nested| inline.is_bucket(*nested)) {
            return Err(inline.damaged_element(nested, "a bucket inside an inline bucket"));
        }
        Ok(Self { root: Root::Inline(inline), sequence })
    }
}

/// Is told of all nodes that are loaded, and may refuse them.
pub trait Visitor {
    fn loaded(&mut self, node: &Node, pages: u64) -> Result<(), ReadError>;
}

/// How many pages may still be loaded. A pass over a tree loads each page of it once, so more pages than the file has are a sign that
/// pages overlap or form a circle.
#[derive(Debug)]
struct PageBudget {
    pages_left: u64,
}

impl Visitor for PageBudget {
    fn loaded(&mut self, node: &Node, pages: u64) -> Result<(), ReadError> {
        let left = self.pages_left.checked_sub(pages);
        self.pages_left = left.ok_or_else(|| {
            ReadError::damaged(node.place(), "the bucket has more pages than the file: pages overlap or form a circle")
        })?;
        Ok(())
    }
}

/// The nodes from the root to a leaf, and a position in each.
///
/// INVARIANT: there is none, or the last one is a leaf, and each other one is the parent of the next.
#[derive(Debug)]
pub struct Walk<'a, S, V> {
    file: &'a PageFile<S>,
    root: Root,
    frames: Vec<Frame>,
    has_begun: bool,
    /// The buffer of a node that is no longer needed.
    spare: Vec<u8>,
    pub visitor: V,
}

#[derive(Debug)]
struct Frame {
    node: Node,
    /// Of a leaf the element that comes next, of a branch the one whose child is the next frame.
    index: usize,
}

impl<'a, S: Source, V: Visitor> Walk<'a, S, V> {
    pub fn new(file: &'a PageFile<S>, root: Root, visitor: V) -> Self {
        Self { file, root, frames: Vec::new(), has_begun: false, spare: Vec::new(), visitor }
    }

    /// The next element, and the leaf that holds it.
    pub fn next_element(&mut self) -> Result<Option<(&Node, usize)>, ReadError> {
        if !self.has_begun {
            self.seek(&[])?;
        }
        loop {
            let Some(leaf) = self.frames.last() else { return Ok(None) };
            if leaf.index < leaf.node.count() {
                break;
            }
            self.end_on_error(Self::next_leaf)?;
        }
        let leaf = self.frames.last_mut().expect("there is a leaf");
        leaf.index += 1;
        Ok(Some((&leaf.node, leaf.index - 1)))
    }

    /// Moves before the first element whose key is not less. Nodes that lie on the way to the old position are not loaded again.
    pub fn seek(&mut self, key: &[u8]) -> Result<(), ReadError> {
        self.has_begun = true;
        self.end_on_error(|walk| walk.descend(key))
    }

    fn end_on_error(&mut self, step: impl FnOnce(&mut Self) -> Result<(), ReadError>) -> Result<(), ReadError> {
        step(self).inspect_err(|_| self.frames.clear())
    }

    fn descend(&mut self, key: &[u8]) -> Result<(), ReadError> {
        if self.frames.is_empty() {
            self.push_root()?;
        }
        let mut level = 0;
        while !self.frames[level].node.is_leaf() {
            let frame = &mut self.frames[level];
            let index = frame.node.child_for(key);
            let is_loaded = frame.index == index;
            frame.index = index;
            level += 1;
            if !is_loaded || level == self.frames.len() {
                self.truncate(level);
                self.push_child()?;
            }
        }
        let leaf = &mut self.frames[level];
        leaf.index = leaf.node.lower_bound(key);
        Ok(())
    }

    /// From the end of a leaf to the beginning of the next one. Without a next one no frame is left.
    fn next_leaf(&mut self) -> Result<(), ReadError> {
        while let Some(level) = self.frames.len().checked_sub(2) {
            self.truncate(level + 1);
            let parent = &mut self.frames[level];
            if parent.index + 1 < parent.node.count() {
                parent.index += 1;
                while self.frames.last().is_some_and(|frame| !frame.node.is_leaf()) {
                    self.push_child()?;
                }
                return Ok(());
            }
        }
        self.truncate(0);
        Ok(())
    }

    fn push_root(&mut self) -> Result<(), ReadError> {
        let node = match &self.root {
            Root::Inline(node) => node.clone(),
            &Root::Page { page, found_at } => {
                self.file.expect_in_use(page, found_at)?;
                let (node, pages) = self.file.node(page, Bounds::default(), 0, Vec::new())?;
                self.visitor.loaded(&node, pages)?;
                node
            }
        };
        if node.count() == 0 && !node.is_leaf() {
            return Err(ReadError::damaged(node.place(), "a branch without children"));
        }
        self.frames.push(Frame { node, index: 0 });
        Ok(())
    }

    /// Loads the child to which the last frame points.
    fn push_child(&mut self) -> Result<(), ReadError> {
        let buffer = std::mem::take(&mut self.spare);
        let parent = self.frames.last().expect("a child has a parent");
        let page = parent.node.child(parent.index);
        let found_at = parent.node.element_place(parent.index);
        self.file.expect_in_use(page, found_at)?;
        if self.frames.len() == MAX_DEPTH {
            return Err(ReadError::damaged(found_at, format!("the tree has more than {MAX_DEPTH} levels")));
        }
        // The next key of the nearest ancestor that has one.
        let next_keys = self.frames.iter().rev().filter(|frame| frame.index + 1 < frame.node.count());
        let to = next_keys.map(|frame| frame.node.key(frame.index + 1)).next();
        let bounds = Bounds { from: Some(parent.node.key(parent.index)), to };
        let held = self.frames.iter().map(|frame| frame.node.size()).sum();
        let (node, pages) = self.file.node(page, bounds, held, buffer)?;
        if node.count() == 0 {
            return Err(ReadError::damaged(
                node.place(),
                "a page without elements, which is not the root of its bucket",
            ));
        }
        self.visitor.loaded(&node, pages)?;
        self.frames.push(Frame { node, index: 0 });
        Ok(())
    }

    /// Drops the frames from this level on.
    fn truncate(&mut self, level: usize) {
        if let Some(last) = self.frames.drain(level..).next_back() {
            self.spare = last.node.into_bytes();
        }
    }
}
