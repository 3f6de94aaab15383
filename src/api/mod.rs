//! What clients say, translated: bytes in, bytes out. Decides nothing about data, and names no type of any transport but
//! in [`grpc`].
//!
//! The [`Table`] maps a path to a handler. A unary handler takes a [`Call`](crate::call::Call) and a [`Reply`]; it answers at once or hands
//! the reply on, and never waits. A streaming handler makes a [`Conversation`](crate::call::Conversation). Any transport that can carry bytes and
//! paths can serve the table.

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
    call::{Code, Refusal, Reply},
    error::{Error, Halt},
    ledger::Ledger,
    metrics::METRICS,
    mvcc::read::Failure,
    node::{Node, Present, identity::RequestIds},
    proto::etcdserverpb::TxnRequest,
    state::{
        Kind, NOSPACE,
        nesting::{self, Unreadable},
    },
    watch::Hub,
};
use company::Company;
use header::Header;
use pool::Pool;
use slow::Slow;
pub use table::Table;
use vigil::Vigil;

/// The bounds that requests are held to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Comparisons, or operations of a branch, in one transaction.
    pub max_txn_ops: usize,
    /// Bytes of one entry of the log.
    pub max_request_bytes: usize,
    /// The shortest time that a lease is granted for, in seconds.
    pub min_lease_seconds: i64,
}

impl Limits {
    /// What etcd adds for the envelope of a gRPC message.
    const MESSAGE_OVERHEAD_BYTES: usize = 512 << 10;

    /// The largest message that is taken from a client.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        self.max_request_bytes.saturating_add(Self::MESSAGE_OVERHEAD_BYTES)
    }
}

/// Everything that handlers need. One for the process.
pub struct Api {
    /// Agreement.
    pub node: Arc<Node>,
    /// Who tells of changes.
    pub hub: Arc<Hub>,
    /// Who answers.
    pub header: Header,
    /// What is admitted.
    pub limits: Limits,
    /// Where IDs come from.
    pub ids: Arc<RequestIds>,
    /// Where long reads run.
    pub pool: Pool,
    /// Where everything is counted that clients make the server keep.
    pub ledger: Arc<Ledger>,
    /// The other members.
    pub company: Company,
    /// What `Status` shows as the quota.
    pub quota_bytes: i64,
    /// Who ends streams that want a leader when there is none.
    pub vigil: Arc<Vigil>,
    /// Whether a keep-alive of a known lease waits for nothing.
    pub fast_keep_alive: bool,
    /// What is worth a line in the log.
    pub slow: Slow,
}

impl Api {
    /// What readers see.
    #[must_use]
    pub fn readers(&self) -> Present {
        self.node.readers()
    }

    /// Proposes a request and answers with what it came to.
    pub fn propose(self: &Arc<Self>, kind: Kind, message: &[u8], reply: Reply) {
        let id = self.ids.next();
        let entry = crate::state::Command::encode(id, kind, message);
        if entry.len() > self.limits.max_request_bytes {
            return reply.answer(Err(Error::RequestTooLarge.into()));
        }
        let header = self.header.clone();
        self.node.propose_entry(id, entry, Box::new(move |outcome| reply.answer(header.answer(outcome))));
    }

    /// Runs a read on the call's own task: at once, or for a linearizable one when all that was acknowledged before is
    /// visible here.
    pub fn read(&self, serializable: bool, reply: Reply, read: impl FnOnce(Reply) + Send + 'static) {
        if serializable || self.node.status().rules_alone() {
            return read(reply);
        }
        self.node.read_barrier(Box::new(move |outcome| match outcome {
            Ok(()) => reply.run(read),
            Err(error) => reply.answer(Err(error.into())),
        }));
    }

    /// Refuses what no longer fits.
    pub fn check_quota(&self, cost: u64) -> Result<(), Error> {
        if self.node.has_room_for(cost) { Ok(()) } else { Err(Error::NoSpace) }
    }

    /// Answers a write that was not admitted. For want of space the cluster is told first, unless it knows.
    pub fn turn_away(&self, error: Error, reply: Reply) {
        if error != Error::NoSpace || self.is_known_full() {
            return reply.answer(Err(error.into()));
        }
        self.node.turn_away(Box::new(move |_| reply.answer(Err(error.into()))));
    }

    fn is_known_full(&self) -> bool {
        let raised = self.readers().board.read().alarms.list(NOSPACE);
        raised.iter().any(|alarm| alarm.member_id == self.header.member_id())
    }
}

/// Reads a message that a client sent.
pub fn decode<M: Message + Default>(message: Bytes) -> Result<M, Error> {
    M::decode(message).map_err(|error| unreadable(&error))
}

/// Reads a message of a stream. What is wrong is said in other words than of a unary call's, as in grpc-go.
pub fn decode_streamed<M: Message + Default>(message: Bytes) -> Result<M, Refusal> {
    M::decode(message).map_err(|error| {
        let message = format!("grpc: failed to unmarshal the received message: {}", what_is_unreadable(&error));
        Refusal { code: Code::Internal, message: message.into() }
    })
}

/// Reads a transaction that a client sent.
fn decode_txn(message: Bytes) -> Result<TxnRequest, Error> {
    nesting::decode(message).map_err(|why| match why {
        Unreadable::Malformed(error) => unreadable(&error),
        Unreadable::TooDeep(_) => Error::TooManyOps, // Each level has one at least.
    })
}

fn unreadable(error: &DecodeError) -> Error {
    Error::Malformed(what_is_unreadable(error).to_owned())
}

/// Go's text for a message that cannot be read.
fn what_is_unreadable(error: &DecodeError) -> &'static str {
    tracing::debug!(%error, "a message that cannot be read");
    METRICS.refused.with_label_values(&["message"]).inc();
    if error.to_string().ends_with("UTF-8 encoded") {
        "string field contains invalid UTF-8"
    } else {
        "proto: cannot parse invalid wire-format data"
    }
}

/// Turns a failed read into an answer. A failing disk ends the process.
#[must_use]
pub fn refuse(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(error) => error.into(),
        Failure::Halted(halt) => halt_process(&halt),
    }
}

/// Ends the process: the database cannot be read any more.
pub fn halt_process(halt: &Halt) -> ! {
    tracing::error!(error = %halt, "cannot go on");
    std::process::abort()
}

/// A refusal of a method that does not work yet.
#[must_use]
pub fn not_yet(what: &'static str) -> Refusal {
    Refusal { code: Code::Unimplemented, message: Cow::Borrowed(what) }
}
