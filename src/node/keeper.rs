//! The keeper: a thread for what has time. It removes what was compacted, flushes the database so that the log can be cut,
//! and measures how large everything is. Nothing that a client waits for waits for it, unless the client asked to.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;

use super::{
    driver::Input,
    identity::RequestIds,
    inbox::Inbox,
    log::Position,
    replica::Leadership,
    retention::{Policy, Retention},
    snapshot::{Incoming, Offer},
    status::Status,
};
use crate::{
    error::{Error, Halt},
    metrics::METRICS,
    mvcc::{
        self,
        compact::{Compaction, HashPass, Hashing, Progress},
    },
    proto::etcdserverpb::CompactionRequest,
    state::{self, Command, Effect, Kind, Response},
    storage::Engine,
};

/// What the keeper is told.
pub enum Chore {
    /// Something was applied that it may have to act on.
    Effect(Effect),
    /// Leadership changed.
    Leadership(Leadership),
    /// A compaction that the keeper wanted was agreed, or had been before; or it was not, and is wanted again later.
    Retained(i64, Result<(), Error>),
    /// Another member needs a copy of the database.
    CopyWanted,
    /// A copy of the database has no use any more: with the last who holds it, its files go.
    Discard(Discarded),
    /// Another state has taken the place of the one that was kept so far.
    Restored {
        /// Its database.
        engine: Arc<dyn Engine>,
        /// Its key space.
        keys: Arc<mvcc::Shared>,
    },
    /// Somebody waits until nothing is left of what was compacted.
    AwaitCompaction(Box<dyn FnOnce() + Send>),
}

/// A copy of a database that nobody wants.
pub enum Discarded {
    /// One that was made for others.
    Offer(Arc<Offer>),
    /// One that others have sent.
    Incoming(Box<Incoming>),
}

/// The keeper's habits.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    /// Records that a compaction looks at in one piece.
    pub compaction_batch: usize,
    /// Pause between two pieces.
    pub compaction_pause: Duration,
    /// So many neighbours in the history go as a range.
    pub compaction_range: usize,
    /// Compactions of a history of no more than so many bytes remember its hash, to be compared with other members'.
    pub hashed_bytes: u64,
    /// Flush when the log has grown by so much since.
    pub flush_after_bytes: u64,
    /// Flush what is older than this.
    pub flush_after: Duration,
    /// Flush after so many entries, but not too often.
    pub flush_after_entries: u64,
}

/// Between two flushes because of many entries: a flush of a few small ones costs more than it is worth.
const FLUSH_REST: Duration = Duration::from_secs(5);
/// How often the keeper looks around when nobody calls.
const ROUND: Duration = Duration::from_millis(500);
/// How long the database is asked to make room at once.
const TIDYING: Duration = Duration::from_secs(30);
/// A piece of a compaction is done in so many slices, a part of the pause after each: whoever wants the processor waits for a
/// slice, not for the piece.
const SLICES: u32 = 10;

/// The keeper's belongings.
pub struct Keeper {
    /// The database.
    pub engine: Arc<dyn Engine>,
    /// The key space, whose compactions it finishes.
    pub keys: Arc<mvcc::Shared>,
    /// What it hears.
    pub inbox: Arc<Inbox<Chore>>,
    /// The raft thread's ear.
    pub raft: Arc<Inbox<Input>>,
    /// What everybody may know.
    pub status: Arc<Status>,
    /// How it works.
    pub habits: Habits,
    /// What it lets nobody forget, and what it has forgotten.
    pub policy: Policy,
    /// Where the IDs of its proposals come from.
    pub ids: Arc<RequestIds>,
    /// Where copies for other members are made.
    pub copies: PathBuf,
}

/// How far the database is with making room.
#[derive(Debug, Clone, Copy)]
enum Tidying {
    No,
    Wanted,
    Since(Instant),
}

