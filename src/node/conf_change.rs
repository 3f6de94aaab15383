//! Membership changes as raft's configuration changes.
//!
//! The entry itself is an ordinary command. For raft it is wrapped in a `ConfChange`, which says which member gains or loses a
//! vote. That is derived here from the command's own bytes, so the two cannot disagree.

use bytes::Bytes;
use raft::eraftpb::{ConfChange, ConfChangeType};

use crate::state::{Command, Request};

/// The configuration change around an entry; None if the entry changes neither voters nor learners.
#[must_use]
pub fn to_conf_change(entry: Bytes) -> Option<ConfChange> {
    let (kind, member) = match Command::decode(entry.clone()).ok()?.request {
        Request::MemberAdd(newcomer) if newcomer.member.is_learner => {
            (ConfChangeType::AddLearnerNode, newcomer.member.id)
        }
        Request::MemberAdd(newcomer) => (ConfChangeType::AddNode, newcomer.member.id),
        Request::MemberPromote(promote) => (ConfChangeType::AddNode, promote.id),
        Request::MemberRemove(remove) => (ConfChangeType::RemoveNode, remove.id),
        Request::Put(_)
        | Request::DeleteRange(_)
        | Request::Txn(_)
        | Request::Compact(_)
        | Request::LeaseGrant(_)
        | Request::LeaseRevoke(_)
        | Request::Alarm(_)
        | Request::Auth(_)
        | Request::CapabilityLevelSet(_)
        | Request::LeaseExpire(_)
        | Request::ClusterVersionSet(_)
        | Request::MemberAttributesSet(_)
        | Request::MemberUpdate(_)
        | Request::Unknown(_) => return None,
    };
    Some(ConfChange { change_type: kind, node_id: member, context: entry, ..ConfChange::default() })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{
        proto::etcdserverpb::{Member, MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest},
        state::{Kind, NewMember},
    };

    #[test]
    fn a_change_names_the_member_that_gains_or_loses_a_vote() {
        let newcomer = |is_learner| {
            let member = Member { id: 7, is_learner, ..Member::default() };
            NewMember { member, max_learners: Some(1) }.encode()
        };
        for (kind, request, expected) in [
            (Kind::MemberAdd, newcomer(false), Some(ConfChangeType::AddNode)),
            (Kind::MemberAdd, newcomer(true), Some(ConfChangeType::AddLearnerNode)),
            (Kind::MemberPromote, MemberPromoteRequest { id: 7 }.encode_to_vec(), Some(ConfChangeType::AddNode)),
            (Kind::MemberRemove, MemberRemoveRequest { id: 7 }.encode_to_vec(), Some(ConfChangeType::RemoveNode)),
            (Kind::MemberUpdate, MemberUpdateRequest { id: 7, ..Default::default() }.encode_to_vec(), None),
        ] {
            let entry = Command::encode(1, kind, &request);
            let change = to_conf_change(entry.clone());
            assert_eq!(change.as_ref().map(|change| change.change_type), expected);
            assert!(change.is_none_or(|change| change.node_id == 7 && change.context == entry));
        }
        assert!(to_conf_change(Bytes::from_static(b"\xff")).is_none());
    }
}
