//! One run: a cluster, its clients, a seed that says what happens next, and what must be true all the while.
//!
//! * What a member applied once is the agreed history: no crash changes it or makes it shorter, on any member.
//! * Whoever got an answer got the model's answer for his command at its place in that history.
//! * The state is the model's, at the head and at every revision that is not compacted; equal on all members at one index.
//! * A read behind the barrier sees every write that was acknowledged, and every read that was answered, before it was asked.
//! * Nothing is applied that the log has not called durable; nothing is cut from it that the database has not.
//! * No lease ends of itself before its last renewal plus its time to live, and each does soon after that.
//! * Whoever watches hears everything once and in order.
//! * Who votes, for raft, is who votes by the member table.
//! * In peace all members come to the same end, whose hash is that of a member that lived through it without trouble.
//!
//! What members say is held against [`oaths`](super::oaths).

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
    node::{clock::Clock, log::Position, peers::Peer, snapshot::conf_state},
    proto::etcdserverpb,
    state::Members,
};
use parking_lot::Mutex;
use raft::eraftpb::Message;

use super::{
    agenda::Agenda,
    clients::Mailbox,
    climate::Climate,
    courier::Shipment,
    dice::Dice,
    fault::{Fault, Forger},
    history::History,
    lease_owners::LeaseOwners,
    member::{Disks, LATE_TICKS, Member, Room, Share, Surroundings, TICK},
    network::Network,
    oaths::{Early, Ledger, Oaths},
    watcher::Watcher,
};

/// The keeper looks around at least as often.
const KEEPER_ROUND: Duration = Duration::from_millis(500);

/// After so many steps without an event a watcher has heard all there is: the end of a watch, its successor, an answer.
const QUIET_STEPS: usize = 4;

/// Something that happens.
#[derive(Debug)]
pub enum Event {
    /// A member's clock goes on.
    Tick { member: u64, life: u64 },
    /// A part of a member gets to run.
    Work { member: u64, life: u64, room: Room },
    /// A message arrives.
    Arrival {
        /// Who said it, though it may be another's.
        via: u64,
        message: Box<Message>,
    },
    /// A member notices that its connection to another is broken.
    Broken { from: u64, to: u64 },
    /// It tries to connect again.
    Mended { from: u64, life: u64, to: u64 },
    /// A copy of a database has been sent, all of it.
    Shipped(u64),
    /// The sender hears what became of it.
    Reported { shipment: u64, arrived: bool },
    /// A member starts, on the disks that it has, or for the first time.
    Start(u64),
    /// A member that was removed goes.
    Leave(u64),
    /// A client wants something.
    Wish,
    /// The owner of a lease does something.
    LeaseOwner(usize),
    /// A request to renew a lease arrives at a member.
    Renewal { lease: i64, at: u64 },
    /// Something goes wrong.
    Trouble,
    /// What was cut is whole again.
    Heal,
}

/// A member's place: it may be empty for a while.
#[derive(Default)]
pub struct Seat {
    pub member: Option<Member>,
    /// When nobody runs on them.
    pub disks: Option<Disks>,
    /// Rooms that will get to run.
    pub scheduled: BTreeSet<Room>,
    /// Until when the log, or the apply thread, or all of it stands still.
    pub log_stuck_until: Duration,
    pub apply_stuck_until: Duration,
    pub asleep_until: Duration,
    /// It was removed and knows, or is gone for good.
    pub leaving: bool,
    pub gone: bool,
    /// Between two ticks of its clock.
    pub tick: Duration,
}

impl Seat {
    /// Until when a room stands still.
    fn stuck_until(&self, room: Room) -> Duration {
        let own = match room {
            Room::Log => self.log_stuck_until,
            Room::Apply => self.apply_stuck_until,
            Room::Raft | Room::Keeper | Room::LeaseExpiry | Room::Hub => Duration::ZERO,
        };
        own.max(self.asleep_until)
    }
}

