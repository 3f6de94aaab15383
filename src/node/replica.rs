//! raft-rs as a value: inputs go in, one [`Turn`] after another comes out. No thread, no clock, no disk.
//!
//! The owner carries a turn out in this order: send `messages` (a leader replicates while its own disk works), hand
//! `committed` to the applier, hand `write` to the log. When a write is durable its promises are sent and
//! [`Replica::persisted`] is called with its number.
//!
//! Reads that must see every acknowledged write wait for a *round*: the leader proves that it still leads. Whoever comes
//! before a round starts shares it. A round that gets no answer is asked again under a fresh context, because raft-rs may
//! drop one without a word, and answers a repeated one with an old index.
//!
//! INVARIANTS
//! * Persisted numbers are acknowledged in order, and a turn that writes nothing is acknowledged with the write before it.
//! * Proposals wait here while [`WRITES_IN_FLIGHT`] writes are under way: the batch grows while the disk works.

use std::collections::VecDeque;

use bytes::Bytes;
use raft::{
    Config, RawNode, StateRole,
    eraftpb::{Entry, EntryType, HardState, Message, MessageType},
};

use super::log::{Group, MemoryLog, Position};
use crate::error::Halt;

/// One group is being synced while the next one gathers.
const WRITES_IN_FLIGHT: usize = 2;
/// Bounds of one proposal message.
const PROPOSAL_MAX_ENTRIES: usize = 4096;
const PROPOSAL_MAX_BYTES: usize = 1 << 20;
/// Bounds on what raft-rs hands out or keeps at once.
const COMMITTED_BYTES_PER_TURN: u64 = 16 << 20;
const UNCOMMITTED_BYTES: u64 = 128 << 20;
const MESSAGE_MAX_BYTES: u64 = 1 << 20;
const MESSAGES_IN_FLIGHT: usize = 512;
/// Rounds that may wait for an answer at once.
const READ_ROUNDS: usize = 2;
/// A round without an answer is asked again after so many milliseconds.
const READ_RETRY_MS: u64 = 500;

/// How time is counted.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Milliseconds per tick; the leader is heard once per tick.
    pub tick_ms: u64,
    /// Ticks without a leader until a new one is wanted.
    pub election_ticks: usize,
    /// Ask before disturbing a leader that others still hear.
    pub pre_vote: bool,
}

/// Who leads, as far as this member knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// The leader's ID; zero if nobody is known to lead.
    pub leader: u64,
    /// Whether it is this member.
    pub is_self: bool,
    /// The term when that was so.
    pub term: u64,
}

/// What must be durable before what it promises may be said.
#[derive(Debug, Default)]
pub struct Write {
    /// To be written as one; may be empty.
    pub group: Group,
    /// To be sent once this and every earlier write is durable.
    pub promises: Vec<Message>,
    /// For [`Replica::persisted`].
    pub number: u64,
}

impl Write {
    /// Takes in a later write, so that both become one.
    pub fn absorb(&mut self, later: Self) {
        self.group.absorb(later.group);
        self.promises.extend(later.promises);
        self.number = later.number;
    }
}

/// What is to be done, in the order of the fields.
pub struct Turn<R> {
    /// A change of leadership.
    pub leadership: Option<Leadership>,
    /// To be sent at once.
    pub messages: Vec<Message>,
    /// Entries to apply.
    pub committed: Vec<Entry>,
    /// Reads that may be answered once the entry with this index is applied.
    pub reads: Vec<(u64, Vec<R>)>,
    /// To be written.
    pub write: Option<Write>,
}

struct Round<R> {
    context: u64,
    asked_at: u64,
    reads: Vec<R>,
}

/// One member's part in the agreement. `R` is whatever the owner needs to find a waiting read again.
pub struct Replica<R> {
    raft: RawNode<MemoryLog>,
    timing: Timing,
    ticks: u64,
    /// Proposals that raft has not taken yet.
    proposals: VecDeque<Bytes>,
    /// Writes under way: their number, and the number to acknowledge with them.
    writes: VecDeque<(u64, u64)>,
    /// A commit index that is not on disk: it rides with the next write.
    unsaved: Option<HardState>,
    rounds: VecDeque<Round<R>>,
    waiting_reads: Vec<R>,
    contexts: u64,
    answered: Vec<(u64, Vec<R>)>,
    leadership: Leadership,
}

