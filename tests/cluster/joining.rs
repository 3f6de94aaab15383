//! Who may join, who may not, and who must not found a cluster again.

use std::time::Instant;

use metastore::{node::identity::MemberId, proto::etcdserverpb::MemberRemoveRequest};

use tonic::Code;

use super::{
    harness::{Cluster, PATIENCE, QUICK},
    proxy::Proxy,
    support::Server,
};

const LOOSE: &[&str] = &["--strict-reconfig-check=false"];

fn joiner(name: &str, url: &str, initial_cluster: &str) -> Server {
    Server::member(name, url, initial_cluster, &[QUICK, &["--initial-cluster-state=existing"]].concat())
}

/// What a learner that serves holds for the key `a`.
async fn learned(cluster: &Cluster, nth: usize) -> String {
    let serializable = etcd_client::GetOptions::new().with_serializable();
    let found = cluster.client(nth).await.get("a", Some(serializable)).await.unwrap();
    found.kvs()[0].value_str().unwrap().to_owned()
}

/// Removes a member, with patience: on a busy machine the new leader may be lost at once, and what it was asked for with it.
async fn remove(cluster: &Cluster, via: usize, nth: usize) {
    let mut client = cluster.servers[via].cluster().await;
    let request = MemberRemoveRequest { id: cluster.ids[nth] };
    let deadline = Instant::now() + PATIENCE;
    while let Err(status) = client.member_remove(request).await {
        assert!(Instant::now() < deadline, "{status}");
        match status.code() {
            Code::NotFound => return, // It had been agreed to after all.
            code => assert_eq!(code, Code::Unavailable, "{status}"),
        }
    }
}

fn assert_refused(mut server: Server, reason: &str) {
    server.launch();
    server.wait_for_refusal(reason);
    assert!(!server.data_dir().exists(), "nothing was touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_not_added_or_knows_others_cannot_join() {
    let mut cluster = Cluster::found(1, LOOSE);
    let (proxy, stranger) = (Proxy::start(&cluster.network), Proxy::start(&cluster.network));
    let (known, url) = (format!("m0={}", cluster.proxies[0].url()), proxy.url());
    // Not added yet: the others count one less.
    assert_refused(joiner("new", &url, &format!("{known},new={url}")), "member count is unequal");
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let added = cluster.admit(0, true).await.unwrap();
    // Added under another address than it says.
    let elsewhere = format!("{known},new={}", stranger.url());
    assert_refused(joiner("new", &stranger.url(), &elsewhere), "PeerURLs: no match found for existing member");
    // A list that is out of date.
    let stale = format!("{known},new={},gone=http://127.0.0.1:1", cluster.proxies[added].url());
    assert_refused(joiner("new", &cluster.proxies[added].url(), &stale), "member count is unequal");
    // Nobody there.
    let nobody = format!("gone=http://127.0.0.1:1,new={url}");
    assert_refused(joiner("new", &url, &nobody), "could not retrieve cluster information from the given URLs");
    // Not in its own list.
    assert_refused(joiner("new", &url, &known), "couldn't find local name");
    assert_eq!(cluster.members(0).await.len(), 2, "the cluster has not noticed");
    cluster.restart(added);
    assert_eq!(learned(&cluster, added).await, "1");
    cluster.assert_all_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_founder_that_lost_its_data_comes_back_as_somebody_else() {
    let mut cluster = Cluster::found(3, LOOSE);
    cluster.client(0).await.put("kept", "1", None).await.unwrap();
    cluster.servers[2].kill();
    cluster.servers[2].wipe();
    cluster.servers[2].launch();
    let own = MemberId::new(cluster.ids[2]).unwrap();
    let refusal = format!("member {own} has already been bootstrapped");
    cluster.servers[2].wait_for_refusal(&refusal);
    cluster.servers[0].wait_for_log(&format!("m2: {refusal}"));
    assert!(!cluster.servers[2].data_dir().exists());
    cluster.leader_among(&[0, 1]).await;
    remove(&cluster, 0, 2).await;
    let replaced = cluster.admit(0, false).await.unwrap();
    cluster.restart(replaced);
    let found = cluster.client(replaced).await.get("kept", None).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), "1");
    cluster.assert_equal(&[0, 1, replaced]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_that_dies_before_it_was_told_anything_goes_on_joining() {
    let mut cluster = Cluster::found(3, LOOSE);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let added = cluster.admit(0, true).await.unwrap();
    // Nothing of raft's reaches it, so it knows only whom it was introduced to.
    cluster.isolate(added);
    cluster.launch(added);
    cluster.servers[added].wait_for_log("first start of this member");
    cluster.servers[added].wait_for_log("serving peer traffic");
    cluster.servers[added].kill();
    cluster.network.heal();
    cluster.restart(added);
    assert_eq!(learned(&cluster, added).await, "1");
    cluster.assert_all_equal().await;
}

/// It would vote twice in one term.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_data_does_not_join_as_itself() {
    let mut cluster = Cluster::found(3, LOOSE);
    cluster.client(0).await.put("kept", "1", None).await.unwrap();
    cluster.servers[2].kill();
    cluster.servers[2].wipe();
    cluster.servers[2].set_arguments(&[QUICK, &["--initial-cluster-state=existing"]].concat());
    cluster.servers[2].launch();
    let refusal = format!("member {:x} has already been bootstrapped", cluster.ids[2]);
    cluster.servers[2].wait_for_refusal(&refusal);
    cluster.servers[0].wait_for_log(&refusal);
    assert!(!cluster.servers[2].data_dir().exists(), "nothing was touched");
    cluster.leader_among(&[0, 1]).await;
    assert_eq!(cluster.members(0).await.len(), 3, "the cluster has not noticed");
    remove(&cluster, 0, 2).await;
    let replaced = cluster.admit(0, false).await.unwrap();
    cluster.restart(replaced);
    cluster.assert_equal(&[0, 1, replaced]).await;
}