/// What the keeper is at.
pub struct Work {
    compaction: Option<Compaction>,
    /// What the compaction has to wait for.
    hashing: Option<HashPass>,
    awaiting: Vec<Box<dyn FnOnce() + Send>>,
    /// Much was removed: it is to be flushed, and the database has to make room of it.
    tidying: Tidying,
    /// How long nothing need be done.
    rest: Duration,
    last_flush: Instant,
    last_measured: Instant,
    flushed_index: u64,
    retention: Retention,
    leads: bool,
    copy_wanted: bool,
    copies_made: u64,
}

impl Keeper {
    /// Runs until the inbox is closed; returns why this node cannot go on, if so.
    pub fn run(mut self) -> Result<(), Halt> {
        let mut chores = Vec::new();
        let mut work = self.begin(Instant::now());
        loop {
            if !self.inbox.receive(&mut chores, Some(Instant::now() + work.rest)) {
                return Ok(());
            }
            self.hear(&mut work, &mut chores, Instant::now());
            self.forget(&mut work, Instant::now());
            self.compact(&mut work)?;
            self.flush(&mut work, Instant::now())?;
            self.copy(&mut work);
            if work.compaction.is_none() || work.last_measured.elapsed() >= ROUND {
                self.status.measure(self.engine.as_ref())?;
                work.last_measured = Instant::now();
            }
        }
    }

    /// What there is to do at the start: the compaction that the last run did not finish, if any.
    #[must_use]
    pub fn begin(&self, now: Instant) -> Work {
        Work {
            compaction: self.pending(),
            hashing: None, // Of what was interrupted there is none.
            awaiting: Vec::new(),
            tidying: Tidying::No,
            rest: Duration::ZERO,
            last_flush: now,
            last_measured: now,
            flushed_index: self.status.applied(),
            retention: Retention::new(self.policy, now, self.keys.head()),
            leads: false,
            copy_wanted: false,
            copies_made: 0,
        }
    }

    /// Takes on what it is told.
    pub fn hear(&mut self, work: &mut Work, chores: &mut Vec<Chore>, now: Instant) {
        for chore in chores.drain(..) {
            match chore {
                Chore::AwaitCompaction(waiter) => work.awaiting.push(waiter),
                Chore::CopyWanted => work.copy_wanted = true,
                Chore::Discard(copy) => drop(copy),
                Chore::Restored { engine, keys } => {
                    (self.engine, self.keys) = (engine, keys);
                    (work.hashing, work.compaction, work.tidying) = (None, None, Tidying::No);
                    work.flushed_index = self.status.applied();
                }
                Chore::Leadership(leadership) => work.leads = leadership.is_self,
                Chore::Retained(target, Ok(()) | Err(Error::Compacted)) => {
                    work.retention.done(target, now);
                    tracing::info!(revision = target, "completed auto compaction");
                }
                Chore::Retained(target, Err(error)) => {
                    tracing::warn!(revision = target, %error, "failed auto compaction; it will be tried again");
                }
                Chore::Effect(_) => (),
            }
        }
    }

    /// Proposes a compaction when one is due.
    pub fn forget(&self, work: &mut Work, now: Instant) {
        let Some(target) = work.retention.due(now, self.keys.head(), work.leads) else { return };
        tracing::info!(revision = target, "starting auto compaction");
        let request = CompactionRequest { revision: target, physical: false };
        let id = self.ids.next();
        let data = Command::encode(id, Kind::Compact, &request.encode_to_vec());
        let inbox = self.inbox.clone();
        let waiter = Box::new(move |outcome: Result<Response, Error>| {
            let _ = inbox.send(Chore::Retained(target, outcome.map(|_| ())));
        });
        let _ = self.raft.send(Input::Propose { id, data, waiter });
    }

