//! The same random operations, asked of our server and of a real etcd: what they answer must be equal, field by field.
//!
//! Both start empty and with the same flags and names, so even the IDs are the same; only sizes, log positions and the time
//! that a lease has left are not compared. One operation at a time is put to both. Whatever differs is printed with the
//! operation, both answers and the seed. [`known::KNOWN`] lists the differences that are meant, [`chooser`] what is never
//! asked. After half of the operations both servers are killed and started again on what they left behind.
//!
//! Without a real etcd there is nothing to compare with; the test says so and passes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::wildcard_enum_match_arm, reason = "answers of other kinds need nothing")]

mod answers;
mod chooser;
mod known;
#[path = "../process/mod.rs"]
mod process;
mod watches;

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    time::{Duration, Instant},
};

use answers::{Answer, Clients, Operation};
use chooser::{Chooser, MAX_TXN_OPS, Turn};
use metastore::proto::etcdserverpb::{HashKvRequest, PutRequest, RangeRequest, WatchCreateRequest};
use process::Server;
use tonic::transport::{Channel, Endpoint};

/// After so many differences the rest says nothing new.
const MOST_DIFFERENCES: usize = 5;
/// So many of the changes before a difference are shown with it.
const CHANGES_SHOWN: usize = 6;
/// So often the watches of both servers are compared.
const TURNS_BETWEEN_AGREEMENTS: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_thousand_random_operations_are_answered_as_etcd_answers_them() {
    compare(1..=3, 1000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn a_hundred_thousand_random_operations_are_answered_as_etcd_answers_them() {
    compare(100..=124, 4200).await;
}

async fn compare(seeds: impl Iterator<Item = u64>, turns: usize) {
    let Some(etcd) = process::etcd() else {
        eprintln!("\n*** THERE IS NO ETCD HERE TO COMPARE WITH: NOTHING WAS TESTED ***\n");
        return;
    };
    // One seed, for looking closer: METASTORE_SEED=7.
    let only: Option<u64> =
        std::env::var("METASTORE_SEED").ok().map(|seed| seed.parse().expect("METASTORE_SEED is a number"));
    let (mut asked, mut excused) = (BTreeMap::new(), BTreeMap::new());
    for seed in seeds.filter(|&seed| only.is_none_or(|only| only == seed)) {
        let began = Instant::now();
        let pair = Pair::start(&etcd, seed, turns).await.run().await;
        eprintln!("seed {seed}: {turns} operations, head {}, {:.1?}", pair.chooser.head(), began.elapsed());
        for (what, times) in &pair.asked {
            *asked.entry(what.clone()).or_insert(0) += times;
        }
        for (what, times) in &pair.excused {
            *excused.entry(*what).or_insert(0) += times;
        }
        let found = pair.differences;
        assert!(found.is_empty(), "seed {seed}: {} differences\n\n{}", found.len(), found.join("\n\n"));
    }
    for (what, times) in asked {
        eprintln!("{times:6} {what}");
    }
    for (what, times) in excused {
        eprintln!("{times} times a difference that is meant: {what}");
    }
}

/// One of the two servers.
struct Side {
    server: Server,
    clients: Clients,
    /// Watches that begin in the past or now, and those that begin later.
    streams: Option<[watches::Stream; 2]>,
}

impl Side {
    async fn new(server: Server, with_watches: bool) -> Self {
        let channel = connect(&server).await;
        let clients = Clients::new(&channel);
        until_the_version_is_agreed_on(&clients).await;
        let streams = if with_watches {
            Some([watches::Stream::open(&channel).await, watches::Stream::open(&channel).await])
        } else {
            None
        };
        Self { server, clients, streams }
    }

    async fn restarted(mut self) -> Self {
        let with_watches = self.streams.take().is_some();
        self.server.kill_and_restart();
        Self::new(self.server, with_watches).await
    }
}

async fn connect(server: &Server) -> Channel {
    Endpoint::from_shared(server.url()).unwrap().tcp_nodelay(true).connect().await.unwrap()
}

/// A fresh server finds out its version a moment after it serves.
async fn until_the_version_is_agreed_on(clients: &Clients) {
    let mut tries = tokio::time::interval(Duration::from_millis(20));
    for _ in 0..500 {
        tries.tick().await;
        let Answer::Status(status) = clients.ask(&Operation::Status).await else { panic!("there is no status") };
        if status.storage_version == "3.7.0" {
            return;
        }
    }
    panic!("no version was agreed on");
}

/// Both servers, asked the same.
struct Pair {
    seed: u64,
    turns: usize,
    ours: Side,
    theirs: Side,
    chooser: Chooser,
    /// The newest changes, to show with a difference.
    changes: VecDeque<String>,
    differences: Vec<String>,
    /// How often each kind of question found each kind of answer.
    asked: BTreeMap<String, usize>,
    excused: BTreeMap<&'static str, usize>,
}

impl Pair {
    async fn start(etcd: &Path, seed: u64, turns: usize) -> Self {
        let most = MAX_TXN_OPS.to_string();
        let flags = ["--max-txn-ops", &most, "--unsafe-no-fsync", "--log-level", "info"];
        let ours = Server::ours(&flags);
        let with_watches = watches::are_answered(&connect(&ours).await).await;
        if !with_watches {
            eprintln!("*** NOT YET: watches ***");
        }
        let ours = Side::new(ours, with_watches).await;
        let with_leases =
            !matches!(ours.clients.ask(&Operation::LeaseLeases).await, Answer::Refused(tonic::Code::Unimplemented, _));
        if !with_leases {
            eprintln!("*** NOT YET: leases ***");
        }
        Self {
            seed,
            turns,
            ours,
            theirs: Side::new(Server::start(etcd, &flags), with_watches).await,
            chooser: Chooser::new(seed, with_leases),
            changes: VecDeque::new(),
            differences: Vec::new(),
            asked: BTreeMap::new(),
            excused: BTreeMap::new(),
        }
    }

    async fn run(mut self) -> Self {
        self.look_around().await;
        self.take_turns(self.turns / 2).await;
        self.look_around().await;
        if self.differences.is_empty() {
            self = self.restarted().await;
            self.look_around().await;
            self.take_turns(self.turns - self.turns / 2).await;
            self.look_around().await;
        }
        self
    }

    async fn restarted(mut self) -> Self {
        self.chooser.servers_restarted();
        Self { ours: self.ours.restarted().await, theirs: self.theirs.restarted().await, ..self }
    }

    async fn take_turns(&mut self, turns: usize) {
        for number in 0..turns {
            if self.differences.len() >= MOST_DIFFERENCES {
                return;
            }
            match self.chooser.turn() {
                Turn::Ask(operation) => {
                    // What a watch shows of the past depends on when it is compacted away.
                    if matches!(operation, Operation::Compact(_)) {
                        self.agree_on_watches().await;
                    }
                    self.ask(&operation).await;
                }
                Turn::Watch(request) => self.watch(request).await,
                Turn::Cancel(watch) => self.cancel(watch).await,
            }
            if number % TURNS_BETWEEN_AGREEMENTS == 0 {
                self.agree_on_watches().await;
            }
        }
    }

    async fn ask(&mut self, operation: &Operation) -> Answer {
        let (ours, theirs) = tokio::join!(self.ours.clients.ask(operation), self.theirs.clients.ask(operation));
        if ours != theirs {
            let known = known::KNOWN.iter().find(|known| (known.excuses)(&self.chooser, operation, &ours, &theirs));
            match known {
                Some(known) => *self.excused.entry(known.what).or_default() += 1,
                None => {
                    let how = format!(
                        "ours: {}\netcd: {}",
                        shortened(&format!("{ours:?}")),
                        shortened(&format!("{theirs:?}"))
                    );
                    self.differ(&shortened(&format!("{operation:?}")), &how);
                }
            }
        }
        let kind = format!("{operation:?}");
        let kind = kind.split('(').next().unwrap_or_default();
        let answer = if let Answer::Refused(_, text) = &theirs { text } else { "answered" };
        *self.asked.entry(format!("{kind}: {answer}")).or_default() += 1;
        if matches!(theirs, Answer::Put(_) | Answer::DeleteRange(_) | Answer::Txn(_) | Answer::Compact(_)) {
            self.changes.push_back(shortened(&format!("{operation:?} -> {theirs:?}")));
            if self.changes.len() > CHANGES_SHOWN {
                self.changes.pop_front();
            }
        }
        self.chooser.learn(operation, &theirs);
        theirs
    }

    fn differ(&mut self, what: &str, how: &str) {
        let before = self.changes.iter().map(|change| format!("before: {change}\n")).collect::<String>();
        self.differences.push(format!(
            "seed {}, head {}\n{before}asked: {what}\n{how}",
            self.seed,
            self.chooser.head()
        ));
    }

    /// Asks for all there is.
    async fn look_around(&mut self) {
        self.agree_on_watches().await;
        let all = RangeRequest { key: b"\0"[..].into(), range_end: b"\0"[..].into(), ..RangeRequest::default() };
        self.ask(&Operation::Range(all.clone())).await;
        self.ask(&Operation::RangeStream(all)).await;
        for revision in self.chooser.compacted().max(0)..=self.chooser.head() {
            self.ask(&Operation::HashKv(HashKvRequest { revision })).await;
        }
        if self.chooser.with_leases() {
            self.ask(&Operation::LeaseLeases).await;
        }
        self.ask(&Operation::Status).await;
    }

    async fn watch(&mut self, request: WatchCreateRequest) {
        let (Some(ours), Some(theirs)) = (&self.ours.streams, &self.theirs.streams) else { return };
        let stream = usize::from(request.start_revision > self.chooser.head());
        let lost = request.start_revision > 0 && request.start_revision < self.chooser.compacted();
        let (ours, theirs) = (&ours[stream], &theirs[stream]);
        let ids = tokio::join!(ours.create(request.clone()), theirs.create(request.clone()));
        if ids.0 != ids.1 {
            self.differ(&format!("{request:?}"), &format!("ours: watch {}\netcd: watch {}", ids.0, ids.1));
        } else if ids.1 != -1 && lost {
            tokio::join!(ours.until_canceled(ids.0), theirs.until_canceled(ids.1));
            // To etcd the watch exists until this; ours has forgotten it.
            tokio::join!(ours.cancel(ids.0, false), theirs.cancel(ids.1, false));
        } else if ids.1 != -1 {
            self.chooser.learn_watch((stream, ids.1), true);
        }
    }

    async fn cancel(&mut self, (stream, id): (usize, i64)) {
        self.agree_on_watches().await;
        let (Some(ours), Some(theirs)) = (&self.ours.streams, &self.theirs.streams) else { return };
        let exists = self.chooser.learn_watch((stream, id), false);
        tokio::join!(ours[stream].cancel(id, exists), theirs[stream].cancel(id, exists));
    }

    /// Compares what the watches have told, after all of it has come.
    async fn agree_on_watches(&mut self) {
        if self.ours.streams.is_none() {
            return;
        }
        let put = PutRequest { key: watches::OWN_KEY.into(), ..PutRequest::default() };
        let put = self.ask(&Operation::Put(put)).await;
        let head = self.chooser.head();
        let (Some(ours), Some(theirs)) = (&self.ours.streams, &self.theirs.streams) else { return };
        tokio::join!(ours[0].until_progress(head), theirs[0].until_progress(head));
        // An alarm may have refused it.
        if let Answer::Put(_) = put {
            tokio::join!(ours[1].until_own_event(head), theirs[1].until_own_event(head));
        }
        for (ours, theirs) in ours.iter().zip(theirs) {
            if let Err(difference) = ours.agree(theirs).await {
                self.differences.push(format!("seed {}, head {head}, watches\n{difference}", self.seed));
                return;
            }
        }
    }
}

/// Long values say little.
fn shortened(text: &str) -> String {
    text.chars().take(2000).collect()
}
