//! Background work, on a thread of its own: removes compacted revisions, flushes the database so that the log can be truncated,
//! makes copies of the database for lagging members, and measures the database. No request waits for it, except a compaction
//! whose client asked to wait until it is finished.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;

use super::{
    auto_compaction::{Policy, Retention},
    identity::RequestIds,
    inbox::Inbox,
    messages::{BackgroundTask, Input},
    quota::{Growth, Quota},
    snapshot::OutboundSnapshot,
    status::Status,
};
use crate::raft_log::Position;
use crate::{
    error::{Error, Halt},
    metrics::{METRICS, process::unix_seconds},
    mvcc::{
        self,
        compact::{Compaction, CompactionProgress, HashPass, Hashing},
    },
    proto::etcdserverpb::CompactionRequest,
    state::{self, Command, Kind, Response},
    storage::Engine,
};

/// Parameters of background work.
#[derive(Debug, Clone, Copy)]
pub struct BackgroundConfig {
    /// Records that a compaction processes per batch.
    pub compaction_batch: usize,
    /// Pause between two batches.
    pub compaction_pause: Duration,
    /// Runs of at least this many neighbouring records are removed with a range delete.
    pub compaction_range: usize,
    /// A compaction stores the hash of the history, for comparison with other members, if that is no larger than this.
    pub hashed_bytes: u64,
    /// Flush when the log has grown by this much since the last flush.
    pub flush_after_bytes: u64,
    /// Flush when there are new entries and the last flush is this long ago.
    pub flush_after: Duration,
    /// Flush after this many entries, but no more often than every few seconds.
    pub flush_after_entries: u64,
}

/// The minimum time between two flushes because of many entries: flushing a few small entries costs more than it gains.
const MIN_FLUSH_INTERVAL: Duration = Duration::from_secs(5);
/// How often the thread wakes up without input.
const ROUND: Duration = Duration::from_millis(500);
/// How long the engine compacts its files eagerly after many records were removed.
const EAGER_COMPACTION_TIME: Duration = Duration::from_secs(30);
/// A batch of a compaction is processed in this many slices, with a part of the pause after each, so that other threads wait for
/// the processor no longer than a slice takes.
const SLICES: u32 = 10;

/// The background thread's state, apart from [`BackgroundState`].
pub struct Background {
    /// The database.
    pub engine: Arc<dyn Engine>,
    /// The key space, whose compactions it carries out.
    pub keys: Arc<mvcc::Shared>,
    /// The inputs of this thread.
    pub inbox: Arc<Inbox<BackgroundTask>>,
    /// The raft thread's inbox.
    pub raft: Arc<Inbox<Input>>,
    pub status: Arc<Status>,
    pub background_config: BackgroundConfig,
    /// The auto compaction policy.
    pub policy: Policy,
    /// Generates the IDs of its proposals.
    pub ids: Arc<RequestIds>,
    /// The directory in which copies for other members are made.
    pub copies: PathBuf,
    pub quota: Quota,
}

/// Whether the engine is to compact its files eagerly, to give back the space of removed records.
#[derive(Debug, Clone, Copy)]
enum EagerCompaction {
    Off,
    Requested,
    Since(Instant),
}

/// The work in progress.
pub struct BackgroundState {
    compaction: Option<Compaction>,
    /// The hash of the history, which has to be computed before the compaction removes anything.
    hashing: Option<HashPass>,
    awaiting: Vec<Box<dyn FnOnce() + Send>>,
    eager_compaction: EagerCompaction,
    /// How long the thread may wait before there is more to do.
    idle: Duration,
    last_flush: Instant,
    last_measured: Instant,
    flushed_index: u64,
    retention: Retention,
    leads: bool,
    copy_wanted: bool,
    copies_made: u64,
    /// When the compaction began.
    compaction_began: Instant,
    growth: Growth,
}

