//! How long service is interrupted when the leader is killed, with default ticks: metastore and etcd are measured in one run.
//!
//! Clients send a hundred requests a second, whatever the outcome of the earlier ones. The outage is the longest time between two
//! acknowledgements around the kill.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use etcd_client::Client;
use tempfile::TempDir;

use super::{harness::TIMEOUT, process};

const MEMBERS: usize = 3;
const CALLS_EVERY: Duration = Duration::from_millis(10);
/// The number of acknowledgements after which service counts as restored.
const RESTORED: usize = 50;

/// A cluster of three members, of metastore or etcd.
struct Trio {
    program: PathBuf,
    directory: TempDir,
    ports: Vec<(u16, u16)>,
    children: Vec<Option<Child>>,
}

impl Trio {
    fn start(program: &Path) -> Self {
        let mut trio = Self {
            program: program.to_owned(),
            directory: tempfile::tempdir().unwrap(),
            ports: (0..MEMBERS).map(|_| (test_support::ports::free_port(), test_support::ports::free_port())).collect(),
            children: (0..MEMBERS).map(|_| None).collect(),
        };
        (0..MEMBERS).for_each(|nth| trio.launch(nth));
        trio
    }

    fn url(&self, nth: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[nth].0)
    }

    fn launch(&mut self, nth: usize) {
        let peer = |nth: usize| format!("http://127.0.0.1:{}", self.ports[nth].1);
        let all: Vec<String> = (0..MEMBERS).map(|nth| format!("m{nth}={}", peer(nth))).collect();
        let child = Command::new(&self.program)
            .args(["--name", &format!("m{nth}"), "--log-level", "error"])
            .arg("--data-dir")
            .arg(self.directory.path().join(nth.to_string()))
            .args(["--listen-client-urls", &self.url(nth), "--advertise-client-urls", &self.url(nth)])
            .args(["--listen-peer-urls", &peer(nth), "--initial-advertise-peer-urls", &peer(nth)])
            .args(["--initial-cluster", &all.join(",")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.children[nth] = Some(child);
    }

    fn kill(&mut self, nth: usize) {
        if let Some(mut child) = self.children[nth].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Waits until all members report the same leader, and returns it.
    async fn leader(&self) -> usize {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let mut leaders = Vec::new();
            for nth in 0..MEMBERS {
                leaders.push(self.ids(nth).await);
            }
            if let [Some((_, leader)), ..] = leaders[..]
                && leaders.iter().all(|ids| ids.is_some_and(|(_, follows)| follows == leader))
                && let Some(nth) = leaders.iter().position(|ids| ids.is_some_and(|(id, _)| id == leader))
            {
                return nth;
            }
            assert!(Instant::now() < deadline, "no leader: {leaders:x?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
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
        let deadline = Instant::now() + TIMEOUT;
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
                    self.kill(leader);
                    killed_after = Some(acknowledged.lock().unwrap().len());
                }
                Some(before) if count >= before + RESTORED => break,
                _ => assert!(Instant::now() < deadline, "service was not restored"),
            }
        }
        self.launch(leader);
        let times = acknowledged.lock().unwrap();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap()
    }
}

impl Trio {
    /// Waits until all members have the same data.
    async fn assert_equal(&self) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let mut hashes = Vec::new();
            for nth in 0..MEMBERS {
                let hash = Client::connect([self.url(nth)], None).await.unwrap().hash_kv(0).await.unwrap();
                hashes.push((hash.header().unwrap().revision(), hash.hash()));
            }
            if hashes.iter().all(|hash| *hash == hashes[0]) {
                return;
            }
            assert!(Instant::now() < deadline, "members differ: {hashes:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Trio {
    fn drop(&mut self) {
        (0..MEMBERS).for_each(|nth| self.kill(nth));
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
    let outages = outages(&test_support::program(), 2).await;
    println!("without service: {outages:?}");
    assert!(outages[1] < Duration::from_secs(6), "it takes two elections at most: {outages:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long"]
async fn outages_after_twenty_kills_are_about_as_long_as_those_of_etcd() {
    const KILLS: usize = 20;
    let ours = outages(&test_support::program(), KILLS).await;
    println!("metastore: median {:?}, worst {:?}", ours[KILLS / 2], ours[KILLS - 1]);
    if let Some(etcd) = process::etcd() {
        let theirs = outages(&etcd, KILLS).await;
        println!("etcd: median {:?}, worst {:?}", theirs[KILLS / 2], theirs[KILLS - 1]);
        assert!(ours[KILLS / 2] <= theirs[KILLS / 2] * 3 / 2, "ours {ours:?}, etcd's {theirs:?}");
    }
}
