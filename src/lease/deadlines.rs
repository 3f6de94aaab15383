//! When each lease ends, as the leader sees it.
//!
//! A plain value without a clock: time is an argument, counted from any fixed start. Its owner calls [`Deadlines::expired`]
//! about every half second and proposes to revoke the leases that it returns, the *offered* ones. A lease that is not revoked
//! is offered again after a while, because the proposal may have been dropped.
//!
//! ```text
//!  granted   renewed        end: offered   offered again   revoked
//!     |---------|---------------|---------------|-------------|
//!               |<---- TTL ---->|<-- retry ---->|
//!     Renewed               Expired: a renewal is too late    Unknown
//! ```
//!
//! A renewal only sets the new end. The lease keeps its slot in the wheel; when that slot comes up, the lease is inserted again
//! according to its end at that time. So each renewal and each elapsed time to live takes constant time, however many leases
//! there are.
//!
//! A new leader does not know the ends that its predecessor had. It resets every lease to its full TTL, plus an election
//! timeout. With that alone, leases granted over hours would all end at the same moment. So at most [`LEASES_PER_SECOND`] of
//! them are assigned to each second, and the rest to the next seconds that are not full. Renewals undo this gradually: they
//! set the end according to the granted TTL, even if that is sooner.
//!
//! A leader that was unresponsive (its process paused, its disk stalled) has received no renewals in that time.
//! [`Deadlines::hold`] lets it process the renewals that were sent meanwhile: until the hold ends no lease is offered, and a
//! lease that has expired but was not offered before can still be renewed.
//!
//! INVARIANTS
//! * No lease is offered before its end, and it is offered at most a quarter of a second after, plus the time until the next
//!   call of [`Deadlines::expired`] or the end of the hold.
//! * A lease that was offered can no longer be renewed, only revoked.
//! * The wheel holds exactly the leases of the map, each once, and none in a slot later than its end or its next offer.

use std::time::Duration;

use super::LeaseId;
use super::shards::Shards;
use super::wheel::{Wheel, WheelPosition};

/// The maximum number of leases that end in the same second after a promotion.
pub const LEASES_PER_SECOND: u32 = 10_000;

const TICK_MILLIS: u64 = 250;

/// The result of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// The lease was renewed for its granted TTL, in seconds.
    Renewed(i64),
    /// The lease has expired and is about to be revoked. The caller should wait for that, or for another leader.
    Expired,
    /// There is no such lease.
    Unknown,
    /// This member is not the leader; the request must go to the leader.
    NotPrimary,
}

/// The ends of all leases while this member is the leader; empty otherwise.
#[derive(Debug)]
pub struct Deadlines {
    retry_after: Duration,
    primary: Option<Primary>,
}

impl Deadlines {
    /// Starts as a follower. An expired lease is offered again after `retry_after`, the longest time a proposal may take.
    #[must_use]
    pub fn new(retry_after: Duration) -> Self {
        Self { retry_after, primary: None }
    }

    /// This member became the leader: each of `leases`, given with its TTL in seconds, ends after that TTL plus `extend`, the
    /// election timeout.
    pub fn promote(&mut self, leases: impl IntoIterator<Item = (LeaseId, i64)>, now: Duration, extend: Duration) {
        let mut leases: Vec<_> = leases.into_iter().map(|(id, ttl_seconds)| (ttl_seconds, id)).collect();
        leases.sort_unstable(); // All start now, so they end in this order.
        let mut primary = Primary {
            by_id: Shards::with_capacity(leases.len()),
            held_until_millis: 0,
            wheel: Wheel::starting_at(millis_rounded_up(now) / TICK_MILLIS),
        };
        let mut seconds = Spread::default();
        for (ttl_seconds, id) in leases {
            let spread_ttl = seconds.take(ttl_seconds);
            primary.insert(id, ttl_seconds, end_after(spread_ttl, now + extend));
        }
        self.primary = Some(primary);
    }

    /// This member is no longer the leader: drops all deadlines.
    pub fn demote(&mut self) {
        self.primary = None;
    }

