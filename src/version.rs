//! Which release of etcd this program behaves like.

/// The release, as it is told to clients and other members.
pub const ETCD_VERSION: &str = "3.7.3";

/// The format of the stored state, in etcd's numbering. It goes with the minor version, not with the patch.
pub const STORAGE_VERSION: &str = "3.7.0";

/// The capability level of this build: which kinds of log entries it knows (`state/capability.rs` has the list).
pub const CAPABILITY_LEVEL: u64 = 1;
