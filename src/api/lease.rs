//! LeaseGrant, LeaseRevoke, LeaseTimeToLive, LeaseLeases. (LeaseKeepAlive is in [`super::keep_alive`].)
//!
//! Values that would differ between members are chosen here, before anything is proposed: the ID of a lease, and its minimum
//! TTL, which depends on this member's flags.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;

use super::{Api, company::LeaderAnswer, decode};
use crate::{
    call::{Call, Reply},
    error::Error,
    lease::LeaseId,
    proto::etcdserverpb::{
        LeaseGrantRequest, LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseStatus,
        LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
    },
    state::{Kind, command},
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

impl Api {
    /// `Lease/LeaseGrant`.
    pub fn lease_grant(self: &Arc<Self>, call: Call, reply: Reply) {
        let grant = decode::<LeaseGrantRequest>(call.message).and_then(|grant| {
            self.check_quota(command::lease_cost())?;
            Ok(self.settle_grant(grant))
        });
        match grant {
            Ok(grant) => self.propose(Kind::LeaseGrant, &grant.encode_to_vec(), reply),
            Err(error) => self.reject_write(error, reply),
        }
    }

    /// Chooses the ID and the TTL of a grant before it is proposed.
    pub(super) fn settle_grant(&self, grant: LeaseGrantRequest) -> LeaseGrantRequest {
        LeaseGrantRequest {
            id: if grant.id == 0 { self.ids.next_lease() } else { grant.id },
            ttl: grant.ttl.max(self.limits.min_lease_seconds),
        }
    }

    /// `Lease/LeaseRevoke`.
    pub fn lease_revoke(self: &Arc<Self>, call: Call, reply: Reply) {
        match decode::<LeaseRevokeRequest>(call.message.clone()) {
            Ok(_) => self.propose(Kind::LeaseRevoke, &call.message, reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// `Lease/LeaseTimeToLive`.
    pub fn lease_time_to_live(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = match decode::<LeaseTimeToLiveRequest>(call.message) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        if self.leads() {
            return self.look_up_as_leader(request, reply);
        }
        let api = self.clone();
        self.company.runtime.spawn(async move {
            let client = &api.company.client;
            match api.ask_leader(|url, timeout| async move { client.time_to_live(&url, request, timeout).await }).await
            {
                Ok(LeaderAnswer::ThisMemberLeads) => api.look_up_as_leader(request, reply),
                Ok(LeaderAnswer::Answered(found)) => reply.answer(Ok(api.answer_time_to_live(&request, found))),
                Err(error) => reply.answer(Err(error.into())),
            }
        });
    }

    /// Answers a LeaseTimeToLive on the leader, once it has applied all committed entries and can prove its leadership.
    fn look_up_as_leader(self: &Arc<Self>, request: LeaseTimeToLiveRequest, reply: Reply) {
        let api = self.clone();
        self.node.catch_up(Box::new(move |caught_up| match caught_up {
            Ok(()) => {
                let node = api.node.clone();
                node.lease_expiry().await_primary(Box::new(move |primary| match primary {
                    Ok(()) => reply.run(move |reply| api.answer_look_up(request, reply)),
                    Err(error) => reply.answer(Err(error.into())),
                }));
            }
            Err(error) => reply.answer(Err(error.into())),
        }));
    }

    fn answer_look_up(self: Arc<Self>, request: LeaseTimeToLiveRequest, reply: Reply) {
        match self.look_up_lease(&request) {
            Ok(Some(found)) if request.keys => {
                let pool = self.pool.clone();
                pool.run(move || {
                    let found = self.with_keys(found); // On the read pool: a lease may have many keys.
                    reply.answer(Ok(self.answer_time_to_live(&request, Some(found))));
                });
            }
            Ok(found) => reply.answer(Ok(self.answer_time_to_live(&request, found))),
            // It had no proof of its leadership for a moment.
            Err(Error::LeaderChanged) if self.leads() => self.look_up_as_leader(request, reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// What the leader knows about a lease, without its keys; None if the lease does not exist.
    pub(super) fn look_up_lease(
        &self,
        request: &LeaseTimeToLiveRequest,
    ) -> Result<Option<LeaseTimeToLiveResponse>, Error> {
        let id = LeaseId(request.id);
        let (readers, lease_expiry) = (self.readers(), self.node.lease_expiry());
        // A lease that only one of the two knows is being revoked at the moment.
        let found = readers.leases.lookup(id).and_then(|granted| Some((lease_expiry.remaining(id)?, granted)));
        let Some((ttl, granted_ttl)) = found else {
            return if lease_expiry.is_primary() { Ok(None) } else { Err(Error::LeaderChanged) };
        };
        Ok(Some(LeaseTimeToLiveResponse { id: request.id, ttl, granted_ttl, ..LeaseTimeToLiveResponse::default() }))
    }

    /// Adds the keys that are attached to a lease.
    pub(super) fn with_keys(&self, found: LeaseTimeToLiveResponse) -> LeaseTimeToLiveResponse {
        let keys = self.readers().leases.keys(LeaseId(found.id)).unwrap_or_default();
        LeaseTimeToLiveResponse { keys, ..found }
    }

    fn answer_time_to_live(&self, request: &LeaseTimeToLiveRequest, found: Option<LeaseTimeToLiveResponse>) -> Bytes {
        let header = Some(self.header.at(self.readers().keys.head()));
        let missing =
            LeaseTimeToLiveResponse { id: request.id, ttl: UNKNOWN_LEASE_TTL, ..LeaseTimeToLiveResponse::default() };
        LeaseTimeToLiveResponse { header, ..found.unwrap_or(missing) }.encode_to_vec().into()
    }

    /// `Lease/LeaseLeases`.
    pub fn lease_leases(self: &Arc<Self>, call: Call, reply: Reply) {
        if let Err(error) = decode::<LeaseLeasesRequest>(call.message) {
            return reply.answer(Err(error.into()));
        }
        let api = self.clone();
        self.pool.run(move || {
            let header = Some(api.header.at(api.readers().keys.head()));
            let response = LeaseLeasesResponse { header, leases: api.leases_by_expiry() };
            reply.answer(Ok(response.encode_to_vec().into()));
        });
    }

    /// All leases, those that expire first in front. A member that does not lead does not know when leases expire and orders
    /// them by ID.
    fn leases_by_expiry(&self) -> Vec<LeaseStatus> {
        let ids: Vec<LeaseId> = self.readers().leases.all().into_iter().map(|(id, _)| id).collect();
        let mut by_expiry = Vec::with_capacity(ids.len());
        for chunk in ids.chunks(EXPIRY_CHUNK_LEASES) {
            let expiries = self.node.lease_expiry().ends(chunk);
            by_expiry.extend(expiries.into_iter().map(|expiry| expiry.unwrap_or(Duration::MAX)).zip(chunk));
        }
        by_expiry.sort_unstable();
        by_expiry.into_iter().map(|(_, id)| LeaseStatus { id: id.0 }).collect()
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
