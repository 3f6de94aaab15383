//! LeaseKeepAlive: one request, one answer, one after the other.
//!
//! Only the leader renews, in memory, and only while it has a proof that it leads (`node/timekeeper.rs`). What cannot be answered yet waits, and the requests
//! behind it wait too:
//!
//! | the lease is | the client |
//! |---|---|
//! | alive | hears its whole time to live |
//! | over, but not gone | waits until it is gone, or until another member leads |
//! | unknown | waits until everything that is committed is applied, then hears 0 |
//!
//! A member that does not lead asks the leader, and waits for its answer; by the time that comes, or does not, it may lead itself.
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
    company::Led,
    decode_streamed,
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
    /// Everything that was committed when the lease turned out to be unknown is applied.
    is_caught_up: bool,
    waiting: Option<(Barrier<Told>, Awaited)>,
}

/// What somebody who waits may be told: the leader's answer, if it was the leader who was asked.
type Told = Option<i64>;

/// Whether a request can go on.
enum News {
    /// Not yet.
    None,
    /// It can, by itself.
    Some,
    /// It need not: this is the answer.
    Answer(i64),
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
                match line.receive().map(decode_streamed::<LeaseKeepAliveRequest>) {
                    Some(Ok(request)) => self.request = Some(self.begin(&request)),
                    Some(Err(refusal)) => return Step::End(Err(refusal)),
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
            is_caught_up: false,
            waiting: None,
        }
    }
}

impl Request {
    /// Goes on until the answer is known, or there is something to wait for: then None.
    fn advance(&mut self, api: &Arc<Api>, waker: &Waker) -> Result<Option<i64>, Error> {
        let (node, timekeeper) = (&api.node, api.node.timekeeper());
        loop {
            match self.news()? {
                News::None => return Ok(None),
                News::Answer(ttl) => return Ok(Some(ttl)),
                News::Some => (),
            }
            if !timekeeper.is_primary() {
                self.is_caught_up = false;
                if api.leads() {
                    timekeeper.await_primary(self.wait(Awaited::Primary, waker));
                } else {
                    self.ask_leader(api, waker);
                }
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

    fn ask_leader(&mut self, api: &Arc<Api>, waker: &Waker) {
        let (barrier, opener) = barrier::erect(waker);
        self.waiting = Some((barrier, Awaited::Leader));
        let (api, id) = (api.clone(), self.id.0);
        api.company.runtime.clone().spawn(async move {
            let client = &api.company.client;
            let told = api.ask_leader(|url, patience| async move { client.renew(&url, id, patience).await }).await;
            opener(told.map(|told| match told {
                Led::Here => None,
                Led::There(ttl) => Some(ttl.unwrap_or(0)), // The leader does not know it.
            }));
        });
    }

    /// What has become of what was waited for.
    fn news(&mut self) -> Result<News, Error> {
        let Some((barrier, awaited)) = &self.waiting else { return Ok(News::Some) };
        let Some(outcome) = barrier.outcome() else { return Ok(News::None) };
        match (*awaited, outcome) {
            (Awaited::Leader, Ok(Some(ttl))) => return Ok(News::Answer(ttl)),
            (Awaited::Leader | Awaited::Primary | Awaited::End, Ok(_)) => (),
            (Awaited::CatchUp, Ok(_)) => self.is_caught_up = true,
            (Awaited::Leader | Awaited::Primary | Awaited::CatchUp | Awaited::End, Err(error)) => return Err(error),
        }
        self.waiting = None;
        Ok(News::Some)
    }

    fn wait(&mut self, awaited: Awaited, waker: &Waker) -> crate::node::waiters::ReadWaiter {
        let (barrier, opener) = barrier::erect(waker);
        self.waiting = Some((barrier, awaited));
        Box::new(move |outcome| opener(outcome.map(|()| None)))
    }

    fn answer(self, ttl: i64) -> Bytes {
        LeaseKeepAliveResponse { header: Some(self.header), id: self.id.0, ttl }.encode_to_vec().into()
    }
}
