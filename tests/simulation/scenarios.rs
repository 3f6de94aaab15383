//! Directed scenarios, with one fault at a chosen moment: for rules that deserve a test of their own, and for the bugs that the
//! simulation has found. All its checks apply here, too.

use std::time::Duration;

use super::{client::MembershipChange, config::WorldConfig, lease_owners::LeaseOwners, rng::Rng, world::World};

const SECOND: Duration = Duration::from_secs(1);
const SEEDS: u64 = 12;

/// Runs a scenario with several seeds, each in a fault-free world whose initial members have elected a leader, and the
/// quiescent phase after it.
fn run_scenario(founders: u64, scenario: impl Fn(&mut World)) {
    for seed in 0..SEEDS {
        let mut world = World::with(WorldConfig::fault_free(founders), Rng::new(seed), None, false);
        world.wait_until_converged();
        scenario(&mut world);
        world.quiesce();
    }
}

impl World {
    fn expect_leader(&mut self) -> u64 {
        self.leader().unwrap_or_else(|| panic!("no member leads: {}", self.describe()))
    }

    /// A running member other than this one.
    fn other_than(&self, id: u64) -> u64 {
        self.running().into_iter().find(|other| *other != id).expect("another member is running")
    }

    /// Writes at a member; true if the answer arrives within a second.
    fn write_succeeds(&mut self, at: u64) -> bool {
        let before = self.report.answers;
        self.propose(at);
        self.run_for(SECOND);
        self.report.answers > before
    }

    fn stall_log(&mut self, id: u64, time: Duration) {
        self.slots.get_mut(&id).expect("it exists").log_stalled_until = self.events.now() + time;
    }

    /// Changes the members through the leader, and waits until all have converged.
    fn change_and_converge(&mut self, change: MembershipChange) {
        let leader = self.expect_leader();
        self.change_members(leader, change);
        self.run_for(SECOND);
        self.wait_until_converged();
    }
}

#[test]
fn a_leader_whose_disk_stalls_transfers_leadership_and_sends_nothing() {
    run_scenario(3, |world| {
        let stalled = world.expect_leader();
        world.stall_log(stalled, 20 * SECOND);
        world.propose(stalled);
        // Leadership is transferred after three quarters of an election timeout, on a clock that may run at half speed.
        world.run_for(3 * SECOND);
        let next = world.expect_leader();
        assert_ne!(next, stalled, "{}", world.describe());
        assert!(world.write_succeeds(next), "{}", world.describe());
        // That the stalled member sends nothing more is checked at each of its steps.
        world.run_for(10 * SECOND);
        let other = world.other_than(stalled);
        assert!(world.write_succeeds(other), "{}", world.describe());
    });
}

#[test]
fn a_follower_whose_disk_stalls_does_not_block_writes() {
    run_scenario(3, |world| {
        let leader = world.expect_leader();
        let stalled = world.other_than(leader);
        world.stall_log(stalled, 20 * SECOND);
        for _ in 0..8 {
            assert!(world.write_succeeds(leader), "{}", world.describe());
        }
        assert_eq!(world.expect_leader(), leader);
    });
}

/// raft-rs looked up the progress of the removed leader, and panicked.
#[test]
fn a_leader_that_is_removed_steps_down() {
    for founders in [2, 3] {
        run_scenario(founders, |world| {
            let leader = world.expect_leader();
            world.change_members(leader, MembershipChange::Remove(leader));
            for _ in 0..40 {
                world.propose(leader);
                world.run_for(SECOND / 500);
            }
            world.run_for(10 * SECOND);
            assert_ne!(world.expect_leader(), leader);
            let next = world.expect_leader();
            assert!(world.write_succeeds(next), "{}", world.describe());
        });
    }
}

/// The remaining member forgot in a crash that the removal was committed, and there was no other member left to ask.
#[test]
fn a_removal_survives_a_crash_after_the_removed_member_has_stopped() {
    run_scenario(2, |world| {
        let leader = world.expect_leader();
        world.change_members(leader, MembershipChange::Remove(leader));
        let remaining = world.other_than(leader);
        world.run_until("the removed leader has stopped", SECOND / 10, |world| world.slots[&leader].gone);
        world.crash(remaining);
        world.wait_until_converged();
    });
}

/// A sole voter assumed that only it acknowledges entries.
#[test]
fn a_learner_faster_than_its_leader_causes_no_stale_read() {
    run_scenario(1, |world| {
        world.change_and_converge(MembershipChange::Add { id: 2, learner: true, max_learners: None });
        world.slots.get_mut(&1).expect("it exists").apply_stalled_until = world.events.now() + 2 * SECOND;
        let before = world.acknowledged;
        let is_acknowledged = |world: &mut World| world.acknowledged > before;
        world.run_until_after("a write is acknowledged", SECOND / 20, is_acknowledged, |world| world.propose(2));
        let reads = world.report.reads;
        world.read(1);
        world.run_for(3 * SECOND);
        let answered = world.report.reads - reads;
        assert_eq!(answered, 1, "{}", world.describe());
    });
}

/// The remaining member became a sole voter when it had applied the removal, but not what was committed after it.
#[test]
fn a_removed_member_faster_than_the_remaining_one_causes_no_stale_read() {
    run_scenario(2, |world| {
        let remaining = world.expect_leader();
        let removed = world.other_than(remaining);
        world.change_members(remaining, MembershipChange::Remove(removed));
        let is_alone = |world: &mut World| {
            world.member(remaining).expect("it is running").threads.core.raft_thread.replica.is_sole_member()
        };
        let write = |world: &mut World| world.propose(removed);
        world.run_until_after("the remaining member knows that it is alone", SECOND / 1000, is_alone, write);
        world.slots.get_mut(&remaining).expect("it exists").apply_stalled_until = world.events.now() + SECOND;
        for _ in 0..100 {
            world.read(remaining);
            world.run_for(SECOND / 100);
        }
    });
}

