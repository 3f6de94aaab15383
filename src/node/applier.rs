//! The apply thread: committed entries in; answers, events and the applied index out.
//!
//! All that is waiting becomes one batch of the database. Then, in this order: the database is written, events can be
//! delivered, the head is published, the timekeeper hears of leases, waiters are answered. So no answer precedes its write,
//! no event becomes deliverable later than its revision becomes readable, and nobody who was answered can fail to read his
//! own write or to renew his own lease.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, EntryType};

use super::{
    Stores,
    driver::{Changed, Input},
    inbox::Inbox,
    keeper::Chore,
    peers::{Peer, Post},
    replica::Leadership,
    room::Room,
    snapshot::conf_state,
    status::Status,
    timekeeper::Timekeeper,
    waiters::{Hopes, ProposalWaiter, ReadWaiter, Waiters},
};
use crate::{
    error::{Error, Halt},
    metrics::METRICS,
    state::{self, Applied, Effect, Machine},
    watch::Publisher,
};

/// A batch takes no more entries than this, or bytes.
const BATCH_MAX_ENTRIES: usize = 1024;
const BATCH_MAX_BYTES: usize = 1 << 20;

/// What the raft thread hands over in one turn.
#[derive(Default)]
pub struct Handoff {
    /// Who waits for entries that may come.
    pub waiters: Vec<(u64, ProposalWaiter)>,
    /// Proposals that will not come, because the term to which they were bound is over: the IDs inside their entries.
    pub dropped: Vec<u64>,
    /// Entries to apply, in order.
    pub entries: Vec<raft::eraftpb::Entry>,
    /// Reads, and the index each of them waits for.
    pub reads: Vec<(u64, Vec<ReadWaiter>)>,
    /// Those who wait for what was committed when they came, by its index.
    pub catch_up: Vec<(u64, ReadWaiter)>,
    /// Who leads now, if that changed.
    pub leadership: Option<Leadership>,
    /// Whether time went by.
    pub expire: bool,
}

impl Handoff {
    /// Whether there is nothing to hand over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiters.is_empty()
            && self.dropped.is_empty()
            && self.entries.is_empty()
            && self.reads.is_empty()
            && self.catch_up.is_empty()
            && self.leadership.is_none()
            && !self.expire
    }
}

/// The apply thread's belongings.
pub struct Applier {
    /// The state that it writes.
    pub machine: Machine,
    /// Who waits.
    pub waiters: Waiters,
    /// Where events go.
    pub publisher: Publisher,
    /// What everybody may know.
    pub status: Arc<Status>,
    /// What readers read.
    pub stores: Arc<ArcSwap<Stores>>,
    /// The raft thread's ear.
    pub raft: Arc<Inbox<Input>>,
    /// Who has to know who the members are.
    pub post: Arc<dyn Post>,
    /// This member's ID.
    pub id: u64,
    /// Who looks after space and time: compactions, leases, alarms.
    pub keeper: Arc<Inbox<Chore>>,
    /// Who knows when leases end.
    pub timekeeper: Arc<Timekeeper>,
    /// The term that this member leads, until its first entry is applied.
    pub rising: Option<u64>,
    /// Why a proposal may have come to nothing.
    pub hopes: Hopes,
    /// Who knows whether a write was one too many for this member's disk.
    pub room: Arc<Room>,
    /// A batch that takes longer is worth a line in the log.
    pub slow: Duration,
}

/// The size that this member's database may have.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// Bytes; zero or less is no bound.
    pub bytes: i64,
}

impl Quota {
    /// Whether something of this cost still fits.
    #[must_use]
    pub fn admits(&self, cost: u64, total_bytes: i64) -> bool {
        cost == 0 || self.bytes <= 0 || total_bytes.saturating_add_unsigned(cost) < self.bytes
    }
}

impl Applier {
    /// Runs until the inbox is closed; returns why this node cannot go on, if so.
    pub fn run(&mut self, inbox: &Inbox<Handoff>) -> Result<(), Halt> {
        let mut handoffs = Vec::new();
        while inbox.receive(&mut handoffs, None) {
            self.take(&mut handoffs, Instant::now())?;
        }
        Ok(())
    }

    /// Another state takes the place of the one that was written so far: a later one of the same history.
    pub fn restore(&mut self, machine: Machine) {
        let applied = machine.applied();
        let readers = machine.readers();
        tracing::info!(revision = applied.head, index = applied.index, "restored the key space from a snapshot");
        self.timekeeper.demote();
        let engine = machine.engine().clone();
        let keys = machine.shared().clone();
        self.publisher.restore(readers.keys.clone());
        self.stores.store(Arc::new(Stores { readers, engine: engine.clone() }));
        std::mem::replace(&mut self.machine, machine).engine().retire();
        let _ = self.keeper.send(Chore::Restored { engine, keys });
        self.status.set_applied(applied.index, applied.term);
        self.tell_peers();
        self.waiters.open_reads(applied.index);
    }

