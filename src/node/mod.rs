//! Replicates entries among the members and applies them to the state.
//!
//! This is the only layer that runs raft-rs. (`raft_log` implements its `Storage` trait, and `cluster` writes its message types
//! when it makes or changes a log.) It owns the threads that drive a member: raft, log, apply, background work and lease expiry.
//! Each of them is a value with non-blocking steps, and its thread is a thin loop around that value, so the same code runs in the
//! server and in a deterministic simulation. (The threads that serve requests are elsewhere: the watch hub's two, the read
//! pool's, the async runtimes'.)
//!
//! ```text
//! handlers ──Input──▶ raft ──LogTask──▶ log ──"persisted n"──▶ raft
//!                      └───Handoff───▶ apply ──▶ watchers, waiters
//!                                        ├─BackgroundTask─▶ background: compaction, flush, sizes
//!                                        └─Effect─▶ lease expiry ──ProposeInTerm──▶ raft
//! ```
//!
//! INVARIANTS
//! * Only entries that the local log has synced are applied: applied ≤ persisted ≤ last.
//! * The log is truncated only up to what the database has made durable: truncated ≤ durable applied ≤ applied.
//! * A failure in any of these threads ends the process: a dead member is ordinary to its cluster, a half-dead one is not.

pub mod apply_thread;
pub mod auto_compaction;
pub mod background;
pub mod clock;
pub mod conf_change;
pub mod data_dir;
pub mod databases;
pub mod identity;
pub mod lease_expiry;
pub mod log_thread;
pub mod low_priority;
pub mod messages;
pub mod quota;
pub mod raft_thread;
pub mod read_pool;
pub mod replica;
pub mod simple_tokens;
pub mod snapshot;
pub mod snapshot_receiver;
pub mod status;
pub mod threads;
pub mod transport;
pub mod waiters;

use std::{
    ops::Deref,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, Guard};
use bytes::Bytes;

pub use crate::inbox;
use crate::raft_log::{LogStore, MemoryLog, Position, Recovered};
use crate::{
    error::{Error, Halt},
    metrics::{self, METRICS},
    mvcc::{compact::KeyHash, read::ReadError},
    slow_log::Thresholds,
    state::{Command, Kind, Machine, Readers},
    storage::{Engine, InsufficientSpace},
    watch::Publisher,
};
use apply_thread::{ApplyThread, Durations};
use auto_compaction::Policy;
use background::{Background, BackgroundConfig};
use clock::Clock;
use identity::RequestIds;
use inbox::Inbox;
use lease_expiry::{LeaseExpiry, Times};
use log_thread::LogThread;
use messages::{BackgroundTask, Input, MessageSender, NoPeers, Peer, ProgressWaiter, RaftStatusWaiter};
use quota::{Quota, QuotaEnforcer};
use raft_thread::RaftThread;
use replica::{Incarnation, Replica, Timing};
use simple_tokens::SimpleTokens;
use snapshot::{OutboundSlot, OutboundTracker, conf_state};
use status::{Connectivity, Status};
use threads::{Core, abort_on_failure};
use waiters::{ProposalWaiter, ReadWaiter, TimeoutCause, Waiters};

/// A node's configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    pub member_id: u64,
    /// Generates the IDs of proposals.
    pub ids: Arc<RequestIds>,
    pub timing: Timing,
    /// The clock that lease deadlines are computed from.
    pub clock: Clock,
    /// How long a proposal or a linearizable read may take.
    pub request_timeout: Duration,
    /// Entries kept behind the applied index when the log is truncated, for followers that are slightly behind.
    pub catchup_entries: u64,
    /// While the log in memory is smaller than this, entries that lagging members still need are kept.
    pub lagging_log_bytes: usize,
    /// The maximum size of the database.
    pub quota: Quota,
    /// Parameters of compaction and flushing.
    pub background_config: BackgroundConfig,
    /// The auto compaction policy.
    pub retention: Policy,
    /// What takes longer is logged.
    pub thresholds: Thresholds,
    /// Proposals are refused while more than this many entries are committed but not applied.
    pub backlog: u64,
    /// How long a simple token is valid after its last use.
    pub token_ttl: Duration,
}

