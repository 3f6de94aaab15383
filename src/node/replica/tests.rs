use raft::eraftpb::{ConfChangeType, ConfState, Entry, Message, MessageType, Snapshot, SnapshotMetadata};

use super::*;
use crate::raft_log::{Identity, LogStore, Recovered, simulated_log::VolatileLog};

fn single_voter() -> Replica<&'static str> {
    voter_of(vec![1])
}

fn voter_of(voters: Vec<u64>) -> Replica<&'static str> {
    replica_at(Position { index: 1, term: 1 }, voters)
}

fn replica_at(truncated: Position, voters: Vec<u64>) -> Replica<&'static str> {
    let recovered = Recovered {
        identity: Identity::default(),
        hard_state: HardState { term: truncated.term, commit: truncated.index, ..HardState::default() },
        truncated,
        entries: Vec::new(),
        installing: None,
        torn_tail: None,
    };
    let log = MemoryLog::new(&recovered, truncated.index, ConfState { voters, ..ConfState::default() });
    let timing =
        Timing { tick_ms: 100, election_ticks: 10, pre_vote: true, request_timeout_ms: 7000, fixed_timeout: None };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    Replica::new(Incarnation { member: 1, number: 1 }, truncated.index, log, timing, &logger).unwrap()
}

/// Takes every `Ready`, and reports each write as durable at once. Returns the reads that were answered.
fn settle(replica: &mut Replica<&'static str>) -> Vec<(u64, Vec<&'static str>)> {
    let mut answered = Vec::new();
    while let Some(ready) = replica.next_ready() {
        answered.extend(ready.reads);
        if let Some(write) = ready.write {
            replica.persisted(write.number);
        }
    }
    answered
}

/// raft-rs reads all entries that it does not know to be applied when it calls an election.
#[test]
fn entries_that_raft_does_not_know_to_be_applied_are_not_truncated() {
    let mut replica = single_voter();
    settle(&mut replica);
    assert_eq!(replica.truncate(2), Position { index: 1, term: 1 });
    replica.applied(2);
    assert_eq!(replica.truncate(2), Position { index: 2, term: 2 });
}

#[test]
fn a_read_that_is_added_before_there_is_a_leader_is_answered_without_waiting_for_a_tick() {
    let mut replica = single_voter();
    replica.read("early");
    let answered = settle(&mut replica);
    assert_eq!(answered, [(2, vec!["early"])], "it sees the first entry of the leader's term, and is answered once");
}

/// Delivers a message of the second member, which has an empty log and grants every vote.
fn deliver(replica: &mut Replica<&'static str>, msg_type: MessageType, term: u64) {
    let reject = msg_type == MessageType::MsgAppendResponse;
    replica.step(Message { msg_type, from: 2, to: 1, term, index: 1, reject, ..Message::default() });
}

/// The first member as the leader of both in term 2; everything that it writes is durable.
fn leader_of_two() -> Replica<&'static str> {
    let mut replica = voter_of(vec![1, 2]);
    for (answer, term) in [(MessageType::MsgRequestPreVoteResponse, 2), (MessageType::MsgRequestVoteResponse, 2)] {
        while replica.raft.raft.state == StateRole::Follower {
            replica.tick();
            settle(&mut replica);
        }
        deliver(&mut replica, answer, term);
        settle(&mut replica);
    }
    assert!(replica.leads(), "{:?}", replica.raft.raft.state);
    replica
}

fn snapshots_sent(replica: &mut Replica<&'static str>) -> usize {
    let messages = std::iter::from_fn(|| replica.next_ready()).flat_map(|ready| ready.messages);
    messages.filter(|message| message.msg_type == MessageType::MsgSnapshot).count()
}

/// raft-rs waits for a report on each snapshot: without one it would never send that member anything again.
#[test]
fn a_snapshot_that_is_held_back_while_the_disk_is_stalled_is_sent_later() {
    let mut replica = leader_of_two();
    let conf_state = ConfState { voters: vec![1, 2], ..ConfState::default() };
    replica.log().offer(Some((Position { index: 1, term: 1 }, conf_state)));
    replica.propose(Bytes::from_static(b"stuck"));
    let stuck = replica.next_ready().and_then(|ready| ready.write).expect("a proposal is written");
    while !replica.disk_is_stalled() {
        replica.tick();
        deliver(&mut replica, MessageType::MsgHeartbeatResponse, 2);
    }
    deliver(&mut replica, MessageType::MsgAppendResponse, 2);
    assert_eq!(snapshots_sent(&mut replica), 0, "a leader with a stalled disk sends nothing");
    replica.persisted(stuck.number);
    deliver(&mut replica, MessageType::MsgHeartbeatResponse, 2);
    assert_eq!(snapshots_sent(&mut replica), 1);
}

