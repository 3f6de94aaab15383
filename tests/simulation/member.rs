//! One member: its two disks, and the rooms that run on them until the power fails.

use std::{
    collections::VecDeque,
    mem,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use metastore::{
    error::Halt,
    mvcc::compact::{Compaction, HASHED_BYTES},
    node::{
        Node, Parts, Rooms, Settings,
        applier::{Handoff, Quota},
        clock::Clock,
        driver::Input,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        keeper::{Chore, Habits, Work},
        log::{Identity, Position},
        peers::Peer,
        replica::Timing,
        retention,
        snapshot::{Incoming, Shelf},
        writer::LogTask,
    },
    state::{Electorate, Machine, Members, Progress},
    storage::memory::Memory,
    watch::{self, Hub, HubCore},
};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState, Message};

use super::{
    dice::Dice,
    disk::{Copies, Current, Durable, Gauge, LogDisk, SimulatedEngine, SimulatedLog},
    fault::Fault,
    mailroom::Mailroom,
    oaths::Ledger,
};

pub const CLUSTER: u64 = 70;
pub const TICK: Duration = Duration::from_millis(100);
pub const ELECTION_TICKS: u64 = 10;
pub const PATIENCE: Duration = Duration::from_secs(3);
pub const CACHE_BYTES: u64 = 10_000;
/// Ticks that a process which was asleep hears of.
pub const LATE_TICKS: u32 = 3;

/// What survives: the disks.
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

/// What a member finds when it starts, beside its disks.
pub struct Surroundings {
    pub now: Instant,
    /// The time by which leases end.
    pub clock: Clock,
    /// Larger for every life of any member.
    pub life: u64,
    /// For one that joins.
    pub first_peers: Vec<Peer>,
    pub pre_vote: bool,
    pub ledger: Arc<Mutex<Ledger>>,
    pub fault: Option<Fault>,
}

/// How a member is set up: drawn once for each life.
fn settings(member: u64, life: u64, pre_vote: bool, clock: Clock, dice: &mut Dice) -> Settings {
    let timeout = 10 + (member * 3 + life) % 10;
    Settings {
        member_id: member,
        ids: Arc::new(RequestIds::new(MemberId::new(member).expect("it is not zero"), life * 1000)),
        clock,
        timing: Timing {
            tick_ms: 100,
            election_ticks: 10,
            pre_vote,
            patience_ms: 3000,
            fixed_timeout: Some(usize::try_from(timeout).expect("it is short")),
        },
        request_timeout: PATIENCE,
        catchup_entries: *dice.pick(&[0, 3, 30]),
        laggard_log_bytes: usize::MAX,
        quota: Quota { bytes: -1 },
        retention: retention::Policy::All,
        habits: Habits {
            compaction_batch: *dice.pick(&[10, 30, 200]),
            compaction_pause: Duration::ZERO,
            compaction_range: *dice.pick(&[2, 5, 1024]),
            hashed_bytes: HASHED_BYTES,
            flush_after_bytes: *dice.pick(&[0, 200, 2000]),
            flush_after: Duration::from_secs(5),
            flush_after_entries: u64::MAX,
        },
        slow_apply: Duration::from_secs(1000),
        backlog: 5000,
    }
}

/// A part of a member that acts by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    Raft,
    Log,
    Apply,
    Keeper,
    LeaseExpiry,
    Hub,
}

impl Room {
    pub const ALL: [Self; 6] = [Self::Raft, Self::Log, Self::Apply, Self::Keeper, Self::LeaseExpiry, Self::Hub];
}

/// A member that runs. Each step is one that its threads could take next.
pub struct Member {
    pub life: u64,
    pub pre_vote: bool,
    pub node: Arc<Node>,
    pub rooms: Rooms,
    pub inbox: Arc<Inbox<Input>>,
    pub mailroom: Arc<Mailroom>,
    pub gauge: Arc<Gauge>,
    pub hub: Arc<Hub>,
    pub shelf: Arc<Shelf>,
    hub_core: HubCore,
    work: Work,
    current: Current,
    copies: Copies,
    log: LogDisk,
    fault: Option<Fault>,
    /// What has arrived at a room, but was not taken up.
    inputs: Vec<Input>,
    tasks: Vec<LogTask>,
    handoffs: Vec<Handoff>,
    chores: Vec<Chore>,
    /// Ticks that have become due and were not counted.
    due: u32,
    ticks: u64,
    /// When each write that waits for the disk was handed over.
    writes: VecDeque<u64>,
}