impl Background {
    /// Runs until the inbox is closed. An error is fatal to the node.
    pub fn run(mut self) -> Result<(), Halt> {
        let mut tasks = Vec::new();
        let mut work = self.begin(Instant::now());
        loop {
            if !self.inbox.receive(&mut tasks, Some(Instant::now() + work.idle)) {
                return Ok(());
            }
            self.handle(&mut work, &mut tasks, Instant::now());
            self.auto_compact(&mut work, Instant::now());
            self.compact(&mut work)?;
            self.flush(&mut work, Instant::now())?;
            self.copy(&mut work);
            if work.compaction.is_none() || work.last_measured.elapsed() >= ROUND {
                self.status.measure(self.engine.as_ref())?;
                work.last_measured = Instant::now();
                work.growth.add(self.status.total_bytes(), work.last_measured);
                self.status.set_quota_full_seconds(work.growth.seconds_until(self.quota));
            }
        }
    }

    /// The work at the start: the compaction that an earlier run did not finish, if any.
    #[must_use]
    pub fn begin(&self, now: Instant) -> BackgroundState {
        BackgroundState {
            compaction: self.pending(),
            hashing: None, // An interrupted compaction gets no hash.
            awaiting: Vec::new(),
            eager_compaction: EagerCompaction::Off,
            idle: Duration::ZERO,
            last_flush: now,
            last_measured: now,
            flushed_index: self.status.applied(),
            retention: Retention::new(self.policy, now, self.keys.head()),
            leads: false,
            copy_wanted: false,
            copies_made: 0,
            compaction_began: now,
            growth: Growth::default(),
        }
    }

    /// Handles the inputs.
    pub fn handle(&mut self, work: &mut BackgroundState, tasks: &mut Vec<BackgroundTask>, now: Instant) {
        for task in tasks.drain(..) {
            match task {
                BackgroundTask::AwaitCompaction(waiter) => work.awaiting.push(waiter),
                BackgroundTask::CopyWanted => work.copy_wanted = true,
                BackgroundTask::Discard(copy) => drop(copy),
                BackgroundTask::Restored { engine, keys } => {
                    (self.engine, self.keys) = (engine, keys);
                    (work.hashing, work.compaction, work.eager_compaction) = (None, None, EagerCompaction::Off);
                    work.flushed_index = self.status.applied();
                }
                BackgroundTask::Leadership(leadership) => work.leads = leadership.is_self,
                BackgroundTask::AutoCompacted(target, Ok(()) | Err(Error::Compacted)) => {
                    work.retention.done(target, now);
                    tracing::info!(revision = target, "completed auto compaction");
                }
                BackgroundTask::AutoCompacted(target, Err(error)) => {
                    tracing::warn!(revision = target, %error, "failed auto compaction; it will be tried again");
                }
                BackgroundTask::Effect(_) => (),
            }
        }
    }

    /// Proposes a compaction when one is due.
    pub fn auto_compact(&self, work: &mut BackgroundState, now: Instant) {
        let Some(target) = work.retention.due(now, self.keys.head(), work.leads) else { return };
        tracing::info!(revision = target, "starting auto compaction");
        let request = CompactionRequest { revision: target, physical: false };
        let id = self.ids.next();
        let data = Command::encode(id, Kind::Compact, &request.encode_to_vec());
        let inbox = self.inbox.clone();
        let waiter = Box::new(move |outcome: Result<Response, Error>| {
            let _ = inbox.send(BackgroundTask::AutoCompacted(target, outcome.map(|_| ())));
        });
        let _ = self.raft.send(Input::Propose { id, data, since: Instant::now(), waiter });
    }

