//! What this member wants in the log and raft has not taken yet.
//!
//! Proposals go to raft many at a time, in one message: one message to each follower then carries them all. Changes of the
//! members go one by one.

use std::collections::VecDeque;

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};

/// Bounds of one proposal message.
const MAX_ENTRIES: usize = 4096;
const MAX_BYTES: usize = 1 << 20;

struct Waiting {
    data: Bytes,
    came_at: u64,
}

/// All that waits, in the order in which it came.
pub(super) struct Proposals {
    patience_ticks: u64,
    now: u64,
    waiting: VecDeque<Waiting>,
    changes: VecDeque<Waiting>,
}

impl Proposals {
    /// Nothing yet. Nothing waits for longer than so many ticks: its proposer has given up by then.
    pub fn new(patience_ticks: u64) -> Self {
        Self { patience_ticks, now: 0, waiting: VecDeque::new(), changes: VecDeque::new() }
    }

    pub fn add(&mut self, data: Bytes) {
        self.waiting.push_back(Waiting { data, came_at: self.now });
    }

    pub fn add_change(&mut self, data: Bytes) {
        self.changes.push_back(Waiting { data, came_at: self.now });
    }

    /// Takes changes of the members out of what a follower passes on: they have to wait for each other.
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

    /// Time goes by.
    pub fn tick(&mut self) {
        self.now += 1;
        let (now, patience) = (self.now, self.patience_ticks);
        let over = |waiting: &mut Waiting| now - waiting.came_at >= patience;
        while self.waiting.pop_front_if(over).is_some() {}
        while self.changes.pop_front_if(over).is_some() {}
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

    /// Raft has taken the first so many.
    pub fn taken(&mut self, count: usize) {
        self.waiting.drain(..count);
    }

    /// The next change of the members; it stays until [`Proposals::change_taken`].
    pub fn next_change(&self, from: u64) -> Option<Message> {
        let change = self.changes.front()?;
        Some(message(from, vec![entry(EntryType::EntryConfChange, &change.data)]))
    }

    /// Raft has taken it.
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
