//! Disruptions: faults, and actions of operators.

use std::time::Duration;

use metastore::{raft_log::Position, state::Members};

use super::{
    client::MembershipChange,
    config::Disruption,
    member::Disks,
    world::{Event, MemberSlot, World},
};

/// The most members at once.
const MEMBERS_MAX: usize = 5;
/// The most members that are added to the initial ones during a run.
const ADDED_MEMBERS_MAX: u64 = 4;

impl World {
    /// Causes a disruption, and schedules the next one.
    pub fn disrupt(&mut self) {
        if self.quiescent {
            return;
        }
        let pause = self.rng.millis(20, self.config.disruption_interval);
        self.events.schedule(pause, Event::Disruption);
        let disruption = *self.rng.pick(&self.config.disruptions);
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let id = *self.rng.pick(&running);
        self.note(|_| format!("disruption of {id}: {disruption:?}"));
        match disruption {
            Disruption::Crash => self.crash(id),
            Disruption::CrashDuringIo => self.crash_during_io(id),
            Disruption::CrashAll => running.into_iter().for_each(|id| self.crash(id)),
            Disruption::Isolation => self.partition(&[id]),
            Disruption::Partition => {
                let side: Vec<u64> = self.slots.keys().copied().filter(|_| self.rng.percent(50)).collect();
                self.partition(&side);
            }
            Disruption::OneWayPartition => {
                let to = *self.rng.pick(&running);
                self.network.block(id, to);
                self.heal_later();
            }
            Disruption::StalledLog => self.stall(id, |slot, until| slot.log_stalled_until = until),
            Disruption::StalledApply => self.stall(id, |slot, until| slot.apply_stalled_until = until),
            Disruption::Pause => self.stall(id, |slot, until| slot.paused_until = until),
            Disruption::LeaderTransfer => {
                let to = *self.rng.pick(&running);
                if let Some(leader) = self.leader() {
                    self.member(leader).expect("it is running").node.transfer_leader(to);
                    self.schedule_threads(leader);
                }
            }
            Disruption::Reconfiguration => self.reconfigure(id),
        }
    }

    /// The power of a member fails; it restarts later.
    pub fn crash(&mut self, id: u64) {
        let Some(mut member) = self.slots.get_mut(&id).and_then(|slot| slot.member.take()) else { return };
        self.report.crashes += 1;
        let messages = member.outbox.take_messages();
        self.note(|_| format!("{id}: crashes"));
        if self.rng.percent(10) {
            let _ = member.run_background(self.now()); // A flush may have completed just before.
        }
        let mut rng = self.rng.split();
        let disks = member.crash(&mut rng);
        let slot = self.slots.get_mut(&id).expect("it exists");
        *slot = MemberSlot { disks: Some(disks), ..MemberSlot::default() };
        for message in messages {
            self.events.schedule(Duration::ZERO, Event::Arrival { via: id, message: Box::new(message) });
        }
        self.fail_transfers(id);
        for watcher in self.watchers.iter_mut().filter(|watcher| watcher.member() == Some(id)) {
            watcher.disconnect();
        }
        let rest = if self.rng.percent(50) { 300 } else { 4000 };
        let delay = self.rng.millis(0, rest);
        self.events.schedule(delay, Event::Start(id));
    }

    fn crash_during_io(&mut self, id: u64) {
        let operations = 1 + self.rng.below(20) as u64;
        let in_files = self.rng.percent(50);
        let member = self.member(id).expect("it is running");
        if in_files && member.break_files(operations) {
            return member.disk_state.cut_power_after(u64::MAX);
        }
        member.disk_state.cut_power_after(operations);
    }

    /// Blocks all links between these members and the others, for a while.
    pub fn partition(&mut self, side: &[u64]) {
        let ids: Vec<u64> = self.slots.keys().copied().collect();
        let (inside, outside): (Vec<u64>, Vec<u64>) = ids.into_iter().partition(|id| side.contains(id));
        for &from in &inside {
            for &to in &outside {
                self.network.block(from, to);
                self.network.block(to, from);
            }
        }
        self.heal_later();
    }

    fn heal_later(&mut self) {
        let delay = self.rng.millis(200, 4000);
        self.events.schedule(delay, Event::Heal);
    }

    fn stall(&mut self, id: u64, stall: impl FnOnce(&mut MemberSlot, Duration)) {
        let until = self.events.now() + self.rng.millis(100, 4000);
        stall(self.slots.get_mut(&id).expect("it is running"), until);
    }

    /// The member that leads in the highest term, by its own account.
    pub fn leader(&mut self) -> Option<u64> {
        let members = self.slots.iter_mut().filter_map(|(id, slot)| Some((*id, slot.member.as_mut()?)));
        let leaders = members.filter(|(_, member)| member.threads.core.raft_thread.replica.leads());
        leaders.max_by_key(|(_, member)| member.threads.core.raft_thread.replica.term()).map(|(id, _)| id)
    }

    /// Requests a membership change, mostly one that is possible.
    fn reconfigure(&mut self, at: u64) {
        let members: Vec<(u64, bool)> = self.history.model.members.iter().map(|(id, it)| (*id, *it)).collect();
        let ids: Vec<u64> = members.iter().map(|(id, _)| *id).collect();
        let newest = *self.slots.last_key_value().expect("there are initial members").0;
        let (some, next) = (*self.rng.pick(&ids), newest + 1);
        let learner = self.rng.percent(50);
        let change = match self.rng.below(10) {
            0..4 if members.len() < MEMBERS_MAX && next <= self.config.founders + ADDED_MEMBERS_MAX => {
                let max_learners = self.rng.percent(50).then_some(1);
                MembershipChange::Add { id: next, learner, max_learners }
            }
            0..5 => match members.iter().find(|(_, is_learner)| *is_learner) {
                Some((id, _)) => MembershipChange::Promote(*id),
                None => MembershipChange::Promote(some),
            },
            5..9 => MembershipChange::Remove(some),
            _ => MembershipChange::Add {
                id: self.rng.between(1, newest.cast_signed()).cast_unsigned(),
                learner,
                max_learners: None,
            },
        };
        self.report.changes += 1;
        self.change_members(at, change);
    }

    /// Starts the members that were added.
    pub fn start_added_members(&mut self) {
        for id in std::mem::take(&mut self.history.added_members) {
            let disks = Disks::new(id, &Members::default(), Position::default(), self.config.segment_files);
            self.slots.insert(id, MemberSlot { disks: Some(disks), ..MemberSlot::default() });
            let delay = self.rng.millis(0, 2000);
            self.events.schedule(delay, Event::Start(id));
        }
    }

    /// A removed member stops for good, because it applied its removal or was told of it: other members can no longer reach it.
    pub fn stop_removed(&mut self, id: u64) {
        if self.slots[&id].member.is_none() {
            return; // Its next incarnation will be told again.
        }
        self.note(|_| format!("{id}: stops for good"));
        self.crash(id);
        *self.slots.get_mut(&id).expect("it exists") =
            MemberSlot { knows_of_removal: true, gone: true, ..MemberSlot::default() };
    }
}
