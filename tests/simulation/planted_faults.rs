//! Planted faults that the checks must detect: each is a bug that a real system has had, or that only a rule of ours prevents.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use metastore::node::messages::Input;
use raft::eraftpb::{Message, MessageType};

/// A bug, planted on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The log reports a group as synced, and syncs it only when the next one is written.
    AcknowledgedBeforeSync,
    /// The applied index is written after the batch that it belongs to.
    AppliedIndexLate,
    /// The applied index is written before the batch that it belongs to.
    AppliedIndexEarly,
    /// A ReadIndex round that is retried reuses its old context.
    ReusedContext,
    /// Entries are acknowledged to the leader before they are durable.
    EarlyAcknowledgement,
    /// A vote is granted, or requested, before it is durable.
    EarlyVote,
    /// The revocation of an expired lease is an ordinary proposal, which is forwarded to whichever member leads.
    ForwardedRevoke,
    /// A member that counts a tick takes that as proof that it still leads.
    TickAsProof,
}

impl Fault {
    /// Whether the fault lets this message leave before the disk write that it depends on.
    pub fn skips_disk_wait(self, message: &Message) -> bool {
        match self {
            Self::EarlyAcknowledgement => message.msg_type == MessageType::MsgAppendResponse,
            Self::EarlyVote => {
                matches!(message.msg_type, MessageType::MsgRequestVote | MessageType::MsgRequestVoteResponse)
            }
            Self::AcknowledgedBeforeSync
            | Self::AppliedIndexLate
            | Self::AppliedIndexEarly
            | Self::ReusedContext
            | Self::ForwardedRevoke
            | Self::TickAsProof => false,
        }
    }

    /// Whether only lease checks can detect it.
    pub fn is_about_leases(self) -> bool {
        matches!(self, Self::ForwardedRevoke | Self::TickAsProof)
    }

    /// What the raft thread receives in place of an input; `None` if the fault has handled the input itself.
    pub fn alter(self, input: Input) -> Option<Input> {
        match (self, input) {
            (Self::ForwardedRevoke, Input::ProposeInTerm { id, data, waiter, .. }) => {
                Some(Input::Propose { id, data, since: Instant::now(), waiter })
            }
            (Self::TickAsProof, Input::ConfirmLeadership(waiter)) => {
                waiter(Ok(()));
                None
            }
            (_, input) => Some(input),
        }
    }
}

/// A round that follows an earlier one by at least this long is a retry.
const RETRY: Duration = Duration::from_millis(500);

struct ReadRound {
    at: Duration,
    real: Bytes,
    sent: Bytes,
}

/// Rewrites the ReadIndex messages between members and their leader, so that retries reuse an old context.
#[derive(Default)]
pub struct ContextReuse {
    rounds: BTreeMap<u64, Vec<ReadRound>>,
}

impl ContextReuse {
    pub fn outgoing(&mut self, message: &mut Message, now: Duration) {
        if message.msg_type != MessageType::MsgReadIndex {
            return;
        }
        let rounds = self.rounds.entry(message.from).or_default();
        let Some(entry) = message.mut_entries().first_mut() else { return };
        let real = entry.data.clone();
        if let Some(old) = rounds.iter().find(|old| now.saturating_sub(old.at) >= RETRY) {
            entry.data = old.sent.clone();
        }
        rounds.push(ReadRound { at: now, real, sent: entry.data.clone() });
    }

    pub fn incoming(&mut self, message: &mut Message) {
        if message.msg_type != MessageType::MsgReadIndexResp {
            return;
        }
        let rounds = self.rounds.entry(message.to).or_default();
        let Some(entry) = message.mut_entries().first_mut() else { return };
        let sent = entry.data.clone();
        if let Some(newest) = rounds.iter().rfind(|round| round.sent == sent) {
            entry.data = newest.real.clone();
        }
        rounds.retain(|round| round.sent != sent);
    }
}
