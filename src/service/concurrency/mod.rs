//! Locks and elections: operations of several steps, each of which may wait.
//!
//! Other operations have a single step and answer through a reply. Acquiring a lock has half a dozen steps, and may wait for
//! hours between two of them. So these operations are futures, which need no runtime: whatever polls them is woken when there is
//! something to do. When the client goes away the future is dropped, together with everything it holds. A step that must be
//! undone then is held as a value whose `drop` undoes it ([`queue::QueueEntry`]).
//!
//! The steps are ordinary operations, on the caller's behalf: admitted, counted and refused in the same way. Only the code of
//! an error is lost, as in etcd.

pub mod election;
pub mod lock;
pub mod queue;

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
};

use parking_lot::Mutex;
use prost::Message;

use super::{Caller, Operation, Reply, Request, Service};
use crate::{
    error::Error,
    mvcc::Interval,
    proto::{
        etcdserverpb::{
            DeleteRangeRequest, LeaseGrantRequest, LeaseGrantResponse, RangeRequest, TxnRequest, TxnResponse,
            WatchResponse,
        },
        mvccpb::{Event, KeyValue},
    },
    watch::{self, Create, Response, Subscriber, WatchOptions},
};

/// The steps of one such operation, made on behalf of its caller.
#[derive(Clone)]
pub struct Session {
    service: Arc<Service>,
    caller: Caller,
    /// The bytes that are held for the watch that the operation waits on.
    held: Arc<AtomicUsize>,
}

impl Session {
    pub fn open(service: &Arc<Service>, caller: Caller) -> Result<Self, Error> {
        service.check_request(&caller, &Operation::Concurrency)?;
        Ok(Self { service: service.clone(), caller, held: Arc::default() })
    }

    /// The bytes held for the operation beside what its future holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Reads keys. Returns the newest revision, too.
    async fn range(&self, request: RangeRequest) -> Result<(i64, Vec<KeyValue>), Error> {
        let found = answered(|reply| self.service.range(&self.caller, request, reply)).await?;
        let decode = |record| KeyValue::decode(record).expect("records are read back as they were written");
        Ok((found.head, found.rows.records.into_iter().map(decode).collect()))
    }

    async fn txn(&self, txn: TxnRequest) -> Result<(i64, TxnResponse), Error> {
        let outcome = answered(|reply| self.service.txn(&self.caller, Request::new(txn), reply)).await?;
        Ok((outcome.revision, outcome.message()))
    }

    /// Makes a transaction whose outcome nothing waits for.
    fn txn_detached(&self, txn: TxnRequest) {
        self.service.txn(&self.caller, Request::new(txn), Ignored);
    }

    /// Deletes keys. Returns the revision.
    async fn delete_range(&self, request: DeleteRangeRequest) -> Result<i64, Error> {
        let request = Request::new(request);
        let outcome = answered(|reply| self.service.delete_range(&self.caller, request, reply)).await?;
        Ok(outcome.revision)
    }

    async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        let outcome = answered(|reply| self.service.lease_grant(&self.caller, request, reply)).await?;
        Ok(outcome.message())
    }

    /// Watches some keys, from revision `from` on.
    fn watch(&self, interval: Interval, from: i64) -> ChangeStream {
        let mut subscriber = self.service.hub.open();
        subscriber.send_request(watch::Request::Create(Create {
            id: 0,
            interval,
            start: from,
            options: WatchOptions::default(),
        }));
        ChangeStream { subscriber, responses: VecDeque::new(), held: self.held.clone() }
    }

    fn head(&self) -> i64 {
        self.service.head()
    }
}

/// Makes a step and waits for its outcome. The code of an error is lost, as in etcd.
async fn answered<T: Send + 'static>(ask: impl FnOnce(AwaitedReply<T>)) -> Result<T, Error> {
    let slot = Arc::new(Slot::default());
    ask(AwaitedReply { slot: Some(slot.clone()) });
    loop {
        match poll_fn(|context| slot.poll(context.waker())).await {
            Sent::Outcome(outcome) => {
                return outcome.map_err(|error| Error::Unknown(error.to_string()));
            }
            Sent::Work(work) => work(AwaitedReply { slot: Some(slot.clone()) }),
        }
    }
}

