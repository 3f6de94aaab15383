//! One member: its two disks, and the rooms that run on them until the power fails.

use std::{
    mem,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use metastore::{
    error::Halt,
    mvcc::compact::Compaction,
    node::{
        Node, Parts, Rooms, Settings,
        applier::{Handoff, Quota},
        driver::Input,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        keeper::{Habits, Work},
        log::{Identity, Position, volatile::VolatileLog},
        replica::Timing,
        retention,
        writer::LogTask,
    },
    proto::etcdserverpb,
    state::{Machine, Members, Progress},
    storage::memory::Memory,
    watch,
};
use raft::eraftpb::{Entry, HardState};

use super::{
    dice::Dice,
    disk::{Fault, LogGauge, SimulatedEngine, SimulatedLog},
};

pub const MEMBER: u64 = 7;
const CLUSTER: u64 = 70;
/// The log position that a cluster is founded at.
const ORIGIN: Position = Position { index: 1, term: 1 };
pub const TICK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(3);
const CACHE_BYTES: u64 = 10_000;

/// What survives: the disks.
pub struct Disks {
    pub log: VolatileLog,
    pub memory: Memory,
}

impl Disks {
    /// The disks of a member that founds a cluster of its own.
    pub fn found() -> Self {
        let identity = Identity { cluster_id: CLUSTER, member_id: MEMBER };
        let hard_state = HardState { term: ORIGIN.term, commit: ORIGIN.index, ..HardState::default() };
        let log = VolatileLog::create(identity, ORIGIN, &hard_state);
        Self { log, memory: founded_database() }
    }
}

/// The database of a cluster of one, before its first entry.
pub fn founded_database() -> Memory {
    let memory = Memory::default();
    let members = Members::new([etcdserverpb::Member { id: MEMBER, ..etcdserverpb::Member::default() }]);
    Machine::bootstrap(&memory, CLUSTER, &members, (ORIGIN.index, ORIGIN.term)).expect("memory does not fail");
    memory
}

/// How a member is set up: drawn once for each life.
fn settings(dice: &mut Dice) -> Settings {
    Settings {
        member_id: MEMBER,
        ids: Arc::new(RequestIds::new(MemberId::new(MEMBER).expect("it is not zero"), 0)),
        timing: Timing {
            tick_ms: 100,
            election_ticks: 10,
            pre_vote: true,
            patience_ms: u64::try_from(PATIENCE.as_millis()).expect("it is short"),
            fixed_timeout: Some(10),
        },
        request_timeout: PATIENCE,
        catchup_entries: *dice.pick(&[0, 3, 30]),
        laggard_log_bytes: usize::MAX,
        quota: Quota { bytes: -1 },
        retention: retention::Policy::All,
        habits: Habits {
            compaction_batch: *dice.pick(&[1, 3, 20]),
            compaction_pause: Duration::ZERO,
            remembers_hashes: false,
            flush_after_bytes: *dice.pick(&[0, 200, 2000]),
            flush_after: Duration::from_secs(5),
            flush_after_entries: u64::MAX,
        },
        slow_apply: Duration::from_secs(1000),
        backlog: 5000,
    }
}

/// A member that runs. Each step is one that its threads could take next.
pub struct Member {
    pub node: Arc<Node>,
    rooms: Rooms,
    work: Work,
    engine: Arc<SimulatedEngine>,
    log: VolatileLog,
    gauge: Arc<LogGauge>,
    /// What has arrived at a room, but was not taken up.
    inputs: Vec<Input>,
    tasks: Vec<LogTask>,
    handoffs: Vec<Handoff>,
}

impl Member {
    /// Starts on these disks.
    pub fn start(disks: Disks, fault: Option<Fault>, now: Instant, dice: &mut Dice) -> Result<Self, Halt> {
        let Disks { log, memory } = disks;
        let recovered = log.open()?;
        let engine = Arc::new(SimulatedEngine { memory, fault });
        let machine = Machine::open(engine.clone(), CACHE_BYTES)?;
        let gauge = Arc::new(LogGauge::default());
        gauge.synced.store(recovered.last_index(), Ordering::Relaxed);
        let written = recovered.last_index();
        let (engine_too, gauge_too) = (engine.clone(), gauge.clone());
        let store =
            SimulatedLog { log: log.clone(), engine: engine_too, gauge: gauge_too, fault, owes_sync: false, written };
        // Nobody watches: events go into a ring that forgets them.
        let (publisher, _, _) =
            watch::Hub::assemble(machine.readers().keys, watch::Settings::default(), watch::Gauges::detached());
        let parts = Parts::alone(engine.clone(), machine, publisher, Box::new(store), recovered);
        let (node, rooms) = Node::assemble(&settings(dice), Arc::new(Inbox::default()), parts)?;
        let work = rooms.keeper.begin(now);
        Ok(Self { node, rooms, work, engine, log, gauge, inputs: Vec::new(), tasks: Vec::new(), handoffs: Vec::new() })
    }

    /// The raft thread hears the first so many inputs, and so many ticks go by.
    pub fn turn(&mut self, share: Share, ticks: u32) {
        self.rooms.core.driver.inbox.drain(&mut self.inputs);
        self.rooms.core.driver.take(&mut share.of(&mut self.inputs), ticks);
    }

    /// The log thread carries out the first so many tasks.
    pub fn write_log(&mut self, share: Share) -> Result<(), Halt> {
        self.rooms.core.driver.log.drain(&mut self.tasks);
        self.rooms.core.writer.take(&mut share.of(&mut self.tasks))
    }

    /// The apply thread takes the first so many handoffs; `see` is shown their entries before.
    pub fn apply(&mut self, share: Share, now: Instant, mut see: impl FnMut(&Entry)) -> Result<(), Halt> {
        self.rooms.core.driver.applier.drain(&mut self.handoffs);
        let mut handoffs = share.of(&mut self.handoffs);
        let synced = self.gauge.synced.load(Ordering::Relaxed);
        for entry in handoffs.iter().flat_map(|handoff| &handoff.entries) {
            assert!(entry.index <= synced, "entry {} is applied, but synced is {synced}", entry.index);
            see(entry);
        }
        self.rooms.core.applier.take(&mut handoffs, now)
    }

    /// The keeper goes on with the compaction that is due.
    pub fn compact(&mut self, now: Instant) -> Result<(), Halt> {
        let keeper = &mut self.rooms.keeper;
        let mut chores = Vec::new();
        keeper.inbox.drain(&mut chores);
        keeper.hear(&mut self.work, &mut chores, now);
        keeper.compact(&mut self.work)
    }

    /// The keeper flushes, if it thinks that it is time to.
    pub fn flush(&mut self, now: Instant) -> Result<(), Halt> {
        self.rooms.keeper.flush(&mut self.work, now)
    }

    /// Whether nothing is left of what was compacted.
    pub fn compaction_is_done(&self) -> bool {
        Compaction::pending(&self.rooms.keeper.keys).is_none()
    }

    /// Whether nothing is on its way from room to room.
    pub fn is_quiet(&mut self) -> bool {
        self.rooms.core.driver.inbox.drain(&mut self.inputs);
        self.rooms.core.driver.log.drain(&mut self.tasks);
        self.rooms.core.driver.applier.drain(&mut self.handoffs);
        self.inputs.is_empty() && self.tasks.is_empty() && self.handoffs.is_empty()
    }

    /// The last applied entry.
    pub fn applied(&self) -> Progress {
        self.rooms.core.applier.machine.applied()
    }

    /// The power fails, maybe in the middle of what the log was about to do. Returns what is found afterwards: of the log
    /// what was synced, of the database anything from the last flush on.
    pub fn crash(mut self, dice: &mut Dice) -> Disks {
        if dice.percent(50) {
            self.gauge.fuse.store(1 + dice.below(3) as u64, Ordering::Relaxed);
            let _ = self.write_log(Share::All);
        }
        self.log.crash(dice.percent(50));
        let memory = self.engine.memory.crash(dice.below(self.engine.memory.unflushed() + 1));
        Disks { log: self.log, memory }
    }
}

/// How much of what has arrived a room takes up.
#[derive(Debug, Clone, Copy)]
pub enum Share {
    All,
    First(usize),
}

impl Share {
    pub fn draw(dice: &mut Dice) -> Self {
        if dice.percent(50) { Self::All } else { Self::First(1 + dice.below(3)) }
    }

    fn of<T>(self, letters: &mut Vec<T>) -> Vec<T> {
        match self {
            Self::All => mem::take(letters),
            Self::First(count) => letters.drain(..count.min(letters.len())).collect(),
        }
    }
}
