//! Gets entries agreed among the members and hands them to the state.
//!
//! This is the only floor that knows raft-rs and the only one that owns threads. Its rooms are values with non-blocking
//! steps; a thread is a thin shell around one of them, so the same code runs under the server and under a simulation.
//!
//! ```text
//! handlers ──Input──▶ raft ──LogTask──▶ log ──"persisted n"──▶ raft
//!                      └───Handoff───▶ apply ──▶ watchers, waiters
//!                                        ├─Chore─▶ keeper: compaction, flush, sizes
//!                                        └─Effect─▶ timekeeper: leases ──Propose──▶ raft
//! ```
//!
//! INVARIANTS
//! * Nothing is applied that the log has not synced: applied ≤ persisted ≤ last.
//! * Nothing is cut from the log that the database has not made durable: truncated ≤ durable applied ≤ applied.
//! * A thread that fails ends the process: a dead node is ordinary to its cluster, a half-dead one is not.

pub mod alone;
pub mod applier;
pub mod data_dir;
pub mod driver;
pub mod identity;
pub mod inbox;
pub mod keeper;
pub mod log;
pub mod replica;
pub mod retention;
pub mod room;
pub mod status;
pub mod timekeeper;
pub mod waiters;

use std::{
    panic::{self, AssertUnwindSafe},
    process,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use raft::eraftpb::ConfState;

use crate::{
    error::{Error, Halt},
    state::{Command, Kind, Machine, Progress, Readers},
    storage::Engine,
    watch::Publisher,
};
use applier::{Applier, Quota};
use driver::{Driver, Input, LogWriter};
use identity::RequestIds;
use inbox::Inbox;
use keeper::{Chore, Habits, Keeper};
use log::{LogStore, MemoryLog, Position, Recovered};
use replica::{Replica, Timing};
use retention::Policy;
use room::Room;
use status::Status;
use timekeeper::{Timekeeper, Times};
use waiters::{ProposalWaiter, ReadWaiter, Waiters};

/// What a node needs to know about itself.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This member.
    pub member_id: u64,
    /// Where the IDs of proposals come from.
    pub ids: Arc<RequestIds>,
    /// How time is counted.
    pub timing: Timing,
    /// How long a proposal or a linearizable read may take.
    pub request_timeout: Duration,
    /// Entries kept behind the applied index when the log is cut.
    pub catchup_entries: u64,
    /// The size that the database may have.
    pub quota: Quota,
    /// What the keeper does when.
    pub habits: Habits,
    /// What is forgotten without being asked.
    pub retention: Policy,
    /// A batch that takes longer to apply is reported.
    pub slow_apply: Duration,
    /// More entries than this between commit and apply, and proposals are refused.
    pub backlog: u64,
}

/// The handle that everybody else has of the node.
pub struct Node {
    raft: Arc<Inbox<Input>>,
    keeper: Arc<Inbox<Chore>>,
    timekeeper: Arc<Timekeeper>,
    status: Arc<Status>,
    readers: Readers,
    engine: Arc<dyn Engine>,
    backlog: u64,
    room: Arc<Room>,
}

/// The rooms of a node, wired to each other and at rest: a thread for each of them, or one for all.
pub struct Rooms {
    /// What agrees.
    pub driver: Driver,
    /// What keeps promises.
    pub writer: LogWriter,
    /// What changes the state.
    pub applier: Applier,
    /// What has time.
    pub keeper: Keeper,
}

/// The node's threads, to be waited for.
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Waits until all threads have ended.
    pub fn join(self) {
        for thread in self.threads {
            // A thread that panicked has ended the process already.
            let _ = thread.join();
        }
    }
}

impl Node {
    /// Starts the threads of a node; see [`Node::assemble`].
    pub fn start(
        settings: &Settings,
        engine: Arc<dyn Engine>,
        machine: Machine,
        publisher: Publisher,
        log: Box<dyn LogStore>,
        recovered: &Recovered,
        logger: &slog::Logger,
    ) -> Result<(Arc<Self>, Threads), Halt> {
        let (node, rooms) = Self::assemble(settings, engine, machine, publisher, log, recovered, logger)?;
        Ok((node, spawn_all(rooms)))
    }

