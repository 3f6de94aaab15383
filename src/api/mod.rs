//! The RPC handlers: they decode requests and encode responses. They decide nothing about data, and only [`grpc`] names the
//! types of a transport.
//!
//! The [`Table`] maps a path to a handler. A unary handler takes a [`Call`](crate::call::Call) and a [`Reply`]; it answers
//! immediately or passes the reply on, and never blocks. A streaming handler returns a
//! [`Conversation`](crate::call::Conversation). Any transport that can carry bytes and paths can serve the table.

pub mod barrier;
pub mod cluster;
pub mod company;
pub mod election;
pub mod grpc;
pub mod header;
pub mod health;
pub mod http;
pub mod keep_alive;
pub mod kv;
pub mod lease;
pub mod lock;
pub mod maintenance;
pub mod peer;
pub mod pool;
pub mod quorum;
pub mod range_stream;
pub mod recipe;
pub mod single;
pub mod slow;
pub mod status;
pub mod succession;
pub mod table;
pub mod unary;
pub mod validate;
pub mod vigil;
pub mod watch;

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::{
    call::{CallError, Code, Reply},
    error::{Error, Halt},
    ledger::Ledger,
    metrics::METRICS,
    mvcc::read::ReadError,
    node::{CurrentReaders, Node, identity::RequestIds},
    proto::etcdserverpb::TxnRequest,
    state::{
        Kind, NOSPACE,
        txn_decode::{self, TxnDecodeError},
    },
    watch::Hub,
};
use company::Company;
use header::Header;
use pool::Pool;
use slow::Slow;
pub use table::Table;
use vigil::LeaderWatch;

/// Limits that apply to requests.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The maximum number of comparisons, or of operations in one branch, of a transaction.
    pub max_txn_ops: usize,
    /// The maximum size of a log entry.
    pub max_request_bytes: usize,
    /// The minimum TTL of a lease, in seconds.
    pub min_lease_seconds: i64,
}

impl Limits {
    /// etcd's allowance for the envelope of a gRPC message.
    const MESSAGE_OVERHEAD_BYTES: usize = 512 << 10;

    /// The largest message that is accepted from a client.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        self.max_request_bytes.saturating_add(Self::MESSAGE_OVERHEAD_BYTES)
    }
}

/// Everything that handlers need. There is one per process.
pub struct Api {
    /// Proposes requests and provides reads.
    pub node: Arc<Node>,
    /// Delivers events to watches.
    pub hub: Arc<Hub>,
    /// Fills the header of responses.
    pub header: Header,
    /// Limits that apply to requests.
    pub limits: Limits,
    /// Allocates request and lease IDs.
    pub ids: Arc<RequestIds>,
    /// Runs long reads.
    pub pool: Pool,
    /// Counts the memory that the server holds for clients.
    pub ledger: Arc<Ledger>,
    /// Communication with the other members.
    pub company: Company,
    /// The quota that `Status` reports.
    pub quota_bytes: i64,
    /// Ends streams that require a leader when there is none.
    pub vigil: Arc<LeaderWatch>,
    /// Whether a keep-alive of a known lease is answered without waiting until the committed entries are applied.
    pub fast_keep_alive: bool,
    /// Logs slow calls and reads.
    pub slow: Slow,
}

impl Api {
    /// The state that reads see.
    #[must_use]
    pub fn readers(&self) -> CurrentReaders {
        self.node.readers()
    }

    /// Proposes a request and answers with its outcome.
    pub fn propose(self: &Arc<Self>, kind: Kind, message: &[u8], reply: Reply) {
        let id = self.ids.next();
        let entry = crate::state::Command::encode(id, kind, message);
        if entry.len() > self.limits.max_request_bytes {
            return reply.answer(Err(Error::RequestTooLarge.into()));
        }
        let header = self.header.clone();
        self.node.propose_entry(id, entry, Box::new(move |outcome| reply.answer(header.answer(outcome))));
    }

    /// Runs a read on the call's own task: immediately if it is serializable, otherwise once all writes acknowledged before the
    /// call are visible on this member.
    pub fn read(&self, serializable: bool, reply: Reply, read: impl FnOnce(Reply) + Send + 'static) {
        if serializable || self.node.status().is_sole_leader() {
            return read(reply);
        }
        self.node.read_barrier(Box::new(move |outcome| match outcome {
            Ok(()) => reply.run(read),
            Err(error) => reply.answer(Err(error.into())),
        }));
    }

    /// Fails if the database has no space left for a write of this cost.
    pub fn check_quota(&self, cost: u64) -> Result<(), Error> {
        if self.node.fits_quota(cost) { Ok(()) } else { Err(Error::NoSpace) }
    }

    /// Answers a write that was not admitted. If the reason is lack of space, the NOSPACE alarm is raised first, unless this
    /// member has raised it already.
    pub fn reject_write(&self, error: Error, reply: Reply) {
        if error != Error::NoSpace || self.has_nospace_alarm() {
            return reply.answer(Err(error.into()));
        }
        self.node.raise_no_space(Box::new(move |_| reply.answer(Err(error.into()))));
    }

    fn has_nospace_alarm(&self) -> bool {
        let raised = self.readers().cluster.read().alarms.list(NOSPACE);
        raised.iter().any(|alarm| alarm.member_id == self.header.member_id())
    }
}

/// Decodes a client's message.
pub fn decode<M: Message + Default>(message: Bytes) -> Result<M, Error> {
    M::decode(message).map_err(|error| malformed(&error))
}

/// Decodes a message of a stream. As in grpc-go, the error text differs from that of a unary call.
pub fn decode_streamed<M: Message + Default>(message: Bytes) -> Result<M, CallError> {
    M::decode(message).map_err(|error| {
        let message = format!("grpc: failed to unmarshal the received message: {}", decode_error_text(&error));
        CallError { code: Code::Internal, message: message.into() }
    })
}

/// Decodes a client's transaction.
fn decode_txn(message: Bytes) -> Result<TxnRequest, Error> {
    txn_decode::decode(message).map_err(|why| match why {
        TxnDecodeError::Malformed(error) => malformed(&error),
        TxnDecodeError::TooDeep(_) => Error::TooManyOps, // Each level has at least one operation.
    })
}

fn malformed(error: &DecodeError) -> Error {
    Error::Malformed(decode_error_text(error).to_owned())
}

/// Go's error text for a message that cannot be decoded.
fn decode_error_text(error: &DecodeError) -> &'static str {
    tracing::debug!(%error, "failed to decode a request");
    METRICS.refused.with_label_values(&["message"]).inc();
    if error.to_string().ends_with("UTF-8 encoded") {
        "string field contains invalid UTF-8"
    } else {
        "proto: cannot parse invalid wire-format data"
    }
}

/// Converts the error of a read into that of a call. A storage error ends the process.
#[must_use]
pub fn refuse(failure: ReadError) -> CallError {
    match failure {
        ReadError::Refused(error) => error.into(),
        ReadError::Halt(halt) => halt_process(&halt),
    }
}

/// Aborts the process after a fatal storage error.
pub fn halt_process(halt: &Halt) -> ! {
    tracing::error!(error = %halt, "fatal storage error, aborting");
    std::process::abort()
}

/// The error of a method that is not implemented yet.
#[must_use]
pub fn not_implemented(what: &'static str) -> CallError {
    CallError { code: Code::Unimplemented, message: Cow::Borrowed(what) }
}
