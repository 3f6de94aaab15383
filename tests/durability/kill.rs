//! The kill -9 loop: a server process with many concurrent writers is killed at random times, and its data is checked after
//! each restart.

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
    Statistics, fresh_seed,
    support::Server,
    writer::{Outcome, Writer},
};

const WRITERS: usize = 100;
const CONNECTIONS: usize = 4;
const RUN_MS: std::ops::Range<u64> = 50..700;
/// What the database may leave unflushed, rounded up to segments, and spare segments: far less than is written in all rounds.
const LOG_LIMIT_BYTES: u64 = 160 << 20;
/// Several restarts, because the order in which threads start varies.
const STARTS: usize = 10;
const COMPACTION_PAUSE: Duration = Duration::from_millis(60);
/// Revisions that stay readable.
const KEPT_REVISIONS: i64 = 2000;

/// State that the tasks of one round share.
struct Run {
    /// Set just before the process is killed: from then on, calls may fail.
    is_ending: AtomicBool,
    /// The highest revision in any response.
    highest: AtomicI64,
}

impl Run {
    fn observe(&self, revision: i64) {
        self.highest.fetch_max(revision, Ordering::Relaxed);
    }

    /// Called when a call fails, which is allowed only while the server is being killed.
    fn assert_ending(&self, status: &tonic::Status) {
        assert!(self.is_ending.load(Ordering::SeqCst), "a call failed before the server was killed: {status}");
    }
}

struct KillLoop {
    server: Server,
    rng: StdRng,
    writers: Vec<Writer>,
    /// The highest revision of all rounds so far.
    highest: i64,
    /// Hashes of revisions that do not change any more.
    hashes: Vec<HashKvResponse>,
    statistics: Statistics,
}

/// Kills the server `rounds` times.
pub async fn kill_repeatedly(rounds: usize) -> Statistics {
    let seed = fresh_seed();
    println!("seed {seed}");
    // The database is flushed and the log truncated as rarely as in production, but few log entries are kept for slow members.
    let server = Server::start(&["--snapshot-catchup-entries", "100", "--compaction-batch-limit", "200"]);
    let writers = (0..WRITERS).map(|name| Writer::new(name, seed)).collect();
    let rng = StdRng::seed_from_u64(seed);
    let mut kill_loop =
        KillLoop { server, rng, writers, highest: 1, hashes: Vec::new(), statistics: Statistics::default() };
    for round in 0..rounds {
        kill_loop.run_until_killed().await;
        kill_loop.restart();
        kill_loop.check().await;
        kill_loop.statistics.acknowledged = kill_loop.writers.iter().map(|writer| writer.acknowledged).sum();
        println!("round {}: {}", round + 1, kill_loop.statistics);
    }
    kill_loop.statistics
}

