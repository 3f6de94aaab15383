//! The power cut: a node on the real log and the real database, and the loss of everything that was not synced.
//!
//! The log lies on [`LossyFiles`], which lay down elsewhere what a power cut would have left of it: what was synced, and of
//! the rest all, nothing or torn parts. The database comes back as it was at its last flush, from a checkpoint made then: that
//! is all that RocksDB promises with its own log switched off. Both are taken at one moment under one lock; the node that
//! they are taken from goes on as a ghost until it is stopped, and cannot reach its successor.

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
        compact::{HASHED_BYTES, KeyHash},
    },
    node::{
        Node, Parts, Settings, Threads,
        applier::Quota,
        clock::Clock,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        keeper::Habits,
        log::{
            FileSystem, Identity, Place, Position, SegmentLog,
            lossy::{Loss, LossyFiles},
        },
        replica::Timing,
        retention,
    },
    proto::{
        etcdserverpb::{CompactionRequest, Member},
        mvccpb::KeyValue,
    },
    state::{Kind, Machine, Members, Response},
    storage::{Batch, Engine, Lack, Size, Table, Visit, rocks::Rocks, schema::meta},
    watch,
};
use parking_lot::{Mutex, RwLock};
use prost::Message;
use raft::eraftpb::HardState;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

use super::{
    Figures, fresh_seed,
    writer::{Fate, Writer},
};

const MEMBER: u64 = 7;
const WRITERS: usize = 16;
const LIFE_MS: std::ops::Range<u64> = 30..400;
/// Small, so that a round goes through many of them.
const SEGMENT_BYTES: u64 = 256 << 10;
const FLUSH_AFTER_BYTES: u64 = 1 << 20;
const KEPT_REVISIONS: i64 = 500;
const PATIENCE: Duration = Duration::from_secs(30);

/// The database, with a copy of itself as of its last flush.
struct Checkpointed {
    rocks: Rocks,
    /// Where copies go, and the last one of them. Whoever holds this knows that nothing is being flushed.
    copies: Mutex<Copies>,
}

struct Copies {
    dir: PathBuf,
    count: usize,
    /// What the last copy says of how far it is.
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
        engine.flush().unwrap(); // What was found is what a crash leaves.
        engine
    }
}

impl Engine for Checkpointed {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        let _nothing_is_copied = self.copies.lock();
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

    /// Only what the last copy holds counts, even if the database has flushed more by itself.
    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        assert_eq!((table, key), (Table::Meta, meta::APPLIED), "the node asks for nothing else");
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

    fn reclaim(&self) -> Result<Option<Lack>, Halt> {
        self.rocks.reclaim()
    }

    fn size(&self) -> Result<Size, Halt> {
        self.rocks.size()
    }
}

/// Where one life of the node has its files; the next one gets others.
struct Ground {
    dir: PathBuf,
    files: LossyFiles,
}

impl Ground {
    fn log(&self) -> Place {
        Place { dir: self.dir.join("log"), files: Arc::new(self.files.clone()), segment_bytes: SEGMENT_BYTES }
    }

    fn db(&self) -> PathBuf {
        self.dir.join("db")
    }

    /// A cluster of one that was founded here.
    fn found(dir: PathBuf, files: LossyFiles) -> Self {
        let ground = Self { dir, files };
        let identity = Identity { cluster_id: 70, member_id: MEMBER };
        let origin = Position { index: 1, term: 1 };
        let hard_state = HardState { term: 1, commit: 1, ..HardState::default() };
        SegmentLog::create(&ground.log(), identity, origin, &hard_state).unwrap();
        let engine = Rocks::open(&ground.db()).unwrap();
        let members = Members::new([Member { id: MEMBER, ..Member::default() }]);
        Machine::bootstrap(&engine, identity.cluster_id, &members, (origin.index, origin.term)).unwrap();
        ground
    }
}

/// A node that runs.
struct Running {
    node: Arc<Node>,
    threads: Threads,
    hub: Arc<watch::Hub>,
    engine: Arc<Checkpointed>,
    ids: Arc<RequestIds>,
    ground: Ground,
}

