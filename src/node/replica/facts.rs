//! What can be asked of a [`Replica`].

use raft::{ProgressState, StateRole, eraftpb::ConfState};

use super::{super::log::Position, Leadership, Replica};

impl<R> Replica<R> {
    /// The entry at an index, as a position.
    #[must_use]
    pub fn position(&self, index: u64) -> Option<Position> {
        self.raft.store().position(index)
    }

    /// Who leads.
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        self.leadership
    }

    /// Whether this member leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Who votes, and who learns.
    #[must_use]
    pub fn conf_state(&self) -> ConfState {
        self.raft.raft.prs().conf().to_conf_state()
    }

    /// Whether this is a voter, and there is nobody to talk to.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let others = self.raft.raft.prs().iter().any(|(&member, _)| member != self.raft.raft.id);
        !others && self.conf_state().voters == [self.raft.raft.id]
    }

    /// How far each member is known to be, by ID; only a leader knows.
    #[must_use]
    pub fn progress(&self) -> Option<Vec<(u64, u64)>> {
        let matched = || self.raft.raft.prs().iter().map(|(&member, progress)| (member, progress.matched));
        self.leads().then(|| matched().collect())
    }

    /// The lowest index that a member that was heard lately still needs, if this one leads.
    #[must_use]
    pub fn needed_by_followers(&self) -> Option<u64> {
        let lively = |progress: &raft::Progress| progress.recent_active && progress.state != ProgressState::Snapshot;
        let matched = self.raft.raft.prs().iter().filter(|(_, progress)| lively(progress)).map(|(_, it)| it.matched);
        if self.leads() { matched.min() } else { None }
    }

    /// The commit index.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    /// The present term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// Bytes of the entries that are kept in memory.
    #[must_use]
    pub fn log_bytes(&self) -> usize {
        self.raft.store().size_bytes()
    }
}
