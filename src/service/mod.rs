//! Every operation of the server, free of any protocol.
//!
//! ```text
//! frontend ── Caller, Request ──▶ Service ── proposes ──▶ node ──▶ state
//!     ▲                             │  └──── reads ────▶ the state that this member has applied
//!     └────── Reply ◀───────────────┘
//! ```
//!
//! A frontend decodes what its protocol sent, says on whose behalf it asks ([`Caller`]), and passes a typed request together
//! with a [`Reply`]. Each operation first passes [admission]. It then proposes an entry or reads, and answers through the
//! reply, from whichever thread knows the outcome; the reply encodes it for the protocol. No operation waits: what cannot be
//! answered at once is answered later. Operations of several steps, which may wait for hours, are futures ([`concurrency`]).

pub mod admission;
pub mod auth;
pub mod cluster;
pub mod concurrency;
pub mod health;
pub mod keep_alive;
pub mod kv;
pub mod leader_watch;
pub mod lease;
pub mod maintenance;
pub mod range_stream;
pub mod reply;
pub mod validate;
pub mod watch;

use std::{cell::RefCell, marker::PhantomData, sync::Arc, time::Instant};

use bytes::Bytes;
use prost::Message;

use crate::{
    cluster::Cluster,
    error::Error,
    metrics,
    mvcc::{meter::Meter, read::ReadError},
    node::{CurrentReaders, Node, low_priority::LowPriorityThreads, read_pool::ReadPool},
    slow_log::Thresholds,
    state::{Command, Kind, NOSPACE, Response, txn_decode::MAX_LEVELS},
    watch::Hub,
};
pub use admission::{Operation, Rule};
use auth::{Authentication, Identity};
use http2::ledger::Ledger;
use leader_watch::LeaderWatch;
pub use reply::Reply;

/// Limits that apply to requests.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// The maximum number of comparisons, or of operations in one branch, of a transaction.
    pub max_txn_ops: usize,
    /// The maximum number of levels of a nested transaction.
    pub max_txn_depth: usize,
    /// The maximum size of a log entry.
    pub max_request_bytes: usize,
    /// The maximum size of the answer to a read.
    pub max_answer_bytes: usize,
    /// The number of leases at which no more are granted.
    pub max_leases: usize,
    /// The minimum TTL of a lease, in seconds.
    pub min_lease_seconds: i64,
}

impl RequestLimits {
    /// The error of a transaction with too many levels to be decoded. Each level has at least one operation, so if fewer are
    /// allowed it is refused for that, as in etcd.
    #[must_use]
    pub fn refuse_levels(&self) -> Error {
        let error =
            if self.max_txn_ops < MAX_LEVELS { Error::TooManyOps } else { Error::TxnTooDeep(self.max_txn_depth) };
        admission::count_refusal(&error);
        error
    }
}

/// What is known about the connection of a caller.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CallerConnection {
    pub address: String,
    /// The common name in the certificate by which the client was verified.
    pub common_name: Option<Arc<str>>,
}

/// On whose behalf an operation is carried out, and under which conditions.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// What the caller has shown to be identified by.
    pub token: Option<Bytes>,
    /// The connection that it uses, if it uses one.
    pub connection: Option<Arc<CallerConnection>>,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// Whether the caller prefers an error to waiting while there is no leader.
    pub require_leader: bool,
    /// Whether this member has applied everything that was acknowledged before the request.
    pub(crate) is_confirmed: bool,
}

impl Caller {
    /// The same caller, when this member has applied everything that was acknowledged before the request.
    fn confirmed(&self) -> Self {
        Self { is_confirmed: true, ..self.clone() }
    }
}

/// A request of which the client's own encoding goes into the log.
#[derive(Debug, Clone)]
pub struct Request<T> {
    pub parsed: T,
    pub raw: Bytes,
}

impl<T: Message> Request<T> {
    /// A request that the server makes by itself.
    #[must_use]
    pub fn new(parsed: T) -> Self {
        Self { raw: parsed.encode_to_vec().into(), parsed }
    }
}

/// The outcome of a command: the state machine encodes the response once, for every replica alike, all but its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome<M> {
    pub revision: i64,
    /// The fields of `M` behind the header, encoded.
    pub body: Vec<u8>,
    message: PhantomData<fn() -> M>,
}

impl<M: Message + Default> Outcome<M> {
    /// The response, without its header.
    #[must_use]
    pub fn message(&self) -> M {
        M::decode(self.body.as_slice()).expect("the state machine encodes what it can decode")
    }
}

impl<M> From<Response> for Outcome<M> {
    fn from(response: Response) -> Self {
        Self { revision: response.revision, body: response.body, message: PhantomData }
    }
}

/// Everything that operations need. There is one per process.
pub struct Service {
    pub cluster: Arc<Cluster>,
    /// Delivers events to watches.
    pub hub: Arc<Hub>,
    pub limits: RequestLimits,
    pub authentication: Authentication,
    /// Runs hashes and defragmentations, one at a time.
    pub scans: LowPriorityThreads,
    /// Counts the memory that the server holds for clients.
    pub ledger: Arc<Ledger>,
    /// The quota that Status reports.
    pub quota_bytes: i64,
    /// Ends streams that require a leader when there is none.
    pub leader_watch: Arc<LeaderWatch>,
    /// Whether a keep-alive of a known lease is answered without waiting until the committed entries are applied.
    pub fast_keep_alive: bool,
    /// What takes longer is logged.
    pub thresholds: Thresholds,
}