impl Running {
    fn start(ground: Ground, life: u64) -> Self {
        let (log, recovered) = SegmentLog::open(&ground.log()).unwrap();
        let engine = Arc::new(Checkpointed::open(&ground.db(), ground.dir.clone()));
        let machine = Machine::open(engine.clone(), 1 << 20).unwrap();
        let ids = Arc::new(RequestIds::new(MemberId::new(MEMBER).unwrap(), life));
        let (publisher, hub) = watch::Hub::start(machine.readers().keys, watch::Settings::default());
        let settings = settings(&ids);
        let parts = Parts::alone(engine.clone(), machine, publisher, Box::new(log), recovered);
        let (node, threads) = Node::start(&settings, Arc::new(Inbox::default()), parts).unwrap();
        Self { node, threads, hub, engine, ids, ground }
    }

    /// Proposes, and waits for the outcome.
    fn propose(&self, kind: Kind, request: &impl Message) -> Result<Response, Error> {
        propose(&self.node, self.ids.next(), kind, request)
    }

    /// Returns when everything that was ever acknowledged can be read.
    fn catch_up(&self) {
        let (tell, told) = mpsc::channel();
        self.node.read_barrier(Box::new(move |outcome| _ = tell.send(outcome)));
        told.recv_timeout(PATIENCE).unwrap().unwrap();
    }

    fn hash(&self, revision: i64) -> Option<KeyHash> {
        self.node.readers().keys.hash_kv(revision).ok()
    }

    /// What a power cut leaves, in another directory. `at_once` is called at that very moment.
    fn power_cut(&self, to: PathBuf, loss: Loss, at_once: impl FnOnce()) -> Ground {
        let copies = self.engine.copies.lock();
        at_once();
        let files = self.ground.files.power_cut(loss, &to.join("log")).unwrap();
        fs::rename(copies.last(), to.join("db")).unwrap();
        Ground { dir: to, files }
    }

    /// Ends what is only a ghost by now, and removes its files.
    fn stop(self) {
        self.node.stop();
        self.threads.join();
        self.hub.stop();
        drop((self.node, self.hub, self.engine));
        fs::remove_dir_all(&self.ground.dir).unwrap();
    }
}

fn settings(ids: &Arc<RequestIds>) -> Settings {
    Settings {
        member_id: MEMBER,
        ids: ids.clone(),
        clock: Clock::default(),
        timing: Timing { tick_ms: 100, election_ticks: 10, pre_vote: true, patience_ms: 30_000, fixed_timeout: None },
        request_timeout: PATIENCE,
        catchup_entries: 50,
        laggard_log_bytes: usize::MAX,
        quota: Quota { bytes: -1 },
        retention: retention::Policy::All,
        habits: Habits {
            compaction_batch: 100,
            compaction_pause: Duration::from_millis(1),
            compaction_range: 4,
            hashed_bytes: HASHED_BYTES,
            flush_after_bytes: FLUSH_AFTER_BYTES,
            flush_after: Duration::from_secs(1),
            flush_after_entries: u64::MAX,
        },
        slow_apply: PATIENCE,
        backlog: 5000,
    }
}

fn propose(node: &Node, id: u64, kind: Kind, request: &impl Message) -> Result<Response, Error> {
    let (tell, told) = mpsc::channel();
    node.propose(id, kind, &request.encode_to_vec(), Box::new(move |outcome| _ = tell.send(outcome)));
    told.recv_timeout(PATIENCE).expect("a proposal has an outcome")
}

/// What the log lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Files that keep what the log relies on, and no more.
    Contract,
    /// The same, but a sync does nothing.
    ContractWithoutSyncs,
    /// The operating system's type of file, on a file system that is trusted with durable writes.
    OsFiles,
    /// The same, but there are no durable writes.
    OsFilesWithoutDurableWrites,
}

impl Disk {
    fn files(self) -> LossyFiles {
        match self {
            Self::Contract | Self::ContractWithoutSyncs => LossyFiles::new(),
            Self::OsFiles | Self::OsFilesWithoutDurableWrites => LossyFiles::under_os_files(FileSystem::EXT4),
        }
    }

    fn begin_to_lie(self, files: &LossyFiles) {
        match self {
            Self::Contract | Self::OsFiles => (),
            Self::ContractWithoutSyncs => files.lie_about_syncs(),
            Self::OsFilesWithoutDurableWrites => files.ignore_durable_writes(),
        }
    }
}

