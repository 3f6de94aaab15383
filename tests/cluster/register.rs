//! A linearizability test: one register, read and written by many clients while leadership moves continuously.
//!
//! Revisions define the order of writes, so a history is linearizable exactly if revisions agree with real time: an operation
//! that begins after another has ended does not read or write at a lower revision, and a read at a revision returns the value
//! that was written at it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::Client;
use metastore::proto::etcdserverpb::MoveLeaderRequest;
use tokio::task::JoinSet;

use super::harness::Cluster;

/// The result of one operation: when it began and ended, the revision of the value that it read or wrote, and the value.
#[derive(Debug, Clone)]
struct Observation {
    began: Instant,
    ended: Instant,
    revision: i64,
    value: String,
    wrote: bool,
}

fn assert_linearizable(mut history: Vec<Observation>) {
    let mut written = HashMap::new();
    for write in history.iter().filter(|seen| seen.wrote) {
        let before = written.insert(write.revision, write.value.clone());
        assert_eq!(before, None, "two writes have the same revision");
    }
    for read in history.iter().filter(|seen| !seen.wrote) {
        if let Some(value) = written.get(&read.revision) {
            assert_eq!(&read.value, value, "the value read at revision {} is not the one written", read.revision);
        }
    }
    // An operation that begins after others have ended must see at least the highest revision that those have seen.
    let mut by_end = history.clone();
    by_end.sort_by_key(|seen| seen.ended);
    history.sort_by_key(|seen| seen.began);
    let (mut ended, mut highest) = (by_end.iter().peekable(), 0);
    for operation in &history {
        while let Some(earlier) = ended.next_if(|earlier| earlier.ended < operation.began) {
            highest = highest.max(earlier.revision);
        }
        assert!(
            operation.revision >= highest,
            "an operation that began after revision {highest} was seen has revision {}: {operation:?}",
            operation.revision
        );
        assert!(
            !operation.wrote || operation.revision > highest,
            "a write has the revision of one that had ended: {operation:?}"
        );
    }
}

async fn operate(client: &mut Client, client_nth: usize, nth: usize) -> Option<Observation> {
    let began = Instant::now();
    let limit = Duration::from_secs(2);
    let wrote = nth.is_multiple_of(2);
    let (revision, value) = if wrote {
        let value = format!("{client_nth}/{nth}");
        let put = tokio::time::timeout(limit, client.put("register", value.as_str(), None)).await.ok()?.ok()?;
        (put.header()?.revision(), value)
    } else {
        let found = tokio::time::timeout(limit, client.get("register", None)).await.ok()?.ok()?;
        let pair = found.kvs().first()?;
        (pair.mod_revision(), pair.value_str().ok()?.to_owned())
    };
    Some(Observation { began, ended: Instant::now(), revision, value, wrote })
}

/// FAULT-18, FAULT-20, FAULT-22 and FAULT-23.
#[tokio::test(flavor = "multi_thread")]
async fn a_register_is_linearizable_while_leadership_moves_and_members_are_isolated() {
    let cluster = Cluster::bootstrap(3, &[]);
    cluster.client(0).await.put("register", "first", None).await.unwrap();
    let history = Arc::new(Mutex::new(Vec::new()));
    let stopped = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for client_nth in 0..9 {
        let mut client = cluster.client(client_nth % 3).await;
        let (history, stopped) = (history.clone(), stopped.clone());
        clients.spawn(async move {
            for nth in client_nth.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if let Some(seen) = operate(&mut client, client_nth, nth).await {
                    history.lock().unwrap().push(seen);
                }
            }
        });
    }
    let mut transfers = 0;
    for round in 0..30 {
        let leader = cluster.leader().await;
        let target = cluster.others(leader)[round % 2];
        let request = MoveLeaderRequest { target_id: cluster.ids[target] };
        let moved = cluster.servers[leader].maintenance().await.move_leader(request).await;
        transfers += u32::from(moved.is_ok());
        if round % 10 == 9 {
            cluster.isolate(target);
            cluster.leader_after(target).await;
            tokio::time::sleep(Duration::from_millis(300)).await; // Time for stale reads to occur.
            cluster.network.heal();
        }
    }
    stopped.store(true, Ordering::Relaxed);
    clients.join_all().await;
    let history = std::mem::take(&mut *history.lock().unwrap());
    println!("{transfers} transfers, {} calls", history.len());
    assert!(
        transfers >= 20 && history.len() > 500,
        "too few operations: {transfers} transfers, {} calls",
        history.len()
    );
    assert_linearizable(history);
    cluster.assert_all_equal().await;
}

#[test]
fn the_linearizability_check_finds_a_stale_read() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let seen = |began, ended, revision, wrote| Observation {
        began: at(began),
        ended: at(ended),
        revision,
        value: revision.to_string(),
        wrote,
    };
    assert_linearizable(vec![seen(0, 1, 1, true), seen(0, 5, 1, false), seen(2, 3, 2, true), seen(4, 5, 2, false)]);
    let stale = || assert_linearizable(vec![seen(0, 1, 1, true), seen(2, 3, 2, true), seen(4, 5, 1, false)]);
    assert!(std::panic::catch_unwind(stale).is_err());
}
