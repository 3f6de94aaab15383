//! A database that is written: bucket after bucket, in order of the keys.

use std::{
    io::{self, Write},
    mem,
};

use crate::{
    error::WriteError,
    format::{
        BUCKET_FLAG, BUCKET_HEADER_SIZE, DEFAULT_PAGE_SIZE, FIRST_PAGE, MAX_DEPTH, MAX_KEY_LENGTH, MAX_VALUE_LENGTH,
        Meta, PageHeader, is_page_size, kind,
    },
    tree::{FinishedNode, Output, Piece, Tree},
};

/// The freelist comes behind the meta pages.
const FREELIST: u64 = FIRST_PAGE;
/// The number of the transaction that the first meta page names; the second one names the one before it. bbolt's next one will be odd,
/// and overwrites the second one.
const TRANSACTION: u64 = 2;
/// Output is written in pieces of at least this size.
const CHUNK: usize = 64 << 10;

/// What has to be known before a database is written: the same data always comes to the same layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    page_size: usize,
    root: u64,
    pages: u64,
}

impl Layout {
    /// The size of the file in bytes.
    pub fn file_size(&self) -> u64 {
        self.pages * self.page_size as u64
    }

    /// The first two pages of the file.
    pub fn meta_pages(&self) -> Vec<u8> {
        let page_size = u32::try_from(self.page_size).expect("page sizes are small");
        let mut bytes = Vec::with_capacity(2 * self.page_size);
        for page in 0..FIRST_PAGE {
            let transaction = TRANSACTION - page;
            let meta =
                Meta { page_size, root: self.root, sequence: 0, freelist: FREELIST, pages: self.pages, transaction };
            meta.append_to(page, &mut bytes);
        }
        bytes
    }
}

/// The first pass: computes the layout of the database that [`Writer`] will write when it is called with keys and values of the same
/// lengths.
#[derive(Debug)]
pub struct Measure {
    builder: Builder<Counter>,
}

impl Measure {
    pub fn new() -> Self {
        Self::with_page_size(DEFAULT_PAGE_SIZE).expect("the default is allowed")
    }

    pub fn with_page_size(page_size: usize) -> Result<Self, WriteError> {
        let page_size = check_page_size(page_size)?;
        Ok(Self { builder: Builder::new(Counter { page_size, pages: FREELIST + 1 }) })
    }

    /// As [`Writer::begin_bucket`].
    pub fn begin_bucket(&mut self, name_length: usize) -> Result<(), WriteError> {
        self.builder.begin_bucket(Piece::of_length(name_length))
    }

    /// As [`Writer::put`].
    pub fn put(&mut self, key_length: usize, value_length: usize) -> Result<(), WriteError> {
        self.builder.put(Piece::of_length(key_length), Piece::of_length(value_length))
    }

    /// As [`Writer::end_bucket`].
    pub fn end_bucket(&mut self) -> Result<(), WriteError> {
        self.builder.end_bucket()
    }

    pub fn finish(self) -> Result<Layout, WriteError> {
        Ok(self.builder.finish()?.1)
    }
}

impl Default for Measure {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes a database from its beginning to its end. The output is called with large pieces and needs no buffer.
#[derive(Debug)]
pub struct Writer<W> {
    builder: Builder<Stream<W>>,
    /// The last key of each open bucket; the first one is the root bucket.
    last_keys: Vec<Vec<u8>>,
}

impl<W: Write> Writer<W> {
    /// A writer of the database that was measured.
    pub fn new(out: W, layout: Layout) -> Self {
        Self::begin(Stream::new(out, layout.page_size, Some(layout), layout.meta_pages()))
    }

    /// A writer without a first pass. It leaves two pages of zeros at the beginning, over which [`Layout::meta_pages`] of the layout that
    /// [`Self::finish`] returns must be written; until then the file is invalid.
    pub fn unmeasured(out: W, page_size: usize) -> Result<Self, WriteError> {
        let page_size = check_page_size(page_size)?;
        Ok(Self::begin(Stream::new(out, page_size, None, vec![0; 2 * page_size])))
    }

