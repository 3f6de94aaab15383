//! Both servers, which are sent the same operations in lockstep.

use std::collections::{BTreeMap, VecDeque};

use metastore::proto::etcdserverpb::{CompactionRequest, HashKvRequest, PutRequest, RangeRequest, WatchCreateRequest};
use tonic::transport::Endpoint;

use super::{
    Etcd,
    answers::{Answer, Clients, Operation, Token},
    generator::{Action, Generator, MAX_TXN_OPS},
    known::{self, KnownDifference},
    shortened, users, watches,
};
use test_support::{Server, eventually_async, program, time_limit};

/// A run stops after this many differences.
const MAX_DIFFERENCES: usize = 5;
/// This many of the changes before a difference are printed with it.
const CHANGES_SHOWN: usize = 6;
/// The watches of both servers are compared after this many actions.
const ACTIONS_BETWEEN_COMPARISONS: usize = 60;

/// One of the two servers.
struct Side {
    server: Server,
    clients: Box<Clients>,
    /// Those of a user that may read and write some of the keys; None without authentication.
    limited: Option<Box<Clients>>,
    /// The streams of watches that begin in the past or now, and of those that begin later.
    streams: [watches::Stream; 2],
}

impl Side {
    async fn new(server: Server, has_users: bool) -> Self {
        let channel = Endpoint::from_shared(server.url()).unwrap().tcp_nodelay(true).connect().await.unwrap();
        let (root, limited) = if has_users {
            let [root, limited] = users::log_in(&channel).await;
            (root, Some(Box::new(Clients::new(&channel, &limited))))
        } else {
            (Token::default(), None)
        };
        let clients = Box::new(Clients::new(&channel, &root));
        until_version_is_set(&clients).await;
        let streams = [watches::Stream::open(&channel, &root).await, watches::Stream::open(&channel, &root).await];
        Self { server, clients, limited, streams }
    }

    async fn restarted(mut self) -> Self {
        self.server.kill_and_restart();
        Self::new(self.server, self.limited.is_some()).await
    }
}

/// A new server sets the cluster version shortly after it begins to serve.
async fn until_version_is_set(clients: &Clients) {
    eventually_async("the cluster version is set", time_limit(), async || {
        let Answer::Status(status) = clients.ask(&Operation::Status).await else { panic!("there is no status") };
        // An old etcd has no storage version.
        let is_old = status.storage_version.is_empty() && status.version.starts_with("3.5.");
        if status.storage_version == "3.7.0" || is_old { Ok(()) } else { Err(status) }
    })
    .await;
}

/// Both servers.
pub struct Pair {
    seed: u64,
    actions: usize,
    ours: Side,
    theirs: Side,
    pub generator: Generator,
    /// The differences that are allowed.
    known: Vec<&'static KnownDifference>,
    /// Whether etcd is older than the version that ours implements.
    is_old: bool,
    /// The latest changes, to print with a difference.
    changes: VecDeque<String>,
    pub differences: Vec<String>,
    /// How often each kind of operation got each kind of answer.
    pub outcomes: BTreeMap<String, usize>,
    pub excused: BTreeMap<&'static str, usize>,
}

/// An operation that both servers have not answered yet.
pub struct Pending {
    operation: Operation,
    sides: [tokio::task::JoinHandle<Answer>; 2],
}

impl Pending {
    /// The client disconnects.
    pub fn cancel(self) {
        self.sides.into_iter().for_each(|side| side.abort());
    }
}

impl Pair {
    pub async fn start(etcd: &Etcd, seed: u64, actions: usize) -> Self {
        Self::start_with(etcd, seed, actions, false).await
    }

    /// With authentication, half of the operations are those of a user with some permissions.
    pub async fn start_with(etcd: &Etcd, seed: u64, actions: usize, has_users: bool) -> Self {
        let max_ops = MAX_TXN_OPS.to_string();
        let flags = ["--max-txn-ops", &max_ops, "--unsafe-no-fsync", "--log-level", "info", "--bcrypt-cost", "4"];
        Self {
            seed,
            actions,
            ours: Side::new(Server::start_program(&program(), &flags), has_users).await,
            theirs: Side::new(Server::start_program(&etcd.program, &flags), has_users).await,
            known: known::applicable(etcd),
            is_old: etcd.is_old,
            generator: Generator::new(seed),
            changes: VecDeque::new(),
            differences: Vec::new(),
            outcomes: BTreeMap::new(),
            excused: BTreeMap::new(),
        }
    }