    /// Offers no lease before `until`, because renewals may be waiting to be processed.
    pub fn hold(&mut self, until: Duration) {
        if let Some(primary) = &mut self.primary {
            primary.held_until_millis = millis_rounded_up(until);
        }
    }

    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.primary.is_some()
    }

    pub fn granted(&mut self, id: LeaseId, ttl_seconds: i64, now: Duration) {
        if let Some(primary) = &mut self.primary {
            primary.remove(id);
            primary.insert(id, ttl_seconds, end_after(ttl_seconds, now));
        }
    }

    /// A client asks to keep a lease alive.
    pub fn renewed(&mut self, id: LeaseId, now: Duration) -> Renewal {
        match &mut self.primary {
            Some(primary) => primary.renewed(id, now),
            None => Renewal::NotPrimary,
        }
    }

    pub fn revoked(&mut self, id: LeaseId) {
        if let Some(primary) = &mut self.primary {
            primary.remove(id);
        }
    }

    /// Up to `limit` expired leases, for the caller to revoke. Further ones are returned by the next call.
    #[must_use]
    pub fn expired(&mut self, now: Duration, limit: usize) -> Vec<LeaseId> {
        match &mut self.primary {
            Some(primary) => primary.expired(millis_rounded_down(now), now + self.retry_after, limit),
            None => Vec::new(),
        }
    }

    /// The remaining time of a lease in whole seconds. Zero or less if it has expired and is about to be revoked; None if there
    /// is no such lease or this member is not the leader.
    #[must_use]
    pub fn remaining(&self, id: LeaseId, now: Duration) -> Option<i64> {
        let deadline = self.primary.as_ref()?.by_id.get(id)?;
        let left_millis = deadline.end_millis.cast_signed() - millis_rounded_down(now).cast_signed();
        Some(left_millis / 1000)
    }

    /// The end of a lease; None if there is no such lease or this member is not the leader.
    #[must_use]
    pub fn end(&self, id: LeaseId) -> Option<Duration> {
        let deadline = self.primary.as_ref()?.by_id.get(id)?;
        Some(Duration::from_millis(deadline.end_millis))
    }

    /// The end of each lease, in no particular order.
    #[cfg(test)]
    fn ends(&self) -> Vec<(Duration, LeaseId)> {
        let by_id = self.primary.iter().flat_map(|primary| primary.by_id.iter());
        by_id.map(|(id, deadline)| (Duration::from_millis(deadline.end_millis), id)).collect()
    }

    /// The next time to call [`Deadlines::expired`]. It may find nothing to do then either.
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
    position: WheelPosition,
    /// Offered to be revoked: the proposal may be in flight.
    is_offered: bool,
}

impl Primary {
    fn insert(&mut self, id: LeaseId, ttl_seconds: i64, end_millis: u64) {
        let position = self.wheel.insert(id, tick_at_or_after(end_millis));
        let known = self.by_id.insert(id, Deadline { end_millis, ttl_seconds, position, is_offered: false });
        assert!(known.is_none(), "a lease has one deadline");
    }

    fn remove(&mut self, id: LeaseId) {
        if let Some(deadline) = self.by_id.remove(id) {
            self.remove_from_wheel(deadline.position);
        }
    }

    /// Removes a lease from the wheel, and updates the position of the lease that is moved in its place.
    fn remove_from_wheel(&mut self, position: WheelPosition) {
        if let Some(moved) = self.wheel.remove(position) {
            self.by_id.get_mut(moved).expect("the wheel holds the leases of the map").position = position;
        }
    }

    fn renewed(&mut self, id: LeaseId, now: Duration) -> Renewal {
        let Some(deadline) = self.by_id.get_mut(id) else { return Renewal::Unknown };
        let now_millis = millis_rounded_down(now);
        if deadline.is_offered || deadline.end_millis <= now_millis && self.held_until_millis <= now_millis {
            return Renewal::Expired;
        }
        let (ttl_seconds, end_millis) = (deadline.ttl_seconds, end_after(deadline.ttl_seconds, now));
        if self.wheel.is_sooner(tick_at_or_after(end_millis), deadline.position) {
            self.remove(id); // The end was spread, or extended by a promotion.
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
            self.rebuild_wheel(now_tick);
        }
        let offer_again = tick_at_or_after(millis_rounded_up(offer_again)).max(now_tick + 1);
        let mut found = Vec::new();
        while found.len() < limit {
            let Some(id) = self.wheel.pop_due(now_tick) else { break };
            let deadline = self.by_id.get_mut(id).expect("the wheel holds the leases of the map");
            let next_check = if deadline.end_millis <= now_millis {
                found.push(id);
                deadline.is_offered = true;
                offer_again
            } else {
                tick_at_or_after(deadline.end_millis)
            };
            deadline.position = self.wheel.insert(id, next_check);
        }
        found
    }

