//! Who the members are, and how that changes.
//!
//! Every answer holds all members, by ascending ID, behind a header without a revision. What can be refused here is: by the
//! request alone, by the rules that keep a quorum ([`super::quorum`]), for a promotion by how far the learner is. The table of
//! members has the last word, where the change is applied, on all replicas alike.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use prost::Message;

use super::{
    Api,
    company::{Led, outcome},
    decode, not_yet,
    quorum::Outlook,
};
use crate::{
    call::{Answer, Call, Reply},
    error::Error,
    node::identity::MemberId,
    proto::etcdserverpb::{
        Member, MemberAddRequest, MemberListRequest, MemberListResponse, MemberPromoteRequest, MemberPromoteResponse,
        MemberRemoveRequest, MemberUpdateRequest,
    },
    state::{Command, Kind, Members, Newcomer, Response},
    urls::{Place, Url},
};

/// A learner is ready when it has this share of what the leader has.
const READY: f64 = 0.9;

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
        self.readers().board.read().members.iter().cloned().collect()
    }

    /// `Cluster/MemberAdd`.
    pub fn member_add(self: &Arc<Self>, call: Call, reply: Reply) {
        let newcomer = decode::<MemberAddRequest>(call.message).and_then(|request| self.newcomer(request));
        let newcomer = newcomer.and_then(|newcomer| {
            self.check_quorum(|outlook| outlook.check_addition(newcomer.member.is_learner))?;
            Ok(newcomer)
        });
        match newcomer {
            Ok(newcomer) => self.change_members(Kind::MemberAdd, &newcomer.encode(), reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// Who is wanted, with an ID of its own: the URLs and the moment make it.
    fn newcomer(&self, request: MemberAddRequest) -> Result<Newcomer, Error> {
        let mut urls = read_urls(&request.peer_ur_ls)?;
        if urls.is_empty() {
            return Err(Error::MemberBadUrls);
        }
        urls.sort();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = MemberId::of_added(&urls, i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let is_learner = request.is_learner;
        let peer_ur_ls = urls.iter().map(ToString::to_string).collect();
        Ok(Newcomer {
            member: Member { id: id.get(), peer_ur_ls, is_learner, ..Member::default() },
            max_learners: is_learner.then_some(self.company.max_learners),
        })
    }

    /// `Cluster/MemberRemove`.
    pub fn member_remove(self: &Arc<Self>, call: Call, reply: Reply) {
        let checked = decode::<MemberRemoveRequest>(call.message.clone());
        match checked.and_then(|request| self.check_quorum(|outlook| outlook.check_removal(request.id))) {
            Ok(()) => self.change_members(Kind::MemberRemove, &call.message, reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// `Cluster/MemberUpdate`. Raft need not know where a member is.
    pub fn member_update(self: &Arc<Self>, call: Call, reply: Reply) {
        // etcd takes any text, and members that meet one that is no URL end.
        match decode::<MemberUpdateRequest>(call.message.clone()).and_then(|request| read_urls(&request.peer_ur_ls)) {
            // etcd takes an empty list too, and the other members end.
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
        self.company.runtime.spawn(async move { reply.answer(api.promote_somewhere(request.id, token).await) });
    }

    async fn promote_somewhere(self: Arc<Self>, id: u64, token: Option<String>) -> Answer {
        let client = &self.company.client;
        loop {
            match self.promote(id).await {
                Err(Error::NotLeader) => (),
                told => return self.header.answer(told),
            }
            let asked = self.ask_leader(|url, patience| {
                let token = token.clone();
                async move { client.promote(&url, id, token, patience).await }
            });
            if let Led::There(told) = asked.await? {
                let response = MemberPromoteResponse { header: Some(self.header.at(0)), members: told? };
                return Ok(response.encode_to_vec().into());
            }
        }
    }

    /// Promotes a learner if this member leads: only a leader knows how far it is.
    pub async fn promote(self: &Arc<Self>, id: u64) -> Result<Response, Error> {
        outcome(|waiter| self.node.catch_up(waiter)).await?;
        let progress = outcome(|waiter| self.node.progress(Box::new(move |progress| waiter(Ok(progress))))).await?;
        let progress = progress.ok_or(Error::NotLeader)?;
        let matched = |member| progress.iter().find(|(id, _)| *id == member).map(|(_, matched)| *matched);
        let learner = matched(id).ok_or(Error::MemberNotFound)?;
        if !is_ready(learner, matched(self.header.member_id()).unwrap_or_default()) {
            return Err(Error::LearnerNotReady);
        }
        self.check_quorum(|outlook| outlook.check_promotion())?;
        let (request_id, request) = (self.ids.next(), MemberPromoteRequest { id }.encode_to_vec());
        let entry = Command::encode(request_id, Kind::MemberPromote, &request);
        outcome(|waiter| self.node.change_members(request_id, entry, waiter)).await
    }

    /// Asks whether the quorum could be lost, if anybody cares.
    fn check_quorum(&self, check: impl FnOnce(Outlook<'_, &Connected>) -> Result<(), Error>) -> Result<(), Error> {
        if !self.company.strict {
            return Ok(());
        }
        let members: Members = self.readers().board.read().members.clone();
        let connected = |member| self.node.links().active_for(member);
        check(Outlook { members: &members, this: self.header.member_id(), connected: &connected })
            .inspect_err(|error| tracing::warn!(%error, "rejecting a change of the members"))
    }

    fn change_members(&self, kind: Kind, request: &[u8], reply: Reply) {
        let id = self.ids.next();
        let entry: Bytes = Command::encode(id, kind, request);
        let header = self.header.clone();
        self.node.change_members(id, entry, Box::new(move |outcome| reply.answer(header.answer(outcome))));
    }

    /// Everything about users and roles.
    pub fn auth<M: Message + Default>(self: &Arc<Self>, call: Call, reply: Reply) {
        reply.answer(Err(match decode::<M>(call.message) {
            Ok(_) => not_yet("this version of metastore has no users, roles and permissions yet"),
            Err(error) => error.into(),
        }));
    }
}

type Connected<'a> = dyn Fn(u64) -> Option<std::time::Duration> + 'a;

#[allow(clippy::cast_precision_loss, reason = "etcd compares floats, and so close to nine tenths nobody is")]
fn is_ready(learner: u64, leader: u64) -> bool {
    learner as f64 >= leader as f64 * READY
}

/// Where a member is to be reached. A member that cannot be would be missing from every quorum.
fn read_urls(urls: &[String]) -> Result<Vec<Url>, Error> {
    let read = |text: &String| match Url::parse(text) {
        Ok(url) if matches!(url.place(), Place::Tcp { .. }) && !url.is_secure() => Ok(url),
        Ok(url) => Err(format!("only http is supported between members yet, not {url}")),
        Err(error) => Err(error),
    };
    urls.iter().map(read).collect::<Result<_, _>>().map_err(|error: String| {
        tracing::warn!(error, "refused the URLs of a member");
        Error::MemberBadUrls
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learner_is_ready_with_nine_tenths() {
        assert!(is_ready(90, 100) && is_ready(100, 100) && is_ready(0, 0));
        assert!(!is_ready(89, 100) && !is_ready(0, 1));
    }
}
