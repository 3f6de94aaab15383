//! Lease expiry: tracks the deadlines of leases while this member leads, and proposes the revocation of leases that have expired.
//!
//! The apply thread reports grants and revocations *before* it answers the request that caused them: a client that was granted a
//! lease may renew it at once. Handlers renew and look up. A thread of its own watches the clock and proposes an ordinary
//! LeaseRevoke for each expired lease; a lease ends only when that entry is applied.
//!
//! ```text
//! apply ── granted, revoked, promote ──▶ deadlines ◀── renew, remaining ── handlers
//!                                          │ expired, every quarter second
//!                                          ▼
//!                                       thread ── LeaseRevoke, at most MAX_REVOKES_IN_FLIGHT ──▶ raft
//! ```
//!
//! # Why a pause loses no lease
//!
//! A leader that is paused, or whose disk stalls, is replaced without noticing. When it continues, all deadlines are in the past,
//! while clients have renewed their leases through its successor. Two rules keep it from doing harm:
//!
//! * A revocation is proposed for the term in which it was decided ([`Input::ProposeInTerm`]): if this member does not lead in
//!   that term any more, it is dropped. So a revocation takes effect only if every renewal of that term came here.
//! * Nothing is decided without a proof of leadership: not that a lease has expired, nor that it is alive, nor how long it
//!   has left. A proof is a round of ReadIndex that was answered and whose index is applied. It is valid for one election
//!   timeout from the beginning of its round, or until leadership changes or the raft thread stalls.
//!
//! The second rule is what a client's renewal relies on. Let a proof's round begin at b. A member that is elected in a later term
//! needs the vote of one that took part in the round, so it is elected after b, and gives every lease its TTL plus an election
//! timeout from then on. A renewal that rests on the proof is given before b + election timeout, so the deadline it promises is
//! not later than the one the new leader sets. The clocks of the members have to agree on the length of a second, and on nothing
//! else.
//!
//! After a stall the leader lets no lease expire for another half election timeout, so that renewals that were sent meanwhile
//! count.
//!
//! Requests that cannot be answered yet leave a waiter: the renewal of an expired lease waits until the lease is gone, and
//! requests that need a leader with a proof wait until this member is one.
//!
//! INVARIANTS
//! * Deadlines are tracked from when the first entry of a term in which this member leads is applied, until it leads no more. At
//!   that entry the table holds every lease of earlier terms.
//! * The lock is held for a few leases at a time, except for a promotion (0.2 s for a million leases), and no waiter is called
//!   while it is held.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use prost::Message;

use super::{
    identity::RequestIds,
    inbox::Inbox,
    messages::Input,
    status::{Authority, Status},
    waiters::ReadWaiter,
};
use crate::{
    error::{Error, Halt},
    lease::{Deadlines, LeaseId, Renewal},
    metrics::METRICS,
    proto::etcdserverpb::LeaseRevokeRequest,
    state::{Command, Effect, Kind, Response},
};

/// The maximum number of revocations that are proposed and not yet applied. Clients' writes queue behind them, so it is limited;
/// a group of this size every few milliseconds is still far more than the 10,000 a second that a promotion lets expire.
const MAX_REVOKES_IN_FLIGHT: usize = 512;
/// How often the thread wakes up when no lease expires sooner.
const ROUND: Duration = Duration::from_millis(500);
/// The raft thread has stalled if it has not counted a tick for the time of this many.
pub(super) const STALLED_AFTER_TICKS: u32 = 3;

/// The durations that lease expiry depends on.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two ticks of raft.
    pub tick: Duration,
    /// Added to every lease when this member becomes the leader: leases could not be renewed while there was no leader.
    pub election_timeout: Duration,
    /// How long a proposal may take, and how long a request waits for a leader.
    pub request_timeout: Duration,
}

/// The deadlines of all leases, and the requests that wait for one.
pub struct LeaseExpiry {
    times: Times,
    status: Arc<Status>,
    raft: Arc<Inbox<Input>>,
    ids: Arc<RequestIds>,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    deadlines: Deadlines,
    /// The term in which this member last began to track them.
    term: u64,
    /// The last round of ReadIndex that was answered.
    proof: Option<Proof>,
    /// The round that is in progress.
    asked: Option<Proof>,
    /// Since when a request or an expired lease has waited for a proof.
    unproven_since: Option<Duration>,
    /// Renewals of expired leases, until the lease is gone.
    late_renewals: BTreeMap<LeaseId, Vec<ReadWaiter>>,
    /// Requests that need a leader with a proof, and until when they wait.
    awaiting_leader: VecDeque<(Duration, ReadWaiter)>,
    /// Revocations that are proposed and not yet answered.
    in_flight: usize,
    stopped: bool,
}

