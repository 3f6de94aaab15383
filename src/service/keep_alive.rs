//! LeaseKeepAlive: the renewal of one lease.
//!
//! Only the leader renews leases, in memory, and only while it has a proof of its leadership (`node/lease_expiry.rs`). A renewal
//! that cannot be answered yet waits:
//!
//! | the lease is | the renewal |
//! |---|---|
//! | alive | is answered with the granted TTL |
//! | expired, but not revoked yet | waits until the lease is revoked, or until another member leads |
//! | unknown | waits until all committed entries are applied, and is then answered with 0 |
//!
//! A member that does not lead asks the leader and waits for the answer. When the answer arrives, or fails to, this member may
//! have become the leader.
//!
//! With the feature gate `FastLeaseKeepAlive` disabled, every renewal waits as for an unknown lease.

use std::{
    sync::Arc,
    task::{Poll, Waker},
};

use super::{
    Caller, Operation, Service,
    auth::audit,
    reply::{self, OneshotReceiver},
};
use crate::{
    cluster::LeaderAnswer,
    error::Error,
    lease::{LeaseId, Renewal},
    node::waiters::ReadWaiter,
    state::permission::Access,
};

/// A renewal that is not answered yet.
pub struct KeepAlive {
    id: LeaseId,
    head: i64,
    /// Whether everything is applied that was committed when the lease turned out to be unknown.
    is_caught_up: bool,
    waiting: Option<(OneshotReceiver<LeaderTtl>, Awaited)>,
}

/// A lease's TTL in seconds; 0 if there is no such lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAliveOutcome {
    /// The revision before the renewal. So a client that was told of a renewal at some revision has not missed a revocation
    /// before that revision.
    pub head: i64,
    pub id: LeaseId,
    pub ttl: i64,
}

/// The TTL that the leader answered with; None if something else was awaited.
type LeaderTtl = Option<i64>;

/// Whether a renewal can proceed.
enum WaitState {
    /// It is still waiting.
    Waiting,
    /// It can proceed on this member.
    Ready,
    /// It was answered by the leader, with this TTL.
    Answered(i64),
}

/// What a renewal waits for.
#[derive(Clone, Copy)]
enum Awaited {
    Leader,
    Primary,
    CatchUp,
    End,
}

impl Service {
    /// Begins a renewal, in a stream that was admitted when it was opened. It needs the permission to write all keys that are
    /// attached to the lease.
    pub fn keep_alive(&self, caller: &Caller, id: LeaseId) -> Result<KeepAlive, Error> {
        let checked = self.authorize_read(caller, |check| {
            // Also a lease without keys is renewed for users only.
            if check.requester.user.is_empty() {
                return Err(Error::UserEmpty);
            }
            check.attached_keys(Access::Write, id)
        });
        match checked {
            Ok(_) => Ok(KeepAlive { id, head: self.head(), is_caught_up: false, waiting: None }),
            Err(error) => {
                let identity = self.identify(caller).unwrap_or_default();
                audit::denied(caller, &identity, Operation::LeaseKeepAlive.name(), &error);
                Err(error)
            }
        }
    }
}

impl KeepAlive {
    /// Proceeds as far as possible without waiting. `waker` is woken when there is something to do again.
    pub fn poll(&mut self, service: &Arc<Service>, waker: &Waker) -> Poll<Result<KeepAliveOutcome, Error>> {
        match self.advance(service, waker) {
            Ok(Some(ttl)) => Poll::Ready(Ok(KeepAliveOutcome { head: self.head, id: self.id, ttl })),
            Ok(None) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn advance(&mut self, service: &Arc<Service>, waker: &Waker) -> Result<Option<i64>, Error> {
        let node = service.node();
        let lease_expiry = node.lease_expiry();
        loop {
            match self.poll_wait()? {
                WaitState::Waiting => return Ok(None),
                WaitState::Answered(ttl) => return Ok(Some(ttl)),
                WaitState::Ready => (),
            }
            if !lease_expiry.is_primary() {
                self.is_caught_up = false;
                if service.cluster.leads() {
                    lease_expiry.await_primary(self.wait(Awaited::Primary, waker));
                } else {
                    self.ask_leader(service, waker);
                }
            } else if !self.is_caught_up && !service.fast_keep_alive {
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

    fn ask_leader(&mut self, service: &Arc<Service>, waker: &Waker) {
        let (receiver, callback) = reply::channel(waker);
        self.waiting = Some((receiver, Awaited::Leader));
        let (cluster, id) = (service.cluster.clone(), self.id.0);
        service.cluster.runtime.spawn(async move {
            let client = &cluster.client;
            let answer =
                cluster.ask_leader(None, |url, timeout| async move { client.renew(&url, id, timeout).await }).await;
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

    fn wait(&mut self, awaited: Awaited, waker: &Waker) -> ReadWaiter {
        let (receiver, callback) = reply::channel(waker);
        self.waiting = Some((receiver, awaited));
        Box::new(move |outcome| callback(outcome.map(|()| None)))
    }
}
