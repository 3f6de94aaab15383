//! The two kinds of errors.
//!
//! [`Error`] is returned to clients. Its display string is exactly etcd's, because clients match on it. A refused request is an
//! ordinary outcome; if it is refused when its entry is applied, every replica refuses it alike.
//!
//! [`Halt`] is an error that this process cannot recover from: a failing disk or corrupt data. It needs an operator, so it ends
//! the process.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a request is refused, with etcd's error text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    #[error("etcdserver: key not found")]
    KeyNotFound,
    #[error("etcdserver: value is provided")]
    ValueProvided,
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    #[error("etcdserver: invalid client api version")]
    InvalidClientApiVersion,
    #[error("etcdserver: invalid sort option")]
    InvalidSortOption,
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRev,
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    #[error("etcdserver: watch canceled")]
    WatchCanceled,
    #[error("etcdserver: member ID already exist")]
    MemberExists,
    #[error("etcdserver: Peer URLs already exists")]
    PeerUrlExists,
    #[error("etcdserver: re-configuration failed due to not enough started members")]
    MemberNotEnoughStarted,
    #[error("etcdserver: given member URLs are invalid")]
    MemberBadUrls,
    #[error("etcdserver: member not found")]
    MemberNotFound,
    #[error("etcdserver: can only promote a learner member")]
    MemberNotLearner,
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    #[error("etcdserver: too many learner members in cluster")]
    TooManyLearners,
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    #[error("grpc: too many bytes of answers wait to be read")]
    TooManyBytesUnread,
    #[error("etcdserver: too many requests")]
    TooManyRequests,
    /// A limit of this member, which a flag sets. (etcd has no such limit, so no client knows the text.)
    #[error("etcdserver: {what} (--{flag}={value})")]
    LimitReached { what: &'static str, flag: &'static str, value: usize },
    /// A read whose answer would be longer than this.
    #[error(
        "etcdserver: the answer is too large (--max-answer-bytes={0}): ask for fewer keys with a limit, or use RangeStream"
    )]
    AnswerTooLarge(usize),
    /// A transaction with more levels than this.
    #[error("etcdserver: too many levels of nested transactions (--max-txn-depth={0})")]
    TxnTooDeep(usize),
    #[error("etcdserver: no leader")]
    NoLeader,
    #[error("etcdserver: not leader")]
    NotLeader,
    #[error("etcdserver: leader changed")]
    LeaderChanged,
    #[error("etcdserver: server stopped")]
    Stopped,
    #[error("etcdserver: request timed out")]
    Timeout,
    #[error("etcdserver: request timed out, possibly due to previous leader failure")]
    TimeoutLeaderFailure,
    #[error("etcdserver: request timed out, possibly due to connection lost")]
    TimeoutConnectionLost,
    #[error("etcdserver: request timed out, waiting for the applied index took too long")]
    TimeoutWaitAppliedIndex,
    #[error("etcdserver: request timed out, leader transfer took too long")]
    TimeoutLeaderTransfer,
    #[error("etcdserver: unhealthy cluster")]
    Unhealthy,
    #[error("etcdserver: corrupt cluster")]
    Corrupt,
    #[error("etcdserver: rpc not supported for learner")]
    NotSupportedForLearner,
    #[error("etcdserver: bad leader transferee")]
    BadLeaderTransferee,
    #[error("etcdserver: wrong downgrade target version format")]
    WrongDowngradeVersionFormat,
    #[error("etcdserver: invalid downgrade target version")]
    InvalidDowngradeTargetVersion,
    #[error("etcdserver: root user does not exist")]
    RootUserNotExist,
    #[error("etcdserver: root user does not have root role")]
    RootRoleNotExist,
    #[error("etcdserver: user name already exists")]
    UserAlreadyExist,
    #[error("etcdserver: user name is empty")]
    UserEmpty,
    #[error("etcdserver: user name not found")]
    UserNotFound,
    #[error("etcdserver: role name already exists")]
    RoleAlreadyExist,
    #[error("etcdserver: role name is empty")]
    RoleEmpty,
    #[error("etcdserver: role name not found")]
    RoleNotFound,
    #[error("etcdserver: role is not granted to the user")]
    RoleNotGranted,
    #[error("etcdserver: permission not given")]
    PermissionNotGiven,
    #[error("etcdserver: permission is not granted to the role")]
    PermissionNotGranted,
    #[error("etcdserver: permission denied")]
    PermissionDenied,
    #[error("etcdserver: authentication failed, invalid user ID or password")]
    AuthFailed,
    #[error("auth: authentication failed, password was given for no password user")]
    NoPasswordUser,
    #[error("etcdserver: authentication is not enabled")]
    AuthNotEnabled,
    #[error("etcdserver: invalid auth token")]
    InvalidAuthToken,
    #[error("etcdserver: invalid auth management")]
    InvalidAuthManagement,
    #[error("etcdserver: revision of auth store is old")]
    AuthOldRevision,
    /// The capability level of the cluster is too low.
    #[error("etcdserver: not capable")]
    NotCapable,
    #[error("etcdserver: request canceled")]
    Canceled,
    /// A write found no leader within its timeout.
    #[error("context deadline exceeded")]
    DeadlineExceeded,
    /// The leader could not confirm its leadership.
    #[error("not a primary lessor")]
    NotPrimary,
    /// A `RangeStream` with options that it does not support.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// A message that cannot be decoded.
    #[error("grpc: error unmarshalling request: {0}")]
    Malformed(String),
    /// Any other error text, with code Unknown.
    #[error("{0}")]
    Unknown(String),
}

/// An error that ends the process.
#[derive(Debug, thiserror::Error)]
pub enum Halt {
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// The failed action, as a verb: "read".
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// RocksDB returned an error.
    #[error("database: {0}")]
    Database(String),
    /// Data on disk is corrupt, or is not data of this member.
    #[error("{0}")]
    InvalidData(String),
    /// The cluster uses what this build does not know.
    #[error("{0}")]
    NewerVersionRequired(String),
}

impl Halt {
    /// Aborts the process: a member whose storage has failed must not go on.
    pub fn abort(&self) -> ! {
        tracing::error!(error = %self, "fatal storage error, aborting");
        std::process::abort()
    }

    /// For `map_err`: adds the action and the path to an I/O error.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// Why the server did not start, or stopped without a signal.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The disk failed, or the data on it is unusable.
    #[error(transparent)]
    Halt(#[from] Halt),
    /// The configuration cannot be used, or the cluster does not accept this member.
    #[error("{0}")]
    Refused(String),
    /// An address cannot be listened on.
    #[error("listen {address}: bind: {}", bind_error_text(.source))]
    Bind {
        /// The network and the address, as Go prints them: `tcp 127.0.0.1:2379`.
        address: String,
        source: io::Error,
    },
}

/// The system's error text; for an address in use, the text of Go servers.
fn bind_error_text(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::AddrInUse { "address already in use".to_owned() } else { error.to_string() }
}
