//! raft-rs as a value: inputs go in, one [`Ready`] after another comes out. No thread, no clock, no disk.
//!
//! The owner carries out a `Ready` in this order: send `messages` (a leader replicates while its own disk works), install the
//! snapshot if there is one, hand `committed` to the apply thread, hand `write` to the log thread. When a write is durable, the
//! messages that had to wait for it are sent, and [`Replica::persisted`] is called with its number.
//!
//! A stalled disk is a failure that other members cannot see. A leader whose oldest write has been in flight for most of an
//! election timeout transfers its leadership; after a whole one it sends nothing, so that the others elect another leader. A
//! follower in that state holds back even messages that need no sync, so that no leader counts on it.
//!
//! INVARIANTS
//! * Persisted numbers are acknowledged in order, and a `Ready` without a write is acknowledged with the write before it.
//! * Proposals wait here while [`WRITES_IN_FLIGHT`] writes are in flight: the batch grows while the disk works.
//! * There is one membership change at a time: the next is proposed when the one before is applied. raft-rs would silently turn
//!   it into an empty entry.
//! * raft-rs is told that a membership change is applied only after it has updated its own configuration.

mod agreement;
mod outgoing;
mod proposals;
mod read_index;
mod ready;
#[cfg(test)]
mod tests;
mod validate;

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use protobuf::Message as _;
use raft::{
    Config, Progress, ProgressState, RawNode, SnapshotStatus, StateRole,
    eraftpb::{ConfChange, ConfState, Entry, EntryType, HardState, Message, MessageType},
};

use crate::error::{Error, Halt};
use crate::raft_log::{Group, MemoryLog, Position};
use proposals::Proposals;
use read_index::{Rounds, Timeouts};
pub use ready::{Install, Leadership, Ready, Write};

/// One group is being synced while the next one is collected.
const WRITES_IN_FLIGHT: usize = 2;
/// Limits on what raft-rs hands out or keeps at once.
const COMMITTED_BYTES_PER_TURN: u64 = 16 << 20;
const UNCOMMITTED_BYTES: u64 = 128 << 20;
const MESSAGE_MAX_BYTES: u64 = 1 << 20;
const MESSAGES_IN_FLIGHT: usize = 512;
/// A round of reads without an answer is repeated after this many milliseconds.
const READ_RETRY_MS: u64 = 500;

/// Raft's intervals and timeouts.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Milliseconds per tick; a leader sends heartbeats once per tick.
    pub tick_ms: u64,
    /// The election timeout in ticks.
    pub election_ticks: usize,
    /// Whether a pre-vote precedes an election, so that a leader which the others still follow is not disturbed.
    pub pre_vote: bool,
    /// How long a proposal or a read may wait, in milliseconds.
    pub request_timeout_ms: u64,
    /// The election timeout is drawn between `election_ticks` and twice that; if this is set, it is exactly this many ticks.
    pub fixed_timeout: Option<usize>,
}

/// One run of a member, from start to stop.
#[derive(Debug, Clone, Copy)]
pub struct Incarnation {
    pub member: u64,
    /// A number far from that of any other incarnation of this member.
    pub number: u64,
}

/// The state of raft at one time, for operators. Zero stands for no member.
#[derive(Debug, Clone)]
pub struct RaftStatus {
    pub term: u64,
    /// The member that this one has voted for in this term.
    pub vote: u64,
    pub committed: u64,
    pub applied: u64,
    pub leader: u64,
    /// As etcd's raft library prints it: `StateLeader`.
    pub role: &'static str,
    /// How far each member's log has got; empty unless this member is the leader.
    pub progress: Vec<MemberProgress>,
    /// The member that leadership is being transferred to.
    pub transfers_to: u64,
}

/// How far a member's log has got, as the leader sees it.
#[derive(Debug, Clone)]
pub struct MemberProgress {
    pub id: u64,
    pub matched: u64,
    pub next: u64,
    /// As etcd's raft library prints it: `StateReplicate`.
    pub state: &'static str,
}

fn role_name(role: StateRole) -> &'static str {
    match role {
        StateRole::Follower => "StateFollower",
        StateRole::PreCandidate => "StatePreCandidate",
        StateRole::Candidate => "StateCandidate",
        StateRole::Leader => "StateLeader",
    }
}

fn progress_name(state: ProgressState) -> &'static str {
    match state {
        ProgressState::Probe => "StateProbe",
        ProgressState::Replicate => "StateReplicate",
        ProgressState::Snapshot => "StateSnapshot",
    }
}

