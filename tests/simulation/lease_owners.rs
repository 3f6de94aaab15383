//! Clients that hold leases: they renew them through any member, sometimes too late, or stop renewing. No lease may expire
//! before the time promised to its owner, and none may last much longer.
//!
//! A promise counts from the moment at which the leader applied the grant or processed the renewal, although its owner gets the
//! answer later. It holds whatever happens to the member that made it.

use std::{collections::BTreeMap, time::Duration};

use metastore::{
    lease::{LeaseId, Renewal},
    proto::etcdserverpb::LeaseGrantRequest,
    state::Kind,
};
use prost::Message;

use super::{
    clients::Completion,
    history::LeaseChange,
    member::{ELECTION_TICKS, TICK},
    world::{Event, World},
};

/// The first ID of the owners' leases; those of other clients are smaller.
const FIRST_LEASE: i64 = 1000;
/// The longest time to live of the owners' leases, in seconds.
const TTL_MAX: i64 = 5;
/// In the quiescent phase a lease ends at the latest its time to live and this after its last renewal: what a new leader adds,
/// and a second. A leader that was paused before adds half an election timeout.
const GRACE: Duration = Duration::from_millis(2500);

/// The owners, and what was promised to them.
pub struct LeaseOwners {
    /// The lease that each owner holds.
    leases: Vec<Option<i64>>,
    next_lease: i64,
    promises: BTreeMap<i64, Promise>,
}

struct Promise {
    until: Duration,
    ttl_seconds: i64,
}

fn seconds(ttl_seconds: i64) -> Duration {
    Duration::from_secs(ttl_seconds.max(0).unsigned_abs())
}

impl LeaseOwners {
    pub fn new(count: usize) -> Self {
        Self { leases: vec![None; count], next_lease: FIRST_LEASE, promises: BTreeMap::new() }
    }

    /// The number of leases that have not ended.
    pub fn held(&self) -> usize {
        self.promises.len()
    }
}

impl World {
    /// An owner grants, renews or abandons its lease; schedules its next action.
    pub fn lease_owner(&mut self, nth: usize) {
        if self.quiescent {
            return;
        }
        let pause = if self.rng.percent(15) {
            self.rng.millis(1500, 6500) // About the time to live of its lease.
        } else {
            self.rng.millis(100, 900)
        };
        self.events.schedule(pause, Event::LeaseOwner(nth));
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let at = *self.rng.pick(&running);
        match self.lease_owners.leases[nth] {
            None => self.grant_lease(nth, at),
            Some(_) if self.rng.percent(5) => self.lease_owners.leases[nth] = None, // It stops renewing.
            Some(lease) => self.send_renewal(lease, at),
        }
    }

    fn grant_lease(&mut self, nth: usize, at: u64) {
        let lease = self.lease_owners.next_lease;
        self.lease_owners.next_lease += 1;
        self.lease_owners.leases[nth] = Some(lease);
        let grant = LeaseGrantRequest { id: lease, ttl: self.rng.between(2, TTL_MAX) };
        self.propose_request(at, Kind::LeaseGrant, &grant.encode_to_vec());
    }

    fn send_renewal(&mut self, lease: i64, at: u64) {
        let delay = self.rng.millis(0, self.config.latency);
        self.events.schedule(delay, Event::Renewal { lease, at });
    }

    /// A member processes a request to renew a lease: it answers it, forwards it to the leader, or keeps it until its own
    /// leadership is confirmed.
    pub fn renew_lease(&mut self, lease: i64, at: u64) {
        let now = self.events.now();
        let paused_until = self.slots.get(&at).map_or(Duration::ZERO, |slot| slot.paused_until);
        let Some(member) = self.member(at) else { return };
        if paused_until > now {
            return self.events.schedule(paused_until.saturating_sub(now), Event::Renewal { lease, at });
        }
        let (incarnation, leader) = (member.incarnation, member.node.status().leader());
        if leader != at {
            let is_lost = leader == 0 || self.network.is_blocked(at, leader) || self.rng.percent(10);
            if !is_lost {
                self.send_renewal(lease, leader);
            }
            return;
        }
        let lease_expiry = member.node.lease_expiry().clone();
        let renewal = lease_expiry.renew(LeaseId(lease));
        match renewal {
            Renewal::Renewed(ttl_seconds) => {
                self.report.renewals += 1;
                let until = now + seconds(ttl_seconds);
                self.lease_owners.promises.insert(lease, Promise { until, ttl_seconds });
            }
            Renewal::NotPrimary => {
                let completions = self.completions.clone();
                lease_expiry.await_primary(Box::new(move |outcome| {
                    if outcome.is_ok() {
                        completions.lock().push(Completion::Renewable { lease, at, incarnation });
                    }
                }));
            }
            Renewal::Expired | Renewal::Unknown => (),
        }
        self.note(|_| format!("{at}: renewal of lease {lease}: {renewal:?}"));
        self.schedule_threads(at);
    }

    /// Checks the leases that were just granted or ended against what was promised.
    pub fn check_lease_ends(&mut self) {
        let now = self.events.now();
        for change in std::mem::take(&mut self.history.lease_changes) {
            match change {
                LeaseChange::Granted { lease, ttl_seconds } => {
                    let until = now + seconds(ttl_seconds);
                    self.lease_owners.promises.insert(lease, Promise { until, ttl_seconds });
                }
                LeaseChange::Revoked { lease, command } => {
                    let promise = self.lease_owners.promises.remove(&lease).expect("it was granted");
                    self.lease_owners.leases.iter_mut().for_each(|it| _ = it.take_if(|held| *held == lease));
                    if command < self.next_id {
                        continue; // A client revoked it.
                    }
                    self.report.expiries += 1;
                    // Other clients reuse IDs, while the revocation of an earlier lease with that ID may be in flight.
                    assert!(
                        now >= promise.until || lease < FIRST_LEASE,
                        "lease {lease} ended at {now:?}, and was promised until {:?}",
                        promise.until
                    );
                }
            }
        }
    }

    /// In the quiescent phase no owner renews, and the leader does not change: short leases expire in time.
    pub fn wait_for_leases_to_end(&mut self) {
        let start = self.events.now();
        let end = start + seconds(TTL_MAX) + GRACE;
        let is_short = |promise: &Promise| promise.ttl_seconds <= TTL_MAX;
        while self.lease_owners.promises.values().any(is_short) {
            let left: Vec<_> = self.lease_owners.promises.iter().map(|(lease, it)| (*lease, it.until)).collect();
            assert!(self.events.now() < end, "leases have not ended since {start:?}: {left:?}, {}", self.describe());
            self.run_for(TICK);
        }
    }

    /// The longest that a lease lasts whose owner stops renewing now, if the leader does not change any more.
    pub fn max_lease_lifetime(ttl_seconds: i64) -> Duration {
        let election_timeout = TICK * u32::try_from(ELECTION_TICKS).expect("it is short");
        seconds(ttl_seconds) + election_timeout + Duration::from_secs(1)
    }
}
