//! Requests that wait for a proposal or an index. A waiter is called once, on whichever thread has the outcome, and must be
//! quick.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{replica::Leadership, status::Connectivity};
use crate::{
    error::Error,
    metrics::METRICS,
    state::{Members, Response},
};

/// Called with the outcome of a proposal.
pub type ProposalWaiter = Box<dyn FnOnce(Result<Response, Error>) + Send>;
/// Called when a read can be served on this member, or with the error why not.
pub type ReadWaiter = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// The requests that wait for an entry to be applied, by the ID inside the entry, and those that wait for an index.
pub struct Waiters {
    proposals: HashMap<u64, Pending>,
    /// In the order of their deadlines. The IDs of answered proposals stay until their deadline.
    deadlines: VecDeque<(Instant, u64)>,
    reads: IndexQueue,
    catching_up: IndexQueue,
    timeout: Duration,
}

/// A request that waits for its entry.
pub struct Pending {
    pub waiter: ProposalWaiter,
    /// When it was sent to the raft thread.
    pub since: Instant,
    /// When the raft thread took it.
    pub proposed_at: Instant,
}

/// How long a request waits until the commit index of its arrival is applied.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// Requests that wait until an index is applied. Both indexes and deadlines ascend.
struct IndexQueue {
    waiting: VecDeque<(Instant, u64, Vec<ReadWaiter>)>,
    timeout: Duration,
    /// The error of requests that time out.
    error: Error,
}

impl IndexQueue {
    fn new(timeout: Duration, error: Error) -> Self {
        Self { waiting: VecDeque::new(), timeout, error }
    }

    fn push(&mut self, index: u64, waiters: Vec<ReadWaiter>, now: Instant) {
        self.waiting.push_back((now + self.timeout, index, waiters));
    }

    fn release(&mut self, applied: u64) {
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

/// Finds out which of etcd's timeout errors a proposal gets, from what this member knows of leaders and connections.
pub struct TimeoutCause {
    /// This member.
    pub id: u64,
    /// Which members are connected, and since when.
    pub connectivity: Arc<Connectivity>,
    pub election_timeout: Duration,
    /// When this member was last elected.
    pub elected_at: Option<Instant>,
    /// When this member last lost a leader that it knew.
    pub leaderless_since: Option<Instant>,
}

impl TimeoutCause {
    pub fn new(id: u64, connectivity: Arc<Connectivity>, election_timeout: Duration) -> Self {
        Self { id, connectivity, election_timeout, elected_at: None, leaderless_since: None }
    }

    /// Call when leadership has changed, as far as this member knows.
    pub fn leadership_changed(&mut self, leadership: Leadership, now: Instant) {
        if leadership.is_self {
            self.elected_at = Some(now);
        }
        if leadership.leader == 0 {
            self.leaderless_since = Some(now);
        }
    }

    /// The error for a proposal that was made at `since` and has timed out.
    #[must_use]
    pub fn error_for(&self, since: Instant, leader: u64, members: &Members) -> Error {
        let straddles = |elected: Instant| since < elected && elected - since < 2 * self.election_timeout;
        if self.elected_at.is_some_and(straddles) {
            return Error::TimeoutLeaderFailure;
        }
        let age = since.elapsed();
        let connected =
            |member: u64| member == self.id || self.connectivity.active_for(member).is_some_and(|time| time > age);
        match leader {
            // Either it was handed to a leader that was lost later, or there was no leader all the time.
            0 if self.leaderless_since.is_some_and(|lost| lost > since) => Error::Timeout,
            0 => Error::DeadlineExceeded,
            leader if leader == self.id => {
                let voters = members.voters_and_learners().voters;
                let reachable = voters.iter().filter(|&&voter| connected(voter)).count();
                if reachable > voters.len() / 2 { Error::Timeout } else { Error::TimeoutConnectionLost }
            }
            leader if connected(leader) => Error::Timeout,
            _ => Error::TimeoutConnectionLost,
        }
    }
}

impl Waiters {
    /// `timeout` applies to proposals and linearizable reads.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self {
            proposals: HashMap::new(),
            deadlines: VecDeque::new(),
            reads: IndexQueue::new(timeout, Error::Timeout),
            catching_up: IndexQueue::new(CATCH_UP_TIMEOUT, Error::TimeoutWaitAppliedIndex),
            timeout,
        }
    }

    /// Adds a request that waits for the entry with this ID.
    pub fn wait(&mut self, id: u64, pending: Pending, now: Instant) {
        self.proposals.insert(id, pending);
        self.deadlines.push_back((now + self.timeout, id));
    }

    /// Adds reads that wait until `index` is applied.
    pub fn wait_for(&mut self, index: u64, reads: Vec<ReadWaiter>, now: Instant) {
        self.reads.push(index, reads, now);
    }

    /// Adds a request that waits until `index`, which is committed, is applied. It has a short timeout of its own.
    pub fn wait_to_catch_up(&mut self, index: u64, waiter: ReadWaiter, now: Instant) {
        self.catching_up.push(index, vec![waiter], now);
    }

    /// Removes and returns the request that waits for an entry, if there still is one.
    pub fn take(&mut self, id: u64) -> Option<Pending> {
        self.proposals.remove(&id)
    }

    /// Answers requests that wait for an index up to `applied`.
    pub fn release_reads(&mut self, applied: u64) {
        self.reads.release(applied);
        self.catching_up.release(applied);
    }

    /// Answers requests that have timed out. For a proposal, `why` maps the time at which it was made to the error.
    pub fn expire(&mut self, now: Instant, why: impl Fn(Instant) -> Error) {
        while let Some((deadline, id)) = self.deadlines.pop_front_if(|&mut (deadline, _)| deadline <= now) {
            if let Some(Pending { waiter, .. }) = self.proposals.remove(&id) {
                METRICS.proposals_failed.inc();
                let since = deadline.checked_sub(self.timeout).expect("a deadline is a time plus the timeout");
                waiter(Err(why(since)));
            }
        }
        self.reads.expire(now);
        self.catching_up.expire(now);
    }

    /// The number of proposals without an outcome.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.proposals.len()
    }

    /// Answers all requests with the error that the node stops.
    pub fn stop(&mut self) {
        self.proposals.drain().for_each(|(_, pending)| (pending.waiter)(Err(Error::Stopped)));
        self.reads.stop();
        self.catching_up.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_timeout_says_whether_the_leader_was_lost() {
        let mut timeout_cause = TimeoutCause {
            id: 1,
            connectivity: Arc::default(),
            election_timeout: Duration::from_secs(1),
            elected_at: None,
            leaderless_since: None,
        };
        let (start, members) = (Instant::now(), Members::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(
            timeout_cause.error_for(start, 0, &members),
            Error::DeadlineExceeded,
            "there was no leader to hand it to"
        );
        timeout_cause.leadership_changed(Leadership { leader: 1, is_self: true, term: 2 }, at(1));
        timeout_cause.leadership_changed(Leadership::default(), at(20));
        assert_eq!(timeout_cause.error_for(at(15), 0, &members), Error::Timeout, "its leader was lost");
        assert_eq!(
            timeout_cause.error_for(at(21), 0, &members),
            Error::DeadlineExceeded,
            "it was made when there was no leader"
        );
        timeout_cause.leadership_changed(Leadership { leader: 1, is_self: true, term: 3 }, at(22));
        assert_eq!(timeout_cause.error_for(at(21), 1, &members), Error::TimeoutLeaderFailure);
    }
}
