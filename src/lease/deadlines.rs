//! When each lease ends, as the leader sees it.
//!
//! A plain value without a clock: time is an argument, counted from any start that stays the same. Whoever holds it asks
//! [`Deadlines::expired`] every half second or so, and proposes to revoke what is offered. A lease whose
//! revocation does not come is offered again after a while, for the proposal may have been dropped.
//!
//! ```text
//!  granted   renewed        end: offered   offered again   revoked
//!     |---------|---------------|---------------|-------------|
//!               |<---- TTL ---->|<-- retry ---->|
//!     Renewed               Expired: a renewal is too late    Unknown
//! ```
//!
//! A renewal only writes down the new end. The lease stays where it is in the wheel, and when its slot comes up it is put
//! where it belongs by then; so a lease costs one step per renewal and one per time to live, however many there are.
//!
//! A new leader does not know what its predecessor knew. It gives every lease its whole time again, and an election
//! timeout on top; were that all, leases granted over hours would end in one moment. So no second gets more than
//! [`LEASES_PER_SECOND`] of them, and the rest wait for the next second that has room. Renewals undo that bit by bit: they
//! set the end to what was granted, even if that is sooner.
//!
//! A leader that was away (its process paused, its disk stalled) has heard no renewals meanwhile. [`Deadlines::hold`] gives the
//! renewals that were sent in that time a moment to be heard: until then no lease is offered, and one that is over and was not
//! offered before can still be renewed.
//!
//! INVARIANTS
//! * No lease is offered before its end, and it is offered within a quarter of a second after, plus the time until the
//!   next call of [`Deadlines::expired`], or after the hold.
//! * Once a lease was offered, it can only be revoked.
//! * The wheel holds exactly the leases of the map, each once, and none in a slot behind its end or its next offer.

use std::time::Duration;

use super::LeaseId;
use super::shards::Shards;
use super::wheel::{Place, Wheel};

/// After a promotion, no more leases than this end in the same second.
pub const LEASES_PER_SECOND: u32 = 10_000;

const TICK_MILLIS: u64 = 250;

/// What became of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// It lives on for as many seconds as it was granted.
    Renewed(i64),
    /// Its time is over and it waits to be revoked. Wait for that, or until another member leads.
    Expired,
    /// There is no such lease.
    Unknown,
    /// This member does not lead: ask the one that does.
    NotPrimary,
}

/// The ends of all leases while this member leads; nothing otherwise.
#[derive(Debug)]
pub struct Deadlines {
    retry_after: Duration,
    primary: Option<Primary>,
}

impl Deadlines {
    /// None yet. An expired lease is offered again after `retry_after`, the time for which a proposal may be under way.
    #[must_use]
    pub fn new(retry_after: Duration) -> Self {
        Self { retry_after, primary: None }
    }

    /// Begins to lead: each of `leases`, with the seconds it was granted, gets that time and `extend`, the election timeout.
    pub fn promote(&mut self, leases: impl IntoIterator<Item = (LeaseId, i64)>, now: Duration, extend: Duration) {
        let mut leases: Vec<_> = leases.into_iter().map(|(id, ttl_seconds)| (ttl_seconds, id)).collect();
        leases.sort_unstable(); // They all start now, so this is the order in which they end.
        let mut primary = Primary {
            by_id: Shards::with_capacity(leases.len()),
            held_until_millis: 0,
            wheel: Wheel::starting_at(millis_begun(now) / TICK_MILLIS),
        };
        let mut seconds = Spread::default();
        for (ttl_seconds, id) in leases {
            let spread_ttl = seconds.take(ttl_seconds);
            primary.insert(id, ttl_seconds, end_after(spread_ttl, now + extend));
        }
        self.primary = Some(primary);
    }

    /// Leads no longer: no lease has an end any more.
    pub fn demote(&mut self) {
        self.primary = None;
    }

    /// Ends no lease before this time, because renewals may have gone unheard.
    pub fn hold(&mut self, until: Duration) {
        if let Some(primary) = &mut self.primary {
            primary.held_until_millis = millis_begun(until);
        }
    }

