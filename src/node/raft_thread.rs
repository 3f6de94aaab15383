//! The raft thread: waits for inputs, drains its inbox, steps raft, and carries out what raft makes ready. It never waits for a
//! disk or for a full queue.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use raft::eraftpb::{ConfState, Message};

use super::{
    inbox::Inbox,
    messages::{BackgroundTask, ChangeApplied, Discarded, Handoff, Input, LogTask, MessageSender, Proposed},
    replica::{Install, Ready, Replica, Write},
    snapshot::{InboundSnapshot, OutboundTracker},
    status::Status,
    waiters::ReadWaiter,
};
use crate::error::Error;
use crate::metrics::{self, METRICS};
use crate::raft_log::Position;
use crate::slow_log::Slow;

/// At most this many overdue ticks are delivered at once: a process that was paused must handle the messages that have queued up
/// before it calls an election.
const LATE_TICKS: u32 = 3;

/// The raft thread's state.
pub struct RaftThread {
    pub replica: Replica<ReadWaiter>,
    /// The inputs of this thread.
    pub inbox: Arc<Inbox<Input>>,
    /// The log thread's inbox.
    pub log: Arc<Inbox<LogTask>>,
    /// The apply thread's inbox.
    pub apply_thread: Arc<Inbox<Handoff>>,
    /// The background thread's inbox.
    pub background: Arc<Inbox<BackgroundTask>>,
    /// Sends messages to other members.
    pub message_sender: Arc<dyn MessageSender>,
    /// The copy of the database that other members are sent.
    pub outbound: OutboundTracker,
    pub status: Arc<Status>,
    /// Time between ticks.
    pub tick: Duration,
    /// Ticks of an election timeout.
    pub election_ticks: u64,
    /// Entries kept behind the applied index when the log is truncated, for followers that are slightly behind.
    pub catchup_entries: u64,
    /// While the log in memory is smaller than this, entries that lagging members still need are kept.
    pub lagging_log_bytes: usize,
    /// This member's ID.
    pub id: u64,
    /// Called when the cluster has removed this member.
    pub on_removed: Arc<dyn Fn() + Send + Sync>,
    /// The change that removes this member while it leads, and for how many more ticks it may be deferred.
    pub pending_removal: Option<(ChangeApplied, u64)>,
    /// A snapshot that was received, and that raft may accept.
    pub arrived: Option<Arrived>,
    /// A snapshot that raft has accepted. Everything else waits until it is installed.
    pub accepted: Option<Accepted>,
}

/// A snapshot that was received completely.
pub struct Arrived {
    /// The snapshot's index.
    pub index: u64,
    /// The copy of the sender's database.
    pub incoming: Box<InboundSnapshot>,
    /// Called with whether it was installed.
    pub done: Box<dyn FnOnce(bool) + Send>,
}

/// A snapshot that raft has accepted.
pub struct Accepted {
    pub install: Install,
    /// To be written once the snapshot is installed.
    pub write: Option<Write>,
}

/// Why the raft thread's loop has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The inbox is closed.
    Stopped,
    /// The cluster has gained its second member, or lost all others.
    MembershipChanged,
    /// A snapshot has to be installed.
    Install,
}

impl RaftThread {
    /// Runs on a thread of its own, until the node stops, a snapshot is to be installed, or this is the only member left.
    pub fn run(&mut self) -> Pause {
        let mut inputs = Vec::new();
        let mut next_tick = Instant::now() + self.tick;
        while self.inbox.receive(&mut inputs, Some(next_tick)) {
            let now = Instant::now();
            let ticks = self.ticks_due(&mut next_tick, now);
            self.process(&mut inputs, ticks, now);
            if self.accepted.is_some() {
                return Pause::Install;
            }
            if self.replica.is_sole_member() {
                return Pause::MembershipChanged;
            }
        }
        Pause::Stopped
    }

