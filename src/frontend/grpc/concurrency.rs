//! `Lock` and `Election`: calls that are futures of the service.
//!
//! A call of this kind is served by a conversation even if it is unary for the client: a [`call::Reply`](http2::call::Reply) is
//! not told when its call is canceled, but a conversation is dropped then, and its future with it. Calls that are answered at
//! once, nearly all of them, pay nothing for this.
//!
//! The future gets a copy of the request, because it may wait for hours, and the message may be much longer than the fields that
//! are needed. What it holds counts as held for the client.

use std::{
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

use super::{Grpc, caller, decode, decode_streamed};
use crate::{
    proto::{
        v3electionpb::{
            CampaignRequest, CampaignResponse, LeaderRequest, LeaderResponse, ProclaimRequest, ProclaimResponse,
            ResignRequest, ResignResponse,
        },
        v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse},
    },
    service::concurrency::{
        Session,
        election::{self, Leader, Observer},
        lock,
    },
};
use http2::{
    call::{CallError, Code, Conversation, Metadata, Step, StreamIo},
    ledger,
};

/// What a waiting call counts as held beside its request: its future, its key in the queue, and the watch that it waits on.
const CALL_BYTES: usize = 4 << 10;
/// The fields of a request exist this many times: in the request, in the key, in watches and in the requests of the steps.
const COPIES: usize = 4;

/// The future that answers a call.
type CallFuture = Pin<Box<dyn Future<Output = Result<(), CallError>> + Send>>;

/// What a future needs to answer its call.
struct CallContext {
    grpc: Arc<Grpc>,
    session: Session,
    /// The message that the stream has not taken yet.
    outgoing: Mutex<Option<Bytes>>,
    /// What the future holds of the request.
    retained_bytes: AtomicUsize,
}

impl CallContext {
    /// A copy of the request, which counts as held.
    fn retain<M: Message + Default>(&self, request: &M) -> M {
        let fields = Bytes::from(request.encode_to_vec());
        self.retained_bytes.store(CALL_BYTES + COPIES * fields.len(), Ordering::Relaxed);
        M::decode(fields).expect("what was just encoded can be decoded")
    }

    /// Sends a message, and waits until the stream has taken it.
    async fn send(&self, message: &impl Message) {
        *self.outgoing.lock() = Some(message.encode_to_vec().into());
        // The step that takes it polls again.
        poll_fn(|_| if self.outgoing.lock().is_some() { Poll::Pending } else { Poll::Ready(()) }).await;
    }
}

/// A conversation that runs a future, which begins when the request arrives.
struct AsyncConversation {
    context: Arc<CallContext>,
    begin: fn(Arc<CallContext>, Bytes) -> CallFuture,
    future: Option<CallFuture>,
}

impl Conversation for AsyncConversation {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        let future = match &mut self.future {
            Some(future) => future,
            None => match io.receive() {
                Some(message) if message.len() > io.spare_bytes() => {
                    return Step::End(Err(ledger::request_over_limit()));
                }
                Some(message) => self.future.insert((self.begin)(self.context.clone(), message)),
                None if io.is_half_closed() => {
                    return Step::End(Err(CallError { code: Code::Unknown, message: "EOF".into() }));
                }
                None => return Step::Wait,
            },
        };
        loop {
            if let Poll::Ready(end) = future.as_mut().poll(&mut Context::from_waker(io.waker())) {
                return Step::End(end);
            }
            if !io.can_send() {
                return Step::Wait;
            }
            match self.context.outgoing.lock().take() {
                Some(message) => io.send(message),
                None => return Step::Wait,
            }
        }
    }

    fn held_bytes(&self) -> usize {
        self.context.retained_bytes.load(Ordering::Relaxed) + self.context.session.held()
    }
}

impl Grpc {
    fn open_async(
        self: &Arc<Self>,
        metadata: Metadata,
        begin: fn(Arc<CallContext>, Bytes) -> CallFuture,
    ) -> Result<Box<dyn Conversation>, CallError> {
        let session = Session::open(&self.service, caller(metadata))?;
        let (outgoing, retained_bytes) = (Mutex::default(), AtomicUsize::new(0));
        let context = Arc::new(CallContext { grpc: self.clone(), session, outgoing, retained_bytes });
        Ok(Box::new(AsyncConversation { context, begin, future: None }))
    }

    pub fn lock(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let request = call.retain(&decode::<LockRequest>(message)?);
                let acquired = lock::lock(&call.session, request).await?;
                let header = Some(call.grpc.header.at(acquired.revision));
                call.send(&LockResponse { header, key: acquired.key }).await;
                Ok(())
            })
        })
    }

    pub fn unlock(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let UnlockRequest { key } = call.retain(&decode(message)?);
                let revision = lock::unlock(&call.session, key).await?;
                call.send(&UnlockResponse { header: Some(call.grpc.header.at(revision)) }).await;
                Ok(())
            })
        })
    }

    pub fn campaign(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let request = call.retain(&decode::<CampaignRequest>(message)?);
                let won = election::campaign(&call.session, request).await?;
                let header = Some(call.grpc.header.at(won.revision));
                call.send(&CampaignResponse { header, leader: Some(won.leader) }).await;
                Ok(())
            })
        })
    }

    pub fn proclaim(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let request = call.retain(&decode::<ProclaimRequest>(message)?);
                let revision = election::proclaim(&call.session, request).await?;
                call.send(&ProclaimResponse { header: Some(call.grpc.header.at(revision)) }).await;
                Ok(())
            })
        })
    }

    pub fn leader(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let LeaderRequest { name } = call.retain(&decode(message)?);
                let leader = election::leader(&call.session, &name).await?;
                call.send(&leader_response(&call.grpc, leader)).await;
                Ok(())
            })
        })
    }

    pub fn resign(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let request = call.retain(&decode::<ResignRequest>(message)?);
                let revision = election::resign(&call.session, request).await?;
                call.send(&ResignResponse { header: Some(call.grpc.header.at(revision)) }).await;
                Ok(())
            })
        })
    }

    /// If a step fails the stream ends without an error, as etcd's does.
    pub fn observe(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.open_async(metadata, |call, message| {
            Box::pin(async move {
                let LeaderRequest { name } = call.retain(&decode_streamed(message)?);
                let mut observer = Observer::new(&call.session, name);
                while let Ok(leader) = observer.next().await {
                    call.send(&leader_response(&call.grpc, leader)).await;
                }
                Ok(())
            })
        })
    }
}

fn leader_response(grpc: &Grpc, leader: Leader) -> LeaderResponse {
    LeaderResponse { header: Some(grpc.header.at(leader.revision)), kv: leader.key_value }
}
