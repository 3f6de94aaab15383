//! When this member may call an election.

use super::Replica;

impl<R> Replica<R> {
    /// Brings the next election nearer by this many ticks, unless a leader is known: for a member that has just started and need
    /// not wait as long as one that has lost its leader.
    pub fn shorten_election(&mut self, ticks: u64) {
        if self.raft.raft.leader_id == 0 {
            (0..ticks).for_each(|_| self.tick_election());
        }
    }

    /// Ticks raft-rs's clock, which is stopped while an election would have to wait.
    pub(super) fn tick_election(&mut self) {
        if !self.election_must_wait() {
            self.raft.tick();
        }
    }

    /// Whether this member would elect itself although entries of its log are not durable yet. A candidate's vote requests
    /// are sent after the write that they depend on. But a sole voter sends none and leads at once, and raft-rs panics if
    /// entries are still being written then. This happens if the other voter was removed during the write.
    pub(super) fn election_must_wait(&self) -> bool {
        let log = &self.raft.raft.raft_log;
        log.persisted < log.last_index() && !self.leads() && self.conf_state().voters == [self.raft.raft.id]
    }
}
