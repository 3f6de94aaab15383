//! LeaseGrant, LeaseRevoke, LeaseTimeToLive, LeaseLeases. (LeaseKeepAlive is in [`super::keep_alive`].)
//!
//! Values that would differ between members are chosen here, before anything is proposed: the ID of a lease, and its minimum
//! TTL, which depends on this member's flags.

use std::{sync::Arc, time::Duration};

use prost::Message;

use super::{Caller, Operation, Outcome, Reply, Request, Service, auth::audit};
use crate::{
    cluster::LeaderAnswer,
    error::Error,
    lease::LeaseId,
    metrics,
    proto::etcdserverpb::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest,
        LeaseTimeToLiveResponse,
    },
    state::{Kind, permission::Access},
};

/// How many leases' expiry times are looked up under one lock.
const EXPIRY_CHUNK_LEASES: usize = 1024;
/// The TTL that LeaseTimeToLive returns for a lease that does not exist.
const UNKNOWN_LEASE_TTL: i64 = -1;

/// The minimum TTL of a lease: one and a half election timeouts, rounded up to whole seconds.
#[must_use]
pub fn min_seconds(election_ticks: usize, tick: Duration) -> i64 {
    let ticks = u32::try_from(3 * election_ticks / 2).unwrap_or(u32::MAX);
    let shortest = tick.saturating_mul(ticks).as_millis().div_ceil(1000);
    i64::try_from(shortest).unwrap_or(i64::MAX)
}

/// What is known about a lease, at a revision.
#[derive(Debug)]
pub struct LeaseInfo {
    pub head: i64,
    /// Without its header.
    pub lease: LeaseTimeToLiveResponse,
}

/// All leases, at a revision.
#[derive(Debug)]
pub struct LeaseList {
    pub head: i64,
    pub leases: Vec<LeaseId>,
}

impl Service {
    pub fn lease_grant(
        self: &Arc<Self>,
        caller: &Caller,
        grant: LeaseGrantRequest,
        reply: impl Reply<Outcome<LeaseGrantResponse>>,
    ) {
        match self.admit(caller, &Operation::LeaseGrant).and_then(|identity| self.check_leases().map(|()| identity)) {
            Ok(identity) => {
                self.propose(&identity, Kind::LeaseGrant, &Request::new(self.complete_grant(grant)).raw, reply);
            }
            Err(error) => self.refuse(caller, "LeaseGrant", error, reply, move |service, caller, reply| {
                service.lease_grant(caller, grant, reply);
            }),
        }
    }

    /// Refuses a grant when there are too many leases. Grants that are under way are not counted, so that there may be a few more.
    /// This depends on this member's flags, so it is decided before the grant is proposed.
    fn check_leases(&self) -> Result<(), Error> {
        let value = self.limits.max_leases;
        if self.readers().leases.len() < value {
            return Ok(());
        }
        metrics::refused("leases");
        Err(Error::LimitReached { what: "too many leases", flag: "max-leases", value })
    }

    /// Chooses the ID and the TTL of a grant before it is proposed.
    fn complete_grant(&self, grant: LeaseGrantRequest) -> LeaseGrantRequest {
        LeaseGrantRequest {
            id: if grant.id == 0 { self.cluster.ids.next_lease() } else { grant.id },
            ttl: grant.ttl.max(self.limits.min_lease_seconds),
        }
    }

    pub fn lease_revoke(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<LeaseRevokeRequest>,
        reply: impl Reply<Outcome<LeaseRevokeResponse>>,
    ) {
        match self.admit(caller, &Operation::LeaseRevoke(LeaseId(request.parsed.id))) {
            Ok(identity) => self.propose(&identity, Kind::LeaseRevoke, &request.raw, reply),
            Err(error) => self.refuse(caller, "LeaseRevoke", error, reply, move |service, caller, reply| {
                service.lease_revoke(caller, request, reply);
            }),
        }
    }

    pub fn lease_time_to_live(
        self: &Arc<Self>,
        caller: &Caller,
        request: LeaseTimeToLiveRequest,
        reply: impl Reply<LeaseInfo>,
    ) {
        let with_keys = request.keys.then_some(LeaseId(request.id));
        if let Err(error) = self.admit(caller, &Operation::LeaseTimeToLive(with_keys)) {
            return self.refuse(caller, "LeaseTimeToLive", error, reply, move |service, caller, reply| {
                service.lease_time_to_live(caller, request, reply);
            });
        }
        if self.cluster.leads() {
            return self.look_up_as_leader(request, reply);
        }
        let (service, deadline) = (self.clone(), caller.deadline);
        self.cluster.runtime.spawn(async move {
            let client = &service.cluster.client;
            let asked = service
                .cluster
                .ask_leader(deadline, |url, timeout| async move { client.time_to_live(&url, request, timeout).await });
            match asked.await {
                Ok(LeaderAnswer::ThisMemberLeads) => service.look_up_as_leader(request, reply),
                Ok(LeaderAnswer::Answered(found)) => reply.answer(Ok(service.lease_info(&request, found))),
                Err(error) => reply.answer(Err(error)),
            }
        });
    }

