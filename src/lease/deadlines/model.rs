//! Runs random steps on [`Deadlines`] and on a simple model of it; the two must agree.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::tests::{NO_LIMIT, RETRY_MILLIS, check, leader};
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Grant(i64, i64),
    Renew(i64),
    Revoke(i64),
    AdvanceTime(u64),
    Expire(usize),
    Hold(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let id = -3_i64..4;
    prop_oneof![
        2 => (id.clone(), prop_oneof![0_i64..20, 0_i64..5000]).prop_map(|(id, ttl)| Step::Grant(id, ttl)),
        2 => id.clone().prop_map(Step::Renew),
        1 => id.prop_map(Step::Revoke),
        3 => prop_oneof![10 => 0_u64..5_000, 1 => 0_u64..3_000_000].prop_map(Step::AdvanceTime),
        3 => prop_oneof![Just(NO_LIMIT), 1_usize..4].prop_map(Step::Expire),
        1 => (0_u64..3_000).prop_map(Step::Hold),
    ]
}

/// The simplest implementation: for each lease its TTL in seconds, its end, and the time before which it need not be offered.
#[derive(Default)]
struct Model {
    leases: BTreeMap<LeaseId, (i64, u64, u64)>,
    now: u64,
    held_until: u64,
}

impl Model {
    fn grant(&mut self, id: LeaseId, ttl: i64) {
        let end = self.now + ttl.unsigned_abs() * 1000;
        self.leases.insert(id, (ttl, end, end));
    }

    fn renew(&mut self, id: LeaseId) -> Renewal {
        match self.leases.get(&id).copied() {
            None => Renewal::Unknown,
            Some((_, end, next)) if next != end || end <= self.now && self.held_until <= self.now => Renewal::Expired,
            Some((ttl, ..)) => {
                self.grant(id, ttl);
                Renewal::Renewed(ttl)
            }
        }
    }

    fn check_offered(&mut self, offered: &[LeaseId], limit: usize) {
        assert!(offered.len() <= limit);
        if self.now < self.held_until {
            return assert_eq!(offered, [], "no lease ends during a hold");
        }
        assert_eq!(offered.iter().collect::<BTreeSet<_>>().len(), offered.len(), "no lease is offered twice in a call");
        for id in offered {
            let (_, end, next) = self.leases.get_mut(id).expect("only existing leases are offered");
            assert!(*end <= self.now, "{id} is offered early");
            *next = self.now + RETRY_MILLIS;
        }
        let late = self.leases.values().any(|&(_, _, next)| next + TICK_MILLIS <= self.now);
        assert!(!late || offered.len() == limit, "a lease was missed");
    }
}

proptest! {
    #[test]
    fn deadlines_match_the_model(steps in prop::collection::vec(step(), 0..200)) {
        let (mut deadlines, mut model) = (leader(), Model::default());
        for step in steps {
            let now = Duration::from_millis(model.now);
            match step {
                Step::Grant(id, ttl) => {
                    deadlines.granted(LeaseId(id), ttl, now);
                    model.grant(LeaseId(id), ttl);
                }
                Step::Renew(id) => {
                    prop_assert_eq!(deadlines.renewed(LeaseId(id), now), model.renew(LeaseId(id)));
                }
                Step::Revoke(id) => {
                    deadlines.revoked(LeaseId(id));
                    model.leases.remove(&LeaseId(id));
                }
                Step::AdvanceTime(millis) => model.now += millis,
                Step::Hold(millis) => {
                    model.held_until = model.now + millis;
                    deadlines.hold(Duration::from_millis(model.held_until));
                }
                Step::Expire(limit) => model.check_offered(&deadlines.expired(now, limit), limit),
            }
            check(&deadlines);
            let ends: BTreeMap<_, _> = deadlines.ends().into_iter().map(|(end, id)| (id, end)).collect();
            let expected = model.leases.iter().map(|(&id, &(_, end, _))| (id, Duration::from_millis(end)));
            prop_assert_eq!(ends, expected.collect());
        }
    }
}