impl Settings {
    /// Settings for tests of a member that is alone: no quota, no compaction of its own, and waits that end after half a minute.
    #[must_use]
    pub fn for_tests(member_id: u64, ids: Arc<RequestIds>) -> Self {
        let limit = Duration::from_secs(30);
        Self {
            member_id,
            ids,
            clock: Clock::default(),
            timing: Timing {
                tick_ms: 10,
                election_ticks: 10,
                pre_vote: true,
                request_timeout_ms: 30_000,
                fixed_timeout: None,
            },
            request_timeout: limit,
            catchup_entries: 50,
            lagging_log_bytes: usize::MAX,
            quota: Quota { bytes: -1 },
            retention: Policy::All,
            background_config: BackgroundConfig {
                compaction_batch: 100,
                compaction_pause: Duration::ZERO,
                compaction_range: 2,
                hashed_bytes: 0,
                flush_after_bytes: 1 << 20,
                flush_after: limit,
                flush_after_entries: u64::MAX,
            },
            thresholds: Thresholds { call: limit, apply: limit },
            backlog: 5000,
            token_ttl: Duration::from_mins(5),
        }
    }

    fn times(&self) -> Times {
        let tick = Duration::from_millis(self.timing.tick_ms);
        let election_ticks = u32::try_from(self.timing.election_ticks).unwrap_or(u32::MAX);
        Times { tick, election_timeout: tick * election_ticks, request_timeout: self.request_timeout }
    }
}

/// The components that a node is assembled from: its opened database and log, and its connections to the other members.
pub struct Parts {
    /// The database.
    pub engine: Arc<dyn Engine>,
    /// The replicated state, which is stored in `engine`.
    pub machine: Machine,
    /// Receives the events of applied entries, for watchers.
    pub publisher: Publisher,
    /// The raft log.
    pub log: Box<dyn LogStore>,
    /// What was found in `log` when it was opened.
    pub recovered: Recovered,
    /// Sends messages to the other members.
    pub message_sender: Arc<dyn MessageSender>,
    /// Which members are connected.
    pub connectivity: Arc<Connectivity>,
    /// The members to contact, for a member that joins a cluster and has no member list yet.
    pub first_peers: Vec<Peer>,
    /// Where the transport finds the copy of the database that is sent as a snapshot.
    pub outbound_slot: Arc<OutboundSlot>,
    /// The directory in which such copies are made.
    pub copies: PathBuf,
    /// Called when the cluster has removed this member.
    pub on_removed: Arc<dyn Fn() + Send + Sync>,
    /// Receives raft-rs's log lines.
    pub logger: slog::Logger,
}

impl Parts {
    /// The parts of a member that is and remains the only one of its cluster.
    #[must_use]
    pub fn alone(
        engine: Arc<dyn Engine>,
        machine: Machine,
        publisher: Publisher,
        log: Box<dyn LogStore>,
        recovered: Recovered,
    ) -> Self {
        Self {
            engine,
            machine,
            publisher,
            log,
            recovered,
            message_sender: Arc::new(NoPeers),
            connectivity: Arc::default(),
            first_peers: Vec::new(),
            outbound_slot: Arc::default(),
            copies: PathBuf::new(),
            on_removed: Arc::new(|| ()),
            logger: slog::Logger::root(slog::Discard, slog::o!()),
        }
    }
}

/// The readers and the database that they read. Replaced as a whole when a snapshot is installed.
pub struct Stores {
    /// Read the published state.
    pub readers: Readers,
    /// The database, for what is not replicated: its size and its files.
    pub engine: Arc<dyn Engine>,
}

/// The current readers. A held value keeps reading the state it was obtained from, even after a snapshot has replaced that:
/// obtain a new one for each request.
pub struct CurrentReaders(Guard<Arc<Stores>>);

impl Deref for CurrentReaders {
    type Target = Readers;

    fn deref(&self) -> &Readers {
        &self.0.readers
    }
}

/// The handle through which the rest of the process uses the node.
pub struct Node {
    raft: Arc<Inbox<Input>>,
    background: Arc<Inbox<BackgroundTask>>,
    lease_expiry: Arc<LeaseExpiry>,
    status: Arc<Status>,
    stores: Arc<ArcSwap<Stores>>,
    connectivity: Arc<Connectivity>,
    backlog: u64,
    quota: Arc<QuotaEnforcer>,
    tokens: Arc<SimpleTokens>,
}

