//! What a message cannot say if it is true, going by this member's own log.
//!
//! raft-rs ends the process over such a message. Here it is ignored, with a line for whoever operates the cluster: no peer
//! can stop this node. A heartbeat that commits more than this member has means more than a peer gone wrong, though: it has
//! acknowledged entries that it has lost. It then takes no part any more, and says so once in each term.

use raft::{
    StateRole,
    eraftpb::{Message, MessageType},
};

use super::Replica;

impl<R> Replica<R> {
    /// Whether raft may hear this.
    pub(super) fn is_plausible(&mut self, message: &Message) -> bool {
        let Some(trouble) = self.contradiction(message) else { return true };
        if self.contradicted_in.replace(self.term()) != Some(self.term()) {
            let (from, term) = (format!("{:x}", message.from), message.term);
            tracing::error!(from, term, "ignored a {:?}: {trouble}", message.msg_type);
        }
        false
    }

    fn contradiction(&self, message: &Message) -> Option<String> {
        let (raft, log) = (&self.raft.raft, &self.raft.raft.raft_log);
        let last = log.last_index();
        let (kind, is_present) = (message.msg_type, message.term == raft.term);
        if kind == MessageType::MsgHeartbeat && message.commit > last {
            return Some(format!(
                "the log ends at index {last}, but everything up to {} is said to have been acknowledged. If this goes \
                 on, this member has lost data: remove it from the cluster and add it again with an empty data directory",
                message.commit
            ));
        }
        let acknowledges = kind == MessageType::MsgAppendResponse && !message.reject;
        if acknowledges && is_present && self.leads() && message.index > last {
            return Some(format!("it acknowledges index {}, but the log ends at {last}", message.index));
        }
        if kind == MessageType::MsgTimeoutNow && self.election_must_wait() {
            return Some("it calls an election before the entries of this sole voter are durable".to_owned());
        }
        // raft-rs asks for votes only when its log is durable, and relies on that when it has them.
        let votes = kind == MessageType::MsgRequestVoteResponse && is_present;
        (votes && raft.state == StateRole::Candidate && log.persisted != last)
            .then(|| "it answers a question that was not asked yet".to_owned())
    }
}