impl Member {
    /// Starts on these disks.
    pub fn start(disks: Disks, around: Surroundings, dice: &mut Dice) -> Result<Self, Halt> {
        let Disks { member, log, memory } = disks;
        let Surroundings { now, clock, life, first_peers, pre_vote, ledger, fault } = around;
        let (store, recovered) = log.open()?;
        let (gauge, copies) = (Arc::new(Gauge::default()), Copies::default());
        let engine = Arc::new(SimulatedEngine { memory, fault, gauge: gauge.clone(), copies: copies.clone() });
        let current: Current = Arc::new(Mutex::new(engine.clone()));
        let machine = Machine::open(engine.clone(), CACHE_BYTES)?;
        let store = SimulatedLog::new(store, &recovered, current.clone(), ledger, fault);
        let watching = watch::Settings {
            ring_bytes: *dice.pick(&[0, 500, 1 << 20]),
            pending_bytes: *dice.pick(&[300, 1 << 20]),
            ..watch::Settings::default()
        };
        let (publisher, hub, hub_core) = Hub::assemble(machine.readers().keys, watching, watch::Gauges::detached());
        let mailroom = Arc::new(Mailroom::default());
        let (shelf, farewell) = (Arc::new(Shelf::default()), mailroom.clone());
        let parts = Parts {
            post: mailroom.clone(),
            first_peers,
            shelf: shelf.clone(),
            // Nothing real can be there.
            copies: PathBuf::from(format!("/dev/null/{member}/{life}")),
            farewell: Arc::new(move || farewell.say_farewell()),
            ..Parts::alone(engine, machine, publisher, Box::new(store), recovered)
        };
        let inbox = Arc::new(Inbox::default());
        let (node, rooms) = Node::assemble(&settings(member, life, pre_vote, clock, dice), inbox.clone(), parts)?;
        if dice.percent(50) {
            let _ = inbox.send(Input::Hurry);
        }
        let work = rooms.keeper.begin(now);
        Ok(Self {
            life,
            pre_vote,
            node,
            rooms,
            inbox,
            mailroom,
            gauge,
            hub,
            shelf,
            hub_core,
            work,
            current,
            copies,
            log,
            fault,
            inputs: Vec::new(),
            tasks: Vec::new(),
            handoffs: Vec::new(),
            chores: Vec::new(),
            due: 0,
            ticks: 0,
            writes: VecDeque::new(),
        })
    }

    /// Collects what was left at the doors.
    fn collect(&mut self) {
        let driver = &self.rooms.core.driver;
        let before = self.inputs.len();
        driver.inbox.drain(&mut self.inputs);
        if let Some(fault) = self.fault {
            let added = self.inputs.split_off(before);
            self.inputs.extend(added.into_iter().filter_map(|input| fault.corrupts(input)));
        }
        driver.log.drain(&mut self.tasks);
        driver.applier.drain(&mut self.handoffs);
        self.rooms.keeper.inbox.drain(&mut self.chores);
    }

    /// Whether a room has something to do.
    pub fn is_wanted(&mut self, room: Room) -> bool {
        self.collect();
        match room {
            Room::Raft => self.is_installing() || self.due > 0 || !self.inputs.is_empty(),
            Room::Log => !self.tasks.is_empty(),
            Room::Apply => !self.handoffs.is_empty(),
            Room::Keeper => !self.chores.is_empty() || !self.compaction_is_done(),
            Room::LeaseExpiry => false, // It looks at the clock by itself.
            Room::Hub => self.hub_core.has_news(),
        }
    }

    /// Another member's letters are here.
    pub fn receive(&self, message: Message) {
        let _ = self.inbox.send(Input::Messages(vec![message]));
    }

    /// Time went by.
    pub fn tick(&mut self, ticks: u32) {
        self.due = (self.due + ticks).min(LATE_TICKS);
    }

    /// The raft thread hears the first so many inputs and the ticks that are due.
    pub fn turn(&mut self, share: Share) -> Said {
        let waited = !self.writes.is_empty();
        let led = self.rooms.core.driver.replica.leads();
        self.collect();
        let handed_over = self.tasks.len();
        let ticks = mem::take(&mut self.due);
        self.ticks += u64::from(ticks);
        self.rooms.core.driver.take(&mut share.of(&mut self.inputs), ticks);
        self.collect();
        let messages = self.mailroom.take();
        let stands_still = self.writes.front().is_some_and(|since| self.ticks - since >= ELECTION_TICKS);
        let leads = self.rooms.core.driver.replica.leads();
        let mut said = Said { messages, waited: waited && !led && !leads, stands_still };
        for task in &mut self.tasks[handed_over..] {
            let LogTask::Write(write) = task else { continue };
            self.writes.push_back(self.ticks);
            if let Some(fault) = self.fault {
                said.messages.extend(write.promises.extract_if(.., |message| fault.hastens(message)));
            }
        }
        said
    }

    /// A snapshot has been accepted, and nothing else happens before it is in place.
    pub fn is_installing(&self) -> bool {
        self.rooms.core.driver.accepted.is_some()
    }

    /// Puts it in place, when all that was handed over before is done.
    pub fn install(&mut self, now: Instant, see: impl FnMut(&Entry)) -> Result<(), Halt> {
        self.write_log(Share::All)?;
        self.apply(Share::All, now, see)?;
        self.rooms.core.install()?;
        self.collect();
        let writes = self.tasks.iter().filter(|task| matches!(task, LogTask::Write(_))).count();
        self.writes = std::iter::repeat_n(self.ticks, writes).collect();
        Ok(())
    }

