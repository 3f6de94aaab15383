//! The raft thread: wait, drain, one turn after another. It never waits for a disk or for a full queue.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use raft::eraftpb::{ConfChange, ConfState, Message};

use super::{
    applier::Handoff,
    inbox::Inbox,
    keeper::{Chore, Discarded},
    log::Position,
    peers::Post,
    replica::{Install, Replica, Turn, Write},
    snapshot::{Giving, Incoming, Offer},
    status::Status,
    waiters::{ProposalWaiter, ReadWaiter},
    writer::LogTask,
};
use crate::metrics::{self, METRICS};

/// What the raft thread hears.
pub enum Input {
    /// Somebody wants an entry in the log, and waits for its outcome.
    Propose {
        /// The ID inside the entry.
        id: u64,
        /// The entry.
        data: Bytes,
        /// Who waits.
        waiter: ProposalWaiter,
    },
    /// An entry that only a leader of this term may propose: dropped elsewhere, and never passed on.
    ProposeInTerm {
        /// The term in which it was decided.
        term: u64,
        /// The ID inside the entry.
        id: u64,
        /// The entry.
        data: Bytes,
        /// Told the outcome.
        waiter: ProposalWaiter,
    },
    /// Somebody wants to change the members, and waits for the outcome.
    Change {
        /// The ID inside the entry.
        id: u64,
        /// The change, with the entry inside.
        change: ConfChange,
        /// Who waits.
        waiter: ProposalWaiter,
    },
    /// Somebody wants to read what was acknowledged before now.
    Read(ReadWaiter),
    /// The waiter is called when a round of ReadIndex that begins after this has shown that the leader of the present term
    /// still leads, and everything up to its index is applied.
    ConfirmLeadership(ReadWaiter),
    /// Somebody wants to see applied what is known here to be committed.
    CatchUp(ReadWaiter),
    /// Somebody wants to know how far the members are.
    Progress(ProgressWaiter),
    /// Somebody wants another voter to lead.
    Transfer(u64),
    /// Other members said something.
    Messages(Vec<Message>),
    /// This member can be reached now.
    Reachable(u64),
    /// It cannot any more, and what was sent to it may be lost.
    Unreachable(u64),
    /// Something that was sent to this member was lost.
    Lost(u64),
    /// This member need not wait for its first election as long as for a later one.
    Hurry,
    /// The log has synced the write with this number and all before it.
    Persisted(u64),
    /// The database survives a crash up to this index.
    Durable(Position),
    /// A change of the members is in the database, or was refused.
    Changed(Changed),
    /// A copy of the database may be sent to others; or none could be made.
    Offer(Option<Arc<Offer>>),
    /// A copy that was sent has arrived, or was lost.
    SnapshotSent {
        /// To whom.
        to: u64,
        /// Whether it arrived.
        arrived: bool,
    },
    /// Another member wants to send a copy of its database.
    SnapshotAnnounced {
        /// What raft would hear.
        message: Message,
        /// Told whether raft would take it and whether its sender is the leader that this member follows, or why not.
        answer: Box<dyn FnOnce(Result<bool, String>) + Send>,
    },
    /// A copy of another member's database is here, whole.
    Snapshot {
        /// What raft shall hear.
        message: Message,
        /// The copy.
        incoming: Box<Incoming>,
        /// Told whether it is in place.
        done: Box<dyn FnOnce(bool) + Send>,
    },
}

/// Hears how far each member is, by ID; None from a member that does not lead.
pub type ProgressWaiter = Box<dyn FnOnce(Option<Vec<(u64, u64)>>) + Send>;

/// What became of a change of the members.
pub struct Changed {
    /// The entry's index.
    pub index: u64,
    /// The change; None if it was refused, on every replica alike.
    pub change: Option<ConfChange>,
    /// Who votes, by the table of members.
    pub conf_state: ConfState,
    /// To be called when raft has followed.
    pub done: Option<Box<dyn FnOnce() + Send>>,
}

/// Late ticks are delivered up to this many at once: a process that was paused must hear its mail before it wants an
/// election.
const LATE_TICKS: u32 = 3;

