//! The power failure loop: a node with the real log and the real database loses everything that was not synced.
//!
//! The log is on [`LossyFiles`], which write to another directory what a power failure would have left of it: what was synced,
//! and all, nothing or torn parts of the rest. The database is restored to its last flush, from a checkpoint made then: that
//! is all that RocksDB guarantees with its own log disabled. Both are captured at the same time under one lock. The old node
//! keeps running until it is stopped, but its later writes do not reach the new directory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use metastore::{
    error::{Error, Halt},
    mvcc::{
        Interval, Query,
        compact::{KeyHash, MAX_HASHED_HISTORY_BYTES},
    },
    node::{
        Node, Parts, Settings, Threads,
        background::BackgroundConfig,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
    },
    proto::{
        etcdserverpb::{CompactionRequest, Member},
        mvccpb::KeyValue,
    },
    raft_log::{
        FileSystem, Identity, LogLocation, Position, SegmentLog,
        fault_files::{Loss, LossyFiles},
    },
    state::{Kind, Machine, Members, Response},
    storage::{Batch, Engine, InsufficientSpace, Size, Table, Visit, rocks::Rocks, schema::meta},
    watch,
};
use parking_lot::{Mutex, RwLock};
use prost::Message;
use raft::eraftpb::HardState;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

use super::{
    Statistics, fresh_seed,
    support::time_limit,
    writer::{Outcome, Writer},
};

const MEMBER: u64 = 7;
const WRITERS: usize = 16;
const RUN_MS: std::ops::Range<u64> = 30..400;
/// Small, so that a round uses many segments.
const SEGMENT_BYTES: u64 = 256 << 10;
const FLUSH_AFTER_BYTES: u64 = 1 << 20;
const KEPT_REVISIONS: i64 = 500;

/// The database, with a copy of itself as of its last flush.
struct Checkpointed {
    rocks: Rocks,
    /// The copies made at flushes. While this is locked, nothing is flushed.
    copies: Mutex<Copies>,
}

struct Copies {
    dir: PathBuf,
    count: usize,
    /// The applied index in the last copy.
    applied: Option<Bytes>,
}

impl Copies {
    fn last(&self) -> PathBuf {
        self.dir.join(format!("flush-{}", self.count))
    }
}

impl Checkpointed {
    fn open(db: &Path, dir: PathBuf) -> Self {
        let rocks = Rocks::open(db).unwrap();
        let engine = Self { rocks, copies: Mutex::new(Copies { dir, count: 0, applied: None }) };
        engine.flush().unwrap(); // A crash before the first flush leaves the data as it was opened.
        engine
    }
}

impl Engine for Checkpointed {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        let _no_copy_is_made = self.copies.lock();
        self.rocks.write(batch)
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        self.rocks.get(table, key)
    }

    fn get_many(&self, table: Table, keys: &[&[u8]], is_scan: bool) -> Result<Vec<Option<Bytes>>, Halt> {
        self.rocks.get_many(table, keys, is_scan)
    }

    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt> {
        self.rocks.scan(table, from, to, visit)
    }

    /// Returns what is in the last copy, even if the database has flushed more by itself.
    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        assert_eq!((table, key), (Table::Meta, meta::APPLIED), "the node reads nothing else");
        Ok(self.copies.lock().applied.clone())
    }

    fn flush(&self) -> Result<(), Halt> {
        let mut copies = self.copies.lock();
        let old = copies.last();
        copies.count += 1;
        drop(self.rocks.copy_to(&copies.last())?);
        copies.applied = self.rocks.get(Table::Meta, meta::APPLIED)?;
        if old.exists() {
            fs::remove_dir_all(&old).map_err(Halt::io("remove", &old))?;
        }
        Ok(())
    }

    fn copy_to(&self, path: &Path) -> Result<Arc<dyn Engine>, Halt> {
        self.rocks.copy_to(path)
    }

    fn defragment(&self) -> Result<Option<InsufficientSpace>, Halt> {
        self.rocks.defragment()
    }

    fn size(&self) -> Result<Size, Halt> {
        self.rocks.size()
    }
}

/// The directory of the node in one round; the next round has another.
struct NodeFiles {
    dir: PathBuf,
    files: LossyFiles,
}

impl NodeFiles {
    fn log(&self) -> LogLocation {
        LogLocation { dir: self.dir.join("log"), files: Arc::new(self.files.clone()), segment_bytes: SEGMENT_BYTES }
    }

    fn db(&self) -> PathBuf {
        self.dir.join("db")
    }

