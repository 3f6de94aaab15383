//! Every table and key layout: the on-disk format of the database.
//!
//! Two column families, because two kinds of data age differently:
//!
//! * `history`: etcd's record keys (`rev _ sub`, 17 bytes, and `t` behind a deletion's) to encoded `mvccpb.KeyValue`.
//!   Written in revision order and never overwritten, so its files never overlap and move down the levels untouched.
//! * `state`: everything else. One byte names the table, the rest is the table's own key.
//!
//! | table | key | value |
//! | --- | --- | --- |
//! | history | 8-byte big-endian revision, `_`, 8-byte big-endian sub, `t` for a deletion | `mvccpb.KeyValue` |
//! | meta | a name of [`meta`] | 8-byte big-endian numbers, unless said otherwise |
//! | lease | 8-byte big-endian lease ID (two's complement) | `leasepb.Lease` |
//! | member | 8-byte big-endian member ID | `etcdserverpb.Member` |
//! | removed | 8-byte big-endian member ID | empty |
//! | alarm | 8-byte big-endian alarm type, 8-byte big-endian member ID | `etcdserverpb.AlarmMember` |

/// A table of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Every change to every key.
    History,
    /// Single values: see [`meta`].
    Meta,
    /// Leases.
    Lease,
    /// The members.
    Member,
    /// The IDs of members that were removed; they never come back.
    Removed,
    /// Raised alarms.
    Alarm,
}

impl Table {
    /// The byte that starts this table's keys in the `state` family. History has a family of its own.
    #[must_use]
    pub fn tag(self) -> u8 {
        match self {
            Self::History => b'h',
            Self::Meta => b'm',
            Self::Lease => b'l',
            Self::Member => b'n',
            Self::Removed => b'r',
            Self::Alarm => b'a',
        }
    }
}

/// The keys of [`Table::Meta`].
pub mod meta {
    /// How far the database is: index and term of the last entry whose effects it holds, and the revision of the key space
    /// (three 8-byte numbers). The revision is kept because the newest record may be a compacted deletion.
    pub const APPLIED: &[u8] = b"applied";
    /// The revision of the last compaction that was agreed.
    pub const COMPACT_SCHEDULED: &[u8] = b"compact_scheduled";
    /// The revision of the last compaction whose removals are done.
    pub const COMPACT_FINISHED: &[u8] = b"compact_finished";
    /// Identity of the cluster.
    pub const CLUSTER_ID: &[u8] = b"cluster_id";
    /// The members that a newcomer was introduced to, as an `etcdserverpb.MemberListResponse`: whom to talk to, until a
    /// snapshot with the real table takes this database's place.
    pub const INTRODUCED: &[u8] = b"introduced";
    /// The version all members can speak: text, `X.Y.0`.
    pub const CLUSTER_VERSION: &[u8] = b"cluster_version";
}

/// Reads an 8-byte number as [`meta`] keeps them.
#[must_use]
pub fn decode_u64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}
