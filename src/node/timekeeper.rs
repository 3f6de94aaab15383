//! The timekeeper: knows when leases end, while this member leads, and has those revoked whose time is over.
//!
//! The apply thread tells it what happened to leases *before* it answers whoever asked for that: a client that was granted a
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
//! Who cannot be answered yet leaves a waiter: a renewal of a lease that is over waits until the lease is gone, and what only
//! a leader knows waits until this member is one.
//!
//! INVARIANTS
//! * The deadlines are kept from when the first entry of a term that this member leads is applied, until it leads no more. By
//!   then every lease of earlier terms is in the table.
//! * Nothing is proposed unless raft has heard its clock lately: a process that was asleep may have been replaced.
//! * The lock is held for a few leases at a time, but for a promotion (0.2 s for a million of them), and no waiter is called
//!   under it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use prost::Message;

use super::{driver::Input, identity::RequestIds, inbox::Inbox, status::Status, waiters::ReadWaiter};
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
/// A raft thread that has not counted a tick for this many has been asleep.
const TICKS_ASLEEP: u32 = 3;

/// What the timekeeper counts with.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two ticks of raft.
    pub tick: Duration,
    /// What every lease gets on top when leadership comes here: nobody could renew while there was no leader.
    pub election_timeout: Duration,
    /// How long a proposal may be under way, and how long somebody waits for a leader.
    pub patience: Duration,
}

/// The deadlines of all leases, and who waits for one.
pub struct Timekeeper {
    times: Times,
    started: Instant,
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
    /// Renewals that came too late, until their lease is gone.
    too_late: HashMap<LeaseId, Vec<ReadWaiter>>,
    /// Those who need a leader, and until when.
    leaderless: VecDeque<(Instant, ReadWaiter)>,
    under_way: usize,
    stopped: bool,
}

impl Timekeeper {
    /// A timekeeper of a member that does not lead. Its proposals go to `raft`, under IDs of `ids`.
    #[must_use]
    pub fn new(times: Times, status: Arc<Status>, raft: Arc<Inbox<Input>>, ids: Arc<RequestIds>) -> Self {
        let book = Book {
            deadlines: Deadlines::new(times.patience),
            too_late: HashMap::new(),
            leaderless: VecDeque::new(),
            term: 0,
            under_way: 0,
            stopped: false,
        };
        Self { times, started: Instant::now(), status, raft, ids, book: Mutex::new(book), room: Condvar::new() }
    }

    /// This member leads in this term, and everything from before it is applied.
    pub fn promote(&self, leases: Vec<(LeaseId, i64)>, term: u64) {
        let mut book = self.book.lock();
        book.term = term;
        tracing::info!(leases = leases.len(), "leases get their whole time again");
        book.deadlines.promote(leases, self.now(), self.times.election_timeout);
        let waiting = std::mem::take(&mut book.leaderless);
        drop(book);
        for (_, waiter) in waiting {
            waiter(Ok(()));
        }
    }

    /// This member leads no more, if it did.
    pub fn demote(&self) {
        let mut book = self.book.lock();
        book.deadlines.demote();
        let waiting = std::mem::take(&mut book.too_late);
        drop(book);
        waiting.into_values().flatten().for_each(|waiter| waiter(Ok(()))); // They ask again, and then wait for a leader.
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

    /// Renews a lease, if this member leads and knows it, and it is not over.
    pub fn renew(&self, id: LeaseId) -> Renewal {
        let now = self.now();
        let mut book = self.book.lock();
        if !self.reigns(&book) {
            return Renewal::NotPrimary;
        }
        let renewal = book.deadlines.renewed(id, now);
        drop(book);
        if matches!(renewal, Renewal::Renewed(_)) {
            METRICS.leases_renewed.inc();
        }
        renewal
    }

    /// How many whole seconds a lease has left, zero or less if it is over but still there; None if there is no such lease, or
    /// this member does not lead.
    #[must_use]
    pub fn remaining(&self, id: LeaseId) -> Option<i64> {
        let now = self.now();
        self.book.lock().deadlines.remaining(id, now)
    }

    /// When each of some leases ends, on a clock of our own; None where [`Timekeeper::remaining`] says so. Ask for few at once.
    #[must_use]
    pub fn ends(&self, ids: &[LeaseId]) -> Vec<Option<Duration>> {
        let book = self.book.lock();
        ids.iter().map(|&id| book.deadlines.end(id)).collect()
    }

    /// Whether this member leads and keeps the deadlines.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.reigns(&self.book.lock())
    }

