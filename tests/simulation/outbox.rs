//! Where a member puts its outgoing messages, until the simulation sends them.

use std::{
    collections::BTreeSet,
    mem,
    sync::atomic::{AtomicBool, Ordering},
};

use metastore::node::messages::{MessageSender, Peer};
use parking_lot::Mutex;
use raft::eraftpb::Message;

/// The outgoing messages of a member, and what it knows of other members.
#[derive(Debug, Default)]
pub struct Outbox {
    sent: Mutex<Vec<Message>>,
    peers: Mutex<BTreeSet<u64>>,
    /// Members that have connected without being in the member list here yet.
    unknown_callers: Mutex<BTreeSet<u64>>,
    removed: Mutex<BTreeSet<u64>>,
    /// This member has been removed from the cluster and knows it.
    knows_of_removal: AtomicBool,
}

impl Outbox {
    pub fn take_messages(&self) -> Vec<Message> {
        mem::take(&mut self.sent.lock())
    }

    /// Whether this member refuses connections of another one, because that one was removed.
    pub fn refuses(&self, member: u64) -> bool {
        self.removed.lock().contains(&member)
    }

    /// Another member connects, and thereby becomes reachable.
    pub fn note_caller(&self, member: u64) {
        self.unknown_callers.lock().insert(member);
    }

    pub fn notice_removal(&self) {
        self.knows_of_removal.store(true, Ordering::Relaxed);
    }

    pub fn knows_of_removal(&self) -> bool {
        self.knows_of_removal.load(Ordering::Relaxed)
    }
}

impl MessageSender for Outbox {
    fn send(&self, messages: Vec<Message>) {
        let (peers, unknown_callers, removed) = (self.peers.lock(), self.unknown_callers.lock(), self.removed.lock());
        let known = |to: &u64| peers.contains(to) || unknown_callers.contains(to) && !removed.contains(to);
        self.sent.lock().extend(messages.into_iter().filter(|message| known(&message.to)));
    }

    fn set_peers(&self, peers: Vec<Peer>, removed: Vec<u64>) {
        *self.peers.lock() = peers.into_iter().map(|peer| peer.id).collect();
        *self.removed.lock() = removed.into_iter().collect();
    }
}