    /// One slice of the compaction that is due, if any.
    pub fn compact(&self, work: &mut Work) -> Result<(), Halt> {
        work.rest = ROUND;
        let slice = self.habits.compaction_batch.div_ceil(SLICES as usize);
        if work.compaction.is_none() {
            self.begin_compaction(work)?;
        }
        if let Some(hashing) = &mut work.hashing {
            if hashing.step(slice)? {
                METRICS.compaction_hashes.with_label_values(&["remembered"]).inc();
                work.hashing = None;
            }
            work.rest = self.habits.compaction_pause / SLICES;
        } else if let Some(compaction) = &mut work.compaction {
            let before = compaction.removed();
            let progress = compaction.step(slice)?;
            METRICS.compacted_keys.inc_by(compaction.removed() - before);
            // Who is in the way is not gone sooner for being looked at more often.
            let is_blocked = progress == Progress::Blocked;
            work.rest = self.habits.compaction_pause / if is_blocked { 1 } else { SLICES };
            if progress == Progress::Done {
                tracing::info!(
                    "compact-revision" = compaction.at(),
                    removed = compaction.removed(),
                    "finished scheduled compaction"
                );
                if compaction.has_ranges() {
                    work.tidying = Tidying::Wanted;
                }
                self.begin_compaction(work)?;
            }
        }
        if work.compaction.is_none() {
            work.awaiting.drain(..).for_each(|waiter| waiter());
        }
        Ok(())
    }

    fn pending(&self) -> Option<Compaction> {
        let range = self.habits.compaction_range;
        Compaction::pending(&self.keys).map(|compaction| compaction.with_ranges_of(range))
    }

    /// Takes on the next compaction, if there is one.
    fn begin_compaction(&self, work: &mut Work) -> Result<(), Halt> {
        work.compaction = self.pending();
        let Some(compaction) = &work.compaction else { return Ok(()) };
        match compaction.hashing(self.habits.hashed_bytes)? {
            Hashing::Due(pass) => work.hashing = Some(pass),
            Hashing::TooLarge { history_bytes } => {
                METRICS.compaction_hashes.with_label_values(&["left_out"]).inc();
                tracing::info!(
                    { "compact-revision" = compaction.at(), "history-bytes" = history_bytes, "limit-bytes" = self.habits.hashed_bytes },
                    "this compaction is not remembered by its hash, because the history is larger than the limit"
                );
            }
            Hashing::Unknown => (),
        }
        Ok(())
    }

    /// Makes a copy of the database for members that need more than the log still has. If that fails, they ask again.
    pub fn copy(&self, work: &mut Work) {
        if !std::mem::take(&mut work.copy_wanted) {
            return;
        }
        work.copies_made += 1;
        let path = self.copies.join(work.copies_made.to_string());
        let offer = match Offer::make(self.engine.as_ref(), path) {
            Ok(offer) => {
                tracing::info!(
                    index = offer.at.index,
                    term = offer.at.term,
                    "made a snapshot for a member that is behind"
                );
                Some(Arc::new(offer))
            }
            Err(error) => {
                tracing::warn!(%error, "cannot make a snapshot for a member that is behind");
                None
            }
        };
        let _ = self.raft.send(Input::Offer(offer));
    }

    /// Flushes when enough has gathered, then lets the log be cut below what is durable.
    pub fn flush(&self, work: &mut Work, now: Instant) -> Result<(), Halt> {
        let grown = self.status.unflushed_log_bytes() >= self.habits.flush_after_bytes;
        let stale = now - work.last_flush >= self.habits.flush_after;
        let news = self.status.applied().saturating_sub(work.flushed_index);
        let many = news >= self.habits.flush_after_entries && now - work.last_flush >= FLUSH_REST;
        if let Tidying::Since(when) = work.tidying
            && now - when >= TIDYING
        {
            self.engine.set_tidy(false)?;
            work.tidying = Tidying::No;
        }
        let tidies = matches!(work.tidying, Tidying::Wanted);
        if !grown && !many && !tidies && (!stale || news == 0) {
            return Ok(());
        }
        self.status.set_unflushed(0);
        self.engine.flush()?;
        work.last_flush = now;
        if tidies {
            self.engine.set_tidy(true)?;
            work.tidying = Tidying::Since(now);
        }
        if let Some(durable) = state::Progress::durable(self.engine.as_ref())? {
            work.flushed_index = durable.index;
            let _ = self.raft.send(Input::Durable(Position { index: durable.index, term: durable.term }));
        }
        Ok(())
    }
}
