//! Decodes header blocks.
//!
//! A block is decoded to its end even if it has too many fields, because the dynamic table must stay in sync with the client's.
//! So the list is truncated, not the decoding, and [`Fields::is_truncated`] says so.

use bytes::Bytes;

use super::{
    huffman, integer,
    table::{DEFAULT_SIZE, ENTRY_OVERHEAD, Table},
};

/// A block that cannot be decoded. The connection ends, because the content of the table is unknown from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl From<integer::Malformed> for Malformed {
    fn from(_: integer::Malformed) -> Self {
        Self("invalid integer in the header block")
    }
}

impl From<huffman::Malformed> for Malformed {
    fn from(_: huffman::Malformed) -> Self {
        Self("invalid Huffman string in the header block")
    }
}

/// The fields of one block. Reused from block to block, so that decoding does not allocate.
#[derive(Debug, Default)]
pub struct Fields {
    text: Vec<u8>,
    /// For each field, the start of its name, the start of its value, and the end of that.
    spans: Vec<(usize, usize, usize)>,
    size: usize,
    is_truncated: bool,
    only_indexed: bool,
}

impl Fields {
    /// Name and value of each field, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.spans.iter().map(|&(start, middle, end)| (&self.text[start..middle], &self.text[middle..end]))
    }

    /// Whether the list was longer than allowed, so that fields are missing.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.is_truncated
    }

    /// Whether the block consists of indexes only: then its meaning stays the same until the table changes.
    #[must_use]
    pub fn only_indexed(&self) -> bool {
        self.only_indexed
    }

    fn clear(&mut self) {
        self.text.clear();
        self.spans.clear();
        (self.size, self.is_truncated, self.only_indexed) = (0, false, true);
    }

    /// Adds a field if the list stays within the limit.
    fn push(&mut self, name: &[u8], value: &[u8], max_size: usize) {
        self.size = self.size.saturating_add(name.len() + value.len() + ENTRY_OVERHEAD);
        if self.size > max_size {
            self.is_truncated = true;
            return;
        }
        let start = self.text.len();
        self.text.extend_from_slice(name);
        let middle = self.text.len();
        self.text.extend_from_slice(value);
        self.spans.push((start, middle, self.text.len()));
    }
}

