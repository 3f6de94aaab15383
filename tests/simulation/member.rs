//! One member: its two disks, and the threads that run on them until the power fails.

use std::{
    collections::VecDeque,
    mem,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use metastore::{
    error::Halt,
    mvcc::compact::{Compaction, MAX_HASHED_HISTORY_BYTES},
    node::{
        Node, Parts, Settings, Workers, auto_compaction,
        background::{BackgroundConfig, BackgroundState},
        clock::Clock,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        messages::{BackgroundTask, Handoff, Input, LogTask, Peer},
        quota::Quota,
        replica::Timing,
        snapshot::{InboundSnapshot, OutboundSlot},
    },
    raft_log::{Identity, Position},
    slow_log::Thresholds,
    state::{AppliedPosition, Machine, Members, VotersAndLearners},
    storage::memory::Memory,
    watch::{self, Hub, HubCore},
};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState, Message};

use super::{
    disk::{Copies, CurrentEngine, DiskState, Durable, LogDisk, SimulatedEngine, SimulatedLog},
    outbox::Outbox,
    planted_faults::Fault,
    raft_checks::Ledger,
    rng::Rng,
};

pub const CLUSTER: u64 = 70;
pub const TICK: Duration = Duration::from_millis(100);
pub const ELECTION_TICKS: u64 = 10;
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
pub const CACHE_BYTES: u64 = 10_000;
/// The most ticks that a process receives at once after a pause.
pub const LATE_TICKS: u32 = 3;

/// What survives a crash: the disks.
pub struct Disks {
    pub member: u64,
    pub log: LogDisk,
    pub memory: Memory,
}

impl Disks {
    /// The disks of a member that knows these members and begins at this position.
    pub fn new(member: u64, members: &Members, at: Position, on_files: bool) -> Self {
        let identity = Identity { cluster_id: CLUSTER, member_id: member };
        let hard_state = HardState { term: at.term, commit: at.index, ..HardState::default() };
        let log = LogDisk::create(on_files, identity, at, &hard_state);
        let memory = Memory::default();
        Machine::bootstrap(&memory, CLUSTER, members, (at.index, at.term)).expect("memory does not fail");
        Self { member, log, memory }
    }
}

/// What a member starts with, besides its disks.
pub struct StartContext {
    pub now: Instant,
    /// The clock for leases.
    pub clock: Clock,
    /// Larger for every incarnation of any member.
    pub incarnation: u64,
    /// For a member that joins.
    pub first_peers: Vec<Peer>,
    pub pre_vote: bool,
    pub ledger: Arc<Mutex<Ledger>>,
    pub fault: Option<Fault>,
}

/// The settings of a member, partly random, drawn once for each incarnation.
fn settings(member: u64, incarnation: u64, pre_vote: bool, clock: Clock, rng: &mut Rng) -> Settings {
    let timeout = 10 + (member * 3 + incarnation) % 10;
    Settings {
        member_id: member,
        ids: Arc::new(RequestIds::new(MemberId::new(member).expect("it is not zero"), incarnation * 1000)),
        clock,
        timing: Timing {
            tick_ms: 100,
            election_ticks: 10,
            pre_vote,
            request_timeout_ms: 3000,
            fixed_timeout: Some(usize::try_from(timeout).expect("it is short")),
        },
        request_timeout: REQUEST_TIMEOUT,
        catchup_entries: *rng.pick(&[0, 3, 30]),
        lagging_log_bytes: usize::MAX,
        quota: Quota { bytes: -1 },
        retention: auto_compaction::Policy::All,
        background_config: BackgroundConfig {
            compaction_batch: *rng.pick(&[10, 30, 200]),
            compaction_pause: Duration::ZERO,
            compaction_range: *rng.pick(&[2, 5, 1024]),
            hashed_bytes: MAX_HASHED_HISTORY_BYTES,
            flush_after_bytes: *rng.pick(&[0, 200, 2000]),
            flush_after: Duration::from_secs(5),
            flush_after_entries: u64::MAX,
        },
        thresholds: Thresholds { call: Duration::from_secs(1000), apply: Duration::from_secs(1000) },
        backlog: 5000,
        token_ttl: Duration::from_mins(5),
    }
}