/// The raft thread's belongings.
pub struct Driver {
    /// The value that it drives.
    pub replica: Replica<ReadWaiter>,
    /// What it hears.
    pub inbox: Arc<Inbox<Input>>,
    /// The log thread's ear.
    pub log: Arc<Inbox<LogTask>>,
    /// The apply thread's ear.
    pub applier: Arc<Inbox<Handoff>>,
    /// The keeper's ear.
    pub keeper: Arc<Inbox<Chore>>,
    /// Who carries messages.
    pub post: Arc<dyn Post>,
    /// The copy of the database that others may be given.
    pub giving: Giving,
    /// What everybody may know.
    pub status: Arc<Status>,
    /// Time between ticks.
    pub tick: Duration,
    /// Ticks of an election timeout.
    pub election_ticks: u64,
    /// Entries that are kept behind the applied index, for whoever is late.
    pub catchup_entries: u64,
    /// The log in memory may grow to this for the sake of members that are behind.
    pub laggard_log_bytes: usize,
    /// This member's ID.
    pub id: u64,
    /// Called when the cluster has removed this member.
    pub farewell: Arc<dyn Fn() + Send + Sync>,
    /// The change that removes this member while it leads, and for how many ticks it stays at most.
    pub leaving: Option<(Changed, u64)>,
    /// A snapshot that has come, and may be accepted.
    pub arrived: Option<Arrived>,
    /// A snapshot that was accepted: everything waits for it to be put in place.
    pub accepted: Option<Accepted>,
}

/// A snapshot that is here.
pub struct Arrived {
    /// How far it is.
    pub index: u64,
    /// The copy.
    pub incoming: Box<Incoming>,
    /// Told whether it is in place.
    pub done: Box<dyn FnOnce(bool) + Send>,
}

/// A snapshot that raft has accepted.
pub struct Accepted {
    /// What raft knows of it.
    pub install: Install,
    /// To be written once it is in place.
    pub write: Option<Write>,
}

/// Why the raft thread does not go on by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The inbox is closed.
    Stopped,
    /// There are others now, or there are none any more.
    Company,
    /// A snapshot has to be put in place.
    Install,
}

impl Driver {
    /// Runs until something has to be rearranged, in company.
    pub fn run(&mut self) -> Pause {
        let mut inputs = Vec::new();
        let mut next_tick = Instant::now() + self.tick;
        while self.inbox.receive(&mut inputs, Some(next_tick)) {
            let ticks = self.ticks_due(&mut next_tick);
            self.take(&mut inputs, ticks);
            if self.accepted.is_some() {
                return Pause::Install;
            }
            if self.replica.is_alone() {
                return Pause::Company;
            }
        }
        Pause::Stopped
    }

    /// Hears everything that lies there, then lets so many ticks go by, then acts.
    pub fn take(&mut self, inputs: &mut Vec<Input>, ticks: u32) {
        let mut handoff = Handoff::default();
        for input in inputs.drain(..) {
            self.hear(input, &mut handoff);
        }
        for _ in 0..ticks {
            self.replica.tick();
        }
        if ticks > 0 {
            if !self.replica.disk_stands_still() {
                self.status.set_ticked();
            }
            handoff.expire = true;
            metrics::measured("log", self.replica.log_bytes() as u64);
            if let Some(old) = self.giving.grow_old(ticks) {
                self.replica.log().offer(None);
                self.discard(Discarded::Offer(old));
            }
        }
        self.leave_in_time(ticks);
        self.replica.applied(self.status.applied());
        if self.status.rules_alone() {
            self.replica.cut(self.status.applied()); // Nobody will ask for it; whoever comes gets a copy of the database.
        }
        while self.accepted.is_none()
            && let Some(turn) = self.replica.turn()
        {
            self.carry_out(turn, &mut handoff);
        }
        for (read, error) in self.replica.take_refused_reads() {
            read(Err(error));
        }
        handoff.dropped = self.replica.take_dropped_proposals();
        if self.accepted.is_none() {
            self.turn_down();
        }
        if self.begins_to_rule_alone() {
            self.status.set_rules_alone(true);
        }
        if self.replica.log().take_wants_offer() && self.giving.ask() {
            let _ = self.keeper.send(Chore::CopyWanted);
        }
        self.status.set_term(self.replica.term());
        self.status.set_committed(self.replica.committed());
        if !handoff.is_empty() {
            let _ = self.applier.send(handoff); // A closed applier means that everything stops.
        }
    }