    /// Wires the rooms of a node whose database and log were opened and belong together.
    pub fn assemble(
        settings: &Settings,
        engine: Arc<dyn Engine>,
        machine: Machine,
        publisher: Publisher,
        log: Box<dyn LogStore>,
        recovered: &Recovered,
        logger: &slog::Logger,
    ) -> Result<(Arc<Self>, Rooms), Halt> {
        let readers = machine.readers();
        let Progress { index, term, .. } = machine.applied();
        recovered.check_applied(Position { index, term })?;
        let conf_state = conf_state(&readers);
        let memory = MemoryLog::new(recovered, index, conf_state);
        let replica = Replica::new(settings.member_id, index, memory, settings.timing, logger)?;
        let status = Arc::new(Status::default());
        status.set_applied(index, term);
        status.set_unflushed(recovered.bytes_behind(index));
        status.measure(engine.as_ref())?;
        let raft = Arc::new(Inbox::default());
        // What lies on disk needs no flush: a node that dies young again and again still gets rid of its log.
        let _ = raft.send(Input::Durable(index));
        let keeper = Arc::new(Inbox::default());
        let tick = Duration::from_millis(settings.timing.tick_ms);
        let election_ticks = u32::try_from(settings.timing.election_ticks).unwrap_or(u32::MAX);
        let times = Times { tick, election_timeout: tick * election_ticks, patience: settings.request_timeout };
        let timekeeper = Arc::new(Timekeeper::new(times, status.clone(), raft.clone(), settings.ids.clone()));
        let (id, ids) = (settings.member_id, settings.ids.clone());
        let room = Arc::new(Room::new(settings.quota, id, status.clone(), raft.clone(), ids));
        let node = Arc::new(Self {
            raft: raft.clone(),
            keeper: keeper.clone(),
            timekeeper: timekeeper.clone(),
            status: status.clone(),
            readers,
            engine: engine.clone(),
            backlog: settings.backlog,
            room: room.clone(),
        });
        let keys = machine.shared().clone();
        let driver = Driver {
            replica,
            inbox: raft.clone(),
            log: Arc::new(Inbox::default()),
            applier: Arc::new(Inbox::default()),
            status: status.clone(),
            tick,
            catchup_entries: settings.catchup_entries,
            id: settings.member_id,
        };
        let applier = Applier {
            machine,
            waiters: Waiters::new(settings.request_timeout),
            publisher,
            status: status.clone(),
            keeper: keeper.clone(),
            timekeeper: timekeeper.clone(),
            rising: None,
            room,
            slow: settings.slow_apply,
        };
        let writer = LogWriter { log, raft: raft.clone(), status: status.clone() };
        let (policy, ids, habits) = (settings.retention, settings.ids.clone(), settings.habits);
        let keeper = Keeper { engine, keys, inbox: keeper, raft, status, habits, policy, ids };
        Ok((node, Rooms { driver, writer, applier, keeper }))
    }

    /// Proposes a request, encoded as its client sent it. The waiter hears the outcome, a refusal, or a time-out.
    pub fn propose(&self, id: u64, kind: Kind, request: &[u8], waiter: ProposalWaiter) {
        self.propose_entry(id, Command::encode(id, kind, request), waiter);
    }