struct InFlightWrite {
    number: u64,
    /// The number to acknowledge when it is durable: higher than `number` if later `Ready`s had nothing to write.
    covers: u64,
    since: u64,
    /// The commit index that is on disk once this write is.
    commit: u64,
}

/// One member's instance of raft. `R` is what the owner needs to identify a waiting read.
pub struct Replica<R> {
    raft: RawNode<MemoryLog>,
    election_ticks: u64,
    ticks: u64,
    proposals: Proposals,
    /// The indexes of membership changes that were handed out to be applied, and that raft-rs has not applied yet.
    unapplied_changes: VecDeque<u64>,
    writes: VecDeque<InFlightWrite>,
    /// The last tick at which an entry was applied, or there was none to apply.
    applied_at: u64,
    /// The tick at which leadership last changed.
    leadership_since: u64,
    /// Members without a connection. Proposals are not forwarded to such a leader, but wait here for the next.
    unreachable_members: BTreeSet<u64>,
    /// A hard state that differs only in its commit index from the one on disk: it is written with the next group.
    unsaved_state: Option<HardState>,
    /// The commit index that is on disk.
    saved_commit: u64,
    /// The highest commit index that was received from a leader.
    leader_commit: u64,
    /// Committed entries that are not handed out yet, from the first membership change whose commit is not on disk.
    held: VecDeque<Entry>,
    /// The write that makes the current term durable, while it is in flight.
    term_write: Option<u64>,
    rounds: Rounds<R>,
    leadership: Leadership,
    /// The last term in which it was logged that a message was ignored.
    contradiction_logged_in: Option<u64>,
}

impl<R> Replica<R> {
    /// Continues from what `log` holds. Everything up to `applied` is in the database.
    pub fn new(
        incarnation: Incarnation,
        applied: u64,
        log: MemoryLog,
        timing: Timing,
        logger: &slog::Logger,
    ) -> Result<Self, Halt> {
        let saved_commit = log.hard_state().commit;
        let sole =
            raft::Storage::initial_state(&log).is_ok_and(|state| state.conf_state.voters == [incarnation.member]);
        let config = Config {
            id: incarnation.member,
            applied,
            election_tick: timing.election_ticks,
            heartbeat_tick: 1,
            max_size_per_msg: MESSAGE_MAX_BYTES,
            max_inflight_msgs: MESSAGES_IN_FLIGHT,
            check_quorum: true,
            pre_vote: timing.pre_vote,
            min_election_tick: timing.fixed_timeout.unwrap_or(0),
            max_election_tick: timing.fixed_timeout.map_or(0, |ticks| ticks + 1),
            max_committed_size_per_ready: COMMITTED_BYTES_PER_TURN,
            max_uncommitted_size: UNCOMMITTED_BYTES,
            ..Config::default()
        };
        let cannot = |error: raft::Error| Halt::InvalidData(format!("raft cannot start from this log: {error}"));
        let mut raft = RawNode::new(&config, log, logger).map_err(cannot)?;
        if sole {
            // No other member can lead, so there is no reason to wait.
            raft.campaign().map_err(cannot)?;
        }
        let ticks = |ms: u64| ms / timing.tick_ms.max(1);
        let timeouts = Timeouts { retry: ticks(READ_RETRY_MS), read: ticks(timing.request_timeout_ms).max(1) };
        Ok(Self {
            raft,
            election_ticks: timing.election_ticks as u64,
            ticks: 0,
            proposals: Proposals::new(timeouts.read),
            unapplied_changes: VecDeque::new(),
            writes: VecDeque::new(),
            applied_at: 0,
            leadership_since: 0,
            unreachable_members: BTreeSet::new(),
            unsaved_state: None,
            saved_commit,
            leader_commit: 0,
            held: VecDeque::new(),
            term_write: None,
            rounds: Rounds::new(incarnation.member, incarnation.number, timeouts),
            leadership: Leadership::default(),
            contradiction_logged_in: None,
        })
    }

    pub fn tick(&mut self) {
        self.ticks += 1;
        self.tick_election();
        self.rounds.tick();
        self.proposals.tick();
        self.transfer_leadership_if_stuck();
    }

    /// Brings the next election nearer by this many ticks, unless a leader is known: for a member that has just started and need
    /// not wait as long as one that has lost its leader.
    pub fn shorten_election(&mut self, ticks: u64) {
        if self.raft.raft.leader_id == 0 {
            (0..ticks).for_each(|_| self.tick_election());
        }
    }

