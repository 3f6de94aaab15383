//! Members are removed, for good.

use metastore::proto::etcdserverpb::MemberRemoveRequest;
use tonic::Code;

use super::{
    harness::{Cluster, PATIENCE},
    support::assert_refused,
};

const LOOSE: &[&str] = &["--strict-reconfig-check=false"];

async fn remove(cluster: &Cluster, via: usize, nth: usize) -> Result<usize, tonic::Status> {
    let request = MemberRemoveRequest { id: cluster.ids[nth] };
    let mut client = cluster.servers[via].cluster().await;
    let removing = tokio::time::timeout(PATIENCE, client.member_remove(request));
    let removed = removing.await.expect("a change is answered")?.into_inner();
    assert_eq!(removed.header.unwrap().revision, 0);
    Ok(removed.members.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_follower_ends_and_never_comes_back() {
    let mut cluster = Cluster::found(3, LOOSE);
    let leader = cluster.leader().await;
    let [gone, left] = cluster.others(leader)[..] else { panic!("there are three") };
    assert_eq!(remove(&cluster, leader, gone).await.unwrap(), 2);
    let status = cluster.servers[gone].wait_for_end();
    assert!(status.success(), "it was told to: {status}");
    assert_refused(remove(&cluster, leader, gone).await, Code::NotFound, "etcdserver: member not found");
    // With its old data it is refused by everybody, and ends again.
    cluster.launch(gone);
    cluster.servers[gone].wait_for_log("permanently removed");
    cluster.servers[gone].wait_for_end();
    cluster.client(left).await.put("a", "1", None).await.unwrap();
    cluster.assert_equal(&[leader, left]).await;
    assert_eq!(remove(&cluster, leader, left).await.unwrap(), 1, "down to one");
    cluster.client(leader).await.put("a", "2", None).await.unwrap();
    let last = remove(&cluster, leader, leader).await;
    assert_refused(last, Code::Unknown, "etcdserver: re-configuration failed due to not enough started members");
    cluster.client(leader).await.put("a", "3", None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_leader_ends_and_the_others_go_on() {
    let mut cluster = Cluster::found(3, LOOSE);
    let leader = cluster.leader().await;
    assert_eq!(remove(&cluster, leader, leader).await.unwrap(), 2);
    let status = cluster.servers[leader].wait_for_end();
    assert!(status.success(), "it was told to: {status}");
    let others = cluster.others(leader);
    cluster.leader_among(&others).await;
    cluster.client(others[0]).await.put("a", "1", None).await.unwrap();
    cluster.assert_equal(&others).await;
    let listed: Vec<u64> = cluster.members(others[1]).await.iter().map(|member| member.id).collect();
    assert!(listed.len() == 2 && !listed.contains(&cluster.ids[leader]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_one_that_is_left_goes_on_alone() {
    let mut cluster = Cluster::found(3, LOOSE);
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
    assert_eq!(status.header.as_ref().unwrap().revision, 21, "all of its data is there");
    cluster.client(survivor).await.put("a", "alone", None).await.unwrap();
    // Once is enough, but the flag may stay.
    cluster.servers[survivor].kill();
    cluster.restart(survivor);
    let found = cluster.client(survivor).await.get("a", None).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), "alone");
    // The others were removed, and hear so when they come back.
    cluster.launch(others[0]);
    cluster.servers[others[0]].wait_for_log("permanently removed");
    cluster.servers[others[0]].wait_for_end();
    // It grows again like any other.
    let added = cluster.admit(survivor, false).await.unwrap();
    cluster.restart(added);
    cluster.assert_equal(&[survivor, added]).await;
}
