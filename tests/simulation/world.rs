//! One run: a cluster, its clients, a seed that determines what happens next, and the invariants that are checked throughout.
//!
//! * What one member has applied is the committed history: no crash changes it or makes it shorter, on any member.
//! * Every answer is the model's answer to that command at its position in that history.
//! * The state is the model's, at the head and at every revision that is not compacted; it is equal on all members at the same
//!   index.
//! * A read behind the barrier sees every write that was acknowledged, and everything that an answered read has seen, before the
//!   read was requested.
//! * Nothing is applied that the log has not reported as durable; the log is not truncated beyond what the database has made
//!   durable.
//! * No lease expires before its last renewal plus its time to live, and each does soon after that.
//! * Every watcher receives all events, once and in order.
//! * Raft's voters are the voters of the member table.
//! * In the quiescent phase all members reach the same state; its hash is that of a member that applied the history without any
//!   fault.
//!
//! What members send is checked by [`RaftChecks`] and [`check_durability`](super::raft_checks::check_durability).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use metastore::{
    error::Halt,
    node::{clock::Clock, messages::Peer, snapshot::conf_state},
    proto::etcdserverpb,
    raft_log::Position,
    state::Members,
};
use parking_lot::Mutex;
use raft::eraftpb::Message;

use super::{
    clients::Completions,
    config::WorldConfig,
    delivery::SnapshotTransfer,
    event_queue::EventQueue,
    history::History,
    lease_owners::LeaseOwners,
    member::{Disks, LATE_TICKS, Member, MemberThread, Share, StartContext, TICK},
    network::Network,
    planted_faults::{ContextReuse, Fault},
    raft_checks::{EarlyMessages, Ledger, RaftChecks},
    rng::Rng,
    watcher::Watcher,
};

/// The longest interval between two rounds of the background thread.
const BACKGROUND_INTERVAL: Duration = Duration::from_millis(500);

/// After this many steps without an event a watcher has received everything: the end of a watch, the creation of the next one,
/// and its answer.
const QUIET_STEPS: usize = 4;

/// The longest that a scenario waits for something.
const WAIT_LIMIT: Duration = Duration::from_mins(2);

/// An event of the simulation.
#[derive(Debug)]
pub enum Event {
    /// A member's clock ticks.
    Tick { member: u64, incarnation: u64 },
    /// A thread of a member runs.
    RunThread { member: u64, incarnation: u64, thread: MemberThread },
    /// A message arrives.
    Arrival {
        /// The member that sent it, which may have forwarded another's message.
        via: u64,
        message: Box<Message>,
    },
    /// A member notices that its connection to another is broken.
    ConnectionBroken { from: u64, to: u64 },
    /// A member tries to connect again.
    Reconnect { from: u64, incarnation: u64, to: u64 },
    /// A snapshot has been sent completely.
    SnapshotArrived(u64),
    /// The sender learns the outcome of a snapshot.
    SnapshotReported { transfer: u64, arrived: bool },
    /// A member starts on its disks, for the first time or again.
    Start(u64),
    /// A member that was removed stops for good.
    StopRemoved(u64),
    /// A client sends a request.
    ClientRequest,
    /// The owner of a lease acts.
    LeaseOwner(usize),
    /// A request to renew a lease arrives at a member.
    Renewal { lease: i64, at: u64 },
    /// A disruption occurs.
    Disruption,
    /// All links work again.
    Heal,
}

/// A member, running or not.
#[derive(Default)]
pub struct MemberSlot {
    pub member: Option<Member>,
    /// Present while the member is not running.
    pub disks: Option<Disks>,
    /// Threads that are scheduled to run.
    pub scheduled: BTreeSet<MemberThread>,
    /// Until when the log thread, the apply thread, or the whole process stands still.
    pub log_stalled_until: Duration,
    pub apply_stalled_until: Duration,
    pub paused_until: Duration,
    /// It knows that it was removed, so it is about to stop.
    pub knows_of_removal: bool,
    /// It has stopped for good, because it was removed.
    pub gone: bool,
    /// The time between two ticks of its clock.
    pub tick: Duration,
}

impl MemberSlot {
    /// Until when a thread is stalled.
    fn stalled_until(&self, thread: MemberThread) -> Duration {
        let own = match thread {
            MemberThread::Log => self.log_stalled_until,
            MemberThread::Apply => self.apply_stalled_until,
            MemberThread::Raft | MemberThread::Background | MemberThread::LeaseExpiry | MemberThread::Hub => {
                Duration::ZERO
            }
        };
        own.max(self.paused_until)
    }
}

