//! Gets entries agreed among the members and hands them to the state.
//!
//! This is the only floor that knows raft-rs, and its threads are those on which a member lives. Its rooms are values with
//! non-blocking steps; a thread is a thin shell around one of them, so the same code runs under the server and under a
//! simulation. (Other threads serve those who ask: the watch hub's two, the read pool's, the runtimes'.)
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

pub mod applier;
pub mod changes;
pub mod clock;
pub mod data_dir;
pub mod databases;
pub mod driver;
pub mod identity;
pub mod keeper;
pub mod links;
pub mod log;
pub mod peers;
pub mod replica;
pub mod retention;
pub mod room;
pub mod shell;
pub mod snapshot;
pub mod status;
pub mod timekeeper;
pub mod transport;
pub mod waiters;
pub mod writer;

use std::{
    ops::Deref,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use bytes::Bytes;

pub use crate::inbox;
use crate::{
    error::{Error, Halt},
    metrics,
    state::{Command, Kind, Machine, Progress, Readers},
    storage::{Engine, Lack},
    watch::Publisher,
};
use applier::{Applier, Quota};
use clock::Clock;
use driver::{Driver, Input, ProgressWaiter};
use identity::RequestIds;
use inbox::Inbox;
use keeper::{Chore, Habits, Keeper};
use links::Links;
use log::{LogStore, MemoryLog, Position, Recovered};
use peers::{Nobody, Peer, Post};
use replica::{Life, Replica, Timing};
use retention::Policy;
use room::Room;
use shell::{Core, guarded};
use snapshot::{Giving, Shelf, conf_state};
use status::Status;
use timekeeper::{Timekeeper, Times};
use waiters::{Hopes, ProposalWaiter, ReadWaiter, Waiters};
use writer::LogWriter;

/// What a node needs to know about itself.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This member.
    pub member_id: u64,
    /// Where the IDs of proposals come from.
    pub ids: Arc<RequestIds>,
    /// How time is counted.
    pub timing: Timing,
    /// Where the time of leases comes from.
    pub clock: Clock,
    /// How long a proposal or a linearizable read may take.
    pub request_timeout: Duration,
    /// Entries kept behind the applied index when the log is cut.
    pub catchup_entries: u64,
    /// The log in memory may grow to this for the sake of members that are behind.
    pub laggard_log_bytes: usize,
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

/// What a node is made of: its disks, opened, and its neighbours.
pub struct Parts {
    /// The database.
    pub engine: Arc<dyn Engine>,
    /// The state in it.
    pub machine: Machine,
    /// Where events go.
    pub publisher: Publisher,
    /// The log.
    pub log: Box<dyn LogStore>,
    /// What was in it.
    pub recovered: Recovered,
    /// Who carries messages to the other members.
    pub post: Arc<dyn Post>,
    /// Which of them are connected.
    pub links: Arc<Links>,
    /// The members, for one that joins a cluster and knows nothing of it yet.
    pub first_peers: Vec<Peer>,
    /// Where copies of the database lie that others may be given.
    pub shelf: Arc<Shelf>,
    /// Where they are made.
    pub copies: PathBuf,
    /// Called when the cluster has removed this member.
    pub farewell: Arc<dyn Fn() + Send + Sync>,
    /// Hears what raft has to say.
    pub logger: slog::Logger,
}

impl Parts {
    /// For a member that has nobody to talk to, and never will.
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
            post: Arc::new(Nobody),
            links: Arc::default(),
            first_peers: Vec::new(),
            shelf: Arc::default(),
            copies: PathBuf::new(),
            farewell: Arc::new(|| ()),
            logger: slog::Logger::root(slog::Discard, slog::o!()),
        }
    }
}

/// What readers read, and where it lies: changes as a whole when a snapshot takes its place.
pub struct Stores {
    /// Looks at what was published.
    pub readers: Readers,
    /// The database, for what is not replicated: its size and its files.
    pub engine: Arc<dyn Engine>,
}

/// The present readers. Holding them keeps the state that they read, not the present one: get them anew for each request.
pub struct Present(Guard<Arc<Stores>>);

impl Deref for Present {
    type Target = Readers;

    fn deref(&self) -> &Readers {
        &self.0.readers
    }
}

