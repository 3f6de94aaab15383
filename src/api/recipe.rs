//! Recipes: calls of several steps, each of which may wait, written from top to bottom.
//!
//! Handlers await nothing, because most calls have a single step. Taking a lock has half a dozen, and may wait for hours
//! between two of them. So a recipe is a future; and as no floor below `api` knows what that is, it runs inside a
//! [`Conversation`], stepped by the call's own task. It needs no runtime.
//!
//! A method that has one answer is served by a conversation too ([`super::table::Handler::Patient`]): a [`Reply`] does not
//! hear that its caller has gone, but a conversation is dropped then, the future with it, and everything that the future
//! holds. Whoever has something to take back when the caller goes holds it in a value whose `drop` does that. Calls that
//! answer at once, nearly all of them, pay nothing for it.
//!
//! What a recipe keeps of its message it copies ([`Caller::keep`]), because it may wait for hours, and a message may be much
//! longer than the fields that are needed. What it keeps is counted for the caller.
//!
//! The steps are ordinary calls, made in the caller's name through the same handlers that clients reach: admitted, counted,
//! and refused alike. Only the code of a refusal is lost, as it is in etcd.

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

use super::{Api, table::Unary, unary};
use crate::{
    call::{Call, Code, Conversation, Line, Mailbox, Metadata, Parcel, Refusal, Reply, Step},
    error::Error,
    ledger,
    mvcc::Interval,
    proto::{etcdserverpb::WatchResponse, mvccpb},
    watch::{Create, Request, Response, Subscriber, Wishes},
};

/// What a recipe that waits is counted for beside its message: its future, its key in the line, and the watch that it waits
/// for.
const RECIPE_BYTES: usize = 4 << 10;
/// The fields of a message are copied as they are, into the key, into watches and into requests that are made from it.
const COPIES: usize = 4;

/// A recipe that is being followed.
pub type Steps = Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send>>;

/// A recipe, begun by its first message.
pub struct Recipe {
    caller: Arc<Caller>,
    begin: fn(Arc<Caller>, Bytes) -> Steps,
    steps: Option<Steps>,
}

impl Recipe {
    /// A recipe for one call.
    pub fn open(api: &Arc<Api>, metadata: Metadata, begin: fn(Arc<Caller>, Bytes) -> Steps) -> Box<dyn Conversation> {
        let caller =
            Arc::new(Caller { api: api.clone(), metadata, saying: Mutex::default(), kept: AtomicUsize::new(0) });
        Box::new(Self { caller, begin, steps: None })
    }
}

impl Conversation for Recipe {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        let steps = match &mut self.steps {
            Some(steps) => steps,
            None => match line.receive() {
                Some(message) if message.len() > line.spare() => return Step::End(Err(ledger::too_much())),
                Some(message) => self.steps.insert((self.begin)(self.caller.clone(), message)),
                None if line.ended() => {
                    return Step::End(Err(Refusal { code: Code::Unknown, message: "EOF".into() }));
                }
                None => return Step::Wait,
            },
        };
        loop {
            if let Poll::Ready(end) = steps.as_mut().poll(&mut Context::from_waker(line.waker())) {
                return Step::End(end);
            }
            if !line.has_room() {
                return Step::Wait;
            }
            match self.caller.saying.lock().take() {
                Some(message) => line.send(message),
                None => return Step::Wait,
            }
        }
    }

    fn held(&self) -> usize {
        self.caller.kept.load(Ordering::Relaxed)
    }
}

/// The one who called, as the steps of a recipe see him.
pub struct Caller {
    /// The floors.
    pub api: Arc<Api>,
    metadata: Metadata,
    /// What the line has not taken yet.
    saying: Mutex<Option<Bytes>>,
    /// What is kept for this call.
    kept: AtomicUsize,
}

impl Caller {
    /// Keeps what was understood of the caller's message: a copy, which is counted.
    pub fn keep<M: Message + Default>(&self, message: &M) -> M {
        let fields = Bytes::from(message.encode_to_vec());
        self.kept.store(RECIPE_BYTES + COPIES * fields.len(), Ordering::Relaxed);
        M::decode(fields).expect("what was read can be read again")
    }

    /// Sends a message, and waits until the line has taken it.
    pub async fn say(&self, message: &impl Message) {
        *self.saying.lock() = Some(message.encode_to_vec().into());
        // The step that takes it polls again.
        poll_fn(|_| if self.saying.lock().is_some() { Poll::Pending } else { Poll::Ready(()) }).await;
    }

    /// Makes a call in the caller's name.
    pub async fn ask<R: Message + Default>(&self, handler: Unary, request: &impl Message) -> Result<R, Refusal> {
        let answer = unary::run(&self.api, handler, self.call(request)).await;
        let message = answer.map_err(|refusal| Refusal { code: Code::Unknown, ..refusal })?;
        Ok(R::decode(message).expect("our own answers can be read"))
    }

    /// Makes a call in the caller's name whose answer nobody waits for.
    pub fn tell(&self, handler: Unary, request: &impl Message) {
        handler(&self.api, self.call(request), Reply::new(Arc::new(Nobody), 0));
    }

    /// Follows some keys: every change from revision `from` on.
    #[must_use]
    pub fn follow(&self, interval: Interval, from: i64) -> Changes {
        let mut subscriber = self.api.hub.open();
        subscriber.ask(Request::Create(Create { id: 0, interval, start: from, wishes: Wishes::default() }));
        Changes { subscriber, heard: VecDeque::new() }
    }

    fn call(&self, request: &impl Message) -> Call {
        Call { metadata: self.metadata.clone(), message: request.encode_to_vec().into() }
    }
}

/// Has no use for answers.
struct Nobody;

impl Mailbox for Nobody {
    fn put(self: Arc<Self>, slot: u64, parcel: Parcel) {
        if let Parcel::Work(work) = parcel {
            work(Reply::new(self, slot));
        }
    }
}

/// A refusal of the recipe's own.
#[must_use]
pub fn refusal(text: &'static str) -> Refusal {
    Refusal { code: Code::Unknown, message: text.into() }
}

/// Changes to some keys, as they happen.
pub struct Changes {
    subscriber: Subscriber,
    heard: VecDeque<Response>,
}

/// Changes that were heard of together.
pub struct Change {
    /// The revision for the header of whatever is said of them.
    pub revision: i64,
    /// Oldest first.
    pub events: Vec<mvccpb::Event>,
}

impl Changes {
    /// The next changes. None if some are forgotten already: then read again, and follow from there.
    pub async fn next(&mut self) -> Result<Option<Change>, Refusal> {
        loop {
            match self.response().await? {
                Response::Events(events) => {
                    let frames = events.frames.as_slice().concat();
                    let heard = WatchResponse::decode(frames.as_slice()).expect("our own events can be read");
                    return Ok(Some(Change { revision: events.revision, events: heard.events }));
                }
                Response::Compacted { .. } | Response::Refused { .. } | Response::Canceled { .. } => return Ok(None),
                Response::Created { .. } | Response::Progress { .. } => (),
            }
        }
    }

    async fn response(&mut self) -> Result<Response, Refusal> {
        poll_fn(|context| {
            while self.heard.is_empty() {
                let taken = self.subscriber.take(&mut self.heard, context.waker());
                if taken.is_err() {
                    return Poll::Ready(Err(Refusal { code: Code::Unknown, ..Error::Stopped.into() }));
                }
                if self.heard.is_empty() {
                    return Poll::Pending;
                }
            }
            Poll::Ready(Ok(self.heard.pop_front().expect("it is not empty")))
        })
        .await
    }
}
