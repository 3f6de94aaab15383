//! The timekeeper: knows when leases end, while this member leads, and has those revoked whose time is over.
//!
//! The apply thread tells it what happened to leases *before* it answers the request that did it: a client that was granted a
//! lease may renew it at once. Handlers renew and look up. A thread of its own looks at the clock and proposes an ordinary
//! LeaseRevoke for each lease that is over; nothing ends here, everything ends when that entry is applied.
//!
//! ```text
//! apply ── granted, revoked, promote ──▶ deadlines ◀── renew, remaining ── handlers
//!                                          │ expired, every quarter second
//!                                          ▼
//!                                       thread ── LeaseRevoke, at most REVOKES_UNDER_WAY ──▶ raft
//! ```
//!
//! # Why no lease is lost to a pause
//!
//! A leader that is paused, or whose disk stalls, is replaced without noticing. When it goes on, all deadlines lie in the past, and
//! clients have renewed their leases through its successor. Two rules keep it from doing harm:
//!
//! * A revocation is proposed for the term in which it was decided ([`Input::ProposeInTerm`]): where this member does not lead in
//!   that term any more, it is dropped. So a revocation takes effect only if every renewal of that term came here.
//! * Nothing is decided, neither that a lease is over nor that it lives on nor how long it has left, without a proof of leadership:
//!   a round of ReadIndex that was answered and whose index is applied. A proof is good for one election timeout from the beginning
//!   of its round, and ends before that when leadership changes or the raft thread was away.
//!
//! The second rule is what a client's renewal relies on. Let a proof's round begin at b. A member that is elected in a later term
//! needs the vote of one that took part in the round, so it is elected after b, and gives every lease its TTL and an election
//! timeout from then on. A renewal that rests on the proof is given before b + election timeout, so the lease it promises does not
//! outlast what the new leader gives. Clocks need to agree on the length of a second for that, and on nothing else.
//!
//! A leader that was away lets no lease end for another half election timeout, so that renewals which were sent meanwhile count.
//!
//! What cannot be answered yet leaves a waiter: a renewal of a lease that is over waits until the lease is gone, and what only a
//! leader with a proof can tell waits until this member is one.
//!
//! INVARIANTS
//! * The deadlines are kept from when the first entry of a term that this member leads is applied, until it leads no more. By
//!   then every lease of earlier terms is in the table.
//! * The lock is held for a few leases at a time, but for a promotion (0.2 s for a million of them), and no waiter is called
//!   under it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use prost::Message;

use super::{
    driver::Input,
    identity::RequestIds,
    inbox::Inbox,
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

/// Revocations that may be proposed and not yet applied. Clients' writes queue behind them, so there are not too many; a
/// group of this size every few milliseconds is still far more than the 10,000 a second that a promotion lets end.
const REVOKES_UNDER_WAY: usize = 512;
/// How often the thread looks around when no lease wants it sooner.
const ROUND: Duration = Duration::from_millis(500);
/// A raft thread that has not counted a tick for so many is away.
pub(super) const TICKS_AWAY: u32 = 3;

/// What the timekeeper counts with.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two ticks of raft.
    pub tick: Duration,
    /// What every lease gets on top when leadership comes here: nobody could renew while there was no leader.
    pub election_timeout: Duration,
    /// How long a proposal may be under way, and how long a request waits for a leader.
    pub patience: Duration,
}

/// The deadlines of all leases, and what waits for one.
pub struct Timekeeper {
    times: Times,
    status: Arc<Status>,
    raft: Arc<Inbox<Input>>,
    ids: Arc<RequestIds>,
    book: Mutex<Book>,
    room: Condvar,
}

