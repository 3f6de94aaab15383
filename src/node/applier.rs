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

use raft::eraftpb::EntryType;

use super::{
    inbox::Inbox,
    keeper::Chore,
    replica::Leadership,
    room::Room,
    status::Status,
    timekeeper::Timekeeper,
    waiters::{ProposalWaiter, ReadWaiter, Waiters},
};
use crate::{
    error::Halt,
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
    /// Who looks after space and time: compactions, leases, alarms.
    pub keeper: Arc<Inbox<Chore>>,
    /// Who knows when leases end.
    pub timekeeper: Arc<Timekeeper>,
    /// The term that this member leads, until its first entry is applied.
    pub rising: Option<u64>,
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
    /// Runs until the inbox is closed; returns the machine, or why this node cannot go on.
    pub fn run(mut self, inbox: &Inbox<Handoff>) -> Result<Machine, Halt> {
        let mut handoffs = Vec::new();
        while inbox.receive(&mut handoffs, None) {
            self.take(&mut handoffs, Instant::now())?;
        }
        self.waiters.stop();
        Ok(self.machine)
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
            entries.extend(handoff.entries);
            reads.extend(handoff.reads);
            catch_up.extend(handoff.catch_up);
            expire |= handoff.expire;
            if let Some(leadership) = handoff.leadership {
                self.follow(leadership);
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
            self.waiters.expire(now, self.status.leader() != 0);
            METRICS.proposals_pending.set(i64::try_from(self.waiters.pending()).unwrap_or(i64::MAX));
        }
        Ok(())
    }

    fn apply(&mut self, batch: &[raft::eraftpb::Entry]) -> Result<(), Halt> {
        let started = Instant::now();
        let mut outcomes = Vec::with_capacity(batch.len());
        for entry in batch {
            if entry.entry_type != EntryType::EntryNormal {
                let text = format!("entry {} changes the members, which this version does not do yet", entry.index);
                return Err(Halt::Refused(text));
            }
            let entry = state::Entry { index: entry.index, term: entry.term, data: entry.data.clone() };
            outcomes.push(self.machine.apply(&entry)?);
        }
        let commit = Instant::now();
        let published = self.machine.commit()?;
        METRICS.backend_commit.observe(commit.elapsed().as_secs_f64());
        let has_events = !published.events.is_empty();
        self.publisher.append(published.events, published.head);
        self.machine.publish_head();
        let applied = self.machine.applied();
        self.status.set_applied(applied.index, applied.term);
        self.timekeeper.note(&published.effects);
        self.rise(applied.term);
        self.answer(outcomes);
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

    fn follow(&mut self, leadership: Leadership) {
        self.rising = leadership.is_self.then_some(leadership.term);
        self.timekeeper.demote(); // A new term of the same leader starts over, too.
        let _ = self.keeper.send(Chore::Leadership(leadership));
    }

    /// Leads, once an entry of the own term is applied: nothing of earlier terms is missing then.
    fn rise(&mut self, applied_term: u64) {
        if self.rising.take_if(|term| *term <= applied_term).is_some() {
            self.timekeeper.promote(self.machine.readers().leases.all());
        }
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
                Effect::LeaseGranted { .. } | Effect::LeaseRevoked { .. } => (), // The timekeeper's.
                Effect::CompactionScheduled { .. } | Effect::AlarmsChanged => {
                    let _ = self.keeper.send(Chore::Effect(effect));
                }
            }
        }
    }
}

fn batch_len(entries: &[raft::eraftpb::Entry]) -> usize {
    let mut bytes = 0;
    let fits = entries.iter().take(BATCH_MAX_ENTRIES).take_while(|entry| {
        let first = bytes == 0;
        bytes += entry.data.len().max(1);
        first || bytes <= BATCH_MAX_BYTES
    });
    fits.count()
}