    /// Proposes an entry that is encoded already.
    pub fn propose_entry(&self, id: u64, data: Bytes, waiter: ProposalWaiter) {
        if self.status.committed().saturating_sub(self.status.applied()) > self.backlog {
            return waiter(Err(Error::TooManyRequests));
        }
        if let Err(Input::Propose { waiter, .. }) = self.raft.send(Input::Propose { id, data, waiter }) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Calls the waiter when everything that was acknowledged before now can be read here.
    pub fn read_barrier(&self, waiter: ReadWaiter) {
        if self.status.rules_alone() {
            return waiter(Ok(())); // Answers follow the publication of what they promise.
        }
        if let Err(Input::Read(waiter)) = self.raft.send(Input::Read(waiter)) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Calls the waiter when what is known here to be committed is applied here. Asks nobody: for a leader, that is all
    /// that anybody was told of.
    pub fn catch_up(&self, waiter: ReadWaiter) {
        if let Err(Input::CatchUp(waiter)) = self.raft.send(Input::CatchUp(waiter)) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Calls the waiter when nothing is left of what was compacted before now.
    pub fn await_compaction(&self, waiter: Box<dyn FnOnce() + Send>) {
        let _ = self.keeper.send(Chore::AwaitCompaction(waiter));
    }

    /// Readers of what is published.
    #[must_use]
    pub fn readers(&self) -> &Readers {
        &self.readers
    }

    /// Who knows when leases end.
    #[must_use]
    pub fn timekeeper(&self) -> &Arc<Timekeeper> {
        &self.timekeeper
    }

    /// The node in numbers.
    #[must_use]
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// The database, for what is not replicated: its size and its files.
    #[must_use]
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// Whether something of this cost still fits into this member's database.
    #[must_use]
    pub fn has_room_for(&self, cost: u64) -> bool {
        self.room.has_room_for(cost)
    }

    /// Raises the alarm that this member has no room left, then tells the waiter.
    pub fn turn_away(&self, waiter: ProposalWaiter) {
        self.room.turn_away(vec![waiter]);
    }

    /// Rewrites the database's files until removed data takes no room, and measures again.
    pub fn reclaim(&self) -> Result<(), Halt> {
        self.engine.reclaim()?;
        self.status.measure(self.engine.as_ref())
    }

    /// Asks all threads to finish what they have and end.
    pub fn stop(&self) {
        self.raft.close();
        self.keeper.close();
        self.timekeeper.stop();
    }
}

/// Who votes, derived from the one truth about members.
fn conf_state(readers: &Readers) -> ConfState {
    let board = readers.board.read();
    let (learners, voters): (Vec<_>, Vec<_>) = board.members.iter().partition(|member| member.is_learner);
    let ids = |members: Vec<&crate::proto::etcdserverpb::Member>| members.iter().map(|member| member.id).collect();
    ConfState { voters: ids(voters), learners: ids(learners), ..ConfState::default() }
}

fn spawn_all(Rooms { driver, writer, applier, keeper }: Rooms) -> Threads {
    let (log_inbox, applier_inbox) = (driver.log.clone(), driver.applier.clone());
    let engine = keeper.engine.clone();
    let timekeeper = applier.timekeeper.clone();
    let mut threads = vec![spawn("keeper", move || keeper.run()), spawn("timekeeper", move || timekeeper.run())];
    // A restart after a clean stop replays nothing: the last thing is a flush.
    if driver.replica.is_sole_voter() {
        threads.push(spawn("raft", move || alone::run(driver, writer, applier).and_then(|_machine| engine.flush())));
    } else {
        threads.push(spawn("raft", move || {
            driver.run();
            Ok(())
        }));
        threads.push(spawn("log", move || writer.run(&log_inbox)));
        threads.push(spawn("apply", move || applier.run(&applier_inbox).and_then(|_machine| engine.flush())));
    }
    Threads { threads }
}

/// A thread whose failure ends the process, be it an error or a panic (which the panic hook has reported by then).
fn spawn(name: &'static str, run: impl FnOnce() -> Result<(), Halt> + Send + 'static) -> JoinHandle<()> {
    let body = move || match panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => (),
        Ok(Err(halt)) => {
            tracing::error!(thread = name, error = %halt, "cannot go on");
            process::abort();
        }
        Err(_) => process::abort(),
    };
    thread::Builder::new().name(name.into()).spawn(body).expect("the system has room for a handful of threads")
}
