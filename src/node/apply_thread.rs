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
    messages::{BackgroundTask, ChangeApplied, Handoff, Input, MessageSender, Peer, Proposed},
    quota::QuotaEnforcer,
    replica::Leadership,
    simple_tokens::SimpleTokens,
    snapshot::conf_state,
    status::Status,
    waiters::{Pending, TimeoutCause, Waiters},
};
use crate::{
    error::{Error, Halt},
    metrics::{METRICS, sharded::OperationDurations},
    slow_log::{Slow, Thresholds, request_text},
    state::{self, Applied, Command, Effect, Machine, OperationCounts},
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
    /// What takes longer is logged.
    pub thresholds: Thresholds,
    pub durations: Durations,
}

/// What is measured of each entry.
pub struct Durations {
    apply: OperationDurations,
    /// From the proposal to the outcome.
    requests: OperationDurations,
}

impl Default for Durations {
    fn default() -> Self {
        Self {
            apply: OperationDurations::new(METRICS.apply_seconds.clone(), &["v3"]),
            requests: OperationDurations::new(METRICS.request_seconds.clone(), &[]),
        }
    }
}

/// The times of a batch of entries.
struct BatchTimes {
    /// When the raft thread found the first of its entries committed.
    committed: Instant,
    started: Instant,
    /// When all entries were applied, and the write of the database began.
    applied: Instant,
    written: Instant,
}

impl BatchTimes {
    /// How long an entry waited in queues, of the raft and the apply thread, and until it was written, synced and committed.
    fn wait_parts(&self, proposed_at: Instant, since: Instant) -> (Duration, Duration) {
        let queue =
            proposed_at.saturating_duration_since(since) + self.started.saturating_duration_since(self.committed);
        (queue, self.committed.saturating_duration_since(proposed_at))
    }
}

/// Measures the entries of a batch. The clock is read after each of them, but for a put that another put follows: puts take so
/// little that reading the clock would be a part of it, so those that follow one another are measured together.
struct Stopwatch {
    /// When the current run of entries began, and how many of them have succeeded and failed.
    since: Instant,
    succeeded: u32,
    failed: u32,
    /// The position of an entry in the batch, of those that took longest, and how long each of them took.
    slowest: (usize, Duration),
}

impl Stopwatch {
    fn start(now: Instant) -> Self {
        Self { since: now, succeeded: 0, failed: 0, slowest: (0, Duration::ZERO) }
    }

    /// The entry at this position in the batch has been applied.
    fn applied(&mut self, nth: usize, applied: &Applied, batch: &[raft::eraftpb::Entry], to: &mut OperationDurations) {
        *(if applied.outcome.is_ok() { &mut self.succeeded } else { &mut self.failed }) += 1;
        if applied.operation == "Put" && batch.get(nth + 1).is_some_and(|next| Command::is_put(&next.data)) {
            return;
        }
        let now = Instant::now();
        let each = now.saturating_duration_since(self.since) / (self.succeeded + self.failed);
        (0..self.succeeded).for_each(|_| to.observe(applied.operation, true, each));
        (0..self.failed).for_each(|_| to.observe(applied.operation, false, each));
        if each > self.slowest.1 {
            self.slowest = (nth, each);
        }
        *self = Self { since: now, succeeded: 0, failed: 0, ..*self };
    }
}

