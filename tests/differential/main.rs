//! The same random operations, asked of our server and of a real etcd: what they answer must be equal, field by field.
//!
//! Both start empty and with the same flags and names, so even the IDs are the same; only sizes, log positions and the time
//! that a lease has left are not compared. One operation at a time is put to both. Whatever differs is printed with the
//! operation, both answers and the seed. After half of the operations both servers are killed and started again on what
//! they left behind. [`known::KNOWN`] lists the differences that are meant, [`chooser`] what is never asked; [`directed`]
//! asks what chance does not find.
//!
//! Without a real etcd there is nothing to compare with; the test says so and passes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::wildcard_enum_match_arm, reason = "answers of other kinds need nothing")]

mod answers;
mod chooser;
mod directed;
mod known;
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../front/odd_calls.rs"]
mod odd_calls;
mod pair;
#[path = "../process/mod.rs"]
mod process;
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../front/raw.rs"]
mod raw;
mod surface;
mod watches;

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use pair::Pair;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_thousand_random_operations_are_answered_as_etcd_answers_them() {
    Box::pin(compare(1..=3, 1000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long"]
async fn a_hundred_thousand_random_operations_are_answered_as_etcd_answers_them() {
    Box::pin(compare(100..=124, 4200)).await;
}

async fn compare(seeds: impl Iterator<Item = u64>, turns: usize) {
    let Some(etcd) = etcd() else { return };
    // One seed, for looking closer: METASTORE_SEED=7.
    let only: Option<u64> =
        std::env::var("METASTORE_SEED").ok().map(|seed| seed.parse().expect("METASTORE_SEED is a number"));
    let (mut asked, mut excused) = (BTreeMap::new(), BTreeMap::new());
    for seed in seeds.filter(|&seed| only.is_none_or(|only| only == seed)) {
        let began = Instant::now();
        let pair = Box::pin(Pair::start(&etcd, seed, turns).await.run()).await;
        eprintln!("seed {seed}: {turns} operations, head {}, {:.1?}", pair.chooser.head(), began.elapsed());
        for (what, times) in &pair.asked {
            *asked.entry(what.clone()).or_insert(0) += times;
        }
        for (what, times) in &pair.excused {
            *excused.entry(*what).or_insert(0) += times;
        }
        let found = pair.differences;
        assert!(found.is_empty(), "seed {seed}: {} differences\n\n{}", found.len(), found.join("\n\n"));
    }
    for (what, times) in asked {
        eprintln!("{times:6} {what}");
    }
    for (what, times) in excused {
        eprintln!("{times} times a difference that is meant: {what}");
    }
}

/// A real etcd.
struct Etcd {
    program: PathBuf,
    /// Whether it is older than what ours answers as; then [`known::OF_OLD`] counts too.
    is_old: bool,
}

/// The real etcd, or a loud word that there is none.
fn etcd() -> Option<Etcd> {
    let Some((program, version)) = process::any_etcd() else {
        eprintln!("\n*** THERE IS NO ETCD HERE TO COMPARE WITH: NOTHING WAS TESTED ***\n");
        return None;
    };
    let is_old = !version.starts_with("3.7.");
    if is_old {
        eprintln!("\n*** COMPARED WITH etcd {version}, WHICH DOES NOT ANSWER AS 3.7 DOES IN EVERYTHING ***\n");
    }
    Some(Etcd { program, is_old })
}

/// Long values say little.
fn shortened(text: &str) -> String {
    text.chars().take(2000).collect()
}
