//! Conversations that are written as async functions: calls of several steps, each of which may wait.
//!
//! Handlers await nothing, because most calls have a single step. Acquiring a lock has half a dozen, and may wait for hours
//! between two of them. So such a call is a future. As no layer below `api` knows futures, it runs inside a [`Conversation`]
//! that is stepped by the call's own task. It needs no runtime.
//!
//! Unary methods of this kind are served by a conversation too ([`super::table::Handler::Patient`]): a [`Reply`] is not told
//! when its call is canceled, but a conversation is dropped then, together with the future and everything that the future
//! holds. A step that must be undone on cancellation is therefore held as a value whose `drop` undoes it. Calls that are
//! answered immediately, nearly all of them, pay nothing for this.
//!
//! The future copies what it needs of the request ([`Caller::retain`]), because it may wait for hours and a message may be much
//! longer than the fields that are needed. What it retains counts as held for the caller.
//!
//! The steps are ordinary calls, made with the caller's metadata through the same handlers that clients reach. They are
//! admitted, counted and refused in the same way. Only the code of a refusal is lost, as in etcd.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;

use super::{Api, table::UnaryHandler, unary};
use crate::{
    call::{Call, CallError, Code, Conversation, Delivery, Metadata, Reply, ReplySink, Step, StreamIo},
    error::Error,
    ledger,
    mvcc::Interval,
    proto::{etcdserverpb::WatchResponse, mvccpb},
    watch::{Create, Request, Response, Subscriber, WatchOptions},
};

/// What a waiting conversation counts as held beside its request: its future, its key in the queue, and the watch that it waits
/// on.
const CONVERSATION_BYTES: usize = 4 << 10;
/// The fields of a request exist this many times: in the request, in the key, in watches and in the requests of the steps.
const COPIES: usize = 4;

/// The future that answers a call.
pub type ConversationFuture = Pin<Box<dyn Future<Output = Result<(), CallError>> + Send>>;

/// A conversation that runs a future, which begins when the request arrives.
pub struct AsyncConversation {
    caller: Arc<Caller>,
    begin: fn(Arc<Caller>, Bytes) -> ConversationFuture,
    future: Option<ConversationFuture>,
}

impl AsyncConversation {
    /// The conversation of one call.
    pub fn open(
        api: &Arc<Api>,
        metadata: Metadata,
        begin: fn(Arc<Caller>, Bytes) -> ConversationFuture,
    ) -> Box<dyn Conversation> {
        let caller = Arc::new(Caller {
            api: api.clone(),
            metadata,
            outgoing: Mutex::default(),
            retained_bytes: AtomicUsize::new(0),
        });
        Box::new(Self { caller, begin, future: None })
    }
}

impl Conversation for AsyncConversation {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        let future = match &mut self.future {
            Some(future) => future,
            None => match line.receive() {
                Some(message) if message.len() > line.spare_bytes() => {
                    return Step::End(Err(ledger::request_over_limit()));
                }
                Some(message) => self.future.insert((self.begin)(self.caller.clone(), message)),
                None if line.is_half_closed() => {
                    return Step::End(Err(CallError { code: Code::Unknown, message: "EOF".into() }));
                }
                None => return Step::Wait,
            },
        };
        loop {
            if let Poll::Ready(end) = future.as_mut().poll(&mut Context::from_waker(line.waker())) {
                return Step::End(end);
            }
            if !line.can_send() {
                return Step::Wait;
            }
            match self.caller.outgoing.lock().take() {
                Some(message) => line.send(message),
                None => return Step::Wait,
            }
        }
    }

    fn held_bytes(&self) -> usize {
        self.caller.retained_bytes.load(Ordering::Relaxed)
    }
}

/// The caller, as the steps of its call see it.
pub struct Caller {
    pub api: Arc<Api>,
    metadata: Metadata,
    /// A message that has not been passed to the line yet.
    outgoing: Mutex<Option<Bytes>>,
    /// What this call counts as held.
    retained_bytes: AtomicUsize,
}

