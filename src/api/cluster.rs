//! Who the members are.

use std::sync::Arc;

use prost::Message;

use super::{Api, decode, not_yet};
use crate::{
    call::{Call, Reply},
    proto::etcdserverpb::{Member, MemberListRequest, MemberListResponse},
};

impl Api {
    /// `Cluster/MemberList`.
    pub fn member_list(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = match decode::<MemberListRequest>(call.message) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        let api = self.clone();
        self.read(!request.linearizable, reply, move |reply| {
            // Headers of this service carry no revision.
            let response = MemberListResponse { header: Some(api.header.at(0)), members: api.members() };
            reply.answer(Ok(response.encode_to_vec().into()));
        });
    }

    /// All members, by ascending ID.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.readers().board.read().members.iter().cloned().collect()
    }

    /// Everything about users and roles.
    pub fn auth(self: &Arc<Self>, _call: Call, reply: Reply) {
        reply.answer(Err(not_yet("this version of metastore has no users, roles and permissions yet")));
    }

    /// Every change of the members.
    pub fn member_change(self: &Arc<Self>, _call: Call, reply: Reply) {
        reply.answer(Err(not_yet("this version of metastore cannot change the members of a cluster yet")));
    }
}
