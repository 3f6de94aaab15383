//! The metrics about other members.

use super::{
    harness::Cluster,
    snapshots::{SHORT_LOG, leave_behind},
    support::{Server, eventually, time_limit},
};

/// The value of a series, if there is one.
fn value(server: &Server, series: &str) -> Option<f64> {
    let page = server.http("GET", "/metrics").body;
    page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn members_measure_the_round_trips_to_each_other() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    for nth in 0..3 {
        let (server, local) = (&cluster.servers[nth], cluster.ids[nth]);
        for other in cluster.others(nth).into_iter().map(|other| cluster.ids[other]) {
            let name = "etcd_network_peer_round_trip_time_seconds";
            let (count, sum) = (format!("{name}_count{{To=\"{other:x}\"}}"), format!("{name}_sum{{To=\"{other:x}\"}}"));
            // After the second request.
            let observed = eventually("a round trip is observed", time_limit(), || value(server, &count));
            let seconds = value(server, &sum).unwrap();
            assert!(
                observed >= 1.0 && seconds > 0.0 && seconds < 4.0 * observed,
                "{observed} times, {seconds} seconds"
            );
            let known = format!("etcd_network_known_peers{{Local=\"{local:x}\",Remote=\"{other:x}\"}}");
            assert_eq!(value(server, &known), Some(1.0));
        }
        let itself = format!("etcd_network_known_peers{{Local=\"{local:x}\",Remote=\"{local:x}\"}}");
        assert_eq!(value(server, &itself), Some(1.0), "as in etcd");
    }
    // A member that is removed is no longer known.
    let leader = cluster.leader().await;
    let gone = cluster.others(leader)[0];
    let mut client = cluster.client(leader).await;
    cluster.servers[gone].kill();
    client.member_remove(cluster.ids[gone]).await.unwrap();
    let known =
        format!("etcd_network_known_peers{{Local=\"{:x}\",Remote=\"{:x}\"}}", cluster.ids[leader], cluster.ids[gone]);
    eventually("it is forgotten", time_limit(), || value(&cluster.servers[leader], &known).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_of_snapshots_are_measured_on_both_sides() {
    let mut cluster = Cluster::bootstrap(3, SHORT_LOG);
    let leader = cluster.leader().await;
    let lagging = cluster.others(leader)[0];
    let mut client = cluster.client(leader).await;
    cluster.servers[lagging].kill();
    leave_behind(&cluster, leader, &mut client, "a").await;
    cluster.restart(lagging);
    cluster.servers[lagging].wait_for_log("installed a snapshot");
    let (sender, receiver) = (&cluster.servers[leader], &cluster.servers[lagging]);
    let (to, from) =
        (format!("{{To=\"{:x}\"}}", cluster.ids[lagging]), format!("{{From=\"{:x}\"}}", cluster.ids[leader]));
    for (server, series) in [
        (sender, format!("etcd_network_snapshot_send_success{to}")),
        (sender, format!("etcd_network_snapshot_send_total_duration_seconds_count{to}")),
        (sender, "etcd_disk_backend_snapshot_duration_seconds_count".to_owned()),
        (receiver, format!("etcd_network_snapshot_receive_success{from}")),
        (receiver, format!("etcd_network_snapshot_receive_total_duration_seconds_count{from}")),
        (receiver, "etcd_snap_db_save_total_duration_seconds_count".to_owned()),
        (receiver, "etcd_snap_db_fsync_duration_seconds_count".to_owned()),
    ] {
        eventually("it is counted", time_limit(), || value(server, &series).filter(|count| *count >= 1.0));
    }
    let sending = format!("etcd_network_snapshot_send_inflights_total{to}");
    eventually("nothing is in flight", time_limit(), || value(sender, &sending) == Some(0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_no_leader_confirms_is_counted_and_logged() {
    let cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let reader = cluster.others(leader)[0];
    let mut client = cluster.client(reader).await;
    client.get("a", None).await.unwrap();
    cluster.isolate(reader);
    client.get("a", None).await.unwrap_err();
    let server = &cluster.servers[reader];
    let counted = || {
        let of = |name| value(server, name).unwrap_or_default();
        of("etcd_server_slow_read_indexes_total") + of("etcd_server_read_indexes_failed_total") >= 1.0
    };
    eventually("it is counted", time_limit(), counted);
}