    fn begin(stream: Stream<W>) -> Self {
        Self { builder: Builder::new(stream), last_keys: vec![Vec::new()] }
    }

    /// Begins a bucket inside of the one that is open, or else of the root bucket. Its name is one of that bucket's keys.
    pub fn begin_bucket(&mut self, name: &[u8]) -> Result<(), WriteError> {
        self.check_order(name)?;
        self.builder.begin_bucket(Piece::new(name))?;
        self.set_last_key(name);
        self.last_keys.push(Vec::new());
        Ok(())
    }

    /// Adds an entry to the bucket that is open. Its key must be greater than the one before.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        self.check_order(key)?;
        self.builder.put(Piece::new(key), Piece::new(value))?;
        self.set_last_key(key);
        Ok(())
    }

    /// Ends the bucket that was begun last.
    pub fn end_bucket(&mut self) -> Result<(), WriteError> {
        self.builder.end_bucket()?;
        self.last_keys.pop();
        Ok(())
    }

    /// Writes what is left, and flushes the output. It fails if the data was not what was measured.
    pub fn finish(self) -> Result<(W, Layout), WriteError> {
        let (mut stream, layout) = self.builder.finish()?;
        if let Some(measured) = stream.measured.filter(|measured| *measured != layout) {
            return Err(WriteError::LayoutDiffers { pages: measured.pages });
        }
        stream.write_buffer()?;
        stream.out.flush()?;
        Ok((stream.out, layout))
    }

    fn check_order(&self, key: &[u8]) -> Result<(), WriteError> {
        // The first key is greater than the empty one, which is not allowed itself.
        let previous = self.last_keys.last().expect("the root bucket is open");
        if key > &previous[..] || key.is_empty() {
            return Ok(());
        }
        Err(WriteError::KeyOrder { key: key.to_vec(), previous: previous.clone() })
    }

    fn set_last_key(&mut self, key: &[u8]) {
        let last = self.last_keys.last_mut().expect("the root bucket is open");
        last.clear();
        last.extend_from_slice(key);
    }
}

fn check_page_size(page_size: usize) -> Result<usize, WriteError> {
    if is_page_size(page_size) { Ok(page_size) } else { Err(WriteError::PageSize(page_size)) }
}

/// The buckets that are open, whatever happens to their pages.
#[derive(Debug)]
struct Builder<O> {
    out: O,
    root: Tree,
    /// From the outside to the inside.
    open: Vec<OpenBucket>,
}

#[derive(Debug)]
struct OpenBucket {
    name: Vec<u8>,
    name_length: usize,
    tree: Tree,
}

impl<O: Output> Builder<O> {
    fn new(out: O) -> Self {
        Self { out, root: Tree::new(), open: Vec::new() }
    }

    fn begin_bucket(&mut self, name: Piece<'_>) -> Result<(), WriteError> {
        check_key(name)?;
        if self.open.len() == MAX_DEPTH {
            return Err(WriteError::Nesting);
        }
        self.open.push(OpenBucket { name: name.bytes.to_vec(), name_length: name.length, tree: Tree::new() });
        Ok(())
    }

    fn put(&mut self, key: Piece<'_>, value: Piece<'_>) -> Result<(), WriteError> {
        let bucket = self.open.last_mut().ok_or(WriteError::NoBucket)?;
        check_key(key)?;
        if value.length > MAX_VALUE_LENGTH {
            return Err(WriteError::ValueTooLong(value.length));
        }
        bucket.tree.push(key, value, 0, &mut self.out)
    }

