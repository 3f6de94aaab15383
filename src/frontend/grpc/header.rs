//! The header of responses, and responses that start with it.

use std::sync::Arc;

use bytes::Bytes;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};

use crate::{mvcc::read::Rows, node::status::Status, proto::etcdserverpb::ResponseHeader};

const HEADER_FIELD: u32 = 1;
/// The longest header: all four numbers at their longest, plus the field's key and length.
const MAX_HEADER_BYTES: usize = 48;

/// Makes the headers of this member's responses. Cheap to clone.
#[derive(Clone)]
pub struct Header {
    cluster_id: u64,
    member_id: u64,
    status: Arc<Status>,
}

impl Header {
    #[must_use]
    pub fn new(cluster_id: u64, member_id: u64, status: Arc<Status>) -> Self {
        Self { cluster_id, member_id, status }
    }

    #[must_use]
    pub fn member_id(&self) -> u64 {
        self.member_id
    }

    #[must_use]
    pub fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    /// The header of a response at `revision`.
    #[must_use]
    pub fn at(&self, revision: i64) -> ResponseHeader {
        ResponseHeader {
            cluster_id: self.cluster_id,
            member_id: self.member_id,
            revision,
            raft_term: self.status.applied_term(),
        }
    }

    /// A response whose other fields are encoded already.
    #[must_use]
    pub fn with_body(&self, revision: i64, body: &[u8]) -> Bytes {
        let mut out = self.begin(revision, body.len());
        out.extend_from_slice(body);
        out.into()
    }

    /// The response to a Range.
    #[must_use]
    pub fn rows(&self, rows: &Rows, head: i64) -> Bytes {
        let mut out = self.begin(head, rows.encoded_len());
        rows.encode(&mut out);
        out.into()
    }

    /// A buffer that starts with a header and has capacity for `rest` more bytes.
    #[must_use]
    pub fn begin(&self, revision: i64, rest: usize) -> Vec<u8> {
        let header = self.at(revision);
        let mut out = Vec::with_capacity(MAX_HEADER_BYTES + rest);
        encode_key(HEADER_FIELD, WireType::LengthDelimited, &mut out);
        encode_varint(header.encoded_len() as u64, &mut out);
        header.encode_raw(&mut out);
        out
    }
}
