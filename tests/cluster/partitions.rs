//! Links that are cut, both ways and one way, and heal.

use std::time::Duration;

use etcd_client::GetOptions;

use super::{harness::Cluster, load::Load};

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_its_quorum_acknowledges_nothing_and_comes_back() {
    let cluster = Cluster::found(3, &[]);
    let old = cluster.leader().await;
    let mut inside = cluster.client(old).await;
    inside.put("a", "before", None).await.unwrap();
    cluster.assert_all_equal().await;
    cluster.isolate(old);
    let new = cluster.leader_after(old).await;
    let mut outside = cluster.client(new).await;
    outside.put("a", "after", None).await.unwrap();
    let patience = Duration::from_secs(2);
    assert!(!matches!(tokio::time::timeout(patience, inside.put("a", "lost", None)).await, Ok(Ok(_))));
    assert!(!matches!(tokio::time::timeout(patience, inside.get("a", None)).await, Ok(Ok(_))), "it cannot know");
    let stale = inside.get("a", Some(GetOptions::new().with_serializable())).await.unwrap();
    assert_eq!(stale.kvs()[0].value_str().unwrap(), "before");
    cluster.network.heal();
    assert_eq!(cluster.leader().await, new, "who comes back disturbs nobody");
    // Writes that were never acknowledged may still come: in their turn.
    outside.put("a", "healed", None).await.unwrap();
    cluster.assert_all_equal().await;
    assert_eq!(inside.get("a", None).await.unwrap().kvs()[0].value_str().unwrap(), "healed");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_way_cuts_stop_the_cluster_no_longer_than_an_election() {
    let cluster = Cluster::found(3, &[]);
    let load = Load::start(8, &cluster.urls);
    load.progress(100).await;
    for _round in 0..2 {
        let leader = cluster.leader().await;
        let others = cluster.others(leader);
        // It is heard, but hears nobody: check-quorum makes it step down.
        for other in others {
            cluster.network.cut(cluster.ids[other], cluster.ids[leader]);
        }
        load.progress(200).await;
        cluster.network.heal();
        cluster.leader().await;
        load.progress(100).await;
        // It hears, but nobody hears it.
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
    let book = load.stop().await;
    cluster.assert_all_equal().await;
    for nth in 0..3 {
        book.assert_kept(cluster.client(nth).await).await;
    }
}
