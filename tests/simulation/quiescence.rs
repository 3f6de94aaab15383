//! The end of a run, the quiescent phase: there are no more faults, and all members have to converge to the same state.

use std::{collections::BTreeMap, time::Duration};

use super::{
    history::check_hashes,
    world::{Event, World},
};

/// The longest that members may take to converge.
const CONVERGENCE_TIMEOUT: Duration = Duration::from_secs(90);
/// The longest that a stall from before may still last, and that a request may still wait for its answer.
const STALL_MAX: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(200);
/// The most rounds of the background thread that a compaction takes.
const MAX_BACKGROUND_ROUNDS: usize = 10_000;

impl World {
    /// Ends all disruptions, waits until the members have converged, and checks their state.
    pub fn quiesce(&mut self) {
        self.note(|_| "quiescent phase".to_owned());
        self.quiescent = true;
        self.network.heal();
        (self.config.loss, self.config.duplicates, self.config.late, self.config.slow_syncs) = (0, 0, 0, 0);
        self.crash_many();
        self.run_for(STALL_MAX);
        self.wait_until_converged();
        self.wait_for_leases_to_end();
        self.check_every_member_serves();
        self.wait_until_converged();
        self.check_end();
    }

    /// Crashes some members: what survives was really durable. All members without pre-vote are among them and restart with
    /// it: as election timeouts are fixed here, a member that cannot win could otherwise start elections before all others
    /// for ever.
    fn crash_many(&mut self) {
        for id in self.running() {
            if self.rng.percent(50) || !self.member(id).expect("it is running").pre_vote {
                self.crash(id);
            }
        }
        let ids: Vec<u64> = self.slots.keys().copied().collect();
        for id in ids {
            self.events.schedule(STEP, Event::Start(id));
        }
        self.run_for(2 * STEP);
        // Power failures that are still planned happen now.
        for id in self.running() {
            let member = self.member(id).expect("it is running");
            if member.disk_state.may_lose_power() {
                self.crash(id);
                self.events.schedule(STEP, Event::Start(id));
            }
        }
    }

    pub fn wait_until_converged(&mut self) {
        let end = self.events.now() + CONVERGENCE_TIMEOUT;
        while !self.has_converged() {
            assert!(self.events.now() < end, "the cluster does not converge: {}", self.describe());
            self.run_for(STEP);
            self.reattach_watchers();
        }
    }

    /// Whether every member has applied, and every watcher received, everything.
    fn has_converged(&mut self) -> bool {
        let (last, head) = (self.history.last_index(), self.history.model.head);
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        let converged = |id| {
            let slot = self.slots.get_mut(&id);
            let Some(member) = slot.and_then(|slot| slot.member.as_mut()) else { return false };
            let replica = &member.threads.core.raft_thread.replica;
            let has_leader = self.history.model.members.contains_key(&replica.leadership().leader);
            let complete = replica.position(last + 1).is_none() && has_leader;
            complete && member.applied().index == last && !member.is_installing()
        };
        let all = ids.into_iter().map(converged).filter(|converged| !converged).count() == 0;
        all && self.transfers.is_empty() && self.watchers.iter().all(|watcher| watcher.next == head + 1)
    }

    /// Connects watchers that have lost their member to another one.
    fn reattach_watchers(&mut self) {
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        for nth in 0..self.watchers.len() {
            let watched = self.watchers[nth].member();
            if watched.is_none_or(|id| !ids.contains(&id)) {
                let to = *self.rng.pick(&ids);
                if let Some(member) = self.slots.get(&to).and_then(|slot| slot.member.as_ref()) {
                    self.watchers[nth].watch_at(to, member);
                }
            }
            if let Some(at) = self.watchers[nth].member() {
                self.deliver(at).expect("memory does not fail");
            }
        }
    }

