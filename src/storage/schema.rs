//! The on-disk format of the database: all tables and their key layouts.
//!
//! There are two column families, because history and all other data are written in different patterns:
//!
//! * `history` maps etcd's record keys (`rev _ sub`, 17 bytes, and `t` at the end for a deletion) to encoded
//!   `mvccpb.KeyValue`. It is written in revision order and never overwritten, so its files never overlap and move down the
//!   levels without being rewritten.
//! * `state` holds all other tables. The first byte of a key names the table, the rest is the table's own key.
//!
//! | table | key | value |
//! | --- | --- | --- |
//! | history | 8-byte big-endian revision, `_`, 8-byte big-endian sub, `t` for a deletion | `mvccpb.KeyValue` |
//! | meta | a name of [`meta`] | 8-byte big-endian numbers, unless said otherwise |
//! | lease | 8-byte big-endian lease ID (two's complement) | `leasepb.Lease` |
//! | member | 8-byte big-endian member ID | `etcdserverpb.Member`, and its capability level as field 100 |
//! | removed | 8-byte big-endian member ID | empty |
//! | alarm | 8-byte big-endian alarm type, 8-byte big-endian member ID | `etcdserverpb.AlarmMember` |
//! | user | the user's name | `authpb.User` |
//! | role | the role's name | `authpb.Role` |

/// A table of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Every change to every key.
    History,
    /// Single values, see [`meta`].
    Meta,
    Lease,
    Member,
    /// The IDs of removed members, which can never be added again.
    Removed,
    Alarm,
    User,
    Role,
}

impl Table {
    /// The first byte of this table's keys in the `state` family. History has a family of its own.
    #[must_use]
    pub fn tag(self) -> u8 {
        match self {
            Self::History => b'h',
            Self::Meta => b'm',
            Self::Lease => b'l',
            Self::Member => b'n',
            Self::Removed => b'r',
            Self::Alarm => b'a',
            Self::User => b'u',
            Self::Role => b'o',
        }
    }
}

/// The keys of [`Table::Meta`].
pub mod meta {
    /// The applied position: index and term of the last applied entry, and the revision of the key space (three 8-byte
    /// numbers). The revision is stored because the newest record may be a tombstone that was compacted.
    pub const APPLIED: &[u8] = b"applied";
    /// The compact revision: that of the last compaction that was applied.
    pub const COMPACT_SCHEDULED: &[u8] = b"compact_scheduled";
    /// The revision of the last compaction whose removals are done.
    pub const COMPACT_FINISHED: &[u8] = b"compact_finished";
    /// 8-byte number.
    pub const CLUSTER_ID: &[u8] = b"cluster_id";
    /// The members that a joining member was given to contact, as an `etcdserverpb.MemberListResponse`: used until a snapshot
    /// with the real member table replaces this database.
    pub const BOOTSTRAP_MEMBERS: &[u8] = b"introduced";
    /// The cluster version, which all members support: text, `X.Y.0`.
    pub const CLUSTER_VERSION: &[u8] = b"cluster_version";
    /// The capability level of the cluster; absent at level 0.
    pub const CAPABILITY_LEVEL: &[u8] = b"capability_level";
    /// One byte: 1 if authentication is enabled.
    pub const AUTH_ENABLED: &[u8] = b"auth_enabled";
    /// Counts the changes of users and roles; absent before the first.
    pub const AUTH_REVISION: &[u8] = b"auth_revision";
}

/// Decodes an 8-byte big-endian number.
#[must_use]
pub fn decode_u64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}
