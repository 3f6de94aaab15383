//! The table of fields: 61 static ones, and the dynamic ones that one side of a connection has added.

use std::collections::VecDeque;

use bytes::Bytes;

/// The size of an entry in addition to its bytes (RFC 7541 §4.1).
pub const ENTRY_OVERHEAD: usize = 32;
/// The initial maximum size of the dynamic table.
pub const DEFAULT_SIZE: usize = 4096;

/// The static table, RFC 7541, appendix A. The first entry has index 1.
#[rustfmt::skip]
pub const STATIC: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""), ("cache-control", ""),
    ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""), ("content-length", ""),
    ("content-location", ""), ("content-range", ""), ("content-type", ""), ("cookie", ""), ("date", ""), ("etag", ""),
    ("expect", ""), ("expires", ""), ("from", ""), ("host", ""), ("if-match", ""), ("if-modified-since", ""),
    ("if-none-match", ""), ("if-range", ""), ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""),
    ("location", ""), ("max-forwards", ""), ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""),
    ("referer", ""), ("refresh", ""), ("retry-after", ""), ("server", ""), ("set-cookie", ""),
    ("strict-transport-security", ""), ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""),
    ("www-authenticate", ""),
];

/// A dynamic entry. An entry whose name is a reference to another entry shares that name: referring to a long name by a few bytes
/// does not copy it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: Bytes,
    value: Bytes,
}

impl Entry {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// The table of a decoder.
#[derive(Debug)]
pub struct Table {
    added: VecDeque<Entry>,
    size: usize,
    max_size: usize,
    changes: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self { added: VecDeque::new(), size: 0, max_size: DEFAULT_SIZE, changes: 0 }
    }
}

impl Table {
    /// The field at an index.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        match STATIC.get(index.checked_sub(1)?) {
            Some((name, value)) => Some((name.as_bytes(), value.as_bytes())),
            None => self.added.get(index - 1 - STATIC.len()).map(|entry| (&entry.name[..], &entry.value[..])),
        }
    }

    /// The name at an index, as an owned value.
    #[must_use]
    pub fn name(&self, index: usize) -> Option<Bytes> {
        match STATIC.get(index.checked_sub(1)?) {
            Some((name, _)) => Some(Bytes::from_static(name.as_bytes())),
            None => self.added.get(index - 1 - STATIC.len()).map(|entry| entry.name.clone()),
        }
    }

    /// Adds a field and evicts the oldest ones as needed. A field larger than the table leaves it empty (RFC 7541 §4.4).
    pub fn add(&mut self, name: Bytes, value: &[u8]) {
        self.changes += 1;
        let size = name.len() + value.len() + ENTRY_OVERHEAD;
        self.shrink_to(self.max_size.saturating_sub(size));
        if size <= self.max_size {
            self.size += size;
            self.added.push_front(Entry { name, value: Bytes::copy_from_slice(value) });
        }
    }

    pub fn set_max_size(&mut self, max_size: usize) {
        self.changes += 1;
        self.max_size = max_size;
        self.shrink_to(max_size);
    }

    /// Incremented with each change of the table. While it stays the same, an index keeps its meaning.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    fn shrink_to(&mut self, size: usize) {
        while self.size > size {
            let oldest = self.added.pop_back().expect("the size is the sum of the entries");
            self.size -= oldest.size();
        }
    }
}

#[cfg(test)]
impl Table {
    /// Whether adjacent entries with equal names share the bytes of the name.
    #[must_use]
    pub fn shares_names(&self) -> bool {
        self.added
            .iter()
            .zip(self.added.iter().skip(1))
            .all(|(a, b)| a.name != b.name || a.name.as_ptr() == b.name.as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_static_entries_never_change() {
        let table = Table::default();
        assert_eq!(table.get(0), None);
        assert_eq!(table.get(1), Some((&b":authority"[..], &b""[..])));
        assert_eq!(table.get(16), Some((&b"accept-encoding"[..], &b"gzip, deflate"[..])));
        assert_eq!(table.get(61), Some((&b"www-authenticate"[..], &b""[..])));
        assert_eq!(table.get(62), None);
        assert_eq!(table.get(usize::MAX), None);
    }

    #[test]
    fn the_oldest_entries_are_evicted() {
        let mut table = Table::default();
        table.set_max_size(2 * (2 + ENTRY_OVERHEAD));
        for (name, value) in [("a", "1"), ("b", "2"), ("c", "3")] {
            table.add(name.into(), value.as_bytes());
        }
        assert_eq!(table.get(62), Some((&b"c"[..], &b"3"[..])));
        assert_eq!(table.get(63), Some((&b"b"[..], &b"2"[..])));
        assert_eq!(table.get(64), None);
        table.add("long".into(), &[b'x'; 100]);
        assert_eq!((table.get(62), table.size), (None, 0), "one that is too large leaves nothing");
    }

    #[test]
    fn shrinking_the_table_evicts_entries() {
        let mut table = Table::default();
        table.add("a".into(), b"1");
        let before = table.changes();
        table.set_max_size(0);
        assert_eq!(table.get(62), None);
        assert_ne!(table.changes(), before);
    }
}