struct Book {
    deadlines: Deadlines,
    /// The term in which this member last began to keep them.
    term: u64,
    /// The last round of ReadIndex that was answered.
    proof: Option<Proof>,
    /// The one that is under way.
    asked: Option<Proof>,
    /// Since when something has waited for a proof.
    unproven_since: Option<Duration>,
    /// Renewals that came too late, until their lease is gone.
    too_late: BTreeMap<LeaseId, Vec<ReadWaiter>>,
    /// Requests that need a leader with a proof, and until when they wait.
    leaderless: VecDeque<(Duration, ReadWaiter)>,
    under_way: usize,
    stopped: bool,
}

/// A round of ReadIndex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Proof {
    /// What it proves.
    authority: Authority,
    begun: Duration,
}

impl Timekeeper {
    /// A timekeeper of a member that does not lead. Its proposals go to `raft`, under IDs of `ids`.
    #[must_use]
    pub fn new(times: Times, status: Arc<Status>, raft: Arc<Inbox<Input>>, ids: Arc<RequestIds>) -> Self {
        let book = Book {
            deadlines: Deadlines::new(times.patience),
            term: 0,
            proof: None,
            asked: None,
            unproven_since: None,
            too_late: BTreeMap::new(),
            leaderless: VecDeque::new(),
            under_way: 0,
            stopped: false,
        };
        Self { times, status, raft, ids, book: Mutex::new(book), room: Condvar::new() }
    }

    /// This member leads in this term, and everything from before it is applied.
    pub fn promote(self: &Arc<Self>, leases: Vec<(LeaseId, i64)>, term: u64) {
        let mut book = self.book.lock();
        tracing::info!(leases = leases.len(), term, "lease deadlines reset after a leader change");
        let now = self.now();
        (book.term, book.unproven_since) = (term, None);
        book.deadlines.promote(leases, now, self.times.election_timeout);
        self.ask(&mut book, now);
    }

    /// This member leads no more, if it did. What waits asks again, and then waits for a leader.
    pub fn demote(&self) {
        let mut book = self.book.lock();
        book.deadlines.demote();
        (book.proof, book.asked, book.unproven_since) = (None, None, None);
        let too_late = std::mem::take(&mut book.too_late);
        let leaderless = std::mem::take(&mut book.leaderless);
        drop(book);
        let waiting = too_late.into_values().flatten().chain(leaderless.into_iter().map(|(_, waiter)| waiter));
        waiting.for_each(|waiter| waiter(Ok(())));
    }

    /// Something happened to leases; other effects are ignored.
    pub fn note(&self, effects: &[Effect]) {
        let mut gone = Vec::new();
        let now = self.now();
        let mut book = None;
        for effect in effects {
            match *effect {
                Effect::LeaseGranted { id, ttl } => {
                    METRICS.leases_granted.inc();
                    METRICS.lease_ttls.observe(seconds(ttl));
                    book.get_or_insert_with(|| self.book.lock()).deadlines.granted(LeaseId(id), ttl, now);
                }
                Effect::LeaseRevoked { id } => {
                    METRICS.leases_revoked.inc();
                    let book = book.get_or_insert_with(|| self.book.lock());
                    book.deadlines.revoked(LeaseId(id));
                    gone.extend(book.too_late.remove(&LeaseId(id)).into_iter().flatten());
                }
                Effect::CompactionScheduled { .. } | Effect::AlarmsChanged | Effect::MembersChanged => (),
            }
        }
        drop(book);
        for waiter in gone {
            waiter(Ok(()));
        }
    }

    /// Renews a lease, if this member is certain to lead and knows it, and it is not over.
    pub fn renew(self: &Arc<Self>, id: LeaseId) -> Renewal {
        let mut book = self.book.lock();
        let now = self.now();
        let Some(proof) = self.valid_proof(&book, now) else { return Renewal::NotPrimary };
        let renewal = book.deadlines.renewed(id, now);
        if now.saturating_sub(proof.begun) > self.times.election_timeout / 2 {
            self.ask(&mut book, now); // So that the next renewals need not wait.
        }
        drop(book);
        if matches!(renewal, Renewal::Renewed(_)) {
            METRICS.leases_renewed.inc();
        }
        renewal
    }

