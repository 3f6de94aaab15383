//! Membership changes: making their commit durable before anything depends on it, and applying them in raft.
//!
//! A member that was removed stops and cannot be asked again. If the others have the entry but lose the fact that it was
//! committed, they may need the vote of the member that is gone: of two members, the remaining one could never be elected. In
//! general the commit index need not be durable, and is written with the next group; for a membership change it has to be.
//!
//! INVARIANTS
//! * The commit of a change is on this member's disk before the change is applied here, before this member as a leader tells
//!   others of it, and before it reports it to a leader.
//! * A member that was removed stops by itself only if the others have the commit on their disks.

use raft::{
    INVALID_ID,
    eraftpb::{ConfChange, ConfChangeType, ConfState, Entry, EntryType},
};

use super::Replica;

impl<R> Replica<R> {
    /// Call when the database has applied the change at `index`, or (with None) refused it. Returns the voters and learners now,
    /// unless a snapshot has arrived meanwhile, which contains them.
    pub fn apply_conf_change(&mut self, index: u64, change: Option<&ConfChange>) -> Option<ConfState> {
        if index <= self.raft.store().truncated().index && self.unapplied_changes.front() != Some(&index) {
            return None;
        }
        let expected = self.unapplied_changes.pop_front();
        assert_eq!(expected, Some(index), "changes are applied in the order in which they were handed out");
        if let Some(change) = change {
            let conf_state = self.raft.apply_conf_change(change).expect("the member table has accepted the change");
            self.raft.mut_store().set_conf_state(conf_state);
            self.step_down_if_removed();
        }
        self.applied(index);
        Some(self.conf_state())
    }

    /// Whether the committed change at `index` removes this leader, while the remaining members may not know durably that it is
    /// committed.
    #[must_use]
    pub fn removal_must_wait(&self, index: u64, change: Option<&ConfChange>) -> bool {
        let removes_us = |change: &ConfChange| {
            change.change_type == ConfChangeType::RemoveNode && change.node_id == self.raft.raft.id
        };
        self.leads() && change.is_some_and(removes_us) && !self.others_know_commit(index)
    }

    /// Whether enough of the remaining members know, on their disks, that the change at `index`, which removes this member, is
    /// committed. Otherwise they might need its vote for ever.
    ///
    /// A leader tells others only of changes whose commit is on its own disk, and members report to a leader only commit indexes
    /// that are on theirs. So many have to know it that any majority of the remaining members includes one of them: it will be
    /// elected, or its refusal tells the candidate.
    #[must_use]
    pub fn others_know_commit(&self, index: u64) -> bool {
        if self.leader_commit >= index {
            return true;
        }
        let raft = &self.raft.raft;
        let voters = self.conf_state().voters;
        let others: Vec<u64> = voters.into_iter().filter(|&voter| voter != raft.id).collect();
        let knows = |id: &&u64| raft.prs().get(**id).is_some_and(|progress| progress.committed_index >= index);
        self.leads() && others.iter().filter(knows).count() * 2 >= others.len()
    }

    /// Without this, a leader that was removed would continue to lead, and raft-rs would not find its progress.
    fn step_down_if_removed(&mut self) {
        if self.leads() && self.raft.raft.prs().get(self.raft.raft.id).is_none() {
            self.raft.raft.become_follower(self.term(), INVALID_ID);
        }
    }

    /// The commit index that is on disk once all writes under way are.
    pub(super) fn commit_after_writes(&self) -> u64 {
        self.writes.back().map_or(self.saved_commit, |write| write.commit)
    }

    /// Whether this leader's messages would reveal that a membership change is committed, while the commit index on its disk is
    /// only `saved`. (In a new term raft-rs assumes that the last entry is a membership change: that costs one sync.)
    pub(super) fn would_reveal_change(&self, saved: u64) -> bool {
        let last_change = self.raft.raft.pending_conf_index;
        self.leads() && saved < last_change && last_change <= self.raft.raft.raft_log.committed
    }

    /// Holds back committed entries from the first membership change whose commit is not on disk.
    pub(super) fn hold_changes(&mut self, committed: Vec<Entry>) -> Vec<Entry> {
        let is_unsaved = |entry: &Entry| entry.entry_type != EntryType::EntryNormal && entry.index > self.saved_commit;
        if self.held.is_empty() && !committed.iter().any(is_unsaved) {
            return committed;
        }
        self.held.extend(committed);
        self.take_released().unwrap_or_default()
    }

    /// The held entries that can be handed out now.
    pub(super) fn take_released(&mut self) -> Option<Vec<Entry>> {
        let is_unsaved = |entry: &Entry| entry.entry_type != EntryType::EntryNormal && entry.index > self.saved_commit;
        let count = self.held.iter().position(is_unsaved).unwrap_or(self.held.len());
        (count > 0).then(|| self.held.drain(..count).collect())
    }
}
