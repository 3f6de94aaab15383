//! LeaseKeepAlive: one request, one answer, one after the other.
//!
//! Only the leader renews, in memory, and only once it is sure of itself. What cannot be answered yet waits, and the requests
//! behind it wait too:
//!
//! | the lease is | the client |
//! |---|---|
//! | alive | hears its whole time to live |
//! | over, but not gone | waits until it is gone, or until another member leads |
//! | unknown | waits until everything that is committed is applied, then hears 0 |
//!
//! With the feature gate `FastLeaseKeepAlive` off, every renewal waits as for an unknown lease.
//!
//! The header is made before the renewal. So a client that was told of a renewal at some revision has not missed a
//! revocation before it.

use std::{sync::Arc, task::Waker};

use bytes::Bytes;
use prost::Message;

use super::{
    Api,
    barrier::{self, Barrier},
    decode,
};
use crate::{
    call::{Conversation, Line, Metadata, Step},
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
    /// An answer that the sink had no room for.
    answer: Option<Bytes>,
}

/// A request that is being answered.
struct Request {
    id: LeaseId,
    header: ResponseHeader,
    /// It was certain, a moment ago, that this member leads.
    is_confirmed: bool,
    /// Everything that was committed when the lease turned out to be unknown is applied.
    is_caught_up: bool,
    waiting: Option<(Barrier, Awaited)>,
}

/// What a request waits for.
#[derive(Clone, Copy)]
enum Awaited {
    Primary,
    Confirmation,
    CatchUp,
    End,
}

impl Conversation for KeepAlive {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        loop {
            if let Some(answer) = self.answer.take() {
                if !line.has_room() {
                    self.answer = Some(answer);
                    return Step::Wait;
                }
                line.send(answer);
            }
            if self.request.is_none() {
                match line.receive().map(decode::<LeaseKeepAliveRequest>) {
                    Some(Ok(request)) => self.request = Some(self.begin(&request)),
                    Some(Err(error)) => return Step::End(Err(error.into())),
                    None if line.ended() => return Step::End(Ok(())),
                    None => return Step::Wait,
                }
            }
            let request = self.request.as_mut().expect("one was received unless there was one");
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
            is_confirmed: false,
            is_caught_up: false,
            waiting: None,
        }
    }
}

impl Request {
    /// Goes on until the answer is known, or there is something to wait for: then None.
    fn advance(&mut self, api: &Api, waker: &Waker) -> Result<Option<i64>, Error> {
        let (node, timekeeper) = (&api.node, api.node.timekeeper());
        loop {
            if !self.has_arrived()? {
                return Ok(None);
            }
            if !timekeeper.is_primary() {
                (self.is_confirmed, self.is_caught_up) = (false, false);
                timekeeper.await_primary(self.wait(Awaited::Primary, waker));
            } else if !self.is_confirmed && !timekeeper.is_awake() {
                node.read_barrier(self.wait(Awaited::Confirmation, waker));
            } else if !self.is_caught_up && !api.fast_keep_alive {
                node.catch_up(self.wait(Awaited::CatchUp, waker));
            } else {
                match timekeeper.renew(self.id) {
                    Renewal::Renewed(ttl) => return Ok(Some(ttl)),
                    Renewal::Unknown if self.is_caught_up => return Ok(Some(0)),
                    Renewal::Unknown => node.catch_up(self.wait(Awaited::CatchUp, waker)),
                    Renewal::Expired => timekeeper.await_end(self.id, self.wait(Awaited::End, waker)),
                    Renewal::NotPrimary => (), // Since a moment ago: see above.
                }
            }
        }
    }

    /// Whether what was waited for, if anything, has come.
    fn has_arrived(&mut self) -> Result<bool, Error> {
        let Some((barrier, awaited)) = &self.waiting else { return Ok(true) };
        let Some(outcome) = barrier.outcome() else { return Ok(false) };
        match (*awaited, outcome) {
            (Awaited::Primary | Awaited::End, Ok(())) => (),
            (Awaited::Confirmation, Ok(())) => self.is_confirmed = true,
            (Awaited::CatchUp, Ok(())) => self.is_caught_up = true,
            (Awaited::Confirmation, Err(_)) => return Err(Error::NotPrimary),
            (Awaited::Primary | Awaited::CatchUp | Awaited::End, Err(error)) => return Err(error),
        }
        self.waiting = None;
        Ok(true)
    }

    fn wait(&mut self, awaited: Awaited, waker: &Waker) -> crate::node::waiters::ReadWaiter {
        let (barrier, opener) = barrier::erect(waker);
        self.waiting = Some((barrier, awaited));
        opener
    }

    fn answer(self, ttl: i64) -> Bytes {
        LeaseKeepAliveResponse { header: Some(self.header), id: self.id.0, ttl }.encode_to_vec().into()
    }
}