    /// Bootstraps a cluster of one member in `dir`.
    fn bootstrap(dir: PathBuf, files: LossyFiles) -> Self {
        let node_files = Self { dir, files };
        let identity = Identity { cluster_id: 70, member_id: MEMBER };
        let origin = Position { index: 1, term: 1 };
        let hard_state = HardState { term: 1, commit: 1, ..HardState::default() };
        SegmentLog::create(&node_files.log(), identity, origin, &hard_state).unwrap();
        let engine = Rocks::open(&node_files.db()).unwrap();
        let members = Members::new([Member { id: MEMBER, ..Member::default() }]);
        Machine::bootstrap(&engine, identity.cluster_id, &members, (origin.index, origin.term)).unwrap();
        node_files
    }
}

struct RunningNode {
    node: Arc<Node>,
    threads: Threads,
    hub: Arc<watch::Hub>,
    engine: Arc<Checkpointed>,
    ids: Arc<RequestIds>,
    node_files: NodeFiles,
}

impl RunningNode {
    fn start(node_files: NodeFiles, round: u64) -> Self {
        let (log, recovered) = SegmentLog::open(&node_files.log()).unwrap();
        let engine = Arc::new(Checkpointed::open(&node_files.db(), node_files.dir.clone()));
        let machine = Machine::open(engine.clone(), 1 << 20).unwrap();
        let ids = Arc::new(RequestIds::new(MemberId::new(MEMBER).unwrap(), round));
        let (publisher, hub) = watch::Hub::start(machine.readers().keys, watch::Settings::default());
        let settings = settings(&ids);
        let parts = Parts::alone(engine.clone(), machine, publisher, Box::new(log), recovered);
        let (node, threads) = Node::start(&settings, Arc::new(Inbox::default()), parts).unwrap();
        Self { node, threads, hub, engine, ids, node_files }
    }

    /// Proposes a command, and waits for the outcome.
    fn propose(&self, kind: Kind, request: &impl Message) -> Result<Response, Error> {
        propose(&self.node, self.ids.next(), kind, request)
    }

    /// Returns when everything that was acknowledged can be read.
    fn catch_up(&self) {
        let (sender, receiver) = mpsc::channel();
        self.node.read_barrier(Box::new(move |outcome| _ = sender.send(outcome)));
        receiver.recv_timeout(time_limit()).unwrap().unwrap();
    }

    fn hash(&self, revision: i64) -> Option<KeyHash> {
        self.node.readers().keys.hash_kv(revision).ok()
    }

    /// Writes what a power failure leaves to another directory. `at_failure` is called at the time of the failure.
    fn power_failure(&self, to: PathBuf, loss: Loss, at_failure: impl FnOnce()) -> NodeFiles {
        let copies = self.engine.copies.lock();
        at_failure();
        let files = self.node_files.files.power_failure(loss, &to.join("log")).unwrap();
        fs::rename(copies.last(), to.join("db")).unwrap();
        NodeFiles { dir: to, files }
    }

    /// Stops the node after the failure, and removes its files.
    fn stop(self) {
        self.node.stop();
        self.threads.join();
        self.hub.stop();
        drop((self.node, self.hub, self.engine));
        fs::remove_dir_all(&self.node_files.dir).unwrap();
    }
}

fn settings(ids: &Arc<RequestIds>) -> Settings {
    let mut settings = Settings::for_tests(MEMBER, ids.clone());
    settings.timing.tick_ms = 100;
    settings.background_config = BackgroundConfig {
        compaction_pause: Duration::from_millis(1),
        compaction_range: 4,
        hashed_bytes: MAX_HASHED_HISTORY_BYTES,
        flush_after_bytes: FLUSH_AFTER_BYTES,
        flush_after: Duration::from_secs(1),
        ..settings.background_config
    };
    settings
}

fn propose(node: &Node, id: u64, kind: Kind, request: &impl Message) -> Result<Response, Error> {
    let (sender, receiver) = mpsc::channel();
    node.propose(id, kind, &request.encode_to_vec(), Box::new(move |outcome| _ = sender.send(outcome)));
    receiver.recv_timeout(time_limit()).expect("a proposal has an outcome")
}

/// The kind of disk that the log is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Files that guarantee what the log relies on, and no more.
    Contract,
    /// The same, but a sync does nothing.
    ContractWithoutSyncs,
    /// The file type of the operating system, on a file system whose durable writes the log relies on.
    OsFiles,
    /// The same, but durable writes are like any other.
    OsFilesWithoutDurableWrites,
}

impl Disk {
    fn files(self) -> LossyFiles {
        match self {
            Self::Contract | Self::ContractWithoutSyncs => LossyFiles::new(),
            Self::OsFiles | Self::OsFilesWithoutDurableWrites => LossyFiles::under_os_files(FileSystem::EXT4),
        }
    }

