//! What comes out of a [`Replica`](super::Replica).

use raft::eraftpb::{ConfState, Entry, HardState, Message};

use super::{
    super::log::{Group, Position},
    outgoing,
};

/// Who leads, as far as this member knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// The leader's ID; zero if nobody is known to lead.
    pub leader: u64,
    /// Whether it is this member.
    pub is_self: bool,
    /// The term when that was so.
    pub term: u64,
}

/// What must be durable before what it promises may be said.
#[derive(Debug, Default)]
pub struct Write {
    /// To be written as one; may be empty.
    pub group: Group,
    /// To be sent once this and every earlier write is durable.
    pub promises: Vec<Message>,
    /// For [`super::Replica::persisted`].
    pub number: u64,
}

impl Write {
    /// Takes in a later write, so that both become one.
    pub fn absorb(&mut self, later: Self) {
        self.group.absorb(later.group);
        self.promises.extend(later.promises);
        outgoing::drop_superseded_acks(&mut self.promises);
        self.number = later.number;
    }
}

/// A snapshot that raft has accepted: it takes the place of the database and of the log.
#[derive(Debug, Clone)]
pub struct Install {
    /// Where the log begins now.
    pub at: Position,
    /// Who votes there.
    pub conf_state: ConfState,
    /// To be written when the log starts over.
    pub hard_state: HardState,
}

/// What is to be done, in the order of the fields.
pub struct Ready<R> {
    /// A change of leadership.
    pub leadership: Option<Leadership>,
    /// To be sent at once.
    pub messages: Vec<Message>,
    /// To be put in place, after everything handed over before is done.
    pub install: Option<Install>,
    /// Entries to apply.
    pub committed: Vec<Entry>,
    /// Reads that may be answered once the entry with this index is applied.
    pub reads: Vec<(u64, Vec<R>)>,
    /// To be written.
    pub write: Option<Write>,
}

impl<R> Ready<R> {
    /// Nothing is to be done but to apply these.
    pub(super) fn of_committed(committed: Vec<Entry>) -> Self {
        Self { leadership: None, messages: Vec::new(), install: None, committed, reads: Vec::new(), write: None }
    }
}