impl<R> Replica<R> {
    /// A member that goes on from what `log` holds, everything up to `applied` being in its database.
    pub fn new(id: u64, applied: u64, log: MemoryLog, timing: Timing, logger: &slog::Logger) -> Result<Self, Halt> {
        let sole = raft::Storage::initial_state(&log).is_ok_and(|state| state.conf_state.voters == [id]);
        let config = Config {
            id,
            applied,
            election_tick: timing.election_ticks,
            heartbeat_tick: 1,
            max_size_per_msg: MESSAGE_MAX_BYTES,
            max_inflight_msgs: MESSAGES_IN_FLIGHT,
            check_quorum: true,
            pre_vote: timing.pre_vote,
            max_committed_size_per_ready: COMMITTED_BYTES_PER_TURN,
            max_uncommitted_size: UNCOMMITTED_BYTES,
            ..Config::default()
        };
        let cannot = |error: raft::Error| Halt::Refused(format!("raft cannot start from this log: {error}"));
        let mut raft = RawNode::new(&config, log, logger).map_err(cannot)?;
        if sole {
            // Nobody else can lead, so there is nobody to wait for.
            raft.campaign().map_err(cannot)?;
        }
        Ok(Self {
            raft,
            timing,
            ticks: 0,
            proposals: VecDeque::new(),
            writes: VecDeque::new(),
            unsaved: None,
            rounds: VecDeque::new(),
            waiting_reads: Vec::new(),
            contexts: 0,
            answered: Vec::new(),
            leadership: Leadership::default(),
        })
    }

    /// Time goes by.
    pub fn tick(&mut self) {
        self.ticks += 1;
        self.raft.tick();
        self.retry_rounds();
    }

    /// Takes a message of another member. What makes no sense is ignored: no peer can stop this node.
    pub fn step(&mut self, message: Message) {
        if let Err(error) = self.raft.step(message) {
            tracing::debug!(%error, "a peer's message was ignored");
        }
    }

    /// Wants `data` in the log.
    pub fn propose(&mut self, data: Bytes) {
        self.proposals.push_back(data);
    }

    /// Wants to know when everything that was acknowledged before now can be read here.
    pub fn read(&mut self, read: R) {
        self.waiting_reads.push(read);
    }

    /// The write with this number is durable, and so are all before it.
    pub fn persisted(&mut self, number: u64) {
        let mut acknowledged = None;
        while let Some((_, covers)) = self.writes.pop_front_if(|&mut (write, _)| write <= number) {
            acknowledged = Some(covers);
        }
        if let Some(number) = acknowledged {
            self.raft.on_persist_ready(number);
        }
    }

    /// Everything up to this index is in the database.
    pub fn applied(&mut self, index: u64) {
        if index > self.raft.raft.raft_log.applied() {
            self.raft.advance_apply_to(index);
        }
    }

    /// Forgets entries up to `index`; returns where the log begins now.
    pub fn cut(&mut self, index: u64) -> Position {
        self.raft.mut_store().cut(index);
        self.raft.store().truncated()
    }

    /// The entry at an index, as a position.
    #[must_use]
    pub fn position(&self, index: u64) -> Option<Position> {
        self.raft.store().position(index)
    }

