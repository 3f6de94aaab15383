//! Who waits for what. A waiter is called once, from whatever thread has the outcome, and must be quick.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{links::Links, replica::Leadership};
use crate::{
    error::Error,
    metrics::METRICS,
    state::{Members, Response},
};

/// Waits for the outcome of a proposal.
pub type ProposalWaiter = Box<dyn FnOnce(Result<Response, Error>) + Send>;
/// Waits until what was acknowledged before can be read here.
pub type ReadWaiter = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// Those who wait for entries to be applied, by the ID inside the entry, and those who wait for an index.
pub struct Waiters {
    proposals: HashMap<u64, ProposalWaiter>,
    /// In the order of their deadlines. IDs whose wait is over stay until their time comes.
    deadlines: VecDeque<(Instant, u64)>,
    reads: Line,
    catching_up: Line,
    patience: Duration,
}

/// How long somebody waits for what was already committed when he came.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(1);

/// Those who wait for an index: both indexes and deadlines ascend.
struct Line {
    waiting: VecDeque<(Instant, u64, Vec<ReadWaiter>)>,
    patience: Duration,
    /// What they are told when their time is over.
    error: Error,
}

impl Line {
    fn new(patience: Duration, error: Error) -> Self {
        Self { waiting: VecDeque::new(), patience, error }
    }

    fn join(&mut self, index: u64, waiters: Vec<ReadWaiter>, now: Instant) {
        self.waiting.push_back((now + self.patience, index, waiters));
    }

    fn open(&mut self, applied: u64) {
        while let Some((_, _, waiters)) = self.waiting.pop_front_if(|&mut (_, index, _)| index <= applied) {
            for waiter in waiters {
                waiter(Ok(()));
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some((_, _, waiters)) = self.waiting.pop_front_if(|&mut (deadline, _, _)| deadline <= now) {
            for waiter in waiters {
                waiter(Err(self.error.clone()));
            }
        }
    }

    fn stop(&mut self) {
        let waiters = self.waiting.drain(..).flat_map(|(_, _, waiters)| waiters);
        waiters.for_each(|waiter| waiter(Err(Error::Stopped)));
    }
}

/// What this member knows of the chances that a proposal had.
pub struct Hopes {
    /// This member.
    pub id: u64,
    /// Who is connected, and since when.
    pub links: Arc<Links>,
    /// How long the others wait for a leader.
    pub election_timeout: Duration,
    /// When this member was last elected.
    pub elected_at: Option<Instant>,
    /// Since when it has not known a leader, if it has known one before.
    pub leaderless_since: Option<Instant>,
}

impl Hopes {
    /// Leadership has changed, as far as this member knows.
    pub fn follow(&mut self, leadership: Leadership, now: Instant) {
        if leadership.is_self {
            self.elected_at = Some(now);
        }
        if leadership.leader == 0 {
            self.leaderless_since = Some(now);
        }
    }

    /// Why a proposal that came at `since` has come to nothing, as far as can be seen from here.
    #[must_use]
    pub fn why_in_vain(&self, since: Instant, leader: u64, members: &Members) -> Error {
        let straddles = |elected: Instant| since < elected && elected - since < 2 * self.election_timeout;
        if self.elected_at.is_some_and(straddles) {
            return Error::TimeoutLeaderFailure;
        }
        let age = since.elapsed();
        let connected = |member: u64| member == self.id || self.links.active_for(member).is_some_and(|time| time > age);
        match leader {
            // Some leader was handed it, and is lost; or nobody ever was.
            0 if self.leaderless_since.is_some_and(|lost| lost > since) => Error::Timeout,
            0 => Error::DeadlineExceeded,
            leader if leader == self.id => {
                let voters = members.electorate().voters;
                let heard = voters.iter().filter(|&&voter| connected(voter)).count();
                if heard > voters.len() / 2 { Error::Timeout } else { Error::TimeoutConnectionLost }
            }
            leader if connected(leader) => Error::Timeout,
            _ => Error::TimeoutConnectionLost,
        }
    }
}

impl Waiters {
    /// Nobody yet; nobody waits longer than `patience`.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self {
            proposals: HashMap::new(),
            deadlines: VecDeque::new(),
            reads: Line::new(patience, Error::Timeout),
            catching_up: Line::new(CATCH_UP_PATIENCE, Error::TimeoutWaitAppliedIndex),
            patience,
        }
    }

    /// Somebody waits for the entry with this ID.
    pub fn wait(&mut self, id: u64, waiter: ProposalWaiter, now: Instant) {
        self.proposals.insert(id, waiter);
        self.deadlines.push_back((now + self.patience, id));
    }

    /// Some reads wait until `index` is applied.
    pub fn wait_for(&mut self, index: u64, reads: Vec<ReadWaiter>, now: Instant) {
        self.reads.join(index, reads, now);
    }

    /// Somebody waits until `index`, which is committed, is applied; but not for long.
    pub fn wait_briefly_for(&mut self, index: u64, waiter: ReadWaiter, now: Instant) {
        self.catching_up.join(index, vec![waiter], now);
    }

    /// The waiter for an entry, if anybody here still waits.
    pub fn take(&mut self, id: u64) -> Option<ProposalWaiter> {
        self.proposals.remove(&id)
    }

    /// Lets those go who waited for an index up to `applied`.
    pub fn open_reads(&mut self, applied: u64) {
        self.reads.open(applied);
        self.catching_up.open(applied);
    }

    /// Tells those whose time is over; for a proposal `why` says in which words, from when it came.
    pub fn expire(&mut self, now: Instant, why: impl Fn(Instant) -> Error) {
        while let Some((deadline, id)) = self.deadlines.pop_front_if(|&mut (deadline, _)| deadline <= now) {
            if let Some(waiter) = self.proposals.remove(&id) {
                METRICS.proposals_failed.inc();
                let since = deadline.checked_sub(self.patience).expect("this is how the deadline was made");
                waiter(Err(why(since)));
            }
        }
        self.reads.expire(now);
        self.catching_up.expire(now);
    }

    /// How many proposals are waited for.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.proposals.len()
    }

    /// Tells everybody that the node stops.
    pub fn stop(&mut self) {
        self.proposals.drain().for_each(|(_, waiter)| waiter(Err(Error::Stopped)));
        self.reads.stop();
        self.catching_up.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_loses_its_leader_says_something_else_than_who_never_had_one() {
        let mut hopes = Hopes {
            id: 1,
            links: Arc::default(),
            election_timeout: Duration::from_secs(1),
            elected_at: None,
            leaderless_since: None,
        };
        let (start, members) = (Instant::now(), Members::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(hopes.why_in_vain(start, 0, &members), Error::DeadlineExceeded, "there was nobody to hand it to");
        hopes.follow(Leadership { leader: 1, is_self: true, term: 2 }, at(1));
        hopes.follow(Leadership::default(), at(20));
        assert_eq!(hopes.why_in_vain(at(15), 0, &members), Error::Timeout, "it was handed over, and its leader lost");
        assert_eq!(hopes.why_in_vain(at(21), 0, &members), Error::DeadlineExceeded, "it came when all was lost");
        hopes.follow(Leadership { leader: 1, is_self: true, term: 3 }, at(22));
        assert_eq!(hopes.why_in_vain(at(21), 1, &members), Error::TimeoutLeaderFailure);
    }
}
