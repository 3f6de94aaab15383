//! Outgoing messages: which of them have to wait for a sync, and what they may say.
//!
//! A leader's messages are sent at once. All others wait until what they promise is durable: votes, acknowledgements, answers to
//! snapshots. Exactly three kinds promise nothing and need no sync: the response to a heartbeat, and a proposal or a read that
//! is forwarded to the leader. (A heartbeat response says only that its sender knows of no newer leader, and which commit index
//! is on its disk. A leader that sends in a new term has been elected by a quorum of durable votes already.)

use std::collections::BTreeMap;

use raft::eraftpb::{Message, MessageType};

/// Whether a follower may send this message before its write is durable.
pub(super) fn needs_no_sync(message: &Message) -> bool {
    matches!(message.msg_type, MessageType::MsgHeartbeatResponse | MessageType::MsgReadIndex | MessageType::MsgPropose)
}

/// Raises the term of pre-vote refusals so that the candidate does not ignore them, even if its term is later than this member's.
/// Raft ignores messages of an earlier term, and with the refusal it would ignore the commit index in it. Usually the refusing
/// member is elected instead. But a member that was removed, and whose log is longer, would refuse the remaining one for ever. A
/// refusal promises nothing.
pub(super) fn raise_refusal_term(messages: &mut [Message], candidate: u64, its_term: u64) {
    let refusals = messages.iter_mut().filter(|message| {
        message.msg_type == MessageType::MsgRequestPreVoteResponse && message.reject && message.to == candidate
    });
    for refusal in refusals {
        refusal.term = refusal.term.max(its_term);
    }
}

/// Limits the commit index that is reported to a leader to the one that is on disk when the message is sent.
pub(super) fn cap_reported_commit(messages: &mut [Message], saved_commit: u64) {
    for message in messages {
        if matches!(message.msg_type, MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse) {
            message.commit = message.commit.min(saved_commit);
        }
    }
}

/// Limits the commit index in a leader's messages to entries before `unsaved`. Responses to ReadIndex with a later index move to
/// `persisted_messages`.
pub(super) fn withhold_commit(messages: &mut Vec<Message>, unsaved: u64, persisted_messages: &mut Vec<Message>) {
    let is_later =
        |message: &mut Message| message.msg_type == MessageType::MsgReadIndexResp && message.index >= unsaved;
    persisted_messages.extend(messages.extract_if(.., is_later));
    for message in messages.iter_mut().filter(|message| message.commit >= unsaved) {
        if message.commit_term == 0 {
            message.commit = unsaved - 1;
        } else {
            (message.commit, message.commit_term) = (0, 0); // In a response to a candidate it is optional.
        }
    }
}

/// Drops empty appends whose commit index a later append to the same member carries as well. `replicating` says whether a member
/// is in raft's replicate state; to other members an empty append is a probe.
pub(super) fn drop_redundant_appends(messages: &mut Vec<Message>, replicating: impl Fn(u64) -> bool) {
    if messages.len() < 2 {
        return;
    }
    let mut later_commit = BTreeMap::new();
    let mut kept: Vec<Message> = Vec::with_capacity(messages.len());
    for message in messages.drain(..).rev() {
        if message.msg_type == MessageType::MsgAppend {
            let is_redundant = later_commit.get(&message.to).is_some_and(|later| *later >= message.commit);
            if is_redundant && message.entries.is_empty() && replicating(message.to) {
                continue;
            }
            let later = later_commit.entry(message.to).or_default();
            *later = message.commit.max(*later);
        }
        kept.push(message);
    }
    kept.reverse();
    *messages = kept;
}

/// Drops acknowledgements that a later one to the same leader includes. (One of index 0 tells a leader of an earlier term that
/// there is a later term.)
pub(super) fn drop_superseded_acks(persisted_messages: &mut Vec<Message>) {
    if persisted_messages.len() < 2 {
        return;
    }
    let mut acknowledged = BTreeMap::new();
    let mut kept: Vec<Message> = Vec::with_capacity(persisted_messages.len());
    for message in persisted_messages.drain(..).rev() {
        if message.msg_type == MessageType::MsgAppendResponse && !message.reject {
            let newest = acknowledged.entry((message.to, message.term)).or_insert(None);
            if Some(message.index) <= *newest {
                continue;
            }
            *newest = Some(message.index);
        }
        kept.push(message);
    }
    kept.reverse();
    *persisted_messages = kept;
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn append(to: u64, entries: usize, commit: u64) -> Message {
        let entries = vec![Entry::default(); entries];
        Message { msg_type: MessageType::MsgAppend, to, commit, entries: entries.into(), ..Message::default() }
    }

    fn ack(to: u64, index: u64, reject: bool) -> Message {
        Message { msg_type: MessageType::MsgAppendResponse, to, index, reject, ..Message::default() }
    }

    #[test]
    fn an_empty_append_is_dropped_if_a_later_one_has_its_commit_index() {
        let mut messages = vec![append(2, 0, 5), append(3, 0, 5), append(2, 3, 5), append(2, 0, 6), append(3, 1, 4)];
        drop_redundant_appends(&mut messages, |_| true);
        assert_eq!(messages, [append(3, 0, 5), append(2, 3, 5), append(2, 0, 6), append(3, 1, 4)]);
        let mut probes = vec![append(2, 0, 5), append(2, 0, 5)];
        drop_redundant_appends(&mut probes, |_| false);
        assert_eq!(probes.len(), 2, "a member that is probed gets every probe");
    }

    #[test]
    fn only_the_newest_acknowledgement_is_sent() {
        let mut persisted_messages =
            vec![ack(1, 5, false), ack(1, 3, true), ack(1, 6, false), ack(1, 7, false), ack(2, 1, false)];
        drop_superseded_acks(&mut persisted_messages);
        assert_eq!(persisted_messages, [ack(1, 3, true), ack(1, 7, false), ack(2, 1, false)]);
        let mut lone = vec![ack(3, 0, false), ack(1, 7, false)];
        drop_superseded_acks(&mut lone);
        assert_eq!(
            lone,
            [ack(3, 0, false), ack(1, 7, false)],
            "a leader of an earlier term is told that there is a later one"
        );
    }

    #[test]
    fn a_commit_index_that_is_not_on_disk_is_withheld() {
        let answer = |commit| Message {
            msg_type: MessageType::MsgRequestPreVoteResponse,
            commit,
            commit_term: u64::from(commit > 0),
            ..Message::default()
        };
        let read = |index| Message { msg_type: MessageType::MsgReadIndexResp, index, ..Message::default() };
        let mut messages = vec![append(2, 1, 9), append(3, 0, 4), answer(7), answer(4), read(6), read(4)];
        let mut persisted_messages = Vec::new();
        withhold_commit(&mut messages, 5, &mut persisted_messages);
        assert_eq!(messages, [append(2, 1, 4), append(3, 0, 4), answer(0), answer(4), read(4)]);
        assert_eq!(persisted_messages, [read(6)]);
    }

    #[test]
    fn three_kinds_of_messages_need_no_sync() {
        let free = |msg_type| needs_no_sync(&Message { msg_type, ..Message::default() });
        let all = [MessageType::MsgHeartbeatResponse, MessageType::MsgReadIndex, MessageType::MsgPropose];
        assert!(all.into_iter().all(free));
        for held in [
            MessageType::MsgAppendResponse,
            MessageType::MsgRequestVote,
            MessageType::MsgRequestVoteResponse,
            MessageType::MsgRequestPreVote,
            MessageType::MsgRequestPreVoteResponse,
        ] {
            assert!(!free(held), "{held:?}");
        }
    }
}