    /// Ticks raft-rs's clock, which is stopped while an election would have to wait.
    pub(super) fn tick_election(&mut self) {
        if !self.election_must_wait() {
            self.raft.tick();
        }
    }

    /// Whether this member would elect itself although entries of its log are not durable yet. A candidate's vote requests
    /// are sent after the write that they depend on. But a sole voter sends none and leads at once, and raft-rs panics if
    /// entries are still being written then. This happens if the other voter was removed during the write.
    pub(super) fn election_must_wait(&self) -> bool {
        let log = &self.raft.raft.raft_log;
        log.persisted < log.last_index() && !self.leads() && self.conf_state().voters == [self.raft.raft.id]
    }

    /// Handles a message of another member. Returns false if it was ignored because it contradicts this member's log: no peer can
    /// crash this node.
    pub fn step(&mut self, mut message: Message) -> bool {
        if !self.is_plausible(&message) {
            return false;
        }
        if matches!(message.msg_type, MessageType::MsgAppend | MessageType::MsgHeartbeat) && message.term >= self.term()
        {
            self.leader_commit = self.leader_commit.max(message.commit);
        }
        if message.msg_type == MessageType::MsgPropose && self.leads() {
            self.proposals.take_changes(&mut message);
            if message.entries.is_empty() {
                return true;
            }
        }
        let candidate = (message.msg_type == MessageType::MsgRequestPreVote).then_some((message.from, message.term));
        if let Err(error) = self.raft.step(message) {
            tracing::debug!(%error, "a peer's message was ignored");
        }
        if let Some((candidate, next_term)) = candidate {
            outgoing::raise_refusal_term(&mut self.raft.raft.msgs, candidate, next_term.saturating_sub(1));
        }
        true
    }

    /// Proposes an entry.
    pub fn propose(&mut self, data: Bytes) {
        self.proposals.add(data);
    }

    /// Proposes an entry if this member leads in this term, and drops it otherwise. `id` is the one inside the entry.
    pub fn propose_in_term(&mut self, term: u64, id: u64, data: Bytes) {
        self.proposals.add_in_term(term, id, data);
    }

    /// The IDs of proposals that were dropped because this member no longer leads in their term.
    pub fn take_dropped_proposals(&mut self) -> Vec<u64> {
        self.proposals.take_dropped()
    }

    /// Proposes a membership change.
    pub fn propose_change(&mut self, change: &ConfChange) {
        let data = change.write_to_bytes().expect("a change that this process has made can be encoded");
        self.proposals.add_change(data.into());
    }

    /// Adds a linearizable read, which can be served when everything that was acknowledged before now is applied here.
    pub fn read(&mut self, read: R) {
        self.rounds.add(read);
    }

    /// Whether a round of ReadIndex was repeated since the last call, because it was not answered in time.
    pub fn take_repeated_round(&mut self) -> bool {
        self.rounds.take_repeated()
    }

    /// The number of entries in the log, and of those that are not synced yet.
    #[must_use]
    pub fn log_entries(&self) -> (u64, u64) {
        let log = &self.raft.raft.raft_log;
        let last = log.last_index();
        (last + 1 - log.first_index(), last.saturating_sub(log.persisted))
    }

    /// Reads that will not be answered, with their errors.
    pub fn take_refused_reads(&mut self) -> Vec<(R, Error)> {
        self.rounds.take_refused()
    }

    /// Call when the write with this number is durable, and so are all before it.
    pub fn persisted(&mut self, number: u64) {
        self.term_write.take_if(|write| *write <= number);
        let mut acknowledged = None;
        while let Some(write) = self.writes.pop_front_if(|write| write.number <= number) {
            acknowledged = Some(write.covers);
            let was_withheld = self.would_reveal_change(self.saved_commit);
            self.saved_commit = write.commit;
            if was_withheld && !self.would_reveal_change(self.saved_commit) {
                self.raft.ping(); // Heartbeats carry the commit index that was withheld.
            }
        }
        if let Some(number) = acknowledged {
            self.raft.on_persist_ready(number);
        }
    }

    /// Call when everything up to this index is in the database. raft-rs is told only up to the first membership change that it
    /// has not applied to its configuration.
    pub fn applied(&mut self, index: u64) {
        let index = self.unapplied_changes.front().map_or(index, |change| index.min(change - 1));
        if index > self.raft.raft.raft_log.applied() {
            self.raft.advance_apply_to(index);
            self.applied_at = self.ticks;
        }
    }