    /// Every member, leading or not, executes a write and answers a read. If a write reaches its member inside a snapshot, its
    /// outcome stays unknown; then all members are asked again.
    pub fn check_every_member_serves(&mut self) {
        loop {
            let before = self.report.snapshots;
            if self.every_member_answers() {
                return;
            }
            assert!(self.report.snapshots > before, "not every request is answered: {}", self.describe());
        }
    }

    fn every_member_answers(&mut self) -> bool {
        // Earlier requests are answered or have timed out by then, so that they are not counted for these.
        self.run_for(super::member::REQUEST_TIMEOUT + STEP);
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        let (answers, reads) = (self.report.answers + ids.len(), self.report.reads + ids.len());
        for &id in &ids {
            self.propose(id);
            self.read(id);
        }
        let end = self.events.now() + super::clients::CLIENT_TIMEOUT;
        while self.events.now() < end && (self.report.answers, self.report.reads) != (answers, reads) {
            self.run_for(STEP);
        }
        (self.report.answers, self.report.reads) == (answers, reads)
    }

    fn check_end(&mut self) {
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        let fault_free = self.history.replay();
        let chosen = *self.rng.pick(&ids);
        let mut hashes = BTreeMap::new();
        self.check_state(chosen, true);
        for id in ids {
            self.check_state(id, false);
            let now = self.now();
            let member = self.member(id).expect("it is running");
            let keys = member.node.readers().keys.clone();
            if id == chosen {
                check_hashes(&keys, &fault_free.keys);
            }
            for round in 0.. {
                if member.compaction_is_done() {
                    break;
                }
                assert!(round < MAX_BACKGROUND_ROUNDS, "the compaction of {id} does not end");
                member.run_background(now).expect("the disk works");
            }
            let (ours, theirs) = (keys.hash_kv(0), fault_free.keys.hash_kv(0));
            let equal = matches!((&ours, &theirs), (Ok(ours), Ok(theirs)) if ours == theirs);
            assert!(equal, "the hash of {id} is {ours:?}, and without faults {theirs:?}");
            for hash in keys.compaction_hashes() {
                let (at, hash) = (hash.hash_revision, (hash.hash, hash.compact_revision));
                let other = *hashes.entry(at).or_insert(hash);
                assert_eq!(hash, other, "the compaction hash of revision {at} at member {id}");
            }
            let members = member.voters_and_learners();
            let ids: Vec<(u64, bool)> =
                self.history.model.members.iter().map(|(id, is_learner)| (*id, *is_learner)).collect();
            let voters: Vec<u64> = ids.iter().filter(|(_, is_learner)| !is_learner).map(|(id, _)| *id).collect();
            assert_eq!(members.voters, voters, "the voters according to {id}");
            assert_eq!(members.voters.len() + members.learners.len(), ids.len(), "the members according to {id}");
        }
        self.check_state(chosen, true);
    }

    /// The progress of all members, for failure messages.
    pub fn describe(&mut self) -> String {
        let (last, head) = (self.history.last_index(), self.history.model.head);
        let members = self.history.model.members.clone();
        let mut lines = vec![format!("committed: {last} entries, revision {head}, members {members:?}")];
        for (id, slot) in &mut self.slots {
            let Some(member) = &mut slot.member else {
                lines.push(format!("{id}: not running, gone: {}", slot.gone));
                continue;
            };
            let replica = &mut member.threads.core.raft_thread.replica;
            let line = format!(
                "{id}: term {}, {:?}, committed {}, log after {} up to {:?}, conf {:?}, progress {:?}",
                replica.term(),
                replica.leadership(),
                replica.committed(),
                replica.log().truncated(),
                raft::Storage::last_index(replica.log()),
                replica.conf_state(),
                replica.progress(),
            );
            lines.push(format!("{line}, applied {:?}, idle {}", member.applied(), member.is_idle()));
        }
        lines.extend(self.watchers.iter().map(|it| format!("watcher at {:?}, next revision {}", it.member(), it.next)));
        lines.extend(self.transfers.keys().map(|number| format!("snapshot transfer {number} is in flight")));
        lines.join("\n")
    }
}