/// The handle that everybody else has of the node.
pub struct Node {
    raft: Arc<Inbox<Input>>,
    keeper: Arc<Inbox<Chore>>,
    timekeeper: Arc<Timekeeper>,
    status: Arc<Status>,
    stores: Arc<ArcSwap<Stores>>,
    links: Arc<Links>,
    backlog: u64,
    room: Arc<Room>,
}

/// The rooms of a node, wired to each other and at rest: a thread for each of them, or one for many.
pub struct Rooms {
    /// What agrees, what keeps promises, what changes the state.
    pub core: Core,
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
    pub fn start(settings: &Settings, raft: Arc<Inbox<Input>>, parts: Parts) -> Result<(Arc<Self>, Threads), Halt> {
        let (node, rooms) = Self::assemble(settings, raft, parts)?;
        Ok((node, spawn_all(rooms)))
    }

    /// Wires the rooms of a node whose database and log were opened and belong together. `raft` is what it will hear.
    pub fn assemble(settings: &Settings, raft: Arc<Inbox<Input>>, parts: Parts) -> Result<(Arc<Self>, Rooms), Halt> {
        let Parts { engine, machine, publisher, mut log, mut recovered, post, .. } = parts;
        let Progress { index, term, .. } = machine.applied();
        let reached = Position { index, term };
        finish_install(log.as_mut(), &mut recovered, reached)?;
        recovered.check_applied(reached)?;
        let memory = MemoryLog::new(&recovered, index, conf_state(&machine.members().electorate()));
        let life = Life { member: settings.member_id, number: settings.ids.next() };
        let replica = Replica::new(life, index, memory, settings.timing, &parts.logger)?;
        let tick = Duration::from_millis(settings.timing.tick_ms);
        let status = Arc::new(Status::new(settings.clock.clone(), tick * timekeeper::TICKS_AWAY));
        status.set_applied(index, term);
        status.set_unflushed(recovered.bytes_behind(index));
        status.measure(engine.as_ref())?;
        metrics::measured("log", replica.log_bytes() as u64);
        // What lies on disk needs no flush: a node that dies young again and again still gets rid of its log.
        let _ = raft.send(Input::Durable(reached));
        let keeper = Arc::new(Inbox::default());
        let election_ticks = u32::try_from(settings.timing.election_ticks).unwrap_or(u32::MAX);
        let times = Times { tick, election_timeout: tick * election_ticks, patience: settings.request_timeout };
        let timekeeper = Arc::new(Timekeeper::new(times, status.clone(), raft.clone(), settings.ids.clone()));
        let (id, ids) = (settings.member_id, settings.ids.clone());
        let room = Arc::new(Room::new(settings.quota, id, status.clone(), raft.clone(), ids));
        let stores = Stores { readers: machine.readers(), engine: engine.clone() };
        let stores = Arc::new(ArcSwap::from_pointee(stores));
        let node = Arc::new(Self {
            raft: raft.clone(),
            keeper: keeper.clone(),
            timekeeper: timekeeper.clone(),
            status: status.clone(),
            stores: stores.clone(),
            links: parts.links.clone(),
            backlog: settings.backlog,
            room: room.clone(),
        });
        let keys = machine.shared().clone();
        let driver = Driver {
            replica,
            inbox: raft.clone(),
            log: Arc::new(Inbox::default()),
            applier: Arc::new(Inbox::default()),
            keeper: keeper.clone(),
            post: post.clone(),
            giving: Giving::new(parts.shelf),
            status: status.clone(),
            tick,
            election_ticks: u64::from(election_ticks),
            catchup_entries: settings.catchup_entries,
            laggard_log_bytes: settings.laggard_log_bytes,
            id: settings.member_id,
            farewell: parts.farewell,
            arrived: None,
            leaving: None,
            accepted: None,
        };
        let writer = LogWriter { log, raft: raft.clone(), post: post.clone(), status: status.clone() };
        let applier = Applier {
            machine,
            waiters: Waiters::new(settings.request_timeout),
            publisher,
            status: status.clone(),
            stores,
            raft: raft.clone(),
            post,
            id: settings.member_id,
            keeper: keeper.clone(),
            timekeeper,
            rising: None,
            hopes: Hopes {
                id: settings.member_id,
                links: parts.links.clone(),
                election_timeout: tick * election_ticks,
                elected_at: None,
                leaderless_since: None,
            },
            room,
            slow: settings.slow_apply,
        };
        if applier.machine.members().iter().next().is_some() {
            applier.tell_peers();
        } else {
            applier.post.set_peers(parts.first_peers, Vec::new());
        }
        let (policy, ids, habits) = (settings.retention, settings.ids.clone(), settings.habits);
        let keeper = Keeper { engine, keys, inbox: keeper, raft, status, habits, policy, ids, copies: parts.copies };
        Ok((node, Rooms { core: Core { driver, writer, applier }, keeper }))
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

    /// Proposes an entry that changes who votes or learns: it travels inside raft's own kind of change.
    pub fn change_members(&self, id: u64, entry: Bytes, waiter: ProposalWaiter) {
        let change = changes::for_raft(entry).expect("only what changes the members is proposed as such a change");
        if let Err(Input::Change { waiter, .. }) = self.raft.send(Input::Change { id, change, waiter }) {
            waiter(Err(Error::Stopped));
        }
    }

    /// Tells how far each member is known to be, if this one leads.
    pub fn progress(&self, waiter: ProgressWaiter) {
        if let Err(Input::Progress(waiter)) = self.raft.send(Input::Progress(waiter)) {
            waiter(None);
        }
    }

    /// Lets another voter lead, as soon as it has everything; whether it does is seen in [`Status::leader`].
    pub fn transfer_leader(&self, to: u64) {
        let _ = self.raft.send(Input::Transfer(to));
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
    pub fn readers(&self) -> Present {
        Present(self.stores.load())
    }

    /// Who knows when leases end.
    #[must_use]
    pub fn timekeeper(&self) -> &Arc<Timekeeper> {
        &self.timekeeper
    }

    /// Which members are connected, and since when.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// The node in numbers.
    #[must_use]
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// The database, for what is not replicated: its size and its files.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn Engine> {
        self.stores.load().engine.clone()
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

    /// Rewrites the database's files until removed data takes no room, and measures again; or says why it does not begin.
    pub fn reclaim(&self) -> Result<Option<Lack>, Halt> {
        let engine = self.engine();
        let lack = engine.reclaim()?;
        self.status.measure(engine.as_ref())?;
        Ok(lack)
    }

    /// Measures the database, for who wants to see its size as it is.
    pub fn measure(&self) -> Result<(), Halt> {
        self.status.measure(self.engine().as_ref())
    }

    /// Asks all threads to finish what they have and end.
    pub fn stop(&self) {
        self.raft.close();
        self.keeper.close();
        self.timekeeper.stop();
    }
}

/// Comes to the end of an install that a crash interrupted between the database and the log, and forgets one that never came
/// to the database.
pub fn finish_install(log: &mut dyn LogStore, recovered: &mut Recovered, applied: Position) -> Result<(), Halt> {
    if let Some(at) = recovered.interrupted_install(applied) {
        tracing::warn!(index = at.index, term = at.term, "finishing the install of a snapshot that was interrupted");
        let mut hard_state = recovered.hard_state.clone();
        if hard_state.term < at.term {
            (hard_state.term, hard_state.vote) = (at.term, 0); // The term was to be written with the reset.
        }
        hard_state.commit = at.index;
        log.reset(at, &hard_state)?;
        recovered.restart_behind(at, hard_state);
    } else if recovered.installing.take().is_some() {
        log.set_installing(None)?;
    }
    Ok(())
}

fn spawn_all(Rooms { core, keeper }: Rooms) -> Threads {
    let timekeeper = core.applier.timekeeper.clone();
    let threads = vec![
        spawn("keeper", move || keeper.run()),
        spawn("timekeeper", move || timekeeper.run()),
        spawn("raft", move || core.run()),
    ];
    Threads { threads }
}

/// A thread whose failure ends the process.
fn spawn(name: &'static str, run: impl FnOnce() -> Result<(), Halt> + Send + 'static) -> JoinHandle<()> {
    let thread = thread::Builder::new().name(name.into());
    thread.spawn(move || guarded(name, run)).expect("the system has room for a handful of threads")
}