/// The workers of a node, connected to each other but not running yet. Each may get a thread, or several may share one.
pub struct Workers {
    /// Raft, log and apply.
    pub core: Core,
    /// Background work.
    pub background: Background,
}

/// The handles of the node's threads.
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Waits until all threads have ended.
    pub fn join(self) {
        for thread in self.threads {
            // A panic has ended the process already.
            let _ = thread.join();
        }
    }
}

impl Node {
    /// Starts the threads of a node; see [`Node::assemble`].
    pub fn start(settings: &Settings, raft: Arc<Inbox<Input>>, parts: Parts) -> Result<(Arc<Self>, Threads), Halt> {
        let (node, workers) = Self::assemble(settings, raft, parts)?;
        Ok((node, spawn_all(workers)))
    }

    /// Connects the workers of a node. Database and log must be open and belong together. `raft` is the raft thread's inbox.
    pub fn assemble(settings: &Settings, raft: Arc<Inbox<Input>>, parts: Parts) -> Result<(Arc<Self>, Workers), Halt> {
        let Parts { engine, machine, publisher, mut log, mut recovered, message_sender, .. } = parts;
        let reached = machine.applied();
        let reached = Position { index: reached.index, term: reached.term };
        finish_install(log.as_mut(), &mut recovered, reached)?;
        recovered.check_applied(reached)?;
        let replica = new_replica(settings, &recovered, &machine, &parts.logger)?;
        let status = Arc::new(first_status(settings, &recovered, reached, engine.as_ref())?);
        // The state on disk needs no flush to be durable: a node that crashes early again and again still truncates its log.
        let _ = raft.send(Input::Durable(reached));
        let background = Arc::new(Inbox::default());
        let times = settings.times();
        let lease_expiry = Arc::new(LeaseExpiry::new(times, status.clone(), raft.clone(), settings.ids.clone()));
        let quota = quota_enforcer(settings, &status, &raft);
        let tokens = Arc::new(SimpleTokens::new(settings.token_ttl, recovered.last_index()));
        let readers = machine.readers();
        let stores = Arc::new(ArcSwap::from_pointee(Stores { readers, engine: engine.clone() }));
        let node = Arc::new(Self {
            raft: raft.clone(),
            background: background.clone(),
            lease_expiry: lease_expiry.clone(),
            status: status.clone(),
            stores: stores.clone(),
            connectivity: parts.connectivity.clone(),
            backlog: settings.backlog,
            quota: quota.clone(),
            tokens: tokens.clone(),
        });
        let raft_thread = RaftThread {
            replica,
            inbox: raft.clone(),
            log: Arc::new(Inbox::default()),
            apply_thread: Arc::new(Inbox::default()),
            background: background.clone(),
            message_sender: message_sender.clone(),
            outbound: OutboundTracker::new(parts.outbound_slot),
            status: status.clone(),
            tick: times.tick,
            election_ticks: settings.timing.election_ticks as u64,
            catchup_entries: settings.catchup_entries,
            lagging_log_bytes: settings.lagging_log_bytes,
            id: settings.member_id,
            on_removed: parts.on_removed,
            arrived: None,
            pending_removal: None,
            accepted: None,
        };
        raft_thread.set_gauges();
        let log_thread =
            LogThread { log, raft: raft.clone(), message_sender: message_sender.clone(), status: status.clone() };
        let apply_thread = ApplyThread {
            machine,
            waiters: Waiters::new(settings.request_timeout),
            publisher,
            status: status.clone(),
            stores,
            raft: raft.clone(),
            message_sender,
            id: settings.member_id,
            background: background.clone(),
            lease_expiry,
            unconfirmed_term: None,
            timeout_cause: TimeoutCause::new(settings.member_id, parts.connectivity, times.election_timeout),
            tokens,
            quota,
            thresholds: settings.thresholds,
            durations: Durations::default(),
        };
        apply_thread.publish_first_members(parts.first_peers);
        let background = Background {
            engine,
            keys: apply_thread.machine.shared().clone(),
            inbox: background,
            raft,
            status,
            background_config: settings.background_config,
            policy: settings.retention,
            ids: settings.ids.clone(),
            copies: parts.copies,
            quota: settings.quota,
        };
        Ok((node, Workers { core: Core { raft_thread, log_thread, apply_thread }, background }))
    }

