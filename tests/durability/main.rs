//! An acknowledged write survives, whatever happens to the process or to the power.
//!
//! Two loops, the same [`writer`]s in both: [`kill`] ends a real process with kill -9 while a hundred clients write, compact
//! and ask for hashes; [`power`] takes from a node in this process everything that was not synced. After each end the data
//! is opened again, and every writer looks at his keys.
//!
//! Short forms run always, long ones of a hundred rounds with `scripts/test --long`. The seed is printed; it fixes what is
//! written, but not how threads and processes take turns. For that there is the simulation.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod kill;
mod power;
#[path = "../support/mod.rs"]
mod support;
mod writer;

use std::{fmt, panic, time::Duration};

use power::Disk;
use support::Server;

/// What a loop came to.
#[derive(Debug, Default)]
pub struct Figures {
    rounds: usize,
    /// Starts that were killed before they served.
    killed_at_start: usize,
    acknowledged: u64,
    /// Transactions under way at the end whose writer never heard of them: how many were there afterwards, how many not.
    done_unheard: usize,
    not_done: usize,
    /// Hashes of old revisions that were compared.
    hashes: usize,
    starts: Duration,
    slowest_start: Duration,
    /// The log on disk, spare segments included; where it is files of the system's.
    largest_log_bytes: u64,
}

impl Figures {
    fn came_back(&mut self, took: Duration) {
        self.rounds += 1;
        self.starts += took;
        self.slowest_start = self.slowest_start.max(took);
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = self.starts / u32::try_from(self.rounds.max(1)).unwrap();
        write!(
            out,
            "{} rounds, {} killed at start; {} writes acknowledged, of those under way {} done and {} not; {} hashes \
             equal; start {:.0?} on average, {:.0?} at most; log {} MiB at most",
            self.rounds,
            self.killed_at_start,
            self.acknowledged,
            self.done_unheard,
            self.not_done,
            self.hashes,
            mean,
            self.slowest_start,
            self.largest_log_bytes >> 20
        )
    }
}

fn fresh_seed() -> u64 {
    std::env::var("DURABILITY_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap())
}

fn assert_meaningful(figures: &Figures, rounds: usize) {
    println!("{figures}");
    assert_eq!(figures.rounds, rounds);
    assert!(figures.acknowledged > 100 * rounds as u64, "too little was written: {figures}");
    assert!(figures.hashes > 0 && figures.not_done + figures.done_unheard > 0, "too little was tried: {figures}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_to_kill_9() {
    assert_meaningful(&kill::kill_again_and_again(8).await, 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn nothing_acknowledged_is_lost_to_kill_9_a_hundred_times() {
    assert_meaningful(&kill::kill_again_and_again(100).await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_to_replay_than_a_running_server_would_let_gather_is_replayed() {
    kill::leave_much_to_replay(20_000).await;
}

#[test]
fn a_line_says_how_the_log_becomes_durable() {
    let server = Server::start(&[]);
    let line = server.wait_for_log("opened the raft log");
    let ways = ["writes with O_DIRECT and RWF_DSYNC (file system: ", "cached writes and fdatasync (file system: "];
    assert!(line.contains("\"level\":\"info\"") && ways.iter().any(|way| line.contains(way)), "{line}");
    let unsafe_server = Server::start(&["--unsafe-no-fsync"]);
    let line = unsafe_server.wait_for_log("opened the raft log");
    assert!(line.contains("never, as --unsafe-no-fsync asks for"), "{line}");
}

#[test]
fn nothing_acknowledged_is_lost_with_what_was_not_synced() {
    assert_meaningful(&power::cut_again_and_again(8, Disk::Contract), 8);
}

#[test]
#[ignore = "long"]
fn nothing_acknowledged_is_lost_with_what_was_not_synced_a_hundred_times() {
    assert_meaningful(&power::cut_again_and_again(100, Disk::Contract), 100);
}

#[test]
fn nothing_acknowledged_is_lost_that_went_past_the_page_cache() {
    assert_meaningful(&power::cut_again_and_again(8, Disk::OsFiles), 8);
}

#[test]
#[ignore = "long"]
fn nothing_acknowledged_is_lost_that_went_past_the_page_cache_a_hundred_times() {
    assert_meaningful(&power::cut_again_and_again(100, Disk::OsFiles), 100);
}

/// What the loop says where a promise was broken: the log cannot be what it was, a writer misses something, time went back.
const COMPLAINTS: [&str; 3] = ["Refused", "was promised", "went back"];

fn assert_found_out(disk: Disk) {
    let outcome = panic::catch_unwind(|| power::cut_again_and_again(8, disk));
    let cause = outcome.expect_err("on this disk something must be lost");
    let text = cause.downcast_ref::<String>().expect("a panic with figures in it");
    assert!(COMPLAINTS.iter().any(|complaint| text.contains(complaint)), "{text}");
}

#[test]
fn a_disk_that_lies_about_syncs_is_found() {
    assert_found_out(Disk::ContractWithoutSyncs);
}

#[test]
fn a_file_system_that_ignores_durable_writes_is_found() {
    assert_found_out(Disk::OsFilesWithoutDurableWrites);
}