    /// Whether this member leads, and so knows when leases end.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.primary.is_some()
    }

    /// A lease was granted.
    pub fn granted(&mut self, id: LeaseId, ttl_seconds: i64, now: Duration) {
        if let Some(primary) = &mut self.primary {
            primary.remove(id);
            primary.insert(id, ttl_seconds, end_after(ttl_seconds, now));
        }
    }

    /// Its owner wants to keep a lease.
    pub fn renewed(&mut self, id: LeaseId, now: Duration) -> Renewal {
        match &mut self.primary {
            Some(primary) => primary.renewed(id, now),
            None => Renewal::NotPrimary,
        }
    }

    /// A lease was revoked.
    pub fn revoked(&mut self, id: LeaseId) {
        if let Some(primary) = &mut self.primary {
            primary.remove(id);
        }
    }

    /// Up to `limit` leases whose time is over, to be revoked. The rest, if any, is offered by the next call.
    #[must_use]
    pub fn expired(&mut self, now: Duration, limit: usize) -> Vec<LeaseId> {
        match &mut self.primary {
            Some(primary) => primary.expired(millis_over(now), now + self.retry_after, limit),
            None => Vec::new(),
        }
    }

    /// How many whole seconds a lease has left. Zero, or less, if it is over and waits to be revoked; None if there is no such
    /// lease or this member does not lead.
    #[must_use]
    pub fn remaining(&self, id: LeaseId, now: Duration) -> Option<i64> {
        let deadline = self.primary.as_ref()?.by_id.get(id)?;
        let left_millis = deadline.end_millis.cast_signed() - millis_over(now).cast_signed();
        Some(left_millis / 1000)
    }

    /// When a lease ends; None if there is no such lease or this member does not lead.
    #[must_use]
    pub fn end(&self, id: LeaseId) -> Option<Duration> {
        let deadline = self.primary.as_ref()?.by_id.get(id)?;
        Some(Duration::from_millis(deadline.end_millis))
    }

    /// When each lease ends, in no order.
    #[cfg(test)]
    fn ends(&self) -> Vec<(Duration, LeaseId)> {
        let by_id = self.primary.iter().flat_map(|primary| primary.by_id.iter());
        by_id.map(|(id, deadline)| (Duration::from_millis(deadline.end_millis), id)).collect()
    }

    /// Until when [`Deadlines::expired`] has nothing to do. It may turn out to have nothing then either.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let primary = self.primary.as_ref()?;
        let millis = primary.wheel.next_tick()?.saturating_mul(TICK_MILLIS);
        Some(Duration::from_millis(millis.max(primary.held_until_millis)))
    }
}

#[derive(Debug)]
struct Primary {
    by_id: Shards<Deadline>,
    wheel: Wheel,
    held_until_millis: u64,
}

#[derive(Debug)]
struct Deadline {
    end_millis: u64,
    ttl_seconds: i64,
    place: Place,
    /// To be revoked: the proposal may be under way.
    is_offered: bool,
}

impl Primary {
    fn insert(&mut self, id: LeaseId, ttl_seconds: i64, end_millis: u64) {
        let place = self.wheel.insert(id, tick_behind(end_millis));
        let known = self.by_id.insert(id, Deadline { end_millis, ttl_seconds, place, is_offered: false });
        assert!(known.is_none(), "a lease has one deadline");
    }

    fn remove(&mut self, id: LeaseId) {
        if let Some(deadline) = self.by_id.remove(id) {
            self.vacate(deadline.place);
        }
    }

    /// Takes a lease out of the wheel; the one that moves into its place is told.
    fn vacate(&mut self, place: Place) {
        if let Some(moved) = self.wheel.remove(place) {
            self.by_id.get_mut(moved).expect("the wheel holds the leases of the map").place = place;
        }
    }

    fn renewed(&mut self, id: LeaseId, now: Duration) -> Renewal {
        let Some(deadline) = self.by_id.get_mut(id) else { return Renewal::Unknown };
        let now_millis = millis_over(now);
        if deadline.is_offered || deadline.end_millis <= now_millis && self.held_until_millis <= now_millis {
            return Renewal::Expired;
        }
        let (ttl_seconds, end_millis) = (deadline.ttl_seconds, end_after(deadline.ttl_seconds, now));
        if self.wheel.is_sooner(tick_behind(end_millis), deadline.place) {
            self.remove(id); // It was spread out, or promoted with an extension.
            self.insert(id, ttl_seconds, end_millis);
        } else {
            deadline.end_millis = end_millis;
        }
        Renewal::Renewed(ttl_seconds)
    }