/// The decoder of one connection.
#[derive(Debug, Default)]
pub struct Decoder {
    table: Table,
    /// The strings of the field that is being decoded.
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Decoder {
    /// Decodes a whole block. Fields beyond `max_list_size` (names, values, and 32 bytes for each) are left out.
    pub fn decode(&mut self, mut block: &[u8], max_list_size: usize, fields: &mut Fields) -> Result<(), Malformed> {
        fields.clear();
        let mut may_resize = true;
        while let Some(&first) = block.first() {
            if first & 0xe0 == 0x20 {
                self.resize(&mut block, may_resize)?;
                fields.only_indexed = false;
                continue;
            }
            may_resize = false;
            if first & 0x80 != 0 {
                let index = integer::decode(&mut block, 7)?;
                let (name, value) = self.table.get(index).ok_or(Malformed("index outside the header table"))?;
                fields.push(name, value, max_list_size);
            } else {
                fields.only_indexed = false;
                let name = self.literal(first, &mut block)?;
                fields.push(name.as_deref().unwrap_or(&self.name), &self.value, max_list_size);
            }
        }
        Ok(())
    }

    /// Incremented with each change of the table.
    #[must_use]
    pub fn table_changes(&self) -> u64 {
        self.table.changes()
    }

    /// A table size update: allowed only before the first field, and up to the default size, which the server never changes.
    fn resize(&mut self, block: &mut &[u8], is_allowed: bool) -> Result<(), Malformed> {
        let size = integer::decode(block, 5)?;
        if !is_allowed {
            return Err(Malformed("table size update after a field"));
        }
        if size > DEFAULT_SIZE {
            return Err(Malformed("table size update above the limit"));
        }
        self.table.set_max_size(size);
        Ok(())
    }

    /// A literal field. Returns its name if that comes from the table, where it need not be copied.
    fn literal(&mut self, first: u8, block: &mut &[u8]) -> Result<Option<Bytes>, Malformed> {
        let is_added = first & 0xc0 == 0x40;
        let index = integer::decode(block, if is_added { 6 } else { 4 })?;
        let name = if index == 0 {
            self.name.clear();
            string(block, &mut self.name)?;
            None
        } else {
            Some(self.table.name(index).ok_or(Malformed("name index outside the header table"))?)
        };
        self.value.clear();
        string(block, &mut self.value)?;
        if is_added {
            let name = name.clone().unwrap_or_else(|| Bytes::copy_from_slice(&self.name));
            self.table.add(name, &self.value);
        }
        Ok(name)
    }
}

fn string(block: &mut &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let is_huffman = block.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer::decode(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(Malformed("string exceeds the header block"))?;
    *block = rest;
    if is_huffman {
        huffman::decode(text, out)?;
    } else {
        out.extend_from_slice(text);
    }
    Ok(())
}

#[cfg(test)]
impl Decoder {
    /// Whether adjacent entries of the table with equal names share the bytes of the name.
    #[must_use]
    pub fn shares_names(&self) -> bool {
        self.table.shares_names()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    fn list(fields: &Fields) -> Vec<String> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        fields.iter().map(|(name, value)| format!("{}={}", text(name), text(value))).collect()
    }

    #[track_caller]
    fn check(decoder: &mut Decoder, block: &str, expected: &[&str]) {
        let mut fields = Fields::default();
        decoder.decode(&unhex(block), 1000, &mut fields).unwrap();
        assert_eq!(list(&fields), expected);
    }

    /// RFC 7541, appendix C.3 (plain strings) and C.4 (Huffman): three requests on one connection.
    #[test]
    fn the_requests_of_the_rfc_are_decoded() {
        let plain = [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ];
        let huffman = [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ];
        for blocks in [plain, huffman] {
            let mut decoder = Decoder::default();
            let host = ":authority=www.example.com";
            check(&mut decoder, blocks[0], &[":method=GET", ":scheme=http", ":path=/", host]);
            let with_cache = [":method=GET", ":scheme=http", ":path=/", host, "cache-control=no-cache"];
            check(&mut decoder, blocks[1], &with_cache);
            let custom = [":method=GET", ":scheme=https", ":path=/index.html", host, "custom-key=custom-value"];
            check(&mut decoder, blocks[2], &custom);
        }
    }

    /// RFC 7541, appendix C.6: answers that do not all fit into a table of 256 bytes.
    #[test]
    fn the_responses_of_the_rfc_are_decoded() {
        let mut decoder = Decoder::default();
        decoder.table.set_max_size(256);
        let (private, location) = ("cache-control=private", "location=https://www.example.com");
        let date = "date=Mon, 21 Oct 2013 20:13:21 GMT";
        let first = "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d \
                     29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3";
        check(&mut decoder, first, &[":status=302", private, date, location]);
        check(&mut decoder, "4883 640e ffc1 c0bf", &[":status=307", private, date, location]);
        let third = "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d \
                     d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 \
                     3d50 07";
        let cookie = "set-cookie=foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1";
        let later = "date=Mon, 21 Oct 2013 20:13:22 GMT";
        check(&mut decoder, third, &[":status=200", private, later, location, "content-encoding=gzip", cookie]);
    }

    #[test]
    fn malformed_blocks_are_refused_with_a_reason() {
        let cases = [
            ("80", "index outside the header table"),
            ("be", "index outside the header table"),
            ("7f80", "invalid integer in the header block"),
            ("7f00 00", "name index outside the header table"),
            ("0005 61", "string exceeds the header block"),
            ("0081 18 00", "invalid Huffman string in the header block"),
            ("82 20", "table size update after a field"),
            ("3fe2 1f", "table size update above the limit"),
        ];
        for (block, why) in cases {
            let refused = Decoder::default().decode(&unhex(block), 1000, &mut Fields::default());
            assert_eq!(refused, Err(Malformed(why)), "{block}");
        }
    }

    #[test]
    fn a_long_list_is_truncated_and_the_table_stays_in_sync() {
        let mut decoder = Decoder::default();
        let mut fields = Fields::default();
        decoder.decode(&unhex("4001 6101 31 4001 6201 32"), 40, &mut fields).unwrap();
        assert_eq!((list(&fields), fields.is_truncated()), (vec!["a=1".to_owned()], true));
        check(&mut decoder, "be bf", &["b=2", "a=1"]);
    }

    #[test]
    fn blocks_of_only_indexes_are_recognised() {
        let mut decoder = Decoder::default();
        let mut fields = Fields::default();
        for (block, only_indexed) in
            [("4001 6101 31", false), ("82 be", true), ("20 82", false), ("82 0001 6101 31", false)]
        {
            decoder.decode(&unhex(block), 1000, &mut fields).unwrap();
            assert_eq!(fields.only_indexed(), only_indexed, "{block}");
        }
    }
}
