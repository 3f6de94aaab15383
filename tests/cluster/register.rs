//! One register, read and written by many while leadership moves from member to member without a rest: does it look as if
//! there were one copy of it?
//!
//! Revisions give every write its place, so a history is linearizable exactly if places agree with real time: nobody who
//! starts after another has ended sees or makes an earlier place, and whoever reads a place reads what was written there.

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

/// What one call saw: when it began and ended, the place of the value that it read or wrote, and the value.
#[derive(Debug, Clone)]
struct Observation {
    began: Instant,
    ended: Instant,
    place: i64,
    value: String,
    wrote: bool,
}

fn assert_linearizable(mut history: Vec<Observation>) {
    let mut written = HashMap::new();
    for write in history.iter().filter(|seen| seen.wrote) {
        let before = written.insert(write.place, write.value.clone());
        assert_eq!(before, None, "two writes have one place");
    }
    for read in history.iter().filter(|seen| !seen.wrote) {
        if let Some(value) = written.get(&read.place) {
            assert_eq!(&read.value, value, "what was read at {} is not what was written there", read.place);
        }
    }
    // By their ends: whoever begins behind an end must see at least the highest place that was seen before it.
    let mut by_end = history.clone();
    by_end.sort_by_key(|seen| seen.ended);
    history.sort_by_key(|seen| seen.began);
    let (mut ended, mut highest) = (by_end.iter().peekable(), 0);
    for call in &history {
        while let Some(earlier) = ended.next_if(|earlier| earlier.ended < call.began) {
            highest = highest.max(earlier.place);
        }
        assert!(call.place >= highest, "a call that began after {highest} was seen came to {}: {call:?}", call.place);
        assert!(!call.wrote || call.place > highest, "a write took the place of one that had ended: {call:?}");
    }
}

async fn call(client: &mut Client, caller: usize, nth: usize) -> Option<Observation> {
    let began = Instant::now();
    let patience = Duration::from_secs(2);
    let wrote = nth.is_multiple_of(2);
    let (place, value) = if wrote {
        let value = format!("{caller}/{nth}");
        let put = tokio::time::timeout(patience, client.put("register", value.as_str(), None)).await.ok()?.ok()?;
        (put.header()?.revision(), value)
    } else {
        let found = tokio::time::timeout(patience, client.get("register", None)).await.ok()?.ok()?;
        let pair = found.kvs().first()?;
        (pair.mod_revision(), pair.value_str().ok()?.to_owned())
    };
    Some(Observation { began, ended: Instant::now(), place, value, wrote })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_register_stays_one_while_leadership_moves_and_members_are_cut_off() {
    let cluster = Cluster::found(3, &[]);
    cluster.client(0).await.put("register", "first", None).await.unwrap();
    let history = Arc::new(Mutex::new(Vec::new()));
    let stopped = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for caller in 0..9 {
        let mut client = cluster.client(caller % 3).await;
        let (history, stopped) = (history.clone(), stopped.clone());
        callers.spawn(async move {
            for nth in caller.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if let Some(seen) = call(&mut client, caller, nth).await {
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
            tokio::time::sleep(Duration::from_millis(300)).await; // Time for stale reads to show.
            cluster.network.heal();
        }
    }
    stopped.store(true, Ordering::Relaxed);
    callers.join_all().await;
    let history = std::mem::take(&mut *history.lock().unwrap());
    println!("{transfers} transfers, {} calls", history.len());
    assert!(
        transfers >= 20 && history.len() > 500,
        "too little happened: {transfers} transfers, {} calls",
        history.len()
    );
    assert_linearizable(history);
    cluster.assert_all_equal().await;
}

#[test]
fn the_check_finds_a_stale_read() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let seen = |began, ended, place, wrote| Observation {
        began: at(began),
        ended: at(ended),
        place,
        value: place.to_string(),
        wrote,
    };
    assert_linearizable(vec![seen(0, 1, 1, true), seen(0, 5, 1, false), seen(2, 3, 2, true), seen(4, 5, 2, false)]);
    let stale = || assert_linearizable(vec![seen(0, 1, 1, true), seen(2, 3, 2, true), seen(4, 5, 1, false)]);
    assert!(std::panic::catch_unwind(stale).is_err());
}
