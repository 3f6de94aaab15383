//! Very many leases expire, each at its deadline, while other clients put.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::{Client, GetOptions, PutOptions, Txn, TxnOp};
use tokio::task::JoinSet;

use super::support::{Server, scaled};

/// How late the last lease of a slice may disappear.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// Keys of leases that expire within the same slice share a prefix.
const SLICE: Duration = Duration::from_millis(250);
const CLIENTS: usize = 8;
const TASKS_PER_CLIENT: usize = 32;
const KEYS_PER_TXN: usize = 100;

/// How many leases there are, and when they expire.
#[derive(Clone, Copy)]
struct Plan {
    leases: usize,
    /// The time limit for granting all of them.
    grant_limit: Duration,
    /// The interval over which their deadlines are spread.
    expiry_spread: Duration,
}

/// Leases that expire at about the same time.
#[derive(Clone, Copy)]
struct Slice {
    number: u64,
    keys: i64,
    /// No lease may be gone before this.
    first_end: Instant,
    /// All leases must be gone soon after this.
    last_end: Instant,
}

struct Granted {
    id: i64,
    first_end: Instant,
    last_end: Instant,
}

/// Grants the leases whose number is `nth` modulo the number of tasks, and attaches a key to each. TTLs are whole seconds, so
/// within a second it is the time of the grant that spreads the deadlines.
async fn grant_some(mut client: Client, plan: Plan, start: Instant, nth: usize) -> Vec<(u64, Granted)> {
    let tasks = CLIENTS * TASKS_PER_CLIENT;
    let mut granted = Vec::new();
    for number in (nth..plan.leases).step_by(tasks) {
        let share = u32::try_from(number).unwrap();
        let end = start + plan.grant_limit + plan.expiry_spread * share / u32::try_from(plan.leases).unwrap();
        let asked = Instant::now();
        let ttl = (end - asked).as_secs() + 1;
        let id = client.lease_grant(i64::try_from(ttl).unwrap(), None).await.unwrap().id();
        let first_end = asked + Duration::from_secs(ttl);
        let last_end = Instant::now() + Duration::from_secs(ttl);
        let slice = u64::try_from((first_end - start).as_millis() / SLICE.as_millis()).unwrap();
        granted.push((slice, Granted { id, first_end, last_end }));
    }
    for chunk in granted.chunks(KEYS_PER_TXN) {
        let puts = chunk.iter().map(|(slice, lease)| {
            let key = format!("slice/{slice:06}/{:016x}", lease.id);
            TxnOp::put(key, "v", Some(PutOptions::new().with_lease(lease.id)))
        });
        client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await.unwrap();
    }
    granted
}

/// Grants all leases; returns the slices in the order of their deadlines.
async fn grant_all(server: &Server, plan: Plan, start: Instant) -> Vec<Slice> {
    let mut tasks = JoinSet::new();
    for nth in 0..CLIENTS {
        let client = server.client().await;
        for task in 0..TASKS_PER_CLIENT {
            tasks.spawn(grant_some(client.clone(), plan, start, nth * TASKS_PER_CLIENT + task));
        }
    }
    let mut slices = std::collections::BTreeMap::<u64, Slice>::new();
    for (number, lease) in tasks.join_all().await.into_iter().flatten() {
        let Granted { first_end, last_end, .. } = lease;
        let slice = slices.entry(number).or_insert(Slice { number, keys: 0, first_end, last_end });
        slice.keys += 1;
        slice.first_end = slice.first_end.min(first_end);
        slice.last_end = slice.last_end.max(last_end);
    }
    slices.into_values().collect()
}

/// Waits until all leases of a slice are gone and asserts that none expired early. Returns how late the last one was seen.
async fn watch_slice(mut client: Client, slice: Slice) -> Duration {
    let prefix = format!("slice/{:06}/", slice.number);
    loop {
        let asked = Instant::now();
        let options = GetOptions::new().with_prefix().with_count_only();
        let left = client.get(prefix.as_str(), Some(options)).await.unwrap().count();
        let answered = Instant::now();
        if answered < slice.first_end {
            assert_eq!(left, slice.keys, "a lease expired early");
            let rest = slice.first_end - answered;
            tokio::time::sleep(rest.saturating_sub(Duration::from_millis(20))).await; // Checks again just before.
        } else if left == 0 {
            return asked.saturating_duration_since(slice.last_end);
        }
        let late = asked.saturating_duration_since(slice.last_end);
        assert!(late <= scaled(MAX_DELAY), "{left} of {} leases are {late:?} late", slice.keys);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Puts one key after another until `stop` is set; returns how long each put took.
async fn put_until(mut client: Client, nth: usize, stop: Arc<AtomicBool>) -> Vec<Duration> {
    let mut took = Vec::new();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let started = Instant::now();
        client.put(format!("put/{nth}/{}", number % 1000), vec![b'v'; 256], None).await.unwrap();
        took.push(started.elapsed());
        tokio::time::sleep(Duration::from_millis(2)).await; // A steady rate, not the maximum.
    }
    took
}

async fn grant_and_expire(plan: Plan) {
    let server = Server::start(&[]);
    let start = Instant::now();
    let slices = grant_all(&server, plan, start).await;
    let granting = start.elapsed();
    println!("granted {} leases, with a key on each, in {granting:.1?}", plan.leases);
    assert!(granting < scaled(plan.grant_limit), "granting them may take {:?}", plan.grant_limit);
    let stop = Arc::new(AtomicBool::new(false));
    let mut putting = JoinSet::new();
    for nth in 0..4 {
        putting.spawn(put_until(server.client().await, nth, stop.clone()));
    }
    let client = server.client().await;
    let mut watching = JoinSet::new();
    for slice in slices {
        watching.spawn(watch_slice(client.clone(), slice));
    }
    let mut late = watching.join_all().await;
    stop.store(true, Ordering::Relaxed);
    let mut took: Vec<Duration> = putting.join_all().await.into_iter().flatten().collect();
    late.sort();
    took.sort();
    let share = |of: &[Duration], per_mille: usize| of[(of.len() - 1) * per_mille / 1000];
    let slices = late.len();
    println!(
        "delay, worst of each of {slices} slices: median {:.0?}, maximum {:.0?}",
        share(&late, 500),
        share(&late, 1000)
    );
    println!(
        "{} puts meanwhile: median {:.1?}, 99% {:.1?}, maximum {:.1?}",
        took.len(),
        share(&took, 500),
        share(&took, 990),
        share(&took, 1000)
    );
    let mut client = server.client().await;
    assert!(client.leases().await.unwrap().leases().is_empty());
}

/// FAULT-35.
#[tokio::test(flavor = "multi_thread")]
async fn many_leases_expire_on_time() {
    let plan = Plan { leases: 50_000, grant_limit: Duration::from_secs(15), expiry_spread: Duration::from_secs(6) };
    grant_and_expire(plan).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long"]
async fn a_million_leases_expire_on_time() {
    let plan = Plan { leases: 1_000_000, grant_limit: Duration::from_mins(2), expiry_spread: Duration::from_mins(2) };
    grant_and_expire(plan).await;
}
