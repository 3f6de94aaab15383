//! A cluster on one thread: its members' rooms as values, its disks in memory, everything that happens drawn from a seed.
//!
//! ```text
//! seed ─▶ Climate: how many members, how bad the network and the disks are, what goes wrong
//!      ─▶ World: an agenda of events in virtual time
//!           ├── Members: the rooms of a node (driver, log writer, applier, keeper, hub), step by step
//!           │     └── disks: a log that forgets or tears what was not synced, a database that forgets what was not flushed
//!           ├── Network, courier: messages and snapshots that are lost, late, doubled, out of order
//!           ├── clients, owners of leases, watchers, operators; troubles
//!           └── History and Model: what was agreed, and what it comes to; Oaths: what members may say
//! ```
//!
//! The code that runs here is the code that runs in the server: there each room has a thread around it, here they take turns.
//! One member is a cluster like another. A seed that fails is run again with a line for each event and printed;
//! `SIMULATION_SEED=n` runs it alone.
//!
//! That the checks can find anything is a test of its own: mistakes are planted, and each must be found.
//!
//! Not here: the transport's own code (frames, connections, the files of snapshots), and the way of a renewal from one member
//! to another.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, clippy::let_and_return, reason = "a test may panic")]

mod agenda;
mod client;
mod clients;
mod climate;
mod courier;
mod dice;
mod disk;
mod fault;
mod history;
mod lease_owners;
mod mailroom;
mod member;
mod model;
mod network;
mod oaths;
mod peace;
mod scenarios;
mod troubles;
mod watcher;
mod world;

use std::{
    cell::Cell,
    env,
    panic::{self, AssertUnwindSafe},
    sync::Once,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fault::Fault;
use world::{Report, World};

const FIXED_SEEDS: u64 = 200;
const FRESH_FOR: Duration = Duration::from_secs(8);

thread_local! {
    /// Whether this thread expects a panic, which then nobody has to read about.
    static EXPECTS_PANIC: Cell<bool> = const { Cell::new(false) };
    /// Where the last panic was.
    static PLACE: Cell<String> = const { Cell::new(String::new()) };
}

fn hush() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PLACE.set(info.location().map(ToString::to_string).unwrap_or_default());
            if !EXPECTS_PANIC.get() {
                loud(info);
            }
        }));
    });
}

/// Runs one seed; `Err` says what was wrong. The trace is empty unless it is asked for.
fn simulate(seed: u64, fault: Option<Fault>, tracing: bool) -> (Result<Report, String>, Vec<String>) {
    hush();
    let expected = EXPECTS_PANIC.replace(true);
    let mut world = None;
    let run = AssertUnwindSafe(|| world.insert(World::new(seed, fault, tracing)).run());
    let outcome = panic::catch_unwind(run).map_err(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("seed {seed}: {} ({})", text.unwrap_or_default(), PLACE.take())
    });
    EXPECTS_PANIC.set(expected);
    let trace = world.as_mut().and_then(|world| world.trace.take()).unwrap_or_default();
    (outcome, trace)
}

fn expect_peace(seed: u64) -> Report {
    let (outcome, _) = simulate(seed, None, false);
    outcome.unwrap_or_else(|failure| {
        let (again, trace) = simulate(seed, None, true);
        assert_eq!(again.as_ref(), Err(&failure), "a seed replays exactly");
        panic!("{}\n{failure}\nrun it again with SIMULATION_SEED={seed}", trace.join("\n"))
    })
}

fn number(name: &str) -> Option<u64> {
    Some(env::var(name).ok()?.parse().unwrap_or_else(|error| panic!("{name}: {error}")))
}

fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(now.as_nanos() % u128::from(u64::MAX)).expect("below")
}

#[test]
fn no_seed_of_the_fixed_set_breaks_a_promise() {
    let mut total = Report::default();
    (0..FIXED_SEEDS).for_each(|seed| total.add(&expect_peace(seed)));
    println!("{FIXED_SEEDS} seeds: {total:?}");
    assert!(total.crashes > 1000 && total.answers > 10_000, "the world is too quiet: {total:?}");
    assert!(total.reads > 1000 && total.heard > 1000, "the world is too quiet: {total:?}");
    assert!(total.renewals > 1000 && total.expiries > 100, "the world is too quiet: {total:?}");
    assert!(total.snapshots > 20 && total.changes > 100, "the world is too quiet: {total:?}");
    assert_eq!(total.early.len(), 3, "three kinds of messages need not wait for the disk: {total:?}");
}

/// `SIMULATION_SEED` runs one seed, `SIMULATION_SEEDS` so many fresh ones; without either, fresh ones for some seconds.
#[test]
fn no_fresh_seed_breaks_a_promise() {
    if let Some(seed) = number("SIMULATION_SEED") {
        println!("seed {seed}: {:?}", expect_peace(seed));
        return;
    }
    let first = fresh_seed();
    let (started, limit) = (Instant::now(), number("SIMULATION_SEEDS"));
    let mut runs = 0;
    while limit.map_or(started.elapsed() < FRESH_FOR, |limit| runs < limit) {
        expect_peace(first.wrapping_add(runs));
        runs += 1;
    }
    println!("{runs} fresh seeds from {first} in {:?}", started.elapsed());
    assert!(runs > 0, "at least one seed was run");
}

#[test]
fn a_seed_replays_exactly() {
    for seed in [3, 14, 159] {
        let once = simulate(seed, None, true);
        assert!(once.0.is_ok() && once.1.len() > 1000, "{:?}", once.0);
        assert_eq!(once, simulate(seed, None, true));
    }
}

#[test]
#[ignore = "long"]
fn no_seed_of_thousands_breaks_a_promise() {
    let (first, started) = (fresh_seed(), Instant::now());
    let mut total = Report::default();
    (0..10_000).for_each(|nth| total.add(&expect_peace(first.wrapping_add(nth))));
    println!("10000 seeds from {first} in {:?}: {total:?}", started.elapsed());
    assert!(total.crashes > 50_000, "the world is too quiet: {total:?}");
}

/// How many seeds it takes until a planted mistake is found.
fn seeds_to_find(fault: Fault) -> u64 {
    const ENOUGH: u64 = 1500;
    let found = (0..ENOUGH).find_map(|seed| Some((seed + 1, simulate(seed, Some(fault), false).0.err()?)));
    let (seeds, failure) = found.unwrap_or_else(|| panic!("{fault:?} went unnoticed for {ENOUGH} seeds"));
    println!("{fault:?} is found by seed {seeds}: {}", failure.lines().next().unwrap_or_default());
    seeds
}

#[test]
fn an_acknowledgement_before_the_sync_is_found() {
    assert!(seeds_to_find(Fault::AcknowledgedBeforeSync) <= 50);
}

#[test]
fn an_applied_index_in_a_batch_of_its_own_is_found() {
    assert!(seeds_to_find(Fault::AppliedIndexLate) <= 50);
    assert!(seeds_to_find(Fault::AppliedIndexEarly) <= 50);
}

#[test]
fn a_reused_context_of_a_read_is_found() {
    seeds_to_find(Fault::ReusedContext);
}

#[test]
fn a_promise_before_the_disk_is_done_is_found() {
    seeds_to_find(Fault::EarlyAcknowledgement);
    seeds_to_find(Fault::EarlyVote);
}

#[test]
fn a_decision_about_leases_without_a_proof_is_found() {
    seeds_to_find(Fault::TickAsProof);
}

#[test]
fn a_revocation_that_is_passed_on_is_found() {
    seeds_to_find(Fault::ForwardedRevoke);
}