impl Service {
    /// Proposes entries and provides reads.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.cluster.node
    }

    /// Runs long reads.
    #[must_use]
    pub fn read_pool(&self) -> &ReadPool {
        &self.cluster.read_pool
    }

    /// Runs a long read. Those of different connections take turns.
    fn run_long_read(&self, caller: &Caller, read: impl FnOnce() + Send + 'static) {
        let lane = caller.connection.as_ref().map_or(0, |connection| Arc::as_ptr(connection).addr());
        self.read_pool().run_in_lane(lane, read);
    }

    /// The state that reads see.
    #[must_use]
    pub fn readers(&self) -> CurrentReaders {
        self.node().readers()
    }

    /// The revision of the newest write that is visible here.
    fn head(&self) -> i64 {
        self.readers().keys.head()
    }

    /// Proposes a command on behalf of a user, and answers with its outcome.
    fn propose<M: 'static>(&self, identity: &Identity, kind: Kind, message: &[u8], reply: impl Reply<Outcome<M>>) {
        let id = self.cluster.ids.next();
        let entry = Command::encode_for(identity.requester(), id, kind, message);
        if entry.len() > self.limits.max_request_bytes {
            metrics::refused("request_bytes");
            return reply.answer(Err(Error::RequestTooLarge));
        }
        self.node().propose_entry(id, entry, Box::new(move |outcome| reply.answer(outcome.map(Into::into))));
    }

    /// Whether a read sees all that it must without waiting: a serializable one always, any other on a sole leader.
    fn can_read_now(&self, serializable: bool) -> bool {
        serializable || self.node().status().is_sole_leader()
    }

    /// Runs a read on the request's own task, once all writes acknowledged before the request are visible on this member.
    fn await_read<T, R: Reply<T>>(&self, reply: R, read: impl FnOnce(R) + Send + 'static) {
        self.node().read_barrier(Box::new(move |outcome| match outcome {
            Ok(()) => reply.run(read),
            Err(error) => reply.answer(Err(error)),
        }));
    }

    /// Runs a read on the request's own task: immediately if it can be, otherwise as soon as it can be.
    fn read<T, R: Reply<T>>(&self, serializable: bool, reply: R, read: impl FnOnce(R) + Send + 'static) {
        if self.can_read_now(serializable) { read(reply) } else { self.await_read(reply, read) }
    }

    /// Refuses an answer that is too large. What was read is already counted by the ledger, and is dropped.
    fn check_answer(&self, bytes: usize) -> Result<(), Error> {
        if bytes <= self.limits.max_answer_bytes {
            return Ok(());
        }
        metrics::refused("answer_bytes");
        Err(Error::AnswerTooLarge(self.limits.max_answer_bytes))
    }

    /// Answers a long read. The ledger counts what has been read until the answer is delivered, twice because the encoded answer
    /// is a copy. The read ends when the ledger's limit is reached, before it can fill the memory. Returns whether it succeeded.
    fn read_counted<T>(
        &self,
        identity: &Identity,
        reply: impl Reply<T>,
        encoded_len: impl FnOnce(&T) -> usize,
        read: impl FnOnce(Meter<'_>) -> Result<Option<T>, ReadError>,
    ) -> bool {
        if !reply.is_wanted() {
            return false;
        }
        let charge = RefCell::new(self.ledger.charge(0));
        let found = read(&|cost| charge.borrow_mut().try_grow(2 * cost));
        let outcome = found.map_err(read_error).and_then(|found| found.ok_or(Error::TooManyBytesUnread));
        let outcome = outcome.and_then(|found| self.check_answer(encoded_len(&found)).map(|()| found));
        let outcome = outcome.and_then(|found| self.unless_users_changed(identity, found));
        let is_success = outcome.is_ok();
        reply.answer_counted(outcome, charge.into_inner());
        is_success
    }

    /// Answers a write that was not admitted. If the reason is lack of space, the NOSPACE alarm is raised first, unless this
    /// member has raised it already.
    fn reject_write<T>(&self, error: Error, reply: impl Reply<T>) {
        if error != Error::NoSpace || self.has_nospace_alarm() {
            return reply.answer(Err(error));
        }
        self.node().raise_no_space(Box::new(move |_| reply.answer(Err(error))));
    }

    fn has_nospace_alarm(&self) -> bool {
        let raised = self.readers().cluster.read().alarms.list(NOSPACE);
        raised.iter().any(|alarm| alarm.member_id == self.cluster.member_id)
    }
}

/// Converts the error of a read into that of an operation. A storage error ends the process.
#[must_use]
pub fn read_error(error: ReadError) -> Error {
    match error {
        ReadError::Refused(error) => error,
        ReadError::Halt(halt) => halt.abort(),
    }
}
