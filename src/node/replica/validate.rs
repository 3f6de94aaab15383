//! Validates messages of other members against this member's own log.
//!
//! raft-rs panics on messages that contradict the log. Here they are ignored, and a log line tells the operator: no peer can
//! crash this node. A heartbeat whose commit index is beyond this member's log means more than a faulty peer, though: this
//! member has lost entries that it had acknowledged. It then ignores the leader, and logs that once in each term.

use raft::{
    StateRole,
    eraftpb::{Message, MessageType},
};

use super::Replica;

/// Messages are ignored if their term is later than this member's by more than this.
///
/// A term begins with an election, and between two elections of one member there is an election timeout: at least 5 ms, usually
/// a second. Even seven members that fail to elect a leader every 5 ms need 24 years for this many terms, so a member that was
/// down, or was partitioned and called elections without pre-votes, is never ignored. A later term is made up, and would be
/// persisted for ever. A member that has no term yet accepts any.
const MAX_TERM_JUMP: u64 = 1 << 40;

impl<R> Replica<R> {
    /// Whether raft-rs may receive this message.
    pub(super) fn is_plausible(&mut self, message: &Message) -> bool {
        let Some(reason) = self.contradiction(message) else { return true };
        if self.contradiction_logged_in.replace(self.term()) != Some(self.term()) {
            let (from, term) = (format!("{:x}", message.from), message.term);
            tracing::error!(from, term, "ignored a {:?}: {reason}", message.msg_type);
        }
        false
    }

    /// Whether this snapshot is from the leader that this member follows; an error if raft would not accept the snapshot.
    pub fn check_snapshot(&self, message: &Message) -> Result<bool, String> {
        if let Some(reason) = self.contradiction(message) {
            return Err(reason);
        }
        let (raft, index) = (&self.raft.raft, message.get_snapshot().get_metadata().index);
        if message.term < raft.term {
            return Err(format!(
                "the snapshot is from a leader of term {}, but this is term {}",
                message.term, raft.term
            ));
        }
        let follows = message.term == raft.term && raft.leader_id != 0;
        if follows && raft.leader_id != message.from {
            return Err(format!("{:x} leads this term, not the sender of the snapshot", raft.leader_id));
        }
        if index < raft.raft_log.committed {
            return Err("the snapshot is not needed".to_owned());
        }
        Ok(follows)
    }

    fn contradiction(&self, message: &Message) -> Option<String> {
        let (raft, log) = (&self.raft.raft, &self.raft.raft.raft_log);
        let last = log.last_index();
        let (kind, is_present) = (message.msg_type, message.term == raft.term);
        if raft.term > 0 && message.term > raft.term.saturating_add(MAX_TERM_JUMP) {
            return Some(format!("no election can have led from term {} to term {}", raft.term, message.term));
        }
        // It could replace entries that only this member has; and no other member can have been elected.
        if kind == MessageType::MsgSnapshot && self.conf_state().voters == [raft.id] {
            return Some("this member is the only voter and follows no leader".to_owned());
        }
        if kind == MessageType::MsgHeartbeat && message.commit > last {
            return Some(format!(
                "the log ends at index {last}, but everything up to {} is said to have been acknowledged. If this \
                 persists, this member has lost data: remove it from the cluster and add it again with an empty data directory",
                message.commit
            ));
        }
        let acknowledges = kind == MessageType::MsgAppendResponse && !message.reject;
        if acknowledges && is_present && self.leads() && message.index > last {
            return Some(format!("it acknowledges index {}, but the log ends at {last}", message.index));
        }
        if kind == MessageType::MsgTimeoutNow && self.election_must_wait() {
            return Some("it requests an election before the entries of this sole voter are durable".to_owned());
        }
        // raft-rs requests votes only when its log is durable, and relies on that when it receives them.
        let votes = kind == MessageType::MsgRequestVoteResponse && is_present;
        (votes && raft.state == StateRole::Candidate && log.persisted != last)
            .then(|| "it answers a vote request that was not sent yet".to_owned())
    }
}
