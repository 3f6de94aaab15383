//! Members that are so far behind that the log no longer helps them.

use std::time::Duration;

use super::{harness::Cluster, load::Load};

/// So little is kept in the log that a member which was away needs a snapshot.
const FORGETFUL: &[&str] = &["--snapshot-count", "100", "--snapshot-catchup-entries", "10"];

async fn wait_for(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = std::time::Instant::now() + super::harness::PATIENCE;
    while !is_so().await {
        assert!(std::time::Instant::now() < deadline, "{what} took too long");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
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
