//! Both servers, and what they are asked in lockstep.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use metastore::proto::etcdserverpb::{CompactionRequest, HashKvRequest, PutRequest, RangeRequest, WatchCreateRequest};
use tonic::transport::Endpoint;

use super::{
    Etcd,
    answers::{Answer, Clients, Operation},
    chooser::{Chooser, MAX_TXN_OPS, Turn},
    known::{self, Known},
    process::Server,
    shortened, watches,
};

/// After so many differences the rest says nothing new.
const MOST_DIFFERENCES: usize = 5;
/// So many of the changes before a difference are shown with it.
const CHANGES_SHOWN: usize = 6;
/// So often the watches of both servers are compared.
const TURNS_BETWEEN_AGREEMENTS: usize = 60;

/// One of the two servers.
struct Side {
    server: Server,
    clients: Clients,
    /// Watches that begin in the past or now, and those that begin later.
    streams: [watches::Stream; 2],
}

impl Side {
    async fn new(server: Server) -> Self {
        let channel = Endpoint::from_shared(server.url()).unwrap().tcp_nodelay(true).connect().await.unwrap();
        let clients = Clients::new(&channel);
        until_the_version_is_agreed_on(&clients).await;
        let streams = [watches::Stream::open(&channel).await, watches::Stream::open(&channel).await];
        Self { server, clients, streams }
    }

    async fn restarted(mut self) -> Self {
        self.server.kill_and_restart();
        Self::new(self.server).await
    }
}

/// A fresh server finds out its version a moment after it serves.
async fn until_the_version_is_agreed_on(clients: &Clients) {
    let mut tries = tokio::time::interval(Duration::from_millis(20));
    for _ in 0..500 {
        tries.tick().await;
        let Answer::Status(status) = clients.ask(&Operation::Status).await else { panic!("there is no status") };
        // An old one does not tell.
        if status.storage_version == "3.7.0" || status.storage_version.is_empty() && status.version.starts_with("3.5.")
        {
            return;
        }
    }
    panic!("no version was agreed on");
}

/// Both servers, asked the same.
pub struct Pair {
    seed: u64,
    turns: usize,
    ours: Side,
    theirs: Side,
    pub chooser: Chooser,
    /// What may differ.
    known: Vec<&'static Known>,
    /// Whether etcd is older than what ours answers as.
    is_old: bool,
    /// The newest changes, to show with a difference.
    changes: VecDeque<String>,
    pub differences: Vec<String>,
    /// How often each kind of question found each kind of answer.
    pub asked: BTreeMap<String, usize>,
    pub excused: BTreeMap<&'static str, usize>,
}

/// A question that both are still thinking about.
pub struct Pending {
    operation: Operation,
    sides: [tokio::task::JoinHandle<Answer>; 2],
}

impl Pending {
    /// The client hangs up.
    pub fn cancel(self) {
        self.sides.into_iter().for_each(|side| side.abort());
    }
}

impl Pair {
    pub async fn start(etcd: &Etcd, seed: u64, turns: usize) -> Self {
        let most = MAX_TXN_OPS.to_string();
        let flags = ["--max-txn-ops", &most, "--unsafe-no-fsync", "--log-level", "info"];
        Self {
            seed,
            turns,
            ours: Side::new(Server::ours(&flags)).await,
            theirs: Side::new(Server::start(&etcd.program, &flags)).await,
            known: known::beside(etcd),
            is_old: etcd.is_old,
            chooser: Chooser::new(seed),
            changes: VecDeque::new(),
            differences: Vec::new(),
            asked: BTreeMap::new(),
            excused: BTreeMap::new(),
        }
    }

    /// Ours and etcd's.
    pub fn clients(&self) -> [Clients; 2] {
        [self.ours.clients.clone(), self.theirs.clients.clone()]
    }