    /// Handles the inputs, then the ticks, then carries out what raft has made ready.
    pub fn process(&mut self, inputs: &mut Vec<Input>, ticks: u32, now: Instant) {
        let mut handoff = Handoff::new(now);
        for input in inputs.drain(..) {
            self.handle(input, &mut handoff);
        }
        for _ in 0..ticks {
            self.replica.tick();
        }
        if ticks > 0 {
            if !self.replica.disk_is_stalled() {
                self.status.set_ticked();
            }
            handoff.expire = true;
            self.set_gauges();
            if let Some(old) = self.outbound.expire(ticks) {
                self.replica.log().offer(None);
                self.discard(Discarded::OutboundSnapshot(old));
            }
        }
        self.finish_removal_if_due(ticks);
        self.replica.applied(self.status.applied());
        if self.status.is_sole_leader() {
            self.replica.truncate(self.status.applied()); // No follower needs entries; a new member gets a snapshot.
        }
        while self.accepted.is_none()
            && let Some(ready) = self.replica.next_ready()
        {
            self.carry_out(ready, &mut handoff);
        }
        self.answer_refused_reads(now);
        handoff.dropped = self.replica.take_dropped_proposals();
        if self.accepted.is_none() {
            self.reject_arrived();
        }
        if self.becomes_sole_leader() {
            self.status.set_is_sole_leader(true);
        }
        if self.replica.log().take_wants_offer() && self.outbound.request() {
            let _ = self.background.send(BackgroundTask::CopyWanted);
        }
        self.status.set_term(self.replica.term());
        self.status.set_committed(self.replica.committed());
        if !handoff.is_empty() {
            let _ = self.apply_thread.send(handoff); // The inbox is closed only when the node stops.
        }
    }

    /// Exports how large the log is. At the start, too, so that every metric is there from the first scrape on.
    pub fn set_gauges(&self) {
        metrics::set_memory_bytes("log", self.replica.log_bytes() as u64);
        let (entries, unsynced) = self.replica.log_entries();
        let number = |entries: u64| i64::try_from(entries).unwrap_or(i64::MAX);
        METRICS.log_entries.set(number(entries));
        METRICS.queue_length.with_label_values(&["log"]).set(number(unsynced));
    }

    /// Answers reads that the leader has not confirmed, and counts as etcd does: once for all that waited together.
    fn answer_refused_reads(&mut self, now: Instant) {
        if self.replica.take_repeated_round()
            && let Some(suppressed) = Slow::ReadIndex.count(now)
        {
            let leader = format!("{:x}", self.status.leader());
            tracing::warn!({ leader, suppressed }, "waiting for ReadIndex response took too long, retrying");
        }
        let (mut is_late, mut is_lost) = (false, false);
        for (read, error) in self.replica.take_refused_reads() {
            is_late |= error == Error::Timeout;
            is_lost |= error == Error::LeaderChanged;
            read(Err(error));
        }
        METRICS.slow_read_indexes.inc_by(u64::from(is_late));
        METRICS.read_indexes_failed.inc_by(u64::from(is_lost));
    }

    /// Counts and logs that heartbeats were sent later than their interval allows.
    fn note_late_heartbeats(&self, late: Duration, now: Instant) {
        let followers = self.replica.conf_state();
        let followers = (followers.voters.len() + followers.learners.len()).saturating_sub(1);
        if !self.replica.leads() || followers == 0 {
            return;
        }
        METRICS.heartbeat_send_failures.inc_by(followers as u64);
        let Some(suppressed) = Slow::Heartbeat.count(now) else { return };
        tracing::warn!(
            {
                followers,
                "heartbeat-interval" = ?self.tick,
                "expected-duration" = ?2 * self.tick,
                "exceeded-duration" = ?late.saturating_sub(self.tick),
                suppressed
            },
            "leader failed to send out heartbeat on time; took too long, the raft thread got no processor time"
        );
    }

    /// How many ticks have become due; advances `next_tick`.
    pub fn ticks_due(&self, next_tick: &mut Instant, now: Instant) -> u32 {
        let late = now.saturating_duration_since(*next_tick);
        if late > self.tick {
            self.note_late_heartbeats(late, now);
        }
        let mut due = 0;
        while *next_tick <= now {
            *next_tick += self.tick;
            due += 1;
        }
        due.min(LATE_TICKS)
    }

