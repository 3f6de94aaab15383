//! Network partitions, in both directions and in one.

use std::time::Duration;

use etcd_client::GetOptions;

use super::{harness::Cluster, load::Load};

/// FAULT-21.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_quorum_acknowledges_nothing_and_follows_after_the_partition_heals() {
    let cluster = Cluster::bootstrap(3, &[]);
    let old = cluster.leader().await;
    let mut inside = cluster.client(old).await;
    inside.put("a", "before", None).await.unwrap();
    cluster.assert_all_equal().await;
    cluster.isolate(old);
    let new = cluster.leader_after(old).await;
    let mut outside = cluster.client(new).await;
    outside.put("a", "after", None).await.unwrap();
    let limit = Duration::from_secs(2);
    assert!(!matches!(tokio::time::timeout(limit, inside.put("a", "lost", None)).await, Ok(Ok(_))));
    assert!(
        !matches!(tokio::time::timeout(limit, inside.get("a", None)).await, Ok(Ok(_))),
        "it cannot confirm its leadership"
    );
    let stale = inside.get("a", Some(GetOptions::new().with_serializable())).await.unwrap();
    assert_eq!(stale.kvs()[0].value_str().unwrap(), "before");
    cluster.network.heal();
    assert_eq!(cluster.leader().await, new, "a member that reconnects does not cause an election");
    // A write that was not acknowledged may still be applied, in log order.
    outside.put("a", "healed", None).await.unwrap();
    cluster.assert_all_equal().await;
    assert_eq!(inside.get("a", None).await.unwrap().kvs()[0].value_str().unwrap(), "healed");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_way_partitions_interrupt_service_no_longer_than_an_election() {
    let cluster = Cluster::bootstrap(3, &[]);
    let load = Load::start(8, &cluster.urls);
    load.progress(100).await;
    for _round in 0..2 {
        let leader = cluster.leader().await;
        let others = cluster.others(leader);
        // The leader can send but not receive: check-quorum makes it step down.
        for other in others {
            cluster.network.cut(cluster.ids[other], cluster.ids[leader]);
        }
        load.progress(200).await;
        cluster.network.heal();
        cluster.leader().await;
        load.progress(100).await;
        // The leader can receive but not send.
        let leader = cluster.leader().await;
        let others = cluster.others(leader);
        for other in others {
            cluster.network.cut(cluster.ids[leader], cluster.ids[other]);
        }
        load.progress(200).await;
        cluster.network.heal();
        cluster.leader().await;
        load.progress(100).await;
    }
    let writes = load.stop().await;
    cluster.assert_all_equal().await;
    for nth in 0..3 {
        writes.assert_kept(cluster.client(nth).await).await;
    }
}
