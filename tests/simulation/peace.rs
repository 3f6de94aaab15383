//! The end of a run: nothing goes wrong any more, and everything has to come to rest, everywhere alike.

use std::{collections::BTreeMap, time::Duration};

use super::{
    history::check_hashes,
    world::{Event, World},
};

/// Members have so long to come to rest.
const REST: Duration = Duration::from_secs(90);
/// So long something may stand still that began to before, and somebody may wait for an answer.
const STUCK: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(200);

impl World {
    /// Ends all trouble, waits for rest, and looks at what is left.
    pub fn make_peace(&mut self) {
        self.note(|_| "peace".to_owned());
        self.peace = true;
        self.network.heal();
        (self.climate.loss, self.climate.doubles, self.climate.late, self.climate.slow_syncs) = (0, 0, 0, 0);
        self.crash_many();
        self.run_for(STUCK);
        self.wait_for_rest();
        self.wait_for_leases_to_end();
        self.ask_everybody();
        self.wait_for_rest();
        self.check_end();
    }

    /// What survives this was really kept. Nobody is left who calls elections without asking: as timeouts are fixed here, a
    /// member that cannot win could go on calling them before all others.
    fn crash_many(&mut self) {
        for id in self.running() {
            if self.dice.percent(50) || !self.member(id).expect("it runs").pre_vote {
                self.crash(id);
            }
        }
        let ids: Vec<u64> = self.seats.keys().copied().collect();
        for id in ids {
            self.agenda.after(STEP, Event::Start(id));
        }
        self.run_for(2 * STEP);
        // A fuse that is still lit goes out.
        for id in self.running() {
            let member = self.member(id).expect("it runs");
            if member.gauge.is_lit() {
                self.crash(id);
                self.agenda.after(STEP, Event::Start(id));
            }
        }
    }

    pub fn wait_for_rest(&mut self) {
        let end = self.agenda.now() + REST;
        while !self.rests() {
            assert!(self.agenda.now() < end, "the cluster does not come to rest: {}", self.describe());
            self.run_for(STEP);
            self.settle_watchers();
        }
    }

    /// Everybody has applied all there is.
    fn rests(&mut self) -> bool {
        let (last, head) = (self.history.last_index(), self.history.model.head);
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        let rests = |id| {
            let seat = self.seats.get_mut(&id);
            let Some(member) = seat.and_then(|seat| seat.member.as_mut()) else { return false };
            let replica = &member.rooms.core.driver.replica;
            let led = self.history.model.members.contains_key(&replica.leadership().leader);
            let complete = replica.position(last + 1).is_none() && led;
            complete && member.applied().index == last && !member.is_installing()
        };
        let all = ids.into_iter().map(rests).filter(|rests| !rests).count() == 0;
        all && self.shipments.is_empty() && self.watchers.iter().all(|watcher| watcher.next == head + 1)
    }

    /// Watchers that have lost their member find another.
    fn settle_watchers(&mut self) {
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        for nth in 0..self.watchers.len() {
            let watched = self.watchers[nth].member();
            if watched.is_none_or(|id| !ids.contains(&id)) {
                let to = *self.dice.pick(&ids);
                if let Some(member) = self.seats.get(&to).and_then(|seat| seat.member.as_ref()) {
                    self.watchers[nth].go_to(to, member);
                }
            }
            if let Some(at) = self.watchers[nth].member() {
                self.deliver(at).expect("memory does not fail");
            }
        }
    }

    /// Every member, whoever leads, takes a write and answers a read. Nobody learns what became of a write that reaches its
    /// member inside a snapshot; then all are asked again.
    pub fn ask_everybody(&mut self) {
        loop {
            let before = self.report.snapshots;
            if self.everybody_answers() {
                return;
            }
            assert!(self.report.snapshots > before, "not all of it is answered: {}", self.describe());
        }
    }

    fn everybody_answers(&mut self) -> bool {
        // Who asked before has been answered by then, or refused, and is not counted for one of these.
        self.run_for(super::member::PATIENCE + STEP);
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        let (answers, reads) = (self.report.answers + ids.len(), self.report.reads + ids.len());
        for &id in &ids {
            self.propose(id);
            self.read(id);
        }
        let end = self.agenda.now() + super::clients::PATIENCE;
        while self.agenda.now() < end && (self.report.answers, self.report.reads) != (answers, reads) {
            self.run_for(STEP);
        }
        (self.report.answers, self.report.reads) == (answers, reads)
    }

    fn check_end(&mut self) {
        let ids: Vec<u64> = self.history.model.members.keys().copied().collect();
        let peaceful = self.history.replay();
        let chosen = *self.dice.pick(&ids);
        let mut remembered = BTreeMap::new();
        self.check_state(chosen, true);
        for id in ids {
            self.check_state(id, false);
            let now = self.now();
            let member = self.member(id).expect("it runs");
            let keys = member.node.readers().keys.clone();
            if id == chosen {
                check_hashes(&keys, &peaceful.keys);
            }
            while !member.compaction_is_done() {
                member.keep(now).expect("the disk works");
            }
            let (ours, theirs) = (keys.hash_kv(0), peaceful.keys.hash_kv(0));
            let equal = matches!((&ours, &theirs), (Ok(ours), Ok(theirs)) if ours == theirs);
            assert!(equal, "the hash of {id} is {ours:?}, and without trouble {theirs:?}");
            for hash in keys.compaction_hashes() {
                let (at, hash) = (hash.hash_revision, (hash.hash, hash.compact_revision));
                let other = *remembered.entry(at).or_insert(hash);
                assert_eq!(hash, other, "the hash that the compaction at {at} is remembered by, at {id}");
            }
            let members = member.electorate();
            let ids: Vec<(u64, bool)> = self.history.model.members.iter().map(|(id, learns)| (*id, *learns)).collect();
            let voters: Vec<u64> = ids.iter().filter(|(_, learns)| !learns).map(|(id, _)| *id).collect();
            assert_eq!(members.voters, voters, "who votes, at {id}");
            assert_eq!(members.voters.len() + members.learners.len(), ids.len(), "who is a member, at {id}");
        }
        self.check_state(chosen, true);
    }

    /// How far everybody is, for who has to find out why.
    pub fn describe(&mut self) -> String {
        let (last, head) = (self.history.last_index(), self.history.model.head);
        let members = self.history.model.members.clone();
        let mut lines = vec![format!("agreed are {last} entries, revision {head}, members {members:?}")];
        for (id, seat) in &mut self.seats {
            let Some(member) = &mut seat.member else {
                lines.push(format!("{id}: does not run, gone: {}", seat.gone));
                continue;
            };
            let replica = &mut member.rooms.core.driver.replica;
            let line = format!(
                "{id}: term {}, {:?}, committed {}, log behind {} to {:?}, conf {:?}, progress {:?}",
                replica.term(),
                replica.leadership(),
                replica.committed(),
                replica.log().truncated(),
                raft::Storage::last_index(replica.log()),
                replica.conf_state(),
                replica.progress(),
            );
            lines.push(format!("{line}, applied {:?}, quiet {}", member.applied(), member.is_quiet()));
        }
        lines.extend(self.watchers.iter().map(|it| format!("watcher at {:?}, {} is next", it.member(), it.next)));
        lines.extend(self.shipments.keys().map(|number| format!("shipment {number} is under way")));
        lines.join("\n")
    }
}
