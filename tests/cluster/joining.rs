//! Members that join a cluster, and members whose attempt to join or to bootstrap again is refused.

use metastore::{node::identity::MemberId, proto::etcdserverpb::MemberRemoveRequest};

use tonic::Code;

use super::{
    harness::{Cluster, QUICK},
    network::Proxy,
    support::{Server, eventually_async, time_limit},
};

const NO_RECONFIG_CHECK: &[&str] = &["--strict-reconfig-check=false"];

fn joiner(name: &str, url: &str, initial_cluster: &str) -> Server {
    Server::member(name, url, initial_cluster, &[QUICK, &["--initial-cluster-state=existing"]].concat())
}

/// The value of the key `a` on a running learner.
async fn learned(cluster: &Cluster, nth: usize) -> String {
    let serializable = etcd_client::GetOptions::new().with_serializable();
    let found = cluster.client(nth).await.get("a", Some(serializable)).await.unwrap();
    found.kvs()[0].value_str().unwrap().to_owned()
}

/// Removes a member, with retries: on a busy machine the new leader may lose leadership at once, and the request with it.
async fn remove(cluster: &Cluster, via: usize, nth: usize) {
    let mut client = cluster.servers[via].cluster().await;
    let request = MemberRemoveRequest { id: cluster.ids[nth] };
    eventually_async("the member is removed", time_limit(), async || match client.member_remove(request).await {
        Ok(_) => Ok(()),
        Err(status) if status.code() == Code::NotFound => Ok(()), // An earlier attempt was committed after all.
        Err(status) => {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            Err(status)
        }
    })
    .await;
}

fn assert_refused(mut server: Server, reason: &str) {
    server.launch();
    server.wait_for_refusal(reason);
    assert!(!server.data_dir().exists(), "no data directory was created");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_cannot_join_unless_it_was_added_and_its_initial_cluster_matches() {
    let mut cluster = Cluster::bootstrap(1, NO_RECONFIG_CHECK);
    let (proxy, other) = (Proxy::start(&cluster.network), Proxy::start(&cluster.network));
    let (known, url) = (format!("m0={}", cluster.proxies[0].url()), proxy.url());
    // It was not added yet, so the cluster has one member less.
    assert_refused(joiner("new", &url, &format!("{known},new={url}")), "member count is unequal");
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let added = cluster.add_member(0, true).await.unwrap();
    // It was added with another peer URL than its own.
    let elsewhere = format!("{known},new={}", other.url());
    assert_refused(joiner("new", &other.url(), &elsewhere), "PeerURLs: no match found for existing member");
    // Its initial cluster is out of date.
    let stale = format!("{known},new={},gone=http://127.0.0.1:1", cluster.proxies[added].url());
    assert_refused(joiner("new", &cluster.proxies[added].url(), &stale), "member count is unequal");
    // No member of its initial cluster answers.
    let unreachable = format!("gone=http://127.0.0.1:1,new={url}");
    assert_refused(joiner("new", &url, &unreachable), "could not retrieve cluster information from the given URLs");
    // Its initial cluster does not contain itself.
    assert_refused(joiner("new", &url, &known), "couldn't find local name");
    assert_eq!(cluster.members(0).await.len(), 2, "the member list has not changed");
    cluster.restart(added);
    assert_eq!(learned(&cluster, added).await, "1");
    cluster.assert_all_equal().await;
}

/// FAULT-16.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_data_cannot_bootstrap_again_and_joins_as_a_new_one() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
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
    let replaced = cluster.add_member(0, false).await.unwrap();
    cluster.restart(replaced);
    let found = cluster.client(replaced).await.get("kept", None).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), "1");
    cluster.assert_equal(&[0, 1, replaced]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joining_member_that_is_killed_before_it_hears_from_the_cluster_continues_to_join() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    let added = cluster.add_member(0, true).await.unwrap();
    // No raft messages reach it, so it knows only its initial cluster.
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

/// FAULT-16: it could vote twice in one term.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_data_cannot_join_with_its_old_id() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    cluster.client(0).await.put("kept", "1", None).await.unwrap();
    cluster.servers[2].kill();
    cluster.servers[2].wipe();
    cluster.servers[2].set_arguments(&[QUICK, &["--initial-cluster-state=existing"]].concat());
    cluster.servers[2].launch();
    let refusal = format!("member {:x} has already been bootstrapped", cluster.ids[2]);
    cluster.servers[2].wait_for_refusal(&refusal);
    cluster.servers[0].wait_for_log(&refusal);
    assert!(!cluster.servers[2].data_dir().exists(), "no data directory was created");
    cluster.leader_among(&[0, 1]).await;
    assert_eq!(cluster.members(0).await.len(), 3, "the member list has not changed");
    remove(&cluster, 0, 2).await;
    let replaced = cluster.add_member(0, false).await.unwrap();
    cluster.restart(replaced);
    cluster.assert_equal(&[0, 1, replaced]).await;
}
