//! Linearizable reads, and the rounds of ReadIndex that they wait for.
//!
//! In a round the leader proves that it still leads, and returns its commit index. All reads that were added before a round
//! starts share it. A round without an answer is repeated with a new context, because raft-rs may silently drop a request, and
//! answers a repeated context with an old index.
//!
//! INVARIANTS
//! * A context is used only once: by no other member, and by no other run of this one.
//! * Every read ends: it is answered, or refused when the leader changes or the read times out.

use std::collections::VecDeque;

use crate::error::Error;

/// The maximum number of rounds in progress.
const MAX_ROUNDS: usize = 2;

/// In ticks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// A round without an answer is repeated after this many.
    pub retry: u64,
    /// A read times out after this many.
    pub read: u64,
}

struct Round<R> {
    context: Vec<u8>,
    asked_at: u64,
    reads: Vec<Read<R>>,
}

struct Read<R> {
    added_at: u64,
    waiter: R,
}

/// All reads of one member that wait for an answer.
pub(super) struct Rounds<R> {
    timeouts: Timeouts,
    member: u64,
    next_context: u64,
    now: u64,
    in_flight: VecDeque<Round<R>>,
    waiting: Vec<Read<R>>,
    answered: Vec<(u64, Vec<R>)>,
    refused: Vec<(R, Error)>,
    /// A round was not answered in time, since [`Rounds::take_repeated`] was called.
    was_repeated: bool,
}

impl<R> Rounds<R> {
    /// Contexts are numbered from `first_context`, which must be different for each run of this member.
    pub fn new(member: u64, first_context: u64, timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            member,
            next_context: first_context,
            now: 0,
            in_flight: VecDeque::new(),
            waiting: Vec::new(),
            answered: Vec::new(),
            refused: Vec::new(),
            was_repeated: false,
        }
    }

    /// Adds a read to the next round.
    pub fn add(&mut self, waiter: R) {
        self.waiting.push(Read { added_at: self.now, waiter });
    }

    /// Starts a round if reads are waiting and not too many rounds are in progress. Returns its context.
    pub fn start(&mut self) -> Option<Vec<u8>> {
        if self.waiting.is_empty() || self.in_flight.len() >= MAX_ROUNDS {
            return None;
        }
        let context = [self.member.to_be_bytes(), self.next_context.to_be_bytes()].concat();
        self.next_context = self.next_context.wrapping_add(1);
        let reads = std::mem::take(&mut self.waiting);
        self.in_flight.push_back(Round { context: context.clone(), asked_at: self.now, reads });
        Some(context)
    }

    /// Call when a round was answered: everything that was acknowledged before it is at or below `index`.
    pub fn answer(&mut self, index: u64, context: &[u8]) {
        let asked = self.in_flight.iter().position(|round| round.context == context);
        if let Some(round) = asked.and_then(|position| self.in_flight.remove(position)) {
            self.answered.push((index, round.reads.into_iter().map(|read| read.waiter).collect()));
        }
    }

    pub fn tick(&mut self) {
        self.now += 1;
        let retry = self.timeouts.retry.max(1);
        if self.in_flight.front().is_some_and(|oldest| self.now - oldest.asked_at >= retry) {
            self.was_repeated = true;
            self.retry_all();
        }
        let over = |read: &mut Read<R>| self.now - read.added_at >= self.timeouts.read;
        for read in self.waiting.extract_if(.., over) {
            self.refused.push((read.waiter, Error::Timeout));
        }
    }

    /// Gives up all unanswered rounds. Their reads join the next one.
    pub fn retry_all(&mut self) {
        let reads = self.in_flight.drain(..).flat_map(|round| round.reads);
        self.waiting.splice(..0, reads);
    }

    /// Call when the leader has changed: the previous one will not answer its rounds any more.
    pub fn leader_changed(&mut self) {
        let asked = self.in_flight.drain(..).flat_map(|round| round.reads);
        self.refused.extend(asked.map(|read| (read.waiter, Error::LeaderChanged)));
    }

    /// Reads that may be answered once the entry with this index is applied.
    pub fn take_answered(&mut self) -> Vec<(u64, Vec<R>)> {
        std::mem::take(&mut self.answered)
    }

    /// Whether a round was repeated since the last call, because it was not answered in time.
    pub fn take_repeated(&mut self) -> bool {
        std::mem::take(&mut self.was_repeated)
    }

    /// Reads that will not be answered, with their errors.
    pub fn take_refused(&mut self) -> Vec<(R, Error)> {
        std::mem::take(&mut self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds() -> Rounds<&'static str> {
        Rounds::new(7, 100, Timeouts { retry: 5, read: 20 })
    }

    #[test]
    fn reads_share_a_round_and_later_ones_join_the_next() {
        let mut rounds = rounds();
        assert_eq!(rounds.start(), None);
        rounds.add("a");
        rounds.add("b");
        let first = rounds.start().unwrap();
        rounds.add("c");
        let second = rounds.start().unwrap();
        rounds.add("d");
        assert_eq!(rounds.start(), None, "two are in progress");
        rounds.answer(9, &second);
        rounds.answer(8, &first);
        rounds.answer(8, &first);
        assert_eq!(rounds.take_answered(), [(9, vec!["c"]), (8, vec!["a", "b"])]);
        assert!(rounds.start().is_some_and(|third| third != first && third != second));
    }

    /// FAULT-19.
    #[test]
    fn a_round_without_an_answer_is_repeated_with_another_context() {
        let mut rounds = rounds();
        rounds.add("a");
        let first = rounds.start().unwrap();
        (0..5).for_each(|_| rounds.tick());
        assert!(rounds.take_repeated() && !rounds.take_repeated());
        let second = rounds.start().unwrap();
        assert_ne!(first, second);
        rounds.answer(3, &first);
        assert_eq!(rounds.take_answered(), [], "an answer to a round that was given up is ignored");
        rounds.answer(4, &second);
        assert_eq!(rounds.take_answered(), [(4, vec!["a"])]);
    }

    #[test]
    fn no_read_waits_for_ever() {
        let mut rounds = rounds();
        rounds.add("asked");
        rounds.start().unwrap();
        rounds.add("never asked");
        (0..25).for_each(|_| rounds.tick());
        let refused = rounds.take_refused();
        assert_eq!(refused, [("asked", Error::Timeout), ("never asked", Error::Timeout)]);
    }

    #[test]
    fn a_new_leader_ends_the_rounds_of_the_old_one() {
        let mut rounds = rounds();
        rounds.add("asked");
        rounds.start().unwrap();
        rounds.add("waiting");
        rounds.leader_changed();
        assert_eq!(rounds.take_refused(), [("asked", Error::LeaderChanged)]);
        assert!(rounds.start().is_some(), "a read without a round yet is sent to the new leader");
    }
}