/// A run.
pub struct World {
    pub dice: Dice,
    pub climate: Climate,
    pub agenda: Agenda<Event>,
    started: Instant,
    pub fault: Option<Fault>,
    pub forger: Option<Forger>,
    pub seats: BTreeMap<u64, Seat>,
    pub network: Network,
    pub shipments: BTreeMap<u64, Shipment>,
    pub history: History,
    pub oaths: Oaths,
    pub ledger: Arc<Mutex<Ledger>>,
    pub mailbox: Mailbox,
    pub watchers: Vec<Watcher>,
    pub lease_owners: LeaseOwners,
    /// The time that members' clocks show, in nanoseconds.
    nanos: Arc<AtomicU64>,
    /// The highest revision that anybody was told of.
    pub acknowledged: i64,
    pub next_id: u64,
    lives: u64,
    /// Nothing goes wrong any more, and nobody wants anything.
    pub peace: bool,
    pub report: Report,
    /// One line for each event, if anybody wants to read them.
    pub trace: Option<Vec<String>>,
}

/// What runs came to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    pub crashes: usize,
    pub entries: usize,
    pub answers: usize,
    pub reads: usize,
    pub heard: usize,
    pub reigns: usize,
    pub snapshots: usize,
    pub changes: usize,
    /// Renewals that were answered with a time to live, and leases that ended because their time was over.
    pub renewals: usize,
    pub expiries: usize,
    /// Messages of followers that left before their disk was done, by kind.
    pub early: Early,
}

impl Report {
    pub fn add(&mut self, other: &Self) {
        self.crashes += other.crashes;
        self.entries += other.entries;
        self.answers += other.answers;
        self.reads += other.reads;
        self.heard += other.heard;
        self.reigns += other.reigns;
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
        let mut dice = Dice::new(seed);
        let mut climate = Climate::draw(&mut dice);
        if fault.is_some_and(Fault::is_about_leases) {
            climate.dwell_on_leases();
        }
        Self::with(climate, dice, fault, tracing)
    }

    pub fn with(climate: Climate, dice: Dice, fault: Option<Fault>, tracing: bool) -> Self {
        let founders = Members::new((1..=climate.founders).map(|id| etcdserverpb::Member {
            id,
            peer_ur_ls: vec![format!("http://{id}")],
            ..etcdserverpb::Member::default()
        }));
        let mut world = Self {
            dice,
            agenda: Agenda::new(),
            started: Instant::now(), // Only differences count.
            fault,
            forger: (fault == Some(Fault::ReusedContext)).then(Forger::default),
            seats: BTreeMap::new(),
            network: Network::default(),
            shipments: BTreeMap::new(),
            history: History::new(founders.clone()),
            oaths: Oaths::default(),
            ledger: Arc::default(),
            mailbox: Mailbox::default(),
            watchers: (0..climate.watchers).map(|_| Watcher::new()).collect(),
            lease_owners: LeaseOwners::new(climate.lease_owners),
            nanos: Arc::default(),
            acknowledged: 1,
            next_id: 1,
            lives: 0,
            peace: false,
            report: Report::default(),
            trace: tracing.then(Vec::new),
            climate,
        };
        world.note(|world| format!("{:?}", world.climate));
        let at = Position { index: world.climate.founders, term: 1 };
        for id in 1..=world.climate.founders {
            let disks = Disks::new(id, &founders, at, world.climate.segment_files);
            world.seats.insert(id, Seat { disks: Some(disks), ..Seat::default() });
            let delay = world.dice.millis(0, 300);
            world.agenda.after(delay, Event::Start(id));
        }
        for _ in 0..world.climate.clients {
            world.agenda.after(Duration::from_millis(1), Event::Wish);
        }
        for nth in 0..world.climate.lease_owners {
            world.agenda.after(Duration::from_secs(1), Event::LeaseOwner(nth));
        }
        if !world.climate.troubles.is_empty() {
            world.agenda.after(Duration::from_millis(500), Event::Trouble);
        }
        world
    }

