//! Encodes header blocks.
//!
//! Only the two fields that occur in every gRPC response are ever added to the client's table. They are added when they first
//! occur, and take one byte from then on.

use super::{
    huffman, integer,
    table::{DEFAULT_SIZE, ENTRY_OVERHEAD, STATIC},
};

/// The fields that are added to the table.
const FREQUENT: [(&str, &str); 2] = [("content-type", "application/grpc"), ("grpc-status", "0")];
const CONTENT_TYPE_GRPC: usize = 0;
const GRPC_STATUS_OK: usize = 1;
/// `:status: 200`, an entry of the static table.
const STATUS_200: u8 = 0x88;
/// The table size that they need.
const FREQUENT_SIZE: usize = {
    let [(a, b), (c, d)] = FREQUENT;
    a.len() + b.len() + c.len() + d.len() + 2 * ENTRY_OVERHEAD
};

/// The encoder of one connection.
#[derive(Debug)]
pub struct Encoder {
    /// The maximum size of the client's table.
    max_size: usize,
    /// The table size updates to send before the next field: the smallest size since the last block, and the current size.
    resize: Option<(usize, usize)>,
    /// For each frequent field that was added: how many entries had been added before it.
    added: [Option<usize>; FREQUENT.len()],
    count: usize,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { max_size: DEFAULT_SIZE, resize: None, added: [None; FREQUENT.len()], count: 0 }
    }
}

impl Encoder {
    /// The client has set the maximum size of its table. No more than the default size is used.
    pub fn set_max_size(&mut self, size: usize) {
        let size = size.min(DEFAULT_SIZE);
        if size == self.max_size && self.resize.is_none() {
            return;
        }
        // With an update to size zero in between, the table is known to be empty.
        self.resize = Some((0, size));
        self.max_size = size;
        (self.added, self.count) = ([None; FREQUENT.len()], 0);
    }

    /// Starts a block.
    pub fn begin(&mut self, out: &mut Vec<u8>) {
        if let Some((smallest, size)) = self.resize.take() {
            integer::encode(smallest, 5, 0x20, out);
            integer::encode(size, 5, 0x20, out);
        }
    }

    /// The fields that every gRPC response starts with.
    pub fn grpc_response_headers(&mut self, out: &mut Vec<u8>) {
        out.push(STATUS_200);
        self.frequent(CONTENT_TYPE_GRPC, out);
    }

    /// The field that a successful gRPC response ends with.
    pub fn ok_trailers(&mut self, out: &mut Vec<u8>) {
        self.frequent(GRPC_STATUS_OK, out);
    }

    /// Writes one field. Its name must be in lower case.
    pub fn field(&mut self, name: &str, value: &[u8], out: &mut Vec<u8>) {
        if let Some(nth) = FREQUENT.iter().position(|&(known, content)| known == name && content.as_bytes() == value) {
            return self.frequent(nth, out);
        }
        let is_same = |entry: &(&str, &str)| entry.0 == name && entry.1.as_bytes() == value;
        match STATIC.iter().position(is_same) {
            Some(place) => integer::encode(place + 1, 7, 0x80, out),
            None => literal(name, value, 0, 4, out),
        }
    }

    fn frequent(&mut self, nth: usize, out: &mut Vec<u8>) {
        let (name, value) = FREQUENT[nth];
        if let Some(before) = self.added[nth] {
            let newer = self.count - before - 1;
            return integer::encode(STATIC.len() + 1 + newer, 7, 0x80, out);
        }
        if self.max_size < FREQUENT_SIZE {
            return literal(name, value.as_bytes(), 0, 4, out);
        }
        self.added[nth] = Some(self.count);
        self.count += 1;
        literal(name, value.as_bytes(), 0x40, 6, out);
    }
}

/// A literal field, with an indexed name if the static table has it.
fn literal(name: &str, value: &[u8], flags: u8, prefix: u32, out: &mut Vec<u8>) {
    if let Some(place) = STATIC.iter().position(|entry| entry.0 == name) {
        integer::encode(place + 1, prefix, flags, out);
    } else {
        out.push(flags);
        string(name.as_bytes(), out);
    }
    string(value, out);
}

