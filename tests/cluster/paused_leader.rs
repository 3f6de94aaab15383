//! A leader whose process is paused for longer than an election takes. Leases that are renewed in time through the other members
//! meanwhile do not expire, and what the old leader answers when it is resumed is true.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::{Client, PutOptions};
use metastore::proto::etcdserverpb::{LeaseKeepAliveRequest, lease_client::LeaseClient};
use rustix::process::Signal;
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{
    harness::Cluster,
    leases::grant,
    load::Load,
    support::{eventually_async, time_limit},
};

const LEASES: i64 = 300;
const TTL: i64 = 5;
const RENEW_EVERY: Duration = Duration::from_millis(700);
const WRITERS: usize = 16;
const PAUSE: Duration = Duration::from_secs(8);
/// The number of leases that are renewed through the paused leader only. Their TTL is longer than the pause.
const OWN_LEASES: i64 = 20;
const OWN_TTL: i64 = 60;
const OWN_TTL_LENGTH: Duration = Duration::from_mins(1);

/// FAULT-32.
#[tokio::test(flavor = "multi_thread")]
async fn no_lease_expires_early_because_of_a_paused_leader() {
    pause_leaders(5).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long"]
async fn no_lease_expires_early_because_of_fifty_paused_leaders() {
    pause_leaders(50).await;
}

async fn pause_leaders(rounds: i64) {
    let cluster = Cluster::bootstrap(3, &[]);
    for round in 0..rounds {
        pause_leader(&cluster, round * 1000).await;
    }
    cluster.assert_all_equal().await;
}

async fn pause_leader(cluster: &Cluster, first: i64) {
    let paused = cluster.leader().await;
    let others = cluster.others(paused);
    let mut client = cluster.client(others[0]).await;
    let short: Vec<i64> = (first + 1..=first + LEASES).collect();
    let own: Vec<i64> = (first + LEASES + 1..=first + LEASES + OWN_LEASES).collect();
    for &id in &own {
        grant_with_key(&mut client, id, OWN_TTL).await;
    }
    let renewers = Renewers::start(cluster, &others, &own).await;
    for &id in &short {
        grant_with_key(&mut client, id, TTL).await;
        renewers.add(id);
    }
    let urls = others.iter().map(|&nth| cluster.servers[nth].url()).collect();
    let load = Load::start(WRITERS, &Arc::new(Mutex::new(urls)));
    let mut through_paused = KeepAlive::open(cluster.servers[paused].channel().await, own[0]).await;
    load.progress(100).await;

    cluster.servers[paused].signal(Signal::STOP);
    sleep(PAUSE).await; // The length of the pause is what is tested.
    for &id in &own {
        through_paused.ask(id).await; // It is in the socket when the process is resumed.
    }
    let resumed = Instant::now();
    cluster.servers[paused].signal(Signal::CONT);
    for &id in &own {
        let renewed = through_paused.answer().await;
        assert_eq!(renewed, (id, OWN_TTL), "it was renewed in time");
        let left = Duration::from_secs(remaining(&mut client, id).await.try_into().unwrap());
        // A lease that the leader renewed has lost no more than the time since then. One that it did not renew has lost most of
        // the pause: all but the time that the election took.
        let lost = OWN_TTL_LENGTH.saturating_sub(left).saturating_sub(resumed.elapsed());
        assert!(lost < PAUSE / 3, "lease {id} was renewed by a member that is not the leader: it lost {lost:?}");
    }
    // Anything that the old leader proposed has reached the others by then.
    load.progress(1000).await;
    sleep(2 * RENEW_EVERY).await;

    let mut lost = Vec::new();
    for &id in short.iter().chain(&own) {
        let key = client.get(format!("leased/{id}"), None).await.unwrap();
        if key.kvs().is_empty() {
            lost.push(id);
        }
    }
    renewers.stop().await;
    assert!(lost.is_empty(), "{} leases of {} have expired: {lost:?}", lost.len(), short.len() + own.len());
    load.stop().await.assert_kept(cluster.client(paused).await).await;
    revoke_all(&mut client, short.iter().chain(&own)).await;
}

async fn grant_with_key(client: &mut Client, id: i64, ttl: i64) {
    grant(client, id, ttl).await;
    client.put(format!("leased/{id}"), "", Some(PutOptions::new().with_lease(id))).await.unwrap();
}

async fn revoke_all(client: &mut Client, leases: impl Iterator<Item = &i64>) {
    for &id in leases {
        // Those with a short TTL are renewed no more, and may have expired.
        if let Err(error) = client.lease_revoke(id).await {
            assert!(error.to_string().contains("requested lease not found"), "{error}");
        }
    }
}

/// A stream of renewals through one member.
struct KeepAlive {
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<metastore::proto::etcdserverpb::LeaseKeepAliveResponse>,
}

impl KeepAlive {
    /// Opens a stream with the renewal of a lease, because a server sends no headers before its first response.
    async fn open(channel: Channel, id: i64) -> Self {
        let (requests, from) = mpsc::channel(1000);
        requests.send(LeaseKeepAliveRequest { id }).await.unwrap();
        let answers = LeaseClient::new(channel).lease_keep_alive(ReceiverStream::new(from)).await.unwrap().into_inner();
        let mut stream = Self { requests, answers };
        assert_eq!(stream.answer().await.0, id);
        stream
    }

    async fn ask(&self, id: i64) {
        self.requests.send(LeaseKeepAliveRequest { id }).await.unwrap();
    }

    /// The lease ID and the TTL of the next response.
    async fn answer(&mut self) -> (i64, i64) {
        let answer = tokio::time::timeout(time_limit(), self.answers.message()).await.expect("it is answered");
        let answer = answer.unwrap().expect("the stream is open");
        (answer.id, answer.ttl)
    }
}

/// Clients that renew leases in time.
struct Renewers {
    leases: Vec<Arc<Mutex<Vec<i64>>>>,
    stopped: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Renewers {
    /// Starts a client through each of these members. Its stream is opened with a lease from `long`, which has a long TTL.
    async fn start(cluster: &Cluster, through: &[usize], long: &[i64]) -> Self {
        let mut renewers = Self { leases: Vec::new(), stopped: Arc::default(), tasks: JoinSet::new() };
        for (&nth, &id) in through.iter().zip(long) {
            let mut stream = KeepAlive::open(cluster.servers[nth].channel().await, id).await;
            let (stopped, given) = (renewers.stopped.clone(), Arc::<Mutex<Vec<i64>>>::default());
            renewers.leases.push(given.clone());
            renewers.tasks.spawn(async move {
                while !stopped.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    let leases = given.lock().unwrap().clone();
                    for &id in &leases {
                        stream.ask(id).await;
                    }
                    for &id in &leases {
                        assert_eq!(stream.answer().await, (id, TTL), "it is renewed every {RENEW_EVERY:?}");
                    }
                    sleep(RENEW_EVERY.saturating_sub(started.elapsed())).await;
                }
            });
        }
        renewers
    }

    /// Adds a lease, which is renewed from now on.
    fn add(&self, id: i64) {
        let nth = usize::try_from(id).unwrap() % self.leases.len();
        self.leases[nth].lock().unwrap().push(id);
    }

    async fn stop(mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

/// The remaining time of a lease, from whichever member leads: on a busy machine leadership may move during the question, or the
/// disk may keep the leader from answering in time.
async fn remaining(client: &mut etcd_client::Client, id: i64) -> i64 {
    eventually_async("a leader says how long the lease remains", time_limit(), async || {
        let found = client.lease_time_to_live(id, None).await;
        if let Err(error) = &found {
            let error = error.to_string();
            assert!(error.contains("leader changed") || error.contains("request timed out"), "{error}");
        }
        found.map(|found| found.ttl())
    })
    .await
}