    /// Proposes a request, encoded as its client sent it. The waiter is called with the outcome, a refusal, or a timeout.
    pub fn propose(&self, id: u64, kind: Kind, request: &[u8], waiter: ProposalWaiter) {
        self.propose_entry(id, Command::encode(id, kind, request), waiter);
    }

    /// Proposes an encoded entry.
    pub fn propose_entry(&self, id: u64, data: Bytes, waiter: ProposalWaiter) {
        if self.status.committed().saturating_sub(self.status.applied()) > self.backlog {
            metrics::refused("backlog");
            return waiter(Err(Error::TooManyRequests));
        }
        if let Err(Input::Propose { waiter, .. }) =
            self.raft.send(Input::Propose { id, data, since: Instant::now(), waiter })
        {
            waiter(Err(Error::Stopped));
        }
    }

    /// Proposes an entry that changes the voters or learners, wrapped in one of raft's configuration changes.
    pub fn change_members(&self, id: u64, entry: Bytes, waiter: ProposalWaiter) {
        let change =
            conf_change::to_conf_change(entry).expect("only membership changes are proposed as configuration changes");
        if let Err(Input::Change { waiter, .. }) = self.raft.send(Input::Change { id, change, waiter }) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Calls the waiter with each member's match index, or None if this member is not the leader.
    pub fn progress(&self, waiter: ProgressWaiter) {
        if let Err(Input::Progress(waiter)) = self.raft.send(Input::Progress(waiter)) {
            waiter(None);
        }
    }

    /// Calls the waiter with the state of raft; drops it if the node has stopped.
    pub fn raft_status(&self, waiter: RaftStatusWaiter) {
        let _ = self.raft.send(Input::RaftStatus(waiter));
    }

    /// Transfers leadership to another voter as soon as that has all entries; [`Status::leader`] shows whether it succeeded.
    pub fn transfer_leader(&self, to: u64) {
        let _ = self.raft.send(Input::Transfer(to));
    }

    /// Calls the waiter when everything that was acknowledged before this call can be read on this member.
    pub fn read_barrier(&self, waiter: ReadWaiter) {
        if self.status.is_sole_leader() {
            return waiter(Ok(())); // A write is published before it is acknowledged.
        }
        if let Err(Input::Read(waiter)) = self.raft.send(Input::Read(waiter)) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Calls the waiter when everything up to this member's commit index is applied here. No other member is asked; on a leader
    /// that covers everything that was ever acknowledged.
    pub fn catch_up(&self, waiter: ReadWaiter) {
        if let Err(Input::CatchUp(waiter)) = self.raft.send(Input::CatchUp(waiter)) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Calls the waiter when all revisions that were compacted before this call are physically removed.
    pub fn await_compaction(&self, waiter: Box<dyn FnOnce() + Send>) {
        let _ = self.background.send(BackgroundTask::AwaitCompaction(waiter));
    }

    /// Readers of the published state.
    #[must_use]
    pub fn readers(&self) -> CurrentReaders {
        CurrentReaders(self.stores.load())
    }

    /// Tracks the deadlines of leases.
    #[must_use]
    pub fn lease_expiry(&self) -> &Arc<LeaseExpiry> {
        &self.lease_expiry
    }

    /// Which members are connected, and since when.
    #[must_use]
    pub fn simple_tokens(&self) -> &SimpleTokens {
        &self.tokens
    }

    #[must_use]
    pub fn connectivity(&self) -> &Connectivity {
        &self.connectivity
    }

    /// Indexes, terms and sizes of this node.
    #[must_use]
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// The database, for what is not replicated: its size and its files.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn Engine> {
        self.stores.load().engine.clone()
    }

    /// Whether a write of this cost still fits into the quota of this member's database.
    #[must_use]
    pub fn fits_quota(&self, cost: u64) -> bool {
        self.quota.admits(cost)
    }

    /// Raises the NOSPACE alarm for this member, then answers the waiter with [`Error::NoSpace`].
    pub fn raise_no_space(&self, waiter: ProposalWaiter) {
        self.quota.raise_no_space(vec![waiter]);
    }

    /// Rewrites the database's files so that removed data takes no space, and measures them again. Returns what is missing if the
    /// database does not start.
    pub fn defragment(&self) -> Result<Option<InsufficientSpace>, Halt> {
        let (engine, started) = (self.engine(), Instant::now());
        METRICS.defragmenting.set(1);
        let lack = engine.defragment()?;
        METRICS.defragmenting.set(0);
        METRICS.defragmentation.observe(started.elapsed().as_secs_f64());
        self.status.measure(engine.as_ref())?;
        Ok(lack)
    }

    /// The hash of the keys at a revision, or at the head. Reads all of them.
    pub fn hash_kv(&self, revision: i64) -> Result<KeyHash, ReadError> {
        let started = Instant::now();
        let hash = self.readers().keys.hash_kv(revision);
        METRICS.hash_revision_seconds.observe(started.elapsed().as_secs_f64());
        hash
    }

    /// How many inputs wait for the raft thread and for the background thread.
    #[must_use]
    pub fn waiting_inputs(&self) -> (usize, usize) {
        (self.raft.waiting(), self.background.waiting())
    }

    /// Measures the database, for callers that need its current size.
    pub fn measure(&self) -> Result<(), Halt> {
        self.status.measure(self.engine().as_ref())
    }

    /// Asks all threads to finish what they have and end.
    pub fn stop(&self) {
        self.raft.close();
        self.background.close();
        self.lease_expiry.stop();
    }
}

/// Finishes a snapshot install that a crash interrupted after the database was replaced but before the log was reset. Clears the
/// mark of an install that had not replaced the database.
pub fn finish_install(log: &mut dyn LogStore, recovered: &mut Recovered, applied: Position) -> Result<(), Halt> {
    if let Some(at) = recovered.interrupted_install(applied) {
        tracing::warn!(index = at.index, term = at.term, "finishing the install of a snapshot that was interrupted");
        let mut hard_state = recovered.hard_state.clone();
        if hard_state.term < at.term {
            (hard_state.term, hard_state.vote) = (at.term, 0); // The reset would have written this term.
        }
        hard_state.commit = at.index;
        log.reset(at, &hard_state)?;
        recovered.reset_to(at, hard_state);
    } else if recovered.installing.take().is_some() {
        log.set_installing(None)?;
    }
    Ok(())
}

/// Raft, which continues from what the log and the database hold.
fn new_replica<R>(
    settings: &Settings,
    recovered: &Recovered,
    machine: &Machine,
    logger: &slog::Logger,
) -> Result<Replica<R>, Halt> {
    let index = machine.applied().index;
    let memory = MemoryLog::new(recovered, index, conf_state(&machine.members().voters_and_learners()));
    let incarnation = Incarnation { member: settings.member_id, number: settings.ids.next() };
    Replica::new(incarnation, index, memory, settings.timing, logger)
}

fn first_status(
    settings: &Settings,
    recovered: &Recovered,
    reached: Position,
    engine: &dyn Engine,
) -> Result<Status, Halt> {
    let status = Status::new(settings.clock.clone(), settings.times().tick * lease_expiry::STALLED_AFTER_TICKS);
    status.set_applied(reached.index, reached.term);
    status.set_unflushed(recovered.bytes_after(reached.index));
    status.measure(engine)?;
    Ok(status)
}

fn spawn_all(Workers { core, background }: Workers) -> Threads {
    let lease_expiry = core.apply_thread.lease_expiry.clone();
    let threads = vec![
        spawn("background", move || background.run()),
        spawn("lease-expiry", move || lease_expiry.run()),
        spawn("raft", move || core.run()),
    ];
    Threads { threads }
}

/// Starts a thread whose failure ends the process.
fn spawn(name: &'static str, run: impl FnOnce() -> Result<(), Halt> + Send + 'static) -> JoinHandle<()> {
    let thread = thread::Builder::new().name(name.into());
    thread.spawn(move || abort_on_failure(name, run)).expect("the system can start a handful of threads")
}

fn quota_enforcer(settings: &Settings, status: &Arc<Status>, raft: &Arc<Inbox<Input>>) -> Arc<QuotaEnforcer> {
    let (status, raft, ids) = (status.clone(), raft.clone(), settings.ids.clone());
    Arc::new(QuotaEnforcer::new(settings.quota, settings.member_id, status, raft, ids))
}
