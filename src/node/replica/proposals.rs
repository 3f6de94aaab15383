//! Proposals that raft-rs has not accepted yet.
//!
//! Proposals are passed to raft-rs many at a time, in one message: one message to each follower then carries them all. Membership
//! changes are passed one by one.
//!
//! A proposal may be bound to a term: it is passed to raft-rs only while this member leads in that term. Otherwise it is dropped,
//! and never forwarded to another leader.

use std::collections::VecDeque;

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};

/// Limits of one proposal message.
const MAX_ENTRIES: usize = 4096;
const MAX_BYTES: usize = 1 << 20;

struct Waiting {
    data: Bytes,
    added_at: u64,
    bound: Option<Bound>,
}

struct Bound {
    term: u64,
    /// The ID inside the entry.
    id: u64,
}

/// The waiting proposals, in the order in which they were added.
pub(super) struct Proposals {
    timeout_ticks: u64,
    now: u64,
    waiting: VecDeque<Waiting>,
    changes: VecDeque<Waiting>,
    /// How many of the waiting proposals are bound to a term.
    bound: usize,
    dropped: Vec<u64>,
}

impl Proposals {
    /// A proposal is dropped after waiting for this many ticks: its client has got an error by then.
    pub fn new(timeout_ticks: u64) -> Self {
        Self {
            timeout_ticks,
            now: 0,
            waiting: VecDeque::new(),
            changes: VecDeque::new(),
            bound: 0,
            dropped: Vec::new(),
        }
    }

    pub fn add(&mut self, data: Bytes) {
        self.waiting.push_back(Waiting { data, added_at: self.now, bound: None });
    }

    /// Adds a proposal that is bound to this term; `id` is the one inside the entry.
    pub fn add_in_term(&mut self, term: u64, id: u64, data: Bytes) {
        self.waiting.push_back(Waiting { data, added_at: self.now, bound: Some(Bound { term, id }) });
        self.bound += 1;
    }

    /// Drops proposals that are bound to another term than `leading`, the term in which this member leads, if it does.
    pub fn drop_unless(&mut self, leading: Option<u64>) {
        if self.bound == 0 {
            return;
        }
        let dropped = &mut self.dropped;
        self.waiting.retain(|waiting| {
            let lapsed = waiting.bound.as_ref().filter(|bound| leading != Some(bound.term));
            dropped.extend(lapsed.map(|bound| bound.id));
            lapsed.is_none()
        });
        self.count_bound();
    }

    /// The IDs of proposals that were dropped because of their term.
    pub fn take_dropped(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.dropped)
    }

    fn count_bound(&mut self) {
        if self.bound > 0 {
            self.bound = self.waiting.iter().filter(|waiting| waiting.bound.is_some()).count();
        }
    }

    pub fn add_change(&mut self, data: Bytes) {
        self.changes.push_back(Waiting { data, added_at: self.now, bound: None });
    }

    /// Takes membership changes out of a message that a follower has forwarded: they have to wait for each other.
    pub fn take_changes(&mut self, message: &mut Message) {
        let is_change = |entry: &Entry| entry.entry_type != EntryType::EntryNormal;
        if message.entries.iter().any(is_change) {
            let (changes, rest): (Vec<_>, Vec<_>) = message.take_entries().into_iter().partition(is_change);
            message.entries = rest.into();
            for change in changes {
                self.add_change(change.data);
            }
        }
    }

    pub fn tick(&mut self) {
        self.now += 1;
        let (now, timeout) = (self.now, self.timeout_ticks);
        let over = |waiting: &mut Waiting| now - waiting.added_at >= timeout;
        while self.waiting.pop_front_if(over).is_some() {}
        while self.changes.pop_front_if(over).is_some() {}
        self.count_bound();
    }

    /// The next proposals as one message, if there are any; they stay until [`Proposals::taken`].
    pub fn next(&self, from: u64) -> Option<Message> {
        let mut bytes = 0;
        let batch = self.waiting.iter().take(MAX_ENTRIES).take_while(|waiting| {
            let first = bytes == 0;
            bytes += waiting.data.len();
            first || bytes <= MAX_BYTES
        });
        let entries: Vec<Entry> = batch.map(|waiting| entry(EntryType::EntryNormal, &waiting.data)).collect();
        (!entries.is_empty()).then(|| message(from, entries))
    }

    /// Call when raft-rs has accepted the first `count` proposals.
    pub fn taken(&mut self, count: usize) {
        self.waiting.drain(..count);
        self.count_bound();
    }

    /// The next membership change; it stays until [`Proposals::change_taken`].
    pub fn next_change(&self, from: u64) -> Option<Message> {
        let change = self.changes.front()?;
        Some(message(from, vec![entry(EntryType::EntryConfChange, &change.data)]))
    }

    /// Call when raft-rs has accepted it.
    pub fn change_taken(&mut self) {
        self.changes.pop_front();
    }
}

fn message(from: u64, entries: Vec<Entry>) -> Message {
    Message { msg_type: MessageType::MsgPropose, from, entries: entries.into(), ..Message::default() }
}

fn entry(entry_type: EntryType, data: &Bytes) -> Entry {
    Entry { entry_type, data: data.clone(), ..Entry::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(message: Option<Message>) -> Vec<Bytes> {
        message.map_or_else(Vec::new, |message| message.entries.iter().map(|entry| entry.data.clone()).collect())
    }

    #[test]
    fn a_proposal_that_is_bound_to_a_term_is_passed_to_raft_only_in_that_term() {
        let (ordinary, bound) = (Bytes::from_static(b"ordinary"), Bytes::from_static(b"bound"));
        for (leading, dropped) in [(Some(7), vec![]), (Some(8), vec![42]), (None, vec![42])] {
            let mut proposals = Proposals::new(10);
            proposals.add(ordinary.clone());
            proposals.add_in_term(7, 42, bound.clone());
            proposals.drop_unless(leading);
            assert_eq!(proposals.take_dropped(), dropped);
            let mut expected = vec![ordinary.clone()];
            expected.extend(dropped.is_empty().then(|| bound.clone()));
            assert_eq!(data(proposals.next(1)), expected);
            proposals.taken(expected.len());
            proposals.drop_unless(None);
            assert!(proposals.take_dropped().is_empty(), "raft has accepted it");
        }
    }

    #[test]
    fn a_proposal_that_is_bound_to_a_term_waits_no_longer_than_others() {
        let mut proposals = Proposals::new(2);
        proposals.add_in_term(7, 42, Bytes::from_static(b"bound"));
        (0..2).for_each(|_| proposals.tick());
        proposals.drop_unless(None);
        assert_eq!((data(proposals.next(1)), proposals.take_dropped()), (vec![], vec![]));
    }
}