/// The state of a run.
pub struct World {
    pub rng: Rng,
    pub config: WorldConfig,
    pub events: EventQueue<Event>,
    started: Instant,
    pub fault: Option<Fault>,
    pub context_reuse: Option<ContextReuse>,
    pub slots: BTreeMap<u64, MemberSlot>,
    pub network: Network,
    pub transfers: BTreeMap<u64, SnapshotTransfer>,
    pub history: History,
    pub raft_checks: RaftChecks,
    pub ledger: Arc<Mutex<Ledger>>,
    pub completions: Completions,
    pub watchers: Vec<Watcher>,
    pub lease_owners: LeaseOwners,
    /// The time of members' clocks, in nanoseconds.
    nanos: Arc<AtomicU64>,
    /// The highest revision that a client was told of.
    pub acknowledged: i64,
    pub next_id: u64,
    incarnations: u64,
    /// There are no more disruptions, and clients send nothing.
    pub quiescent: bool,
    pub report: Report,
    /// One line for each event, if tracing is on.
    pub trace: Option<Vec<String>>,
}

/// Counters of one or more runs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    pub crashes: usize,
    pub entries: usize,
    pub answers: usize,
    pub reads: usize,
    pub events_received: usize,
    pub leader_terms: usize,
    pub snapshots: usize,
    pub changes: usize,
    /// Renewals that were answered with a time to live, and leases that expired.
    pub renewals: usize,
    pub expiries: usize,
    /// Messages that followers sent before their disk write was done, by type.
    pub early: EarlyMessages,
}

impl Report {
    pub fn add(&mut self, other: &Self) {
        self.crashes += other.crashes;
        self.entries += other.entries;
        self.answers += other.answers;
        self.reads += other.reads;
        self.events_received += other.events_received;
        self.leader_terms += other.leader_terms;
        self.snapshots += other.snapshots;
        self.changes += other.changes;
        self.renewals += other.renewals;
        self.expiries += other.expiries;
        for (kind, count) in &other.early {
            *self.early.entry(kind).or_default() += count;
        }
    }
}

impl World {
    /// The world of a seed.
    pub fn new(seed: u64, fault: Option<Fault>, tracing: bool) -> Self {
        let mut rng = Rng::new(seed);
        let mut config = WorldConfig::random(&mut rng);
        if fault.is_some_and(Fault::is_about_leases) {
            config.focus_on_leases();
        }
        Self::with(config, rng, fault, tracing)
    }

    pub fn with(config: WorldConfig, rng: Rng, fault: Option<Fault>, tracing: bool) -> Self {
        let founders = Members::new((1..=config.founders).map(|id| etcdserverpb::Member {
            id,
            peer_ur_ls: vec![format!("http://{id}")],
            ..etcdserverpb::Member::default()
        }));
        let mut world = Self {
            rng,
            events: EventQueue::new(),
            started: Instant::now(), // Only differences matter.
            fault,
            context_reuse: (fault == Some(Fault::ReusedContext)).then(ContextReuse::default),
            slots: BTreeMap::new(),
            network: Network::default(),
            transfers: BTreeMap::new(),
            history: History::new(founders.clone()),
            raft_checks: RaftChecks::default(),
            ledger: Arc::default(),
            completions: Completions::default(),
            watchers: (0..config.watchers).map(|_| Watcher::new()).collect(),
            lease_owners: LeaseOwners::new(config.lease_owners),
            nanos: Arc::default(),
            acknowledged: 1,
            next_id: 1,
            incarnations: 0,
            quiescent: false,
            report: Report::default(),
            trace: tracing.then(Vec::new),
            config,
        };
        world.note(|world| format!("{:?}", world.config));
        let at = Position { index: world.config.founders, term: 1 };
        for id in 1..=world.config.founders {
            let disks = Disks::new(id, &founders, at, world.config.segment_files);
            world.slots.insert(id, MemberSlot { disks: Some(disks), ..MemberSlot::default() });
            let delay = world.rng.millis(0, 300);
            world.events.schedule(delay, Event::Start(id));
        }
        for _ in 0..world.config.clients {
            world.events.schedule(Duration::from_millis(1), Event::ClientRequest);
        }
        for nth in 0..world.config.lease_owners {
            world.events.schedule(Duration::from_secs(1), Event::LeaseOwner(nth));
        }
        if !world.config.disruptions.is_empty() {
            world.events.schedule(Duration::from_millis(500), Event::Disruption);
        }
        world
    }

