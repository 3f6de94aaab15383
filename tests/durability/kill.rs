//! The kill -9 loop: a real process, many writers at full rate, the end at a random moment, and what is there afterwards.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use metastore::proto::{
    etcdserverpb::{
        CompactionRequest, HashKvRequest, HashKvResponse, PutRequest, RangeRequest, kv_client::KvClient,
        maintenance_client::MaintenanceClient,
    },
    mvccpb::KeyValue,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{task::JoinSet, time};
use tonic::{Code, transport::Channel};

use super::{
    Figures, fresh_seed,
    support::Server,
    writer::{Fate, Writer},
};

const WRITERS: usize = 100;
const CONNECTIONS: usize = 4;
const LIFE_MS: std::ops::Range<u64> = 50..700;
/// What the database may leave unflushed, what rounds up to segments, and spares: far less than all lives together write.
const LOG_LIMIT_BYTES: u64 = 160 << 20;
/// What threads do first at a start is a matter of luck.
const STARTS: usize = 10;
const COMPACTION_PAUSE: Duration = Duration::from_millis(60);
/// Revisions that stay readable.
const KEPT_REVISIONS: i64 = 2000;

/// What one life of the server shares.
struct Life {
    /// Set just before the process is killed: from then on calls may fail.
    ends: AtomicBool,
    /// The highest revision that anybody was told.
    highest: AtomicI64,
}

impl Life {
    fn told(&self, revision: i64) {
        self.highest.fetch_max(revision, Ordering::Relaxed);
    }

    /// A call has failed; only a dying server is allowed that.
    fn forgive(&self, status: &tonic::Status) {
        assert!(self.ends.load(Ordering::SeqCst), "the server lives and answers {status}");
    }
}

struct Loop {
    server: Server,
    dice: StdRng,
    writers: Vec<Writer>,
    /// The highest revision of all lives so far.
    highest: i64,
    /// Hashes of revisions that will not change any more.
    hashes: Vec<HashKvResponse>,
    figures: Figures,
}

/// Kills the server so many times.
pub async fn kill_again_and_again(rounds: usize) -> Figures {
    let seed = fresh_seed();
    println!("seed {seed}");
    // Log and database are flushed and cut as seldom as in production, but of the log little is kept for members that lag.
    let server = Server::start(&["--snapshot-catchup-entries", "100", "--compaction-batch-limit", "200"]);
    let writers = (0..WRITERS).map(|name| Writer::new(name, seed)).collect();
    let dice = StdRng::seed_from_u64(seed);
    let mut all = Loop { server, dice, writers, highest: 1, hashes: Vec::new(), figures: Figures::default() };
    for round in 0..rounds {
        all.live().await;
        all.come_back();
        all.look().await;
        all.figures.acknowledged = all.writers.iter().map(|writer| writer.acknowledged).sum();
        println!("round {}: {}", round + 1, all.figures);
    }
    all.figures
}

/// Kills the server when it has taken so many small writes, and none of them is in a file of the database.
pub async fn leave_much_to_replay(writes: usize) {
    let mut server = Server::start(&[]);
    let kv = server.kv().await;
    let mut writing = JoinSet::new();
    for writer in 0..WRITERS {
        let mut kv = kv.clone();
        writing.spawn(async move {
            for nth in 0..writes / WRITERS {
                let key = format!("{writer}/{nth}").into();
                kv.put(PutRequest { key, ..PutRequest::default() }).await.unwrap();
            }
        });
    }
    writing.join_all().await;
    for _ in 0..STARTS {
        server.kill();
        server.restart();
        let key = Bytes::from_static(&[0]);
        let all = RangeRequest { key: key.clone(), range_end: key, count_only: true, ..RangeRequest::default() };
        let count = server.kv().await.range(all).await.unwrap().into_inner().count;
        assert_eq!(count, i64::try_from(writes).unwrap());
    }
}