    /// Lives through all of it, and an end in peace.
    pub fn run(&mut self) -> Report {
        self.run_for(self.climate.length);
        self.make_peace();
        self.report.entries = self.history.len();
        self.report.reigns = self.oaths.reigns();
        self.report.early = std::mem::take(&mut self.oaths.early);
        self.report.clone()
    }

    /// Lets everything happen that happens in so much time.
    pub fn run_for(&mut self, time: Duration) {
        let end = self.agenda.now() + time;
        while self.happen_next(end) {}
        self.set_clock();
    }

    /// Lets the next event happen, if it comes until then.
    pub fn happen_next(&mut self, end: Duration) -> bool {
        let Some(event) = self.agenda.next(end) else { return false };
        self.set_clock();
        self.happen(event);
        self.listen();
        true
    }

    fn set_clock(&self) {
        let nanos = u64::try_from(self.agenda.now().as_nanos()).expect("a run is short");
        self.nanos.store(nanos, Ordering::Relaxed);
    }

    pub fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        if let Some(mut trace) = self.trace.take() {
            trace.push(format!("{:>9.4} {}", self.agenda.now().as_secs_f64(), line(self)));
            self.trace = Some(trace);
        }
    }

    /// The time as members know it.
    pub fn now(&self) -> Instant {
        self.started + self.agenda.now()
    }

    pub fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.seats.get_mut(&id)?.member.as_mut()
    }

    /// A member in a life of it, unless that is over.
    pub fn member_in(&mut self, id: u64, life: u64) -> Option<&mut Member> {
        self.member(id).filter(|member| member.life == life)
    }

    /// Those who run.
    pub fn running(&self) -> Vec<u64> {
        self.seats.iter().filter(|(_, seat)| seat.member.is_some()).map(|(id, _)| *id).collect()
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick { member, life } => self.tick(member, life),
            Event::Work { member, life, room } => self.work(member, life, room),
            Event::Arrival { via, message } => self.arrive(via, *message),
            Event::Broken { from, to } => self.broken(from, to),
            Event::Mended { from, life, to } => self.mended(from, life, to),
            Event::Shipped(shipment) => self.shipped(shipment),
            Event::Reported { shipment, arrived } => self.reported(shipment, arrived),
            Event::Start(id) => self.start(id),
            Event::Leave(id) => self.leave(id),
            Event::Wish => self.wish(),
            Event::LeaseOwner(nth) => self.lease_owner(nth),
            Event::Renewal { lease, at } => self.renew_lease(lease, at),
            Event::Trouble => self.trouble(),
            Event::Heal => {
                self.note(|_| "the network is whole again".to_owned());
                self.network.heal();
            }
        }
    }

    fn start(&mut self, id: u64) {
        let Some(disks) = self.seats.get_mut(&id).and_then(|seat| seat.disks.take()) else { return };
        self.lives += 1;
        let members = self.history.model.members.keys().filter(|member| **member != id);
        let first_peers = members.map(|&id| Peer { id, urls: vec![format!("http://{id}")] }).collect();
        let around = Surroundings {
            now: self.now(),
            clock: Clock::simulated(self.nanos.clone()),
            life: self.lives,
            first_peers,
            pre_vote: self.peace || self.dice.percent(self.climate.pre_vote),
            ledger: self.ledger.clone(),
            fault: self.fault,
        };
        let mut dice = self.dice.split();
        let member = Member::start(disks, around, &mut dice);
        let member = member.unwrap_or_else(|halt| panic!("member {id} does not start: {halt}"));
        let (applied, agreed) = (member.applied(), self.history.last_index());
        assert!(applied.index <= agreed, "{applied:?} is in the database of {id}, but nobody applied it");
        let life = member.life;
        let seat = self.seats.get_mut(&id).expect("it was there");
        seat.member = Some(member);
        seat.scheduled.clear();
        seat.tick = TICK;
        self.note(|_| format!("{id}: starts its life {life} at {applied:?} of {agreed}"));
        let delay = self.dice.millis(0, 100);
        self.agenda.after(delay, Event::Tick { member: id, life });
        self.agenda.after(KEEPER_ROUND, Event::Work { member: id, life, room: Room::Keeper });
        self.agenda.after(TICK, Event::Work { member: id, life, room: Room::LeaseExpiry });
        self.arrange(id);
    }

    fn tick(&mut self, id: u64, life: u64) {
        let now = self.agenda.now();
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let (asleep_until, tick) = (seat.asleep_until, seat.tick);
        let Some(member) = seat.member.as_mut().filter(|member| member.life == life) else { return };
        if asleep_until > now {
            member.tick(LATE_TICKS);
            self.agenda.after(asleep_until.saturating_sub(now), Event::Tick { member: id, life });
            return;
        }
        member.tick(1);
        // Clocks run now faster, now slower: else the election timeouts, which are fixed, would always fall alike.
        if self.dice.percent(4) {
            self.seats.get_mut(&id).expect("it is there").tick = self.dice.millis(50, 200);
        }
        self.agenda.after(tick, Event::Tick { member: id, life });
        self.arrange(id);
    }

    /// A part of a member runs, unless it stands still.
    fn work(&mut self, id: u64, life: u64, room: Room) {
        let now = self.agenda.now();
        if self.member_in(id, life).is_none() {
            return;
        }
        let seat = self.seats.get_mut(&id).expect("it has a member");
        let stuck_until = seat.stuck_until(room);
        if stuck_until > now {
            self.agenda.after(stuck_until.saturating_sub(now), Event::Work { member: id, life, room });
            return;
        }
        seat.scheduled.remove(&room);
        if room == Room::Keeper {
            self.agenda.after(KEEPER_ROUND, Event::Work { member: id, life, room });
        }
        let share = Share::draw(&mut self.dice);
        let done = match room {
            Room::Raft => self.turn(id, share),
            Room::Log => {
                self.note(|_| format!("{id}: log {share:?}"));
                self.member(id).expect("it runs").write_log(share)
            }
            Room::Apply => self.apply(id, share),
            Room::Keeper => {
                let now = self.now();
                self.note(|_| format!("{id}: keeper"));
                self.member(id).expect("it runs").keep(now)
            }
            Room::LeaseExpiry => {
                let again = self.member(id).expect("it runs").expire_leases();
                let pause = again.saturating_sub(now).clamp(TICK / 10, TICK);
                self.agenda.after(pause, Event::Work { member: id, life, room });
                Ok(())
            }
            Room::Hub => self.deliver(id),
        };
        match done {
            Ok(()) => self.afterwards(id),
            Err(halt) => {
                let lit = self.member(id).is_some_and(|member| member.gauge.is_lit());
                assert!(lit, "member {id} cannot go on: {halt}");
                self.crash(id);
            }
        }
    }

    fn turn(&mut self, id: u64, share: Share) -> Result<(), Halt> {
        let now = self.now();
        let member = self.seats.get_mut(&id).and_then(|seat| seat.member.as_mut()).expect("it runs");
        if member.is_installing() {
            member.install(now, |entry| self.history.see(entry))?;
            self.check_lease_ends();
            self.report.snapshots += 1;
            self.note(|_| format!("{id}: has installed a snapshot"));
            self.check_digest(id);
            return Ok(());
        }
        let said = member.turn(share);
        self.note(|_| format!("{id}: turn {share:?}, {} messages", said.messages.len()));
        if said.stands_still && self.fault.is_none() {
            assert!(said.messages.is_empty(), "the disk of {id} stands still, but it says {:?}", said.messages);
        }
        if said.waited && self.fault.is_none() {
            said.messages.iter().for_each(|message| self.oaths.early(message));
        }
        self.carry(id, said.messages);
        self.check_leadership(id);
        Ok(())
    }

    fn apply(&mut self, id: u64, share: Share) -> Result<(), Halt> {
        let now = self.now();
        let member = self.seats.get_mut(&id).and_then(|seat| seat.member.as_mut()).expect("it runs");
        member.apply(share, now, |entry| self.history.see(entry))?;
        let applied = member.applied();
        self.check_lease_ends();
        self.note(|_| format!("{id}: apply {share:?}, now at {applied:?}"));
        self.check_digest(id);
        self.welcome_newcomers();
        Ok(())
    }

    pub fn deliver(&mut self, id: u64) -> Result<(), Halt> {
        let now = self.agenda.now();
        let member = self.seats.get_mut(&id).and_then(|seat| seat.member.as_mut()).expect("it runs");
        for watcher in self.watchers.iter_mut().filter(|watcher| watcher.member() == Some(id)) {
            let mut silent = 0;
            while silent < QUIET_STEPS {
                member.deliver(now)?;
                let heard = watcher.listen(&self.history.model);
                self.report.heard += heard;
                silent = if heard == 0 { silent + 1 } else { 0 };
            }
        }
        member.deliver(now)
    }

    fn check_digest(&mut self, id: u64) {
        let member = self.seats[&id].member.as_ref().expect("it runs");
        self.history.check_state(member.applied().index, &member.node.readers());
    }

    /// A member that leads has all that was agreed before.
    fn check_leadership(&mut self, id: u64) {
        let member = self.seats.get_mut(&id).and_then(|seat| seat.member.as_mut()).expect("it runs");
        let replica = &mut member.rooms.core.driver.replica;
        let leadership = replica.leadership();
        if !leadership.is_self || !self.oaths.leads(id, leadership.term) {
            return;
        }
        if let Some((index, term)) = self.history.last_before(leadership.term) {
            let has = replica.log().truncated().index >= index
                || replica.position(index).is_some_and(|position| position.term == term);
            assert!(has, "{id} leads term {}, but has not entry {index} of term {term}", leadership.term);
        }
        self.note(|_| format!("{id}: leads term {}", leadership.term));
    }

    /// Whatever a member has left at the doors is taken further.
    pub fn afterwards(&mut self, id: u64) {
        let Some(member) = self.member(id) else { return };
        let messages = member.mailroom.take();
        let farewell = member.mailroom.said_farewell();
        self.carry(id, messages);
        let seat = self.seats.get_mut(&id).expect("it has a member");
        if farewell && !std::mem::replace(&mut seat.leaving, true) {
            let delay = self.dice.millis(0, 1000);
            self.agenda.after(delay, Event::Leave(id));
        }
        self.check_electorate(id);
        self.arrange(id);
    }

    /// Raft and the table agree on who votes, where nothing is on its way from one to the other.
    fn check_electorate(&mut self, id: u64) {
        let member = self.member(id).expect("it runs");
        if !member.is_quiet() || member.rooms.core.driver.leaving.is_some() {
            return;
        }
        let mut raft = member.rooms.core.driver.replica.conf_state();
        raft.voters.sort_unstable();
        raft.learners.sort_unstable();
        assert_eq!(raft, conf_state(&member.electorate()), "raft and the member table of {id}");
    }

    /// Lets every room run that has something to do.
    pub fn arrange(&mut self, id: u64) {
        let seat = self.seats.get_mut(&id).expect("it is there");
        let Some(member) = &mut seat.member else { return };
        for room in Room::ALL {
            if seat.scheduled.contains(&room) || !member.is_wanted(room) {
                continue;
            }
            seat.scheduled.insert(room);
            let delay = match room {
                Room::Log => self.climate.sync(&mut self.dice),
                Room::Raft | Room::Apply | Room::Hub if self.dice.percent(5) => self.dice.millis(0, 100),
                Room::Raft | Room::Apply | Room::Hub => self.dice.millis(0, 1),
                Room::Keeper | Room::LeaseExpiry => self.dice.millis(0, 50),
            };
            self.agenda.after(delay, Event::Work { member: id, life: member.life, room });
        }
    }
}