/// A round of ReadIndex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Proof {
    /// What the round proves.
    authority: Authority,
    begun: Duration,
}

impl LeaseExpiry {
    /// For a member that does not lead. Proposals go to `raft`, with IDs from `ids`.
    #[must_use]
    pub fn new(times: Times, status: Arc<Status>, raft: Arc<Inbox<Input>>, ids: Arc<RequestIds>) -> Self {
        let state = State {
            deadlines: Deadlines::new(times.request_timeout),
            term: 0,
            proof: None,
            asked: None,
            unproven_since: None,
            late_renewals: BTreeMap::new(),
            awaiting_leader: VecDeque::new(),
            in_flight: 0,
            stopped: false,
        };
        Self { times, status, raft, ids, state: Mutex::new(state), wake: Condvar::new() }
    }

    /// Call when this member leads in this term and all entries of earlier terms are applied.
    pub fn promote(self: &Arc<Self>, leases: Vec<(LeaseId, i64)>, term: u64) {
        let mut state = self.state.lock();
        tracing::info!(leases = leases.len(), term, "lease deadlines reset after a leader change");
        let now = self.now();
        (state.term, state.unproven_since) = (term, None);
        state.deadlines.promote(leases, now, self.times.election_timeout);
        self.start_round(&mut state, now);
    }

    /// Call when this member is no longer the leader, or starts a new term. Waiting requests are retried, and then wait for a
    /// leader.
    pub fn demote(&self) {
        let mut state = self.state.lock();
        state.deadlines.demote();
        (state.proof, state.asked, state.unproven_since) = (None, None, None);
        let late_renewals = std::mem::take(&mut state.late_renewals);
        let awaiting_leader = std::mem::take(&mut state.awaiting_leader);
        drop(state);
        let waiting =
            late_renewals.into_values().flatten().chain(awaiting_leader.into_iter().map(|(_, waiter)| waiter));
        waiting.for_each(|waiter| waiter(Ok(())));
    }

    /// Updates the deadlines of leases that were granted or revoked; ignores other effects.
    pub fn note(&self, effects: &[Effect]) {
        let mut gone = Vec::new();
        let now = self.now();
        let mut state = None;
        for effect in effects {
            match *effect {
                Effect::LeaseGranted { id, ttl } => {
                    METRICS.leases_granted.inc();
                    METRICS.lease_ttls.observe(seconds(ttl));
                    state.get_or_insert_with(|| self.state.lock()).deadlines.granted(LeaseId(id), ttl, now);
                }
                Effect::LeaseRevoked { id } => {
                    METRICS.leases_revoked.inc();
                    let state = state.get_or_insert_with(|| self.state.lock());
                    state.deadlines.revoked(LeaseId(id));
                    gone.extend(state.late_renewals.remove(&LeaseId(id)).into_iter().flatten());
                }
                Effect::CompactionScheduled { .. }
                | Effect::AlarmsChanged
                | Effect::MembersChanged
                | Effect::MemberStarted { .. }
                | Effect::Tokens(_) => (),
            }
        }
        drop(state);
        for waiter in gone {
            waiter(Ok(()));
        }
    }

    /// Renews a lease, if this member is certain to lead, and the lease exists and has not expired.
    pub fn renew(self: &Arc<Self>, id: LeaseId) -> Renewal {
        let mut state = self.state.lock();
        let now = self.now();
        let Some(proof) = self.valid_proof(&state, now) else { return Renewal::NotPrimary };
        let renewal = state.deadlines.renewed(id, now);
        if now.saturating_sub(proof.begun) > self.times.election_timeout / 2 {
            self.start_round(&mut state, now); // Early, so that the next renewals need not wait.
        }
        drop(state);
        if matches!(renewal, Renewal::Renewed(_)) {
            METRICS.leases_renewed.inc();
        }
        renewal
    }

