//! Changes of the members: that one is agreed, which disks remember it, and how raft follows.
//!
//! A member that was removed goes and cannot be asked again. If the others have the entry, but forget that it was agreed on,
//! they may need the vote of the one that is gone: of two members the one that stays could never be elected. Which entries
//! are agreed is otherwise nothing that has to be remembered, and is written with the next group; of a change it is.
//!
//! INVARIANTS
//! * That a change is agreed is on this member's disk before the change is applied here, before this member tells others of
//!   it as their leader, and before it reports it to one.
//! * A member that was removed ends by itself only if the others remember it.

use raft::{
    INVALID_ID,
    eraftpb::{ConfChange, ConfChangeType, ConfState, Entry, EntryType},
};

use super::Replica;

impl<R> Replica<R> {
    /// The change at `index` is in the database, or was refused there. Returns who votes now, unless a snapshot has come
    /// meanwhile, which says so itself.
    pub fn apply_conf_change(&mut self, index: u64, change: Option<&ConfChange>) -> Option<ConfState> {
        if index <= self.raft.store().truncated().index && self.unapplied_changes.front() != Some(&index) {
            return None;
        }
        let expected = self.unapplied_changes.pop_front();
        assert_eq!(expected, Some(index), "changes are followed in the order in which they were handed out");
        if let Some(change) = change {
            let conf_state =
                self.raft.apply_conf_change(change).expect("the member table has found nothing wrong with it");
            self.raft.mut_store().set_conf_state(conf_state);
            self.step_down_if_removed();
        }
        self.applied(index);
        Some(self.conf_state())
    }

    /// Whether this leader is removed by the agreed change at `index`, and those that stay may forget that it is agreed.
    #[must_use]
    pub fn removal_must_wait(&self, index: u64, change: Option<&ConfChange>) -> bool {
        let removes_us = |change: &ConfChange| {
            change.change_type == ConfChangeType::RemoveNode && change.node_id == self.raft.raft.id
        };
        self.leads() && change.is_some_and(removes_us) && !self.others_know_commit(index)
    }

    /// Whether the members that stay know, on their disks, that the change at `index` is agreed which removes this one. If
    /// they did not they might need its vote for ever.
    ///
    /// A leader tells of a change only what is on its own disk, and members report to a leader only what is on theirs. So
    /// many have to know it that any majority of those that stay has one among them: it will be elected, or its refusal
    /// tells the candidate.
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

    /// A leader that the cluster has removed would go on leading, and raft-rs would look for its progress in vain.
    fn step_down_if_removed(&mut self) {
        if self.leads() && self.raft.raft.prs().get(self.raft.raft.id).is_none() {
            self.raft.raft.become_follower(self.term(), INVALID_ID);
        }
    }

    /// The commit index that is on disk once all writes under way are.
    pub(super) fn commit_after_writes(&self) -> u64 {
        self.writes.back().map_or(self.saved_commit, |write| write.commit)
    }

    /// Whether this leader would tell others that a change of the members is agreed, while its disk knows that of entries up
    /// to `saved` only. (In a new term raft-rs takes the last entry for a change: that costs a sync, once.)
    pub(super) fn would_reveal_change(&self, saved: u64) -> bool {
        let last_change = self.raft.raft.pending_conf_index;
        self.leads() && saved < last_change && last_change <= self.raft.raft.raft_log.committed
    }

    /// Keeps agreed entries back from the first change of the members on whose agreement is not on disk.
    pub(super) fn hold_changes(&mut self, committed: Vec<Entry>) -> Vec<Entry> {
        let is_unsaved = |entry: &Entry| entry.entry_type != EntryType::EntryNormal && entry.index > self.saved_commit;
        if self.held.is_empty() && !committed.iter().any(is_unsaved) {
            return committed;
        }
        self.held.extend(committed);
        self.take_released().unwrap_or_default()
    }

    /// What was kept back, and need not be any longer.
    pub(super) fn take_released(&mut self) -> Option<Vec<Entry>> {
        let is_unsaved = |entry: &Entry| entry.entry_type != EntryType::EntryNormal && entry.index > self.saved_commit;
        let count = self.held.iter().position(is_unsaved).unwrap_or(self.held.len());
        (count > 0).then(|| self.held.drain(..count).collect())
    }
}
