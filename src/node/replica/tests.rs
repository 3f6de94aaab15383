use raft::eraftpb::ConfState;

use super::{
    super::log::{Identity, Recovered},
    *,
};

fn founder() -> Replica<&'static str> {
    let recovered = Recovered {
        identity: Identity::default(),
        hard_state: HardState { term: 1, commit: 1, ..HardState::default() },
        truncated: Position { index: 1, term: 1 },
        entries: Vec::new(),
        installing: None,
        torn_tail: None,
    };
    let log = MemoryLog::new(&recovered, 1, ConfState { voters: vec![1], ..ConfState::default() });
    let timing = Timing { tick_ms: 100, election_ticks: 10, pre_vote: true, patience_ms: 7000, fixed_timeout: None };
    Replica::new(Life { member: 1, number: 1 }, 1, log, timing, &slog::Logger::root(slog::Discard, slog::o!())).unwrap()
}

/// All turns there are, each write called durable at once.
fn settle(replica: &mut Replica<&'static str>) -> Vec<(u64, Vec<&'static str>)> {
    let mut answered = Vec::new();
    while let Some(turn) = replica.turn() {
        answered.extend(turn.reads);
        if let Some(write) = turn.write {
            replica.persisted(write.number);
        }
    }
    answered
}

/// An election looks at everything that raft does not know to be applied, and finds it is gone.
#[test]
fn the_log_is_not_cut_where_raft_has_not_come_yet() {
    let mut replica = founder();
    settle(&mut replica);
    assert_eq!(replica.cut(2), Position { index: 1, term: 1 });
    replica.applied(2);
    assert_eq!(replica.cut(2), Position { index: 2, term: 2 });
}

#[test]
fn a_read_that_comes_before_the_leader_is_answered_without_waiting_for_a_tick() {
    let mut replica = founder();
    replica.read("early");
    let answered = settle(&mut replica);
    assert_eq!(answered, [(2, vec!["early"])], "it sees the first entry of the leader's term, and comes once");
}
