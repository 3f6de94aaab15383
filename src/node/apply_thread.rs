//! The apply thread: committed entries in; answers, events and the applied index out.
//!
//! All waiting entries become one batch of the database. Then, in this order: the database is written, events become
//! deliverable, the head revision is published, lease expiry is told of leases, waiters are answered. So no answer precedes
//! its write, no event becomes deliverable later than its revision becomes readable, and a client that was answered can read
//! its own write and renew its own lease.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, EntryType};

use super::{
    Stores,
    inbox::Inbox,
    lease_expiry::LeaseExpiry,
    messages::{BackgroundTask, ChangeApplied, Handoff, Input, MessageSender, Peer},
    quota::QuotaEnforcer,
    replica::Leadership,
    simple_tokens::SimpleTokens,
    snapshot::conf_state,
    status::Status,
    waiters::{TimeoutCause, Waiters},
};
use crate::{
    error::{Error, Halt},
    metrics::METRICS,
    state::{self, Applied, Effect, Machine},
    watch::Publisher,
};

/// Limits of a batch.
const BATCH_MAX_ENTRIES: usize = 1024;
const BATCH_MAX_BYTES: usize = 1 << 20;

/// The apply thread's state.
pub struct ApplyThread {
    /// The replicated state.
    pub machine: Machine,
    /// Requests that wait for an entry or an index.
    pub waiters: Waiters,
    /// Receives the events of applied entries, for watchers.
    pub publisher: Publisher,
    pub status: Arc<Status>,
    /// The current readers; replaced when a snapshot is installed.
    pub stores: Arc<ArcSwap<Stores>>,
    /// The raft thread's inbox.
    pub raft: Arc<Inbox<Input>>,
    /// The transport, which has to know the members.
    pub message_sender: Arc<dyn MessageSender>,
    /// This member's ID.
    pub id: u64,
    /// The background thread's inbox.
    pub background: Arc<Inbox<BackgroundTask>>,
    /// Tracks the deadlines of leases.
    pub lease_expiry: Arc<LeaseExpiry>,
    /// The term in which this member leads, until the first entry of that term is applied.
    pub unconfirmed_term: Option<u64>,
    /// Finds the error for proposals that time out.
    pub timeout_cause: TimeoutCause,
    /// The tokens of users that have logged in.
    pub tokens: Arc<SimpleTokens>,
    /// Checks writes against this member's quota.
    pub quota: Arc<QuotaEnforcer>,
    /// A batch that takes longer is logged.
    pub slow: Duration,
}

impl ApplyThread {
    /// Runs until the inbox is closed. An error is fatal to the node.
    pub fn run(&mut self, inbox: &Inbox<Handoff>) -> Result<(), Halt> {
        let mut handoffs = Vec::new();
        while inbox.receive(&mut handoffs, None) {
            self.process(&mut handoffs, Instant::now())?;
        }
        Ok(())
    }

    /// Replaces the state with that of an installed snapshot, which is a later state of the same history.
    pub fn restore(&mut self, machine: Machine) {
        let applied = machine.applied();
        let readers = machine.readers();
        tracing::info!(revision = applied.head, index = applied.index, "restored the key space from a snapshot");
        self.lease_expiry.demote();
        // It is not known which of them the entries that the snapshot stands for have revoked.
        self.tokens.clear();
        let engine = machine.engine().clone();
        let keys = machine.shared().clone();
        self.publisher.restore(readers.keys.clone());
        self.stores.store(Arc::new(Stores { readers, engine: engine.clone() }));
        std::mem::replace(&mut self.machine, machine).engine().delete_on_drop();
        let _ = self.background.send(BackgroundTask::Restored { engine, keys });
        self.status.set_applied(applied.index, applied.term);
        self.publish_members();
        self.waiters.release_reads(applied.index);
    }

    /// Tells the transport the members when the node starts. A member that joins has no member list yet, but `contacts`.
    pub fn publish_first_members(&self, contacts: Vec<Peer>) {
        if self.machine.members().iter().next().is_some() {
            self.publish_members();
        } else {
            self.message_sender.set_peers(contacts, Vec::new());
        }
    }

    /// Tells the transport the members, and sets in the status whether this member is a learner.
    fn publish_members(&self) {
        let members = self.machine.members();
        self.status.set_is_learner(members.get(self.id).is_some_and(|member| member.is_learner));
        self.status.set_capability_level(self.machine.capability_level());
        let peers = members.iter().map(|member| Peer { id: member.id, urls: member.peer_ur_ls.clone() });
        self.message_sender.set_peers(peers.collect(), members.removed().collect());
    }

