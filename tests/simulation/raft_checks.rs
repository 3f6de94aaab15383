//! Invariants of what members send and write, which hold whatever happens.
//!
//! * A term has one leader, which has every entry that was committed in an earlier term.
//! * Two entries with the same index and term are equal, and so are all entries before them.
//! * A vote, an acknowledgement or the answer to a snapshot is on its sender's disk before it is sent; so is the term of a
//!   leader, and the commit index that is reported to one.
//! * A member whose disk has completed nothing for an election timeout sends nothing.

use std::collections::BTreeMap;

use raft::eraftpb::{Entry, Message, MessageType};

use super::disk::Durable;

/// Every entry that was ever durable in a log, or sent to another member.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By index and term: the term of the entry before, and a digest.
    entries: BTreeMap<(u64, u64), (u64, u32)>,
}

impl Ledger {
    fn note(&mut self, entry: &Entry, term_before: u64) {
        let now = (term_before, crc32c::crc32c(&entry.data));
        let before = *self.entries.entry((entry.index, entry.term)).or_insert(now);
        assert_eq!(before, now, "two logs differ at or before index {} of term {}", entry.index, entry.term);
    }

    /// Adds consecutive entries, given the term of the one before them.
    pub fn note_all(&mut self, entries: &[Entry], mut term_before: u64) {
        for entry in entries {
            self.note(entry, term_before);
            term_before = entry.term;
        }
    }
}

/// Messages that were sent while their sender's disk was busy, by type.
pub type EarlyMessages = BTreeMap<&'static str, usize>;

/// Checks on raft's messages.
#[derive(Debug, Default)]
pub struct RaftChecks {
    leaders: BTreeMap<u64, u64>,
    pub early: EarlyMessages,
}

impl RaftChecks {
    /// A member leads a term; returns true the first time.
    pub fn record_leader(&mut self, member: u64, term: u64) -> bool {
        match self.leaders.insert(term, member) {
            Some(other) => {
                assert_eq!(other, member, "two members lead term {term}");
                false
            }
            None => true,
        }
    }

    /// The number of terms that had a leader.
    pub fn leader_terms(&self) -> usize {
        self.leaders.len()
    }

    /// A follower sent this message while its disk was busy.
    pub fn record_early(&mut self, message: &Message) {
        let kind = match message.msg_type {
            MessageType::MsgHeartbeatResponse => "MsgHeartbeatResponse",
            MessageType::MsgReadIndex => "MsgReadIndex",
            MessageType::MsgPropose => "MsgPropose",
            other => panic!("member {} sends {other:?} before its disk write is done", message.from),
        };
        *self.early.entry(kind).or_default() += 1;
    }
}

/// Checks that what a message promises is on its sender's disk.
pub fn check_durability(message: &Message, durable: Durable) {
    let Durable { last_index, term, vote, commit } = durable;
    let kept = match message.msg_type {
        MessageType::MsgRequestVote => term > message.term || (term, vote) == (message.term, message.from),
        MessageType::MsgRequestVoteResponse if !message.reject => {
            term > message.term || (term, vote) == (message.term, message.to)
        }
        // Entries that were overwritten in a later term may still be acknowledged to the leader of the earlier term: the leader
        // of the later term was elected without needing them.
        MessageType::MsgAppendResponse if !message.reject => {
            message.commit <= commit && (term > message.term || message.index <= last_index)
        }
        MessageType::MsgHeartbeatResponse => message.commit <= commit,
        _ if is_sent_by_leader(message) => term >= message.term,
        _ => true,
    };
    assert!(kept, "{message:?} promises what is not on disk: {durable:?}");
}

/// Whether only the leader of the message's term sends such a message.
pub fn is_sent_by_leader(message: &Message) -> bool {
    matches!(
        message.msg_type,
        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot | MessageType::MsgTimeoutNow
    )
}