    pub async fn run(mut self) -> Self {
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
                Turn::Ask(mut operation) => {
                    if self.is_old {
                        known::spare_old(&mut operation);
                    }
                    // What a watch shows of the past depends on when it is compacted away.
                    if matches!(operation, Operation::Compact(_)) {
                        self.agree_on_watches().await;
                    }
                    self.ask(&operation).await;
                    if let Operation::Compact(request) = operation {
                        // Waits until it is done, as a compaction that has nothing to do does too: hashes depend on that.
                        self.ask(&Operation::Compact(CompactionRequest { physical: true, ..request })).await;
                    }
                }
                Turn::Watch(mut request) => {
                    if self.is_old {
                        request.start_revision = request.start_revision.max(0); // 3.7 refuses less.
                    }
                    self.watch(request).await;
                }
                Turn::Cancel(watch) => self.cancel(watch).await,
            }
            if number % TURNS_BETWEEN_AGREEMENTS == 0 {
                self.agree_on_watches().await;
            }
        }
    }

    /// Puts one question to both and compares the answers; returns etcd's.
    pub async fn ask(&mut self, operation: &Operation) -> Answer {
        let (ours, theirs) = tokio::join!(self.ours.clients.ask(operation), self.theirs.clients.ask(operation));
        self.judge(operation, &ours, &theirs);
        self.chooser.learn(operation, &theirs);
        theirs
    }

    /// Puts a question to both that is not answered before something else happens.
    pub fn begin(&self, operation: &Operation) -> Pending {
        let sides = [&self.ours, &self.theirs].map(|side| {
            let (clients, operation) = (side.clients.clone(), operation.clone());
            tokio::spawn(async move { clients.ask(&operation).await })
        });
        Pending { operation: operation.clone(), sides }
    }

    /// Waits until such a question is answered by both.
    pub async fn finish(&mut self, pending: Pending) {
        let [ours, theirs] = pending.sides;
        let (ours, theirs) = tokio::join!(ours, theirs);
        self.judge(&pending.operation, &ours.unwrap(), &theirs.unwrap());
    }

    fn judge(&mut self, operation: &Operation, ours: &Answer, theirs: &Answer) {
        let kind = format!("{operation:?}");
        let kind = kind.split('(').next().unwrap_or_default();
        let answer = if let Answer::Refused(_, text) = theirs { text } else { "answered" };
        *self.asked.entry(format!("{kind}: {}", answer.split(" (").next().unwrap_or_default())).or_default() += 1;
        if ours != theirs {
            if let Some(known) = self.known.iter().find(|known| (known.excuses)(&self.chooser, operation, ours, theirs))
            {
                *self.excused.entry(known.what).or_default() += 1;
            } else {
                let [ours, theirs] = [ours, theirs].map(|answer| shortened(&format!("{answer:?}")));
                self.differ(&shortened(&format!("{operation:?}")), &format!("ours: {ours}\netcd: {theirs}"));
            }
        }
        if matches!(theirs, Answer::Put(_) | Answer::DeleteRange(_) | Answer::Txn(_) | Answer::Compact(_)) {
            self.changes.push_back(shortened(&format!("{operation:?} -> {theirs:?}")));
            if self.changes.len() > CHANGES_SHOWN {
                self.changes.pop_front();
            }
        }
    }

    fn differ(&mut self, what: &str, how: &str) {
        let before = self.changes.iter().fold(String::new(), |all, change| all + "before: " + change + "\n");
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
        self.ask(&Operation::LeaseLeases).await;
        self.ask(&Operation::Status).await;
    }

    pub async fn watch(&mut self, request: WatchCreateRequest) {
        let (ours, theirs) = (&self.ours.streams, &self.theirs.streams);
        let stream = usize::from(request.start_revision > self.chooser.head());
        let lost = request.start_revision > 0 && request.start_revision < self.chooser.compacted();
        let (ours, theirs) = (&ours[stream], &theirs[stream]);
        let ids = tokio::join!(ours.create(request.clone()), theirs.create(request.clone()));
        if ids.0 != ids.1 {
            self.differ(&format!("{request:?}"), &format!("ours: watch {}\netcd: watch {}", ids.0, ids.1));
            return;
        }
        let outcome = match (ids.1, lost) {
            (-1, _) => "refused",
            (_, true) => "canceled, for it begins in what was compacted",
            _ => "answered",
        };
        *self.asked.entry(format!("Watch: {outcome}")).or_default() += 1;
        if ids.1 != -1 && lost {
            tokio::join!(ours.until_canceled(ids.0), theirs.until_canceled(ids.1));
            // To etcd the watch exists until this; ours has forgotten it.
            tokio::join!(ours.cancel(ids.0, false), theirs.cancel(ids.1, false));
        } else if ids.1 != -1 {
            self.chooser.learn_watch((stream, ids.1), true);
        }
    }

    async fn cancel(&mut self, (stream, id): (usize, i64)) {
        self.agree_on_watches().await;
        let (ours, theirs) = (&self.ours.streams, &self.theirs.streams);
        let exists = self.chooser.learn_watch((stream, id), false);
        tokio::join!(ours[stream].cancel(id, exists), theirs[stream].cancel(id, exists));
    }

    /// Compares what the watches have told, after all of it has come.
    pub async fn agree_on_watches(&mut self) {
        let put = PutRequest { key: watches::OWN_KEY.into(), ..PutRequest::default() };
        let put = self.ask(&Operation::Put(put)).await;
        let head = self.chooser.head();
        let (ours, theirs) = (&self.ours.streams, &self.theirs.streams);
        tokio::join!(ours[0].until_progress(head), theirs[0].until_progress(head));
        // An alarm may have refused it.
        if let Answer::Put(_) = put {
            tokio::join!(ours[1].until_own_event(head), theirs[1].until_own_event(head));
        }
        for (ours, theirs) in ours.iter().zip(theirs) {
            if self.is_old {
                // It ends some watches as compacted that begin later; what they tell is not compared.
                ours.forget();
                theirs.forget();
                continue;
            }
            match ours.agree(theirs).await {
                Ok(told) => *self.asked.entry("told by watches, equally".to_owned()).or_default() += told,
                Err(difference) => {
                    self.differences.push(format!("seed {}, head {head}, watches\n{difference}", self.seed));
                    return;
                }
            }
        }
    }
}
