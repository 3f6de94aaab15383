//! Directories that are another member's, and members that are another program: refused with a line on both sides.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use etcd_client::Client;
use metastore::proto::etcdserverpb::{
    MemberAddRequest, MemberRemoveRequest, MemberUpdateRequest, cluster_client::ClusterClient,
};

use super::{
    harness::{Cluster, QUICK},
    process::{self, free_port},
    proxy::Proxy,
    support::{Running, Server, skip},
};

const NOT_HERE: &str = "somebody who would be a member of this cluster does not start";

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success(), "{} is not copied", from.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_does_not_start_with_anothers_data() {
    let mut cluster = Cluster::found(3, &[]);
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
    let whose = format!("is that of member {:x}, but {}", cluster.ids[1], cluster.proxies[2].url());
    cluster.servers[2].wait_for_refusal(&whose);
    let told = cluster.servers[0].wait_for_log(NOT_HERE);
    assert!(told.contains("m2: the data in"), "{told}");

    cluster.servers[2].wipe();
    copy(&kept.path().join("data"), &cluster.servers[2].data_dir());
    cluster.restart(2);
    cluster.client(2).await.put("a", "2", None).await.unwrap();
    cluster.assert_all_equal().await;
}

/// Its own data may be from before it was told to move to where another member has been.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_may_move_to_where_another_has_been() {
    let mut cluster = Cluster::found(5, &["--strict-reconfig-check=false"]);
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
    cluster.proxies[3].lead_to(moved.peer_address());
    moved.await_serving();
    moved.client().await.put("a", "2", None).await.unwrap();
}

/// Two processes with the same data would both vote.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_processes_with_the_same_data_one_is_heard() {
    let mut cluster = Cluster::found(3, &[]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let url = cluster.proxies[2].url();
    let names = (0..3).map(|nth| format!("m{nth}={}", cluster.proxies[nth].url())).collect::<Vec<_>>().join(",");
    let mut twin = Server::member("m2", &url, &names, QUICK);
    cluster.servers[2].stop();
    copy(&cluster.servers[2].data_dir(), &twin.data_dir());
    cluster.restart(2);
    cluster.client(2).await.put("a", "2", None).await.unwrap();

    twin.launch();
    let refusal = format!("another process speaks for member {:x} already", cluster.ids[2]);
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
    let Some(program) = process::etcd() else { return skip("there is no etcd 3.7") };
    let cluster = Cluster::prepare(0, &[]);
    let (theirs, ours) = (format!("http://127.0.0.1:{}", free_port()), Proxy::start(&cluster.network).url());
    let place = ["--listen-peer-urls", &theirs, "--initial-advertise-peer-urls", &theirs];
    let names = format!("default={theirs}");
    let etcd = process::Server::start(&program, &[&place[..], &["--initial-cluster", &names]].concat());
    let refusal = format!("{theirs} is no metastore, but another program, such as etcd");

    // Nor does it found one with them.
    let mut founder = Server::member("m1", &ours, &format!("{names},m1={ours}"), QUICK);
    founder.launch();
    founder.wait_for_refusal(&refusal);

    let request = MemberAddRequest { peer_ur_ls: vec![ours.clone()], is_learner: true };
    ClusterClient::connect(etcd.url()).await.unwrap().member_add(request).await.unwrap();
    let arguments = [QUICK, &["--initial-cluster-state=existing"]].concat();
    let mut joiner = Server::member("m1", &ours, &format!("{names},m1={ours}"), &arguments);
    joiner.launch();
    joiner.wait_for_refusal(&refusal);
    assert!(!joiner.data_dir().exists() && !founder.data_dir().exists(), "nothing was touched");
    Client::connect([etcd.url()], None).await.unwrap().put("a", "1", None).await.expect("the etcd is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_is_told_that_it_cannot_be_a_member() {
    let Some(program) = process::etcd() else { return skip("there is no etcd 3.7") };
    let cluster = Cluster::found(1, &[]);
    let (ours, theirs) = (cluster.proxies[0].url(), format!("http://127.0.0.1:{}", free_port()));
    let request = MemberAddRequest { peer_ur_ls: vec![theirs.clone()], is_learner: true };
    cluster.servers[0].cluster().await.member_add(request).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let child = Command::new(program)
        .args(["--name", "stranger", "--initial-cluster-state", "existing"])
        .arg("--data-dir")
        .arg(directory.path().join("data"))
        .args(["--listen-client-urls", "http://127.0.0.1:0", "--advertise-client-urls", "http://127.0.0.1:0"])
        .args(["--listen-peer-urls", &theirs, "--initial-advertise-peer-urls", &theirs])
        .args(["--initial-cluster", &format!("m0={ours},stranger={theirs}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _etcd = Running(child); // Dropped before the directory that it writes to.
    cluster.servers[0].wait_for_log("an etcd would talk to this member");
    cluster.servers[0].wait_for_log("no welcome: it ");
    cluster.client(0).await.put("a", "1", None).await.unwrap();
}
