//! The member list and membership changes.
//!
//! Every response holds all members, by ascending ID, after a header without a revision. A change is refused here if the request
//! is invalid, if it could lose the quorum ([`super::quorum`]), or if a learner to be promoted has not caught up. The member
//! table decides finally, where the change is applied, on all replicas alike.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use prost::Message;

use super::{
    Api,
    company::{LeaderAnswer, outcome},
    decode, not_implemented,
    quorum::ReconfigCheck,
};
use crate::{
    call::{Call, CallResult, Reply},
    error::Error,
    node::identity::MemberId,
    proto::etcdserverpb::{
        Member, MemberAddRequest, MemberListRequest, MemberListResponse, MemberPromoteRequest, MemberPromoteResponse,
        MemberRemoveRequest, MemberUpdateRequest,
    },
    state::{Command, Kind, Members, NewMember, Response},
    urls::{Url, UrlAddress},
};

/// A learner can be promoted once its match index has reached this fraction of the leader's.
const READY_RATIO: f64 = 0.9;

impl Api {
    /// `Cluster/MemberList`.
    pub fn member_list(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = match decode::<MemberListRequest>(call.message) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        let api = self.clone();
        self.read(!request.linearizable, reply, move |reply| {
            let response = MemberListResponse { header: Some(api.header.at(0)), members: api.members() };
            reply.answer(Ok(response.encode_to_vec().into()));
        });
    }