/// Kills the server after `writes` small writes, none of which has been flushed to a file of the database.
pub async fn restart_with_a_long_log(writes: usize) {
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

impl KillLoop {
    /// Runs the writers, compactions and hash requests, until the process is killed.
    async fn run_until_killed(&mut self) {
        let run = Arc::new(Run { is_ending: false.into(), highest: self.highest.into() });
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(self.server.channel().await);
        }
        let mut writing = JoinSet::new();
        for (nth, writer) in std::mem::take(&mut self.writers).into_iter().enumerate() {
            writing.spawn(write(writer, KvClient::new(channels[nth % CONNECTIONS].clone()), run.clone()));
        }
        // Not in every third round: hashes can be compared only if nothing was compacted in between.
        let compacts = !self.statistics.rounds.is_multiple_of(3);
        let channel = channels[0].clone();
        let compacting = tokio::spawn(compact(KvClient::new(channel.clone()), run.clone(), compacts));
        let hashing = tokio::spawn(hash(MaintenanceClient::new(channel), run.clone()));
        time::sleep(Duration::from_millis(self.rng.random_range(RUN_MS))).await;
        run.is_ending.store(true, Ordering::SeqCst);
        self.server.kill();
        self.writers = writing.join_all().await;
        compacting.await.unwrap();
        self.hashes.extend(hashing.await.unwrap());
        self.highest = run.highest.load(Ordering::Relaxed);
    }

    /// Restarts the server; sometimes it is killed during the start, once or several times.
    fn restart(&mut self) {
        while self.rng.random_ratio(1, 3) {
            self.server.launch();
            std::thread::sleep(Duration::from_millis(self.rng.random_range(0..60)));
            self.server.kill();
            self.statistics.killed_at_start += 1;
        }
        let started = Instant::now();
        self.server.restart();
        self.statistics.record_restart(started.elapsed());
        let log = fs::read_dir(self.server.data_dir().join("member/log")).unwrap();
        let bytes: u64 = log.map(|file| file.unwrap().metadata().map_or(0, |file| file.len())).sum();
        self.statistics.largest_log_bytes = self.statistics.largest_log_bytes.max(bytes);
        assert!(bytes <= LOG_LIMIT_BYTES, "the log has grown to {bytes} bytes");
    }

    /// Compares the data with what was acknowledged.
    async fn check(&mut self) {
        let mut kv = self.server.kv().await;
        for writer in &mut self.writers {
            let (key, range_end) = writer.range();
            let request = RangeRequest { key, range_end, ..RangeRequest::default() };
            let response = kv.range(request).await.unwrap().into_inner();
            let head = response.header.unwrap().revision;
            assert!(head >= self.highest, "the revision went back to {head} from {}", self.highest);
            let kvs: Vec<KeyValue> = response.kvs;
            match writer.check(&kvs) {
                Outcome::Done => self.statistics.done_unacknowledged += 1,
                Outcome::NotDone => self.statistics.not_done += 1,
                Outcome::NoneInFlight => (),
            }
        }
        self.compare_hashes().await;
    }

    async fn compare_hashes(&mut self) {
        let mut maintenance = self.server.maintenance().await;
        for before in std::mem::take(&mut self.hashes) {
            let response = maintenance.hash_kv(HashKvRequest { revision: before.hash_revision }).await;
            let now = match response {
                Ok(now) => now.into_inner(),
                Err(status) if status.code() == Code::OutOfRange && status.message().contains("compacted") => continue,
                Err(status) => panic!("the hash of revision {}: {status}", before.hash_revision),
            };
            assert!(now.compact_revision >= before.compact_revision, "the compact revision went back");
            if now.compact_revision == before.compact_revision {
                assert_eq!(now.hash, before.hash, "the hash of revision {}", before.hash_revision);
                self.statistics.hashes += 1;
            }
        }
        // To be compared after the next crash.
        for revision in [0, (self.highest - KEPT_REVISIONS / 2).max(0)] {
            if let Ok(hash) = maintenance.hash_kv(HashKvRequest { revision }).await {
                self.hashes.push(hash.into_inner());
            }
        }
    }
}

async fn write(mut writer: Writer, mut kv: KvClient<Channel>, run: Arc<Run>) -> Writer {
    loop {
        match kv.txn(writer.next()).await {
            Ok(response) => {
                let revision = response.into_inner().header.unwrap().revision;
                writer.acknowledge(revision);
                run.observe(revision);
            }
            Err(status) => {
                run.assert_ending(&status);
                return writer;
            }
        }
    }
}

async fn compact(mut kv: KvClient<Channel>, run: Arc<Run>, compacts: bool) {
    while compacts && !run.is_ending.load(Ordering::SeqCst) {
        time::sleep(COMPACTION_PAUSE).await;
        let revision = run.highest.load(Ordering::Relaxed) - KEPT_REVISIONS;
        let request = CompactionRequest { revision: revision.max(1), physical: false };
        match kv.compact(request).await {
            Ok(_) => (),
            Err(status) if status.code() == Code::OutOfRange => (), // Already compacted.
            Err(status) => run.assert_ending(&status),
        }
    }
}

async fn hash(mut maintenance: MaintenanceClient<Channel>, run: Arc<Run>) -> Vec<HashKvResponse> {
    let mut hashes = Vec::new();
    while !run.is_ending.load(Ordering::SeqCst) {
        time::sleep(COMPACTION_PAUSE).await;
        let revision = (run.highest.load(Ordering::Relaxed) - 1).max(1);
        match maintenance.hash_kv(HashKvRequest { revision }).await {
            Ok(hash) => hashes.push(hash.into_inner()),
            Err(status) => run.assert_ending(&status),
        }
    }
    hashes
}