    /// How many whole seconds a lease has left, zero or less if it is over but still there; None if there is no such lease, or
    /// this member is not certain to lead.
    #[must_use]
    pub fn remaining(&self, id: LeaseId) -> Option<i64> {
        let book = self.book.lock();
        let now = self.now();
        self.valid_proof(&book, now)?;
        book.deadlines.remaining(id, now)
    }

    /// When each of some leases ends, on a clock of our own; None where this member keeps no deadline of it. Ask for few at once.
    #[must_use]
    pub fn ends(&self, ids: &[LeaseId]) -> Vec<Option<Duration>> {
        let book = self.book.lock();
        ids.iter().map(|&id| book.deadlines.end(id)).collect()
    }

    /// Whether this member keeps the deadlines and is certain to lead.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        let book = self.book.lock();
        self.valid_proof(&book, self.now()).is_some()
    }

    /// The proof on which a decision made now can rest.
    fn valid_proof(&self, book: &Book, now: Duration) -> Option<Proof> {
        let proof = book.proof?;
        let is_fresh = now.saturating_sub(proof.begun) <= self.times.election_timeout;
        (is_fresh && self.authority(book) == Some(proof.authority)).then_some(proof)
    }

    /// What a round of ReadIndex that begins now could prove. The apply thread says when deadlines begin and end, and may be late:
    /// raft knows sooner that another member leads.
    fn authority(&self, book: &Book) -> Option<Authority> {
        let authority = self.status.authority()?;
        (book.deadlines.is_primary() && authority.term == book.term).then_some(authority)
    }

    /// Begins a round of ReadIndex, unless one is under way that will do.
    fn ask(self: &Arc<Self>, book: &mut Book, now: Duration) {
        let Some(authority) = self.authority(book) else { return };
        if book
            .asked
            .is_some_and(|asked| asked.authority == authority && now.saturating_sub(asked.begun) < self.times.patience)
        {
            return;
        }
        let asked = Proof { authority, begun: now };
        book.asked = Some(asked);
        let this = self.clone();
        // An inbox that is closed drops the waiter: everything stops.
        let _ = self.raft.send(Input::ConfirmLeadership(Box::new(move |outcome| this.proven(asked, &outcome))));
    }

    /// A round has come to its end.
    fn proven(&self, asked: Proof, outcome: &Result<(), Error>) {
        let mut book = self.book.lock();
        book.asked.take_if(|waiting| *waiting == asked);
        if outcome.is_err() || self.authority(&book) != Some(asked.authority) {
            return; // The thread asks again, if there is reason to.
        }
        let now = self.now();
        let unproven_since = book.unproven_since.take();
        let was_away = book.proof.is_some_and(|before| before.authority != asked.authority)
            || unproven_since.is_some_and(|since| now.saturating_sub(since) > self.times.tick * TICKS_AWAY);
        if was_away {
            tracing::info!(
                term = asked.authority.term,
                "leadership confirmed after a pause: leases end no sooner than renewals that were sent meanwhile are answered"
            );
            book.deadlines.hold(now + self.times.election_timeout / 2);
        }
        book.proof = Some(asked);
        let waiting = std::mem::take(&mut book.leaderless);
        drop(book);
        self.room.notify_one();
        for (_, waiter) in waiting {
            waiter(Ok(()));
        }
    }

    /// Calls the waiter when a lease, which is over, is gone; or when this member leads no more.
    pub fn await_end(&self, id: LeaseId, waiter: ReadWaiter) {
        let mut book = self.book.lock();
        if !book.stopped && book.deadlines.end(id).is_some() {
            book.too_late.entry(id).or_default().push(waiter);
            return;
        }
        drop(book);
        waiter(Ok(()));
    }

    /// Calls the waiter when this member is certain to lead, when leadership changes, or with an error when that takes too long.
    pub fn await_primary(self: &Arc<Self>, waiter: ReadWaiter) {
        let mut book = self.book.lock();
        let now = self.now();
        if book.stopped || self.valid_proof(&book, now).is_some() {
            drop(book);
            return waiter(Ok(()));
        }
        book.leaderless.push_back((now + self.times.patience, waiter));
        self.want_proof(&mut book, now);
    }

    /// Something has to wait for a proof.
    fn want_proof(self: &Arc<Self>, book: &mut Book, now: Duration) {
        if book.deadlines.is_primary() {
            book.unproven_since.get_or_insert(now);
        }
        self.ask(book, now);
    }

    /// The thread: runs until stopped.
    pub fn run(self: &Arc<Self>) -> Result<(), Halt> {
        let mut book = self.book.lock();
        while !book.stopped {
            let until = self.look_at(&mut book);
            self.room.wait_for(&mut book, until.saturating_sub(self.now()));
        }
        Ok(())
    }

    /// Has those leases revoked whose time is over, and refuses requests that have waited too long. Returns when to look again.
    pub fn look(self: &Arc<Self>) -> Duration {
        self.look_at(&mut self.book.lock())
    }

    fn look_at(self: &Arc<Self>, book: &mut MutexGuard<'_, Book>) -> Duration {
        loop {
            self.lose_patience(book);
            let now = self.now();
            let Some(proof) = self.valid_proof(book, now) else {
                let is_due = book.deadlines.next_deadline().is_some_and(|due| due <= now);
                if !is_due && book.leaderless.is_empty() {
                    return self.next_look(book, now);
                }
                self.want_proof(book, now);
                return now + self.times.tick;
            };
            let room = REVOKES_UNDER_WAY - book.under_way;
            let over = book.deadlines.expired(now, room);
            if over.is_empty() {
                return self.next_look(book, now);
            }
            book.under_way += over.len();
            MutexGuard::unlocked(book, || over.into_iter().for_each(|id| self.revoke(id, proof.authority.term)));
        }
    }

    /// Ends the thread; what waits is refused.
    pub fn stop(&self) {
        let mut book = self.book.lock();
        book.stopped = true;
        let too_late = std::mem::take(&mut book.too_late);
        let leaderless = std::mem::take(&mut book.leaderless);
        drop(book);
        self.room.notify_all();
        let waiting = too_late.into_values().flatten().chain(leaderless.into_iter().map(|(_, waiter)| waiter));
        waiting.for_each(|waiter| waiter(Err(Error::Stopped)));
    }

    fn revoke(self: &Arc<Self>, id: LeaseId, term: u64) {
        let request_id = self.ids.next();
        let data = Command::encode(request_id, Kind::LeaseRevoke, &LeaseRevokeRequest { id: id.0 }.encode_to_vec());
        let this = self.clone();
        let waiter = Box::new(move |outcome| this.heard(id, outcome));
        let proposal = Input::ProposeInTerm { term, id: request_id, data, waiter };
        if let Err(Input::ProposeInTerm { waiter, .. }) = self.raft.send(proposal) {
            waiter(Err(Error::Stopped));
        }
    }

    /// A proposal of ours has an outcome. Whatever it is: a lease that is still there will be offered again.
    fn heard(&self, id: LeaseId, outcome: Result<Response, Error>) {
        match outcome {
            Ok(_) => METRICS.leases_expired.inc(),
            // Its owner was faster; another member leads; or nothing matters any more.
            Err(Error::LeaseNotFound | Error::NotPrimary | Error::Stopped) => (),
            Err(error) => tracing::warn!(lease = %id, %error, "failed to revoke an expired lease"),
        }
        let mut book = self.book.lock();
        book.under_way -= 1;
        if book.under_way == REVOKES_UNDER_WAY / 2 {
            drop(book);
            self.room.notify_one();
        }
    }

    /// Refuses requests that have waited too long for a leader.
    fn lose_patience(&self, book: &mut MutexGuard<'_, Book>) {
        let (mut over, now) = (Vec::new(), self.now());
        while let Some((_, waiter)) = book.leaderless.pop_front_if(|(until, _)| *until <= now) {
            over.push(waiter);
        }
        if !over.is_empty() {
            let error = if self.status.leader() == 0 { Error::NoLeader } else { Error::Timeout };
            MutexGuard::unlocked(book, || over.into_iter().for_each(|waiter| waiter(Err(error.clone()))));
        }
    }

    /// No lease can be granted for less than a round, so none can be over before.
    fn next_look(&self, book: &Book, now: Duration) -> Duration {
        let next_round = now + ROUND;
        if book.under_way == REVOKES_UNDER_WAY {
            return next_round; // Or when there is room.
        }
        let due = book.deadlines.next_deadline().map(|due| due.max(now + self.times.tick));
        due.map_or(next_round, |due| due.min(next_round))
    }

    fn now(&self) -> Duration {
        self.status.clock().now()
    }
}

