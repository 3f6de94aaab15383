//! Validates received messages before they are passed to raft.
//!
//! raft-rs trusts its peers: it panics if the numbers in a message contradict each other. So a stream with such a message is
//! closed here, with a log line that says what is wrong, before raft sees the message. Checks that need the log are made
//! [in the replica](super::super::replica).
//!
//! A member sends messages in its own name only, with two exceptions: a follower forwards proposals and reads to the leader, with
//! the ID of the member where they originated in `from`. If leadership moves meanwhile, they may be forwarded more than once, and
//! even return to the member where they originated.

use std::collections::BTreeSet;

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType, Message, MessageType};

use super::super::conf_change;

/// A limit that no real term or index comes near, so that sums of a few of them do not overflow.
const LARGEST_NUMBER: u64 = 1 << 62;

/// Checks a message that was received on the stream from member `via` to member `to`; `Err` says what is wrong.
pub fn check(message: &Message, via: u64, to: u64) -> Result<(), String> {
    let passed_on = matches!(message.msg_type, MessageType::MsgPropose | MessageType::MsgReadIndex);
    if message.to != to || message.from == 0 || (message.from != via && !passed_on) {
        let (kind, from, addressee) = (message.msg_type, message.from, message.to);
        return Err(format!("a {kind:?} from {from:x} to {addressee:x} on the stream from {via:x} to {to:x}"));
    }
    check_numbers(message)?;
    check_kind(message).map_err(|what| format!("a {:?} {what}", message.msg_type))
}

/// Checks the message that precedes the files of a snapshot, on a separate connection.
pub(super) fn check_snapshot(message: &Message, via: u64, to: u64) -> Result<(), String> {
    let (from, addressee) = (message.from, message.to);
    if message.msg_type != MessageType::MsgSnapshot || from != via || addressee != to {
        let kind = message.msg_type;
        return Err(format!("a {kind:?} from {from:x} to {addressee:x} with a snapshot from {via:x} to {to:x}"));
    }
    check_numbers(message)?;
    let snapshot = message.get_snapshot();
    let metadata = snapshot.get_metadata();
    let largest = metadata.index.max(metadata.term);
    if largest > LARGEST_NUMBER {
        return Err(format!("term or index out of range: {largest}"));
    }
    let members = metadata.get_conf_state();
    let all: BTreeSet<u64> = members.voters.iter().chain(&members.learners).copied().collect();
    let problem = if message.term == 0 {
        "must have a term"
    } else if metadata.index == 0 || metadata.term == 0 || metadata.term > message.term {
        "must have the index and term of its last entry, and no later term there than its own"
    } else if !message.entries.is_empty() || !snapshot.data.is_empty() || message.request_snapshot != 0 {
        "has unexpected fields"
    } else if members.voters.is_empty() || all.contains(&0) || all.len() < members.voters.len() + members.learners.len()
    {
        "has an invalid member list"
    } else if !members.voters_outgoing.is_empty() || !members.learners_next.is_empty() || members.auto_leave {
        "has a joint configuration, which is not supported"
    } else {
        return Ok(());
    };
    Err(format!("a MsgSnapshot {problem}"))
}

fn check_numbers(message: &Message) -> Result<(), String> {
    let Message { term, log_term, index, commit, commit_term, reject_hint, .. } = *message;
    match [term, log_term, index, commit, commit_term, reject_hint].into_iter().max() {
        Some(largest) if largest > LARGEST_NUMBER => Err(format!("term or index out of range: {largest}")),
        _ => Ok(()),
    }
}

fn check_kind(message: &Message) -> Result<(), &'static str> {
    match message.msg_type {
        // raft-rs adds the term to these messages, and panics if they have one already.
        MessageType::MsgPropose | MessageType::MsgReadIndex if message.term != 0 => Err("must not have a term"),
        MessageType::MsgPropose if message.entries.is_empty() => Err("proposes nothing"),
        MessageType::MsgPropose => message.entries.iter().try_for_each(check_entry),
        MessageType::MsgReadIndex if message.entries.len() != 1 => Err("must have one entry, the context"),
        MessageType::MsgReadIndex => Ok(()),
        // raft-rs takes a message without a term for a local one, and does not check its term.
        _ if message.term == 0 => Err("must have a term"),
        MessageType::MsgAppend => check_append(message),
        MessageType::MsgAppendResponse if message.request_snapshot != 0 => Err("requests a snapshot"),
        MessageType::MsgReadIndexResp if message.entries.len() != 1 => Err("must have one entry, the context"),
        MessageType::MsgAppendResponse
        | MessageType::MsgReadIndexResp
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgHeartbeat
        | MessageType::MsgHeartbeatResponse
        | MessageType::MsgTimeoutNow => Ok(()),
        MessageType::MsgSnapshot => Err("must be sent with its files, on a separate connection"),
        // A transfer is requested at the leader itself, never by another member.
        MessageType::MsgTransferLeader => Err("is not accepted from other members"),
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum => Err("is only for use within a member"),
    }
}