    /// Executes the whole run, including the quiescent phase.
    pub fn run(&mut self) -> Report {
        self.run_for(self.config.length);
        self.quiesce();
        self.report.entries = self.history.len();
        self.report.leader_terms = self.raft_checks.leader_terms();
        self.report.early = std::mem::take(&mut self.raft_checks.early);
        self.report.clone()
    }

    /// Handles all events of the next `time`.
    pub fn run_for(&mut self, time: Duration) {
        let end = self.events.now() + time;
        while self.run_next_event(end) {}
        self.set_clock();
    }

    /// Runs step by step until `check` succeeds, which is a failure if it takes longer than [`WAIT_LIMIT`].
    pub fn run_until(&mut self, what: &str, step: Duration, mut check: impl FnMut(&mut Self) -> bool) {
        self.run_until_after(what, step, &mut check, |_| ());
    }

    /// The same, with an action before each step.
    pub fn run_until_after(
        &mut self,
        what: &str,
        step: Duration,
        mut check: impl FnMut(&mut Self) -> bool,
        mut act: impl FnMut(&mut Self),
    ) {
        let end = self.events.now() + WAIT_LIMIT;
        while !check(self) {
            assert!(self.events.now() < end, "waited {WAIT_LIMIT:?} until {what}: {}", self.describe());
            act(self);
            self.run_for(step);
        }
    }

    /// Handles the next event, if there is one up to `end`.
    pub fn run_next_event(&mut self, end: Duration) -> bool {
        let Some(event) = self.events.next(end) else { return false };
        self.set_clock();
        self.handle(event);
        self.handle_completions();
        true
    }

    fn set_clock(&self) {
        let nanos = u64::try_from(self.events.now().as_nanos()).expect("a run is short");
        self.nanos.store(nanos, Ordering::Relaxed);
    }

