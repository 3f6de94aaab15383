//! Clients that write continuously, to all members, and record which writes were acknowledged.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::{Client, GetOptions};
use tokio::task::JoinSet;

use crate::wait::{eventually_async, time_limit};

/// The URLs of the members, which may change when one is restarted.
pub type Urls = Arc<Mutex<Vec<String>>>;

/// Writers that run in the background.
pub struct Load {
    stopped: Arc<AtomicBool>,
    writes: Arc<Writes>,
    tasks: JoinSet<()>,
}

/// The acknowledged writes.
#[derive(Default)]
pub struct Writes {
    acknowledged: Mutex<BTreeMap<String, u64>>,
    count: AtomicU64,
    /// When the last write was acknowledged, and the longest time between two.
    last: Mutex<Option<Instant>>,
    longest_gap: Mutex<Duration>,
}

impl Writes {
    /// The number of acknowledged writes.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The longest time between two acknowledgements.
    pub fn longest_gap(&self) -> Duration {
        *self.longest_gap.lock().unwrap()
    }

    fn note(&self, key: String, value: u64) {
        self.acknowledged.lock().unwrap().insert(key, value);
        self.count.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        if let Some(before) = self.last.lock().unwrap().replace(now) {
            let mut longest = self.longest_gap.lock().unwrap();
            *longest = longest.max(now - before);
        }
    }

    /// Measures the longest gap anew from now on.
    pub fn reset_longest_gap(&self) {
        *self.longest_gap.lock().unwrap() = Duration::ZERO;
    }
}

impl Load {
    /// Starts this many writers. Each writes ascending numbers to its own keys, through these servers in turn.
    pub fn start(writers: usize, urls: &Urls) -> Self {
        let mut load = Self { stopped: Arc::default(), writes: Arc::default(), tasks: JoinSet::new() };
        for writer in 0..writers {
            let (stopped, writes, urls) = (load.stopped.clone(), load.writes.clone(), urls.clone());
            load.tasks.spawn(async move {
                let mut number = 0;
                let mut server = writer;
                while !stopped.load(Ordering::Relaxed) {
                    server += 1;
                    let url = {
                        let urls = urls.lock().unwrap();
                        urls[server % urls.len()].clone()
                    };
                    let Ok(client) = Client::connect([url], None).await else { continue };
                    write(client, writer, &mut number, &stopped, &writes).await;
                }
            });
        }
        load
    }

    /// The writes acknowledged so far.
    pub fn writes(&self) -> &Writes {
        &self.writes
    }

    /// Waits until this many more writes were acknowledged.
    pub async fn progress(&self, more: u64) {
        let goal = self.writes.count() + more;
        eventually_async(&format!("{goal} writes are acknowledged"), time_limit(), async || {
            let count = self.writes.count();
            if count >= goal { Ok(()) } else { Err(count) }
        })
        .await;
    }

    /// Stops the writers.
    pub async fn stop(mut self) -> Arc<Writes> {
        self.stopped.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        self.writes
    }
}

/// Writes until a request fails; no write is tried again (FAULT-24). A write without an answer may have been applied, or may be
/// applied later, so its key is not used again.
async fn write(mut client: Client, writer: usize, number: &mut u64, stopped: &AtomicBool, writes: &Writes) {
    *number += 1;
    let key = format!("load/{writer}/{number}");
    while !stopped.load(Ordering::Relaxed) {
        *number += 1;
        let put = client.put(key.as_str(), number.to_string(), None);
        match tokio::time::timeout(Duration::from_secs(2), put).await {
            Ok(Ok(_)) => writes.note(key.clone(), *number),
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

impl Writes {
    /// Asserts that a member has every acknowledged write, or a later one of the same writer.
    pub async fn assert_kept(&self, mut client: Client) {
        let found = client.get("load/", Some(GetOptions::new().with_prefix())).await.unwrap();
        let found: BTreeMap<String, u64> = found
            .kvs()
            .iter()
            .map(|pair| (pair.key_str().unwrap().to_owned(), pair.value_str().unwrap().parse().unwrap()))
            .collect();
        for (key, value) in &*self.acknowledged.lock().unwrap() {
            let kept = found.get(key).copied().unwrap_or_default();
            assert!(kept >= *value, "{key}={value} was acknowledged, but the value is {kept}");
        }
    }
}