/// raft-rs would panic on each of these.
#[test]
fn messages_that_contradict_the_log_are_ignored() {
    let mut replica = leader_of_two();
    let (term, last) = (replica.term(), 2);
    let from_second =
        |msg_type, term, index, commit| Message { msg_type, from: 2, to: 1, term, index, commit, ..Message::default() };
    replica.step(from_second(MessageType::MsgAppendResponse, term, last + 1, 0));
    settle(&mut replica);
    assert!(replica.progress().unwrap().contains(&(2, 0)), "no member has an entry that does not exist");
    replica.step(from_second(MessageType::MsgHeartbeat, term + 1, 0, last + 1));
    settle(&mut replica);
    assert!(replica.leads() && replica.committed() < last + 1);
    replica.step(from_second(MessageType::MsgAppendResponse, term, last, 0));
    settle(&mut replica);
    assert_eq!(replica.committed(), last, "a true acknowledgement is handled");
}

/// A removed member with a longer log but an earlier term refused the remaining member, which ignored the refusal and with it the
/// commit index.
#[test]
fn a_candidate_gets_a_refusal_of_an_earlier_term_with_the_commit_index() {
    let mut replica = voter_of(vec![1, 2]);
    settle(&mut replica);
    replica.step(Message { msg_type: MessageType::MsgRequestPreVote, from: 2, to: 1, term: 9, ..Message::default() });
    let all = std::iter::from_fn(|| replica.next_ready());
    let sent = all.flat_map(|ready| {
        ready.messages.into_iter().chain(ready.write.map_or_else(Vec::new, |write| write.persisted_messages))
    });
    let sent: Vec<_> =
        sent.map(|sent| (sent.msg_type, sent.reject, sent.term, sent.commit, sent.commit_term)).collect();
    assert_eq!(sent, [(MessageType::MsgRequestPreVoteResponse, true, 8, 1, 1)]);
}

#[test]
fn a_vote_that_arrives_before_its_request_was_sent_does_not_count() {
    let mut replica = voter_of(vec![1, 2]);
    // An entry that is not durable: raft-rs insists that a candidate has none when it is elected.
    let entry = entry(2, 1);
    replica.step(Message {
        msg_type: MessageType::MsgAppend,
        from: 2,
        to: 1,
        term: 1,
        index: 1,
        log_term: 1,
        entries: vec![entry].into(),
        ..Message::default()
    });
    let write = replica.next_ready().and_then(|ready| ready.write).expect("an entry came");
    while replica.raft.raft.state == StateRole::Follower {
        replica.tick();
        while replica.next_ready().is_some() {}
    }
    deliver(&mut replica, MessageType::MsgRequestPreVoteResponse, 2);
    while replica.next_ready().is_some() {}
    assert_eq!(replica.raft.raft.state, StateRole::Candidate);
    deliver(&mut replica, MessageType::MsgRequestVoteResponse, 2);
    assert!(!replica.leads(), "the request was not sent yet");
    replica.persisted(write.number + 100);
    settle(&mut replica);
    deliver(&mut replica, MessageType::MsgRequestVoteResponse, 2);
    assert!(replica.leads());
}

fn entry(index: u64, term: u64) -> Entry {
    Entry { index, term, ..Entry::default() }
}

/// A log with a commit index beyond its last entry cannot be opened again.
#[test]
fn the_commit_index_of_a_log_that_is_reset_to_a_snapshot_is_that_of_the_snapshot() {
    let mut replica = voter_of(vec![1, 2]);
    settle(&mut replica);
    let conf_state = ConfState { voters: vec![1, 2], ..ConfState::default() };
    let metadata = SnapshotMetadata { index: 50, term: 3, conf_state: Some(conf_state).into(), ..Default::default() };
    let snapshot = Snapshot { metadata: Some(metadata).into(), ..Snapshot::default() };
    let from_leader = |msg_type| Message { msg_type, from: 2, to: 1, term: 3, ..Message::default() };
    replica.step(Message { snapshot: Some(snapshot).into(), ..from_leader(MessageType::MsgSnapshot) });
    // The leader sends entries at once, and all of it is in one `Ready`.
    let entries = vec![entry(51, 3), entry(52, 3)].into();
    replica.step(Message { index: 50, log_term: 3, commit: 52, entries, ..from_leader(MessageType::MsgAppend) });

    let ready = replica.next_ready().expect("there is something to do");
    let install = ready.install.expect("raft accepts the snapshot");
    assert_eq!((install.at, install.hard_state.term), (Position { index: 50, term: 3 }, 3));
    let mut log = VolatileLog::create(Identity::default(), Position { index: 1, term: 1 }, &HardState::default());
    log.reset(install.at, &install.hard_state).unwrap();
    let found = log.open().expect("after a power failure at this moment the log can be opened");
    assert_eq!((found.hard_state.commit, found.last_index()), (50, 50));
    log.append(&ready.write.expect("the entries are written").group).unwrap();
    let found = log.open().unwrap();
    assert_eq!((found.hard_state.commit, found.last_index()), (52, 52));
}