    /// Ours and etcd's.
    pub fn clients(&self) -> [Box<Clients>; 2] {
        [self.ours.clients.clone(), self.theirs.clients.clone()]
    }

    pub async fn run(mut self) -> Self {
        self.compare_state().await;
        self.run_actions(self.actions / 2).await;
        self.compare_state().await;
        if self.differences.is_empty() {
            self = self.restarted().await;
            self.compare_state().await;
            self.run_actions(self.actions - self.actions / 2).await;
            self.compare_state().await;
        }
        self
    }

    async fn restarted(mut self) -> Self {
        self.generator.forget_volatile_state();
        Self { ours: self.ours.restarted().await, theirs: self.theirs.restarted().await, ..self }
    }

    async fn run_actions(&mut self, actions: usize) {
        for number in 0..actions {
            if self.differences.len() >= MAX_DIFFERENCES {
                return;
            }
            match self.generator.next_action() {
                Action::Ask(mut operation) => {
                    if self.is_old {
                        known::adapt_to_old_etcd(&mut operation);
                    }
                    // Which past events a watch gets depends on when they are compacted.
                    if matches!(operation, Operation::Compact(_)) {
                        self.compare_watches().await;
                    }
                    if number % 2 == 0 {
                        self.ask_limited(&operation).await;
                    } else {
                        self.ask(&operation).await;
                    }
                    if let Operation::Compact(request) = operation {
                        // A physical compaction waits until the compaction is done, even if nothing is left to do: hashes
                        // depend on that.
                        self.ask(&Operation::Compact(CompactionRequest { physical: true, ..request })).await;
                    }
                }
                Action::Watch(mut request) => {
                    if self.is_old {
                        request.start_revision = request.start_revision.max(0); // 3.7 refuses negative ones.
                    }
                    self.watch(request).await;
                }
                Action::Cancel(watch) => self.cancel(watch).await,
            }
            if number % ACTIONS_BETWEEN_COMPARISONS == 0 {
                self.compare_watches().await;
            }
        }
    }

    /// Sends an operation to both and compares the answers; returns etcd's.
    pub async fn ask(&mut self, operation: &Operation) -> Answer {
        let (ours, theirs) = tokio::join!(self.ours.clients.ask(operation), self.theirs.clients.ask(operation));
        self.compare(operation, &ours, &theirs);
        self.generator.observe(operation, &theirs);
        theirs
    }

    /// The same as the user with some permissions, if there is one.
    async fn ask_limited(&mut self, operation: &Operation) {
        let limited = self.ours.limited.as_ref().zip(self.theirs.limited.as_ref());
        let Some((ours, theirs)) = limited.filter(|_| !users::has_range_without_keys(operation)) else {
            self.ask(operation).await;
            return;
        };
        let (ours, theirs) = tokio::join!(ours.ask(operation), theirs.ask(operation));
        self.compare(operation, &ours, &theirs);
        self.generator.observe(operation, &theirs);
    }

    /// Sends an operation to both that waits for another one.
    pub fn begin(&self, operation: &Operation) -> Pending {
        let sides = [&self.ours, &self.theirs].map(|side| {
            let (clients, operation) = (side.clients.clone(), operation.clone());
            tokio::spawn(async move { clients.ask(&operation).await })
        });
        Pending { operation: operation.clone(), sides }
    }

    /// Waits until both have answered such an operation, and compares the answers.
    pub async fn finish(&mut self, pending: Pending) {
        let [ours, theirs] = pending.sides;
        let (ours, theirs) = tokio::join!(ours, theirs);
        self.compare(&pending.operation, &ours.unwrap(), &theirs.unwrap());
    }

    fn compare(&mut self, operation: &Operation, ours: &Answer, theirs: &Answer) {
        let kind = format!("{operation:?}");
        let kind = kind.split('(').next().unwrap_or_default();
        let answer = if let Answer::Refused(_, text) = theirs { text } else { "answered" };
        *self.outcomes.entry(format!("{kind}: {}", answer.split(" (").next().unwrap_or_default())).or_default() += 1;
        if ours != theirs {
            if let Some(known) =
                self.known.iter().find(|known| (known.applies)(&self.generator, operation, ours, theirs))
            {
                *self.excused.entry(known.what).or_default() += 1;
            } else {
                let [ours, theirs] = [ours, theirs].map(|answer| shortened(&format!("{answer:?}")));
                self.report_difference(&shortened(&format!("{operation:?}")), &format!("ours: {ours}\netcd: {theirs}"));
            }
        }
        if matches!(theirs, Answer::Put(_) | Answer::DeleteRange(_) | Answer::Txn(_) | Answer::Compact(_)) {
            self.changes.push_back(shortened(&format!("{operation:?} -> {theirs:?}")));
            if self.changes.len() > CHANGES_SHOWN {
                self.changes.pop_front();
            }
        }
    }