    pub fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        if let Some(mut trace) = self.trace.take() {
            trace.push(format!("{:>9.4} {}", self.events.now().as_secs_f64(), line(self)));
            self.trace = Some(trace);
        }
    }

    /// The time as members know it.
    pub fn now(&self) -> Instant {
        self.started + self.events.now()
    }

    pub fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.slots.get_mut(&id)?.member.as_mut()
    }

    /// A member, if it is still running in this incarnation.
    pub fn member_in(&mut self, id: u64, incarnation: u64) -> Option<&mut Member> {
        self.member(id).filter(|member| member.incarnation == incarnation)
    }

    /// The running members.
    pub fn running(&self) -> Vec<u64> {
        self.slots.iter().filter(|(_, slot)| slot.member.is_some()).map(|(id, _)| *id).collect()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick { member, incarnation } => self.tick(member, incarnation),
            Event::RunThread { member, incarnation, thread } => self.run_thread(member, incarnation, thread),
            Event::Arrival { via, message } => self.receive_message(via, *message),
            Event::ConnectionBroken { from, to } => self.connection_broken(from, to),
            Event::Reconnect { from, incarnation, to } => self.try_reconnect(from, incarnation, to),
            Event::SnapshotArrived(transfer) => self.snapshot_arrived(transfer),
            Event::SnapshotReported { transfer, arrived } => self.snapshot_reported(transfer, arrived),
            Event::Start(id) => self.start(id),
            Event::StopRemoved(id) => self.stop_removed(id),
            Event::ClientRequest => self.client_request(),
            Event::LeaseOwner(nth) => self.lease_owner(nth),
            Event::Renewal { lease, at } => self.renew_lease(lease, at),
            Event::Disruption => self.disrupt(),
            Event::Heal => {
                self.note(|_| "all links work again".to_owned());
                self.network.heal();
            }
        }
    }

    fn start(&mut self, id: u64) {
        let Some(disks) = self.slots.get_mut(&id).and_then(|slot| slot.disks.take()) else { return };
        self.incarnations += 1;
        let members = self.history.model.members.keys().filter(|member| **member != id);
        let first_peers = members.map(|&id| Peer { id, urls: vec![format!("http://{id}")] }).collect();
        let context = StartContext {
            now: self.now(),
            clock: Clock::simulated(self.nanos.clone()),
            incarnation: self.incarnations,
            first_peers,
            pre_vote: self.quiescent || self.rng.percent(self.config.pre_vote),
            ledger: self.ledger.clone(),
            fault: self.fault,
        };
        let mut rng = self.rng.split();
        let member = Member::start(disks, context, &mut rng);
        let member = member.unwrap_or_else(|halt| panic!("member {id} does not start: {halt}"));
        let (applied, committed) = (member.applied(), self.history.last_index());
        assert!(applied.index <= committed, "{applied:?} is in the database of {id}, but no member applied it");
        let incarnation = member.incarnation;
        let slot = self.slots.get_mut(&id).expect("it exists");
        slot.member = Some(member);
        slot.scheduled.clear();
        slot.tick = TICK;
        self.note(|_| format!("{id}: starts incarnation {incarnation} at {applied:?} of {committed}"));
        let delay = self.rng.millis(0, 100);
        self.events.schedule(delay, Event::Tick { member: id, incarnation });
        self.events.schedule(
            BACKGROUND_INTERVAL,
            Event::RunThread { member: id, incarnation, thread: MemberThread::Background },
        );
        self.events.schedule(TICK, Event::RunThread { member: id, incarnation, thread: MemberThread::LeaseExpiry });
        self.schedule_threads(id);
    }

    fn tick(&mut self, id: u64, incarnation: u64) {
        let now = self.events.now();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let (paused_until, tick) = (slot.paused_until, slot.tick);
        let Some(member) = slot.member.as_mut().filter(|member| member.incarnation == incarnation) else { return };
        if paused_until > now {
            member.tick(LATE_TICKS);
            self.events.schedule(paused_until.saturating_sub(now), Event::Tick { member: id, incarnation });
            return;
        }
        member.tick(1);
        // Clock rates vary: otherwise the fixed election timeouts would always expire in the same order.
        if self.rng.percent(4) {
            self.slots.get_mut(&id).expect("it exists").tick = self.rng.millis(50, 200);
        }
        self.events.schedule(tick, Event::Tick { member: id, incarnation });
        self.schedule_threads(id);
    }

    /// Runs a step of a member's thread, unless it is stalled.
    fn run_thread(&mut self, id: u64, incarnation: u64, thread: MemberThread) {
        let now = self.events.now();
        if self.member_in(id, incarnation).is_none() {
            return;
        }
        let slot = self.slots.get_mut(&id).expect("it has a member");
        let stalled_until = slot.stalled_until(thread);
        if stalled_until > now {
            self.events
                .schedule(stalled_until.saturating_sub(now), Event::RunThread { member: id, incarnation, thread });
            return;
        }
        slot.scheduled.remove(&thread);
        if thread == MemberThread::Background {
            self.events.schedule(BACKGROUND_INTERVAL, Event::RunThread { member: id, incarnation, thread });
        }
        let share = Share::random(&mut self.rng);
        let done = match thread {
            MemberThread::Raft => self.step_raft(id, share),
            MemberThread::Log => {
                self.note(|_| format!("{id}: log {share:?}"));
                self.member(id).expect("it is running").write_log(share)
            }
            MemberThread::Apply => self.apply(id, share),
            MemberThread::Background => {
                let now = self.now();
                self.note(|_| format!("{id}: background"));
                self.member(id).expect("it is running").run_background(now)
            }
            MemberThread::LeaseExpiry => {
                let again = self.member(id).expect("it is running").expire_leases();
                let pause = again.saturating_sub(now).clamp(TICK / 10, TICK);
                self.events.schedule(pause, Event::RunThread { member: id, incarnation, thread });
                Ok(())
            }
            MemberThread::Hub => self.deliver(id),
        };
        match done {
            Ok(()) => self.process_output(id),
            Err(halt) => {
                let planned = self.member(id).is_some_and(|member| member.disk_state.may_lose_power());
                assert!(planned, "fatal error in member {id}: {halt}");
                self.crash(id);
            }
        }
    }

    fn step_raft(&mut self, id: u64, share: Share) -> Result<(), Halt> {
        let now = self.now();
        let member = self.slots.get_mut(&id).and_then(|slot| slot.member.as_mut()).expect("it is running");
        if member.is_installing() {
            member.install(now, |entry| self.history.observe(entry))?;
            self.check_lease_ends();
            self.report.snapshots += 1;
            self.note(|_| format!("{id}: installed a snapshot"));
            self.check_digest(id);
            return Ok(());
        }
        let output = member.step_raft(share);
        self.note(|_| format!("{id}: raft {share:?}, {} messages", output.messages.len()));
        if output.disk_stalled && self.fault.is_none() {
            assert!(output.messages.is_empty(), "the disk of {id} is stalled, but it sends {:?}", output.messages);
        }
        if output.disk_busy && self.fault.is_none() {
            output.messages.iter().for_each(|message| self.raft_checks.record_early(message));
        }
        self.send_messages(id, output.messages);
        self.check_leadership(id);
        Ok(())
    }

    fn apply(&mut self, id: u64, share: Share) -> Result<(), Halt> {
        let now = self.now();
        let member = self.slots.get_mut(&id).and_then(|slot| slot.member.as_mut()).expect("it is running");
        member.apply(share, now, |entry| self.history.observe(entry))?;
        let applied = member.applied();
        self.check_lease_ends();
        self.note(|_| format!("{id}: apply {share:?}, now at {applied:?}"));
        self.check_digest(id);
        self.start_added_members();
        Ok(())
    }

    pub fn deliver(&mut self, id: u64) -> Result<(), Halt> {
        let now = self.events.now();
        let member = self.slots.get_mut(&id).and_then(|slot| slot.member.as_mut()).expect("it is running");
        for watcher in self.watchers.iter_mut().filter(|watcher| watcher.member() == Some(id)) {
            let mut silent = 0;
            while silent < QUIET_STEPS {
                member.deliver(now)?;
                let received = watcher.receive(&self.history.model);
                self.report.events_received += received;
                silent = if received == 0 { silent + 1 } else { 0 };
            }
        }
        member.deliver(now)
    }

    fn check_digest(&mut self, id: u64) {
        let member = self.slots[&id].member.as_ref().expect("it is running");
        self.history.check_state(member.applied().index, &member.node.readers());
    }

    /// A leader has all entries that were committed in earlier terms.
    fn check_leadership(&mut self, id: u64) {
        let member = self.slots.get_mut(&id).and_then(|slot| slot.member.as_mut()).expect("it is running");
        let replica = &mut member.threads.core.raft_thread.replica;
        let leadership = replica.leadership();
        if !leadership.is_self || !self.raft_checks.record_leader(id, leadership.term) {
            return;
        }
        if let Some((index, term)) = self.history.last_before(leadership.term) {
            let has = replica.log().truncated().index >= index
                || replica.position(index).is_some_and(|position| position.term == term);
            assert!(has, "{id} leads term {}, but does not have entry {index} of term {term}", leadership.term);
        }
        self.note(|_| format!("{id}: leads term {}", leadership.term));
    }

    /// Processes what a member has put out: its messages, and the knowledge that it was removed.
    pub fn process_output(&mut self, id: u64) {
        let Some(member) = self.member(id) else { return };
        let messages = member.outbox.take_messages();
        let knows_of_removal = member.outbox.knows_of_removal();
        self.send_messages(id, messages);
        let slot = self.slots.get_mut(&id).expect("it has a member");
        if knows_of_removal && !std::mem::replace(&mut slot.knows_of_removal, true) {
            let delay = self.rng.millis(0, 1000);
            self.events.schedule(delay, Event::StopRemoved(id));
        }
        self.check_voters(id);
        self.schedule_threads(id);
    }

    /// Raft and the member table agree on the voters, unless a change is on its way from one to the other.
    fn check_voters(&mut self, id: u64) {
        let member = self.member(id).expect("it is running");
        if !member.is_idle() || member.threads.core.raft_thread.pending_removal.is_some() {
            return;
        }
        let mut raft = member.threads.core.raft_thread.replica.conf_state();
        raft.voters.sort_unstable();
        raft.learners.sort_unstable();
        assert_eq!(raft, conf_state(&member.voters_and_learners()), "raft and the member table of {id}");
    }

    /// Schedules every thread that has something to do.
    pub fn schedule_threads(&mut self, id: u64) {
        let slot = self.slots.get_mut(&id).expect("it exists");
        let Some(member) = &mut slot.member else { return };
        for thread in MemberThread::ALL {
            if slot.scheduled.contains(&thread) || !member.has_work(thread) {
                continue;
            }
            slot.scheduled.insert(thread);
            let delay = match thread {
                MemberThread::Log => self.config.sync(&mut self.rng),
                MemberThread::Raft | MemberThread::Apply | MemberThread::Hub if self.rng.percent(5) => {
                    self.rng.millis(0, 100)
                }
                MemberThread::Raft | MemberThread::Apply | MemberThread::Hub => self.rng.millis(0, 1),
                MemberThread::Background | MemberThread::LeaseExpiry => self.rng.millis(0, 50),
            };
            self.events.schedule(delay, Event::RunThread { member: id, incarnation: member.incarnation, thread });
        }
    }
}
