//! Acknowledged writes survive crashes of the process and power failures.
//!
//! Two loops with the same [`writer`]s: [`kill`] ends a server process with kill -9 while a hundred clients write, compact and
//! request hashes; [`power`] discards everything that a node in this process has not synced. Each time, the data is opened
//! again and every writer checks its keys.
//!
//! Short forms always run, long ones of a hundred rounds with `scripts/test --long`. The seed is printed; it determines what
//! is written, but not how threads and processes are scheduled. The simulation covers that.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod kill;
mod power;
mod writer;

use std::{fmt, panic, time::Duration};
use test_support as support;

use power::Disk;
use support::Server;

/// The results of a loop.
#[derive(Debug, Default)]
pub struct Statistics {
    rounds: usize,
    /// Servers that were killed during their start.
    killed_at_start: usize,
    acknowledged: u64,
    /// Transactions in flight at the crash: how many were found applied afterwards, how many not.
    done_unacknowledged: usize,
    not_done: usize,
    /// Compared hashes of old revisions.
    hashes: usize,
    starts: Duration,
    slowest_start: Duration,
    /// The largest size of the log on disk, including spare segments; only in the kill loop.
    largest_log_bytes: u64,
}

impl Statistics {
    fn record_restart(&mut self, took: Duration) {
        self.rounds += 1;
        self.starts += took;
        self.slowest_start = self.slowest_start.max(took);
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = self.starts / u32::try_from(self.rounds.max(1)).unwrap();
        write!(
            out,
            "{} rounds, {} killed at start; {} writes acknowledged, of those in flight {} done and {} not; {} hashes \
             equal; start {:.0?} on average, {:.0?} at most; log {} MiB at most",
            self.rounds,
            self.killed_at_start,
            self.acknowledged,
            self.done_unacknowledged,
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

fn assert_meaningful(statistics: &Statistics, rounds: usize) {
    println!("{statistics}");
    assert_eq!(statistics.rounds, rounds);
    assert!(statistics.acknowledged > 100 * rounds as u64, "too few writes were acknowledged: {statistics}");
    assert!(
        statistics.hashes > 0 && statistics.not_done + statistics.done_unacknowledged > 0,
        "too few hashes or transactions in flight were checked: {statistics}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_kill_9() {
    assert_meaningful(&kill::kill_repeatedly(8).await, 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn acknowledged_writes_survive_a_hundred_kill_9() {
    assert_meaningful(&kill::kill_repeatedly(100).await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_entries_than_the_apply_backlog_are_replayed() {
    kill::restart_with_a_long_log(20_000).await;
}

#[test]
fn the_log_says_how_it_becomes_durable() {
    let server = Server::start(&[]);
    let line = server.wait_for_log("opened the raft log");
    let ways = ["writes with O_DIRECT and RWF_DSYNC (file system: ", "cached writes and fdatasync (file system: "];
    assert!(line.contains("\"level\":\"info\"") && ways.iter().any(|way| line.contains(way)), "{line}");
    let unsafe_server = Server::start(&["--unsafe-no-fsync"]);
    let line = unsafe_server.wait_for_log("opened the raft log");
    assert!(line.contains("never, as --unsafe-no-fsync asks for"), "{line}");
}

/// FAULT-3.
#[test]
fn acknowledged_writes_survive_power_failures() {
    assert_meaningful(&power::fail_power_repeatedly(8, Disk::Contract), 8);
}

#[test]
#[ignore = "long"]
fn acknowledged_writes_survive_a_hundred_power_failures() {
    assert_meaningful(&power::fail_power_repeatedly(100, Disk::Contract), 100);
}

#[test]
fn acknowledged_durable_writes_survive_power_failures() {
    assert_meaningful(&power::fail_power_repeatedly(8, Disk::OsFiles), 8);
}

#[test]
#[ignore = "long"]
fn acknowledged_durable_writes_survive_a_hundred_power_failures() {
    assert_meaningful(&power::fail_power_repeatedly(100, Disk::OsFiles), 100);
}

/// Texts of the panics on lost data: the log is refused, a writer finds other data than expected, a revision went back.
const LOSS_TEXTS: [&str; 3] = ["InvalidData", "but expected", "went back"];

fn assert_detected(disk: Disk) {
    let outcome = panic::catch_unwind(|| power::fail_power_repeatedly(8, disk));
    let cause = outcome.expect_err("this disk must lose data");
    let text = cause.downcast_ref::<String>().expect("the panic has a formatted message");
    assert!(LOSS_TEXTS.iter().any(|loss| text.contains(loss)), "{text}");
}

#[test]
fn a_disk_that_lies_about_syncs_is_detected() {
    assert_detected(Disk::ContractWithoutSyncs);
}

#[test]
fn a_file_system_that_ignores_durable_writes_is_detected() {
    assert_detected(Disk::OsFilesWithoutDurableWrites);
}
