//! What comes out of a [`Replica`](super::Replica).

use raft::eraftpb::{ConfState, Entry, HardState, Message};

use super::outgoing;
use crate::raft_log::{Group, Position};

/// The leader, as far as this member knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// The leader's ID; zero if none is known.
    pub leader: u64,
    /// Whether it is this member.
    pub is_self: bool,
    /// The term in which it was observed.
    pub term: u64,
}

/// A write to the log, and the messages that wait for it.
#[derive(Debug, Default)]
pub struct Write {
    /// Written as one; may be empty.
    pub group: Group,
    /// Messages that promise something to another member, such as votes and acknowledgements. They are sent once this and every
    /// earlier write is durable.
    pub persisted_messages: Vec<Message>,
    /// For [`super::Replica::persisted`].
    pub number: u64,
}

impl Write {
    /// Merges a later write into this one.
    pub fn absorb(&mut self, later: Self) {
        self.group.absorb(later.group);
        self.persisted_messages.extend(later.persisted_messages);
        outgoing::drop_superseded_acks(&mut self.persisted_messages);
        self.number = later.number;
    }
}

/// A snapshot that raft has accepted: it replaces the database and the log.
#[derive(Debug, Clone)]
pub struct Install {
    /// The position after which the log begins now.
    pub at: Position,
    /// The voters and learners at that position.
    pub conf_state: ConfState,
    /// To be written when the log is reset.
    pub hard_state: HardState,
}

/// What the owner of a [`Replica`](super::Replica) has to do, in the order of the fields.
pub struct Ready<R> {
    /// The new leadership, if it changed.
    pub leadership: Option<Leadership>,
    /// To be sent at once.
    pub messages: Vec<Message>,
    /// To be installed after everything that was handed over before is done.
    pub install: Option<Install>,
    /// Entries to apply.
    pub committed: Vec<Entry>,
    /// Reads that may be answered once the entry with this index is applied.
    pub reads: Vec<(u64, Vec<R>)>,
    /// To be written to the log.
    pub write: Option<Write>,
}

impl<R> Ready<R> {
    /// Only entries to apply.
    pub(super) fn of_committed(committed: Vec<Entry>) -> Self {
        Self { leadership: None, messages: Vec::new(), install: None, committed, reads: Vec::new(), write: None }
    }
}