/// Runs on the task that waits, and answers through the reply.
type Work<T> = Box<dyn FnOnce(AwaitedReply<T>) + Send>;

enum Sent<T: Send + 'static> {
    Outcome(Result<T, Error>),
    Work(Work<T>),
}

/// Where a step's outcome is put.
struct Slot<T: Send + 'static>(Mutex<(Option<Sent<T>>, Option<Waker>)>);

impl<T: Send + 'static> Default for Slot<T> {
    fn default() -> Self {
        Self(Mutex::new((None, None)))
    }
}

impl<T: Send + 'static> Slot<T> {
    fn put(&self, sent: Sent<T>) {
        let mut state = self.0.lock();
        state.0 = Some(sent);
        let waker = state.1.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll(&self, waker: &Waker) -> Poll<Sent<T>> {
        let mut state = self.0.lock();
        if let Some(sent) = state.0.take() {
            return Poll::Ready(sent);
        }
        state.1 = Some(waker.clone());
        Poll::Pending
    }
}

/// The reply of a step.
struct AwaitedReply<T: Send + 'static> {
    slot: Option<Arc<Slot<T>>>,
}

impl<T: Send + 'static> Reply<T> for AwaitedReply<T> {
    fn answer(mut self, outcome: Result<T, Error>) {
        if let Some(slot) = self.slot.take() {
            slot.put(Sent::Outcome(outcome));
        }
    }

    fn run(mut self, work: impl FnOnce(Self) + Send + 'static) {
        if let Some(slot) = self.slot.take() {
            slot.put(Sent::Work(Box::new(work)));
        }
    }
}

/// A reply that is dropped unused, because the server stops, ends the wait.
impl<T: Send + 'static> Drop for AwaitedReply<T> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.put(Sent::Outcome(Err(Error::Stopped)));
        }
    }
}

/// The reply of a request whose outcome nothing waits for.
struct Ignored;

impl<T> Reply<T> for Ignored {
    fn answer(self, _outcome: Result<T, Error>) {}

    fn run(self, work: impl FnOnce(Self) + Send + 'static) {
        work(self);
    }
}

/// The changes of some keys.
struct ChangeStream {
    subscriber: Subscriber,
    responses: VecDeque<Response>,
    held: Arc<AtomicUsize>,
}

/// The changes of one response.
struct ChangeBatch {
    /// The revision of the response.
    revision: i64,
    /// Oldest first.
    events: Vec<Event>,
}

impl ChangeStream {
    /// The next changes. None if some of them are compacted: then the keys have to be read, and watched from there.
    async fn next(&mut self) -> Result<Option<ChangeBatch>, Error> {
        loop {
            match self.response().await? {
                Response::Events(events) => {
                    let frames = events.frames.as_slice().concat();
                    let response =
                        WatchResponse::decode(frames.as_slice()).expect("the hub encodes what can be decoded");
                    return Ok(Some(ChangeBatch { revision: events.revision, events: response.events }));
                }
                Response::Compacted { .. } | Response::Refused { .. } | Response::Canceled { .. } => return Ok(None),
                Response::Created { .. } | Response::Progress { .. } => (),
            }
        }
    }

    async fn response(&mut self) -> Result<Response, Error> {
        poll_fn(|context| {
            while self.responses.is_empty() {
                let taken = self.subscriber.take(&mut self.responses, context.waker());
                self.held.store(self.subscriber.held(), Ordering::Relaxed);
                if taken.is_err() {
                    return Poll::Ready(Err(Error::Unknown(Error::Stopped.to_string())));
                }
                if self.responses.is_empty() {
                    return Poll::Pending;
                }
            }
            Poll::Ready(Ok(self.responses.pop_front().expect("it is not empty")))
        })
        .await
    }
}

impl Drop for ChangeStream {
    fn drop(&mut self) {
        self.held.store(0, Ordering::Relaxed);
    }
}