#[allow(clippy::cast_precision_loss, reason = "a histogram does not look that closely")]
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

    /// A timekeeper without a thread, its clock, and what it sends to the raft thread.
    struct Rig {
        timekeeper: Arc<Timekeeper>,
        raft: Arc<Inbox<Input>>,
        nanos: Arc<AtomicU64>,
        heard: Vec<Input>,
    }

    impl Rig {
        fn new() -> Self {
            let (raft, nanos) = (Arc::new(Inbox::default()), Arc::new(AtomicU64::new(0)));
            let ids = Arc::new(RequestIds::new(MemberId::new(1).unwrap(), 1));
            let times = Times { tick: TICK, election_timeout: ELECTION, patience: Duration::from_mins(1) };
            let status = Arc::new(Status::new(Clock::simulated(nanos.clone()), TICK * TICKS_AWAY));
            status.set_reign(TERM);
            let timekeeper = Arc::new(Timekeeper::new(times, status, raft.clone(), ids));
            Self { timekeeper, raft, nanos, heard: Vec::new() }
        }

        /// Time goes by, and the raft thread counts its ticks.
        fn pass(&self, time: Duration) {
            let mut left = time;
            while !left.is_zero() {
                let step = left.min(TICK);
                self.sleep(step);
                self.timekeeper.status.set_ticked();
                left -= step;
            }
        }

        /// Time goes by, and no thread runs.
        fn sleep(&self, time: Duration) {
            self.nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap(), Ordering::Relaxed);
        }

        /// Takes what was sent.
        fn sent(&mut self) -> (Vec<ReadWaiter>, Vec<(u64, crate::node::waiters::ProposalWaiter)>) {
            self.raft.drain(&mut self.heard);
            let (mut rounds, mut revokes) = (Vec::new(), Vec::new());
            for input in self.heard.drain(..) {
                match input {
                    Input::ConfirmLeadership(waiter) => rounds.push(waiter),
                    Input::ProposeInTerm { term, waiter, .. } => revokes.push((term, waiter)),
                    _ => panic!("it sends nothing else"),
                }
            }
            (rounds, revokes)
        }

        /// The one round that was asked for is answered.
        fn prove(&mut self) {
            let (mut rounds, revokes) = self.sent();
            assert_eq!((rounds.len(), revokes.len()), (1, 0));
            let waiter = rounds.pop().unwrap();
            waiter(Ok(()));
        }

        fn renew(&self, id: i64) -> Renewal {
            self.timekeeper.renew(LeaseId(id))
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
        let Rig { timekeeper, .. } = Rig::new();
        timekeeper.promote(vec![], TERM);
        timekeeper.note(&[granted(1, 0), granted(2, 0)]);
        let (waiter_1, told_1) = waiter();
        let (waiter_2, told_2) = waiter();
        timekeeper.await_end(LeaseId(1), waiter_1);
        timekeeper.await_end(LeaseId(2), waiter_2);
        timekeeper.note(&[Effect::LeaseRevoked { id: 1 }]);
        assert_eq!(told_1.try_recv(), Ok(Ok(())));
        assert!(told_2.try_recv().is_err());
        timekeeper.demote();
        assert_eq!(told_2.try_recv(), Ok(Ok(())), "another member knows now");
        let (waiter_3, told_3) = waiter();
        timekeeper.await_end(LeaseId(2), waiter_3);
        assert_eq!(told_3.try_recv(), Ok(Ok(())), "no member will say that it is gone");
    }

    #[test]
    fn a_request_that_needs_a_leader_waits_for_its_proof() {
        let mut rig = Rig::new();
        let (early, told_early) = waiter();
        rig.timekeeper.await_primary(early);
        rig.timekeeper.promote(vec![(LeaseId(1), 10)], TERM);
        assert!(told_early.try_recv().is_err());
        assert_eq!((rig.renew(1), rig.timekeeper.remaining(LeaseId(1))), (Renewal::NotPrimary, None));
        rig.prove();
        assert_eq!(told_early.try_recv(), Ok(Ok(())));
        assert_eq!((rig.renew(1), rig.timekeeper.remaining(LeaseId(1))), (Renewal::Renewed(10), Some(10)));
        rig.timekeeper.demote();
        let (late, told_late) = waiter();
        rig.timekeeper.await_primary(late);
        rig.timekeeper.stop();
        assert_eq!(told_late.try_recv(), Ok(Err(Error::Stopped)));
    }

    #[test]
    fn a_request_waits_for_a_leader_no_longer_than_it_may() {
        let rig = Rig::new();
        let (waiter, told) = waiter();
        rig.timekeeper.await_primary(waiter);
        rig.pass(Duration::from_secs(59));
        rig.timekeeper.look();
        assert!(told.try_recv().is_err());
        rig.pass(Duration::from_secs(1));
        rig.timekeeper.look();
        assert_eq!(told.try_recv(), Ok(Err(Error::NoLeader)));
    }

    #[test]
    fn revocations_are_proposed_a_few_at_a_time_and_for_their_term() {
        let mut rig = Rig::new();
        rig.timekeeper.promote(vec![], TERM);
        rig.prove();
        let leases = i64::try_from(REVOKES_UNDER_WAY).unwrap() * 3;
        rig.timekeeper.note(&(1..=leases).map(|id| granted(id, 0)).collect::<Vec<_>>());
        for _ in 0..3 {
            rig.timekeeper.look();
            rig.timekeeper.look();
            let (rounds, revokes) = rig.sent();
            assert_eq!((rounds.len(), revokes.len()), (0, REVOKES_UNDER_WAY));
            for (term, waiter) in revokes {
                assert_eq!(term, TERM);
                waiter(Ok(Response::bare(1)));
            }
        }
        assert_eq!(rig.timekeeper.book.lock().under_way, 0);
    }

    #[test]
    fn the_thread_goes_on_when_some_revocations_are_done_and_ends_when_told() {
        let rig = Rig::new();
        rig.timekeeper.promote(vec![], TERM);
        let running = rig.timekeeper.clone();
        let thread = std::thread::spawn(move || running.run().unwrap());
        let leases = i64::try_from(REVOKES_UNDER_WAY).unwrap() * 3;
        rig.timekeeper.note(&(1..=leases).map(|id| granted(id, 0)).collect::<Vec<_>>());
        let (mut inputs, mut revoked) = (Vec::new(), 0);
        while revoked < REVOKES_UNDER_WAY * 3 {
            assert!(rig.raft.receive(&mut inputs, None));
            for input in inputs.drain(..) {
                match input {
                    Input::ConfirmLeadership(waiter) => waiter(Ok(())),
                    Input::ProposeInTerm { waiter, .. } => {
                        revoked += 1;
                        waiter(Ok(Response::bare(1)));
                    }
                    _ => panic!("it sends nothing else"),
                }
            }
        }
        rig.timekeeper.stop();
        thread.join().unwrap();
        assert_eq!(rig.timekeeper.book.lock().under_way, 0);
    }

    #[test]
    fn a_deposed_leader_renews_and_revokes_nothing_even_if_that_is_not_applied_yet() {
        let mut rig = Rig::new();
        rig.timekeeper.promote(vec![(LeaseId(1), 10), (LeaseId(2), 0)], TERM);
        rig.prove();
        rig.pass(ELECTION);
        for reign in [0, TERM + 2] {
            rig.timekeeper.status.set_reign(reign);
            assert_eq!(rig.renew(1), Renewal::NotPrimary);
            assert!(!rig.timekeeper.is_primary());
            rig.timekeeper.look();
            let (rounds, revokes) = rig.sent();
            assert_eq!((rounds.len(), revokes.len()), (0, 0), "there is nothing to prove");
        }
    }

    #[test]
    fn after_a_pause_nothing_is_decided_before_a_new_proof_and_late_renewals_count() {
        let mut rig = Rig::new();
        rig.timekeeper.promote(vec![(LeaseId(1), 5), (LeaseId(2), 5)], TERM);
        rig.prove();
        assert_eq!(rig.renew(1), Renewal::Renewed(5));
        rig.sleep(8 * ELECTION);
        assert_eq!(rig.renew(1), Renewal::NotPrimary, "before the raft thread runs");
        rig.timekeeper.status.set_ticked();
        assert_eq!(rig.renew(1), Renewal::NotPrimary, "a tick proves nothing");
        rig.timekeeper.look();
        rig.prove();
        rig.timekeeper.look();
        let (rounds, revokes) = rig.sent();
        assert_eq!((rounds.len(), revokes.len()), (0, 0), "no lease ends at once");
        rig.pass(ELECTION / 4);
        assert_eq!(rig.renew(1), Renewal::Renewed(5), "it was sent while the leader was away");
        rig.pass(ELECTION / 4);
        rig.timekeeper.look();
        let (_, revokes) = rig.sent();
        assert_eq!(revokes.len(), 1, "the other one was not");
        assert_eq!(rig.renew(2), Renewal::Expired);
    }

    #[test]
    fn a_round_that_began_before_a_pause_proves_nothing_after_it() {
        let mut rig = Rig::new();
        rig.timekeeper.promote(vec![(LeaseId(1), 5)], TERM);
        let (mut rounds, _) = rig.sent();
        rig.sleep(ELECTION / 2);
        rig.timekeeper.status.set_ticked();
        let late = rounds.pop().unwrap();
        late(Ok(()));
        assert_eq!(rig.renew(1), Renewal::NotPrimary);
        let (waiter, told) = waiter();
        rig.timekeeper.await_primary(waiter);
        rig.prove();
        assert_eq!(told.try_recv(), Ok(Ok(())));
        assert_eq!(rig.renew(1), Renewal::Renewed(5));
    }

    #[test]
    fn a_proof_is_good_for_an_election_timeout_and_renewed_in_time() {
        let mut rig = Rig::new();
        rig.timekeeper.promote(vec![(LeaseId(1), 5)], TERM);
        rig.prove();
        rig.pass(ELECTION * 3 / 4);
        assert_eq!(rig.renew(1), Renewal::Renewed(5));
        rig.prove();
        rig.pass(ELECTION / 2);
        assert_eq!(rig.renew(1), Renewal::Renewed(5), "by the second proof");
        rig.pass(ELECTION);
        assert_eq!(rig.renew(1), Renewal::NotPrimary, "none was asked for in time");
    }

    #[test]
    fn a_round_that_fails_is_asked_again() {
        let mut rig = Rig::new();
        rig.timekeeper.promote(vec![(LeaseId(1), 0)], TERM);
        let (mut rounds, _) = rig.sent();
        let waiter = rounds.pop().unwrap();
        waiter(Err(Error::Timeout));
        rig.pass(ELECTION + TICK);
        rig.timekeeper.look();
        rig.prove();
        rig.pass(ELECTION / 2);
        rig.timekeeper.look();
        let (_, revokes) = rig.sent();
        assert_eq!(revokes.len(), 1);
    }
}