    /// All members, by ascending ID.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.readers().cluster.read().members.iter().cloned().collect()
    }

    /// `Cluster/MemberAdd`.
    pub fn member_add(self: &Arc<Self>, call: Call, reply: Reply) {
        let new_member = decode::<MemberAddRequest>(call.message).and_then(|request| self.new_member(request));
        let new_member = new_member.and_then(|new_member| {
            self.check_quorum(|check| check.check_addition(new_member.member.is_learner))?;
            Ok(new_member)
        });
        match new_member {
            Ok(new_member) => self.change_members(Kind::MemberAdd, &new_member.encode(), reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// The member to be added, with an ID that is made of its URLs and the present time.
    fn new_member(&self, request: MemberAddRequest) -> Result<NewMember, Error> {
        let mut urls = parse_peer_urls(&request.peer_ur_ls)?;
        if urls.is_empty() {
            return Err(Error::MemberBadUrls);
        }
        urls.sort();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = MemberId::of_added(&urls, i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let is_learner = request.is_learner;
        let peer_ur_ls = urls.iter().map(ToString::to_string).collect();
        Ok(NewMember {
            member: Member { id: id.get(), peer_ur_ls, is_learner, ..Member::default() },
            max_learners: is_learner.then_some(self.company.max_learners),
        })
    }

    /// `Cluster/MemberRemove`.
    pub fn member_remove(self: &Arc<Self>, call: Call, reply: Reply) {
        let checked = decode::<MemberRemoveRequest>(call.message.clone());
        match checked.and_then(|request| self.check_quorum(|check| check.check_removal(request.id))) {
            Ok(()) => self.change_members(Kind::MemberRemove, &call.message, reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// `Cluster/MemberUpdate`. Not a raft configuration change: raft does not know the members' URLs.
    pub fn member_update(self: &Arc<Self>, call: Call, reply: Reply) {
        // etcd accepts any text, and members that find one that is no URL exit.
        match decode::<MemberUpdateRequest>(call.message.clone())
            .and_then(|request| parse_peer_urls(&request.peer_ur_ls))
        {
            // etcd accepts an empty list too, and the other members exit.
            Ok(urls) if urls.is_empty() => reply.answer(Err(Error::MemberBadUrls.into())),
            Ok(_) => self.propose(Kind::MemberUpdate, &call.message, reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// `Cluster/MemberPromote`.
    pub fn member_promote(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = match decode::<MemberPromoteRequest>(call.message) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        let (api, token) = (self.clone(), call.metadata.token);
        self.company.runtime.spawn(async move { reply.answer(api.promote_or_ask_leader(request.id, token).await) });
    }

    async fn promote_or_ask_leader(self: Arc<Self>, id: u64, token: Option<String>) -> CallResult {
        let client = &self.company.client;
        loop {
            match self.promote(id).await {
                Err(Error::NotLeader) => (),
                outcome => return self.header.answer(outcome),
            }
            let asked = self.ask_leader(|url, timeout| {
                let token = token.clone();
                async move { client.promote(&url, id, token, timeout).await }
            });
            if let LeaderAnswer::Answered(members) = asked.await? {
                let response = MemberPromoteResponse { header: Some(self.header.at(0)), members: members? };
                return Ok(response.encode_to_vec().into());
            }
        }
    }

    /// Promotes a learner if this member leads: only the leader knows how far a learner has caught up.
    pub async fn promote(self: &Arc<Self>, id: u64) -> Result<Response, Error> {
        outcome(|waiter| self.node.catch_up(waiter)).await?;
        let progress = outcome(|waiter| self.node.progress(Box::new(move |progress| waiter(Ok(progress))))).await?;
        let progress = progress.ok_or(Error::NotLeader)?;
        let matched = |member| progress.iter().find(|(id, _)| *id == member).map(|(_, matched)| *matched);
        let learner = matched(id).ok_or(Error::MemberNotFound)?;
        if !is_ready(learner, matched(self.header.member_id()).unwrap_or_default()) {
            return Err(Error::LearnerNotReady);
        }
        self.check_quorum(|check| check.check_promotion())?;
        let (request_id, request) = (self.ids.next(), MemberPromoteRequest { id }.encode_to_vec());
        let entry = Command::encode(request_id, Kind::MemberPromote, &request);
        outcome(|waiter| self.node.change_members(request_id, entry, waiter)).await
    }

    /// Checks that a membership change cannot lose the quorum, if that is configured.
    fn check_quorum(
        &self,
        check: impl FnOnce(ReconfigCheck<'_, &Connected>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !self.company.strict {
            return Ok(());
        }
        let members: Members = self.readers().cluster.read().members.clone();
        let connected = |member| self.node.connectivity().active_for(member);
        check(ReconfigCheck { members: &members, this: self.header.member_id(), connected: &connected })
            .inspect_err(|error| tracing::warn!(%error, "rejecting a membership change"))
    }

    fn change_members(&self, kind: Kind, request: &[u8], reply: Reply) {
        let id = self.ids.next();
        let entry: Bytes = Command::encode(id, kind, request);
        let header = self.header.clone();
        self.node.change_members(id, entry, Box::new(move |outcome| reply.answer(header.answer(outcome))));
    }

    /// All methods of `Auth`.
    pub fn auth<M: Message + Default>(self: &Arc<Self>, call: Call, reply: Reply) {
        reply.answer(Err(match decode::<M>(call.message) {
            Ok(_) => not_implemented("this version of metastore has no users, roles and permissions yet"),
            Err(error) => error.into(),
        }));
    }
}

type Connected<'a> = dyn Fn(u64) -> Option<std::time::Duration> + 'a;

#[allow(clippy::cast_precision_loss, reason = "etcd compares floats, and the loss of precision does not matter here")]
fn is_ready(learner: u64, leader: u64) -> bool {
    learner as f64 >= leader as f64 * READY_RATIO
}

/// Parses the peer URLs of a member. A member that cannot be reached would be missing from every quorum.
fn parse_peer_urls(urls: &[String]) -> Result<Vec<Url>, Error> {
    let parse = |text: &String| match Url::parse(text) {
        Ok(url) if matches!(url.address(), UrlAddress::Tcp { .. }) && !url.is_secure() => Ok(url),
        Ok(url) => Err(format!("{url}: only http is supported between members yet")),
        Err(error) => Err(error),
    };
    urls.iter().map(parse).collect::<Result<_, _>>().map_err(|error: String| {
        tracing::warn!(error, "rejecting a membership change with invalid peer URLs");
        Error::MemberBadUrls
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learner_is_ready_with_nine_tenths_of_the_leaders_log() {
        assert!(is_ready(90, 100) && is_ready(100, 100) && is_ready(0, 0));
        assert!(!is_ready(89, 100) && !is_ready(0, 1));
    }
}
