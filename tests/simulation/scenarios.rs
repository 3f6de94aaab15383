//! Worlds where one thing goes wrong, at a moment of our choice: rules that deserve a story of their own, and what the
//! simulation has found. All its checks hold here, too.

use std::time::Duration;

use super::{client::Change, climate::Climate, dice::Dice, lease_owners::LeaseOwners, world::World};

const SECOND: Duration = Duration::from_secs(1);
const SEEDS: u64 = 12;

/// Tells a story in some worlds without trouble, once their founders have a leader. The end is peace.
fn tell(founders: u64, story: impl Fn(&mut World)) {
    for seed in 0..SEEDS {
        let mut world = World::with(Climate::calm(founders), Dice::new(seed), None, false);
        world.wait_for_rest();
        story(&mut world);
        world.make_peace();
    }
}

impl World {
    fn expect_leader(&mut self) -> u64 {
        self.leader().unwrap_or_else(|| panic!("no member leads: {}", self.describe()))
    }

    /// Somebody who runs, and is not this one.
    fn other_than(&self, id: u64) -> u64 {
        self.running().into_iter().find(|other| *other != id).expect("there are others")
    }

    /// Writes at a member; true if it is answered within a second.
    fn writes(&mut self, at: u64) -> bool {
        let before = self.report.answers;
        self.propose(at);
        self.run_for(SECOND);
        self.report.answers > before
    }

    fn stick_log(&mut self, id: u64, time: Duration) {
        self.seats.get_mut(&id).expect("it is there").log_stuck_until = self.agenda.now() + time;
    }

    /// Changes the members by way of the leader, and waits for rest.
    fn settle_change(&mut self, change: Change) {
        let leader = self.expect_leader();
        self.change_members(leader, change);
        self.run_for(SECOND);
        self.wait_for_rest();
    }
}

#[test]
fn a_leader_whose_disk_stands_still_hands_over_and_is_silent() {
    tell(3, |world| {
        let stuck = world.expect_leader();
        world.stick_log(stuck, 20 * SECOND);
        world.propose(stuck);
        // The hand-over is due after three quarters of an election timeout, of a clock that may run at half its speed.
        world.run_for(3 * SECOND);
        let next = world.expect_leader();
        assert_ne!(next, stuck, "{}", world.describe());
        assert!(world.writes(next), "{}", world.describe());
        // That the stuck member says nothing more is checked at each of its turns.
        world.run_for(10 * SECOND);
        let other = world.other_than(stuck);
        assert!(world.writes(other), "{}", world.describe());
    });
}

#[test]
fn a_follower_whose_disk_stands_still_harms_nobody() {
    tell(3, |world| {
        let leader = world.expect_leader();
        let stuck = world.other_than(leader);
        world.stick_log(stuck, 20 * SECOND);
        for _ in 0..8 {
            assert!(world.writes(leader), "{}", world.describe());
        }
        assert_eq!(world.expect_leader(), leader);
    });
}

/// raft-rs looked for the progress of the leader that was gone, and panicked.
#[test]
fn a_leader_that_is_removed_steps_down() {
    for founders in [2, 3] {
        tell(founders, |world| {
            let leader = world.expect_leader();
            world.change_members(leader, Change::Remove(leader));
            for _ in 0..40 {
                world.propose(leader);
                world.run_for(SECOND / 500);
            }
            world.run_for(10 * SECOND);
            assert_ne!(world.expect_leader(), leader);
            let next = world.expect_leader();
            assert!(world.writes(next), "{}", world.describe());
        });
    }
}

/// What a removed member agreed to was forgotten by who was left, and nobody was there to be asked.
#[test]
fn a_removal_is_remembered_when_the_removed_is_gone() {
    tell(2, |world| {
        let leader = world.expect_leader();
        world.change_members(leader, Change::Remove(leader));
        let left = world.other_than(leader);
        while !world.seats[&leader].gone {
            world.run_for(SECOND / 10);
        }
        world.crash(left);
        world.wait_for_rest();
    });
}

/// A sole voter trusted that nobody but itself acknowledges anything.
#[test]
fn a_learner_that_is_quicker_than_its_leader_makes_no_read_stale() {
    tell(1, |world| {
        world.settle_change(Change::Add { id: 2, learner: true, max_learners: None });
        world.seats.get_mut(&1).expect("it is there").apply_stuck_until = world.agenda.now() + 2 * SECOND;
        let before = world.acknowledged;
        while world.acknowledged == before {
            world.propose(2);
            world.run_for(SECOND / 20);
        }
        let reads = world.report.reads;
        world.read(1);
        world.run_for(3 * SECOND);
        let answered = world.report.reads - reads;
        assert_eq!(answered, 1, "{}", world.describe());
    });
}

/// It was left alone when it had applied the removal, and what was committed behind that it had not.
#[test]
fn a_removed_member_that_is_quicker_than_who_is_left_makes_no_read_stale() {
    tell(2, |world| {
        let left = world.expect_leader();
        let removed = world.other_than(left);
        world.change_members(left, Change::Remove(removed));
        while !world.member(left).expect("it runs").rooms.core.driver.replica.is_alone() {
            world.propose(removed);
            world.run_for(SECOND / 1000);
        }
        world.seats.get_mut(&left).expect("it is there").apply_stuck_until = world.agenda.now() + SECOND;
        for _ in 0..100 {
            world.read(left);
            world.run_for(SECOND / 100);
        }
    });
}