    fn expired(&mut self, now_millis: u64, offer_again: Duration, limit: usize) -> Vec<LeaseId> {
        if now_millis < self.held_until_millis {
            return Vec::new();
        }
        let now_tick = now_millis / TICK_MILLIS;
        if self.wheel.is_overrun(now_tick) {
            self.rewind(now_tick);
        }
        let offer_again = tick_behind(millis_begun(offer_again)).max(now_tick + 1);
        let mut found = Vec::new();
        while found.len() < limit {
            let Some(id) = self.wheel.pop_due(now_tick) else { break };
            let deadline = self.by_id.get_mut(id).expect("the wheel holds the leases of the map");
            let look_again = if deadline.end_millis <= now_millis {
                found.push(id);
                deadline.is_offered = true;
                offer_again
            } else {
                tick_behind(deadline.end_millis)
            };
            deadline.place = self.wheel.insert(id, look_again);
        }
        found
    }

    /// Nobody asked for half an hour, so the wheel has no future left: sets it to the present.
    fn rewind(&mut self, now_tick: u64) {
        let old = std::mem::replace(&mut self.wheel, Wheel::starting_at(now_tick));
        for id in old.into_ids() {
            let deadline = self.by_id.get_mut(id).expect("the wheel holds the leases of the map");
            deadline.place = self.wheel.insert(id, tick_behind(deadline.end_millis));
        }
    }
}

/// Hands out seconds to leases that come in the order of their ends, as long as there is room in a second.
#[derive(Default)]
struct Spread {
    second: i64,
    taken: u32,
}

impl Spread {
    /// The first second, from the one that is wanted, which has room.
    fn take(&mut self, wanted: i64) -> i64 {
        if wanted > self.second {
            (self.second, self.taken) = (wanted, 0);
        } else if self.taken == LEASES_PER_SECOND {
            (self.second, self.taken) = (self.second + 1, 0);
        }
        self.taken += 1;
        self.second
    }
}

/// The first tick that does not begin before a time.
fn tick_behind(millis: u64) -> u64 {
    millis.div_ceil(TICK_MILLIS)
}

/// Rounded up, for a lease rather ends late than early; and within what an i64 holds.
fn end_after(ttl_seconds: i64, start: Duration) -> u64 {
    let ttl_millis = ttl_seconds.max(0).unsigned_abs().saturating_mul(1000);
    millis_begun(start).saturating_add(ttl_millis).min(i64::MAX.unsigned_abs())
}

fn millis_begun(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).expect("time is counted from a start not long ago")
}