/// A thread of a member, which here runs in steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberThread {
    Raft,
    Log,
    Apply,
    Background,
    LeaseExpiry,
    Hub,
}

impl MemberThread {
    pub const ALL: [Self; 6] = [Self::Raft, Self::Log, Self::Apply, Self::Background, Self::LeaseExpiry, Self::Hub];
}

/// A running member. Each step is one that its threads could take next.
pub struct Member {
    pub incarnation: u64,
    pub pre_vote: bool,
    pub node: Arc<Node>,
    pub threads: Workers,
    pub inbox: Arc<Inbox<Input>>,
    pub outbox: Arc<Outbox>,
    pub disk_state: Arc<DiskState>,
    pub hub: Arc<Hub>,
    pub outbound_slot: Arc<OutboundSlot>,
    hub_core: HubCore,
    work: BackgroundState,
    current: CurrentEngine,
    copies: Copies,
    log: LogDisk,
    fault: Option<Fault>,
    /// What has been handed to a thread and was not processed yet.
    inputs: Vec<Input>,
    tasks: Vec<LogTask>,
    handoffs: Vec<Handoff>,
    background_tasks: Vec<BackgroundTask>,
    /// Ticks that are due and were not processed yet.
    due: u32,
    ticks: u64,
    /// The tick at which each write that waits for the disk was handed over.
    writes: VecDeque<u64>,
}

impl Member {
    pub fn start(disks: Disks, context: StartContext, rng: &mut Rng) -> Result<Self, Halt> {
        let Disks { member, log, memory } = disks;
        let StartContext { now, clock, incarnation, first_peers, pre_vote, ledger, fault } = context;
        let (store, recovered) = log.open()?;
        let (disk_state, copies) = (Arc::new(DiskState::default()), Copies::default());
        let engine =
            Arc::new(SimulatedEngine { memory, fault, disk_state: disk_state.clone(), copies: copies.clone() });
        let current: CurrentEngine = Arc::new(Mutex::new(engine.clone()));
        let machine = Machine::open(engine.clone(), CACHE_BYTES)?;
        let store = SimulatedLog::new(store, &recovered, current.clone(), ledger, fault);
        let watching = watch::Settings {
            ring_bytes: *rng.pick(&[0, 500, 1 << 20]),
            pending_bytes: *rng.pick(&[300, 1 << 20]),
            ..watch::Settings::default()
        };
        let (publisher, hub, hub_core) = Hub::assemble(machine.readers().keys, watching, watch::Gauges::detached());
        let outbox = Arc::new(Outbox::default());
        let (outbound_slot, removed_outbox) = (Arc::new(OutboundSlot::default()), outbox.clone());
        let parts = Parts {
            message_sender: outbox.clone(),
            first_peers,
            outbound_slot: outbound_slot.clone(),
            // No real file can exist there.
            copies: PathBuf::from(format!("/dev/null/{member}/{incarnation}")),
            on_removed: Arc::new(move || removed_outbox.notice_removal()),
            ..Parts::alone(engine, machine, publisher, Box::new(store), recovered)
        };
        let inbox = Arc::new(Inbox::default());
        let (node, threads) =
            Node::assemble(&settings(member, incarnation, pre_vote, clock, rng), inbox.clone(), parts)?;
        if rng.percent(50) {
            let _ = inbox.send(Input::ShortenElection);
        }
        let work = threads.background.begin(now);
        Ok(Self {
            incarnation,
            pre_vote,
            node,
            threads,
            inbox,
            outbox,
            disk_state,
            hub,
            outbound_slot,
            hub_core,
            work,
            current,
            copies,
            log,
            fault,
            inputs: Vec::new(),
            tasks: Vec::new(),
            handoffs: Vec::new(),
            background_tasks: Vec::new(),
            due: 0,
            ticks: 0,
            writes: VecDeque::new(),
        })
    }

