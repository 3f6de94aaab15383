//! The member list and membership changes.
//!
//! Every outcome holds all members, by ascending ID. A change is refused here if the request is invalid, or if the cluster's own
//! checks refuse it ([`crate::cluster`]). The member table decides finally, where the change is applied, on all replicas alike.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Caller, Operation, Outcome, Reply, Request, Service};
use crate::{
    cluster::{LeaderAnswer, await_outcome},
    error::Error,
    net::url::{Url, UrlAddress},
    node::identity::MemberId,
    proto::etcdserverpb::{
        Member, MemberAddRequest, MemberAddResponse, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
        MemberUpdateRequest, MemberUpdateResponse,
    },
    state::{Command, Kind, NewMember},
};

/// The members after a promotion.
#[derive(Debug)]
pub enum PromoteOutcome {
    /// This member leads and has committed it.
    Here(Outcome<MemberPromoteResponse>),
    /// The leader has answered.
    ByLeader(Vec<Member>),
}

impl Service {
    /// All members, by ascending ID.
    pub fn member_list(self: &Arc<Self>, caller: &Caller, linearizable: bool, reply: impl Reply<Vec<Member>>) {
        if let Err(error) = self.admit(caller, &Operation::MemberList) {
            return self.refuse(caller, "MemberList", error, reply, move |service, caller, reply| {
                service.member_list(caller, linearizable, reply);
            });
        }
        let cluster = self.cluster.clone();
        self.read(!linearizable, reply, move |reply| reply.answer(Ok(cluster.members())));
    }

    pub fn member_add(
        self: &Arc<Self>,
        caller: &Caller,
        request: MemberAddRequest,
        reply: impl Reply<Outcome<MemberAddResponse>>,
    ) {
        let target = request.peer_ur_ls.join(",");
        self.administer(caller, Operation::MemberAdd, target, reply, move |service, _, reply| {
            let checked = service.new_member(request).and_then(|new_member| {
                service.cluster.check_reconfig(|check| check.check_addition(new_member.member.is_learner))?;
                Ok(new_member)
            });
            match checked {
                Ok(new_member) => service.change_members(Kind::MemberAdd, &new_member.encode(), reply),
                Err(error) => reply.answer(Err(error)),
            }
        });
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
            max_learners: is_learner.then_some(self.cluster.max_learners),
        })
    }

    pub fn member_remove(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<MemberRemoveRequest>,
        reply: impl Reply<Outcome<MemberRemoveResponse>>,
    ) {
        let id = request.parsed.id;
        self.administer(caller, Operation::MemberRemove, format!("{id:x}"), reply, move |service, _, reply| {
            match service.cluster.check_reconfig(|check| check.check_removal(id)) {
                Ok(()) => service.change_members(Kind::MemberRemove, &request.raw, reply),
                Err(error) => reply.answer(Err(error)),
            }
        });
    }

    /// Not a raft configuration change: raft does not know the members' URLs.
    pub fn member_update(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<MemberUpdateRequest>,
        reply: impl Reply<Outcome<MemberUpdateResponse>>,
    ) {
        let target = format!("{:x}", request.parsed.id);
        self.administer(caller, Operation::MemberUpdate, target, reply, move |service, identity, reply| {
            // etcd accepts any text, and members that find one that is no URL exit.
            match parse_peer_urls(&request.parsed.peer_ur_ls) {
                // etcd accepts an empty list too, and the other members exit.
                Ok(urls) if urls.is_empty() => reply.answer(Err(Error::MemberBadUrls)),
                Ok(_) => service.propose(identity, Kind::MemberUpdate, &request.raw, reply),
                Err(error) => reply.answer(Err(error)),
            }
        });
    }

    pub fn member_promote(self: &Arc<Self>, caller: &Caller, id: u64, reply: impl Reply<PromoteOutcome>) {
        let asked_by = caller.clone();
        self.administer(caller, Operation::MemberPromote, format!("{id:x}"), reply, move |service, _, reply| {
            let service = service.clone();
            let runtime = service.cluster.runtime.clone();
            runtime.spawn(async move { reply.answer(service.promote_or_ask_leader(id, &asked_by).await) });
        });
    }

    /// Whether a caller may promote a learner, for the member that it has asked.
    pub async fn allow_promotion(self: &Arc<Self>, caller: Caller) -> Result<(), Error> {
        if self.admit(&caller, &Operation::MemberPromote).is_ok() {
            return Ok(());
        }
        await_outcome(|waiter| self.node().read_barrier(waiter)).await?;
        self.admit(&caller.confirmed(), &Operation::MemberPromote).map(drop)
    }

    async fn promote_or_ask_leader(&self, id: u64, caller: &Caller) -> Result<PromoteOutcome, Error> {
        let client = &self.cluster.client;
        loop {
            match self.cluster.promote(id).await {
                Err(Error::NotLeader) => (),
                outcome => return outcome.map(|response| PromoteOutcome::Here(response.into())),
            }
            let asked = self.cluster.ask_leader(caller.deadline, |url, timeout| {
                let token = caller.token.as_ref().map(|token| String::from_utf8_lossy(token).into_owned());
                async move { client.promote(&url, id, token, timeout).await }
            });
            if let LeaderAnswer::Answered(members) = asked.await? {
                return members.map(PromoteOutcome::ByLeader);
            }
        }
    }

    fn change_members<M: 'static>(&self, kind: Kind, request: &[u8], reply: impl Reply<Outcome<M>>) {
        let id = self.cluster.ids.next();
        let entry = Command::encode(id, kind, request);
        self.node().change_members(id, entry, Box::new(move |outcome| reply.answer(outcome.map(Into::into))));
    }
}

/// Parses the peer URLs of a member. A member that cannot be reached would be missing from every quorum.
fn parse_peer_urls(urls: &[String]) -> Result<Vec<Url>, Error> {
    let parse = |text: &String| match Url::parse(text) {
        Ok(url) if matches!(url.address(), UrlAddress::Tcp { .. }) => Ok(url),
        Ok(url) => Err(format!("{url}: unix sockets between members are not supported yet")),
        Err(error) => Err(error),
    };
    urls.iter().map(parse).collect::<Result<_, _>>().map_err(|error: String| {
        tracing::warn!(error, "rejecting a membership change with invalid peer URLs");
        Error::MemberBadUrls
    })
}