    /// Whether this member can serve linearizable reads from now on without a round of ReadIndex.
    ///
    /// A leader's log holds everything that was ever acknowledged, but after a restart the database is behind the log. Once
    /// an entry of the leader's own term is applied, so is everything that other members, or an earlier run of this one, have
    /// acknowledged. What was committed since then may have been acknowledged by members that were removed a moment ago, so
    /// it has to be applied, too. And no other member may acknowledge anything from then on, which is why there must not even
    /// be a learner: it might apply and acknowledge its client's write sooner than this member does.
    fn becomes_sole_leader(&self) -> bool {
        !self.status.is_sole_leader()
            && self.replica.leadership().is_self
            && self.status.applied_term() == self.replica.term()
            && self.status.applied() >= self.replica.committed()
            && self.replica.is_sole_member()
    }

    fn handle(&mut self, input: Input, handoff: &mut Handoff) {
        match input {
            Input::Propose { id, data, since, waiter } => {
                self.replica.propose(data);
                handoff.proposed.push(Proposed { id, since, waiter });
            }
            Input::ProposeInTerm { term, id, data, waiter } => {
                self.replica.propose_in_term(term, id, data);
                handoff.proposed.push(Proposed { id, since: handoff.at, waiter });
            }
            Input::Change { id, change, waiter } => {
                self.replica.propose_change(&change);
                handoff.proposed.push(Proposed { id, since: handoff.at, waiter });
            }
            Input::Read(waiter) | Input::ConfirmLeadership(waiter) => self.replica.read(waiter),
            Input::CatchUp(waiter) => handoff.catch_up.push((self.replica.committed(), waiter)),
            Input::Progress(waiter) => waiter(self.replica.progress()),
            Input::RaftStatus(waiter) => waiter(self.replica.status()),
            Input::Transfer(to) => self.replica.transfer_leader(to),
            Input::Messages(messages) => messages.into_iter().for_each(|message| self.step(message)),
            Input::Reachable(member) => self.replica.reachable(member),
            Input::Unreachable(member) => self.replica.unreachable(member),
            Input::Lost(member) => self.replica.lost(member),
            Input::ShortenElection => self.replica.shorten_election(self.election_ticks.saturating_sub(2)),
            Input::Persisted(number) => self.replica.persisted(number),
            Input::Durable(at) => self.truncate_log(at),
            Input::ChangeApplied(changed) => self.apply_or_defer(changed),
            Input::OutboundSnapshot(None) => self.outbound.failed(),
            Input::OutboundSnapshot(Some(offer)) => {
                self.replica.log().offer(Some((offer.at, offer.conf_state.clone())));
                self.replica.log().take_wants_offer(); // This copy serves the requests that came while it was made.
                if let Some(old) = self.outbound.offer(offer) {
                    self.discard(Discarded::OutboundSnapshot(old));
                }
            }
            Input::SnapshotSent { to, arrived } => {
                self.outbound.send_ended(to);
                self.replica.snapshot_sent(to, arrived);
            }
            Input::SnapshotAnnounced { message, answer } => answer(self.replica.check_snapshot(&message)),
            Input::Snapshot { message, incoming, done } => {
                let index = message.get_snapshot().get_metadata().index;
                self.reject_arrived(); // The later one replaces it.
                self.arrived = Some(Arrived { index, incoming, done });
                self.step(message);
            }
        }
    }

    fn step(&mut self, message: Message) {
        if !self.replica.step(message) {
            METRICS.peer_refused.with_label_values(&["contradiction"]).inc();
        }
    }

    /// Rejects a snapshot that raft did not accept: the log is as far already, or this member follows another leader.
    fn reject_arrived(&mut self) {
        if let Some(Arrived { incoming, done, .. }) = self.arrived.take() {
            self.discard(Discarded::InboundSnapshot(incoming));
            done(false);
        }
    }

    /// Applies a change. A leader that is removed defers this for up to an election timeout, until it knows that the other
    /// members know that the change is committed. The change is answered only then, because the client may take the answer to
    /// mean that this member is no longer needed.
    fn apply_or_defer(&mut self, changed: ChangeApplied) {
        self.finish_removal();
        if self.replica.removal_must_wait(changed.index, changed.change.as_ref()) {
            self.pending_removal = Some((changed, self.election_ticks));
        } else {
            self.apply_change(changed);
        }
    }

    /// Applies the deferred change that removes this member, if there is one.
    fn finish_removal(&mut self) {
        if let Some((changed, _)) = self.pending_removal.take() {
            self.apply_change(changed);
        }
    }