impl Loop {
    /// Everybody writes, one compacts, one asks for hashes, until the process is killed under all of them.
    async fn live(&mut self) {
        let life = Arc::new(Life { ends: false.into(), highest: self.highest.into() });
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(self.server.channel().await);
        }
        let mut writing = JoinSet::new();
        for (nth, writer) in std::mem::take(&mut self.writers).into_iter().enumerate() {
            writing.spawn(write(writer, KvClient::new(channels[nth % CONNECTIONS].clone()), life.clone()));
        }
        // Not in every third round: hashes can be compared only where nothing was compacted in between.
        let compacts = !self.figures.rounds.is_multiple_of(3);
        let channel = channels[0].clone();
        let compacting = tokio::spawn(compact(KvClient::new(channel.clone()), life.clone(), compacts));
        let hashing = tokio::spawn(hash(MaintenanceClient::new(channel), life.clone()));
        time::sleep(Duration::from_millis(self.dice.random_range(LIFE_MS))).await;
        life.ends.store(true, Ordering::SeqCst);
        self.server.kill();
        self.writers = writing.join_all().await;
        compacting.await.unwrap();
        self.hashes.extend(hashing.await.unwrap());
        self.highest = life.highest.load(Ordering::Relaxed);
    }

    /// Starts the server again, sometimes only to kill it while it replays.
    fn come_back(&mut self) {
        while self.dice.random_ratio(1, 3) {
            self.server.launch();
            std::thread::sleep(Duration::from_millis(self.dice.random_range(0..60)));
            self.server.kill();
            self.figures.killed_at_start += 1;
        }
        let started = Instant::now();
        self.server.restart();
        self.figures.came_back(started.elapsed());
        let log = fs::read_dir(self.server.data_dir().join("member/log")).unwrap();
        let bytes: u64 = log.map(|file| file.unwrap().metadata().map_or(0, |file| file.len())).sum();
        self.figures.largest_log_bytes = self.figures.largest_log_bytes.max(bytes);
        assert!(bytes <= LOG_LIMIT_BYTES, "the log grows with every crash: {bytes} bytes");
    }

    /// Holds what is there against what was promised.
    async fn look(&mut self) {
        let mut kv = self.server.kv().await;
        for writer in &mut self.writers {
            let (key, range_end) = writer.range();
            let request = RangeRequest { key, range_end, ..RangeRequest::default() };
            let response = kv.range(request).await.unwrap().into_inner();
            let head = response.header.unwrap().revision;
            assert!(head >= self.highest, "the revision went back to {head} from {}", self.highest);
            let kvs: Vec<KeyValue> = response.kvs;
            match writer.look(&kvs) {
                Fate::Done => self.figures.done_unheard += 1,
                Fate::NotDone => self.figures.not_done += 1,
                Fate::NoneUnderWay => (),
            }
        }
        self.compare_hashes().await;
    }

    async fn compare_hashes(&mut self) {
        let mut maintenance = self.server.maintenance().await;
        for before in std::mem::take(&mut self.hashes) {
            let asked = maintenance.hash_kv(HashKvRequest { revision: before.hash_revision }).await;
            let now = match asked {
                Ok(now) => now.into_inner(),
                Err(status) if status.code() == Code::OutOfRange && status.message().contains("compacted") => continue,
                Err(status) => panic!("the hash of revision {}: {status}", before.hash_revision),
            };
            assert!(now.compact_revision >= before.compact_revision, "the compact revision went back");
            if now.compact_revision == before.compact_revision {
                assert_eq!(now.hash, before.hash, "the hash of revision {}", before.hash_revision);
                self.figures.hashes += 1;
            }
        }
        // Kept for the next crash.
        for revision in [0, (self.highest - KEPT_REVISIONS / 2).max(0)] {
            if let Ok(hash) = maintenance.hash_kv(HashKvRequest { revision }).await {
                self.hashes.push(hash.into_inner());
            }
        }
    }
}

async fn write(mut writer: Writer, mut kv: KvClient<Channel>, life: Arc<Life>) -> Writer {
    loop {
        match kv.txn(writer.next()).await {
            Ok(response) => {
                let revision = response.into_inner().header.unwrap().revision;
                writer.acknowledge(revision);
                life.told(revision);
            }
            Err(status) => {
                life.forgive(&status);
                return writer;
            }
        }
    }
}

async fn compact(mut kv: KvClient<Channel>, life: Arc<Life>, compacts: bool) {
    while compacts && !life.ends.load(Ordering::SeqCst) {
        time::sleep(COMPACTION_PAUSE).await;
        let revision = life.highest.load(Ordering::Relaxed) - KEPT_REVISIONS;
        let request = CompactionRequest { revision: revision.max(1), physical: false };
        match kv.compact(request).await {
            Ok(_) => (),
            Err(status) if status.code() == Code::OutOfRange => (), // Compacted already.
            Err(status) => life.forgive(&status),
        }
    }
}

async fn hash(mut maintenance: MaintenanceClient<Channel>, life: Arc<Life>) -> Vec<HashKvResponse> {
    let mut hashes = Vec::new();
    while !life.ends.load(Ordering::SeqCst) {
        time::sleep(COMPACTION_PAUSE).await;
        let revision = (life.highest.load(Ordering::Relaxed) - 1).max(1);
        match maintenance.hash_kv(HashKvRequest { revision }).await {
            Ok(hash) => hashes.push(hash.into_inner()),
            Err(status) => life.forgive(&status),
        }
    }
    hashes
}
