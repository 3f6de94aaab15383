//! Members are killed or stopped, and restarted.

use std::time::Duration;

use super::{harness::Cluster, load::Load, support::scaled};

const WRITERS: usize = 16;

fn load(cluster: &Cluster) -> Load {
    Load::start(WRITERS, &cluster.urls)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_leaders_are_killed() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    let load = load(&cluster);
    for round in 0..4 {
        load.progress(300).await;
        load.writes().reset_longest_gap();
        let leader = cluster.leader().await;
        cluster.servers[leader].kill();
        load.progress(300).await;
        println!("round {round}: {:?} without service", load.writes().longest_gap());
        assert!(load.writes().longest_gap() < scaled(Duration::from_secs(10)));
        cluster.restart(leader);
    }
    let writes = load.stop().await;
    println!("{} writes were acknowledged", writes.count());
    cluster.assert_all_equal().await;
    for nth in 0..3 {
        writes.assert_kept(cluster.client(nth).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_transfers_leadership() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    let load = load(&cluster);
    for nth in 0..3 {
        load.progress(200).await;
        let leader = cluster.leader().await;
        cluster.servers[nth].stop();
        if nth == leader {
            cluster.leader_after(leader).await;
        }
        load.progress(200).await;
        cluster.restart(nth);
    }
    let writes = load.stop().await;
    cluster.assert_all_equal().await;
    writes.assert_kept(cluster.client(0).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_written_and_only_serializable_reads_are_answered() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
    cluster.servers[1].kill();
    cluster.servers[2].kill();
    let mut client = cluster.client(0).await;
    let short = Duration::from_secs(2);
    assert!(tokio::time::timeout(short, client.put("a", "2", None)).await.is_err(), "a write needs a quorum");
    assert!(tokio::time::timeout(short, client.get("a", None)).await.is_err(), "a linearizable read needs a quorum");
    let serializable = etcd_client::GetOptions::new().with_serializable();
    let found = client.get("a", Some(serializable)).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), "1");
    cluster.restart(1);
    cluster.leader_among(&[0, 1]).await;
    client.put("a", "3", None).await.unwrap();
    assert_eq!(client.get("a", None).await.unwrap().kvs()[0].value_str().unwrap(), "3");
    cluster.restart(2);
    cluster.assert_all_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_members_tolerate_the_loss_of_two() {
    let mut cluster = Cluster::bootstrap(5, &[]);
    let load = load(&cluster);
    load.progress(200).await;
    let leader = cluster.leader().await;
    let other = cluster.others(leader)[0];
    cluster.servers[leader].kill();
    cluster.servers[other].kill();
    load.progress(300).await;
    cluster.restart(other);
    cluster.restart(leader);
    load.progress(100).await;
    let writes = load.stop().await;
    cluster.assert_all_equal().await;
    for nth in 0..5 {
        writes.assert_kept(cluster.client(nth).await).await;
    }
}
