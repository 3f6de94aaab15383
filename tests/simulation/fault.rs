//! Mistakes that the checks must find: each is one that a real system has made, or that only a rule of ours prevents.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use metastore::node::driver::Input;
use raft::eraftpb::{Message, MessageType};

/// A mistake, planted on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// "It is synced", says the log, and syncs when the next group comes.
    AcknowledgedBeforeSync,
    /// The applied index is written after the batch that it belongs to.
    AppliedIndexLate,
    /// The applied index is written before the batch that it belongs to.
    AppliedIndexEarly,
    /// A round of reads that is asked again is asked under its old context.
    ReusedContext,
    /// Entries are acknowledged to the leader before the disk is done.
    EarlyAcknowledgement,
    /// A vote is given, or asked for, before the disk is done.
    EarlyVote,
    /// A revocation of a lease whose time is over is proposed like anything else, and passed on to whichever member leads.
    ForwardedRevoke,
    /// A member that counts a tick takes that as proof that it still leads.
    TickAsProof,
}

impl Fault {
    /// Whether it lets this message leave before the disk is done.
    pub fn hastens(self, message: &Message) -> bool {
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

    /// Whether only leases show it.
    pub fn is_about_leases(self) -> bool {
        matches!(self, Self::ForwardedRevoke | Self::TickAsProof)
    }

    /// What the raft thread hears in place of an input; nothing if it is dealt with.
    pub fn corrupts(self, input: Input) -> Option<Input> {
        match (self, input) {
            (Self::ForwardedRevoke, Input::ProposeInTerm { id, data, waiter, .. }) => {
                Some(Input::Propose { id, data, waiter })
            }
            (Self::TickAsProof, Input::ConfirmLeadership(waiter)) => {
                waiter(Ok(()));
                None
            }
            (_, input) => Some(input),
        }
    }
}

/// After so long a round is one that is asked again.
const RETRY: Duration = Duration::from_millis(500);

struct Asked {
    at: Duration,
    real: Bytes,
    sent: Bytes,
}

/// Has members ask again under an old context, on the way between them and their leader.
#[derive(Default)]
pub struct Forger {
    asked: BTreeMap<u64, Vec<Asked>>,
}

impl Forger {
    pub fn outgoing(&mut self, message: &mut Message, now: Duration) {
        if message.msg_type != MessageType::MsgReadIndex {
            return;
        }
        let asked = self.asked.entry(message.from).or_default();
        let Some(entry) = message.mut_entries().first_mut() else { return };
        let real = entry.data.clone();
        if let Some(old) = asked.iter().find(|old| now.saturating_sub(old.at) >= RETRY) {
            entry.data = old.sent.clone();
        }
        asked.push(Asked { at: now, real, sent: entry.data.clone() });
    }

    pub fn incoming(&mut self, message: &mut Message) {
        if message.msg_type != MessageType::MsgReadIndexResp {
            return;
        }
        let asked = self.asked.entry(message.to).or_default();
        let Some(entry) = message.mut_entries().first_mut() else { return };
        let sent = entry.data.clone();
        if let Some(newest) = asked.iter().rfind(|asked| asked.sent == sent) {
            entry.data = newest.real.clone();
        }
        asked.retain(|asked| asked.sent != sent);
    }
}