    fn end_bucket(&mut self) -> Result<(), WriteError> {
        let OpenBucket { name, name_length, tree } = self.open.pop().ok_or(WriteError::NoBucket)?;
        let mut value = Vec::new();
        let mut length = BUCKET_HEADER_SIZE;
        // The root page, or none, and the sequence.
        if let Some(node) = tree.inline(self.out.page_size()) {
            value.extend_from_slice(&[0; BUCKET_HEADER_SIZE]);
            node.append_to(0, 0, &mut value);
            length += node.size;
        } else {
            value.extend_from_slice(&tree.finish(&mut self.out)?.to_le_bytes());
            value.extend_from_slice(&0_u64.to_le_bytes());
        }
        let parent = self.open.last_mut().map_or(&mut self.root, |bucket| &mut bucket.tree);
        let (name, value) = (Piece { length: name_length, bytes: &name }, Piece { length, bytes: &value });
        parent.push(name, value, BUCKET_FLAG, &mut self.out)
    }

    fn finish(mut self) -> Result<(O, Layout), WriteError> {
        if !self.open.is_empty() {
            return Err(WriteError::OpenBuckets(self.open.len()));
        }
        let root = self.root.finish(&mut self.out)?;
        let layout = Layout { page_size: self.out.page_size(), root, pages: self.out.pages() };
        Ok((self.out, layout))
    }
}

fn check_key(key: Piece<'_>) -> Result<(), WriteError> {
    match key.length {
        0 => Err(WriteError::KeyRequired),
        1..=MAX_KEY_LENGTH => Ok(()),
        _ => Err(WriteError::KeyTooLong(key.length)),
    }
}

/// Counts pages.
#[derive(Debug)]
struct Counter {
    page_size: usize,
    pages: u64,
}

impl Output for Counter {
    fn page_size(&self) -> usize {
        self.page_size
    }

    fn pages(&self) -> u64 {
        self.pages
    }

    fn node(&mut self, node: &FinishedNode<'_>) -> Result<u64, WriteError> {
        let page = self.pages;
        self.pages += node.size.div_ceil(self.page_size) as u64;
        Ok(page)
    }
}

/// Writes pages, in order.
#[derive(Debug)]
struct Stream<W> {
    out: W,
    page_size: usize,
    /// How many pages were written, or are in the buffer.
    pages: u64,
    buffer: Vec<u8>,
    measured: Option<Layout>,
    has_failed: bool,
}

impl<W: Write> Stream<W> {
    /// Begins with the meta pages and an empty freelist.
    fn new(out: W, page_size: usize, measured: Option<Layout>, mut buffer: Vec<u8>) -> Self {
        PageHeader { page: FREELIST, kind: kind::FREELIST, count: 0, overflow: 0 }.append_to(&mut buffer);
        buffer.resize(3 * page_size, 0);
        Self { out, page_size, pages: FREELIST + 1, buffer, measured, has_failed: false }
    }

    fn write_buffer(&mut self) -> Result<(), WriteError> {
        let mut buffer = mem::take(&mut self.buffer);
        self.write(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.has_failed {
            return Err(io::Error::other("an earlier write has failed").into());
        }
        self.has_failed = true;
        self.out.write_all(bytes)?;
        self.has_failed = false;
        Ok(())
    }
}

impl<W: Write> Output for Stream<W> {
    fn page_size(&self) -> usize {
        self.page_size
    }

    fn pages(&self) -> u64 {
        self.pages
    }

    fn node(&mut self, node: &FinishedNode<'_>) -> Result<u64, WriteError> {
        let (page, pages) = (self.pages, node.size.div_ceil(self.page_size) as u64);
        if let Some(measured) = self.measured.filter(|measured| page + pages > measured.pages) {
            return Err(WriteError::LayoutDiffers { pages: measured.pages });
        }
        let overflow = u32::try_from(pages - 1).expect("the lengths are limited");
        node.append_to(page, overflow, &mut self.buffer);
        let large = node.data[1];
        if !large.is_empty() {
            self.write_buffer()?;
            self.write(large)?;
        }
        let rest = node.size % self.page_size;
        if rest != 0 {
            self.buffer.resize(self.buffer.len() + self.page_size - rest, 0);
        }
        if self.buffer.len() >= CHUNK {
            self.write_buffer()?;
        }
        self.pages += pages;
        Ok(page)
    }
}
