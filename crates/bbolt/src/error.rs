//! What can be wrong with a file, or with what is to be written.

use std::{error, fmt, io};

use crate::format::{MAX_DEPTH, MAX_KEY_LENGTH, MAX_VALUE_LENGTH};

/// Where something is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The page that the place belongs to.
    pub page: u64,
    /// The place itself, from the beginning of the file.
    pub offset: u64,
}

/// Why a file cannot be read.
#[derive(Debug)]
pub enum ReadError {
    /// The system refused to read this many bytes at this offset.
    Io { offset: u64, length: usize, error: io::Error },
    /// The file is not one of this format, or neither meta page survived.
    NotADatabase { page_0: String, page_1: String },
    /// The file contradicts itself.
    Damaged { place: Place, problem: String },
    /// With this node a cursor would hold more than [`Options::max_held_bytes`](crate::Options) allows.
    NodeTooLarge { place: Place, size: u64, held: usize, limit: usize },
}

impl ReadError {
    pub(crate) fn damaged(place: Place, problem: impl Into<String>) -> Self {
        Self::Damaged { place, problem: problem.into() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} (offset {})", self.page, self.offset)
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { offset, length, error } => write!(f, "cannot read {length} bytes at offset {offset}: {error}"),
            Self::NotADatabase { page_0, page_1 } => {
                write!(f, "not a bbolt database: the first meta page has {page_0}, the second one {page_1}")
            }
            Self::Damaged { place, problem } => write!(f, "damaged database: {place}: {problem}"),
            Self::NodeTooLarge { place, size, held, limit } => {
                write!(f, "{place}: a node of {size} bytes, beside {held} of its parents: the limit is {limit}")
            }
        }
    }
}

impl error::Error for ReadError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Self::Io { error, .. } => Some(error),
            Self::NotADatabase { .. } | Self::Damaged { .. } | Self::NodeTooLarge { .. } => None,
        }
    }
}

/// Why something cannot be written.
#[derive(Debug)]
pub enum WriteError {
    /// The output failed, now or before.
    Io(io::Error),
    /// No power of two from 1 KiB to 16 MiB.
    PageSize(usize),
    /// A key, or the name of a bucket, without bytes.
    KeyRequired,
    /// A key, or the name of a bucket, of so many bytes.
    KeyTooLong(usize),
    /// A value of so many bytes.
    ValueTooLong(usize),
    /// A key, or the name of a bucket, that is not greater than the one before it.
    KeyOrder { key: Vec<u8>, previous: Vec<u8> },
    /// An entry outside of any bucket, or the end of a bucket that was not begun.
    NoBucket,
    /// Too many buckets inside each other.
    Nesting,
    /// The end, with so many buckets that were not ended.
    OpenBuckets(usize),
    /// What is written is not what was measured, which came to so many pages.
    LayoutDiffers { pages: u64 },
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "cannot write the database: {error}"),
            Self::PageSize(size) => write!(f, "page size {size}: it must be a power of two from 1 KiB to 16 MiB"),
            Self::KeyRequired => write!(f, "a key or the name of a bucket is empty"),
            Self::KeyTooLong(length) => {
                write!(f, "a key or the name of a bucket has {length} bytes, the limit is {MAX_KEY_LENGTH}")
            }
            Self::ValueTooLong(length) => write!(f, "a value has {length} bytes, the limit is {MAX_VALUE_LENGTH}"),
            Self::KeyOrder { key, previous } => {
                write!(f, "key \"{}\" comes after \"{}\"", key.escape_ascii(), previous.escape_ascii())
            }
            Self::NoBucket => write!(f, "no bucket is open"),
            Self::Nesting => write!(f, "more than {MAX_DEPTH} buckets inside each other"),
            Self::OpenBuckets(count) => write!(f, "{count} buckets are still open"),
            Self::LayoutDiffers { pages } => {
                write!(f, "the data is not what was measured and came to {pages} pages")
            }
        }
    }
}

impl error::Error for WriteError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        if let Self::Io(error) = self { Some(error) } else { None }
    }
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
