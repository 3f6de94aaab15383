//! Watches on followers, during changes of leader and snapshot installs.

use etcd_client::{Client, WatchOptions, WatchStream};

use super::{
    harness::Cluster,
    snapshots::{SHORT_LOG, leave_behind},
    support::time_limit,
};

async fn watch(client: &mut Client) -> WatchStream {
    client.watch("w/", Some(WatchOptions::new().with_prefix())).await.unwrap()
}

/// Asserts that the next `count` events arrive once and in order.
async fn assert_seen(stream: &mut WatchStream, count: usize, last_revision: &mut i64) {
    let mut seen = 0;
    while seen < count {
        let message =
            tokio::time::timeout(time_limit(), stream.message()).await.expect("events come").unwrap().unwrap();
        assert!(!message.canceled(), "{message:?}");
        for event in message.events() {
            let revision = event.kv().unwrap().mod_revision();
            assert!(revision > *last_revision, "{revision} came after {last_revision}");
            *last_revision = revision;
            seen += 1;
        }
    }
    assert_eq!(seen, count);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_on_a_follower_survives_the_loss_of_the_leader() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let mut client = cluster.client(cluster.others(leader)[0]).await;
    let (mut stream, mut last) = (watch(&mut client).await, 0);
    for nth in 0..50 {
        client.put(format!("w/{nth}"), "", None).await.unwrap();
    }
    cluster.servers[leader].kill();
    cluster.leader_after(leader).await;
    for nth in 0..50 {
        client.put(format!("w/{nth}"), "", None).await.unwrap();
    }
    assert_seen(&mut stream, 100, &mut last).await;
    cluster.restart(leader);
    client.put("w/last", "", None).await.unwrap();
    assert_seen(&mut stream, 1, &mut last).await;
    cluster.assert_all_equal().await;
}

/// The events of the meantime are read from the snapshot.
/// FAULT-26.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_on_a_follower_survives_the_install_of_a_snapshot() {
    let cluster = Cluster::bootstrap(3, SHORT_LOG);
    let leader = cluster.leader().await;
    let lagging = cluster.others(leader)[0];
    let (mut client, mut behind) = (cluster.client(leader).await, cluster.client(lagging).await);
    let (mut stream, mut last) = (watch(&mut behind).await, 0);
    client.put("w/first", "", None).await.unwrap();
    assert_seen(&mut stream, 1, &mut last).await;
    cluster.isolate(lagging);
    let written = leave_behind(&cluster, leader, &mut client, "w/").await;
    cluster.network.heal();
    cluster.servers[lagging].wait_for_log("installed a snapshot");
    assert_seen(&mut stream, written, &mut last).await;
    client.put("w/last", "", None).await.unwrap();
    assert_seen(&mut stream, 1, &mut last).await;
    cluster.assert_all_equal().await;
}