    /// Applies that change if the time is over, or the other members know that it is committed.
    fn finish_removal_if_due(&mut self, ticks: u32) {
        let Some((changed, left)) = &mut self.pending_removal else { return };
        *left = left.saturating_sub(u64::from(ticks));
        if *left == 0 || !self.replica.removal_must_wait(changed.index, changed.change.as_ref()) {
            self.finish_removal();
        }
    }

    /// Leaves removing the files to the background thread: it takes too long for this one.
    fn discard(&self, copy: Discarded) {
        let _ = self.background.send(BackgroundTask::Discard(copy));
    }

    /// Has raft apply a change that the database has applied.
    fn apply_change(&mut self, changed: ChangeApplied) {
        if changed.change.is_some() {
            self.status.set_is_sole_leader(false);
        }
        let was_member = self.is_member();
        let is_needed = !self.replica.others_know_commit(changed.index);
        let conf_state = self.replica.apply_conf_change(changed.index, changed.change.as_ref());
        if let Some(conf_state) = conf_state.filter(|_| changed.change.is_some()) {
            assert_eq!(
                sorted(conf_state),
                sorted(changed.conf_state),
                "raft and the member table agree on voters and learners"
            );
        }
        if let Some(done) = changed.done {
            done();
        }
        if !was_member || self.is_member() {
            return;
        }
        let member = format!("{:x}", self.id);
        if is_needed {
            // It is no follower any more, but as long as it runs it votes and reports its commit index.
            tracing::warn!(
                "local-member-id" = member,
                "this member has been removed from the cluster, but the other members may not know it yet and may need its \
                 vote: it keeps running until one of them confirms the removal"
            );
            return;
        }
        tracing::warn!(
            "local-member-id" = member,
            "this member has been permanently removed from the cluster; its data directory is no longer needed: delete it"
        );
        (self.on_removed)();
    }

    fn is_member(&self) -> bool {
        let ConfState { voters, learners, .. } = self.replica.conf_state();
        voters.contains(&self.id) || learners.contains(&self.id)
    }

    fn carry_out(&mut self, ready: Ready<ReadWaiter>, handoff: &mut Handoff) {
        if let Some(leadership) = ready.leadership {
            tracing::info!(
                "local-member-id" = format_args!("{:x}", self.id),
                leader = format_args!("{:x}", leadership.leader),
                term = self.replica.term(),
                "leader changed"
            );
            self.status.set_leader(leadership.leader);
            self.status.set_leader_term(if leadership.is_self { leadership.term } else { 0 });
            self.status.set_is_sole_leader(false);
            handoff.leadership = Some(leadership);
        }
        if !ready.messages.is_empty() {
            self.outbound.note_sends(&ready.messages);
            self.message_sender.send(ready.messages);
        }
        handoff.entries.extend(ready.committed);
        let applied = self.status.applied();
        for (index, reads) in ready.reads {
            if index <= applied {
                for read in reads {
                    read(Ok(()));
                }
            } else {
                handoff.reads.push((index, reads));
            }
        }
        if let Some(install) = ready.install {
            self.accepted = Some(Accepted { install, write: ready.write });
        } else if let Some(write) = ready.write {
            let _ = self.log.send(LogTask::Write(write));
        }
    }

    /// Drops entries from memory and disk that neither a restart nor a lagging member needs any more.
    fn truncate_log(&mut self, durable: Position) {
        let mut upto = durable;
        if !self.status.is_sole_leader() {
            let mut kept_from = durable.index;
            if self.replica.log_bytes() <= self.lagging_log_bytes {
                let catchup = self.status.applied().saturating_sub(self.catchup_entries);
                let needed = self.replica.needed_by_followers().into_iter().chain(self.outbound.pinned_index());
                kept_from = needed.fold(catchup.min(kept_from), u64::min);
            }
            if self.replica.position(kept_from).is_none() {
                return;
            }
            upto = self.replica.truncate(kept_from);
        }
        METRICS.log_first_index.set(i64::try_from(upto.index + 1).unwrap_or(i64::MAX));
        let _ = self.log.send(LogTask::Truncate(upto));
    }
}

fn sorted(mut conf_state: ConfState) -> ConfState {
    conf_state.voters.sort_unstable();
    conf_state.learners.sort_unstable();
    conf_state
}
