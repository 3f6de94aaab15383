//! Clients that hold leases: they renew them through any member, now and then too late, or fall silent. No lease may end of itself before the time that
//! its owner was promised, and none may stay much longer.
//!
//! A promise counts from the moment at which the leader applied the grant or judged the renewal, though its owner hears of it
//! later. It holds whatever happens to the member that made it.

use std::{collections::BTreeMap, time::Duration};

use metastore::{
    lease::{LeaseId, Renewal},
    proto::etcdserverpb::LeaseGrantRequest,
    state::Kind,
};
use prost::Message;

use super::{
    clients::Told,
    history::LeaseChange,
    member::{ELECTION_TICKS, TICK},
    world::{Event, World},
};

/// The first ID of their leases; those of other clients are smaller.
const FIRST_LEASE: i64 = 1000;
/// The longest time to live of their leases, in seconds.
const TTL_MAX: i64 = 5;
/// In peace a lease outlasts its owner's silence by its time to live and this: what a new leader adds, and a second. A member that
/// was away before adds half an election timeout more.
const GRACE: Duration = Duration::from_millis(2500);

/// The owners, and what was promised to them.
pub struct LeaseOwners {
    /// The lease that each of them holds.
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

    /// How many leases there are.
    pub fn held(&self) -> usize {
        self.promises.len()
    }
}

impl World {
    /// An owner acts, and will again.
    pub fn lease_owner(&mut self, nth: usize) {
        if self.peace {
            return;
        }
        let pause = if self.dice.percent(15) {
            self.dice.millis(1500, 6500) // About as long as its lease lives.
        } else {
            self.dice.millis(100, 900)
        };
        self.agenda.after(pause, Event::LeaseOwner(nth));
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let at = *self.dice.pick(&running);
        match self.lease_owners.leases[nth] {
            None => self.grant_lease(nth, at),
            Some(_) if self.dice.percent(5) => self.lease_owners.leases[nth] = None, // It is heard of no more.
            Some(lease) => self.send_renewal(lease, at),
        }
    }

    fn grant_lease(&mut self, nth: usize, at: u64) {
        let lease = self.lease_owners.next_lease;
        self.lease_owners.next_lease += 1;
        self.lease_owners.leases[nth] = Some(lease);
        let grant = LeaseGrantRequest { id: lease, ttl: self.dice.between(2, TTL_MAX) };
        self.propose_request(at, Kind::LeaseGrant, &grant.encode_to_vec());
    }

    fn send_renewal(&mut self, lease: i64, at: u64) {
        let delay = self.dice.millis(0, self.climate.latency);
        self.agenda.after(delay, Event::Renewal { lease, at });
    }

    /// A member looks at a request to renew a lease: answers it, passes it on, or leaves it until it is certain to lead.
    pub fn renew_lease(&mut self, lease: i64, at: u64) {
        let now = self.agenda.now();
        let asleep_until = self.seats.get(&at).map_or(Duration::ZERO, |seat| seat.asleep_until);
        let Some(member) = self.member(at) else { return };
        if asleep_until > now {
            return self.agenda.after(asleep_until.saturating_sub(now), Event::Renewal { lease, at });
        }
        let (life, leader) = (member.life, member.node.status().leader());
        if leader != at {
            let is_lost = leader == 0 || self.network.is_cut(at, leader) || self.dice.percent(10);
            if !is_lost {
                self.send_renewal(lease, leader);
            }
            return;
        }
        let timekeeper = member.node.timekeeper().clone();
        let renewal = timekeeper.renew(LeaseId(lease));
        match renewal {
            Renewal::Renewed(ttl_seconds) => {
                self.report.renewals += 1;
                let until = now + seconds(ttl_seconds);
                self.lease_owners.promises.insert(lease, Promise { until, ttl_seconds });
            }
            Renewal::NotPrimary => {
                let mailbox = self.mailbox.clone();
                timekeeper.await_primary(Box::new(move |outcome| {
                    if outcome.is_ok() {
                        mailbox.lock().push(Told::Renewable { lease, at, life });
                    }
                }));
            }
            Renewal::Expired | Renewal::Unknown => (),
        }
        self.note(|_| format!("{at}: renewal of lease {lease}: {renewal:?}"));
        self.arrange(at);
    }

    /// Holds the leases that were granted or ended just now against what was promised.
    pub fn check_lease_ends(&mut self) {
        let now = self.agenda.now();
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
                        continue; // A client wanted that.
                    }
                    self.report.expiries += 1;
                    // Other clients use an ID again while a revocation of the lease that had it before may be under way.
                    assert!(
                        now >= promise.until || lease < FIRST_LEASE,
                        "lease {lease} ended at {now:?}, and was promised until {:?}",
                        promise.until
                    );
                }
            }
        }
    }

    /// In peace no owner renews, and a leader stays: short leases end in time.
    pub fn wait_for_leases_to_end(&mut self) {
        let start = self.agenda.now();
        let end = start + seconds(TTL_MAX) + GRACE;
        let is_short = |promise: &Promise| promise.ttl_seconds <= TTL_MAX;
        while self.lease_owners.promises.values().any(is_short) {
            let left: Vec<_> = self.lease_owners.promises.iter().map(|(lease, it)| (*lease, it.until)).collect();
            assert!(self.agenda.now() < end, "leases live on since {start:?}: {left:?}, {}", self.describe());
            self.run_for(TICK);
        }
    }

    /// How long the lease of an owner that falls silent now lives on, at most, where the leader changes no later than now.
    pub fn longest_life(ttl_seconds: i64) -> Duration {
        let election_timeout = TICK * u32::try_from(ELECTION_TICKS).expect("it is short");
        seconds(ttl_seconds) + election_timeout + Duration::from_secs(1)
    }
}
