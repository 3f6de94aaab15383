//! What a message must be like to be shown to raft at all.
//!
//! raft-rs trusts who it talks to: it ends the process over numbers that contradict each other. So a stream that carries
//! such a message is refused here, with a line that says what was wrong, before raft has seen any of it. What can only be
//! judged with the log at hand is judged [in the replica](super::super::replica).
//!
//! A member speaks for itself, with two exceptions: a follower passes proposals and reads on to the leader that it knows,
//! under the name of whoever wanted them. When leadership moves they may pass through more than one pair of hands, and even
//! come back to where they began.

use std::collections::BTreeSet;

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType, Message, MessageType};

use super::super::changes;

/// No term and no index comes near this, so sums of a few of them do not overflow.
const LARGEST_NUMBER: u64 = 1 << 62;

/// Whether `via`, who has a stream to `to`, may say this on it; if not, what is wrong.
pub fn check(message: &Message, via: u64, to: u64) -> Result<(), String> {
    let passed_on = matches!(message.msg_type, MessageType::MsgPropose | MessageType::MsgReadIndex);
    if message.to != to || message.from == 0 || (message.from != via && !passed_on) {
        let (kind, from, addressee) = (message.msg_type, message.from, message.to);
        return Err(format!("a {kind:?} from {from:x} to {addressee:x} on the stream from {via:x} to {to:x}"));
    }
    check_numbers(message)?;
    check_kind(message).map_err(|what| format!("a {:?} {what}", message.msg_type))
}

/// The same for a message that comes with the files of a snapshot, on a connection of its own.
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
        return Err(format!("no term and no index is as large as {largest}"));
    }
    let members = metadata.get_conf_state();
    let all: BTreeSet<u64> = members.voters.iter().chain(&members.learners).copied().collect();
    let trouble = if message.term == 0 {
        "must have a term"
    } else if metadata.index == 0 || metadata.term == 0 || metadata.term > message.term {
        "must say which entry it is of, and of no later term than its own"
    } else if !message.entries.is_empty() || !snapshot.data.is_empty() || message.request_snapshot != 0 {
        "says more than it should"
    } else if members.voters.is_empty() || all.contains(&0) || all.len() < members.voters.len() + members.learners.len()
    {
        "names members that cannot be"
    } else if !members.voters_outgoing.is_empty() || !members.learners_next.is_empty() || members.auto_leave {
        "is of the middle of a change of the members, which is not known here"
    } else {
        return Ok(());
    };
    Err(format!("a MsgSnapshot {trouble}"))
}

fn check_numbers(message: &Message) -> Result<(), String> {
    let Message { term, log_term, index, commit, commit_term, reject_hint, .. } = *message;
    match [term, log_term, index, commit, commit_term, reject_hint].into_iter().max() {
        Some(largest) if largest > LARGEST_NUMBER => Err(format!("no term and no index is as large as {largest}")),
        _ => Ok(()),
    }
}

fn check_kind(message: &Message) -> Result<(), &'static str> {
    match message.msg_type {
        // raft-rs adds a term to what has none, and stops over what has one already.
        MessageType::MsgPropose | MessageType::MsgReadIndex if message.term != 0 => Err("has a term, but nobody's"),
        MessageType::MsgPropose if message.entries.is_empty() => Err("proposes nothing"),
        MessageType::MsgPropose => message.entries.iter().try_for_each(check_entry),
        MessageType::MsgReadIndex if message.entries.len() != 1 => Err("must have one entry, the context"),
        MessageType::MsgReadIndex => Ok(()),
        // To raft-rs this is a message of its own making, whose term it does not look at.
        _ if message.term == 0 => Err("must have a term"),
        MessageType::MsgAppend => check_append(message),
        MessageType::MsgAppendResponse if message.request_snapshot != 0 => Err("asks for a snapshot"),
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
        MessageType::MsgSnapshot => Err("comes with its files, on a connection of its own"),
        // A leader is asked for this through its own member, never by another one.
        MessageType::MsgTransferLeader => Err("is not for other members"),
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum => Err("is between a member and itself"),
    }
}

/// Entries follow each other and what they are said to follow, in index and in term.
fn check_append(message: &Message) -> Result<(), &'static str> {
    if (message.index == 0) != (message.log_term == 0) {
        return Err("must say where its entries belong, by index and term");
    }
    let mut before = (message.index, message.log_term);
    for entry in &message.entries {
        if entry.index != before.0 + 1 || entry.term < before.1 || entry.term == 0 || entry.term > message.term {
            return Err("has entries that do not follow each other");
        }
        check_entry(entry)?;
        before = (entry.index, entry.term);
    }
    Ok(())
}