    /// How many ticks have become due; moves the next one on.
    pub fn ticks_due(&self, next_tick: &mut Instant) -> u32 {
        let now = Instant::now();
        let mut due = 0;
        while *next_tick <= now {
            *next_tick += self.tick;
            due += 1;
        }
        due.min(LATE_TICKS)
    }

    /// A leader knows everything that was ever acknowledged, but after a restart the database is behind the log. An entry of
    /// the leader's own term comes after all that others, or an earlier life of this member, have acknowledged; what it
    /// committed since, others may have acknowledged who were removed a moment ago. Nobody else may acknowledge anything from
    /// then on: a learner that is quicker to apply what its client wanted would.
    fn begins_to_rule_alone(&self) -> bool {
        !self.status.rules_alone()
            && self.replica.leadership().is_self
            && self.status.applied_term() == self.replica.term()
            && self.status.applied() >= self.replica.committed()
            && self.replica.is_alone()
    }

    fn hear(&mut self, input: Input, handoff: &mut Handoff) {
        match input {
            Input::Propose { id, data, waiter } => {
                self.replica.propose(data);
                handoff.waiters.push((id, waiter));
            }
            Input::ProposeInTerm { term, id, data, waiter } => {
                self.replica.propose_in_term(term, id, data);
                handoff.waiters.push((id, waiter));
            }
            Input::Change { id, change, waiter } => {
                self.replica.propose_change(&change);
                handoff.waiters.push((id, waiter));
            }
            Input::Read(waiter) | Input::ConfirmLeadership(waiter) => self.replica.read(waiter),
            Input::CatchUp(waiter) => handoff.catch_up.push((self.replica.committed(), waiter)),
            Input::Progress(waiter) => waiter(self.replica.progress()),
            Input::Transfer(to) => self.replica.transfer_leader(to),
            Input::Messages(messages) => messages.into_iter().for_each(|message| self.step(message)),
            Input::Reachable(member) => self.replica.reachable(member),
            Input::Unreachable(member) => self.replica.unreachable(member),
            Input::Lost(member) => self.replica.lost(member),
            Input::Hurry => self.replica.hurry(self.election_ticks.saturating_sub(2)),
            Input::Persisted(number) => self.replica.persisted(number),
            Input::Durable(at) => self.cut(at),
            Input::Changed(changed) => self.follow_in_time(changed),
            Input::Offer(None) => self.giving.failed(),
            Input::Offer(Some(offer)) => {
                self.replica.log().offer(Some((offer.at, offer.conf_state.clone())));
                self.replica.log().take_wants_offer(); // Whoever asked while it was made is served.
                if let Some(old) = self.giving.offer(offer) {
                    self.discard(Discarded::Offer(old));
                }
            }
            Input::SnapshotSent { to, arrived } => {
                self.giving.ended(to);
                self.replica.snapshot_sent(to, arrived);
            }
            Input::SnapshotAnnounced { message, answer } => answer(self.replica.judge_snapshot(&message)),
            Input::Snapshot { message, incoming, done } => {
                let index = message.get_snapshot().get_metadata().index;
                self.turn_down(); // A later one is worth more.
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

    /// Raft did not want the snapshot that has come: its log says as much by itself, or another leader is followed.
    fn turn_down(&mut self) {
        if let Some(Arrived { incoming, done, .. }) = self.arrived.take() {
            self.discard(Discarded::Incoming(incoming));
            done(false);
        }
    }

    /// A leader that is removed stays for as long as an election takes, unless it is known sooner that the others know. Only
    /// then is the change answered: the answer may be taken to mean that this member is not needed any more.
    fn follow_in_time(&mut self, changed: Changed) {
        self.leave();
        if self.replica.must_tell_others(changed.index, changed.change.as_ref()) {
            self.leaving = Some((changed, self.election_ticks));
        } else {
            self.follow(changed);
        }
    }

    /// Follows the change that removes this member, if that waits.
    fn leave(&mut self) {
        if let Some((changed, _)) = self.leaving.take() {
            self.follow(changed);
        }
    }

    /// Leaves when the time is over, or the others know.
    fn leave_in_time(&mut self, ticks: u32) {
        let Some((changed, left)) = &mut self.leaving else { return };
        *left = left.saturating_sub(u64::from(ticks));
        if *left == 0 || !self.replica.must_tell_others(changed.index, changed.change.as_ref()) {
            self.leave();
        }
    }

    /// Removing files takes time, which this thread has not.
    fn discard(&self, copy: Discarded) {
        let _ = self.keeper.send(Chore::Discard(copy));
    }

    /// Raft follows a change of the members that is in the database.
    fn follow(&mut self, changed: Changed) {
        if changed.change.is_some() {
            self.status.set_rules_alone(false);
        }
        let voted = self.conf_names_us();
        let is_needed = !self.replica.others_remember(changed.index);
        let conf_state = self.replica.follow_change(changed.index, changed.change.as_ref());
        if let Some(conf_state) = conf_state.filter(|_| changed.change.is_some()) {
            assert_eq!(
                sorted(conf_state),
                sorted(changed.conf_state),
                "raft and the table agree on who the members are"
            );
        }
        if let Some(done) = changed.done {
            done();
        }
        if !voted || self.conf_names_us() {
            return;
        }
        let member = format!("{:x}", self.id);
        if is_needed {
            // It follows no longer, but it votes, and tells what is agreed, for as long as it runs.
            tracing::warn!(
                "local-member-id" = member,
                "this member has been removed from the cluster, but the other members may not know it yet, and may need its \
                 vote: it goes on until one of them says that it was removed"
            );
            return;
        }
        tracing::warn!(
            "local-member-id" = member,
            "this member has been permanently removed from the cluster; its data directory is of no use any more: delete it"
        );
        (self.farewell)();
    }

    fn conf_names_us(&self) -> bool {
        let ConfState { voters, learners, .. } = self.replica.conf_state();
        voters.contains(&self.id) || learners.contains(&self.id)
    }

    fn carry_out(&mut self, turn: Turn<ReadWaiter>, handoff: &mut Handoff) {
        if let Some(leadership) = turn.leadership {
            tracing::info!(
                "local-member-id" = format_args!("{:x}", self.id),
                leader = format_args!("{:x}", leadership.leader),
                term = self.replica.term(),
                "leader changed"
            );
            self.status.set_leader(leadership.leader);
            self.status.set_reign(if leadership.is_self { leadership.term } else { 0 });
            self.status.set_rules_alone(false);
            handoff.leadership = Some(leadership);
        }
        if !turn.messages.is_empty() {
            self.giving.note(&turn.messages);
            self.post.send(turn.messages);
        }
        handoff.entries.extend(turn.committed);
        let applied = self.status.applied();
        for (index, reads) in turn.reads {
            if index <= applied {
                for read in reads {
                    read(Ok(()));
                }
            } else {
                handoff.reads.push((index, reads));
            }
        }
        if let Some(install) = turn.install {
            self.accepted = Some(Accepted { install, write: turn.write });
        } else if let Some(write) = turn.write {
            let _ = self.log.send(LogTask::Write(write));
        }
    }

    /// Drops from memory and disk what neither a restart nor a member that is behind needs any more.
    fn cut(&mut self, durable: Position) {
        let mut cut = durable;
        if !self.status.rules_alone() {
            let mut kept_from = durable.index;
            if self.replica.log_bytes() <= self.laggard_log_bytes {
                let catchup = self.status.applied().saturating_sub(self.catchup_entries);
                let needed = self.replica.needed_by_followers().into_iter().chain(self.giving.pins());
                kept_from = needed.fold(catchup.min(kept_from), u64::min);
            }
            if self.replica.position(kept_from).is_none() {
                return;
            }
            cut = self.replica.cut(kept_from);
        }
        METRICS.log_first_index.set(i64::try_from(cut.index + 1).unwrap_or(i64::MAX));
        let _ = self.log.send(LogTask::Cut(cut));
    }
}

fn sorted(mut conf_state: ConfState) -> ConfState {
    conf_state.voters.sort_unstable();
    conf_state.learners.sort_unstable();
    conf_state
}