    /// Answers a LeaseTimeToLive on the leader, once it has applied all committed entries and can prove its leadership.
    fn look_up_as_leader(self: &Arc<Self>, request: LeaseTimeToLiveRequest, reply: impl Reply<LeaseInfo>) {
        let service = self.clone();
        self.node().catch_up(Box::new(move |caught_up| match caught_up {
            Ok(()) => {
                let node = service.node().clone();
                node.lease_expiry().await_primary(Box::new(move |primary| match primary {
                    Ok(()) => reply.run(move |reply| service.answer_look_up(request, reply)),
                    Err(error) => reply.answer(Err(error)),
                }));
            }
            Err(error) => reply.answer(Err(error)),
        }));
    }

    fn answer_look_up(self: Arc<Self>, request: LeaseTimeToLiveRequest, reply: impl Reply<LeaseInfo>) {
        match self.cluster.look_up_lease(LeaseId(request.id)) {
            Ok(Some(found)) if request.keys => {
                let pool = self.read_pool().clone();
                pool.run(move || {
                    let found = self.cluster.with_keys(found); // On the read pool: a lease may have many keys.
                    let info = self.lease_info(&request, Some(found));
                    reply.answer(self.check_answer(info.lease.encoded_len()).map(|()| info));
                });
            }
            Ok(found) => reply.answer(Ok(self.lease_info(&request, found))),
            // It had no proof of its leadership for a moment.
            Err(Error::LeaderChanged) if self.cluster.leads() => self.look_up_as_leader(request, reply),
            Err(error) => reply.answer(Err(error)),
        }
    }

    fn lease_info(&self, request: &LeaseTimeToLiveRequest, found: Option<LeaseTimeToLiveResponse>) -> LeaseInfo {
        let unknown =
            LeaseTimeToLiveResponse { id: request.id, ttl: UNKNOWN_LEASE_TTL, ..LeaseTimeToLiveResponse::default() };
        LeaseInfo { head: self.head(), lease: found.unwrap_or(unknown) }
    }

    /// Root may list the leases, and a user that may read the keys of all of them.
    pub fn lease_leases(self: &Arc<Self>, caller: &Caller, reply: impl Reply<LeaseList>) {
        let identity = match self.admit(caller, &Operation::LeaseLeases) {
            Ok(identity) => identity,
            Err(error) => {
                return self.refuse(caller, "LeaseLeases", error, reply, |service, caller, reply| {
                    service.lease_leases(caller, reply);
                });
            }
        };
        let (service, asking) = (self.clone(), caller.clone());
        self.run_long_read(caller, move || {
            let head = service.head();
            let leases = service.leases_by_expiry();
            let permitted = service.authorize_read(&asking, |check| {
                leases.iter().try_for_each(|lease| check.attached_keys(Access::Read, *lease))
            });
            match permitted {
                Ok(_) => reply.answer(Ok(LeaseList { head, leases })),
                Err(error) => {
                    audit::denied(&asking, &identity, Operation::LeaseLeases.name(), &error);
                    reply.answer(Err(error));
                }
            }
        });
    }

    /// All leases, those that expire first in front. A member that does not lead does not know when leases expire and orders
    /// them by ID.
    fn leases_by_expiry(&self) -> Vec<LeaseId> {
        let ids: Vec<LeaseId> = self.readers().leases.all().into_iter().map(|(id, _)| id).collect();
        let mut by_expiry = Vec::with_capacity(ids.len());
        for chunk in ids.chunks(EXPIRY_CHUNK_LEASES) {
            let expiries = self.node().lease_expiry().ends(chunk);
            by_expiry.extend(expiries.into_iter().map(|expiry| expiry.unwrap_or(Duration::MAX)).zip(chunk));
        }
        by_expiry.sort_unstable();
        by_expiry.into_iter().map(|(_, id)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_ttl_outlasts_an_election() {
        let check = |election_ms: u64, tick_ms: u64, expected: i64| {
            let ticks = usize::try_from(election_ms / tick_ms).unwrap();
            assert_eq!(min_seconds(ticks, Duration::from_millis(tick_ms)), expected, "{election_ms}/{tick_ms}");
        };
        check(1000, 100, 2);
        check(5000, 500, 8);
        check(500, 100, 1);
        check(50_000, 10_000, 70);
    }
}
