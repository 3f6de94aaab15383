//! Sets of page numbers.

use std::collections::BTreeMap;

/// Pages of one chunk: its first page is its number times this.
const CHUNK_PAGES: u64 = 4096;
const CHUNK_WORDS: usize = 64;

/// A set of pages, in memory that follows the pages in the set and not the numbers that a damaged file may contain.
#[derive(Debug, Default)]
pub struct PageSet {
    chunks: BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>,
    count: u64,
}

impl PageSet {
    /// Adds a page. False if it was there before.
    pub fn insert(&mut self, page: u64) -> bool {
        let (word, bit) = position(page);
        let word = &mut self.chunks.entry(page / CHUNK_PAGES).or_insert_with(|| Box::new([0; CHUNK_WORDS]))[word];
        let is_new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(is_new);
        is_new
    }

    pub fn contains(&self, page: u64) -> bool {
        let (word, bit) = position(page);
        self.chunks.get(&(page / CHUNK_PAGES)).is_some_and(|chunk| chunk[word] & bit != 0)
    }

    pub fn count(&self) -> u64 {
        self.count
    }
}

/// The word of the chunk that a page belongs to, and its bit there.
fn position(page: u64) -> (usize, u64) {
    let within = page % CHUNK_PAGES;
    (usize::try_from(within / 64).expect("less than CHUNK_WORDS"), 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_inserted_once() {
        let mut set = PageSet::default();
        let pages = [0, 1, 63, 64, 4095, 4096, u64::MAX];
        assert!(pages.iter().all(|page| set.insert(*page)));
        assert!(pages.iter().all(|page| set.contains(*page) && !set.insert(*page)));
        assert!([2, 65, 8192].iter().all(|page| !set.contains(*page)));
        assert_eq!(set.count(), 7);
    }
}