    /// [`Deadlines::expired`] was not called for half an hour, so the wheel is overrun: rebuilds it from the current tick.
    fn rebuild_wheel(&mut self, now_tick: u64) {
        let old = std::mem::replace(&mut self.wheel, Wheel::starting_at(now_tick));
        for id in old.into_ids() {
            let deadline = self.by_id.get_mut(id).expect("the wheel holds the leases of the map");
            deadline.position = self.wheel.insert(id, tick_at_or_after(deadline.end_millis));
        }
    }
}

/// Assigns leases to seconds, at most [`LEASES_PER_SECOND`] each. The leases must come in the order of their ends.
#[derive(Default)]
struct Spread {
    second: i64,
    taken: u32,
}

impl Spread {
    /// Takes the first second at or after `wanted` that is not full.
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

/// The first tick that does not start before a time.
fn tick_at_or_after(millis: u64) -> u64 {
    millis.div_ceil(TICK_MILLIS)
}

/// Rounded up, because a lease may end late but not early; limited to what fits in an i64.
fn end_after(ttl_seconds: i64, start: Duration) -> u64 {
    let ttl_millis = ttl_seconds.max(0).unsigned_abs().saturating_mul(1000);
    millis_rounded_up(start).saturating_add(ttl_millis).min(i64::MAX.unsigned_abs())
}

fn millis_rounded_up(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).expect("time is counted from a recent start")
}

fn millis_rounded_down(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("time is counted from a recent start")
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

    /// The leases offered at a time, by ascending ID.
    fn offered(deadlines: &mut Deadlines, now: Duration) -> Vec<i64> {
        let mut found: Vec<_> = deadlines.expired(now, NO_LIMIT).iter().map(|id| id.0).collect();
        found.sort_unstable();
        found
    }

    pub(super) fn check(deadlines: &Deadlines) {
        let Some(Primary { by_id, wheel, .. }) = &deadlines.primary else { return };
        assert_eq!(wheel.len(), by_id.iter().count());
        for (id, deadline) in by_id.iter() {
            assert_eq!(wheel.at(deadline.position), Some(id));
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
    fn a_renewal_restarts_the_full_ttl() {
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
    fn during_a_hold_late_renewals_count_except_for_offered_leases() {
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
    fn a_renewal_does_not_revive_an_expired_lease_even_before_it_is_offered() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 2, seconds(0.0));
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(2.0)), Renewal::Expired);
        assert_eq!(offered(&mut deadlines, seconds(2.0)), [1]);
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(3.0)), Renewal::Expired);
        deadlines.revoked(LeaseId(1));
        assert_eq!(deadlines.renewed(LeaseId(1), seconds(3.0)), Renewal::Unknown);
    }

    #[test]
    fn a_follower_has_no_deadlines() {
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
    fn a_new_leader_grants_the_full_ttl_and_an_extension_that_a_renewal_takes_back() {
        let mut deadlines = Deadlines::new(RETRY);
        deadlines.promote([(LeaseId(1), 2), (LeaseId(-2), 2)], seconds(50.0), seconds(1.0));
        assert_eq!(deadlines.remaining(LeaseId(1), seconds(50.0)), Some(3));
        assert_eq!(deadlines.renewed(LeaseId(-2), seconds(50.5)), Renewal::Renewed(2));
        check(&deadlines);
        assert_eq!(offered(&mut deadlines, seconds(52.5)), [-2]);
        assert_eq!(offered(&mut deadlines, seconds(53.0)), [1]);
    }

    #[test]
    fn remaining_time_is_truncated_to_seconds_and_may_be_negative() {
        let mut deadlines = leader();
        deadlines.granted(LeaseId(1), 2, seconds(0.0));
        let remaining = |now| deadlines.remaining(LeaseId(1), seconds(now)).unwrap();
        assert_eq!([0.0, 0.001, 1.5, 2.0, 2.999, 3.0, 4.5].map(remaining), [2, 1, 0, 0, 0, -1, -2]);
        assert_eq!(deadlines.remaining(LeaseId(2), seconds(0.0)), None);
    }

    #[test]
    fn leases_beyond_the_limit_are_offered_by_the_next_call() {
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
    fn after_a_promotion_no_second_exceeds_its_share_of_leases() {
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
        assert_eq!(ended, [0, 10_000, 10_000, 10_000, 10_000, 10_000, 0, 0], "no later than necessary");
    }

    #[test]
    fn after_a_promotion_leases_within_the_limit_are_not_spread() {
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
    fn repeated_grants_and_revocations_of_an_id_leave_nothing_behind() {
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
    fn after_a_long_pause_every_expired_lease_is_offered_once_and_none_early() {
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