/// raft-rs would panic.
#[test]
fn a_sole_voter_calls_no_election_while_entries_of_its_log_are_not_durable() {
    let mut replica = voter_of(vec![1, 2]);
    settle(&mut replica);
    let removal = ConfChange { change_type: ConfChangeType::RemoveNode, node_id: 2, ..ConfChange::default() };
    let change =
        Entry { entry_type: EntryType::EntryConfChange, data: removal.write_to_bytes().unwrap().into(), ..entry(2, 1) };
    let append = |index, entry| Message {
        msg_type: MessageType::MsgAppend,
        from: 2,
        to: 1,
        term: 1,
        index,
        log_term: 1,
        commit: 2,
        entries: vec![entry].into(),
        ..Message::default()
    };
    replica.step(append(1, change));
    settle(&mut replica);
    replica.step(append(2, entry(3, 1)));
    let write = replica.next_ready().and_then(|ready| ready.write).expect("an entry came");
    assert_eq!(replica.apply_conf_change(2, Some(&removal)).map(|conf| conf.voters), Some(vec![1]));

    let take_all = |replica: &mut Replica<_>| while replica.next_ready().is_some() {};
    for _ in 0..100 {
        replica.tick();
        take_all(&mut replica);
    }
    replica.step(Message { msg_type: MessageType::MsgTimeoutNow, from: 2, to: 1, term: 1, ..Message::default() });
    take_all(&mut replica);
    assert_eq!(replica.raft.raft.state, StateRole::Follower);

    replica.persisted(write.number);
    while !replica.leads() {
        replica.tick();
        settle(&mut replica);
    }
    assert_eq!(replica.committed(), 4, "the entry of the leader's term");
}

#[test]
fn a_term_that_is_far_too_late_is_ignored() {
    let heartbeat = |term| Message { msg_type: MessageType::MsgHeartbeat, from: 2, to: 1, term, ..Message::default() };
    for kind in [MessageType::MsgHeartbeat, MessageType::MsgRequestPreVote, MessageType::MsgAppendResponse] {
        let mut replica = leader_of_two();
        let term = replica.term();
        assert!(!replica.step(Message { msg_type: kind, ..heartbeat(term + (1 << 40) + 1) }), "{kind:?}");
        settle(&mut replica);
        assert!(replica.leads() && replica.term() == term);
    }
    let mut was_down = voter_of(vec![1, 2, 3]);
    assert!(was_down.step(heartbeat(1 << 40)), "a member that was down for decades accepts the term");
    assert_eq!(was_down.term(), 1 << 40);
    let mut joins = replica_at(Position::default(), Vec::new());
    assert!(joins.step(heartbeat((1 << 40) + 9)), "a member that joins accepts any term");
}

#[test]
fn a_sole_voter_accepts_no_snapshot() {
    let mut replica = single_voter();
    settle(&mut replica);
    let mut snapshot = Message { msg_type: MessageType::MsgSnapshot, from: 2, to: 1, term: 9, ..Message::default() };
    let metadata = snapshot.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (100, 9);
    metadata.mut_conf_state().voters = vec![1];
    assert!(replica.check_snapshot(&snapshot).unwrap_err().contains("the only voter"));
    let before = replica.term();
    assert!(!replica.step(snapshot.clone()));
    assert!(replica.leads() && replica.term() == before && replica.next_ready().is_none());

    let mut follower = voter_of(vec![1, 2, 3]);
    assert_eq!(
        follower.check_snapshot(&snapshot),
        Ok(false),
        "it may be from a new leader that has sent nothing else yet"
    );
    let heartbeat = Message { msg_type: MessageType::MsgHeartbeat, from: 2, to: 1, term: 9, ..Message::default() };
    follower.step(heartbeat.clone());
    assert_eq!(follower.check_snapshot(&snapshot), Ok(true));
    let other = Message { from: 3, ..snapshot.clone() };
    assert!(follower.check_snapshot(&other).unwrap_err().contains("2 leads this term"));
    follower.step(Message { term: 10, ..heartbeat });
    assert!(follower.check_snapshot(&snapshot).unwrap_err().contains("from a leader of term 9"));
    snapshot.term = 10;
    snapshot.mut_snapshot().mut_metadata().index = 0;
    assert_eq!(follower.check_snapshot(&snapshot).unwrap_err(), "the snapshot is not needed");
}