    fn start_lying(self, files: &LossyFiles) {
        match self {
            Self::Contract | Self::OsFiles => (),
            Self::ContractWithoutSyncs => files.ignore_syncs(),
            Self::OsFilesWithoutDurableWrites => files.ignore_durable_writes(),
        }
    }
}

/// Runs `rounds` power failures.
pub fn fail_power_repeatedly(rounds: usize, disk: Disk) -> Statistics {
    let seed = fresh_seed();
    println!("seed {seed}");
    let root = TempDir::new().unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut writers: Vec<_> = (0..WRITERS).map(|name| Writer::new(name, seed)).collect();
    let mut running = RunningNode::start(NodeFiles::bootstrap(root.path().join("round-0"), disk.files()), 0);
    disk.start_lying(&running.node_files.files);
    let (mut highest, mut statistics) = (1, Statistics::default());
    for round in 1..=rounds {
        let to = root.path().join(format!("round-{round}"));
        let (left, hashes) = run_until_failure(&running, &mut writers, &mut rng, to, &mut highest);
        running.stop();
        let started = Instant::now();
        running = RunningNode::start(left, round as u64);
        running.catch_up();
        statistics.record_restart(started.elapsed());
        check(&running, &mut writers, highest, &mut statistics);
        compare_hashes(&running, &hashes, &mut statistics);
        statistics.acknowledged = writers.iter().map(|writer| writer.acknowledged).sum();
        println!("round {round}: {statistics}");
    }
    running.stop();
    statistics
}

/// Runs the writers and compactions until the power fails. Returns what it leaves, and hashes from before.
fn run_until_failure(
    running: &RunningNode,
    writers: &mut [Writer],
    rng: &mut StdRng,
    to: PathBuf,
    highest: &mut i64,
) -> (NodeFiles, Vec<KeyHash>) {
    // Acknowledgements count while the power is on; later ones come from the old node after its failure.
    let power = RwLock::new(true);
    let reader = running.node.readers().keys.clone();
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(|| write(running, writer, &power));
        }
        let mut hashes = Vec::new();
        let ends = Instant::now() + Duration::from_millis(rng.random_range(RUN_MS));
        while Instant::now() < ends {
            thread::sleep(Duration::from_millis(rng.random_range(5..40)));
            if rng.random_ratio(1, 3) {
                let request = CompactionRequest { revision: (reader.head() - KEPT_REVISIONS).max(1), physical: false };
                let outcome = running.propose(Kind::Compact, &request);
                assert!(matches!(outcome, Ok(_) | Err(Error::Compacted)), "{outcome:?}");
            }
            hashes.extend(running.hash(0));
        }
        if rng.random_ratio(1, 4) {
            running.engine.flush().unwrap(); // A flush that the node does not know of.
        }
        let loss = if rng.random_ratio(1, 2) { Loss::Unsynced } else { Loss::Partial(rng.random()) };
        let left = running.power_failure(to, loss, || {
            let mut power = power.write();
            *power = false;
            // A published revision is committed, so it was synced.
            *highest = (*highest).max(reader.head());
        });
        (left, hashes)
    })
}

fn write(running: &RunningNode, writer: &mut Writer, power: &RwLock<bool>) {
    while *power.read() {
        let outcome = running.propose(Kind::Txn, &writer.next());
        let power = power.read();
        match outcome {
            Ok(response) if *power => writer.acknowledge(response.revision),
            Ok(_) => return,
            Err(error) => panic!("a transaction is refused: {error}"),
        }
    }
}

fn check(running: &RunningNode, writers: &mut [Writer], highest: i64, statistics: &mut Statistics) {
    let keys = &running.node.readers().keys;
    assert!(keys.head() >= highest, "the revision went back to {} from {highest}", keys.head());
    for writer in writers {
        let (first, end) = writer.range();
        let (rows, _) = keys.range(&Query::all(Interval::new(first, end))).unwrap();
        let found: Vec<_> = rows.records.into_iter().map(|record| KeyValue::decode(record).unwrap()).collect();
        match writer.check(&found) {
            Outcome::Done => statistics.done_unacknowledged += 1,
            Outcome::NotDone => statistics.not_done += 1,
            Outcome::NoneInFlight => (),
        }
    }
}

fn compare_hashes(running: &RunningNode, hashes: &[KeyHash], statistics: &mut Statistics) {
    for before in hashes {
        let Some(now) = running.hash(before.hash_revision) else { continue }; // Compacted.
        assert!(now.compact_revision >= before.compact_revision, "the compact revision went back");
        if now.compact_revision == before.compact_revision {
            assert_eq!(now.hash, before.hash, "the hash of revision {}", before.hash_revision);
            statistics.hashes += 1;
        }
    }
}
