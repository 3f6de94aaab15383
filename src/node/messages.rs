//! What the threads of a node send each other: the inputs of the raft, log, apply and background threads. They are apart from
//! their receivers, because most threads send to each other in both directions. Also the interface through which messages are
//! sent to other members.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use raft::eraftpb::{ConfChange, ConfState, Entry, Message};

use super::{
    replica::{Leadership, RaftStatus, Write},
    snapshot::{InboundSnapshot, OutboundSnapshot},
    waiters::{ProposalWaiter, ReadWaiter},
};
use crate::{error::Error, mvcc, raft_log::Position, state::Effect, storage::Engine};

/// The inputs of the raft thread.
pub enum Input {
    /// Propose an entry.
    Propose {
        /// The ID inside the entry.
        id: u64,
        /// The entry.
        data: Bytes,
        /// When it was sent.
        since: Instant,
        /// Called with the outcome.
        waiter: ProposalWaiter,
    },
    /// Propose an entry that only the leader of this term may propose: any other member drops it, and never forwards it.
    ProposeInTerm {
        /// The term in which the proposal was decided.
        term: u64,
        /// The ID inside the entry.
        id: u64,
        /// The entry.
        data: Bytes,
        /// Called with the outcome.
        waiter: ProposalWaiter,
    },
    /// Propose a membership change.
    Change {
        /// The ID inside the entry.
        id: u64,
        /// The change, with the entry inside.
        change: ConfChange,
        /// Called with the outcome.
        waiter: ProposalWaiter,
    },
    /// A linearizable read: call the waiter when everything that was acknowledged before now is applied here.
    Read(ReadWaiter),
    /// Call the waiter when a round of ReadIndex that begins after this has shown that the leader of the current term still
    /// leads, and everything up to its index is applied.
    ConfirmLeadership(ReadWaiter),
    /// Call the waiter when everything up to this member's commit index is applied here.
    CatchUp(ReadWaiter),
    /// Call the waiter with each member's match index.
    Progress(ProgressWaiter),
    /// Call this with what raft knows.
    RaftStatus(RaftStatusWaiter),
    /// Transfer leadership to this voter.
    Transfer(u64),
    /// Messages from other members.
    Messages(Vec<Message>),
    /// There is a connection to this member.
    Reachable(u64),
    /// The connection to this member is broken, and messages that were sent to it may be lost.
    Unreachable(u64),
    /// A message that was sent to this member was lost.
    Lost(u64),
    /// Shorten the wait for the first election of this member.
    ShortenElection,
    /// The log has synced the write with this number and all before it.
    Persisted(u64),
    /// The database is durable up to this position.
    Durable(Position),
    /// A membership change was applied to the database, or was refused.
    ChangeApplied(ChangeApplied),
    /// A copy of the database that can be sent to other members; None if making it failed.
    OutboundSnapshot(Option<Arc<OutboundSnapshot>>),
    /// Sending a snapshot has ended.
    SnapshotSent {
        /// The receiving member.
        to: u64,
        /// Whether it arrived, or was lost.
        arrived: bool,
    },
    /// Another member is about to send a snapshot.
    SnapshotAnnounced {
        /// The message that raft would receive.
        message: Message,
        /// Called with whether the sender is the leader that this member follows, or with the reason why raft would not take
        /// the snapshot.
        answer: Box<dyn FnOnce(Result<bool, String>) + Send>,
    },
    /// A snapshot was received completely.
    Snapshot {
        /// The message for raft.
        message: Message,
        /// The copy of the sender's database.
        incoming: Box<InboundSnapshot>,
        /// Called with whether it was installed.
        done: Box<dyn FnOnce(bool) + Send>,
    },
}

/// Called with each member's ID and match index; with None if this member is not the leader.
pub type ProgressWaiter = Box<dyn FnOnce(Option<Vec<(u64, u64)>>) + Send>;

/// Called with the state of raft.
pub type RaftStatusWaiter = Box<dyn FnOnce(RaftStatus) + Send>;

/// The result of a membership change.
pub struct ChangeApplied {
    /// The entry's index.
    pub index: u64,
    /// The change; None if it was refused, as it then was on every replica.
    pub change: Option<ConfChange>,
    /// Voters and learners after the change, according to the member table.
    pub conf_state: ConfState,
    /// Called when raft has applied the change.
    pub done: Option<Box<dyn FnOnce() + Send>>,
}

