//! The bytes of page headers and meta pages, and the limits of the format.

/// The page size that bbolt chooses on most machines.
pub const DEFAULT_PAGE_SIZE: usize = 4096;
/// The page sizes at which bbolt looks for the second meta page if the first one is invalid.
pub const PAGE_SIZES: std::ops::RangeInclusive<usize> = 1024..=16 << 20;
/// The longest key that bbolt accepts.
pub const MAX_KEY_LENGTH: usize = 32768;
/// The longest value that bbolt accepts.
pub const MAX_VALUE_LENGTH: usize = (1 << 31) - 2;
/// The most elements that a node has: bbolt does not write one with a count of 65535.
pub const MAX_ELEMENTS: usize = 0xfffe;
/// The most levels of a tree, and the most buckets inside each other, that are read or written. (Two children per branch make more
/// pages than fit on any disk.)
pub const MAX_DEPTH: usize = 64;

/// Pages before this one are meta pages.
pub const FIRST_PAGE: u64 = 2;
/// The page number that means: the freelist is not stored.
pub const NO_FREELIST: u64 = u64::MAX;
/// The count that means: the first element of the freelist is the count.
pub const LONG_FREELIST: u16 = 0xffff;

/// The flag of leaf elements whose value is a bucket.
pub const BUCKET_FLAG: u32 = 1;
/// Bytes of an element of a branch or a leaf.
pub const ELEMENT_SIZE: usize = 16;
/// Bytes of the value of a bucket that is not inline; an inline one has its page behind them.
pub const BUCKET_HEADER_SIZE: usize = 16;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;

/// Whether pages can have this size.
pub fn is_page_size(size: usize) -> bool {
    size.is_power_of_two() && PAGE_SIZES.contains(&size)
}

/// A length or position, which the format stores in 32 bits.
pub fn to_usize(number: u32) -> usize {
    usize::try_from(number).expect("addresses have 32 bits or more")
}

/// The number at `at`; there must be so many bytes.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The number at `at`; there must be so many bytes.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// What a page is.
pub mod kind {
    pub const BRANCH: u16 = 1;
    pub const LEAF: u16 = 2;
    pub const META: u16 = 4;
    pub const FREELIST: u16 = 16;
}

/// The beginning of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    pub page: u64,
    pub kind: u16,
    pub count: u16,
    pub overflow: u32,
}

impl PageHeader {
    pub const SIZE: usize = 16;

    /// Reads the first bytes of a page, which must be there.
    pub fn decode(bytes: &[u8]) -> Self {
        let short = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        Self { page: u64_at(bytes, 0), kind: short(8), count: short(10), overflow: u32_at(bytes, 12) }
    }

    pub fn append_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.page.to_le_bytes());
        out.extend_from_slice(&self.kind.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&self.overflow.to_le_bytes());
    }
}

/// The contents of a meta page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    pub page_size: u32,
    pub root: u64,
    pub sequence: u64,
    pub freelist: u64,
    /// The high-water mark: pages from this one on are not in use.
    pub pages: u64,
    pub transaction: u64,
}

impl Meta {
    /// With the header of the page.
    pub const SIZE: usize = PageHeader::SIZE + 64;
    const CHECKSUM_AT: usize = 56;

    /// Reads the first [`Self::SIZE`] bytes of a meta page, as bbolt does: the header does not matter. `Err` says why it is invalid.
    pub fn decode(page: &[u8]) -> Result<Self, String> {
        let bytes = &page[PageHeader::SIZE..Self::SIZE];
        if u32_at(bytes, 0) != MAGIC {
            return Err(format!("magic number {:#010x} instead of {MAGIC:#010x}", u32_at(bytes, 0)));
        }
        if u32_at(bytes, 4) != VERSION {
            return Err(format!("version {} instead of {VERSION}", u32_at(bytes, 4)));
        }
        let (stored, computed) = (u64_at(bytes, Self::CHECKSUM_AT), fnv1a(&bytes[..Self::CHECKSUM_AT]));
        if stored != computed {
            return Err(format!("checksum {stored:#018x} instead of {computed:#018x}"));
        }
        let page_size = u32_at(bytes, 8);
        if !is_page_size(to_usize(page_size)) {
            return Err(format!("page size {page_size}, which is no power of two from 1 KiB to 16 MiB"));
        }
        Ok(Self {
            page_size,
            root: u64_at(bytes, 16),
            sequence: u64_at(bytes, 24),
            freelist: u64_at(bytes, 32),
            pages: u64_at(bytes, 40),
            transaction: u64_at(bytes, 48),
        })
    }

    /// Appends a whole meta page.
    pub fn append_to(&self, page: u64, out: &mut Vec<u8>) {
        let end = out.len() + to_usize(self.page_size);
        PageHeader { page, kind: kind::META, count: 0, overflow: 0 }.append_to(out);
        let begin = out.len();
        for number in [MAGIC, VERSION, self.page_size, 0] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.root, self.sequence, self.freelist, self.pages, self.transaction] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        let checksum = fnv1a(&out[begin..]);
        out.extend_from_slice(&checksum.to_le_bytes());
        out.resize(end, 0);
    }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_fnv_1a_with_64_bits() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn a_meta_page_is_read_as_it_was_written_and_refused_with_any_bit_flipped() {
        let meta = Meta { page_size: 1024, root: 3, sequence: 1, freelist: 2, pages: 4, transaction: 7 };
        let mut page = Vec::new();
        meta.append_to(1, &mut page);
        assert_eq!((page.len(), Meta::decode(&page)), (1024, Ok(meta)));
        for bit in PageHeader::SIZE * 8..Meta::SIZE * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(Meta::decode(&page).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