/// Writes a string, Huffman-coded if that is shorter.
fn string(text: &[u8], out: &mut Vec<u8>) {
    let huffman_len = huffman::encoded_len(text);
    if huffman_len < text.len() {
        integer::encode(huffman_len, 7, 0x80, out);
        huffman::encode(text, out);
    } else {
        integer::encode(text.len(), 7, 0, out);
        out.extend_from_slice(text);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::decoder::Fields, *};
    use crate::hpack::Decoder;

    type List = Vec<(String, Vec<u8>)>;

    fn encode(encoder: &mut Encoder, list: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        encoder.begin(&mut out);
        for (name, value) in list {
            encoder.field(name, value, &mut out);
        }
        out
    }

    fn decode(decoder: &mut Decoder, block: &[u8]) -> List {
        let mut fields = Fields::default();
        decoder.decode(block, usize::MAX, &mut fields).unwrap();
        fields.iter().map(|(name, value)| (String::from_utf8(name.to_vec()).unwrap(), value.to_vec())).collect()
    }

    fn field(name: &str, value: &str) -> (String, Vec<u8>) {
        (name.to_owned(), value.as_bytes().to_vec())
    }

    #[test]
    fn frequent_fields_become_one_byte() {
        let mut encoder = Encoder::default();
        let head = [field(":status", "200"), field("content-type", "application/grpc")];
        let end = [field("grpc-status", "0")];
        assert!(encode(&mut encoder, &head).len() > 2);
        assert!(encode(&mut encoder, &end).len() > 1);
        let mut shortcut = Vec::new();
        encoder.grpc_response_headers(&mut shortcut);
        encoder.ok_trailers(&mut shortcut);
        assert_eq!(shortcut, [0x88, 0xbf, 0xbe]);
        assert_eq!(encode(&mut encoder, &head), [0x88, 0xbf]);
        assert_eq!(encode(&mut encoder, &end), [0xbe]);
    }

    #[test]
    fn a_table_that_is_too_small_is_not_used() {
        let mut encoder = Encoder::default();
        let mut decoder = Decoder::default();
        encoder.set_max_size(FREQUENT_SIZE - 1);
        let list = vec![field("content-type", "application/grpc"), field("grpc-status", "0")];
        for _ in 0..2 {
            let block = encode(&mut encoder, &list);
            assert!(block.len() > 2);
            assert_eq!(decode(&mut decoder, &block), list);
        }
    }

    fn lists() -> impl Strategy<Value = Vec<(Option<usize>, List)>> {
        let frequent = prop::sample::select(vec![
            field("content-type", "application/grpc"),
            field("grpc-status", "0"),
            field(":status", "200"),
            field("content-type", "text/plain"),
        ]);
        let any = ("[a-z-]{1,10}", prop::collection::vec(any::<u8>(), 0..40));
        let list = prop::collection::vec(prop_oneof![frequent, any], 0..6);
        prop::collection::vec((prop::option::of(0_usize..6000), list), 0..20)
    }

    proptest! {
        /// Whatever table sizes the client sets in between.
        #[test]
        fn encoded_blocks_can_be_decoded(lists in lists()) {
            let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
            for (resize, list) in lists {
                if let Some(size) = resize {
                    encoder.set_max_size(size);
                }
                let block = encode(&mut encoder, &list);
                prop_assert_eq!(decode(&mut decoder, &block), list);
            }
        }

        #[test]
        fn arbitrary_bytes_are_decoded_or_refused(blocks: Vec<Vec<u8>>, limit in 0_usize..300) {
            let (mut decoder, mut fields) = (Decoder::default(), Fields::default());
            for block in &blocks {
                if decoder.decode(block, limit, &mut fields).is_err() {
                    break;
                }
                let size: usize = fields.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
                prop_assert!(size <= limit);
            }
        }
    }
}