fn millis_over(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("time is counted from a start not long ago")
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    pub(super) const RETRY_MILLIS: u64 = 7000;
    const RETRY: Duration = Duration::from_millis(RETRY_MILLIS);
    pub(super) const NO_LIMIT: usize = usize::MAX;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Deadlines of a leader without leases, at time zero.
    pub(super) fn leader() -> Deadlines {
        let mut deadlines = Deadlines::new(RETRY);
        deadlines.promote([], Duration::ZERO, Duration::ZERO);
        deadlines
    }

    /// What is offered at a time, in numbers that ascend.
    fn offered(deadlines: &mut Deadlines, now: Duration) -> Vec<i64> {
        let mut found: Vec<_> = deadlines.expired(now, NO_LIMIT).iter().map(|id| id.0).collect();
        found.sort_unstable();
        found
    }

    pub(super) fn check(deadlines: &Deadlines) {
        let Some(Primary { by_id, wheel, .. }) = &deadlines.primary else { return };
        assert_eq!(wheel.len(), by_id.iter().count());
        for (id, deadline) in by_id.iter() {
            assert_eq!(wheel.at(deadline.place), Some(id));
        }
    }

    #[test]
    fn a_lease_is_offered_when_its_time_is_over_and_not_before() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 2, seconds(0.1));
        deadlines.granted(LeaseId(2), 9_000_000_000, seconds(0.1));
        deadlines.granted(LeaseId(i64::MIN), 3, seconds(0.1));
        assert_eq!(offered(&mut deadlines, seconds(2.099)), Vec::<i64>::new());
        assert_eq!(offered(&mut deadlines, seconds(2.25)), [1]);
        assert_eq!(offered(&mut deadlines, seconds(3.249)), Vec::<i64>::new());
        assert_eq!(offered(&mut deadlines, seconds(3.25)), [i64::MIN]);
    }

    #[test]
    fn an_expired_lease_is_offered_again_until_it_is_revoked() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 2, seconds(0.0));
        assert_eq!(offered(&mut deadlines, seconds(2.0)), [1]);
        assert_eq!(offered(&mut deadlines, seconds(8.999)), Vec::<i64>::new());
        assert_eq!(offered(&mut deadlines, seconds(9.0)), [1]);
        deadlines.revoked(LeaseId(1));
        deadlines.revoked(LeaseId(1));
        assert_eq!(offered(&mut deadlines, seconds(100.0)), Vec::<i64>::new());
        assert_eq!(deadlines.next_deadline(), None);
    }

    #[test]
    fn a_renewal_gives_the_whole_time_again() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 10, seconds(0.0));
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(9.999)), Renewal::Renewed(10));
        assert_eq!(deadlines.remaining(LeaseId(1), seconds(10.999)), Some(9));
        assert_eq!(deadlines.next_deadline(), Some(seconds(10.0)), "it has not moved yet");
        assert_eq!(offered(&mut deadlines, seconds(19.998)), Vec::<i64>::new());
        assert_eq!(deadlines.next_deadline(), Some(seconds(20.0)));
        assert_eq!(offered(&mut deadlines, seconds(20.0)), [1]);
    }

    #[test]
    fn a_hold_lets_late_renewals_count_but_for_leases_that_were_offered() {
        let mut deadlines = leader();
        for id in 1..=3 {
            deadlines.granted(LeaseId(id), 2 + id / 3, seconds(0.0));
        }
        assert_eq!(deadlines.expired(seconds(2.0), 1).len(), 1, "one of the first two");
        deadlines.hold(seconds(9.0));
        assert_eq!(deadlines.next_deadline(), Some(seconds(9.0)));
        assert_eq!(offered(&mut deadlines, seconds(8.0)), Vec::<i64>::new());
        let renewals = [1, 2, 3].map(|id| deadlines.renewed(LeaseId(id), seconds(8.0)));
        assert_eq!(renewals.iter().filter(|&&renewal| renewal == Renewal::Expired).count(), 1, "{renewals:?}");
        assert_eq!(renewals[2], Renewal::Renewed(3));
        assert_eq!(offered(&mut deadlines, seconds(9.0)).len(), 1, "the one that was offered is offered again");
        assert_eq!(deadlines.renewed(LeaseId(3), seconds(11.0)), Renewal::Expired, "the hold is over");
    }

    #[test]
    fn a_renewal_does_not_revive_what_is_over_although_nobody_was_told_yet() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 2, seconds(0.0));
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(2.0)), Renewal::Expired);
        assert_eq!(offered(&mut deadlines, seconds(2.0)), [1]);
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(3.0)), Renewal::Expired);
        deadlines.revoked(LeaseId(1));
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(3.0)), Renewal::Unknown);
    }

    #[test]
    fn a_member_that_does_not_lead_knows_no_ends() {
        let mut deadlines = Deadlines::new(RETRY);
        for _ in 0..2 {
            assert!(!deadlines.is_primary());
            deadlines.granted(LeaseId(1), 2, seconds(0.0));
            assert_eq!(deadlines.renewed(LeaseId(1), seconds(0.0)), Renewal::NotPrimary);
            assert_eq!(deadlines.remaining(LeaseId(1), seconds(0.0)), None);
            assert_eq!(deadlines.next_deadline(), None);
            assert_eq!((deadlines.ends(), deadlines.end(LeaseId(1))), (vec![], None));
            assert_eq!(offered(&mut deadlines, seconds(1000.0)), Vec::<i64>::new());
            deadlines.promote([(LeaseId(1), 2)], seconds(5.0), seconds(1.0));
            assert!(deadlines.is_primary());
            assert_eq!(deadlines.end(LeaseId(1)), Some(seconds(8.0)));
            deadlines.demote();
        }
    }

    #[test]
    fn a_new_leader_gives_the_whole_time_and_an_extension_which_a_renewal_takes_back() {
        let mut deadlines = Deadlines::new(RETRY);
        deadlines.promote([(LeaseId(1), 2), (LeaseId(-2), 2)], seconds(50.0), seconds(1.0));
        assert_eq!(deadlines.remaining(LeaseId(1), seconds(50.0)), Some(3));
        assert_eq!(deadlines.renewed(LeaseId(-2), seconds(50.5)), Renewal::Renewed(2));
        check(&deadlines);
        assert_eq!(offered(&mut deadlines, seconds(52.5)), [-2]);
        assert_eq!(offered(&mut deadlines, seconds(53.0)), [1]);
    }

    #[test]
    fn what_remains_is_cut_to_whole_seconds_and_may_be_negative() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 2, seconds(0.0));
        let remaining = |now| deadlines.remaining(LeaseId(1), seconds(now)).unwrap();
        assert_eq!([0.0, 0.001, 1.5, 2.0, 2.999, 3.0, 4.5].map(remaining), [2, 1, 0, 0, 0, -1, -2]);
        assert_eq!(deadlines.remaining(LeaseId(2), seconds(0.0)), None);
    }

    #[test]
    fn what_exceeds_the_limit_is_offered_by_the_next_call() {
        let mut deadlines = leader();
        for id in 1..=10 {
            deadlines.granted(LeaseId(id), 2 + id / 6, seconds(0.0));
        }
        let mut found = BTreeSet::new();
        for expected in [4, 4, 2, 0] {
            let offered = deadlines.expired(seconds(5.0), 4);
            assert_eq!(offered.len(), expected);
            found.extend(offered);
        }
        assert_eq!(found.len(), 10);
        check(&deadlines);
    }

    #[test]
    fn after_a_promotion_no_second_sees_more_leases_end_than_its_share() {
        let share = i64::from(LEASES_PER_SECOND);
        let ttl = |id| if id <= 3 * share + 500 { 5 } else { 6 + id % 2 };
        let leases: Vec<_> = (1..=5 * share).map(|id| (LeaseId(id), ttl(id))).collect();
        let mut deadlines = Deadlines::new(seconds(1000.0));
        deadlines.promote(leases, seconds(10.0), seconds(1.0));
        check(&deadlines);
        let mut ended = Vec::new();
        for second in 15_u32..=22 {
            let offered = offered(&mut deadlines, seconds(second.into()));
            assert!(offered.iter().all(|&id| i64::from(second) > 10 + ttl(id)), "none early");
            ended.push(offered.len());
        }
        assert_eq!(ended, [0, 10_000, 10_000, 10_000, 10_000, 10_000, 0, 0], "none later than it must be");
    }

    #[test]
    fn after_a_promotion_leases_that_do_not_pile_up_are_not_spread() {
        let share = i64::from(LEASES_PER_SECOND);
        let leases = (1..=2 * share).map(|id| (LeaseId(id), 5 + id % 2));
        let mut deadlines = Deadlines::new(RETRY);
        deadlines.promote(leases, Duration::ZERO, Duration::ZERO);
        let mut by_end = BTreeMap::<_, i64>::new();
        for (end, id) in deadlines.ends() {
            assert_eq!(end, Duration::from_secs(5 + id.0.unsigned_abs() % 2));
            *by_end.entry(end).or_default() += 1;
        }
        assert_eq!(by_end.into_values().collect::<Vec<_>>(), [share, share]);
    }

    #[test]
    fn an_id_that_is_granted_and_revoked_over_and_over_leaves_nothing_behind() {
        let mut deadlines = leader();
        for _ in 0..1000 {
            deadlines.granted(LeaseId(1), 3600, seconds(0.0));
            deadlines.granted(LeaseId(2), 3600, seconds(0.0));
            deadlines.revoked(LeaseId(1));
            check(&deadlines);
        }
        assert_eq!(deadlines.ends(), [(seconds(3600.0), LeaseId(2))]);
    }

    #[test]
    fn after_a_long_silence_everyone_is_offered_once_and_nobody_early() {
        let mut deadlines = leader();
        for id in 1..=100 {
            deadlines.granted(LeaseId(id), id * 100, seconds(0.0));
        }
        assert_eq!(offered(&mut deadlines, seconds(5000.0)), (1..=50).collect::<Vec<_>>());
        assert_eq!(offered(&mut deadlines, seconds(5000.0)), Vec::<i64>::new());
        check(&deadlines);
        assert_eq!(offered(&mut deadlines, seconds(5099.9)), (1..=50).collect::<Vec<_>>());
        assert_eq!(offered(&mut deadlines, seconds(5100.0)), [51]);
    }
}
