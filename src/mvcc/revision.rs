//! Revisions, and the record keys that encode them.

/// Identifies a change: the transaction that made it, and its number within that transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision {
    /// The transaction's number. Clients call this "the revision".
    pub main: i64,
    /// The number of the change within the transaction, from zero.
    pub sub: u32,
}

/// Length of a record key without the tombstone mark.
const LEN: usize = 17;
/// Ends the record key of a deletion.
const TOMBSTONE: u8 = b't';

/// Length of the key of a record.
#[must_use]
pub fn record_key_len(deletion: bool) -> usize {
    LEN + usize::from(deletion)
}

/// The key of a record in the history table: 8-byte big-endian main, `_`, 8-byte big-endian sub, and for a deletion `t`.
/// Bytewise order is revision order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordKey {
    bytes: [u8; LEN + 1],
    len: u8,
}

impl RecordKey {
    #[must_use]
    pub fn new(revision: Revision, deletion: bool) -> Self {
        let mut bytes = [TOMBSTONE; LEN + 1];
        bytes[..8].copy_from_slice(&revision.main.to_be_bytes());
        bytes[8] = b'_';
        bytes[9..LEN].copy_from_slice(&u64::from(revision.sub).to_be_bytes());
        Self { bytes, len: if deletion { 18 } else { 17 } }
    }

    /// Returns the revision and whether the record is a deletion; None if the bytes are not a record key.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<(Revision, bool)> {
        let (head, deletion) = match bytes.len() {
            LEN => (bytes, false),
            18 if bytes[LEN] == TOMBSTONE => (&bytes[..LEN], true),
            _ => return None,
        };
        let main = i64::from_be_bytes(head[..8].try_into().ok()?);
        let sub = u64::from_be_bytes(head[9..].try_into().ok()?);
        (head[8] == b'_').then_some((Revision { main, sub: u32::try_from(sub).ok()? }, deletion))
    }

    /// The smallest record key of this transaction and all later ones.
    #[must_use]
    pub fn first_of(main: i64) -> Self {
        Self::new(Revision { main, sub: 0 }, false)
    }
}

impl AsRef<[u8]> for RecordKey {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_keys_decode_and_sort_by_revision() {
        let mut previous: Option<RecordKey> = None;
        for (main, sub, deletion) in [(1, 0, false), (1, 1, true), (2, 0, false), (2, 300, true), (i64::MAX, 0, true)] {
            let revision = Revision { main, sub };
            let key = RecordKey::new(revision, deletion);
            assert_eq!(RecordKey::decode(key.as_ref()), Some((revision, deletion)));
            assert!(previous.is_none_or(|previous| previous.as_ref() < key.as_ref()));
            previous = Some(key);
        }
    }

    #[test]
    fn other_bytes_are_rejected_as_record_keys() {
        for bytes in [&b""[..], b"short", b"12345678_12345678x", b"12345678-12345678", &[255; 17]] {
            assert_eq!(RecordKey::decode(bytes), None, "{bytes:?}");
        }
    }
}
