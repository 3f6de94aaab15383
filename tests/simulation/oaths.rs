//! What members have said and written, and what must be true of it whatever happens.
//!
//! * A term has one leader, and it has every entry that was agreed in an earlier term.
//! * Two entries of one index and term are the same, and so is everything before them.
//! * A vote, an acknowledgement, an answer to a snapshot is on its sender's disk before it leaves; so is the term of a leader,
//!   and the commit index that is reported to one.
//! * A member whose disk has stood still for an election timeout says nothing.

use std::collections::BTreeMap;

use raft::eraftpb::{Entry, Message, MessageType};

use super::disk::Durable;

/// Every entry that was ever durable in a log, or said to another member.
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

    /// Entries that follow one another, and the term of the one before them.
    pub fn note_all(&mut self, entries: &[Entry], mut term_before: u64) {
        for entry in entries {
            self.note(entry, term_before);
            term_before = entry.term;
        }
    }
}

/// Which kinds of messages left while their sender's disk was at work.
pub type Early = BTreeMap<&'static str, usize>;

/// What was said.
#[derive(Debug, Default)]
pub struct Oaths {
    leaders: BTreeMap<u64, u64>,
    pub early: Early,
}

impl Oaths {
    /// A member leads a term; true if that is news.
    pub fn leads(&mut self, member: u64, term: u64) -> bool {
        match self.leaders.insert(term, member) {
            Some(other) => {
                assert_eq!(other, member, "two members lead term {term}");
                false
            }
            None => true,
        }
    }

    /// How many terms had a leader.
    pub fn reigns(&self) -> usize {
        self.leaders.len()
    }

    /// A follower said this while its disk was at work.
    pub fn early(&mut self, message: &Message) {
        let kind = match message.msg_type {
            MessageType::MsgHeartbeatResponse => "MsgHeartbeatResponse",
            MessageType::MsgReadIndex => "MsgReadIndex",
            MessageType::MsgPropose => "MsgPropose",
            other => panic!("{other:?} leaves member {} before its disk is done", message.from),
        };
        *self.early.entry(kind).or_default() += 1;
    }
}

/// Holds a message against its sender's disk.
pub fn check_promise(message: &Message, durable: Durable) {
    let Durable { last_index, term, vote, commit } = durable;
    let kept = match message.msg_type {
        MessageType::MsgRequestVote => term > message.term || (term, vote) == (message.term, message.from),
        MessageType::MsgRequestVoteResponse if !message.reject => {
            term > message.term || (term, vote) == (message.term, message.to)
        }
        // What was overwritten in a later term may still be acknowledged to the leader of the earlier one: whoever leads the
        // later one was elected without needing it.
        MessageType::MsgAppendResponse if !message.reject => {
            message.commit <= commit && (term > message.term || message.index <= last_index)
        }
        MessageType::MsgHeartbeatResponse => message.commit <= commit,
        _ if shows_leadership(message) => term >= message.term,
        _ => true,
    };
    assert!(kept, "{message:?} promises what is not on disk: {durable:?}");
}

/// Whether only who leads the message's term sends it.
pub fn shows_leadership(message: &Message) -> bool {
    matches!(
        message.msg_type,
        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot | MessageType::MsgTimeoutNow
    )
}
