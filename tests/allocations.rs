//! What a Put and a Range allocate on the thread of their connection, between the client's bytes and the reply: a layer between
//! frontend and node must not cost an allocation.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use bytes::Bytes;
use http2::{
    call::{Call, CallResult, Delivery, Metadata, Reply, ReplySink},
    ledger::Ledger,
    service::Method,
};
use metastore::{
    cluster::{Cluster, peer_client::PeerClient},
    frontend::grpc::{Grpc, methods::MethodTable},
    net::tls::ClientTls,
    node::{
        Node, Parts, Settings,
        identity::{MemberId, RequestIds},
        low_priority::LowPriorityThreads,
        read_pool::ReadPool,
    },
    proto::etcdserverpb::{Member, PutRequest, RangeRequest, RangeResponse},
    raft_log::{Identity, Position, simulated_log::VolatileLog},
    service::{
        RequestLimits, Service,
        auth::{Authentication, Tokens, passwords::Passwords},
    },
    slow_log::Thresholds,
    state::{Machine, Members},
    storage::memory::Memory,
    version::CAPABILITY_LEVEL,
    watch,
};
use prost::Message;
use raft::eraftpb::HardState;

const MEMBER: u64 = 7;
const TIMEOUT: Duration = Duration::from_secs(30);
/// The entry, the waiter, and what carries both to the raft thread.
const MAX_PUT: usize = 3;
/// The rows, their revisions and records, the response, and what makes that shared.
const MAX_RANGE: usize = 5;

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // Fails while a thread ends, when nothing is measured.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

#[allow(unsafe_code, reason = "an allocator cannot be written without; it passes everything on to the system's")]
// SAFETY: each method forwards its arguments unchanged to the system's allocator, whose contract is the same.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's guarantees are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Receives the answers. Work for the call's task is run on the thread that waits.
struct Sink {
    sender: Mutex<mpsc::Sender<Delivery>>,
}

impl ReplySink for Sink {
    fn put(self: Arc<Self>, _slot: u64, delivery: Delivery) {
        self.sender.lock().unwrap().send(delivery).unwrap();
    }
}

struct TestServer {
    methods: MethodTable,
    sink: Arc<Sink>,
    deliveries: mpsc::Receiver<Delivery>,
    _runtime: tokio::runtime::Runtime,
}

impl TestServer {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let identity = Identity { cluster_id: 70, member_id: MEMBER };
        let log = VolatileLog::create(
            identity,
            Position { index: 1, term: 1 },
            &HardState { term: 1, commit: 1, ..HardState::default() },
        );
        let engine = Arc::new(Memory::default());
        let members = Members::new([Member { id: MEMBER, ..Member::default() }]);
        Machine::bootstrap(engine.as_ref(), 70, &members, (1, 1)).unwrap();
        let machine = Machine::open(engine.clone(), 1 << 20).unwrap();
        let (publisher, hub, _) =
            watch::Hub::assemble(machine.readers().keys, watch::Settings::default(), watch::Gauges::detached());
        let ids = Arc::new(RequestIds::new(MemberId::new(MEMBER).unwrap(), 0));
        let recovered = log.open().unwrap();
        let parts = Parts::alone(engine, machine, publisher, Box::new(log), recovered);
        let (node, _) = Node::start(&Settings::for_tests(MEMBER, ids.clone()), Arc::default(), parts).unwrap();
        let cluster = Cluster {
            node,
            ids,
            cluster_id: identity.cluster_id,
            member_id: identity.member_id,
            client: PeerClient::new(TIMEOUT, ClientTls::without_certificates()),
            strict_reconfig_check: true,
            known_level: CAPABILITY_LEVEL,
            max_learners: 1,
            request_timeout: TIMEOUT,
            heartbeat_interval: Duration::from_millis(10),
            runtime: runtime.handle().clone(),
            read_pool: ReadPool::start(1),
            scans: LowPriorityThreads::start("peer-scans", 1, 1).unwrap(),
        };
        let service = Service {
            cluster: Arc::new(cluster),
            hub,
            limits: RequestLimits {
                max_txn_ops: 128,
                max_txn_depth: 500,
                max_request_bytes: 1 << 20,
                max_answer_bytes: 1 << 30,
                max_leases: 1000,
                min_lease_seconds: 1,
            },
            authentication: Authentication {
                tokens: Tokens::Simple,
                passwords: Arc::new(Passwords::start(4, 1, 1).unwrap()),
                certificates_name_users: false,
            },
            scans: LowPriorityThreads::start("scans", 1, 1).unwrap(),
            ledger: Ledger::new(1 << 30),
            quota_bytes: -1,
            leader_watch: Arc::default(),
            fast_keep_alive: true,
            thresholds: Thresholds { call: TIMEOUT, apply: TIMEOUT },
        };
        let (sender, deliveries) = mpsc::channel();
        let methods = MethodTable::new(&Arc::new(Grpc::new(Arc::new(service))));
        Self { methods, sink: Arc::new(Sink { sender: Mutex::new(sender) }), deliveries, _runtime: runtime }
    }

    /// Makes a call. Returns how many allocations this thread made until the method returned, and the answer.
    fn call(&self, path: &str, request: &impl Message) -> (usize, CallResult) {
        let message = Bytes::from(request.encode_to_vec());
        drop(message.clone()); // As in a read of a connection, the bytes are shared already.
        let method = self.methods.find(path).unwrap();
        let reply = Reply::new(self.sink.clone(), 0);
        let before = ALLOCATIONS.get();
        method.call(Call { metadata: Metadata::default(), message }, reply);
        let allocations = ALLOCATIONS.get() - before;
        loop {
            match self.deliveries.recv_timeout(TIMEOUT).unwrap() {
                Delivery::Answer(answer) => return (allocations, answer),
                Delivery::Work(work) => work(Reply::new(self.sink.clone(), 0)),
            }
        }
    }

    /// The fewest allocations of many calls: buffers grow now and then.
    fn fewest(&self, path: &str, request: &impl Message) -> usize {
        (0..100).map(|_| self.call(path, request)).map(|(count, answer)| answer.map(|_| count).unwrap()).min().unwrap()
    }
}

#[test]
fn puts_and_ranges_allocate_no_more_than_they_must() {
    let server = TestServer::start();
    let put = PutRequest { key: "key".into(), value: vec![b'v'; 256].into(), ..PutRequest::default() };
    let range = |serializable| RangeRequest { key: "key".into(), serializable, ..RangeRequest::default() };
    let put_count = server.fewest("/etcdserverpb.KV/Put", &put);
    let (serializable, linearizable) =
        (server.fewest("/etcdserverpb.KV/Range", &range(true)), server.fewest("/etcdserverpb.KV/Range", &range(false)));
    let (_, answer) = server.call("/etcdserverpb.KV/Range", &range(true));
    assert_eq!(RangeResponse::decode(answer.unwrap()).unwrap().kvs[0].value, put.value);
    println!("put: {put_count}, serializable range: {serializable}, linearizable range: {linearizable}");
    assert!(put_count <= MAX_PUT, "a put makes {put_count} allocations");
    assert!(serializable.max(linearizable) <= MAX_RANGE, "ranges make {serializable} and {linearizable} allocations");
}