    /// Moves the contents of all inboxes into the queues here.
    fn collect(&mut self) {
        let raft_thread = &self.threads.core.raft_thread;
        let before = self.inputs.len();
        raft_thread.inbox.drain(&mut self.inputs);
        if let Some(fault) = self.fault {
            let added = self.inputs.split_off(before);
            self.inputs.extend(added.into_iter().filter_map(|input| fault.alter(input)));
        }
        raft_thread.log.drain(&mut self.tasks);
        raft_thread.apply_thread.drain(&mut self.handoffs);
        self.threads.background.inbox.drain(&mut self.background_tasks);
    }

    /// Whether a thread has something to do.
    pub fn has_work(&mut self, thread: MemberThread) -> bool {
        self.collect();
        match thread {
            MemberThread::Raft => self.is_installing() || self.due > 0 || !self.inputs.is_empty(),
            MemberThread::Log => !self.tasks.is_empty(),
            MemberThread::Apply => !self.handoffs.is_empty(),
            MemberThread::Background => !self.background_tasks.is_empty() || !self.compaction_is_done(),
            MemberThread::LeaseExpiry => false, // It runs by the clock.
            MemberThread::Hub => self.hub_core.has_undelivered(),
        }
    }

    /// A message of another member has arrived.
    pub fn receive(&self, message: Message) {
        let _ = self.inbox.send(Input::Messages(vec![message]));
    }

    pub fn tick(&mut self, ticks: u32) {
        self.due = (self.due + ticks).min(LATE_TICKS);
    }

    /// The raft thread processes a share of its inputs, and the ticks that are due.
    pub fn step_raft(&mut self, share: Share) -> RaftOutput {
        let disk_busy = !self.writes.is_empty();
        let led = self.threads.core.raft_thread.replica.leads();
        self.collect();
        let handed_over = self.tasks.len();
        let ticks = mem::take(&mut self.due);
        self.ticks += u64::from(ticks);
        self.threads.core.raft_thread.process(&mut share.of(&mut self.inputs), ticks, Instant::now());
        self.collect();
        let messages = self.outbox.take_messages();
        let disk_stalled = self.writes.front().is_some_and(|since| self.ticks - since >= ELECTION_TICKS);
        let leads = self.threads.core.raft_thread.replica.leads();
        let mut output = RaftOutput { messages, disk_busy: disk_busy && !led && !leads, disk_stalled };
        for task in &mut self.tasks[handed_over..] {
            let LogTask::Write(write) = task else { continue };
            self.writes.push_back(self.ticks);
            if let Some(fault) = self.fault {
                output
                    .messages
                    .extend(write.persisted_messages.extract_if(.., |message| fault.skips_disk_wait(message)));
            }
        }
        output
    }

    /// A snapshot has been accepted; the raft thread does nothing else until it is installed.
    pub fn is_installing(&self) -> bool {
        self.threads.core.raft_thread.accepted.is_some()
    }

    /// Installs the snapshot, after everything that was handed over before is done.
    pub fn install(&mut self, now: Instant, observe: impl FnMut(&Entry)) -> Result<(), Halt> {
        self.write_log(Share::All)?;
        self.apply(Share::All, now, observe)?;
        self.threads.core.install()?;
        self.collect();
        let writes = self.tasks.iter().filter(|task| matches!(task, LogTask::Write(_))).count();
        self.writes = std::iter::repeat_n(self.ticks, writes).collect();
        Ok(())
    }

    /// The log thread executes a share of its tasks.
    pub fn write_log(&mut self, share: Share) -> Result<(), Halt> {
        self.collect();
        let mut tasks = share.of(&mut self.tasks);
        let writes = tasks.iter().filter(|task| matches!(task, LogTask::Write(_))).count();
        self.threads.core.log_thread.process(&mut tasks)?;
        self.writes.drain(..writes);
        Ok(())
    }

    /// The apply thread processes a share of its handoffs; `observe` gets their entries before.
    pub fn apply(&mut self, share: Share, now: Instant, mut observe: impl FnMut(&Entry)) -> Result<(), Halt> {
        self.collect();
        let mut handoffs = share.of(&mut self.handoffs);
        let synced = self.disk_state.durable().last_index;
        for entry in handoffs.iter().flat_map(|handoff| &handoff.entries) {
            assert!(entry.index <= synced, "entry {} is applied, but the log is synced up to {synced}", entry.index);
            observe(entry);
        }
        self.threads.core.apply_thread.process(&mut handoffs, now)
    }

