//! Accessors of [`Replica`].

use raft::{ProgressState, StateRole, eraftpb::ConfState};

use super::{Leadership, Replica};
use crate::raft_log::Position;

impl<R> Replica<R> {
    /// The position of the entry at an index.
    #[must_use]
    pub fn position(&self, index: u64) -> Option<Position> {
        self.raft.store().position(index)
    }

    /// The leader, as last reported in a [`Ready`](super::Ready).
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        self.leadership
    }

    /// Whether this member is the leader.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// The voters and learners.
    #[must_use]
    pub fn conf_state(&self) -> ConfState {
        self.raft.raft.prs().conf().to_conf_state()
    }

    /// Whether this member is a voter and the cluster has no other member.
    #[must_use]
    pub fn is_sole_member(&self) -> bool {
        let others = self.raft.raft.prs().iter().any(|(&member, _)| member != self.raft.raft.id);
        !others && self.conf_state().voters == [self.raft.raft.id]
    }

    /// The ID and match index of each member; None unless this member is the leader.
    #[must_use]
    pub fn progress(&self) -> Option<Vec<(u64, u64)>> {
        let matched = || self.raft.raft.prs().iter().map(|(&member, progress)| (member, progress.matched));
        self.leads().then(|| matched().collect())
    }

    /// The lowest match index among members that were active recently and are not being sent a snapshot; None unless this
    /// member is the leader.
    #[must_use]
    pub fn needed_by_followers(&self) -> Option<u64> {
        let is_active = |progress: &raft::Progress| progress.recent_active && progress.state != ProgressState::Snapshot;
        let matched = self.raft.raft.prs().iter().filter(|(_, progress)| is_active(progress)).map(|(_, it)| it.matched);
        if self.leads() { matched.min() } else { None }
    }

    /// The commit index.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// The size of the entries in memory.
    #[must_use]
    pub fn log_bytes(&self) -> usize {
        self.raft.store().size_bytes()
    }
}