impl Caller {
    /// Copies the decoded request, so that it does not keep the received buffer, and counts the copy as held.
    pub fn retain<M: Message + Default>(&self, message: &M) -> M {
        let fields = Bytes::from(message.encode_to_vec());
        self.retained_bytes.store(CONVERSATION_BYTES + COPIES * fields.len(), Ordering::Relaxed);
        M::decode(fields).expect("what was just encoded can be decoded")
    }

    /// Sends a message, and waits until it has been passed to the line.
    pub async fn send(&self, message: &impl Message) {
        *self.outgoing.lock() = Some(message.encode_to_vec().into());
        // The step that passes it on polls again.
        poll_fn(|_| if self.outgoing.lock().is_some() { Poll::Pending } else { Poll::Ready(()) }).await;
    }

    /// Makes a call with the caller's metadata.
    pub async fn call<R: Message + Default>(
        &self,
        handler: UnaryHandler,
        request: &impl Message,
    ) -> Result<R, CallError> {
        let answer = unary::run(&self.api, handler, self.new_call(request)).await;
        let message = answer.map_err(|refusal| CallError { code: Code::Unknown, ..refusal })?;
        Ok(R::decode(message).expect("our own responses can be decoded"))
    }

    /// Makes a call with the caller's metadata without waiting for the response.
    pub fn call_detached(&self, handler: UnaryHandler, request: &impl Message) {
        handler(&self.api, self.new_call(request), Reply::new(Arc::new(DiscardingMailbox), 0));
    }

    /// Watches some keys from revision `from` on.
    #[must_use]
    pub fn watch(&self, interval: Interval, from: i64) -> ChangeStream {
        let mut subscriber = self.api.hub.open();
        subscriber.send_request(Request::Create(Create {
            id: 0,
            interval,
            start: from,
            options: WatchOptions::default(),
        }));
        ChangeStream { subscriber, received: VecDeque::new() }
    }

    fn new_call(&self, request: &impl Message) -> Call {
        Call { metadata: self.metadata.clone(), message: request.encode_to_vec().into() }
    }
}

/// Discards answers.
struct DiscardingMailbox;

impl ReplySink for DiscardingMailbox {
    fn put(self: Arc<Self>, slot: u64, parcel: Delivery) {
        if let Delivery::Work(work) = parcel {
            work(Reply::new(self, slot));
        }
    }
}

/// An error of the call's own, with code `Unknown` as in etcd.
#[must_use]
pub fn refusal(text: &'static str) -> CallError {
    CallError { code: Code::Unknown, message: text.into() }
}

/// Changes to some keys, as they happen.
pub struct ChangeStream {
    subscriber: Subscriber,
    received: VecDeque<Response>,
}

/// Changes that were received together.
pub struct ChangeBatch {
    /// The revision for the header of responses about them.
    pub revision: i64,
    /// Oldest first.
    pub events: Vec<mvccpb::Event>,
}

impl ChangeStream {
    /// Waits for the next changes. None if some have been compacted or the watch has ended: callers must read again, and watch
    /// from there.
    pub async fn next(&mut self) -> Result<Option<ChangeBatch>, CallError> {
        loop {
            match self.response().await? {
                Response::Events(events) => {
                    let frames = events.frames.as_slice().concat();
                    let response = WatchResponse::decode(frames.as_slice()).expect("our own events can be decoded");
                    return Ok(Some(ChangeBatch { revision: events.revision, events: response.events }));
                }
                Response::Compacted { .. } | Response::Refused { .. } | Response::Canceled { .. } => return Ok(None),
                Response::Created { .. } | Response::Progress { .. } => (),
            }
        }
    }

    async fn response(&mut self) -> Result<Response, CallError> {
        poll_fn(|context| {
            while self.received.is_empty() {
                let taken = self.subscriber.take(&mut self.received, context.waker());
                if taken.is_err() {
                    return Poll::Ready(Err(CallError { code: Code::Unknown, ..Error::Stopped.into() }));
                }
                if self.received.is_empty() {
                    return Poll::Pending;
                }
            }
            Poll::Ready(Ok(self.received.pop_front().expect("it is not empty")))
        })
        .await
    }
}
