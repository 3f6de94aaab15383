//! Members that are so far behind that the log no longer helps them.

use std::time::Duration;

use etcd_client::Client;

use super::{harness::Cluster, load::Load};

/// So little is kept in the log that a member which was away needs a snapshot.
pub const FORGETFUL: &[&str] = &["--snapshot-count", "100", "--snapshot-catchup-entries", "10"];

async fn wait_for(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = std::time::Instant::now() + super::harness::PATIENCE;
    while !is_so().await {
        assert!(std::time::Instant::now() < deadline, "{what} took too long");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes until a member that has nothing newer than now needs a snapshot of the leader; returns how many keys.
pub async fn leave_behind(cluster: &Cluster, leader: usize, client: &mut Client, prefix: &str) -> usize {
    let before = f64::from(u32::try_from(cluster.status(leader).await.unwrap().raft_applied_index).unwrap());
    let mut written = 0;
    wait_for("cutting the log", async || {
        for _ in 0..100 {
            client.put(format!("{prefix}{written:05}"), "", None).await.unwrap();
            written += 1;
        }
        cluster.servers[leader].http("GET", "/metrics").number("metastore_log_first_index") > before + 1.0
    })
    .await;
    written
}

/// Wherever in an install it dies, it starts again with the old state or with the new one, and gets what it lacks.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_dies_at_any_step_of_an_install_comes_back() {
    let mut cluster = Cluster::found(3, FORGETFUL);
    let leader = cluster.leader().await;
    let laggard = cluster.others(leader)[0];
    let mut client = cluster.client(leader).await;
    for line in
        ["receiving a snapshot", "received and saved a snapshot", "installing a snapshot", "installed a snapshot"]
    {
        cluster.servers[laggard].kill();
        leave_behind(&cluster, leader, &mut client, line).await;
        cluster.launch(laggard);
        cluster.servers[laggard].wait_for_log(line);
    }
    cluster.servers[laggard].kill();
    cluster.restart(laggard);
    cluster.assert_all_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_far_behind_gets_snapshots_while_others_write() {
    let mut cluster = Cluster::found(3, FORGETFUL);
    let leader = cluster.leader().await;
    let laggard = cluster.others(leader)[0];
    let load = Load::start(16, &cluster.urls);
    for round in 1..=2 {
        cluster.servers[laggard].kill();
        let before = f64::from(u32::try_from(cluster.status(leader).await.unwrap().raft_applied_index).unwrap());
        load.progress(1000).await;
        // The log is cut behind a flush, and the database is flushed after so many entries.
        wait_for("cutting the log", async || {
            cluster.servers[leader].http("GET", "/metrics").number("metastore_log_first_index") > before + 1.0
        })
        .await;
        cluster.restart(laggard);
        cluster.servers[laggard].wait_for_log("installed a snapshot");
        println!("round {round}: a snapshot was installed");
        load.progress(200).await;
    }
    let book = load.stop().await;
    cluster.assert_all_equal().await;
    book.assert_kept(cluster.client(laggard).await).await;
    let databases = std::fs::read_dir(cluster.servers[laggard].data_dir().join("member")).unwrap();
    let databases = databases.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("db"));
    assert_eq!(databases.count(), 1, "replaced databases are removed");
    // What was installed survives the next start.
    cluster.servers[laggard].kill();
    cluster.restart(laggard);
    cluster.assert_all_equal().await;
}