fn count(counts: OperationCounts) {
    let OperationCounts { puts, put_bytes, deletes, ranges, txns } = counts;
    for (counter, number) in
        [(&METRICS.puts, puts), (&METRICS.deletes, deletes), (&METRICS.ranges, ranges), (&METRICS.txns, txns)]
    {
        if number > 0 {
            counter.inc_by(number);
        }
    }
    if put_bytes > 0 {
        METRICS.put_bytes.add(i64::try_from(put_bytes).unwrap_or(i64::MAX));
    }
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
        let (mut expire, mut committed) = (false, None);
        for handoff in handoffs.drain(..) {
            for Proposed { id, since, waiter } in handoff.proposed {
                self.waiters.wait(id, Pending { waiter, since, proposed_at: handoff.at }, now);
            }
            for pending in handoff.dropped.into_iter().filter_map(|id| self.waiters.take(id)) {
                (pending.waiter)(Err(Error::NotPrimary));
            }
            if !handoff.entries.is_empty() {
                committed.get_or_insert(handoff.at);
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
            self.apply(batch, committed.unwrap_or(now))?;
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

    /// Applies a batch whose first entry was committed at that time.
    fn apply(&mut self, batch: &[raft::eraftpb::Entry], committed: Instant) -> Result<(), Halt> {
        let started = Instant::now();
        let mut stopwatch = Stopwatch::start(started);
        let mut outcomes = Vec::with_capacity(batch.len());
        let mut change = None;
        for (nth, entry) in batch.iter().enumerate() {
            let (index, term) = (entry.index, entry.term);
            let data = match entry.entry_type {
                EntryType::EntryNormal => entry.data.clone(),
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                    change.insert(read_change(entry)?).context.clone()
                }
            };
            let changes_members = change.is_some();
            outcomes.push(self.machine.apply(&state::Entry { index, term, data, changes_members })?);
            stopwatch.applied(nth, &outcomes[nth], batch, &mut self.durations.apply);
        }
        let applied_at = stopwatch.since;
        let published = self.machine.commit()?;
        let times = BatchTimes { committed, started, applied: applied_at, written: Instant::now() };
        METRICS.backend_commit.observe((times.written - times.applied).as_secs_f64());
        #[allow(clippy::cast_precision_loss, reason = "a batch is small")]
        METRICS.apply_batches.observe(batch.len() as f64);
        count(published.counts);
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
            self.answer(batch, outcomes, &times, stopwatch.slowest);
        }
        if has_events {
            self.publisher.wake();
        }
        self.dispatch(published.effects);
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
        let pending = self.waiters.take(id);
        let done = pending.map(|pending| Box::new(move || (pending.waiter)(outcome)) as Box<dyn FnOnce() + Send>);
        let conf_state = conf_state(&self.machine.members().voters_and_learners());
        let _ = self.raft.send(Input::ChangeApplied(ChangeApplied { index, change, conf_state, done }));
    }

    fn answer(
        &mut self,
        batch: &[raft::eraftpb::Entry],
        outcomes: Vec<Applied>,
        times: &BatchTimes,
        slowest: (usize, Duration),
    ) {
        let is_slow = times.written - times.started > self.thresholds.apply;
        let mut too_many = None;
        for (nth, Applied { id, cost, operation, outcome }) in outcomes.into_iter().enumerate() {
            let pending = self.waiters.take(id);
            if is_slow && nth == slowest.0 {
                self.warn_of_slow_batch(batch, times, slowest, &outcome, pending.as_ref());
            }
            let Some(Pending { waiter, since, proposed_at }) = pending else {
                if !self.quota.charge(cost) {
                    too_many.get_or_insert_with(Vec::new);
                }
                continue;
            };
            let waited = times.started.saturating_duration_since(since);
            self.durations.requests.observe(operation, outcome.is_ok(), times.written.saturating_duration_since(since));
            if waited > self.thresholds.call {
                self.warn_of_wait(&batch[nth], waited, times, proposed_at, since);
            }
            if self.quota.charge(cost) {
                waiter(outcome);
            } else {
                too_many.get_or_insert_with(Vec::new).push(waiter);
            }
        }
        if let Some(waiters) = too_many {
            self.quota.raise_no_space(waiters);
        }
    }

    /// Logs a batch that took too long, with the entry in it that took longest.
    fn warn_of_slow_batch(
        &self,
        batch: &[raft::eraftpb::Entry],
        times: &BatchTimes,
        (nth, apply): (usize, Duration),
        outcome: &Result<state::Response, Error>,
        pending: Option<&Pending>,
    ) {
        METRICS.slow_applies.inc();
        let Some(suppressed) = Slow::Apply.count(times.written) else { return };
        // Only the member that has proposed it knows these.
        let (queue, log) = pending.map(|pending| times.wait_parts(pending.proposed_at, pending.since)).unzip();
        let response = outcome.as_ref().map_or_else(Error::to_string, |found| format!("size:{}", found.body.len()));
        tracing::warn!(
            {
                took = ?(times.written - times.started),
                "expected-duration" = ?self.thresholds.apply,
                prefix = "",
                request = request_text::entry(&batch[nth].data),
                response,
                entries = batch.len(),
                queue = ?queue.unwrap_or_default(),
                log = ?log.unwrap_or_default(),
                apply = ?apply,
                commit = ?(times.written - times.applied),
                suppressed
            },
            "apply request took too long"
        );
    }

    /// Logs a proposal that took too long to be committed.
    fn warn_of_wait(
        &self,
        entry: &raft::eraftpb::Entry,
        waited: Duration,
        times: &BatchTimes,
        proposed_at: Instant,
        since: Instant,
    ) {
        let Some(suppressed) = Slow::Wait.count(times.written) else { return };
        let (queue, log) = times.wait_parts(proposed_at, since);
        tracing::warn!(
            {
                took = ?waited,
                "expected-duration" = ?self.thresholds.call,
                request = request_text::entry(&entry.data),
                queue = ?queue,
                log = ?log,
                suppressed
            },
            "request waited too long before it was applied"
        );
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