    fn report_difference(&mut self, what: &str, how: &str) {
        let before = self.changes.iter().fold(String::new(), |all, change| all + "before: " + change + "\n");
        self.differences.push(format!(
            "seed {}, head {}\n{before}operation: {what}\n{how}",
            self.seed,
            self.generator.head()
        ));
    }

    /// Compares everything that can be read from both.
    async fn compare_state(&mut self) {
        self.compare_watches().await;
        let all = RangeRequest { key: b"\0"[..].into(), range_end: b"\0"[..].into(), ..RangeRequest::default() };
        self.ask(&Operation::Range(all.clone())).await;
        self.ask(&Operation::RangeStream(all)).await;
        for revision in self.generator.compacted().max(0)..=self.generator.head() {
            self.ask(&Operation::HashKv(HashKvRequest { revision })).await;
        }
        self.ask(&Operation::LeaseLeases).await;
        self.ask(&Operation::Status).await;
    }

    pub async fn watch(&mut self, request: WatchCreateRequest) {
        let (ours, theirs) = (&self.ours.streams, &self.theirs.streams);
        let stream = usize::from(request.start_revision > self.generator.head());
        let lost = request.start_revision > 0 && request.start_revision < self.generator.compacted();
        let (ours, theirs) = (&ours[stream], &theirs[stream]);
        let ids = tokio::join!(ours.create(request.clone()), theirs.create(request.clone()));
        if ids.0 != ids.1 {
            self.report_difference(&format!("{request:?}"), &format!("ours: watch {}\netcd: watch {}", ids.0, ids.1));
            return;
        }
        let outcome = match (ids.1, lost) {
            (-1, _) => "refused",
            (_, true) => "canceled, because its start revision is compacted",
            _ => "answered",
        };
        *self.outcomes.entry(format!("Watch: {outcome}")).or_default() += 1;
        if ids.1 != -1 && lost {
            tokio::join!(ours.until_canceled(ids.0), theirs.until_canceled(ids.1));
            // In etcd the watch exists until it is canceled; ours has removed it already.
            tokio::join!(ours.cancel(ids.0, false), theirs.cancel(ids.1, false));
        } else if ids.1 != -1 {
            self.generator.record_watch((stream, ids.1), true);
        }
    }

    async fn cancel(&mut self, (stream, id): (usize, i64)) {
        self.compare_watches().await;
        let (ours, theirs) = (&self.ours.streams, &self.theirs.streams);
        let exists = self.generator.record_watch((stream, id), false);
        tokio::join!(ours[stream].cancel(id, exists), theirs[stream].cancel(id, exists));
    }

    /// Waits until all watches have received everything, and compares what they have received.
    pub async fn compare_watches(&mut self) {
        let put = PutRequest { key: watches::OWN_KEY.into(), ..PutRequest::default() };
        let put = self.ask(&Operation::Put(put)).await;
        let head = self.generator.head();
        let (ours, theirs) = (&self.ours.streams, &self.theirs.streams);
        tokio::join!(ours[0].until_progress(head), theirs[0].until_progress(head));
        // An alarm may have caused the put to be refused.
        if let Answer::Put(_) = put {
            tokio::join!(ours[1].until_own_event(head), theirs[1].until_own_event(head));
        }
        for (ours, theirs) in ours.iter().zip(theirs) {
            if self.is_old {
                // It cancels some watches that begin later as compacted; what they receive is not compared.
                ours.clear_received();
                theirs.clear_received();
                continue;
            }
            match ours.take_equal(theirs).await {
                Ok(count) => *self.outcomes.entry("equal watch notifications".to_owned()).or_default() += count,
                Err(difference) => {
                    self.differences.push(format!("seed {}, head {head}, watches\n{difference}", self.seed));
                    return;
                }
            }
        }
    }
}
