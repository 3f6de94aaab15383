//! Who waits for what. A waiter is called once, from whatever thread has the outcome, and must be quick.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::{error::Error, state::Response};

/// Waits for the outcome of a proposal.
pub type ProposalWaiter = Box<dyn FnOnce(Result<Response, Error>) + Send>;
/// Waits until what was acknowledged before can be read here.
pub type ReadWaiter = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// Those who wait for entries to be applied, by the ID inside the entry, and those who wait for an index.
pub struct Waiters {
    proposals: HashMap<u64, ProposalWaiter>,
    /// In the order of their deadlines. IDs whose wait is over stay until their time comes.
    deadlines: VecDeque<(Instant, u64)>,
    reads: VecDeque<(Instant, u64, Vec<ReadWaiter>)>,
    patience: Duration,
}

impl Waiters {
    /// Nobody yet; nobody waits longer than `patience`.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self { proposals: HashMap::new(), deadlines: VecDeque::new(), reads: VecDeque::new(), patience }
    }

    /// Somebody waits for the entry with this ID.
    pub fn wait(&mut self, id: u64, waiter: ProposalWaiter, now: Instant) {
        self.proposals.insert(id, waiter);
        self.deadlines.push_back((now + self.patience, id));
    }

    /// Some reads wait until `index` is applied.
    pub fn wait_for(&mut self, index: u64, reads: Vec<ReadWaiter>, now: Instant) {
        self.reads.push_back((now + self.patience, index, reads));
    }

    /// The waiter for an entry, if anybody here still waits.
    pub fn take(&mut self, id: u64) -> Option<ProposalWaiter> {
        self.proposals.remove(&id)
    }

    /// Lets the reads go that waited for an index up to `applied`.
    pub fn open_reads(&mut self, applied: u64) {
        while let Some((_, _, reads)) = self.reads.pop_front_if(|&mut (_, index, _)| index <= applied) {
            for read in reads {
                read(Ok(()));
            }
        }
    }

    /// Tells those whose time is over. `leader_known` decides in which words.
    pub fn expire(&mut self, now: Instant, leader_known: bool) {
        let error = if leader_known { Error::Timeout } else { Error::DeadlineExceeded };
        while let Some((_, id)) = self.deadlines.pop_front_if(|&mut (deadline, _)| deadline <= now) {
            if let Some(waiter) = self.proposals.remove(&id) {
                waiter(Err(error.clone()));
            }
        }
        while let Some((_, _, reads)) = self.reads.pop_front_if(|&mut (deadline, _, _)| deadline <= now) {
            for read in reads {
                read(Err(Error::Timeout));
            }
        }
    }

    /// How many proposals are waited for.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.proposals.len()
    }

    /// Tells everybody that the node stops.
    pub fn stop(&mut self) {
        self.proposals.drain().for_each(|(_, waiter)| waiter(Err(Error::Stopped)));
        for (_, _, reads) in self.reads.drain(..) {
            for read in reads {
                read(Err(Error::Stopped));
            }
        }
    }
}
