//! The check of a whole file: what bbolt's own check demands, and what this reader demands of each node.

use std::mem;

use crate::{
    cursor::{BucketHeader, Root, Visitor, Walk},
    error::{Place, ReadError},
    file::PageFile,
    format::{FIRST_PAGE, LONG_FREELIST, MAX_DEPTH, NO_FREELIST, PageHeader, kind, u64_at},
    node::Node,
    page_set::PageSet,
    source::Source,
};

/// How much of the freelist is read at a time.
const FREELIST_CHUNK: usize = 64 << 10;

/// What a file contains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Below the root bucket.
    pub buckets: u64,
    pub inline_buckets: u64,
    /// Keys that are not buckets.
    pub entries: u64,
    pub branch_pages: u64,
    pub leaf_pages: u64,
    /// Pages that branches and leaves extend over.
    pub overflow_pages: u64,
    /// In use by nothing.
    pub free_pages: u64,
}

/// The pages that were reached so far.
#[derive(Debug, Default)]
struct ReachedPages {
    used: PageSet,
    free: PageSet,
    report: Report,
}

impl ReachedPages {
    /// Marks a node's pages as used.
    fn mark(&mut self, place: Place, pages: u64) -> Result<(), ReadError> {
        for page in place.page..place.page + pages {
            if !self.used.insert(page) {
                return Err(ReadError::damaged(place, format!("page {page} is used twice")));
            }
            if self.free.contains(page) {
                return Err(ReadError::damaged(place, format!("page {page} is used, but in the freelist")));
            }
        }
        Ok(())
    }
}

impl Visitor for ReachedPages {
    fn loaded(&mut self, node: &Node, pages: u64) -> Result<(), ReadError> {
        self.mark(node.place(), pages)?;
        let count = if node.is_leaf() { &mut self.report.leaf_pages } else { &mut self.report.branch_pages };
        *count += 1;
        self.report.overflow_pages += pages - 1;
        Ok(())
    }
}

/// A bucket whose tree has yet to be checked.
struct Pending {
    root: Root,
    depth: usize,
}

/// Checks everything that the newest meta page refers to.
pub fn check<S: Source>(file: &PageFile<S>) -> Result<Report, ReadError> {
    let mut reached = ReachedPages::default();
    for page in 0..FIRST_PAGE {
        reached.used.insert(page);
        let header = file.read_header(page)?;
        if header.kind != kind::META {
            return Err(ReadError::damaged(file.place(page), format!("kind {} instead of a meta page", header.kind)));
        }
    }
    let has_freelist = file.meta().freelist != NO_FREELIST;
    if has_freelist {
        read_freelist(file, &mut reached)?;
    }
    let root = Root::Page { page: file.meta().root, found_at: file.place(0) };
    // Each of them has a page of its own, or none, or the check fails: there are never more than pages.
    let mut pending = vec![Pending { root, depth: 0 }];
    while let Some(bucket) = pending.pop() {
        reached = check_bucket(file, bucket, reached, &mut pending)?;
    }
    let unused = file.meta().pages - reached.used.count();
    if has_freelist && unused != reached.free.count() {
        let lost =
            (FIRST_PAGE..file.meta().pages).find(|page| !reached.used.contains(*page) && !reached.free.contains(*page));
        let lost = lost.expect("a page is used, free or neither");
        return Err(ReadError::damaged(file.place(lost), "the page is neither used nor in the freelist"));
    }
    reached.report.free_pages = unused;
    Ok(reached.report)
}

/// Checks a bucket's tree. Inline buckets in it are checked with it, others are added to `pending`.
fn check_bucket<S: Source>(
    file: &PageFile<S>,
    bucket: Pending,
    reached: ReachedPages,
    pending: &mut Vec<Pending>,
) -> Result<ReachedPages, ReadError> {
    let mut walk = Walk::new(file, bucket.root, reached);
    // The walk borrows the reached while it hands out an element.
    let mut counted = Report::default();
    while let Some((node, index)) = walk.next_element()? {
        if !node.is_bucket(index) {
            if bucket.depth == 0 {
                return Err(node.damaged_element(index, "the root bucket holds an entry that is no bucket"));
            }
            counted.entries += 1;
            continue;
        }
        if bucket.depth == MAX_DEPTH {
            return Err(node.damaged_element(index, &format!("more than {MAX_DEPTH} buckets inside each other")));
        }
        counted.buckets += 1;
        match BucketHeader::decode(node, index)?.root {
            Root::Inline(inline) => {
                counted.inline_buckets += 1;
                counted.entries += inline.count() as u64;
            }
            root @ Root::Page { .. } => pending.push(Pending { root, depth: bucket.depth + 1 }),
        }
        if pending.len() as u64 > file.meta().pages {
            return Err(node.damaged_element(index, "more buckets than pages"));
        }
    }
    let mut reached = mem::take(&mut walk.visitor);
    reached.report.buckets += counted.buckets;
    reached.report.inline_buckets += counted.inline_buckets;
    reached.report.entries += counted.entries;
    Ok(reached)
}

/// Reads the freelist into the set of free pages.
fn read_freelist<S: Source>(file: &PageFile<S>, reached: &mut ReachedPages) -> Result<(), ReadError> {
    let page = file.meta().freelist;
    let (place, header) = (file.place(page), file.read_header(page)?);
    if header.kind != kind::FREELIST {
        return Err(ReadError::damaged(place, format!("kind {} instead of a freelist", header.kind)));
    }
    let mut offset = place.offset + PageHeader::SIZE as u64;
    let mut count = u64::from(header.count);
    if header.count == LONG_FREELIST {
        let mut first = [0; 8];
        file.read(&mut first, offset)?;
        count = u64_at(&first, 0);
        offset += 8;
    }
    let pages = 1 + u64::from(header.overflow);
    let end = place.offset + pages * file.page_size() as u64;
    let needed = count.checked_mul(8).and_then(|bytes| offset.checked_add(bytes));
    let Some(needed) = needed.filter(|needed| *needed <= end) else {
        return Err(ReadError::damaged(place, format!("a freelist of {count} pages does not fit into {pages} pages")));
    };
    // bbolt reserves space before it takes these very pages out of the list: a little more than is needed.
    if (pages / 2).saturating_sub(1) * file.page_size() as u64 > needed - place.offset {
        return Err(ReadError::damaged(place, format!("a freelist of {count} pages extends over {pages} pages")));
    }
    let (mut buffer, mut previous) = (vec![0; FREELIST_CHUNK], FIRST_PAGE - 1);
    while offset < needed {
        let chunk = usize::try_from(needed - offset).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        file.read(&mut buffer[..chunk], offset)?;
        for at in (0..chunk).step_by(8) {
            let free = u64_at(&buffer, at);
            if free <= previous || free >= file.meta().pages {
                let place = Place { page, offset: offset + at as u64 };
                return Err(ReadError::damaged(
                    place,
                    format!("the freelist has page {free} after {previous}, of {} pages", file.meta().pages),
                ));
            }
            reached.free.insert(free);
            previous = free;
        }
        offset += chunk as u64;
    }
    reached.mark(place, pages)
}
