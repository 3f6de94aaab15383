//! Where a member leaves its messages: they lie there until the world carries them.

use std::{
    collections::BTreeSet,
    mem,
    sync::atomic::{AtomicBool, Ordering},
};

use metastore::node::peers::{Peer, Post};
use parking_lot::Mutex;
use raft::eraftpb::Message;

/// A member's mailroom.
#[derive(Debug, Default)]
pub struct Mailroom {
    sent: Mutex<Vec<Message>>,
    peers: Mutex<BTreeSet<u64>>,
    /// Those who have called without being known here yet.
    guests: Mutex<BTreeSet<u64>>,
    removed: Mutex<BTreeSet<u64>>,
    /// The cluster has removed this member, and it knows.
    farewell: AtomicBool,
}

impl Mailroom {
    pub fn take(&self) -> Vec<Message> {
        mem::take(&mut self.sent.lock())
    }

    /// Whether this member would let another one in.
    pub fn refuses(&self, member: u64) -> bool {
        self.removed.lock().contains(&member)
    }

    /// Somebody calls, and says where he can be reached.
    pub fn note_caller(&self, member: u64) {
        self.guests.lock().insert(member);
    }

    pub fn say_farewell(&self) {
        self.farewell.store(true, Ordering::Relaxed);
    }

    pub fn said_farewell(&self) -> bool {
        self.farewell.load(Ordering::Relaxed)
    }
}

impl Post for Mailroom {
    fn send(&self, messages: Vec<Message>) {
        let (peers, guests, removed) = (self.peers.lock(), self.guests.lock(), self.removed.lock());
        let known = |to: &u64| peers.contains(to) || guests.contains(to) && !removed.contains(to);
        self.sent.lock().extend(messages.into_iter().filter(|message| known(&message.to)));
    }

    fn set_peers(&self, peers: Vec<Peer>, removed: Vec<u64>) {
        *self.peers.lock() = peers.into_iter().map(|peer| peer.id).collect();
        *self.removed.lock() = removed.into_iter().collect();
    }
}
