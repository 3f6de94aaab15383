//! Data directories of another member, and members that are etcd: refused with a log line on both sides.

use std::{path::Path, process::Command};

use etcd_client::Client;
use metastore::proto::etcdserverpb::{
    MemberAddRequest, MemberRemoveRequest, MemberUpdateRequest, cluster_client::ClusterClient,
};

use super::{
    harness::{Cluster, QUICK},
    network::Proxy,
    support::{Server, free_url, requirements::etcd},
};

const MEMBER_REFUSED: &str = "a process that was to join this cluster failed to start";

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success(), "cannot copy {}", from.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_does_not_start_with_the_data_of_another() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
    let kept = tempfile::tempdir().unwrap();
    cluster.servers[1].stop();
    cluster.servers[2].stop();
    copy(&cluster.servers[2].data_dir(), &kept.path().join("data"));
    cluster.servers[2].wipe();
    copy(&cluster.servers[1].data_dir(), &cluster.servers[2].data_dir());
    cluster.restart(1);

    cluster.servers[2].launch();
    let refusal = format!("is that of member {:x}, but {}", cluster.ids[1], cluster.proxies[2].url());
    cluster.servers[2].wait_for_refusal(&refusal);
    let line = cluster.servers[0].wait_for_log(MEMBER_REFUSED);
    assert!(line.contains("m2: the data in"), "{line}");

    cluster.servers[2].wipe();
    copy(&kept.path().join("data"), &cluster.servers[2].data_dir());
    cluster.restart(2);
    cluster.client(2).await.put("a", "2", None).await.unwrap();
    cluster.assert_all_equal().await;
}

/// The member's data may be from before its peer URL was changed to one that another member had.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_may_move_to_the_url_of_a_removed_member() {
    let mut cluster = Cluster::bootstrap(5, &["--strict-reconfig-check=false"]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    cluster.servers[4].stop();
    let mut client = cluster.servers[0].cluster().await;
    client.member_remove(MemberRemoveRequest { id: cluster.ids[3] }).await.unwrap();
    cluster.servers[3].wait_for_end();
    let url = cluster.proxies[3].url();
    let update = MemberUpdateRequest { id: cluster.ids[4], peer_ur_ls: vec![url.clone()] };
    cluster.servers[0].cluster().await.member_update(update).await.unwrap();

    let mut moved = Server::member("m4", &url, &format!("m4={url}"), QUICK);
    copy(&cluster.servers[4].data_dir(), &moved.data_dir());
    moved.launch();
    cluster.proxies[3].set_target(moved.peer_address());
    moved.await_serving();
    moved.client().await.put("a", "2", None).await.unwrap();
}

/// Two processes with the same data would both vote.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_processes_with_the_same_data_one_is_accepted() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let url = cluster.proxies[2].url();
    let names = (0..3).map(|nth| format!("m{nth}={}", cluster.proxies[nth].url())).collect::<Vec<_>>().join(",");
    let mut twin = Server::member("m2", &url, &names, QUICK);
    cluster.servers[2].stop();
    copy(&cluster.servers[2].data_dir(), &twin.data_dir());
    cluster.restart(2);
    cluster.client(2).await.put("a", "2", None).await.unwrap();

    twin.launch();
    let refusal = format!("another process runs as member {:x}", cluster.ids[2]);
    twin.wait_for_log(&refusal);
    for nth in 0..2 {
        cluster.servers[nth].wait_for_log(&refusal);
    }
    cluster.client(2).await.put("a", "3", None).await.unwrap();
    twin.kill();
    cluster.assert_all_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metastore_does_not_join_a_cluster_of_etcds() {
    let Some(program) = etcd() else { return };
    let cluster = Cluster::prepare(0, &[]);
    let (theirs, ours) = (free_url(), Proxy::start(&cluster.network).url());
    let urls = ["--listen-peer-urls", &theirs, "--initial-advertise-peer-urls", &theirs];
    let names = format!("default={theirs}");
    let etcd = Server::start_program(&program, &[&urls[..], &["--initial-cluster", &names]].concat());
    let refusal = format!("{theirs} is no metastore, but another program, such as etcd");

    // It does not bootstrap a cluster with etcd members either.
    let mut bootstrapping = Server::member("m1", &ours, &format!("{names},m1={ours}"), QUICK);
    bootstrapping.launch();
    bootstrapping.wait_for_refusal(&refusal);

    let request = MemberAddRequest { peer_ur_ls: vec![ours.clone()], is_learner: true };
    ClusterClient::connect(etcd.url()).await.unwrap().member_add(request).await.unwrap();
    let arguments = [QUICK, &["--initial-cluster-state=existing"]].concat();
    let mut joining = Server::member("m1", &ours, &format!("{names},m1={ours}"), &arguments);
    joining.launch();
    joining.wait_for_refusal(&refusal);
    assert!(!joining.data_dir().exists() && !bootstrapping.data_dir().exists(), "no data directory was created");
    Client::connect([etcd.url()], None).await.unwrap().put("a", "1", None).await.expect("the etcd still works");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_cannot_join_a_cluster_of_metastores() {
    let Some(program) = etcd() else { return };
    let cluster = Cluster::bootstrap(1, &[]);
    let (ours, theirs) = (cluster.proxies[0].url(), free_url());
    let request = MemberAddRequest { peer_ur_ls: vec![theirs.clone()], is_learner: true };
    cluster.servers[0].cluster().await.member_add(request).await.unwrap();
    let identity = [
        ("--name", "other"),
        ("--listen-client-urls", "http://127.0.0.1:0"),
        ("--advertise-client-urls", "http://127.0.0.1:0"),
        ("--listen-peer-urls", &theirs),
        ("--initial-advertise-peer-urls", &theirs),
        ("--initial-cluster", &format!("m0={ours},other={theirs}")),
    ];
    let mut etcd = Server::new(&program, &identity, &["--initial-cluster-state=existing"]);
    etcd.launch();
    cluster.servers[0].wait_for_log("rejected a raft connection from an etcd");
    cluster.servers[0].wait_for_log("handshake failed: ");
    cluster.client(0).await.put("a", "1", None).await.unwrap();
}
