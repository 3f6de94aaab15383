//! Memory and time per lease, for many leases with one key attached to each.

#![allow(clippy::disallowed_methods, reason = "measures time")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use metastore::lease::{Deadlines, LeaseId, Leases, Renewal};
use metastore::storage::memory::Memory;
use metastore::storage::{Batch, Engine};
use tikv_jemalloc_ctl::{epoch, stats};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const KEY_BYTES: usize = 32;
const TTL_SECONDS: i64 = 60;
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(7);

fn allocated() -> usize {
    epoch::advance().unwrap();
    stats::allocated::read().unwrap()
}

fn key(id: LeaseId) -> [u8; KEY_BYTES] {
    let mut key = [b'k'; KEY_BYTES];
    key[..16].copy_from_slice(format!("{:016x}", id.0).as_bytes());
    key
}

/// IDs as members generate them: ascending, but not strictly in order.
fn ids(count: i64) -> impl Iterator<Item = LeaseId> {
    (1..=count).map(|number| LeaseId((number ^ 5) + (7 << 40)))
}

/// The same IDs in a scattered order, as clients renew them.
fn shuffled(count: i64) -> impl Iterator<Item = LeaseId> {
    let ids: Vec<_> = ids(count).collect();
    (0..ids.len()).map(move |number| ids[number * 7919 % ids.len()])
}

/// Runs `work` and prints its duration, in total and per lease.
fn timed<T>(what: &str, count: i64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    let took = start.elapsed();
    println!(
        "{what:32} {:8.1} ms, {:6} ns each",
        took.as_secs_f64() * 1e3,
        took.as_nanos() / u128::from(count.unsigned_abs())
    );
    done
}

fn per_lease(what: &str, before: usize, count: i64) -> usize {
    let bytes = (allocated() - before) / usize::try_from(count).unwrap();
    println!("{what:32} {bytes} bytes a lease");
    bytes
}

fn grant_all(engine: &Memory, count: i64) -> Leases {
    let mut leases = Leases::restore(engine).unwrap();
    let mut batch = Batch::default();
    timed("grant, attach, write", count, || {
        for id in ids(count) {
            leases.grant(&mut batch, id, TTL_SECONDS).unwrap();
            leases.attach(id, &key(id)).unwrap();
            engine.write(&batch).unwrap();
            batch.clear();
        }
    });
    leases
}

/// Restores, grants, renews, expires and revokes many leases as a leader does, and checks the memory of the replicated table and
/// of the deadlines against a budget in bytes per lease.
fn run(count: i64, table_budget_bytes: usize, deadlines_budget_bytes: usize) {
    // The allocator counts for the whole process, so these tests must not overlap.
    static EXCLUSIVE: Mutex<()> = Mutex::new(());
    let _guard = EXCLUSIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let engine = Memory::default();
    drop(grant_all(&engine, count));
    engine.flush().unwrap();

    let before = allocated();
    let mut leases = timed("restore", count, || Leases::restore(&engine).unwrap());
    timed("attach", count, || ids(count).for_each(|id| leases.attach(id, &key(id)).unwrap()));
    assert!(per_lease("table after a restart", before, count) <= table_budget_bytes);
    drop(leases);

    let before = allocated();
    let mut leases = grant_all(&Memory::default(), count);
    assert!(per_lease("table after grants", before, count) <= table_budget_bytes);
    let all = timed("list", count, || leases.reader().all());

    let before = allocated();
    let mut deadlines = expire(all, count, deadlines_budget_bytes);
    assert_eq!(deadlines.next_deadline(), None);
    deadlines.demote();
    grow(&mut deadlines, count);
    deadlines.demote();
    assert!(allocated() <= before + (1 << 20), "all memory is freed");

    let mut batch = Batch::default();
    timed("revoke", count, || {
        for id in ids(count) {
            assert_eq!(leases.revoke(&mut batch, id).unwrap(), [key(id).as_slice()]);
            batch.clear();
        }
    });
    assert!(leases.reader().is_empty());
}

/// Promotes, renews all leases twice, then lets all of them expire.
fn expire(all: Vec<(LeaseId, i64)>, count: i64, budget_bytes: usize) -> Deadlines {
    let before = allocated();
    let mut deadlines = Deadlines::new(RETRY);
    timed("promote", count, || deadlines.promote(all, Duration::ZERO, ELECTION_TIMEOUT));
    assert!(per_lease("deadlines after a promotion", before, count) <= budget_bytes);

    // Renewals are spread over 50 seconds, as with real clients; the first round cancels the spread of the promotion.
    let spread = |number: i64| Duration::from_millis((number * 50_000 / count).unsigned_abs());
    for (what, start) in [("first renewal", 1), ("second renewal", 52)] {
        timed(what, count, || {
            for (number, id) in (0..).zip(shuffled(count)) {
                let now = Duration::from_secs(start) + spread(number);
                assert_eq!(deadlines.renewed(id, now), Renewal::Renewed(TTL_SECONDS));
            }
        });
    }
    let expired =
        timed("check all that were renewed", count, || deadlines.expired(Duration::from_secs(111), usize::MAX));
    assert!(expired.is_empty(), "no lease has expired yet");

    let mut found = 0;
    let mut slowest = Duration::ZERO;
    timed("expire and forget", count, || {
        for half_second in 224..=326 {
            let start = Instant::now();
            for id in deadlines.expired(Duration::from_millis(half_second * 500), usize::MAX) {
                deadlines.revoked(id);
                found += 1;
            }
            slowest = slowest.max(start.elapsed());
        }
    });
    println!("{:32} {:8.1} ms", "slowest half second", slowest.as_secs_f64() * 1e3);
    assert_eq!(found, count, "each lease is reported once, within half a second of its deadline");
    deadlines
}

/// Grants one by one on a leader, to measure the pause when its map grows.
fn grow(deadlines: &mut Deadlines, count: i64) {
    let before = allocated();
    deadlines.promote([], Duration::ZERO, ELECTION_TIMEOUT);
    let mut slowest = Duration::ZERO;
    timed("granted on a leader", count, || {
        for id in ids(count) {
            let start = Instant::now();
            deadlines.granted(id, TTL_SECONDS, Duration::ZERO);
            slowest = slowest.max(start.elapsed());
        }
    });
    println!("{:32} {:8.1} ms", "slowest grant", slowest.as_secs_f64() * 1e3);
    per_lease("deadlines after grants", before, count);
}

#[test]
fn many_leases_are_cheap() {
    run(50_000, 160, 120);
}

#[test]
#[ignore = "long"]
fn a_million_leases_are_cheap() {
    run(1_000_000, 160, 120);
}