/// Cuts the power so many times.
pub fn cut_again_and_again(rounds: usize, disk: Disk) -> Figures {
    let seed = fresh_seed();
    println!("seed {seed}");
    let root = TempDir::new().unwrap();
    let mut dice = StdRng::seed_from_u64(seed);
    let mut writers: Vec<_> = (0..WRITERS).map(|name| Writer::new(name, seed)).collect();
    let mut running = Running::start(Ground::found(root.path().join("life-0"), disk.files()), 0);
    disk.begin_to_lie(&running.ground.files);
    let (mut highest, mut figures) = (1, Figures::default());
    for round in 1..=rounds {
        let to = root.path().join(format!("life-{round}"));
        let (found, hashes) = live(&running, &mut writers, &mut dice, to, &mut highest);
        running.stop();
        let started = Instant::now();
        running = Running::start(found, round as u64);
        running.catch_up();
        figures.came_back(started.elapsed());
        look(&running, &mut writers, highest, &mut figures);
        compare_hashes(&running, &hashes, &mut figures);
        figures.acknowledged = writers.iter().map(|writer| writer.acknowledged).sum();
        println!("round {round}: {figures}");
    }
    running.stop();
    figures
}

/// Everybody writes and one compacts, until the power fails. Returns what it leaves, and hashes from before.
fn live(
    running: &Running,
    writers: &mut [Writer],
    dice: &mut StdRng,
    to: PathBuf,
    highest: &mut i64,
) -> (Ground, Vec<KeyHash>) {
    // Acknowledgements are taken while the power is on; what comes later went to a ghost.
    let power = RwLock::new(true);
    let reader = running.node.readers().keys.clone();
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(|| write(running, writer, &power));
        }
        let mut hashes = Vec::new();
        let ends = Instant::now() + Duration::from_millis(dice.random_range(LIFE_MS));
        while Instant::now() < ends {
            thread::sleep(Duration::from_millis(dice.random_range(5..40)));
            if dice.random_ratio(1, 3) {
                let request = CompactionRequest { revision: (reader.head() - KEPT_REVISIONS).max(1), physical: false };
                let outcome = running.propose(Kind::Compact, &request);
                assert!(matches!(outcome, Ok(_) | Err(Error::Compacted)), "{outcome:?}");
            }
            hashes.extend(running.hash(0));
        }
        if dice.random_ratio(1, 4) {
            running.engine.flush().unwrap(); // The node has not heard of this one.
        }
        let loss = if dice.random_ratio(1, 2) { Loss::Unsynced } else { Loss::Parts(dice.random()) };
        let found = running.power_cut(to, loss, || {
            let mut power = power.write();
            *power = false;
            // A published revision is an agreed one, so all of it was synced.
            *highest = (*highest).max(reader.head());
        });
        (found, hashes)
    })
}

fn write(running: &Running, writer: &mut Writer, power: &RwLock<bool>) {
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

fn look(running: &Running, writers: &mut [Writer], highest: i64, figures: &mut Figures) {
    let keys = &running.node.readers().keys;
    assert!(keys.head() >= highest, "the revision went back to {} from {highest}", keys.head());
    for writer in writers {
        let (first, end) = writer.range();
        let (rows, _) = keys.range(&Query::all(Interval::new(first, end))).unwrap();
        let found: Vec<_> = rows.records.into_iter().map(|record| KeyValue::decode(record).unwrap()).collect();
        match writer.look(&found) {
            Fate::Done => figures.done_unheard += 1,
            Fate::NotDone => figures.not_done += 1,
            Fate::NoneUnderWay => (),
        }
    }
}

fn compare_hashes(running: &Running, hashes: &[KeyHash], figures: &mut Figures) {
    for before in hashes {
        let Some(now) = running.hash(before.hash_revision) else { continue }; // Compacted.
        assert!(now.compact_revision >= before.compact_revision, "the compact revision went back");
        if now.compact_revision == before.compact_revision {
            assert_eq!(now.hash, before.hash, "the hash of revision {}", before.hash_revision);
            figures.hashes += 1;
        }
    }
}
