//! How long service is interrupted when the leader is killed, with default ticks: metastore and etcd are measured in one run.
//!
//! Clients send a hundred requests a second, whatever the outcome of the earlier ones. The outage is the longest time between two
//! acknowledgements around the kill.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use etcd_client::Client;

use super::support::{self, Server, eventually_async, requirements::etcd, scaled, time_limit};

const MEMBERS: usize = 3;
const CALLS_EVERY: Duration = Duration::from_millis(10);
/// The number of acknowledgements after which service counts as restored.
const RESTORED: usize = 50;

/// A cluster of three members, of metastore or etcd.
struct Trio(Vec<Server>);

impl Trio {
    fn start(program: &Path) -> Self {
        let mut members = Server::cluster_of(program, MEMBERS, &["--log-level=error"]);
        members.iter_mut().for_each(Server::launch);
        Self(members)
    }

    fn url(&self, nth: usize) -> String {
        self.0[nth].url()
    }

    /// Waits until all members report the same leader, and returns it.
    async fn leader(&self) -> usize {
        eventually_async("the members agree on a leader", time_limit(), async || {
            let mut leaders = Vec::new();
            for nth in 0..MEMBERS {
                leaders.push(self.ids(nth).await);
            }
            let leader = leaders[0].map_or(0, |(_, leader)| leader);
            let agree = leaders.iter().all(|ids| ids.is_some_and(|(_, follows)| follows == leader));
            let nth = leaders.iter().position(|ids| ids.is_some_and(|(id, _)| id == leader));
            nth.filter(|_| agree).ok_or_else(|| format!("members and their leaders {leaders:x?}"))
        })
        .await
    }

    /// A member's ID, and its leader's.
    async fn ids(&self, nth: usize) -> Option<(u64, u64)> {
        let status = async { Client::connect([self.url(nth)], None).await.ok()?.status().await.ok() };
        let status = tokio::time::timeout(Duration::from_secs(1), status).await.ok()??;
        Some((status.header()?.member_id(), status.leader()))
    }

    /// Kills the leader while clients send requests; returns the longest time between two acknowledgements.
    async fn outage(&mut self) -> Duration {
        let leader = self.leader().await;
        let mut clients = Vec::new();
        for nth in (0..MEMBERS).filter(|nth| *nth != leader) {
            clients.push(Client::connect([self.url(nth)], None).await.unwrap());
        }
        let acknowledged = Arc::new(Mutex::new(Vec::new()));
        let mut killed_after = None;
        let deadline = Instant::now() + time_limit();
        for call in 0.. {
            let (mut client, note) = (clients[call % clients.len()].clone(), acknowledged.clone());
            tokio::spawn(async move {
                if client.put("outage", call.to_string(), None).await.is_ok() {
                    note.lock().unwrap().push(Instant::now());
                }
            });
            tokio::time::sleep(CALLS_EVERY).await;
            let count = acknowledged.lock().unwrap().len();
            match killed_after {
                None if count >= RESTORED => {
                    self.0[leader].kill();
                    killed_after = Some(acknowledged.lock().unwrap().len());
                }
                Some(before) if count >= before + RESTORED => break,
                _ => assert!(Instant::now() < deadline, "service was not restored"),
            }
        }
        self.0[leader].launch();
        let times = acknowledged.lock().unwrap();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap()
    }

    /// Waits until all members have the same data.
    async fn assert_equal(&self) {
        eventually_async("the members have the same data", time_limit(), async || {
            let mut hashes = Vec::new();
            for nth in 0..MEMBERS {
                let hash = Client::connect([self.url(nth)], None).await.unwrap().hash_kv(0).await.unwrap();
                hashes.push((hash.header().unwrap().revision(), hash.hash()));
            }
            if hashes.iter().all(|hash| *hash == hashes[0]) { Ok(()) } else { Err(hashes) }
        })
        .await;
    }
}

async fn outages(program: &Path, kills: usize) -> Vec<Duration> {
    let mut trio = Trio::start(program);
    let mut outages = Vec::new();
    for _ in 0..kills {
        outages.push(trio.outage().await);
    }
    trio.leader().await;
    trio.assert_equal().await;
    outages.sort();
    outages
}

#[tokio::test(flavor = "multi_thread")]
async fn service_is_restored_soon_after_the_leader_is_killed() {
    let outages = outages(&support::program(), 2).await;
    println!("without service: {outages:?}");
    assert!(outages[1] < scaled(Duration::from_secs(6)), "it takes two elections at most: {outages:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long"]
async fn outages_after_twenty_kills_are_about_as_long_as_those_of_etcd() {
    const KILLS: usize = 20;
    let ours = outages(&support::program(), KILLS).await;
    println!("metastore: median {:?}, worst {:?}", ours[KILLS / 2], ours[KILLS - 1]);
    if let Some(etcd) = etcd() {
        let theirs = outages(&etcd, KILLS).await;
        println!("etcd: median {:?}, worst {:?}", theirs[KILLS / 2], theirs[KILLS - 1]);
        assert!(ours[KILLS / 2] <= theirs[KILLS / 2] * 3 / 2, "ours {ours:?}, etcd's {theirs:?}");
    }
}