/// The inputs of the log thread.
pub enum LogTask {
    /// Make this durable, then send the messages that wait for it.
    Write(Write),
    /// Remove everything up to and including this position.
    Truncate(Position),
}

/// A request that waits for the entry that it has proposed.
pub struct Proposed {
    /// The ID inside the entry.
    pub id: u64,
    /// When it was sent to the raft thread.
    pub since: Instant,
    pub waiter: ProposalWaiter,
}

/// The inputs of the apply thread: what the raft thread hands over after it has processed its own inputs.
pub struct Handoff {
    /// When the raft thread began to process these inputs.
    pub at: Instant,
    /// The requests that it has proposed.
    pub proposed: Vec<Proposed>,
    /// The IDs inside entries that were dropped because the term to which the proposal was bound is over.
    pub dropped: Vec<u64>,
    /// Committed entries, in order.
    pub entries: Vec<Entry>,
    /// Linearizable reads, by the index that has to be applied first.
    pub reads: Vec<(u64, Vec<ReadWaiter>)>,
    /// Requests that wait until the commit index of their arrival is applied, by that index.
    pub catch_up: Vec<(u64, ReadWaiter)>,
    /// The new leadership, if it changed.
    pub leadership: Option<Leadership>,
    /// Whether a tick has passed, so that waiters may have timed out.
    pub expire: bool,
}

impl Handoff {
    /// Nothing yet, at this time.
    #[must_use]
    pub fn new(at: Instant) -> Self {
        Self {
            at,
            proposed: Vec::new(),
            dropped: Vec::new(),
            entries: Vec::new(),
            reads: Vec::new(),
            catch_up: Vec::new(),
            leadership: None,
            expire: false,
        }
    }

    /// Whether there is nothing to hand over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.proposed.is_empty()
            && self.dropped.is_empty()
            && self.entries.is_empty()
            && self.reads.is_empty()
            && self.catch_up.is_empty()
            && self.leadership.is_none()
            && !self.expire
    }
}

/// The inputs of the background thread.
pub enum BackgroundTask {
    /// An effect of an applied entry that may need background work.
    Effect(Effect),
    /// Leadership changed.
    Leadership(Leadership),
    /// The outcome of a proposed auto compaction at this revision. One that was done already counts as a success; one that
    /// failed is proposed again later.
    AutoCompacted(i64, Result<(), Error>),
    /// Another member needs a copy of the database.
    CopyWanted,
    /// A copy of the database is no longer needed. Its files are removed when the last reference to it is dropped.
    Discard(Discarded),
    /// A snapshot has replaced the state.
    Restored {
        /// The new database.
        engine: Arc<dyn Engine>,
        /// The new key space.
        keys: Arc<mvcc::Shared>,
    },
    /// Call this when all compacted revisions are physically removed.
    AwaitCompaction(Box<dyn FnOnce() + Send>),
}

/// A copy of a database that is no longer needed.
pub enum Discarded {
    /// A copy that was made for other members.
    OutboundSnapshot(Arc<OutboundSnapshot>),
    /// A copy that another member has sent.
    InboundSnapshot(Box<InboundSnapshot>),
}

/// A member that messages can be sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub id: u64,
    /// The peer URLs that it advertises.
    pub urls: Vec<String>,
}

/// Sends messages to other members.
pub trait MessageSender: Send + Sync {
    /// Must not block. Messages that cannot be sent are lost, as on any network.
    fn send(&self, messages: Vec<Message>);

    /// Sets the members, which include this one if the member list does, and those that were removed and are to be refused.
    fn set_peers(&self, members: Vec<Peer>, removed: Vec<u64>);
}

/// Sends nothing: for a member that will always be the only one, as in many tests.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoPeers;

impl MessageSender for NoPeers {
    fn send(&self, messages: Vec<Message>) {
        assert!(messages.is_empty(), "there are no other members");
    }

    fn set_peers(&self, members: Vec<Peer>, _removed: Vec<u64>) {
        assert!(members.len() <= 1, "there are no other members");
    }
}
