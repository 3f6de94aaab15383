use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use raft::eraftpb::HardState;

use super::*;
use crate::{
    node::{Node, Parts, Settings, Threads, identity::MemberId},
    proto::etcdserverpb::{LeaseGrantRequest, Member, PutRequest},
    raft_log::{Identity, Position, simulated_log::VolatileLog},
    state::{Machine, Members, NOSPACE, Response},
    storage::{Engine, memory::Memory},
    watch,
};

const MEMBER: u64 = 7;
const TIMEOUT: Duration = Duration::from_secs(30);
/// How much the member's quota exceeds the initial size of its database.
const FREE_BYTES: u32 = 20_000;

/// A cluster of one member, in memory.
struct SingleMember {
    node: Arc<Node>,
    threads: Threads,
    ids: Arc<RequestIds>,
}

impl SingleMember {
    fn start() -> Self {
        let origin = Position { index: 1, term: 1 };
        let hard_state = HardState { term: 1, commit: 1, ..HardState::default() };
        let log = VolatileLog::create(Identity { cluster_id: 70, member_id: MEMBER }, origin, &hard_state);
        let engine = Arc::new(Memory::default());
        let members = Members::new([Member { id: MEMBER, ..Member::default() }]);
        Machine::bootstrap(engine.as_ref(), 70, &members, (origin.index, origin.term)).unwrap();
        let machine = Machine::open(engine.clone(), 0).unwrap();
        let (publisher, _, _) =
            watch::Hub::assemble(machine.readers().keys, watch::Settings::default(), watch::Gauges::detached());
        let ids = Arc::new(RequestIds::new(MemberId::new(MEMBER).unwrap(), 0));
        let bytes = engine.size().unwrap().total_bytes.cast_signed() + i64::from(FREE_BYTES);
        let settings = Settings { quota: Quota { bytes }, ..Settings::for_tests(MEMBER, ids.clone()) };
        let recovered = log.open().unwrap();
        let parts = Parts::alone(engine, machine, publisher, Box::new(log), recovered);
        let (node, threads) = Node::start(&settings, Arc::default(), parts).unwrap();
        Self { node, threads, ids }
    }

    fn request(&self, kind: Kind, request: &impl Message) -> Result<Response, Error> {
        let (tell, told) = mpsc::channel();
        let waiter = Box::new(move |outcome| _ = tell.send(outcome));
        self.node.propose(self.ids.next(), kind, &request.encode_to_vec(), waiter);
        told.recv_timeout(TIMEOUT).expect("a proposal has an outcome")
    }

    fn is_full(&self) -> bool {
        let readers = self.node.readers();
        let cluster = readers.cluster.read();
        cluster.alarms.list(NOSPACE).iter().any(|alarm| alarm.member_id == MEMBER)
    }

    fn stop(self) {
        self.node.stop();
        self.threads.join();
    }
}

fn put(key: &'static str, bytes: u32) -> PutRequest {
    PutRequest { key: key.into(), value: vec![b'v'; bytes as usize].into(), ..PutRequest::default() }
}

/// KV-31: a write that was admitted and did not fit stays, although its client gets "no space". The alarm is raised by then,
/// and later writes are really refused.
#[test]
fn a_write_that_exceeds_the_quota_stays_and_raises_the_alarm() {
    let member = SingleMember::start();
    // Small enough to fit even if it is measured just before it is counted.
    let first = member.request(Kind::Put, &put("first", FREE_BYTES / 3)).expect("it fits");
    assert!(!member.is_full());
    assert_eq!(member.request(Kind::Put, &put("second", FREE_BYTES - FREE_BYTES / 3)), Err(Error::NoSpace));
    assert!(member.is_full(), "a client that got the error can see the alarm");
    let head = member.node.readers().keys.head();
    assert_eq!(head, first.revision + 1, "it is stored");
    assert_eq!(member.request(Kind::Put, &put("third", 1)), Err(Error::NoSpace));
    assert_eq!(member.request(Kind::LeaseGrant, &LeaseGrantRequest { id: 1, ttl: 1 }), Err(Error::NoSpace));
    assert_eq!(member.node.readers().keys.head(), head, "nothing else is");
    assert!(!member.node.readers().leases.exists(crate::lease::LeaseId(1)));
    member.stop();
}

/// A write without a waiter on this member, as on the members that did not propose it, raises the alarm too.
#[test]
fn a_write_without_a_waiter_counts() {
    let member = SingleMember::start();
    let request = put("foreign", FREE_BYTES).encode_to_vec();
    let foreign = Command::encode(12345, Kind::Put, &request);
    member.node.propose_entry(member.ids.next(), foreign, Box::new(|_| ()));
    let deadline = Instant::now() + TIMEOUT;
    while !member.is_full() {
        assert!(Instant::now() < deadline, "the alarm is not raised");
        std::thread::yield_now();
    }
    member.stop();
}

/// Between two measurements the estimate grows with what is written.
#[test]
fn writes_since_the_last_measurement_count() {
    let engine = Memory::default();
    let status = Arc::new(Status::default());
    status.measure(&engine).unwrap();
    let before = status.estimated_bytes();
    let (quota, ids) = (Quota { bytes: before + 100 }, Arc::new(RequestIds::new(MemberId::new(MEMBER).unwrap(), 0)));
    let enforcer = QuotaEnforcer::new(quota, MEMBER, status.clone(), Arc::new(Inbox::default()), ids);
    assert!(enforcer.charge(60));
    assert_eq!(status.estimated_bytes(), before + 60);
    assert!(!enforcer.charge(40), "reaching the quota exceeds it");
    assert!(enforcer.charge(0), "a write without cost always fits");
    status.measure(&engine).unwrap();
    assert_eq!(status.estimated_bytes(), before, "the measurement replaces the estimate");
}

#[test]
fn the_time_until_the_quota_is_used_up_follows_from_the_growth_of_ten_minutes() {
    let (mut growth, start, quota) = (Growth::default(), Instant::now(), Quota { bytes: 10_000 });
    let at = |seconds| start + Duration::from_secs(seconds);
    assert!(growth.seconds_until(quota).is_infinite(), "nothing is known");
    growth.add(1000, at(0));
    assert!(growth.seconds_until(quota).is_infinite(), "one size is no growth");
    growth.add(5000, at(5));
    growth.add(1100, at(10));
    assert!((growth.seconds_until(quota) - 890.0).abs() < 0.01, "10 bytes a second; what came too soon is ignored");
    assert!(growth.seconds_until(Quota { bytes: 0 }).is_infinite());
    (2..=61).for_each(|nth| growth.add(2000, at(10 * nth)));
    assert!(growth.seconds_until(quota).is_infinite(), "it has not grown for ten minutes");
    growth.add(20_000, at(620));
    assert!(growth.seconds_until(quota).abs() < 0.01, "it is used up");
}