/// A change of the members says the same to raft and to the table of members, or they would part when it is applied.
fn check_entry(entry: &Entry) -> Result<(), &'static str> {
    match entry.entry_type {
        EntryType::EntryNormal => Ok(()),
        EntryType::EntryConfChange => {
            let change = ConfChange::parse_from_carllerche_bytes(&entry.data).ok();
            let says_the_same =
                change.is_some_and(|change| changes::for_raft(change.context.clone()).is_some_and(|it| it == change));
            if says_the_same { Ok(()) } else { Err("changes the members in a way that makes no sense") }
        }
        EntryType::EntryConfChangeV2 => Err("changes the members in a way that is not known here"),
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

    fn says(msg_type: MessageType) -> Message {
        let term = u64::from(!matches!(msg_type, MessageType::MsgPropose | MessageType::MsgReadIndex));
        Message { msg_type, from: 1, to: 2, term, ..Message::default() }
    }

    fn with(msg_type: MessageType, entries: Vec<Entry>) -> Message {
        Message { entries: entries.into(), ..says(msg_type) }
    }

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, ..Entry::default() }
    }

    fn change(node_id: u64) -> Entry {
        let command = Command::encode(1, Kind::MemberRemove, &MemberRemoveRequest { id: 7 }.encode_to_vec());
        let change = ConfChange { node_id, ..changes::for_raft(command).unwrap() };
        let data = change.write_to_bytes().unwrap().into();
        Entry { entry_type: EntryType::EntryConfChange, data, ..Entry::default() }
    }

    #[track_caller]
    fn refused(message: &Message, why: &str) {
        let refusal = check(message, 1, 2).expect_err("it is refused");
        assert!(refusal.contains(why), "{refusal}");
    }

    #[test]
    fn proposals_and_reads_may_come_through_several_hands() {
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
            assert_eq!(check(&says(kind), 1, 2), Ok(()));
            refused(&Message { from: 3, ..says(kind) }, "from 3 to 2 on the stream from 1 to 2");
            refused(&Message { to: 3, ..says(kind) }, "from 1 to 3 on the stream from 1 to 2");
        }
    }

    #[test]
    fn what_raft_would_stumble_over_is_refused() {
        for kind in [MessageType::MsgReadIndex, MessageType::MsgReadIndexResp] {
            refused(&says(kind), "must have one entry");
        }
        refused(&says(MessageType::MsgPropose), "proposes nothing");
        refused(&says(MessageType::MsgSnapshot), "on a connection of its own");
        refused(&says(MessageType::MsgTransferLeader), "is not for other members");
        for kind in [MessageType::MsgHup, MessageType::MsgSnapStatus, MessageType::MsgUnreachable] {
            refused(&says(kind), "between a member and itself");
        }
        refused(&Message { term: 0, ..says(MessageType::MsgHeartbeat) }, "must have a term");
        refused(&Message { term: 4, ..with(MessageType::MsgPropose, vec![Entry::default()]) }, "has a term");
        refused(&Message { request_snapshot: 9, ..says(MessageType::MsgAppendResponse) }, "asks for a snapshot");
        refused(&Message { commit: u64::MAX, ..says(MessageType::MsgHeartbeat) }, "no term and no index");
    }

    #[test]
    fn a_snapshot_says_what_it_is_of_and_nothing_else() {
        let snapshot = |index, term, voters: &[u64], learners: &[u64]| {
            let mut message = Message { term: 5, ..says(MessageType::MsgSnapshot) };
            let metadata = message.mut_snapshot().mut_metadata();
            (metadata.index, metadata.term) = (index, term);
            metadata.mut_conf_state().voters = voters.to_vec();
            metadata.mut_conf_state().learners = learners.to_vec();
            message
        };
        let good = snapshot(9, 5, &[1, 2], &[3]);
        assert_eq!(check_snapshot(&good, 1, 2), Ok(()));
        let mut between = good.clone();
        between.mut_snapshot().mut_metadata().mut_conf_state().voters_outgoing = vec![1];
        let mut loaded = good.clone();
        loaded.mut_snapshot().data = vec![1].into();
        for (message, why) in [
            (says(MessageType::MsgAppend), "a MsgAppend from 1 to 2 with a snapshot"),
            (Message { from: 3, ..good.clone() }, "from 3 to 2 with a snapshot from 1 to 2"),
            (Message { term: u64::MAX, ..good.clone() }, "no term and no index"),
            (Message { term: 0, ..good.clone() }, "must have a term"),
            (snapshot(u64::MAX, 5, &[2], &[]), "no term and no index"),
            (snapshot(9, 6, &[2], &[]), "of no later term"),
            (snapshot(0, 5, &[2], &[]), "which entry it is of"),
            (snapshot(9, 5, &[], &[2]), "members that cannot be"),
            (snapshot(9, 5, &[2], &[2]), "members that cannot be"),
            (snapshot(9, 5, &[0, 2], &[]), "members that cannot be"),
            (between, "the middle of a change"),
            (loaded, "says more than it should"),
            (Message { entries: vec![entry(1, 1)].into(), ..good.clone() }, "says more than it should"),
        ] {
            let refusal = check_snapshot(&message, 1, 2).expect_err("it is refused");
            assert!(refusal.contains(why), "{refusal}");
        }
    }

    #[test]
    fn entries_follow_each_other() {
        let append = |entries| Message { index: 4, log_term: 2, term: 3, ..with(MessageType::MsgAppend, entries) };
        assert_eq!(check(&append(vec![entry(5, 2), entry(6, 3)]), 1, 2), Ok(()));
        for entries in [vec![entry(6, 2)], vec![entry(5, 1)], vec![entry(5, 4)], vec![entry(5, 3), entry(6, 2)]] {
            refused(&append(entries), "do not follow each other");
        }
        refused(&Message { log_term: 0, ..append(Vec::new()) }, "by index and term");
    }

    #[test]
    fn a_change_of_the_members_says_one_thing_only() {
        assert_eq!(check(&with(MessageType::MsgPropose, vec![change(7)]), 1, 2), Ok(()));
        refused(&with(MessageType::MsgPropose, vec![change(8)]), "makes no sense");
        let nonsense = Entry { entry_type: EntryType::EntryConfChange, data: vec![255].into(), ..Entry::default() };
        refused(&with(MessageType::MsgPropose, vec![nonsense]), "makes no sense");
        let other = Entry { entry_type: EntryType::EntryConfChangeV2, ..Entry::default() };
        refused(&with(MessageType::MsgPropose, vec![other]), "is not known here");
    }
}