/// Checks that the entries are contiguous with each other and with the preceding entry, in index and term.
fn check_append(message: &Message) -> Result<(), &'static str> {
    if (message.index == 0) != (message.log_term == 0) {
        return Err("must have both the index and the term of the preceding entry, or neither");
    }
    let mut before = (message.index, message.log_term);
    for entry in &message.entries {
        if entry.index != before.0 + 1 || entry.term < before.1 || entry.term == 0 || entry.term > message.term {
            return Err("has entries that are not contiguous");
        }
        check_entry(entry)?;
        before = (entry.index, entry.term);
    }
    Ok(())
}

/// Checks that a configuration change means the same to raft and to the member table; otherwise they would diverge once it is
/// applied.
fn check_entry(entry: &Entry) -> Result<(), &'static str> {
    match entry.entry_type {
        EntryType::EntryNormal => Ok(()),
        EntryType::EntryConfChange => {
            let change = ConfChange::parse_from_carllerche_bytes(&entry.data).ok();
            let is_consistent = change.is_some_and(|change| {
                conf_change::to_conf_change(change.context.clone()).is_some_and(|it| it == change)
            });
            if is_consistent { Ok(()) } else { Err("has an invalid configuration change") }
        }
        EntryType::EntryConfChangeV2 => Err("has a ConfChangeV2, which is not supported"),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{
        proto::etcdserverpb::MemberRemoveRequest,
        state::{Command, Kind},
    };

    fn message_of(msg_type: MessageType) -> Message {
        let term = u64::from(!matches!(msg_type, MessageType::MsgPropose | MessageType::MsgReadIndex));
        Message { msg_type, from: 1, to: 2, term, ..Message::default() }
    }

    fn with(msg_type: MessageType, entries: Vec<Entry>) -> Message {
        Message { entries: entries.into(), ..message_of(msg_type) }
    }

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, ..Entry::default() }
    }

    fn change(node_id: u64) -> Entry {
        let command = Command::encode(1, Kind::MemberRemove, &MemberRemoveRequest { id: 7 }.encode_to_vec());
        let change = ConfChange { node_id, ..conf_change::to_conf_change(command).unwrap() };
        let data = change.write_to_bytes().unwrap().into();
        Entry { entry_type: EntryType::EntryConfChange, data, ..Entry::default() }
    }

    #[track_caller]
    fn refused(message: &Message, why: &str) {
        let error = check(message, 1, 2).expect_err("the message is refused");
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn proposals_and_reads_may_be_forwarded_more_than_once() {
        for kind in [MessageType::MsgPropose, MessageType::MsgReadIndex] {
            for from in [1, 2, 3] {
                assert_eq!(check(&Message { from, ..with(kind, vec![Entry::default()]) }, 1, 2), Ok(()));
            }
            refused(
                &Message { from: 0, ..with(kind, vec![Entry::default()]) },
                "from 0 to 2 on the stream from 1 to 2",
            );
        }
        for kind in [MessageType::MsgAppend, MessageType::MsgRequestVoteResponse, MessageType::MsgHeartbeat] {
            assert_eq!(check(&message_of(kind), 1, 2), Ok(()));
            refused(&Message { from: 3, ..message_of(kind) }, "from 3 to 2 on the stream from 1 to 2");
            refused(&Message { to: 3, ..message_of(kind) }, "from 1 to 3 on the stream from 1 to 2");
        }
    }

    #[test]
    fn messages_that_would_make_raft_panic_are_refused() {
        for kind in [MessageType::MsgReadIndex, MessageType::MsgReadIndexResp] {
            refused(&message_of(kind), "must have one entry");
        }
        refused(&message_of(MessageType::MsgPropose), "proposes nothing");
        refused(&message_of(MessageType::MsgSnapshot), "on a separate connection");
        refused(&message_of(MessageType::MsgTransferLeader), "is not accepted from other members");
        for kind in [MessageType::MsgHup, MessageType::MsgSnapStatus, MessageType::MsgUnreachable] {
            refused(&message_of(kind), "only for use within a member");
        }
        refused(&Message { term: 0, ..message_of(MessageType::MsgHeartbeat) }, "must have a term");
        refused(&Message { term: 4, ..with(MessageType::MsgPropose, vec![Entry::default()]) }, "must not have a term");
        refused(&Message { request_snapshot: 9, ..message_of(MessageType::MsgAppendResponse) }, "requests a snapshot");
        refused(&Message { commit: u64::MAX, ..message_of(MessageType::MsgHeartbeat) }, "out of range");
    }

    #[test]
    fn a_snapshot_has_consistent_metadata_and_no_unexpected_fields() {
        let snapshot = |index, term, voters: &[u64], learners: &[u64]| {
            let mut message = Message { term: 5, ..message_of(MessageType::MsgSnapshot) };
            let metadata = message.mut_snapshot().mut_metadata();
            (metadata.index, metadata.term) = (index, term);
            metadata.mut_conf_state().voters = voters.to_vec();
            metadata.mut_conf_state().learners = learners.to_vec();
            message
        };
        let good = snapshot(9, 5, &[1, 2], &[3]);
        assert_eq!(check_snapshot(&good, 1, 2), Ok(()));
        let mut joint = good.clone();
        joint.mut_snapshot().mut_metadata().mut_conf_state().voters_outgoing = vec![1];
        let mut with_data = good.clone();
        with_data.mut_snapshot().data = vec![1].into();
        for (message, why) in [
            (message_of(MessageType::MsgAppend), "a MsgAppend from 1 to 2 with a snapshot"),
            (Message { from: 3, ..good.clone() }, "from 3 to 2 with a snapshot from 1 to 2"),
            (Message { term: u64::MAX, ..good.clone() }, "out of range"),
            (Message { term: 0, ..good.clone() }, "must have a term"),
            (snapshot(u64::MAX, 5, &[2], &[]), "out of range"),
            (snapshot(9, 6, &[2], &[]), "no later term"),
            (snapshot(0, 5, &[2], &[]), "index and term of its last entry"),
            (snapshot(9, 5, &[], &[2]), "invalid member list"),
            (snapshot(9, 5, &[2], &[2]), "invalid member list"),
            (snapshot(9, 5, &[0, 2], &[]), "invalid member list"),
            (joint, "joint configuration"),
            (with_data, "unexpected fields"),
            (Message { entries: vec![entry(1, 1)].into(), ..good.clone() }, "unexpected fields"),
        ] {
            let error = check_snapshot(&message, 1, 2).expect_err("the message is refused");
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn entries_are_contiguous() {
        let append = |entries| Message { index: 4, log_term: 2, term: 3, ..with(MessageType::MsgAppend, entries) };
        assert_eq!(check(&append(vec![entry(5, 2), entry(6, 3)]), 1, 2), Ok(()));
        for entries in [vec![entry(6, 2)], vec![entry(5, 1)], vec![entry(5, 4)], vec![entry(5, 3), entry(6, 2)]] {
            refused(&append(entries), "not contiguous");
        }
        refused(&Message { log_term: 0, ..append(Vec::new()) }, "index and the term of the preceding entry");
    }

    #[test]
    fn a_configuration_change_is_consistent() {
        assert_eq!(check(&with(MessageType::MsgPropose, vec![change(7)]), 1, 2), Ok(()));
        refused(&with(MessageType::MsgPropose, vec![change(8)]), "invalid configuration change");
        let malformed = Entry { entry_type: EntryType::EntryConfChange, data: vec![255].into(), ..Entry::default() };
        refused(&with(MessageType::MsgPropose, vec![malformed]), "invalid configuration change");
        let other = Entry { entry_type: EntryType::EntryConfChangeV2, ..Entry::default() };
        refused(&with(MessageType::MsgPropose, vec![other]), "is not supported");
    }
}
