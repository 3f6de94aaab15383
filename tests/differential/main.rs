//! The same random operations are sent to our server and to a real etcd; the answers must be equal, field by field.
//!
//! Both start empty and with the same flags and names, so even the IDs are equal; only sizes, log positions and the remaining
//! time of leases are not compared. Operations are sent one at a time to both. Each difference is printed with the operation,
//! both answers and the seed. After half of the operations both servers are killed and restarted on their data.
//! [`known::KNOWN`] lists the intended differences, [`generator`] what is never sent; [`directed`] tests what random operations
//! do not reach.
//!
//! An etcd of another version is compared with, too, as far as its answers are the same; that counts as skipped.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::wildcard_enum_match_arm, reason = "answers of other kinds need no handling")]

mod answers;
mod directed;
mod generator;
mod known;
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../http2/odd_calls.rs"]
mod odd_calls;
mod pair;
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../http2/raw.rs"]
mod raw;
mod surface;
mod users;
mod watches;

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use pair::Pair;
use test_support::{require, requirements};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_thousand_random_operations_are_answered_as_etcd_answers_them() {
    Box::pin(compare(1..=3, 1000, false)).await;
}

/// The same with authentication: half of the operations are those of a user that may do some of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_some_permissions_is_allowed_and_denied_what_etcd_allows_and_denies() {
    Box::pin(compare(11..=12, 1000, true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn tens_of_thousands_of_operations_of_two_users_are_answered_as_etcd_answers_them() {
    Box::pin(compare(200..=209, 4200, true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn a_hundred_thousand_random_operations_are_answered_as_etcd_answers_them() {
    Box::pin(compare(100..=124, 4200, false)).await;
}

async fn compare(seeds: impl Iterator<Item = u64>, actions: usize, has_users: bool) {
    let Some(etcd) = etcd() else { return };
    // A single seed, to investigate: METASTORE_SEED=7.
    let only: Option<u64> =
        std::env::var("METASTORE_SEED").ok().map(|seed| seed.parse().expect("METASTORE_SEED is a number"));
    let (mut outcomes, mut excused) = (BTreeMap::new(), BTreeMap::new());
    for seed in seeds.filter(|&seed| only.is_none_or(|only| only == seed)) {
        let began = Instant::now();
        let pair = Box::pin(Pair::start_with(&etcd, seed, actions, has_users).await.run()).await;
        eprintln!("seed {seed}: {actions} operations, head {}, {:.1?}", pair.generator.head(), began.elapsed());
        for (what, times) in &pair.outcomes {
            *outcomes.entry(what.clone()).or_insert(0) += times;
        }
        for (what, times) in &pair.excused {
            *excused.entry(*what).or_insert(0) += times;
        }
        let found = pair.differences;
        assert!(found.is_empty(), "seed {seed}: {} differences\n\n{}", found.len(), found.join("\n\n"));
    }
    for (what, times) in outcomes {
        eprintln!("{times:6} {what}");
    }
    for (what, times) in excused {
        eprintln!("{times} intended differences: {what}");
    }
}

/// A real etcd.
struct Etcd {
    program: PathBuf,
    /// Whether it is older than the version that ours implements; then [`known::KNOWN_OF_OLD_ETCD`] applies, too.
    is_old: bool,
}

fn etcd() -> Option<Etcd> {
    let (program, version) = require("etcd", requirements::any_etcd())?;
    let is_old = !version.starts_with("3.7.");
    if is_old {
        let _: Option<()> =
            require("etcd", Err(format!("this is etcd {version}, and only what it answers as 3.7 does is compared")));
    }
    Some(Etcd { program, is_old })
}

/// The beginning of a text, for failure messages.
fn shortened(text: &str) -> String {
    text.chars().take(2000).collect()
}