/// A member that was removed relies on these reports: it may stop when the others know durably that the removal is committed.
#[test]
fn a_follower_reports_only_the_commit_index_that_is_on_its_disk() {
    let mut replica = voter_of(vec![1, 2]);
    let from_second = |msg_type, index, entries: Vec<Entry>, commit| Message {
        msg_type,
        from: 2,
        to: 1,
        term: 1,
        index,
        log_term: u64::from(index > 0),
        entries: entries.into(),
        commit,
        ..Message::default()
    };
    let entry = |index| vec![entry(index, 1)];
    let heartbeat = from_second(MessageType::MsgHeartbeat, 0, Vec::new(), 2);
    let reported = |replica: &mut Replica<&'static str>| {
        let ready = replica.next_ready().expect("it answers");
        let sent = ready.messages.iter().chain(ready.write.iter().flat_map(|write| &write.persisted_messages));
        let sent = sent.map(|message| (message.msg_type, message.commit)).collect::<Vec<_>>();
        (sent, ready.write.map(|write| write.number))
    };
    replica.step(from_second(MessageType::MsgAppend, 1, entry(2), 1));
    let (sent, write) = reported(&mut replica);
    assert_eq!(sent, [(MessageType::MsgAppendResponse, 1)]);
    replica.persisted(write.expect("an entry came"));
    replica.step(heartbeat.clone());
    let (sent, write) = reported(&mut replica);
    assert_eq!((sent, write), (vec![(MessageType::MsgHeartbeatResponse, 1)], None), "commit index 2 is not on disk");
    replica.step(from_second(MessageType::MsgAppend, 2, entry(3), 2));
    let (sent, write) = reported(&mut replica);
    assert_eq!(sent, [(MessageType::MsgAppendResponse, 2)], "it is on disk when this is sent");
    replica.step(heartbeat.clone());
    assert_eq!(reported(&mut replica).0, [(MessageType::MsgHeartbeatResponse, 1)]);
    replica.persisted(write.expect("an entry came"));
    replica.step(heartbeat);
    assert_eq!(reported(&mut replica).0, [(MessageType::MsgHeartbeatResponse, 2)]);
}

#[test]
fn a_leader_reveals_and_applies_a_change_only_after_its_commit_is_on_disk() {
    let mut replica = leader_of_two();
    let ack = |index, term| Message {
        msg_type: MessageType::MsgAppendResponse,
        from: 2,
        to: 1,
        term,
        index,
        ..Message::default()
    };
    let term = replica.term();
    replica.step(ack(2, term));
    settle(&mut replica);
    let change = ConfChange { node_id: 2, change_type: ConfChangeType::RemoveNode, ..ConfChange::default() };
    replica.propose_change(&change);
    let write = replica.next_ready().and_then(|ready| ready.write).expect("the change is written");
    replica.persisted(write.number);
    settle(&mut replica);
    replica.step(ack(3, term));
    let max_commit = |ready: &Ready<_>| ready.messages.iter().map(|message| message.commit).max();
    let ready = replica.next_ready().expect("the change is committed");
    assert!(max_commit(&ready).is_none_or(|commit| commit < 3) && ready.committed.is_empty());
    let write = ready.write.expect("the commit index is written");
    assert_eq!(write.group.hard_state.map(|state| state.commit), Some(3));
    replica.tick();
    let meanwhile = replica.next_ready().expect("a heartbeat is due");
    assert_eq!((max_commit(&meanwhile), meanwhile.committed.is_empty()), (Some(2), true));
    replica.persisted(write.number);
    let ready = replica.next_ready().expect("now it may be revealed and applied");
    assert_eq!((max_commit(&ready), ready.committed.len()), (Some(3), 1));
    assert!(!replica.others_know_commit(3), "the other has not reported it");
    replica.step(Message { commit: 3, ..ack(3, term) });
    assert!(replica.others_know_commit(3));
}
