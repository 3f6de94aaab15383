//! What goes wrong, and what operators do.

use std::time::Duration;

use metastore::{node::log::Position, state::Members};

use super::{
    client::Change,
    climate::Trouble,
    member::Disks,
    world::{Event, Seat, World},
};

/// More members than this are not wanted at once.
const MEMBERS_MAX: usize = 5;
/// Nor so many more, in a life of a cluster, than founded it.
const NEWCOMERS_MAX: u64 = 4;

impl World {
    /// Something goes wrong, and something else will.
    pub fn trouble(&mut self) {
        if self.peace {
            return;
        }
        let pause = self.dice.millis(20, self.climate.trouble_every);
        self.agenda.after(pause, Event::Trouble);
        let trouble = *self.dice.pick(&self.climate.troubles);
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let id = *self.dice.pick(&running);
        self.note(|_| format!("trouble for {id}: {trouble:?}"));
        match trouble {
            Trouble::Crash => self.crash(id),
            Trouble::Fuse => self.light_fuse(id),
            Trouble::Blackout => running.into_iter().for_each(|id| self.crash(id)),
            Trouble::Isolation => self.cut(&[id]),
            Trouble::Partition => {
                let side: Vec<u64> = self.seats.keys().copied().filter(|_| self.dice.percent(50)).collect();
                self.cut(&side);
            }
            Trouble::OneWay => {
                let to = *self.dice.pick(&running);
                self.network.cut(id, to);
                self.heal_later();
            }
            Trouble::StuckLog => self.stick(id, |seat, until| seat.log_stuck_until = until),
            Trouble::StuckApply => self.stick(id, |seat, until| seat.apply_stuck_until = until),
            Trouble::Pause => self.stick(id, |seat, until| seat.asleep_until = until),
            Trouble::Transfer => {
                let to = *self.dice.pick(&running);
                if let Some(leader) = self.leader() {
                    self.member(leader).expect("it runs").node.transfer_leader(to);
                    self.arrange(leader);
                }
            }
            Trouble::Reconfiguration => self.reconfigure(id),
        }
    }

    /// The power fails, for one member; it will be back.
    pub fn crash(&mut self, id: u64) {
        let Some(mut member) = self.seats.get_mut(&id).and_then(|seat| seat.member.take()) else { return };
        self.report.crashes += 1;
        let messages = member.mailroom.take();
        self.note(|_| format!("{id}: crashes"));
        if self.dice.percent(10) {
            let _ = member.keep(self.now()); // A flush may just have come to its end.
        }
        let mut dice = self.dice.split();
        let disks = member.crash(&mut dice);
        let seat = self.seats.get_mut(&id).expect("it was there");
        *seat = Seat { disks: Some(disks), ..Seat::default() };
        for message in messages {
            self.agenda.after(Duration::ZERO, Event::Arrival { via: id, message: Box::new(message) });
        }
        self.lose_shipments(id);
        for watcher in self.watchers.iter_mut().filter(|watcher| watcher.member() == Some(id)) {
            watcher.lose();
        }
        let rest = if self.dice.percent(50) { 300 } else { 4000 };
        let delay = self.dice.millis(0, rest);
        self.agenda.after(delay, Event::Start(id));
    }

    fn light_fuse(&mut self, id: u64) {
        let operations = 1 + self.dice.below(20) as u64;
        let in_files = self.dice.percent(50);
        let member = self.member(id).expect("it runs");
        if in_files && member.break_files(operations) {
            return member.gauge.light(u64::MAX);
        }
        member.gauge.light(operations);
    }

    /// Nothing comes through between these and the others.
    pub fn cut(&mut self, side: &[u64]) {
        let ids: Vec<u64> = self.seats.keys().copied().collect();
        let (inside, outside): (Vec<u64>, Vec<u64>) = ids.into_iter().partition(|id| side.contains(id));
        for &from in &inside {
            for &to in &outside {
                self.network.cut(from, to);
                self.network.cut(to, from);
            }
        }
        self.heal_later();
    }

    fn heal_later(&mut self) {
        let delay = self.dice.millis(200, 4000);
        self.agenda.after(delay, Event::Heal);
    }

    fn stick(&mut self, id: u64, stick: impl FnOnce(&mut Seat, Duration)) {
        let until = self.agenda.now() + self.dice.millis(100, 4000);
        stick(self.seats.get_mut(&id).expect("it runs"), until);
    }

    /// Whoever believes to lead, in the highest term.
    pub fn leader(&mut self) -> Option<u64> {
        let members = self.seats.iter_mut().filter_map(|(id, seat)| Some((*id, seat.member.as_mut()?)));
        let leaders = members.filter(|(_, member)| member.rooms.core.driver.replica.leads());
        leaders.max_by_key(|(_, member)| member.rooms.core.driver.replica.term()).map(|(id, _)| id)
    }

    /// Somebody asks for other members: mostly for what can be had.
    fn reconfigure(&mut self, at: u64) {
        let members: Vec<(u64, bool)> = self.history.model.members.iter().map(|(id, it)| (*id, *it)).collect();
        let ids: Vec<u64> = members.iter().map(|(id, _)| *id).collect();
        let newest = *self.seats.last_key_value().expect("there are founders").0;
        let (some, next) = (*self.dice.pick(&ids), newest + 1);
        let learner = self.dice.percent(50);
        let change = match self.dice.below(10) {
            0..4 if members.len() < MEMBERS_MAX && next <= self.climate.founders + NEWCOMERS_MAX => {
                let max_learners = self.dice.percent(50).then_some(1);
                Change::Add { id: next, learner, max_learners }
            }
            0..5 => match members.iter().find(|(_, learns)| *learns) {
                Some((id, _)) => Change::Promote(*id),
                None => Change::Promote(some),
            },
            5..9 => Change::Remove(some),
            _ => Change::Add {
                id: self.dice.between(1, newest.cast_signed()).cast_unsigned(),
                learner,
                max_learners: None,
            },
        };
        self.report.changes += 1;
        self.change_members(at, change);
    }

    /// Whoever was taken in is started.
    pub fn welcome_newcomers(&mut self) {
        for id in std::mem::take(&mut self.history.newcomers) {
            let disks = Disks::new(id, &Members::default(), Position::default(), self.climate.segment_files);
            self.seats.insert(id, Seat { disks: Some(disks), ..Seat::default() });
            let delay = self.dice.millis(0, 2000);
            self.agenda.after(delay, Event::Start(id));
        }
    }

    /// A member that was removed ends, as it has decided or was told: no one can ask it any more.
    pub fn leave(&mut self, id: u64) {
        if self.seats[&id].member.is_none() {
            return; // Its next life hears it again.
        }
        self.note(|_| format!("{id}: goes for good"));
        self.crash(id);
        *self.seats.get_mut(&id).expect("it was there") = Seat { leaving: true, gone: true, ..Seat::default() };
    }
}