    /// Tells the transport who the members are, and everybody here what this one is.
    pub fn tell_peers(&self) {
        let members = self.machine.members();
        self.status.set_is_learner(members.get(self.id).is_some_and(|member| member.is_learner));
        let peers = members.iter().map(|member| Peer { id: member.id, urls: member.peer_ur_ls.clone() });
        self.post.set_peers(peers.collect(), members.removed().collect());
    }

    /// Applies everything that was handed over. `now` only says whose patience is at its end.
    pub fn take(&mut self, handoffs: &mut Vec<Handoff>, now: Instant) -> Result<(), Halt> {
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
                self.follow(leadership, now);
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
            self.waiters.wait_briefly_for(index, waiter, now);
        }
        self.waiters.open_reads(self.machine.applied().index);
        if expire {
            let (hopes, status) = (&self.hopes, &self.status);
            let members = self.machine.members();
            self.waiters.expire(now, |since| hopes.why_in_vain(since, status.leader(), members));
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
            self.tell_peers();
        }
        let applied = self.machine.applied();
        self.status.set_applied(applied.index, applied.term);
        self.timekeeper.note(&published.effects);
        self.rise(applied.term);
        if let Some(change) = change {
            self.have_followed(applied.index, change, outcomes);
        } else {
            self.answer(outcomes);
        }
        if has_events {
            self.publisher.wake();
        }
        self.note(published.effects);
        let took = started.elapsed();
        if took > self.slow {
            METRICS.slow_applies.inc();
            tracing::warn!(entries = batch.len(), took = ?took, "apply request took too long");
        }
        Ok(())
    }

    fn follow(&mut self, leadership: Leadership, now: Instant) {
        self.hopes.follow(leadership, now);
        self.rising = leadership.is_self.then_some(leadership.term);
        self.timekeeper.demote(); // A new term of the same leader starts over, too.
        let _ = self.keeper.send(Chore::Leadership(leadership));
    }

    /// Leads, once an entry of the own term is applied: nothing of earlier terms is missing then.
    fn rise(&mut self, applied_term: u64) {
        if let Some(term) = self.rising.take_if(|term| *term <= applied_term) {
            self.timekeeper.promote(self.machine.readers().leases.all(), term);
        }
    }

    /// Has raft follow a change of the members, which is alone in its batch. Who waits for it is answered after that: a next
    /// change would not be taken before.
    fn have_followed(&mut self, index: u64, change: ConfChange, mut outcomes: Vec<Applied>) {
        let Applied { id, outcome, .. } = outcomes.pop().expect("a change is a batch of its own");
        let change = outcome.is_ok().then_some(change);
        let done = self.waiters.take(id).map(|waiter| Box::new(move || waiter(outcome)) as Box<dyn FnOnce() + Send>);
        let conf_state = conf_state(&self.machine.members().electorate());
        let _ = self.raft.send(Input::Changed(Changed { index, change, conf_state, done }));
    }

    fn answer(&mut self, outcomes: Vec<Applied>) {
        let mut too_many = None;
        for Applied { id, cost, outcome } in outcomes {
            let waiter = self.waiters.take(id);
            if !self.room.charge(cost) {
                too_many.get_or_insert_with(Vec::new).extend(waiter);
            } else if let Some(waiter) = waiter {
                waiter(outcome);
            }
        }
        if let Some(waiters) = too_many {
            self.room.turn_away(waiters);
        }
    }

    fn note(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                // The timekeeper's, and the transport's; what alarms stand is read when it matters.
                Effect::LeaseGranted { .. }
                | Effect::LeaseRevoked { .. }
                | Effect::MembersChanged
                | Effect::AlarmsChanged => (),
                Effect::CompactionScheduled { .. } => {
                    let _ = self.keeper.send(Chore::Effect(effect));
                }
            }
        }
    }
}

fn read_change(entry: &raft::eraftpb::Entry) -> Result<ConfChange, Halt> {
    let unreadable =
        |error| Halt::Refused(format!("entry {} changes the members, but cannot be read: {error}", entry.index));
    ConfChange::parse_from_carllerche_bytes(&entry.data).map_err(unreadable)
}

/// How many entries the next batch takes. A change of the members is a batch of its own.
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