    /// The background thread runs one round.
    pub fn run_background(&mut self, now: Instant) -> Result<(), Halt> {
        self.collect();
        let (background, work) = (&mut self.threads.background, &mut self.work);
        background.handle(work, &mut self.background_tasks, now);
        background.compact(work)?;
        background.flush(work, now)?;
        background.copy(work);
        Ok(())
    }

    /// The lease expiry thread runs one round. Returns when the next one is due.
    pub fn expire_leases(&mut self) -> Duration {
        self.node.lease_expiry().poll()
    }

    /// The hub delivers the published events.
    pub fn deliver(&mut self, now: Duration) -> Result<(), Halt> {
        self.hub.settle(&mut self.hub_core, now).map(|_| ())
    }

    /// Whether no compaction is unfinished.
    pub fn compaction_is_done(&self) -> bool {
        Compaction::pending(&self.threads.background.keys).is_none()
    }

    /// Whether no work is pending between the raft, log and apply threads.
    pub fn is_idle(&mut self) -> bool {
        [MemberThread::Raft, MemberThread::Log, MemberThread::Apply].into_iter().all(|thread| !self.has_work(thread))
    }

    /// The last applied entry.
    pub fn applied(&self) -> AppliedPosition {
        self.threads.core.apply_thread.machine.applied()
    }

    /// The voters and learners according to the database.
    pub fn voters_and_learners(&self) -> VotersAndLearners {
        self.threads.core.apply_thread.machine.members().voters_and_learners()
    }

    /// Makes one of the next operations of the log fail, if it is on files.
    pub fn break_files(&self, operations: u64) -> bool {
        let LogDisk::Files { files, .. } = &self.log else { return false };
        files.fail_at(operations);
        true
    }

    pub fn durable(&self) -> Durable {
        self.disk_state.durable()
    }

    /// The copy of the database as of an index, if it still exists.
    pub fn copy(&self, index: u64) -> Option<Memory> {
        let offer = self.outbound_slot.find(index)?;
        Some(self.copies.lock().get(offer.files.path())?.crash(0))
    }

    /// Opens the copy of another member's database.
    pub fn open_copy(&self, copy: Memory) -> Result<InboundSnapshot, Halt> {
        let (disk_state, copies) = (self.disk_state.clone(), self.copies.clone());
        let engine = Arc::new(SimulatedEngine { memory: copy, fault: self.fault, disk_state, copies });
        let machine = Machine::open(engine.clone(), CACHE_BYTES)?;
        let current = self.current.clone();
        let adopt = Box::new(move || {
            *current.lock() = engine;
            Ok(())
        });
        Ok(InboundSnapshot { machine, adopt })
    }

    /// The power fails. Returns what is left: of the log what was synced, of the database its state at the last flush or any
    /// later one.
    pub fn crash(self, rng: &mut Rng) -> Disks {
        let Self { threads, log, current, node, .. } = self;
        let member = threads.core.raft_thread.id;
        drop((threads, node));
        log.crash(rng);
        let engine = current.lock().clone();
        let memory = engine.memory.crash(rng.below(engine.memory.unflushed() + 1));
        Disks { member, log, memory }
    }
}

/// The output of one step of the raft thread.
pub struct RaftOutput {
    pub messages: Vec<Message>,
    /// The member was a follower, and its disk was busy, during the whole step.
    pub disk_busy: bool,
    /// Its disk has completed nothing for an election timeout.
    pub disk_stalled: bool,
}

/// How many of its pending items a thread processes in one step.
#[derive(Debug, Clone, Copy)]
pub enum Share {
    All,
    First(usize),
}

impl Share {
    pub fn random(rng: &mut Rng) -> Self {
        if rng.percent(70) { Self::All } else { Self::First(1 + rng.below(3)) }
    }

    fn of<T>(self, items: &mut Vec<T>) -> Vec<T> {
        match self {
            Self::All => mem::take(items),
            Self::First(count) => items.drain(..count.min(items.len())).collect(),
        }
    }
}