    /// How many whole seconds a lease has left, zero or less if it has expired but still exists; None if there is no such lease,
    /// or this member is not certain to lead.
    #[must_use]
    pub fn remaining(&self, id: LeaseId) -> Option<i64> {
        let state = self.state.lock();
        let now = self.now();
        self.valid_proof(&state, now)?;
        state.deadlines.remaining(id, now)
    }

    /// When each of these leases ends, on the node's own clock; None for a lease whose deadline this member does not track.
    /// Ask for few at once, since the lock is held meanwhile.
    #[must_use]
    pub fn ends(&self, ids: &[LeaseId]) -> Vec<Option<Duration>> {
        let state = self.state.lock();
        ids.iter().map(|&id| state.deadlines.end(id)).collect()
    }

    /// Whether this member tracks the deadlines and is certain to lead.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        let state = self.state.lock();
        self.valid_proof(&state, self.now()).is_some()
    }

    /// The proof that a decision made now can rest on.
    fn valid_proof(&self, state: &State, now: Duration) -> Option<Proof> {
        let proof = state.proof?;
        let is_fresh = now.saturating_sub(proof.begun) <= self.times.election_timeout;
        (is_fresh && self.authority(state) == Some(proof.authority)).then_some(proof)
    }

    /// What a round of ReadIndex that begins now could prove. Promotion and demotion come from the apply thread, which may be
    /// late: the status shows sooner that another member leads.
    fn authority(&self, state: &State) -> Option<Authority> {
        let authority = self.status.authority()?;
        (state.deadlines.is_primary() && authority.term == state.term).then_some(authority)
    }

    /// Begins a round of ReadIndex, unless one is in progress that will do.
    fn start_round(self: &Arc<Self>, state: &mut State, now: Duration) {
        let Some(authority) = self.authority(state) else { return };
        if state.asked.is_some_and(|asked| {
            asked.authority == authority && now.saturating_sub(asked.begun) < self.times.request_timeout
        }) {
            return;
        }
        let asked = Proof { authority, begun: now };
        state.asked = Some(asked);
        let this = self.clone();
        // A closed inbox drops the waiter: the node stops.
        let _ = self.raft.send(Input::ConfirmLeadership(Box::new(move |outcome| this.round_finished(asked, &outcome))));
    }

    /// Handles the outcome of a round.
    fn round_finished(&self, asked: Proof, outcome: &Result<(), Error>) {
        let mut state = self.state.lock();
        state.asked.take_if(|waiting| *waiting == asked);
        if outcome.is_err() || self.authority(&state) != Some(asked.authority) {
            return; // The thread starts another round if one is needed.
        }
        let now = self.now();
        let unproven_since = state.unproven_since.take();
        let has_stalled = state.proof.is_some_and(|before| before.authority != asked.authority)
            || unproven_since.is_some_and(|since| now.saturating_sub(since) > self.times.tick * STALLED_AFTER_TICKS);
        if has_stalled {
            tracing::info!(
                term = asked.authority.term,
                "leadership confirmed after a pause: no lease expires until renewals that were sent meanwhile are answered"
            );
            state.deadlines.hold(now + self.times.election_timeout / 2);
        }
        state.proof = Some(asked);
        let waiting = std::mem::take(&mut state.awaiting_leader);
        drop(state);
        self.wake.notify_one();
        for (_, waiter) in waiting {
            waiter(Ok(()));
        }
    }

    /// Calls the waiter when an expired lease is gone, or when this member leads no more.
    pub fn await_end(&self, id: LeaseId, waiter: ReadWaiter) {
        let mut state = self.state.lock();
        if !state.stopped && state.deadlines.end(id).is_some() {
            state.late_renewals.entry(id).or_default().push(waiter);
            return;
        }
        drop(state);
        waiter(Ok(()));
    }

    /// Calls the waiter when this member is certain to lead, when leadership changes, or with an error when that takes too long.
    pub fn await_primary(self: &Arc<Self>, waiter: ReadWaiter) {
        let mut state = self.state.lock();
        let now = self.now();
        if state.stopped || self.valid_proof(&state, now).is_some() {
            drop(state);
            return waiter(Ok(()));
        }
        state.awaiting_leader.push_back((now + self.times.request_timeout, waiter));
        self.require_proof(&mut state, now);
    }

    /// Notes that something has to wait for a proof, and starts a round for it.
    fn require_proof(self: &Arc<Self>, state: &mut State, now: Duration) {
        if state.deadlines.is_primary() {
            state.unproven_since.get_or_insert(now);
        }
        self.start_round(state, now);
    }

    /// The thread's loop: runs until stopped.
    pub fn run(self: &Arc<Self>) -> Result<(), Halt> {
        let mut state = self.state.lock();
        while !state.stopped {
            let until = self.poll_locked(&mut state);
            self.wake.wait_for(&mut state, until.saturating_sub(self.now()));
        }
        Ok(())
    }

    /// Proposes the revocation of expired leases, and refuses requests that have waited too long. Returns when to call it again.
    pub fn poll(self: &Arc<Self>) -> Duration {
        self.poll_locked(&mut self.state.lock())
    }

    fn poll_locked(self: &Arc<Self>, state: &mut MutexGuard<'_, State>) -> Duration {
        loop {
            self.refuse_overdue(state);
            let now = self.now();
            let Some(proof) = self.valid_proof(state, now) else {
                let is_due = state.deadlines.next_deadline().is_some_and(|due| due <= now);
                if !is_due && state.awaiting_leader.is_empty() {
                    return self.next_poll(state, now);
                }
                self.require_proof(state, now);
                return now + self.times.tick;
            };
            let capacity = MAX_REVOKES_IN_FLIGHT - state.in_flight;
            let over = state.deadlines.expired(now, capacity);
            if over.is_empty() {
                return self.next_poll(state, now);
            }
            state.in_flight += over.len();
            MutexGuard::unlocked(state, || over.into_iter().for_each(|id| self.revoke(id, proof.authority.term)));
        }
    }

    /// Ends the thread, and refuses waiting requests.
    pub fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        let late_renewals = std::mem::take(&mut state.late_renewals);
        let awaiting_leader = std::mem::take(&mut state.awaiting_leader);
        drop(state);
        self.wake.notify_all();
        let waiting =
            late_renewals.into_values().flatten().chain(awaiting_leader.into_iter().map(|(_, waiter)| waiter));
        waiting.for_each(|waiter| waiter(Err(Error::Stopped)));
    }

    fn revoke(self: &Arc<Self>, id: LeaseId, term: u64) {
        let request_id = self.ids.next();
        // A revocation of the first kind needs the permission of a user while authentication is enabled.
        let is_known = self.status.capability_level() >= Kind::LeaseExpire.level();
        let kind = if is_known { Kind::LeaseExpire } else { Kind::LeaseRevoke };
        let data = Command::encode(request_id, kind, &LeaseRevokeRequest { id: id.0 }.encode_to_vec());
        let this = self.clone();
        let waiter = Box::new(move |outcome| this.revoke_finished(id, outcome));
        let proposal = Input::ProposeInTerm { term, id: request_id, data, waiter };
        if let Err(Input::ProposeInTerm { waiter, .. }) = self.raft.send(proposal) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Handles the outcome of a revocation. If the lease still exists, [`Deadlines`] will report it as expired again.
    fn revoke_finished(&self, id: LeaseId, outcome: Result<Response, Error>) {
        match outcome {
            Ok(_) => METRICS.leases_expired.inc(),
            // The client has revoked it; another member leads; the node stops.
            Err(Error::LeaseNotFound | Error::NotPrimary | Error::Stopped) => (),
            Err(error) => tracing::warn!(lease = %id, %error, "failed to revoke an expired lease"),
        }
        let mut state = self.state.lock();
        state.in_flight -= 1;
        if state.in_flight == MAX_REVOKES_IN_FLIGHT / 2 {
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Refuses requests that have waited too long for a leader.
    fn refuse_overdue(&self, state: &mut MutexGuard<'_, State>) {
        let (mut over, now) = (Vec::new(), self.now());
        while let Some((_, waiter)) = state.awaiting_leader.pop_front_if(|(until, _)| *until <= now) {
            over.push(waiter);
        }
        if !over.is_empty() {
            let error = if self.status.leader() == 0 { Error::NoLeader } else { Error::Timeout };
            MutexGuard::unlocked(state, || over.into_iter().for_each(|waiter| waiter(Err(error.clone()))));
        }
    }

    /// When to poll again. No lease can be granted for less than [`ROUND`], so none that is granted meanwhile expires before.
    fn next_poll(&self, state: &State, now: Duration) -> Duration {
        let next_round = now + ROUND;
        if state.in_flight == MAX_REVOKES_IN_FLIGHT {
            return next_round; // Or sooner, when enough revocations are answered.
        }
        let due = state.deadlines.next_deadline().map(|due| due.max(now + self.times.tick));
        due.map_or(next_round, |due| due.min(next_round))
    }

    fn now(&self) -> Duration {
        self.status.clock().now()
    }
}

#[allow(clippy::cast_precision_loss, reason = "a histogram needs no such precision")]
fn seconds(ttl: i64) -> f64 {
    ttl as f64
}

#[cfg(test)]
#[allow(clippy::wildcard_enum_match_arm, reason = "a test may panic")]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        sync::mpsc,
    };

    use super::*;
    use crate::node::{clock::Clock, identity::MemberId};

    const TERM: u64 = 3;
    const TICK: Duration = Duration::from_millis(100);
    const ELECTION: Duration = Duration::from_secs(1);

    /// Lease expiry without its thread, its clock, and what it sends to the raft thread.
    struct Rig {
        lease_expiry: Arc<LeaseExpiry>,
        raft: Arc<Inbox<Input>>,
        nanos: Arc<AtomicU64>,
        inputs: Vec<Input>,
    }

    impl Rig {
        fn new() -> Self {
            let (raft, nanos) = (Arc::new(Inbox::default()), Arc::new(AtomicU64::new(0)));
            let ids = Arc::new(RequestIds::new(MemberId::new(1).unwrap(), 1));
            let times = Times { tick: TICK, election_timeout: ELECTION, request_timeout: Duration::from_mins(1) };
            let status = Arc::new(Status::new(Clock::simulated(nanos.clone()), TICK * STALLED_AFTER_TICKS));
            status.set_leader_term(TERM);
            let lease_expiry = Arc::new(LeaseExpiry::new(times, status, raft.clone(), ids));
            Self { lease_expiry, raft, nanos, inputs: Vec::new() }
        }

        /// Advances the clock, with the raft thread counting its ticks.
        fn pass(&self, time: Duration) {
            let mut left = time;
            while !left.is_zero() {
                let step = left.min(TICK);
                self.sleep(step);
                self.lease_expiry.status.set_ticked();
                left -= step;
            }
        }

        /// Advances the clock while no thread runs.
        fn sleep(&self, time: Duration) {
            self.nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap(), Ordering::Relaxed);
        }

        /// Takes what was sent.
        fn sent(&mut self) -> (Vec<ReadWaiter>, Vec<(u64, crate::node::waiters::ProposalWaiter)>) {
            self.raft.drain(&mut self.inputs);
            let (mut rounds, mut revokes) = (Vec::new(), Vec::new());
            for input in self.inputs.drain(..) {
                match input {
                    Input::ConfirmLeadership(waiter) => rounds.push(waiter),
                    Input::ProposeInTerm { term, waiter, .. } => revokes.push((term, waiter)),
                    _ => panic!("it sends nothing else"),
                }
            }
            (rounds, revokes)
        }

        /// Answers the one round that was started.
        fn prove(&mut self) {
            let (mut rounds, revokes) = self.sent();
            assert_eq!((rounds.len(), revokes.len()), (1, 0));
            let waiter = rounds.pop().unwrap();
            waiter(Ok(()));
        }

        fn renew(&self, id: i64) -> Renewal {
            self.lease_expiry.renew(LeaseId(id))
        }
    }

    fn granted(id: i64, ttl: i64) -> Effect {
        Effect::LeaseGranted { id, ttl }
    }

    /// A waiter, and whether it was called and with what.
    fn waiter() -> (ReadWaiter, mpsc::Receiver<Result<(), Error>>) {
        let (tell, told) = mpsc::channel();
        (Box::new(move |outcome| tell.send(outcome).unwrap()), told)
    }

    #[test]
    fn a_late_renewal_waits_until_its_lease_is_gone() {
        let Rig { lease_expiry, .. } = Rig::new();
        lease_expiry.promote(vec![], TERM);
        lease_expiry.note(&[granted(1, 0), granted(2, 0)]);
        let (waiter_1, told_1) = waiter();
        let (waiter_2, told_2) = waiter();
        lease_expiry.await_end(LeaseId(1), waiter_1);
        lease_expiry.await_end(LeaseId(2), waiter_2);
        lease_expiry.note(&[Effect::LeaseRevoked { id: 1 }]);
        assert_eq!(told_1.try_recv(), Ok(Ok(())));
        assert!(told_2.try_recv().is_err());
        lease_expiry.demote();
        assert_eq!(told_2.try_recv(), Ok(Ok(())), "now another member tracks the lease");
        let (waiter_3, told_3) = waiter();
        lease_expiry.await_end(LeaseId(2), waiter_3);
        assert_eq!(told_3.try_recv(), Ok(Ok(())), "this member does not track the lease");
    }

    #[test]
    fn a_request_that_needs_a_leader_waits_for_its_proof() {
        let mut rig = Rig::new();
        let (early, told_early) = waiter();
        rig.lease_expiry.await_primary(early);
        rig.lease_expiry.promote(vec![(LeaseId(1), 10)], TERM);
        assert!(told_early.try_recv().is_err());
        assert_eq!((rig.renew(1), rig.lease_expiry.remaining(LeaseId(1))), (Renewal::NotPrimary, None));
        rig.prove();
        assert_eq!(told_early.try_recv(), Ok(Ok(())));
        assert_eq!((rig.renew(1), rig.lease_expiry.remaining(LeaseId(1))), (Renewal::Renewed(10), Some(10)));
        rig.lease_expiry.demote();
        let (late, told_late) = waiter();
        rig.lease_expiry.await_primary(late);
        rig.lease_expiry.stop();
        assert_eq!(told_late.try_recv(), Ok(Err(Error::Stopped)));
    }

    #[test]
    fn a_request_waits_for_a_leader_no_longer_than_it_may() {
        let rig = Rig::new();
        let (waiter, told) = waiter();
        rig.lease_expiry.await_primary(waiter);
        rig.pass(Duration::from_secs(59));
        rig.lease_expiry.poll();
        assert!(told.try_recv().is_err());
        rig.pass(Duration::from_secs(1));
        rig.lease_expiry.poll();
        assert_eq!(told.try_recv(), Ok(Err(Error::NoLeader)));
    }

    #[test]
    fn revocations_are_proposed_a_few_at_a_time_and_for_their_term() {
        let mut rig = Rig::new();
        rig.lease_expiry.promote(vec![], TERM);
        rig.prove();
        let leases = i64::try_from(MAX_REVOKES_IN_FLIGHT).unwrap() * 3;
        rig.lease_expiry.note(&(1..=leases).map(|id| granted(id, 0)).collect::<Vec<_>>());
        for _ in 0..3 {
            rig.lease_expiry.poll();
            rig.lease_expiry.poll();
            let (rounds, revokes) = rig.sent();
            assert_eq!((rounds.len(), revokes.len()), (0, MAX_REVOKES_IN_FLIGHT));
            for (term, waiter) in revokes {
                assert_eq!(term, TERM);
                waiter(Ok(Response::header_only(1)));
            }
        }
        assert_eq!(rig.lease_expiry.state.lock().in_flight, 0);
    }

    #[test]
    fn the_thread_continues_when_some_revocations_are_done_and_ends_when_stopped() {
        let rig = Rig::new();
        rig.lease_expiry.promote(vec![], TERM);
        let running = rig.lease_expiry.clone();
        let thread = std::thread::spawn(move || running.run().unwrap());
        let leases = i64::try_from(MAX_REVOKES_IN_FLIGHT).unwrap() * 3;
        rig.lease_expiry.note(&(1..=leases).map(|id| granted(id, 0)).collect::<Vec<_>>());
        let (mut inputs, mut revoked) = (Vec::new(), 0);
        while revoked < MAX_REVOKES_IN_FLIGHT * 3 {
            assert!(rig.raft.receive(&mut inputs, None));
            for input in inputs.drain(..) {
                match input {
                    Input::ConfirmLeadership(waiter) => waiter(Ok(())),
                    Input::ProposeInTerm { waiter, .. } => {
                        revoked += 1;
                        waiter(Ok(Response::header_only(1)));
                    }
                    _ => panic!("it sends nothing else"),
                }
            }
        }
        rig.lease_expiry.stop();
        thread.join().unwrap();
        assert_eq!(rig.lease_expiry.state.lock().in_flight, 0);
    }

    #[test]
    fn a_deposed_leader_renews_and_revokes_nothing_even_if_that_is_not_applied_yet() {
        let mut rig = Rig::new();
        rig.lease_expiry.promote(vec![(LeaseId(1), 10), (LeaseId(2), 0)], TERM);
        rig.prove();
        rig.pass(ELECTION);
        for leader_term in [0, TERM + 2] {
            rig.lease_expiry.status.set_leader_term(leader_term);
            assert_eq!(rig.renew(1), Renewal::NotPrimary);
            assert!(!rig.lease_expiry.is_primary());
            rig.lease_expiry.poll();
            let (rounds, revokes) = rig.sent();
            assert_eq!((rounds.len(), revokes.len()), (0, 0), "there is nothing to prove");
        }
    }

    #[test]
    fn after_a_pause_nothing_is_decided_before_a_new_proof_and_late_renewals_count() {
        let mut rig = Rig::new();
        rig.lease_expiry.promote(vec![(LeaseId(1), 5), (LeaseId(2), 5)], TERM);
        rig.prove();
        assert_eq!(rig.renew(1), Renewal::Renewed(5));
        rig.sleep(8 * ELECTION);
        assert_eq!(rig.renew(1), Renewal::NotPrimary, "before the raft thread runs");
        rig.lease_expiry.status.set_ticked();
        assert_eq!(rig.renew(1), Renewal::NotPrimary, "a tick proves nothing");
        rig.lease_expiry.poll();
        rig.prove();
        rig.lease_expiry.poll();
        let (rounds, revokes) = rig.sent();
        assert_eq!((rounds.len(), revokes.len()), (0, 0), "no lease ends at once");
        rig.pass(ELECTION / 4);
        assert_eq!(rig.renew(1), Renewal::Renewed(5), "it was sent during the pause");
        rig.pass(ELECTION / 4);
        rig.lease_expiry.poll();
        let (_, revokes) = rig.sent();
        assert_eq!(revokes.len(), 1, "the other lease was not renewed");
        assert_eq!(rig.renew(2), Renewal::Expired);
    }

    /// FAULT-32.
    #[test]
    fn a_round_that_began_before_a_pause_proves_nothing_after_it() {
        let mut rig = Rig::new();
        rig.lease_expiry.promote(vec![(LeaseId(1), 5)], TERM);
        let (mut rounds, _) = rig.sent();
        rig.sleep(ELECTION / 2);
        rig.lease_expiry.status.set_ticked();
        let late = rounds.pop().unwrap();
        late(Ok(()));
        assert_eq!(rig.renew(1), Renewal::NotPrimary);
        let (waiter, told) = waiter();
        rig.lease_expiry.await_primary(waiter);
        rig.prove();
        assert_eq!(told.try_recv(), Ok(Ok(())));
        assert_eq!(rig.renew(1), Renewal::Renewed(5));
    }

    #[test]
    fn a_proof_is_good_for_an_election_timeout_and_renewed_in_time() {
        let mut rig = Rig::new();
        rig.lease_expiry.promote(vec![(LeaseId(1), 5)], TERM);
        rig.prove();
        rig.pass(ELECTION * 3 / 4);
        assert_eq!(rig.renew(1), Renewal::Renewed(5));
        rig.prove();
        rig.pass(ELECTION / 2);
        assert_eq!(rig.renew(1), Renewal::Renewed(5), "by the second proof");
        rig.pass(ELECTION);
        assert_eq!(rig.renew(1), Renewal::NotPrimary, "no round was started in time");
    }

    #[test]
    fn a_round_that_fails_is_started_again() {
        let mut rig = Rig::new();
        rig.lease_expiry.promote(vec![(LeaseId(1), 0)], TERM);
        let (mut rounds, _) = rig.sent();
        let waiter = rounds.pop().unwrap();
        waiter(Err(Error::Timeout));
        rig.pass(ELECTION + TICK);
        rig.lease_expiry.poll();
        rig.prove();
        rig.pass(ELECTION / 2);
        rig.lease_expiry.poll();
        let (_, revokes) = rig.sent();
        assert_eq!(revokes.len(), 1);
    }
}