    /// Processes one slice of the current compaction, if any.
    pub fn compact(&self, work: &mut BackgroundState) -> Result<(), Halt> {
        work.idle = ROUND;
        let slice = self.background_config.compaction_batch.div_ceil(SLICES as usize);
        if work.compaction.is_none() {
            self.begin_compaction(work)?;
        }
        if let Some(hashing) = &mut work.hashing {
            if hashing.step(slice)? {
                METRICS.compaction_hashes.with_label_values(&["remembered"]).inc();
                work.hashing = None;
            }
            work.idle = self.background_config.compaction_pause / SLICES;
        } else if let Some(compaction) = &mut work.compaction {
            let (before, started) = (compaction.removed(), Instant::now());
            let progress = compaction.step(slice)?;
            METRICS.compaction_slices.observe(milliseconds(started.elapsed()));
            METRICS.compacted_keys.inc_by(compaction.removed() - before);
            // A reader that blocks the compaction is not finished sooner for being checked more often.
            let is_blocked = progress == CompactionProgress::Blocked;
            work.idle = self.background_config.compaction_pause / if is_blocked { 1 } else { SLICES };
            if progress == CompactionProgress::Done {
                tracing::info!(
                    "compact-revision" = compaction.at(),
                    removed = compaction.removed(),
                    "finished scheduled compaction"
                );
                METRICS.compactions.observe(milliseconds(work.compaction_began.elapsed()));
                METRICS.last_compaction.set(unix_seconds());
                if compaction.used_range_deletes() {
                    work.eager_compaction = EagerCompaction::Requested;
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
        let range = self.background_config.compaction_range;
        Compaction::pending(&self.keys).map(|compaction| compaction.with_range_delete_min(range))
    }

    /// Starts the next compaction, if there is one.
    fn begin_compaction(&self, work: &mut BackgroundState) -> Result<(), Halt> {
        work.compaction = self.pending();
        work.compaction_began = Instant::now();
        let Some(compaction) = &work.compaction else { return Ok(()) };
        match compaction.hashing(self.background_config.hashed_bytes)? {
            Hashing::Due(pass) => work.hashing = Some(pass),
            Hashing::TooLarge { history_bytes } => {
                METRICS.compaction_hashes.with_label_values(&["left_out"]).inc();
                tracing::info!(
                    { "compact-revision" = compaction.at(), "history-bytes" = history_bytes, "limit-bytes" = self.background_config.hashed_bytes },
                    "this compaction is not remembered by its hash, because the history is larger than the limit"
                );
            }
            Hashing::Unknown => (),
        }
        Ok(())
    }

    /// Makes a copy of the database for members that need entries which the log no longer has. If that fails, they ask again.
    pub fn copy(&self, work: &mut BackgroundState) {
        if !std::mem::take(&mut work.copy_wanted) {
            return;
        }
        work.copies_made += 1;
        let (path, started) = (self.copies.join(work.copies_made.to_string()), Instant::now());
        let offer = match OutboundSnapshot::make(self.engine.as_ref(), path) {
            Ok(offer) => {
                METRICS.backend_snapshot.observe(started.elapsed().as_secs_f64());
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
        let _ = self.raft.send(Input::OutboundSnapshot(offer));
    }

    /// Flushes when enough entries were applied, then reports what is durable, so that the log can be truncated.
    pub fn flush(&self, work: &mut BackgroundState, now: Instant) -> Result<(), Halt> {
        let grown = self.status.unflushed_log_bytes() >= self.background_config.flush_after_bytes;
        let stale = now - work.last_flush >= self.background_config.flush_after;
        let new_entries = self.status.applied().saturating_sub(work.flushed_index);
        let many =
            new_entries >= self.background_config.flush_after_entries && now - work.last_flush >= MIN_FLUSH_INTERVAL;
        if let EagerCompaction::Since(when) = work.eager_compaction
            && now - when >= EAGER_COMPACTION_TIME
        {
            self.engine.set_eager_compaction(false)?;
            work.eager_compaction = EagerCompaction::Off;
        }
        let reclaims = matches!(work.eager_compaction, EagerCompaction::Requested);
        if !grown && !many && !reclaims && (!stale || new_entries == 0) {
            return Ok(());
        }
        self.status.set_unflushed(0);
        let started = Instant::now();
        self.engine.flush()?;
        METRICS.flush.observe(started.elapsed().as_secs_f64());
        work.last_flush = now;
        if reclaims {
            self.engine.set_eager_compaction(true)?;
            work.eager_compaction = EagerCompaction::Since(now);
        }
        if let Some(durable) = state::AppliedPosition::durable(self.engine.as_ref())? {
            work.flushed_index = durable.index;
            let _ = self.raft.send(Input::Durable(Position { index: durable.index, term: durable.term }));
        }
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