    /// Who leads.
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        self.leadership
    }

    /// Whether nobody else has a vote.
    #[must_use]
    pub fn is_sole_voter(&self) -> bool {
        self.raft.raft.prs().conf().to_conf_state().voters == [self.raft.raft.id]
    }

    /// The commit index.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    /// The present term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// Bytes of the entries that are kept in memory.
    #[must_use]
    pub fn log_bytes(&self) -> usize {
        self.raft.store().size_bytes()
    }

    /// Proposals that raft has not taken yet.
    #[must_use]
    pub fn waiting_proposals(&self) -> usize {
        self.proposals.len()
    }

    /// What is to be done next, if anything.
    pub fn turn(&mut self) -> Option<Turn<R>> {
        self.propose_waiting();
        self.start_rounds();
        if !self.raft.has_ready() {
            return None;
        }
        let mut ready = self.raft.ready();
        let term = self.raft.raft.term;
        let leadership = ready.ss().map(|soft| Leadership {
            leader: soft.leader_id,
            is_self: soft.raft_state == StateRole::Leader,
            term,
        });
        let leadership = leadership.filter(|now| *now != self.leadership);
        self.leadership = leadership.unwrap_or(self.leadership);
        for state in ready.take_read_states() {
            self.answer_round(state.index, &state.request_ctx);
        }
        let mut messages = ready.take_messages();
        let committed = ready.take_committed_entries();
        let entries = ready.take_entries();
        let hard_state = ready.hs().cloned();
        self.raft.mut_store().append(&entries);
        if let Some(hard_state) = &hard_state {
            self.raft.mut_store().set_hard_state(hard_state.clone());
        }
        let must_sync = ready.must_sync();
        let promises = ready.take_persisted_messages();
        let number = ready.number();
        self.raft.advance_append_async(ready);
        self.unsaved = hard_state.or(self.unsaved.take());
        let write = if must_sync {
            let group = Group { entries, hard_state: self.unsaved.take() };
            Some(Write { group, promises, number })
        } else {
            self.after_writes(number, promises, &mut messages)
        };
        if write.is_some() {
            self.writes.push_back((number, number));
        }
        if leadership.is_some() {
            self.retry_rounds_now();
        }
        Some(Turn { leadership, messages, committed, reads: std::mem::take(&mut self.answered), write })
    }

    /// A turn that writes nothing: what it promises waits for the writes under way, if there are any.
    fn after_writes(&mut self, number: u64, promises: Vec<Message>, messages: &mut Vec<Message>) -> Option<Write> {
        let Some((_, covers)) = self.writes.back_mut() else {
            self.raft.on_persist_ready(number);
            messages.extend(promises);
            return None;
        };
        if promises.is_empty() {
            *covers = number;
            return None;
        }
        Some(Write { group: Group::default(), promises, number })
    }

    fn propose_waiting(&mut self) {
        if self.writes.len() >= WRITES_IN_FLIGHT || self.raft.raft.leader_id == 0 {
            return;
        }
        while !self.proposals.is_empty() {
            let mut bytes = 0;
            let batch = self.proposals.iter().take(PROPOSAL_MAX_ENTRIES).take_while(|data| {
                let first = bytes == 0;
                bytes += data.len();
                first || bytes <= PROPOSAL_MAX_BYTES
            });
            let entries: Vec<Entry> = batch.map(entry).collect();
            let taken = entries.len();
            let mut message =
                Message { msg_type: MessageType::MsgPropose, from: self.raft.raft.id, ..Message::default() };
            message.entries = entries.into();
            if self.raft.step(message).is_err() {
                return; // Raft takes nothing now: too much is uncommitted, or leadership is moving. Later, then.
            }
            self.proposals.drain(..taken);
        }
    }

    fn start_rounds(&mut self) {
        let full = self.rounds.len() >= READ_ROUNDS;
        if self.waiting_reads.is_empty() || full || self.raft.raft.leader_id == 0 || self.is_fresh_leader() {
            return;
        }
        let reads = std::mem::take(&mut self.waiting_reads);
        self.ask(reads);
    }

    /// A leader that has committed nothing in its term knows no commit index, and raft-rs drops what it is asked.
    fn is_fresh_leader(&self) -> bool {
        self.raft.raft.state == StateRole::Leader && !self.raft.raft.commit_to_current_term()
    }

    fn ask(&mut self, reads: Vec<R>) {
        self.contexts += 1;
        self.rounds.push_back(Round { context: self.contexts, asked_at: self.ticks, reads });
        self.raft.read_index(self.contexts.to_be_bytes().to_vec());
    }

    fn answer_round(&mut self, index: u64, context: &[u8]) {
        let asked = self.rounds.iter().position(|round| round.context.to_be_bytes() == context);
        if let Some(round) = asked.and_then(|place| self.rounds.remove(place)) {
            self.answered.push((index, round.reads));
        }
    }

    fn retry_rounds(&mut self) {
        let patience = (READ_RETRY_MS / self.timing.tick_ms).max(1);
        if self.rounds.front().is_some_and(|oldest| self.ticks - oldest.asked_at >= patience) {
            self.retry_rounds_now();
        }
    }

    /// Gives up on all unanswered rounds: whoever waits for them takes part in the next one.
    fn retry_rounds_now(&mut self) {
        let reads = self.rounds.drain(..).flat_map(|round| round.reads);
        self.waiting_reads.splice(..0, reads);
    }
}

fn entry(data: &Bytes) -> Entry {
    Entry { entry_type: EntryType::EntryNormal, data: data.clone(), ..Entry::default() }
}

#[cfg(test)]
mod tests {
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
        let timing = Timing { tick_ms: 100, election_ticks: 10, pre_vote: true };
        Replica::new(1, 1, log, timing, &slog::Logger::root(slog::Discard, slog::o!())).unwrap()
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

    #[test]
    fn a_read_that_comes_before_the_leader_is_answered_without_waiting_for_a_tick() {
        let mut replica = founder();
        replica.read("early");
        let answered = settle(&mut replica);
        assert_eq!(answered, [(2, vec!["early"])], "it sees the first entry of the leader's term, and comes once");
    }
}