    /// The log thread carries out the first so many tasks.
    pub fn write_log(&mut self, share: Share) -> Result<(), Halt> {
        self.collect();
        let mut tasks = share.of(&mut self.tasks);
        let writes = tasks.iter().filter(|task| matches!(task, LogTask::Write(_))).count();
        self.rooms.core.writer.take(&mut tasks)?;
        self.writes.drain(..writes);
        Ok(())
    }

    /// The apply thread takes the first so many handoffs; `see` is shown their entries before.
    pub fn apply(&mut self, share: Share, now: Instant, mut see: impl FnMut(&Entry)) -> Result<(), Halt> {
        self.collect();
        let mut handoffs = share.of(&mut self.handoffs);
        let synced = self.gauge.durable().last_index;
        for entry in handoffs.iter().flat_map(|handoff| &handoff.entries) {
            assert!(entry.index <= synced, "entry {} is applied, but synced is {synced}", entry.index);
            see(entry);
        }
        self.rooms.core.applier.take(&mut handoffs, now)
    }

    /// The keeper looks around once.
    pub fn keep(&mut self, now: Instant) -> Result<(), Halt> {
        self.collect();
        let (keeper, work) = (&mut self.rooms.keeper, &mut self.work);
        keeper.hear(work, &mut self.chores, now);
        keeper.compact(work)?;
        keeper.flush(work, now)?;
        keeper.copy(work);
        Ok(())
    }

    /// The thread of lease expiry looks around once. Returns when it wants to look again.
    pub fn expire_leases(&mut self) -> Duration {
        self.node.timekeeper().look()
    }

    /// The hub delivers what was published.
    pub fn deliver(&mut self, now: Duration) -> Result<(), Halt> {
        self.hub.settle(&mut self.hub_core, now).map(|_| ())
    }

    /// Whether nothing is left of what was compacted.
    pub fn compaction_is_done(&self) -> bool {
        Compaction::pending(&self.rooms.keeper.keys).is_none()
    }

    /// Whether nothing is on its way from room to room.
    pub fn is_quiet(&mut self) -> bool {
        [Room::Raft, Room::Log, Room::Apply].into_iter().all(|room| !self.is_wanted(room))
    }

    /// The last applied entry.
    pub fn applied(&self) -> Progress {
        self.rooms.core.applier.machine.applied()
    }

    /// Who votes and who learns, by the database.
    pub fn electorate(&self) -> Electorate {
        self.rooms.core.applier.machine.members().electorate()
    }

    /// Breaks the disk of the log at one of its next operations, if it lies on files.
    pub fn break_files(&self, operations: u64) -> bool {
        let LogDisk::Files { files, .. } = &self.log else { return false };
        files.fail_at(operations);
        true
    }

    pub fn durable(&self) -> Durable {
        self.gauge.durable()
    }

    /// A copy of the database as of an index, if it still lies there.
    pub fn copy(&self, index: u64) -> Option<Memory> {
        let offer = self.shelf.find(index)?;
        Some(self.copies.lock().get(offer.files.path())?.crash(0))
    }

    /// Opens another member's copy.
    pub fn open_copy(&self, copy: Memory) -> Result<Incoming, Halt> {
        let (gauge, copies) = (self.gauge.clone(), self.copies.clone());
        let engine = Arc::new(SimulatedEngine { memory: copy, fault: self.fault, gauge, copies });
        let machine = Machine::open(engine.clone(), CACHE_BYTES)?;
        let current = self.current.clone();
        let adopt = Box::new(move || {
            *current.lock() = engine;
            Ok(())
        });
        Ok(Incoming { machine, adopt })
    }

    /// The power fails. Returns what is found afterwards: of the log what was synced, of the database anything from the last
    /// flush on.
    pub fn crash(self, dice: &mut Dice) -> Disks {
        let Self { rooms, log, current, node, .. } = self;
        let member = rooms.core.driver.id;
        drop((rooms, node));
        log.crash(dice);
        let engine = current.lock().clone();
        let memory = engine.memory.crash(dice.below(engine.memory.unflushed() + 1));
        Disks { member, log, memory }
    }
}

/// What the raft thread said in a turn.
pub struct Said {
    pub messages: Vec<Message>,
    /// It followed, and its disk was at work all the while.
    pub waited: bool,
    /// Its disk has stood still for an election timeout.
    pub stands_still: bool,
}

/// How much of what has arrived a room takes up.
#[derive(Debug, Clone, Copy)]
pub enum Share {
    All,
    First(usize),
}

impl Share {
    pub fn draw(dice: &mut Dice) -> Self {
        if dice.percent(70) { Self::All } else { Self::First(1 + dice.below(3)) }
    }

    fn of<T>(self, letters: &mut Vec<T>) -> Vec<T> {
        match self {
            Self::All => mem::take(letters),
            Self::First(count) => letters.drain(..count.min(letters.len())).collect(),
        }
    }
}
