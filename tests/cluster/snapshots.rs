//! Members that are too far behind to catch up from the log, and get a snapshot.

use etcd_client::Client;

use super::{
    harness::Cluster,
    load::Load,
    support::{eventually_async, time_limit},
};

/// The log is kept so short that a member that was down needs a snapshot.
pub const SHORT_LOG: &[&str] = &["--snapshot-count", "100", "--snapshot-catchup-entries", "10"];

/// Writes keys until a member that gets none of them needs a snapshot from the leader; returns their number.
pub async fn leave_behind(cluster: &Cluster, leader: usize, client: &mut Client, prefix: &str) -> usize {
    let before = f64::from(u32::try_from(cluster.status(leader).await.unwrap().raft_applied_index).unwrap());
    let mut written = 0;
    eventually_async("the log is truncated", time_limit(), async || {
        for _ in 0..100 {
            client.put(format!("{prefix}{written:05}"), "", None).await.unwrap();
            written += 1;
        }
        cluster.servers[leader].http("GET", "/metrics").metric("metastore_log_first_index") > before + 1.0
    })
    .await;
    written
}

/// Wherever in an install it is killed, it starts again with the old or the new state, and catches up.
/// FAULT-4 and FAULT-12.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_killed_at_any_step_of_an_install_recovers() {
    let mut cluster = Cluster::bootstrap(3, SHORT_LOG);
    let leader = cluster.leader().await;
    let lagging = cluster.others(leader)[0];
    let mut client = cluster.client(leader).await;
    for line in
        ["receiving a snapshot", "received and saved a snapshot", "installing a snapshot", "installed a snapshot"]
    {
        cluster.servers[lagging].kill();
        leave_behind(&cluster, leader, &mut client, line).await;
        cluster.launch(lagging);
        cluster.servers[lagging].wait_for_log(line);
    }
    cluster.servers[lagging].kill();
    cluster.restart(lagging);
    cluster.assert_all_equal().await;
}

/// FAULT-13.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_far_behind_gets_snapshots_while_others_write() {
    let mut cluster = Cluster::bootstrap(3, SHORT_LOG);
    let leader = cluster.leader().await;
    let lagging = cluster.others(leader)[0];
    let load = Load::start(16, &cluster.urls);
    for round in 1..=2 {
        cluster.servers[lagging].kill();
        let before = f64::from(u32::try_from(cluster.status(leader).await.unwrap().raft_applied_index).unwrap());
        load.progress(1000).await;
        // The log is truncated after the database is flushed, which is done after a number of entries.
        eventually_async("the log is truncated", time_limit(), async || {
            cluster.servers[leader].http("GET", "/metrics").metric("metastore_log_first_index") > before + 1.0
        })
        .await;
        cluster.restart(lagging);
        cluster.servers[lagging].wait_for_log("installed a snapshot");
        println!("round {round}: a snapshot was installed");
        load.progress(200).await;
    }
    let writes = load.stop().await;
    cluster.assert_all_equal().await;
    writes.assert_kept(cluster.client(lagging).await).await;
    let databases = std::fs::read_dir(cluster.servers[lagging].data_dir().join("member")).unwrap();
    let databases = databases.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("db"));
    assert_eq!(databases.count(), 1, "replaced databases are removed");
    // The installed snapshot survives a restart.
    cluster.servers[lagging].kill();
    cluster.restart(lagging);
    cluster.assert_all_equal().await;
}
