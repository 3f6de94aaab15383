//! A database that is read.

use crate::{
    check::{self, Report},
    cursor::{Cursor, Root, Value},
    error::ReadError,
    file::{Options, PageFile},
    format::MAX_DEPTH,
    source::Source,
};

/// A database. It must not change while it is read.
#[derive(Debug)]
pub struct Database<S> {
    file: PageFile<S>,
}

impl<S: Source> Database<S> {
    /// Opens a database: reads the meta pages.
    pub fn open(source: S) -> Result<Self, ReadError> {
        Self::open_with(source, Options::default())
    }

    pub fn open_with(source: S, options: Options) -> Result<Self, ReadError> {
        Ok(Self { file: PageFile::open(source, options)? })
    }

    /// The bucket that holds all others.
    pub fn root(&self) -> Bucket<'_, S> {
        let meta = self.file.meta();
        let root = Root::Page { page: meta.root, found_at: self.file.place(0) };
        Bucket { file: &self.file, root, sequence: meta.sequence, depth: 0 }
    }

    /// A bucket of the root bucket.
    pub fn bucket(&self, name: &[u8]) -> Result<Option<Bucket<'_, S>>, ReadError> {
        self.root().bucket(name)
    }

    /// Reads and checks everything. It takes one bit of memory for each page that is used or free. The error is the first problem that
    /// was found. Whether a value is what was written cannot be known: the format has no checksums for it.
    pub fn check(&self) -> Result<Report, ReadError> {
        check::check(&self.file)
    }

    pub fn page_size(&self) -> usize {
        self.file.page_size()
    }

    /// The number of pages in use or free: the file has at least so many.
    pub fn pages(&self) -> u64 {
        self.file.meta().pages
    }

    /// The number of the transaction that wrote it last.
    pub fn transaction(&self) -> u64 {
        self.file.meta().transaction
    }
}

/// A bucket of a database.
#[derive(Debug)]
pub struct Bucket<'a, S> {
    file: &'a PageFile<S>,
    root: Root,
    sequence: u64,
    /// How many buckets it is inside of.
    depth: usize,
}

impl<'a, S: Source> Bucket<'a, S> {
    /// A position before the first entry.
    pub fn cursor(&self) -> Cursor<'a, S> {
        Cursor::new(self.file, self.root.clone())
    }

    /// The value of a key, unless it is a bucket.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        let mut cursor = self.cursor();
        cursor.seek(key)?;
        let entry = cursor.next_entry()?.filter(|entry| entry.key == key);
        Ok(entry.and_then(|entry| match entry.value {
            Value::Bytes(value) => Some(value.to_vec()),
            Value::Bucket => None,
        }))
    }

    /// A bucket inside this one.
    pub fn bucket(&self, name: &[u8]) -> Result<Option<Bucket<'a, S>>, ReadError> {
        let mut cursor = self.cursor();
        cursor.seek(name)?;
        let Some(header) = cursor.next_root(name)? else { return Ok(None) };
        let depth = self.depth + 1;
        if depth > MAX_DEPTH {
            let place = match header.root {
                Root::Page { found_at, .. } => found_at,
                Root::Inline(node) => node.place(),
            };
            return Err(ReadError::damaged(place, format!("more than {MAX_DEPTH} buckets inside each other")));
        }
        Ok(Some(Bucket { file: self.file, root: header.root, sequence: header.sequence, depth }))
    }

    /// A number that users of bbolt may count up.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}
