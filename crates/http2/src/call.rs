//! One call, as its handler sees it. It is independent of the transport and of the message types: a unary call is metadata and
//! bytes, and a [`Reply`] that is used once, from any thread.
//!
//! A unary handler gets a [`Call`] and a [`Reply`]. It must not block, await or spawn: it answers immediately, or passes the
//! reply to the component that will have the answer. A reply is delivered to the call's sink, where it stays until the
//! call's own task runs; a piece of [`DeferredWork`] delivered there *runs* on that task. So threads that serve all clients
//! (raft, apply) never encode a large answer or read the disk for a single client.
//!
//! A streaming handler creates a [`Conversation`]: a value that the call's own task steps whenever a message has arrived, the
//! sink has capacity again, or another thread has woken it.

use std::{any::Any, borrow::Cow, sync::Arc, task::Waker, time::Instant};

use bytes::Bytes;

/// gRPC's status codes, with gRPC's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Ok = 0,
    Canceled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

/// The status of a call that fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallError {
    pub code: Code,
    pub message: Cow<'static, str>,
}

/// The result of a call: an encoded message, or an error status.
pub type CallResult = Result<Bytes, CallError>;

/// Code to run on the call's own task. It answers through the reply that it is given.
pub type DeferredWork = Box<dyn FnOnce(Reply) + Send>;

/// What can be delivered to a call.
pub enum Delivery {
    Answer(CallResult),
    /// Work that produces the answer.
    Work(DeferredWork),
}

/// Receives deliveries for calls in progress. Implemented by the transports, per call or per connection.
pub trait ReplySink: Send + Sync {
    /// Makes a delivery to the call in `slot` and wakes the call's task. Must be fast and must not block: the raft and apply
    /// threads call it.
    fn put(self: Arc<Self>, slot: u64, delivery: Delivery);
    /// Whether an answer to the call in `slot` can still be sent, as far as the transport knows.
    fn is_open(&self, _slot: u64) -> bool {
        true
    }
}

/// The handle to answer one call, once. If it is dropped unused, the client is told that the server is stopping.
pub struct Reply {
    sink: Option<Arc<dyn ReplySink>>,
    slot: u64,
}

impl Reply {
    #[must_use]
    pub fn new(sink: Arc<dyn ReplySink>, slot: u64) -> Self {
        Self { sink: Some(sink), slot }
    }

    pub fn answer(self, answer: CallResult) {
        self.put(Delivery::Answer(answer));
    }

    /// Runs `work` on the call's own task.
    pub fn run(self, work: impl FnOnce(Reply) + Send + 'static) {
        self.put(Delivery::Work(Box::new(work)));
    }

    /// Whether the answer can still be sent. Callers should check this before expensive work.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.sink.as_ref().is_some_and(|sink| sink.is_open(self.slot))
    }

    fn put(mut self, delivery: Delivery) {
        let sink = self.sink.take().expect("a reply is used once, and using it consumes it");
        sink.put(self.slot, delivery);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(sink) = self.sink.take() {
            let stopped = CallError { code: Code::Unavailable, message: Cow::Borrowed("etcdserver: server stopped") };
            sink.put(self.slot, Delivery::Answer(Err(stopped)));
        }
    }
}

/// So many header fields a [`Service`](crate::service::Service) may name to have them kept for its methods.
pub const MAX_METADATA_FIELDS: usize = 4;

/// The call's metadata, as far as handlers need it.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    /// The first value of each header field that the service has named, in its order.
    pub fields: [Option<Bytes>; MAX_METADATA_FIELDS],
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// What was attached to the connection of the call.
    pub connection: Option<ConnectionInfo>,
}

/// What the owner of a connection attaches to it, for the handlers of its calls.
pub type ConnectionInfo = Arc<dyn Any + Send + Sync>;

/// One unary call.
pub struct Call {
    pub metadata: Metadata,
    /// The encoded request.
    pub message: Bytes,
}

/// A streaming call as a value. Its owner steps it on the call's own task and drops it when the client has disconnected.
pub trait Conversation: Send {
    /// Does everything that can be done now. Before it returns [`Step::Wait`] it must have received all messages that have
    /// arrived, or filled the sink, and it must have arranged that `line.waker()` is woken when anything else that it waits for
    /// is ready.
    fn step(&mut self, line: &mut dyn StreamIo) -> Step;

    /// The bytes that are held for it outside the transport: state that the client has created, such as watches, and messages
    /// that are not sent yet. Called after each step, and charged to the client's connection; must be fast.
    fn held_bytes(&self) -> usize {
        0
    }
}

/// The result of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Step again when a message arrives, when the sink has capacity again, or when woken.
    Wait,
    /// The stream ends; `Ok` is a normal end, status OK.
    End(Result<(), CallError>),
}

/// Both directions of a streaming call, for use during one step.
pub trait StreamIo {
    /// The next message, if one has arrived.
    fn receive(&mut self) -> Option<Bytes>;
    /// Whether the client has half-closed the stream, so that no more messages will arrive.
    fn is_half_closed(&self) -> bool;
    /// Whether the sink has capacity for another message.
    fn can_send(&self) -> bool;
    /// Sends a message. Callers must check [`StreamIo::can_send`] first: a message beyond the capacity is buffered too.
    fn send(&mut self, message: Bytes);
    /// How many bytes may be kept for this call beyond what [`Conversation::held_bytes`] reported after the last step.
    fn spare_bytes(&self) -> usize {
        usize::MAX
    }
    /// Wakes the call's task; may be used from any thread, any number of times.
    fn waker(&self) -> &Waker;
}
