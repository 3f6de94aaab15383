//! What a member starts with.

use crate::{
    proto::etcdserverpb::Member,
    raft_log::{Identity, Position},
};

/// The initial state of a member.
pub struct BootstrapPlan {
    pub identity: Identity,
    /// All members, if the cluster is new.
    pub members: Vec<Member>,
    /// The members to contact, if this one joins a cluster: the log has yet to tell it the members.
    pub join_contacts: Vec<Member>,
    /// The position from which its log starts.
    pub at: Position,
}
