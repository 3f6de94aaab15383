//! The file below the buckets: which meta page counts, and nodes loaded one at a time.

use crate::{
    error::{Place, ReadError},
    format::{DEFAULT_PAGE_SIZE, FIRST_PAGE, Meta, NO_FREELIST, PAGE_SIZES, PageHeader, kind, to_usize},
    node::{Bounds, Node},
    source::Source,
};

/// What reading a database may cost.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The most bytes that a cursor holds: the nodes from the root of its bucket to a leaf. A leaf is as large as its values are
    /// together, and bbolt puts up to four large ones into one leaf.
    pub max_held_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_held_bytes: 256 << 20 }
    }
}

/// A file with a valid meta page.
#[derive(Debug)]
pub struct PageFile<S> {
    source: S,
    meta: Meta,
    page_size: usize,
    options: Options,
}

impl<S: Source> PageFile<S> {
    pub fn open(source: S, options: Options) -> Result<Self, ReadError> {
        let size = source.size().map_err(|error| ReadError::Io { offset: 0, length: 0, error })?;
        let page = newest_meta(&source, size)?;
        let (number, meta) = page;
        let place = |offset| Place { page: number, offset: number * u64::from(meta.page_size) + offset };
        let file_pages = size / u64::from(meta.page_size);
        if meta.pages > file_pages {
            let problem =
                format!("{} pages are in use, but the file ends after {file_pages}: it is truncated", meta.pages);
            return Err(ReadError::damaged(place(56), problem));
        }
        if !(FIRST_PAGE..meta.pages).contains(&meta.root) {
            let problem = format!("the root is page {}, {}", meta.root, outside(meta.pages));
            return Err(ReadError::damaged(place(32), problem));
        }
        if meta.freelist != NO_FREELIST && !(FIRST_PAGE..meta.pages).contains(&meta.freelist) {
            let problem = format!("the freelist is page {}, {}", meta.freelist, outside(meta.pages));
            return Err(ReadError::damaged(place(48), problem));
        }
        Ok(Self { source, meta, page_size: to_usize(meta.page_size), options })
    }

    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    pub fn page_size(&self) -> usize {
        self.page_size
    }

    pub fn place(&self, page: u64) -> Place {
        Place { page, offset: page * self.page_size as u64 }
    }

    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), ReadError> {
        read(&self.source, buffer, offset)
    }

    /// The header of a page, which must say that it is of this page, and that its extent is in use.
    fn header(&self, page: u64, bytes: &[u8]) -> Result<PageHeader, ReadError> {
        let header = PageHeader::decode(bytes);
        if header.page != page {
            let problem = format!("the page says that it is page {}", header.page);
            return Err(ReadError::damaged(self.place(page), problem));
        }
        if u64::from(header.overflow) >= self.meta.pages - page {
            let problem = format!("it extends over {} further pages, {}", header.overflow, outside(self.meta.pages));
            return Err(ReadError::damaged(self.place(page), problem));
        }
        Ok(header)
    }

    /// A page number found in the file.
    pub fn expect_in_use(&self, page: u64, found_at: Place) -> Result<(), ReadError> {
        if (FIRST_PAGE..self.meta.pages).contains(&page) {
            return Ok(());
        }
        Err(ReadError::damaged(found_at, format!("it refers to page {page}, {}", outside(self.meta.pages))))
    }

    /// The header of a page that is in use.
    pub fn read_header(&self, page: u64) -> Result<PageHeader, ReadError> {
        let mut bytes = [0; PageHeader::SIZE];
        self.read(&mut bytes, self.place(page).offset)?;
        self.header(page, &bytes)
    }

    /// A branch or a leaf, and over how many pages it extends, for a cursor that holds `held` bytes already. The page must be in use.
    /// The buffer's contents do not matter.
    pub fn node(
        &self,
        page: u64,
        bounds: Bounds<'_>,
        held: usize,
        mut buffer: Vec<u8>,
    ) -> Result<(Node, u64), ReadError> {
        let place = self.place(page);
        buffer.resize(self.page_size, 0);
        self.read(&mut buffer, place.offset)?;
        let header = self.header(page, &buffer)?;
        if header.kind != kind::BRANCH && header.kind != kind::LEAF {
            return Err(ReadError::damaged(place, format!("kind {} instead of a branch or a leaf", header.kind)));
        }
        let pages = 1 + u64::from(header.overflow);
        let size = pages * self.page_size as u64;
        let limit = self.options.max_held_bytes;
        let Some(size) = usize::try_from(size).ok().filter(|size| *size <= limit.saturating_sub(held)) else {
            return Err(ReadError::NodeTooLarge { place, size, held, limit });
        };
        buffer.resize(size, 0);
        self.read(&mut buffer[self.page_size..], place.offset + self.page_size as u64)?;
        // Old versions took a page more for a node that fills its pages.
        Ok((Node::new(place, buffer, self.page_size, bounds)?, pages))
    }
}

fn outside(pages: u64) -> String {
    format!("outside of the pages in use, {FIRST_PAGE} to {}", pages.saturating_sub(1))
}

fn read(source: &impl Source, buffer: &mut [u8], offset: u64) -> Result<(), ReadError> {
    let length = buffer.len();
    source.read_exact_at(buffer, offset).map_err(|error| ReadError::Io { offset, length, error })
}

/// The meta page at this offset. `Err` says why it is invalid.
fn meta_at(source: &impl Source, size: u64, offset: u64) -> Result<Result<Meta, String>, ReadError> {
    if size.saturating_sub(offset) < Meta::SIZE as u64 {
        return Ok(Err(format!("no space in a file of {size} bytes")));
    }
    let mut bytes = [0; Meta::SIZE];
    read(source, &mut bytes, offset)?;
    Ok(Meta::decode(&bytes))
}

/// The valid meta page with the higher transaction number, as bbolt chooses it, and which of the two pages it is.
///
/// If the first one is invalid, it is not known where the second one is: it is looked for at all page sizes.
fn newest_meta(source: &impl Source, size: u64) -> Result<(u64, Meta), ReadError> {
    let first = meta_at(source, size, 0)?;
    let sizes = match &first {
        Ok(meta) => vec![to_usize(meta.page_size)],
        Err(_) => std::iter::successors(Some(*PAGE_SIZES.start()), |size| Some(size * 2))
            .take_while(|size| PAGE_SIZES.contains(size))
            .collect(),
    };
    let mut second = Err(String::new());
    for page_size in sizes {
        let found = meta_at(source, size, page_size as u64)?.and_then(|meta| {
            let is_consistent = to_usize(meta.page_size) == page_size;
            is_consistent.then_some(meta).ok_or_else(|| format!("page size {} at offset {page_size}", meta.page_size))
        });
        // The reason that is given if none is valid is the one for the most common size.
        if found.is_ok() || page_size == DEFAULT_PAGE_SIZE || second.as_ref().is_err_and(String::is_empty) {
            second = found;
        }
        if second.is_ok() {
            break;
        }
    }
    match (first, second) {
        (Ok(first), Ok(second)) if second.transaction > first.transaction => Ok((1, second)),
        (Ok(first), _) => Ok((0, first)),
        (Err(_), Ok(second)) => Ok((1, second)),
        (Err(page_0), Err(page_1)) => Err(ReadError::NotADatabase { page_0, page_1 }),
    }
}