    /// The apply thread says when deadlines begin and end, and may be late: raft knows sooner that another member leads.
    fn reigns(&self, book: &Book) -> bool {
        book.deadlines.is_primary() && self.status.reign() == book.term
    }

    /// Whether raft has heard its clock lately. If not, another member may lead by now.
    #[must_use]
    pub fn is_awake(&self) -> bool {
        self.status.since_tick() <= self.times.tick * TICKS_ASLEEP
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

    /// Calls the waiter when this member leads, or its patience is over.
    pub fn await_primary(&self, waiter: ReadWaiter) {
        let mut book = self.book.lock();
        if !book.stopped && !self.reigns(&book) {
            book.leaderless.push_back((Instant::now() + self.times.patience, waiter));
            return;
        }
        drop(book);
        waiter(Ok(()));
    }

    /// The thread: runs until stopped.
    pub fn run(self: &Arc<Self>) -> Result<(), Halt> {
        let mut book = self.book.lock();
        while !book.stopped {
            if self.reigns(&book) && self.is_awake() {
                let room = REVOKES_UNDER_WAY - book.under_way;
                let over = book.deadlines.expired(self.now(), room);
                if !over.is_empty() {
                    book.under_way += over.len();
                    drop(book);
                    for id in over {
                        self.revoke(id);
                    }
                    book = self.book.lock();
                    continue;
                }
            }
            self.lose_patience(&mut book);
            let until = self.next_look(&book);
            self.room.wait_until(&mut book, until);
        }
        Ok(())
    }

    /// Ends the thread; whoever waits is sent away.
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

    fn revoke(self: &Arc<Self>, id: LeaseId) {
        let request_id = self.ids.next();
        let data = Command::encode(request_id, Kind::LeaseRevoke, &LeaseRevokeRequest { id: id.0 }.encode_to_vec());
        let this = self.clone();
        let waiter = Box::new(move |outcome| this.heard(id, outcome));
        if let Err(Input::Propose { waiter, .. }) = self.raft.send(Input::Propose { id: request_id, data, waiter }) {
            waiter(Err(Error::Stopped));
        }
    }

    /// A proposal of ours has an outcome. Whatever it is: a lease that is still there will be offered again.
    fn heard(&self, id: LeaseId, outcome: Result<Response, Error>) {
        match outcome {
            Ok(_) => METRICS.leases_expired.inc(),
            Err(Error::LeaseNotFound | Error::Stopped) => (), // Its owner was faster; or nothing matters any more.
            Err(error) => tracing::warn!(lease = %id, %error, "failed to revoke an expired lease"),
        }
        let mut book = self.book.lock();
        book.under_way -= 1;
        if book.under_way == REVOKES_UNDER_WAY / 2 {
            drop(book);
            self.room.notify_one();
        }
    }

    /// Sends away those who have waited too long for a leader.
    fn lose_patience(&self, book: &mut parking_lot::MutexGuard<'_, Book>) {
        let now = Instant::now();
        let mut over = Vec::new();
        while let Some((_, waiter)) = book.leaderless.pop_front_if(|(until, _)| *until <= now) {
            over.push(waiter);
        }
        if !over.is_empty() {
            let error = if self.status.leader() == 0 { Error::NoLeader } else { Error::Timeout };
            parking_lot::MutexGuard::unlocked(book, || over.into_iter().for_each(|waiter| waiter(Err(error.clone()))));
        }
    }

    /// No lease can be granted for less than a round, so none can be over before.
    fn next_look(&self, book: &Book) -> Instant {
        let next_round = Instant::now() + ROUND;
        if book.under_way == REVOKES_UNDER_WAY {
            return next_round; // Or when there is room.
        }
        let due = book.deadlines.next_deadline().map(|due| self.started + due.max(self.now() + self.times.tick));
        due.map_or(next_round, |due| due.min(next_round))
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

#[allow(clippy::cast_precision_loss, reason = "a histogram does not look that closely")]
fn seconds(ttl: i64) -> f64 {
    ttl as f64
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::node::identity::MemberId;

    /// A timekeeper without a thread, and the raft thread's ear.
    fn timekeeper(tick: Duration) -> (Arc<Timekeeper>, Arc<Inbox<Input>>) {
        let raft = Arc::new(Inbox::default());
        let ids = Arc::new(RequestIds::new(MemberId::new(1).unwrap(), 1));
        let times = Times { tick, election_timeout: Duration::ZERO, patience: Duration::from_mins(1) };
        let status = Arc::new(Status::default());
        status.set_reign(TERM);
        (Arc::new(Timekeeper::new(times, status, raft.clone(), ids)), raft)
    }

    const TERM: u64 = 3;
    const LONG_TICK: Duration = Duration::from_mins(1);

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
        let (timekeeper, _) = timekeeper(LONG_TICK);
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
        assert_eq!(told_3.try_recv(), Ok(Ok(())), "it does not wait for what nobody will say");
    }

    #[test]
    fn who_needs_a_leader_waits_for_one() {
        let (timekeeper, _) = timekeeper(LONG_TICK);
        let (early, told_early) = waiter();
        timekeeper.await_primary(early);
        assert!(told_early.try_recv().is_err());
        timekeeper.promote(vec![(LeaseId(1), 10)], TERM);
        assert_eq!(told_early.try_recv(), Ok(Ok(())));
        assert_eq!(timekeeper.renew(LeaseId(1)), Renewal::Renewed(10));
        timekeeper.demote();
        let (late, told_late) = waiter();
        timekeeper.await_primary(late);
        timekeeper.stop();
        assert_eq!(told_late.try_recv(), Ok(Err(Error::Stopped)));
    }

    #[test]
    fn revocations_are_proposed_a_few_at_a_time() {
        let (timekeeper, raft) = timekeeper(LONG_TICK);
        timekeeper.promote(vec![], TERM);
        let leases = i64::try_from(REVOKES_UNDER_WAY).unwrap() * 3;
        timekeeper.note(&(1..=leases).map(|id| granted(id, 0)).collect::<Vec<_>>());
        let running = timekeeper.clone();
        let thread = std::thread::spawn(move || running.run().unwrap());
        let mut proposed = Vec::new();
        let mut seen = 0;
        while seen < REVOKES_UNDER_WAY * 3 {
            assert!(raft.receive(&mut proposed, None));
            assert!(proposed.len() <= REVOKES_UNDER_WAY);
            if proposed.len() < REVOKES_UNDER_WAY / 2 {
                continue; // Nobody answers: so more will come, up to the bound.
            }
            for proposal in proposed.drain(..) {
                let Input::Propose { waiter, .. } = proposal else { panic!("it only proposes") };
                seen += 1;
                waiter(Ok(Response::bare(1)));
            }
        }
        timekeeper.stop();
        thread.join().unwrap();
        assert_eq!(timekeeper.book.lock().under_way, 0);
    }

    /// Lets the thread run for two rounds.
    fn assert_proposes_nothing(timekeeper: &Arc<Timekeeper>, raft: &Inbox<Input>) {
        let running = timekeeper.clone();
        let thread = std::thread::spawn(move || running.run().unwrap());
        let mut proposed = Vec::new();
        raft.receive(&mut proposed, Some(Instant::now() + ROUND * 2));
        assert!(proposed.is_empty());
        timekeeper.stop();
        thread.join().unwrap();
    }

    #[test]
    fn who_was_deposed_renews_and_revokes_nothing_even_if_that_is_not_applied_yet() {
        let (timekeeper, raft) = timekeeper(LONG_TICK);
        timekeeper.promote(vec![(LeaseId(1), 10), (LeaseId(2), 0)], TERM);
        for reign in [0, TERM + 2] {
            timekeeper.status.set_reign(reign);
            assert_eq!(timekeeper.renew(LeaseId(1)), Renewal::NotPrimary);
            assert!(!timekeeper.is_primary());
        }
        assert_proposes_nothing(&timekeeper, &raft);
    }

    #[test]
    fn a_leader_that_has_been_asleep_proposes_nothing() {
        let (timekeeper, raft) = timekeeper(Duration::ZERO);
        timekeeper.promote(vec![(LeaseId(1), 0)], TERM);
        assert!(!timekeeper.is_awake());
        assert_proposes_nothing(&timekeeper, &raft);
    }
}