    /// Applies everything that was handed over. `now` is only used for timeouts of waiters.
    pub fn process(&mut self, handoffs: &mut Vec<Handoff>, now: Instant) -> Result<(), Halt> {
        let mut entries = Vec::new();
        let mut reads = Vec::new();
        let mut catch_up = Vec::new();
        let mut expire = false;
        for handoff in handoffs.drain(..) {
            for (id, waiter) in handoff.waiters {
                self.waiters.wait(id, waiter, now);
            }
            for waiter in handoff.dropped.into_iter().filter_map(|id| self.waiters.take(id)) {
                waiter(Err(Error::NotPrimary));
            }
            entries.extend(handoff.entries);
            reads.extend(handoff.reads);
            catch_up.extend(handoff.catch_up);
            expire |= handoff.expire;
            if let Some(leadership) = handoff.leadership {
                self.leadership_changed(leadership, now);
            }
        }
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let (batch, later) = rest.split_at(batch_len(rest));
            self.apply(batch)?;
            rest = later;
        }
        for (index, reads) in reads {
            self.waiters.wait_for(index, reads, now);
        }
        for (index, waiter) in catch_up {
            self.waiters.wait_to_catch_up(index, waiter, now);
        }
        self.waiters.release_reads(self.machine.applied().index);
        if expire {
            let (timeout_cause, status) = (&self.timeout_cause, &self.status);
            let members = self.machine.members();
            self.waiters.expire(now, |since| timeout_cause.error_for(since, status.leader(), members));
            METRICS.proposals_pending.set(i64::try_from(self.waiters.pending()).unwrap_or(i64::MAX));
        }
        Ok(())
    }

    fn apply(&mut self, batch: &[raft::eraftpb::Entry]) -> Result<(), Halt> {
        let started = Instant::now();
        let mut outcomes = Vec::with_capacity(batch.len());
        let mut change = None;
        for entry in batch {
            let (index, term) = (entry.index, entry.term);
            let data = match entry.entry_type {
                EntryType::EntryNormal => entry.data.clone(),
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                    change.insert(read_change(entry)?).context.clone()
                }
            };
            let changes_members = change.is_some();
            outcomes.push(self.machine.apply(&state::Entry { index, term, data, changes_members })?);
        }
        let commit = Instant::now();
        let published = self.machine.commit()?;
        METRICS.backend_commit.observe(commit.elapsed().as_secs_f64());
        let has_events = !published.events.is_empty();
        self.publisher.append(published.events, published.head);
        self.machine.publish_head();
        if published.effects.contains(&Effect::MembersChanged) {
            self.publish_members();
        }
        let applied = self.machine.applied();
        self.status.set_applied(applied.index, applied.term);
        self.lease_expiry.note(&published.effects);
        self.tokens.note(&published.effects);
        self.promote_if_due(applied.term);
        if let Some(change) = change {
            self.finish_change(applied.index, change, outcomes);
        } else {
            self.answer(outcomes);
        }
        if has_events {
            self.publisher.wake();
        }
        self.dispatch(published.effects);
        let took = started.elapsed();
        if took > self.slow {
            METRICS.slow_applies.inc();
            tracing::warn!(entries = batch.len(), took = ?took, "apply request took too long");
        }
        Ok(())
    }

    fn leadership_changed(&mut self, leadership: Leadership, now: Instant) {
        self.timeout_cause.leadership_changed(leadership, now);
        self.unconfirmed_term = leadership.is_self.then_some(leadership.term);
        self.lease_expiry.demote(); // A new term of the same leader resets the deadlines, too.
        let _ = self.background.send(BackgroundTask::Leadership(leadership));
    }

    /// Starts to track lease deadlines once an entry of this leader's own term is applied: then all entries of earlier terms are.
    fn promote_if_due(&mut self, applied_term: u64) {
        if let Some(term) = self.unconfirmed_term.take_if(|term| *term <= applied_term) {
            self.lease_expiry.promote(self.machine.readers().leases.all(), term);
        }
    }

    /// Has raft apply a membership change, which is a batch of its own. The change is answered after that, because raft would not
    /// accept another change before.
    fn finish_change(&mut self, index: u64, change: ConfChange, mut outcomes: Vec<Applied>) {
        let Applied { id, outcome, .. } = outcomes.pop().expect("a membership change is a batch of its own");
        let change = outcome.is_ok().then_some(change);
        let done = self.waiters.take(id).map(|waiter| Box::new(move || waiter(outcome)) as Box<dyn FnOnce() + Send>);
        let conf_state = conf_state(&self.machine.members().voters_and_learners());
        let _ = self.raft.send(Input::ChangeApplied(ChangeApplied { index, change, conf_state, done }));
    }

    fn answer(&mut self, outcomes: Vec<Applied>) {
        let mut too_many = None;
        for Applied { id, cost, outcome } in outcomes {
            let waiter = self.waiters.take(id);
            if !self.quota.charge(cost) {
                too_many.get_or_insert_with(Vec::new).extend(waiter);
            } else if let Some(waiter) = waiter {
                waiter(outcome);
            }
        }
        if let Some(waiters) = too_many {
            self.quota.raise_no_space(waiters);
        }
    }

    fn dispatch(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::MemberStarted { id, level } if id != self.id && level > 0 => self.status.note_started_member(),
                // Handled by lease expiry, the transport and the tokens. Active alarms are read from the state when they matter.
                Effect::LeaseGranted { .. }
                | Effect::LeaseRevoked { .. }
                | Effect::MembersChanged
                | Effect::AlarmsChanged
                | Effect::MemberStarted { .. }
                | Effect::Tokens(_) => (),
                Effect::CompactionScheduled { .. } => {
                    let _ = self.background.send(BackgroundTask::Effect(effect));
                }
            }
        }
    }
}

fn read_change(entry: &raft::eraftpb::Entry) -> Result<ConfChange, Halt> {
    let unreadable =
        |error| Halt::InvalidData(format!("cannot decode the membership change in log entry {}: {error}", entry.index));
    ConfChange::parse_from_carllerche_bytes(&entry.data).map_err(unreadable)
}

/// How many entries the next batch takes. A membership change is a batch of its own.
fn batch_len(entries: &[raft::eraftpb::Entry]) -> usize {
    let is_change = |entry: &raft::eraftpb::Entry| entry.entry_type != EntryType::EntryNormal;
    if entries.first().is_some_and(is_change) {
        return 1;
    }
    let mut bytes = 0;
    let fits = entries.iter().take(BATCH_MAX_ENTRIES).take_while(|entry| {
        let first = bytes == 0;
        bytes += entry.data.len().max(1);
        !is_change(entry) && (first || bytes <= BATCH_MAX_BYTES)
    });
    fits.count()
}
