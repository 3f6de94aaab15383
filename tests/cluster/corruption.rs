//! Detection of a member whose data differs from that of the others.

use etcd_client::CompactionOptions;
use metastore::{
    node::databases::Databases,
    proto::etcdserverpb::{AlarmRequest, AlarmType, PutRequest, alarm_request::AlarmAction},
    storage::{Batch, Engine, Table, rocks::Rocks},
};
use tonic::Code;

use super::{
    harness::{Cluster, QUICK},
    support::{assert_refused, eventually_async, time_limit},
};

/// Starts a cluster, writes some keys, stops a follower and changes a byte in its database. Returns the stopped follower.
async fn with_a_changed_byte(arguments: &[&str]) -> (Cluster, usize) {
    let mut cluster = Cluster::bootstrap(3, arguments);
    let leader = cluster.leader().await;
    for key in ["a", "b", "c"] {
        cluster.client(leader).await.put(key, "needle", None).await.unwrap();
    }
    cluster.assert_all_equal().await;
    let victim = cluster.others(leader)[0];
    cluster.servers[victim].stop();
    let databases = Databases::new(cluster.servers[victim].data_dir().join("member"));
    let engine = Rocks::open(&databases.current().unwrap()).unwrap();
    let (mut batch, mut changed) = (Batch::default(), 0);
    engine
        .scan(Table::History, &[], &[], &mut |key, record| {
            let mut record = record.to_vec();
            if let Some(at) = record.windows(6).position(|window| window == b"needle").filter(|_| changed == 0) {
                record[at] = b'N';
                batch.put(Table::History, key, record);
                changed += 1;
            }
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(changed, 1);
    engine.write(&batch).unwrap();
    engine.flush().unwrap();
    (cluster, victim)
}

/// Waits for a CORRUPT alarm, and returns the members that it is raised for.
async fn alarmed(cluster: &Cluster, via: usize) -> Vec<u64> {
    eventually_async("an alarm is raised", time_limit(), async || {
        let request = AlarmRequest { action: AlarmAction::Get as i32, member_id: 0, alarm: AlarmType::Corrupt as i32 };
        let alarms = cluster.servers[via].maintenance().await.alarm(request).await.unwrap().into_inner().alarms;
        (!alarms.is_empty()).then(|| alarms.into_iter().map(|alarm| alarm.member_id).collect())
    })
    .await
}

/// FAULT-17.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_finds_a_corrupt_member_and_all_writes_are_refused() {
    let (mut cluster, victim) = with_a_changed_byte(&["--corrupt-check-time=500ms"]).await;
    let others = cluster.others(victim);
    cluster.restart(victim);
    assert_eq!(alarmed(&cluster, others[0]).await, [cluster.ids[victim]]);
    let put = PutRequest { key: "a".into(), ..PutRequest::default() };
    let refused = cluster.servers[others[1]].kv().await.put(put).await;
    assert_refused(refused, Code::DataLoss, "etcdserver: corrupt cluster");
    assert_eq!(cluster.client(others[0]).await.get("a", None).await.unwrap().count(), 1, "reads still work");
    let health = cluster.servers[others[0]].http("GET", "/health");
    assert_eq!((health.status, health.body.as_str()), (503, "{\"health\":\"false\",\"reason\":\"ALARM CORRUPT\"}\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_member_does_not_start_if_the_initial_check_is_enabled() {
    let gate = "--feature-gates=InitialCorruptCheck=true";
    let (mut cluster, victim) = with_a_changed_byte(&[gate]).await;
    cluster.servers[victim].launch();
    let id = cluster.ids[victim];
    cluster.servers[victim].wait_for_refusal(&format!("{id:x} found data inconsistency with peers"));
    // A member that is not corrupt starts, and no alarm was raised.
    let leader = cluster.leader_among(&cluster.others(victim)).await;
    let intact = *cluster.others(victim).iter().find(|nth| **nth != leader).unwrap();
    cluster.servers[intact].kill();
    cluster.servers[intact].set_arguments(&[QUICK, &[gate]].concat());
    cluster.restart(intact);
    cluster.client(intact).await.put("a", "1", None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_hashes_are_compared_and_the_alarm_is_raised_for_the_minority() {
    let arguments = ["--feature-gates=CompactHashCheck=true", "--compact-hash-check-time=500ms"];
    let (mut cluster, victim) = with_a_changed_byte(&arguments).await;
    let others = cluster.others(victim);
    cluster.restart(victim);
    cluster.client(others[0]).await.compact(3, None).await.unwrap();
    assert_eq!(alarmed(&cluster, others[0]).await, [cluster.ids[victim]]);
}

/// This needs no flag: the hash that is stored for a compaction depends on the log alone.
#[tokio::test(flavor = "multi_thread")]
async fn all_members_store_the_same_compaction_hashes() {
    let cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let mut client = cluster.client(leader).await;
    for nth in 0..200 {
        client.put((nth % 7).to_string(), nth.to_string(), None).await.unwrap();
    }
    let mut before = Vec::new();
    for revision in [50, 120, 180] {
        before.push((revision, cluster.hash(leader, revision)));
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
    }
    for server in &cluster.servers {
        server.wait_for_log("\"finished scheduled compaction\",\"compact-revision\":180,");
    }
    for (revision, hash) in before {
        for nth in 0..3 {
            assert_eq!(cluster.hash(nth, revision), hash, "member {nth} at revision {revision}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_without_corruption_raise_no_alarm() {
    let arguments = [
        "--feature-gates=CompactHashCheck=true,InitialCorruptCheck=true",
        "--compact-hash-check-time=100ms",
        "--corrupt-check-time=100ms",
    ];
    let cluster = Cluster::bootstrap(3, &arguments);
    let leader = cluster.leader().await;
    let mut client = cluster.client(leader).await;
    for round in 1..=10 {
        for _ in 0..10 {
            client.put("a", round.to_string(), None).await.unwrap();
        }
        client.compact(round * 10, None).await.unwrap();
        // A member that does several compactions at once has no hash to compare.
        let done = format!("\"finished scheduled compaction\",\"compact-revision\":{},", round * 10);
        for server in &cluster.servers {
            server.wait_for_log(&done);
        }
    }
    cluster.servers[leader].wait_for_log("successfully checked hash on whole cluster");
    cluster.servers[leader].wait_for_log("finished peer corruption check");
    client.put("a", "end", None).await.unwrap();
    cluster.assert_all_equal().await;
    assert!(
        client
            .alarm(etcd_client::AlarmAction::Get, etcd_client::AlarmType::None, None)
            .await
            .unwrap()
            .alarms()
            .is_empty()
    );
}