/// A sole voter elects itself without a word to anybody; before that was durable it already spoke to learners.
#[test]
fn a_sole_voter_is_silent_in_a_term_that_it_may_forget() {
    tell(1, |world| {
        world.settle_change(Change::Add { id: 2, learner: true, max_learners: None });
        world.crash(1);
        while world.member(1).is_none() {
            world.run_for(SECOND / 1000);
        }
        // What it says is held against its disk.
        world.stick_log(1, SECOND / 2);
        world.run_for(SECOND / 4);
        world.crash(1);
        world.wait_for_rest();
    });
}

/// Its answers to a leader that it did not know went nowhere.
#[test]
fn a_member_that_was_away_catches_up_with_a_leader_that_it_does_not_know() {
    tell(3, |world| {
        let leader = world.expect_leader();
        let away = world.other_than(leader);
        let others: Vec<u64> = world.running().into_iter().filter(|id| *id != away).collect();
        for id in [1, 2, 3, 4] {
            world.network.cut(id, away);
            world.network.cut(away, id);
        }
        world.change_members(leader, Change::Add { id: 4, learner: false, max_learners: None });
        world.run_for(10 * SECOND);
        while world.expect_leader() != 4 {
            let leader = world.expect_leader();
            world.member(leader).expect("it leads").node.transfer_leader(4);
            world.arrange(leader);
            world.run_for(SECOND);
        }
        world.network.heal();
        // Nobody else tells it.
        for id in others {
            world.network.cut(id, away);
        }
        world.run_for(10 * SECOND);
        let mut applied = |id| world.member(id).expect("it runs").applied();
        let (ours, theirs) = (applied(away), applied(4));
        assert_eq!(ours, theirs, "{}", world.describe());
    });
}

/// A renewal that a member answers after it was away rests on a proof of leadership that began afterwards.
#[test]
fn a_leader_that_sleeps_through_its_succession_costs_no_lease() {
    tell(3, |world| {
        world.climate.lease_owners = 3;
        world.lease_owners = LeaseOwners::new(3);
        (0..3).for_each(|nth| world.lease_owner(nth));
        world.run_for(3 * SECOND);
        for _ in 0..3 {
            let sleeper = world.expect_leader();
            world.seats.get_mut(&sleeper).expect("it is there").asleep_until = world.agenda.now() + 8 * SECOND;
            world.run_for(12 * SECOND);
        }
        assert!(world.report.renewals > 20, "{:?}", world.report);
    });
}

/// Each change of the leader gives leases their time again, and no more than that.
#[test]
fn a_lease_whose_owner_is_silent_ends_in_time() {
    tell(3, |world| {
        world.lease_owners = LeaseOwners::new(1);
        world.lease_owner(0);
        world.run_for(SECOND);
        let leader = world.expect_leader();
        let next = world.other_than(leader);
        world.member(leader).expect("it leads").node.transfer_leader(next);
        world.arrange(leader);
        while world.leader() != Some(next) {
            world.run_for(SECOND / 10);
        }
        world.peace = true; // Its owner is silent.
        world.run_for(World::longest_life(5));
        let left = world.lease_owners.held();
        assert!(left == 0 && world.report.expiries > 0, "{left} leases are left: {}", world.describe());
        world.peace = false;
    });
}

/// A world without trouble in which a change removes `removed` of the founders, and so many events later the disks of all
/// others stand still. What the removed member can learn from then on it acts on; then the power of all others fails.
/// Returns whether the change was over before that.
fn removes_and_loses_power(founders: u64, seed: u64, leader_goes: bool, events: u32) -> bool {
    let mut world = World::with(Climate::calm(founders), Dice::new(seed), None, false);
    world.wait_for_rest();
    let leader = world.expect_leader();
    let removed = if leader_goes { leader } else { world.other_than(leader) };
    let staying: Vec<u64> = world.running().into_iter().filter(|id| *id != removed).collect();
    world.change_members(leader, Change::Remove(removed));
    (0..events).for_each(|_| _ = world.happen_next(Duration::MAX));
    let is_over = world.seats[&removed].gone;
    for &id in &staying {
        world.stick_log(id, 20 * SECOND);
    }
    world.run_for(6 * SECOND);
    for &id in &staying {
        world.crash(id);
    }
    world.wait_for_rest();
    if world.history.model.members.contains_key(&removed) {
        return false; // The change was lost, and nobody was told that it was made.
    }
    assert!(world.writes(staying[0]), "{}", world.describe());
    if is_over {
        world.make_peace();
    }
    is_over
}

/// A removed leader went when the other member had heard that the removal was agreed, though not written it down: that one
/// then waited for the vote of the one that was gone.
#[test]
fn whoever_is_left_elects_a_leader_wherever_the_power_fails_in_a_removal() {
    for founders in [2, 3] {
        for leader_goes in [true, false] {
            for seed in 0..4 - founders {
                let is_over = |events: &u32| removes_and_loses_power(founders, seed, leader_goes, *events);
                let moments = (0..100_000).find(is_over).expect("it is over at some time");
                assert!(moments > 20, "{founders} members, seed {seed}: it was over after {moments} events");
            }
        }
    }
}