/// A sole voter elects itself without sending anything; it sent messages to learners before its vote was durable.
#[test]
fn a_sole_voter_sends_nothing_in_a_term_that_is_not_durable() {
    run_scenario(1, |world| {
        world.change_and_converge(MembershipChange::Add { id: 2, learner: true, max_learners: None });
        world.crash(1);
        world.run_until("it is restarted", SECOND / 1000, |world| world.member(1).is_some());
        // What it sends is checked against its disk.
        world.stall_log(1, SECOND / 2);
        world.run_for(SECOND / 4);
        world.crash(1);
        world.wait_until_converged();
    });
}

/// Its answers to a leader that it did not know were dropped.
#[test]
fn a_partitioned_member_catches_up_with_a_leader_that_it_does_not_know() {
    run_scenario(3, |world| {
        let leader = world.expect_leader();
        let partitioned = world.other_than(leader);
        let others: Vec<u64> = world.running().into_iter().filter(|id| *id != partitioned).collect();
        for id in [1, 2, 3, 4] {
            world.network.block(id, partitioned);
            world.network.block(partitioned, id);
        }
        world.change_members(leader, MembershipChange::Add { id: 4, learner: false, max_learners: None });
        world.run_for(10 * SECOND);
        let transfer = |world: &mut World| {
            let leader = world.expect_leader();
            world.member(leader).expect("it leads").node.transfer_leader(4);
            world.schedule_threads(leader);
        };
        world.run_until_after("the new member leads", SECOND, |world| world.expect_leader() == 4, transfer);
        world.network.heal();
        // No other member can tell it.
        for id in others {
            world.network.block(id, partitioned);
        }
        world.run_for(10 * SECOND);
        let mut applied = |id| world.member(id).expect("it is running").applied();
        let (ours, theirs) = (applied(partitioned), applied(4));
        assert_eq!(ours, theirs, "{}", world.describe());
    });
}

/// A renewal that a member answers after a pause relies on a proof of leadership that began after the pause.
#[test]
fn a_leader_that_is_paused_while_another_is_elected_ends_no_lease_early() {
    run_scenario(3, |world| {
        world.config.lease_owners = 3;
        world.lease_owners = LeaseOwners::new(3);
        (0..3).for_each(|nth| world.lease_owner(nth));
        world.run_for(3 * SECOND);
        for _ in 0..3 {
            let paused = world.expect_leader();
            world.slots.get_mut(&paused).expect("it exists").paused_until = world.events.now() + 8 * SECOND;
            world.run_for(12 * SECOND);
        }
        assert!(world.report.renewals > 20, "{:?}", world.report);
    });
}

/// Each change of the leader resets the deadlines of leases, and extends them no further.
#[test]
fn a_lease_that_is_not_renewed_expires_in_time() {
    run_scenario(3, |world| {
        world.lease_owners = LeaseOwners::new(1);
        world.lease_owner(0);
        world.run_for(SECOND);
        let leader = world.expect_leader();
        let next = world.other_than(leader);
        world.member(leader).expect("it leads").node.transfer_leader(next);
        world.schedule_threads(leader);
        world.run_until("leadership has moved", SECOND / 10, |world| world.leader() == Some(next));
        world.quiescent = true; // Its owner does not renew it.
        world.run_for(World::max_lease_lifetime(5));
        let left = world.lease_owners.held();
        assert!(left == 0 && world.report.expiries > 0, "{left} leases are left: {}", world.describe());
        world.quiescent = false;
    });
}

/// Removes one of the initial members in a fault-free world; `events` events later the disks of all others stall. The removed
/// member acts on what it can still learn from then on; after that the power of all others fails. Returns whether the removed
/// member had already stopped when the disks stalled.
fn removes_and_loses_power(founders: u64, seed: u64, remove_leader: bool, events: u32) -> bool {
    let mut world = World::with(WorldConfig::fault_free(founders), Rng::new(seed), None, false);
    world.wait_until_converged();
    let leader = world.expect_leader();
    let removed = if remove_leader { leader } else { world.other_than(leader) };
    let remaining: Vec<u64> = world.running().into_iter().filter(|id| *id != removed).collect();
    world.change_members(leader, MembershipChange::Remove(removed));
    (0..events).for_each(|_| _ = world.run_next_event(Duration::MAX));
    let is_complete = world.slots[&removed].gone;
    for &id in &remaining {
        world.stall_log(id, 20 * SECOND);
    }
    world.run_for(6 * SECOND);
    for &id in &remaining {
        world.crash(id);
    }
    world.wait_until_converged();
    if world.history.model.members.contains_key(&removed) {
        return false; // The change was lost, but it was not acknowledged either.
    }
    assert!(world.write_succeeds(remaining[0]), "{}", world.describe());
    if is_complete {
        world.quiesce();
    }
    is_complete
}

/// A removed leader stopped when the other member knew that the removal was committed but had not made that durable: that
/// member then waited for the vote of the stopped one.
#[test]
fn the_remaining_members_elect_a_leader_wherever_the_power_fails_in_a_removal() {
    for founders in [2, 3] {
        for remove_leader in [true, false] {
            for seed in 0..4 - founders {
                let is_complete = |events: &u32| removes_and_loses_power(founders, seed, remove_leader, *events);
                let moments = (0..100_000).find(is_complete).expect("the removal completes at some time");
                assert!(
                    moments > 20,
                    "{founders} members, seed {seed}: the removal was complete after {moments} events"
                );
            }
        }
    }
}
