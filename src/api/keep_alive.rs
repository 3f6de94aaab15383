//! LeaseKeepAlive: the requests of a stream are answered one after another.
//!
//! Only the leader renews leases, in memory, and only while it has a proof of its leadership (`node/lease_expiry.rs`). A request
//! that cannot be answered yet waits, and so do the requests behind it:
//!
//! | the lease is | the request |
//! |---|---|
//! | alive | is answered with the granted TTL |
//! | expired, but not revoked yet | waits until the lease is revoked, or until another member leads |
//! | unknown | waits until all committed entries are applied, and is then answered with 0 |
//!
//! A member that does not lead asks the leader and waits for the answer. When the answer arrives, or fails to, this member may
//! have become the leader.
//!
//! With the feature gate `FastLeaseKeepAlive` disabled, every renewal waits as for an unknown lease.
//!
//! The header is made before the renewal. So a client that was told of a renewal at some revision has not missed a revocation
//! before that revision.

use std::{sync::Arc, task::Waker};

use bytes::Bytes;
use prost::Message;

use super::{
    Api,
    barrier::{self, OneshotReceiver},
    company::LeaderAnswer,
    decode_streamed,
};
use crate::{
    call::{Conversation, Metadata, Step, StreamIo},
    error::Error,
    lease::{LeaseId, Renewal},
    proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, ResponseHeader},
};

impl Api {
    /// `Lease/LeaseKeepAlive`.
    pub fn lease_keep_alive(self: &Arc<Self>, _metadata: Metadata) -> Box<dyn Conversation> {
        Box::new(KeepAlive { api: self.clone(), request: None, answer: None })
    }
}

struct KeepAlive {
    api: Arc<Api>,
    request: Option<Request>,
    /// A response that has not been passed to the line yet.
    answer: Option<Bytes>,
}

/// A request that is not answered yet.
struct Request {
    id: LeaseId,
    header: ResponseHeader,
    /// Whether everything is applied that was committed when the lease turned out to be unknown.
    is_caught_up: bool,
    waiting: Option<(OneshotReceiver<LeaderTtl>, Awaited)>,
}

/// The TTL that the leader answered with; None if something else was awaited.
type LeaderTtl = Option<i64>;

/// Whether a request can proceed.
enum WaitState {
    /// It is still waiting.
    Waiting,
    /// It can proceed on this member.
    Ready,
    /// It was answered by the leader, with this TTL.
    Answered(i64),
}

/// What a request waits for.
#[derive(Clone, Copy)]
enum Awaited {
    Leader,
    Primary,
    CatchUp,
    End,
}

impl Conversation for KeepAlive {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        loop {
            if let Some(answer) = self.answer.take() {
                if !line.can_send() {
                    self.answer = Some(answer);
                    return Step::Wait;
                }
                line.send(answer);
            }
            if self.request.is_none() {
                match line.receive().map(decode_streamed::<LeaseKeepAliveRequest>) {
                    Some(Ok(request)) => self.request = Some(self.begin(&request)),
                    Some(Err(refusal)) => return Step::End(Err(refusal)),
                    None if line.is_half_closed() => return Step::End(Ok(())),
                    None => return Step::Wait,
                }
            }
            let request = self.request.as_mut().expect("a request was just received unless there was one");
            match request.advance(&self.api, line.waker()) {
                Ok(Some(ttl)) => self.answer = self.request.take().map(|request| request.answer(ttl)),
                Ok(None) => return Step::Wait,
                Err(error) => return Step::End(Err(error.into())),
            }
        }
    }
}

impl KeepAlive {
    fn begin(&self, request: &LeaseKeepAliveRequest) -> Request {
        Request {
            id: LeaseId(request.id),
            header: self.api.header.at(self.api.readers().keys.head()),
            is_caught_up: false,
            waiting: None,
        }
    }
}

impl Request {
    /// Proceeds until the TTL is known, or returns None if there is something to wait for.
    fn advance(&mut self, api: &Arc<Api>, waker: &Waker) -> Result<Option<i64>, Error> {
        let (node, lease_expiry) = (&api.node, api.node.lease_expiry());
        loop {
            match self.poll_wait()? {
                WaitState::Waiting => return Ok(None),
                WaitState::Answered(ttl) => return Ok(Some(ttl)),
                WaitState::Ready => (),
            }
            if !lease_expiry.is_primary() {
                self.is_caught_up = false;
                if api.leads() {
                    lease_expiry.await_primary(self.wait(Awaited::Primary, waker));
                } else {
                    self.ask_leader(api, waker);
                }
            } else if !self.is_caught_up && !api.fast_keep_alive {
                node.catch_up(self.wait(Awaited::CatchUp, waker));
            } else {
                match lease_expiry.renew(self.id) {
                    Renewal::Renewed(ttl) => return Ok(Some(ttl)),
                    Renewal::Unknown if self.is_caught_up => return Ok(Some(0)),
                    Renewal::Unknown => node.catch_up(self.wait(Awaited::CatchUp, waker)),
                    Renewal::Expired => lease_expiry.await_end(self.id, self.wait(Awaited::End, waker)),
                    Renewal::NotPrimary => (), // It just ceased to be primary: handled above.
                }
            }
        }
    }

    fn ask_leader(&mut self, api: &Arc<Api>, waker: &Waker) {
        let (receiver, callback) = barrier::channel(waker);
        self.waiting = Some((receiver, Awaited::Leader));
        let (api, id) = (api.clone(), self.id.0);
        api.company.runtime.clone().spawn(async move {
            let client = &api.company.client;
            let answer = api.ask_leader(|url, timeout| async move { client.renew(&url, id, timeout).await }).await;
            callback(answer.map(|answer| match answer {
                LeaderAnswer::ThisMemberLeads => None,
                LeaderAnswer::Answered(ttl) => Some(ttl.unwrap_or(0)), // 0: the leader does not know the lease.
            }));
        });
    }

    /// Checks whether the awaited event has happened.
    fn poll_wait(&mut self) -> Result<WaitState, Error> {
        let Some((receiver, awaited)) = &self.waiting else { return Ok(WaitState::Ready) };
        let Some(outcome) = receiver.outcome() else { return Ok(WaitState::Waiting) };
        match (*awaited, outcome) {
            (Awaited::Leader, Ok(Some(ttl))) => return Ok(WaitState::Answered(ttl)),
            (Awaited::Leader | Awaited::Primary | Awaited::End, Ok(_)) => (),
            (Awaited::CatchUp, Ok(_)) => self.is_caught_up = true,
            (Awaited::Leader | Awaited::Primary | Awaited::CatchUp | Awaited::End, Err(error)) => return Err(error),
        }
        self.waiting = None;
        Ok(WaitState::Ready)
    }

    fn wait(&mut self, awaited: Awaited, waker: &Waker) -> crate::node::waiters::ReadWaiter {
        let (receiver, callback) = barrier::channel(waker);
        self.waiting = Some((receiver, awaited));
        Box::new(move |outcome| callback(outcome.map(|()| None)))
    }

    fn answer(self, ttl: i64) -> Bytes {
        LeaseKeepAliveResponse { header: Some(self.header), id: self.id.0, ttl }.encode_to_vec().into()
    }
}
