//! Members are removed from a cluster.

use metastore::proto::etcdserverpb::MemberRemoveRequest;
use tonic::Code;

use super::{
    harness::Cluster,
    support::{assert_refused, time_limit},
};

const NO_RECONFIG_CHECK: &[&str] = &["--strict-reconfig-check=false"];

async fn remove(cluster: &Cluster, via: usize, nth: usize) -> Result<usize, tonic::Status> {
    let request = MemberRemoveRequest { id: cluster.ids[nth] };
    let mut client = cluster.servers[via].cluster().await;
    let removing = tokio::time::timeout(time_limit(), client.member_remove(request));
    let removed = removing.await.expect("the request is answered in time")?.into_inner();
    assert_eq!(removed.header.unwrap().revision, 0);
    Ok(removed.members.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_follower_exits_and_cannot_rejoin() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    let leader = cluster.leader().await;
    let [gone, left] = cluster.others(leader)[..] else { panic!("there are three") };
    assert_eq!(remove(&cluster, leader, gone).await.unwrap(), 2);
    let status = cluster.servers[gone].wait_for_end();
    assert!(status.success(), "it exits without an error: {status}");
    assert_refused(remove(&cluster, leader, gone).await, Code::NotFound, "etcdserver: member not found");
    // With its old data it is refused by all members, and exits again.
    cluster.launch(gone);
    cluster.servers[gone].wait_for_log("permanently removed");
    cluster.servers[gone].wait_for_end();
    cluster.client(left).await.put("a", "1", None).await.unwrap();
    cluster.assert_equal(&[leader, left]).await;
    assert_eq!(remove(&cluster, leader, left).await.unwrap(), 1, "one member is left");
    cluster.client(leader).await.put("a", "2", None).await.unwrap();
    let last = remove(&cluster, leader, leader).await;
    assert_refused(last, Code::Unknown, "etcdserver: re-configuration failed due to not enough started members");
    cluster.client(leader).await.put("a", "3", None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_leader_exits_and_the_others_continue() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    let leader = cluster.leader().await;
    assert_eq!(remove(&cluster, leader, leader).await.unwrap(), 2);
    let status = cluster.servers[leader].wait_for_end();
    assert!(status.success(), "it exits without an error: {status}");
    let others = cluster.others(leader);
    cluster.leader_among(&others).await;
    cluster.client(others[0]).await.put("a", "1", None).await.unwrap();
    cluster.assert_equal(&others).await;
    let listed: Vec<u64> = cluster.members(others[1]).await.iter().map(|member| member.id).collect();
    assert!(listed.len() == 2 && !listed.contains(&cluster.ids[leader]));
}

/// FAULT-39.
#[tokio::test(flavor = "multi_thread")]
async fn a_surviving_member_is_restarted_with_force_new_cluster() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    let survivor = cluster.leader().await;
    let others = cluster.others(survivor);
    for nth in 0..20 {
        cluster.client(survivor).await.put("a", nth.to_string(), None).await.unwrap();
    }
    for &other in &others {
        cluster.servers[other].kill();
    }
    cluster.servers[survivor].kill();
    cluster.servers[survivor].set_arguments(&["--force-new-cluster"]);
    cluster.restart(survivor);
    let members = cluster.members(survivor).await;
    assert_eq!(members.len(), 1);
    assert_eq!(
        (members[0].id, members[0].peer_ur_ls.clone()),
        (cluster.ids[survivor], vec![cluster.proxies[survivor].url()])
    );
    let status = cluster.status(survivor).await.unwrap();
    assert_eq!(status.header.as_ref().unwrap().revision, 21, "it has all of its data");
    cluster.client(survivor).await.put("a", "alone", None).await.unwrap();
    // The flag is needed once, but may be kept.
    cluster.servers[survivor].kill();
    cluster.restart(survivor);
    let found = cluster.client(survivor).await.get("a", None).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), "alone");
    // The others were removed, and are refused when they are restarted.
    cluster.launch(others[0]);
    cluster.servers[others[0]].wait_for_log("permanently removed");
    cluster.servers[others[0]].wait_for_end();
    // Members can be added again.
    let added = cluster.add_member(survivor, false).await.unwrap();
    cluster.restart(added);
    cluster.assert_equal(&[survivor, added]).await;
}
