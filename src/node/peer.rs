//! The members as peers, and the interface through which messages are sent to them.

use raft::eraftpb::Message;

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
