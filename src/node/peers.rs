//! The members, as they reach each other.

use raft::eraftpb::Message;

/// A member that can be talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its ID.
    pub id: u64,
    /// Where it listens for members, as it says.
    pub urls: Vec<String>,
}

/// Carries messages to other members.
pub trait Post: Send + Sync {
    /// Takes messages and never waits. What cannot be carried is lost, as on any network.
    fn send(&self, messages: Vec<Message>);

    /// From now on these are the members, this one among them if it knows itself, and who was removed is refused.
    fn set_peers(&self, members: Vec<Peer>, removed: Vec<u64>);
}

/// Carries nothing: for a member that will always be alone, as in many tests.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoPeers;

impl Post for NoPeers {
    fn send(&self, messages: Vec<Message>) {
        assert!(messages.is_empty(), "there is nobody to talk to");
    }

    fn set_peers(&self, members: Vec<Peer>, _removed: Vec<u64>) {
        assert!(members.len() <= 1, "there is nobody to talk to");
    }
}
