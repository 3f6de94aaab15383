//! One call, as whoever answers it sees it. Knows no transport and no message: a call is a path's metadata and bytes, and
//! a [`Reply`] to be used once, from any thread.
//!
//! A unary handler gets a [`Call`] and a [`Reply`]. It awaits nothing and spawns nothing: it answers at once, or hands the
//! reply on to whoever will know the answer. What is put into a reply lies in the call's mailbox until the call's own task
//! comes by; a piece of [`Work`] put there *runs* on that task. So a thread that serves everybody (raft, apply) never
//! encodes a large answer or reads the disk for one client.
//!
//! A streaming handler makes a [`Conversation`]: a value that the call's own task steps whenever a message came, the sink
//! has room again, or another thread woke it.

use std::{borrow::Cow, sync::Arc, task::Waker, time::Instant};

use bytes::Bytes;

/// gRPC's status codes, with gRPC's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "gRPC names them")]
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

/// A call that ends badly: the code and the words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of failure.
    pub code: Code,
    /// What the client reads.
    pub message: Cow<'static, str>,
}

/// What a call ends with: an encoded message, or a refusal.
pub type Answer = Result<Bytes, Refusal>;

/// Something that the call's own task shall run; it answers with the reply that it is given.
pub type Work = Box<dyn FnOnce(Reply) + Send>;

/// What may lie in a call's mailbox.
pub enum Parcel {
    /// The end of the call.
    Answer(Answer),
    /// Work that will lead to it.
    Work(Work),
}

/// Where parcels are put for calls in progress. A transport implements it, per call or per connection.
pub trait Mailbox: Send + Sync {
    /// Takes a parcel for the call in `slot` and wakes the call's task. Must be quick: busy threads call it.
    fn put(self: Arc<Self>, slot: u64, parcel: Parcel);
    /// Whether an answer for the call in `slot` is still of use, as far as that is known here.
    fn is_open(&self, _slot: u64) -> bool {
        true
    }
}

/// The right to answer one call, once. Dropped unused, it tells the client that the server is going away.
pub struct Reply {
    mailbox: Option<Arc<dyn Mailbox>>,
    slot: u64,
}

impl Reply {
    /// A reply for the call in `slot` of `mailbox`.
    #[must_use]
    pub fn new(mailbox: Arc<dyn Mailbox>, slot: u64) -> Self {
        Self { mailbox: Some(mailbox), slot }
    }

    /// Ends the call.
    pub fn answer(self, answer: Answer) {
        self.put(Parcel::Answer(answer));
    }

    /// Has the call's own task run `work`.
    pub fn run(self, work: impl FnOnce(Reply) + Send + 'static) {
        self.put(Parcel::Work(Box::new(work)));
    }

    /// Whether the answer is still of use. Ask before work that takes long.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.mailbox.as_ref().is_some_and(|mailbox| mailbox.is_open(self.slot))
    }

    fn put(mut self, parcel: Parcel) {
        let mailbox = self.mailbox.take().expect("a reply is used once, and using it consumes it");
        mailbox.put(self.slot, parcel);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(mailbox) = self.mailbox.take() {
            let stopped = Refusal { code: Code::Unavailable, message: Cow::Borrowed("etcdserver: server stopped") };
            mailbox.put(self.slot, Parcel::Answer(Err(stopped)));
        }
    }
}

/// What the caller said beside the message.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    /// `hasleader: true`: refuse rather than wait while there is no leader.
    pub require_leader: bool,
    /// `token`, or `authorization`.
    pub token: Option<String>,
    /// `client-api-version`, byte for byte.
    pub client_api_version: Option<Bytes>,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
}

/// One unary call.
pub struct Call {
    /// What came with the message.
    pub metadata: Metadata,
    /// The encoded request.
    pub message: Bytes,
}

/// A streaming call as a value. Its owner steps it on the call's own task; dropping it means that the caller is gone.
pub trait Conversation: Send {
    /// Does all that can be done now. Before it returns [`Step::Wait`] it has read every message there was, or filled the
    /// sink, and made sure that `line.waker()` is called when something of its own is ready.
    fn step(&mut self, line: &mut dyn Line) -> Step;

    /// How many bytes are kept for it elsewhere: what its caller has asked to be remembered, and messages that it has not sent
    /// yet. Asked after each step, and counted as held for the caller's connection; must be quick.
    fn held(&self) -> usize {
        0
    }
}

/// What a step came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Step again when a message comes, when the sink has room again, or when woken.
    Wait,
    /// The stream ends; `Ok` is a normal end.
    End(Result<(), Refusal>),
}

/// The line to the caller of a streaming call, during one step.
pub trait Line {
    /// The next message, if one has come.
    fn receive(&mut self) -> Option<Bytes>;
    /// No message will ever come again (the caller half-closed).
    fn ended(&self) -> bool;
    /// Whether the sink takes another message without growing beyond its bound.
    fn has_room(&self) -> bool;
    /// Sends a message. What is sent without room is kept nevertheless: ask first.
    fn send(&mut self, message: Bytes);
    /// How many bytes more than [`Conversation::held`] said after the last step may be kept for the caller.
    fn spare(&self) -> usize {
        usize::MAX
    }
    /// Wakes this conversation's task, from any thread, any number of times.
    fn waker(&self) -> &Waker;
}