    /// Drops entries up to `index`, but only those that raft-rs knows to be applied: it reads the others when it calls an
    /// election. Returns where the log begins now.
    pub fn truncate(&mut self, index: u64) -> Position {
        let index = index.min(self.raft.raft.raft_log.applied());
        self.raft.mut_store().truncate(index);
        self.raft.store().truncated()
    }

    /// Call when there is a connection to this member.
    pub fn reachable(&mut self, member: u64) {
        self.unreachable_members.remove(&member);
    }

    /// Call when the connection to this member is broken: messages that were sent may be lost, and none can be sent.
    pub fn unreachable(&mut self, member: u64) {
        self.unreachable_members.insert(member);
        self.lost(member);
    }

    /// Call when a message to this member was lost.
    pub fn lost(&mut self, member: u64) {
        self.raft.report_unreachable(member);
    }

    /// Call when sending a snapshot to this member has ended: it is installed there, or was lost on the way.
    pub fn snapshot_sent(&mut self, member: u64, arrived: bool) {
        let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.raft.report_snapshot(member, status);
    }

    /// The position of the entry at an index.
    #[must_use]
    pub fn position(&self, index: u64) -> Option<Position> {
        self.raft.store().position(index)
    }

    /// The leader, as last reported in a [`Ready`].
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        self.leadership
    }

    /// Whether this member is the leader.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// The voters and learners.
    #[must_use]
    pub fn conf_state(&self) -> ConfState {
        self.raft.raft.prs().conf().to_conf_state()
    }

    /// Whether this member is a voter and the cluster has no other member.
    #[must_use]
    pub fn is_sole_member(&self) -> bool {
        let others = self.raft.raft.prs().iter().any(|(&member, _)| member != self.raft.raft.id);
        !others && self.conf_state().voters == [self.raft.raft.id]
    }

    /// The ID and match index of each member; None unless this member is the leader.
    #[must_use]
    pub fn progress(&self) -> Option<Vec<(u64, u64)>> {
        let matched = || self.raft.raft.prs().iter().map(|(&member, progress)| (member, progress.matched));
        self.leads().then(|| matched().collect())
    }

    /// The state of raft, for operators.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let raft = &self.raft.raft;
        let member = |(&id, progress): (&u64, &Progress)| MemberProgress {
            id,
            matched: progress.matched,
            next: progress.next_idx,
            state: progress_name(progress.state),
        };
        RaftStatus {
            term: raft.term,
            vote: raft.vote,
            committed: raft.raft_log.committed,
            applied: raft.raft_log.applied,
            leader: raft.leader_id,
            role: role_name(raft.state),
            progress: if self.leads() { raft.prs().iter().map(member).collect() } else { Vec::new() },
            transfers_to: raft.lead_transferee.unwrap_or_default(),
        }
    }

    /// The lowest match index among members that were active recently and are not being sent a snapshot; None unless this
    /// member is the leader.
    #[must_use]
    pub fn needed_by_followers(&self) -> Option<u64> {
        let is_active = |progress: &Progress| progress.recent_active && progress.state != ProgressState::Snapshot;
        let matched = self.raft.raft.prs().iter().filter(|(_, progress)| is_active(progress)).map(|(_, it)| it.matched);
        if self.leads() { matched.min() } else { None }
    }

    /// The commit index.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// The size of the entries in memory.
    #[must_use]
    pub fn log_bytes(&self) -> usize {
        self.raft.store().size_bytes()
    }

    /// The log in memory, through which snapshots are offered to raft-rs.
    pub fn log(&mut self) -> &mut MemoryLog {
        self.raft.mut_store()
    }

    /// Transfers leadership to another voter as soon as that has all entries. Does nothing if this member does not lead, or is
    /// transferring to that voter already.
    pub fn transfer_leader(&mut self, to: u64) {
        if self.leads() && self.raft.raft.lead_transferee != Some(to) {
            self.raft.transfer_leader(to);
        }
    }

    /// Whether the oldest write has been in flight for an election timeout.
    #[must_use]
    pub fn disk_is_stalled(&self) -> bool {
        self.oldest_write_ticks() >= self.election_ticks
    }

    fn oldest_write_ticks(&self) -> u64 {
        self.writes.front().map_or(0, |write| self.ticks - write.since)
    }

    /// Transfers leadership when the disk or the apply thread has made no progress for most of an election timeout. Tries
    /// again if raft-rs has given up a transfer.
    fn transfer_leadership_if_stuck(&mut self) {
        let raft = &self.raft.raft;
        if raft.raft_log.applied() >= raft.raft_log.committed.min(raft.raft_log.persisted) {
            self.applied_at = self.ticks;
        }
        let stuck = self.oldest_write_ticks().max(self.ticks - self.applied_at).min(self.ticks - self.leadership_since);
        if !self.leads() || stuck < (self.election_ticks * 3 / 4).max(1) || raft.lead_transferee.is_some() {
            return;
        }
        if let Some(best) = self.transfer_target() {
            tracing::warn!(
                to = format!("{best:x}"),
                "the disk or the apply thread has stalled, transferring leadership"
            );
            self.raft.transfer_leader(best);
        }
    }

    /// The voter to transfer leadership to: of those that were active recently, the one with the most entries.
    fn transfer_target(&self) -> Option<u64> {
        let raft = &self.raft.raft;
        let voters = &raft.prs().conf().to_conf_state().voters;
        let others = voters.iter().filter(|&&voter| voter != raft.id);
        let lively = others.filter(|&&voter| raft.prs().get(voter).is_some_and(|progress| progress.recent_active));
        lively.max_by_key(|&&voter| raft.prs().get(voter).map(|progress| progress.matched)).copied()
    }

    /// What the owner has to do next, if anything.
    pub fn next_ready(&mut self) -> Option<Ready<R>> {
        self.propose_waiting();
        self.propose_waiting_change();
        self.start_rounds();
        if !self.raft.has_ready() {
            return self.take_released().map(Ready::of_committed);
        }
        let mut ready = self.raft.ready();
        let term = self.raft.raft.term;
        let leadership = ready.ss().map(|soft| Leadership {
            leader: soft.leader_id,
            is_self: soft.raft_state == StateRole::Leader,
            term,
        });
        let leadership = leadership.filter(|now| *now != self.leadership);
        if let Some(leadership) = leadership {
            (self.leadership, self.leadership_since) = (leadership, self.ticks);
        }
        for state in ready.take_read_states() {
            self.rounds.answer(state.index, &state.request_ctx);
        }
        let mut messages = ready.take_messages();
        let committed = ready.take_committed_entries();
        let changes = committed.iter().filter(|entry| entry.entry_type != EntryType::EntryNormal);
        let followed_before = self.unapplied_changes.len();
        self.unapplied_changes.extend(changes.map(|entry| entry.index));
        let has_changes = self.unapplied_changes.len() > followed_before;
        let hard_state = ready.hs().cloned();
        let install = self.accept(ready.snapshot(), hard_state.as_ref());
        let entries = ready.take_entries();
        self.raft.mut_store().append(&entries);
        if let Some(hard_state) = &hard_state {
            if hard_state.term > self.raft.store().hard_state().term {
                self.term_write = Some(ready.number());
            }
            self.raft.mut_store().set_hard_state(hard_state.clone());
        }
        let mut must_sync = ready.must_sync();
        let mut persisted_messages = ready.take_persisted_messages();
        let number = ready.number();
        self.raft.advance_append_async(ready);
        self.unsaved_state = hard_state.or(self.unsaved_state.take());
        must_sync |=
            (has_changes || self.would_reveal_change(self.commit_after_writes())) && self.unsaved_state.is_some();
        let saved = self.unsaved_state.as_ref().filter(|_| must_sync).map(|state| state.commit);
        let commit = saved.unwrap_or_else(|| self.commit_after_writes());
        self.filter_messages(&mut messages, &mut persisted_messages, commit);
        let committed = self.hold_changes(committed);
        let write = if must_sync {
            let group = Group { entries, hard_state: self.unsaved_state.take() };
            Some(Write { group, persisted_messages, number })
        } else {
            self.after_writes(number, persisted_messages, &mut messages)
        };
        if write.is_some() {
            self.writes.push_back(InFlightWrite { number, covers: number, since: self.ticks, commit });
        }
        if leadership.is_some_and(|now| now.leader != 0) {
            self.rounds.leader_changed();
        }
        Some(Ready { leadership, messages, install, committed, reads: self.rounds.take_answered(), write })
    }

    /// Resets the log in memory to begin after a snapshot, if raft has accepted one.
    fn accept(&mut self, snapshot: &raft::eraftpb::Snapshot, hard_state: Option<&HardState>) -> Option<Install> {
        if snapshot.is_empty() {
            return None;
        }
        let metadata = snapshot.get_metadata();
        let at = Position { index: metadata.index, term: metadata.term };
        let conf_state = metadata.get_conf_state().clone();
        let mut hard_state = hard_state.unwrap_or(self.raft.store().hard_state()).clone();
        // Entries after the snapshot may have been received and committed already. They are written later: if the power fails in
        // between, a commit index above the last entry would be taken for corruption.
        hard_state.commit = at.index;
        self.raft.mut_store().restore(at, hard_state.clone(), conf_state.clone());
        self.unapplied_changes.clear();
        self.held.clear();
        Some(Install { at, conf_state, hard_state })
    }

    /// Decides which messages are sent at once, and which wait for the write. Messages that need no sync are sent at once,
    /// redundant ones are dropped, and if the disk has stalled, nothing is sent. `commit` is the commit index that is on disk
    /// when the messages that wait for the write are sent.
    ///
    /// A leader was elected by votes that are durable, so it may send before its own disk is done. But a sole voter elects itself
    /// without any message: until that is durable, a restart could elect it to the same term again, and it would send different
    /// entries to learners.
    fn filter_messages(&mut self, messages: &mut Vec<Message>, persisted_messages: &mut Vec<Message>, commit: u64) {
        outgoing::cap_reported_commit(persisted_messages, commit);
        if self.disk_is_stalled() {
            for kept_back in messages.drain(..).filter(|message| message.msg_type == MessageType::MsgSnapshot) {
                self.snapshot_sent(kept_back.to, false); // raft-rs waits for a report on each snapshot.
            }
            return;
        }
        if self.leads() && self.term_write.is_some() {
            persisted_messages.append(messages);
            return;
        }
        if self.would_reveal_change(self.saved_commit) {
            outgoing::withhold_commit(messages, self.raft.raft.pending_conf_index, persisted_messages);
        }
        messages.extend(persisted_messages.extract_if(.., |message| outgoing::needs_no_sync(message)));
        outgoing::cap_reported_commit(messages, self.saved_commit);
        let progress = self.raft.raft.prs();
        outgoing::drop_redundant_appends(messages, |member| {
            progress.get(member).is_some_and(|progress| progress.state == ProgressState::Replicate)
        });
    }

    /// Handles a `Ready` without a write: its `persisted_messages` wait for the writes in flight, if there are any.
    fn after_writes(
        &mut self,
        number: u64,
        persisted_messages: Vec<Message>,
        messages: &mut Vec<Message>,
    ) -> Option<Write> {
        let Some(last) = self.writes.back_mut() else {
            self.raft.on_persist_ready(number);
            messages.extend(persisted_messages);
            return None;
        };
        if persisted_messages.is_empty() {
            last.covers = number;
            return None;
        }
        Some(Write { group: Group::default(), persisted_messages, number })
    }

    /// Whether there is a leader that a proposal can be sent to: a message to an unreachable member is lost silently.
    fn can_reach_leader(&self) -> bool {
        let leader = self.raft.raft.leader_id;
        leader != 0 && !self.unreachable_members.contains(&leader)
    }

    fn propose_waiting(&mut self) {
        self.proposals.drop_unless(self.leads().then(|| self.term()));
        if self.writes.len() >= WRITES_IN_FLIGHT || !self.can_reach_leader() {
            return;
        }
        while let Some(message) = self.proposals.next(self.raft.raft.id) {
            let taken = message.entries.len();
            if self.raft.step(message).is_err() {
                return; // raft-rs refuses proposals now: too much is uncommitted, or leadership is being transferred.
            }
            self.proposals.taken(taken);
        }
    }

    fn propose_waiting_change(&mut self) {
        if !self.can_reach_leader() || (self.leads() && self.raft.raft.has_pending_conf()) {
            return;
        }
        let Some(message) = self.proposals.next_change(self.raft.raft.id) else { return };
        if self.raft.step(message).is_ok() {
            self.proposals.change_taken();
        }
    }

    /// Starts a round of ReadIndex, but only when an entry of the current term is committed here. A leader that has committed
    /// nothing in its term does not know the commit index, and raft-rs drops its requests. A follower loses nothing by waiting:
    /// the index that it gets is no lower than that entry's, so it has to apply up to there anyway.
    fn start_rounds(&mut self) {
        if self.raft.raft.leader_id == 0 || !self.raft.raft.commit_to_current_term() {
            return;
        }
        if let Some(context) = self.rounds.start() {
            self.raft.read_index(context);
        }
    }
}
