//! Bootstrapping a cluster of three members.

use etcd_client::GetOptions;
use metastore::{
    node::identity::{ClusterId, MemberId},
    proto::etcdserverpb::MemberListRequest,
};

use super::harness::Cluster;

#[tokio::test(flavor = "multi_thread")]
async fn three_members_agree_on_the_member_list_and_on_every_write() {
    let cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let founders: Vec<_> = cluster.ids.iter().map(|id| MemberId::new(*id).unwrap()).collect();
    let cluster_id = ClusterId::of_initial_members(&founders).get();
    for nth in 0..3 {
        let status = cluster.status(nth).await.unwrap();
        let header = status.header.unwrap();
        assert_eq!((header.cluster_id, header.member_id), (cluster_id, cluster.ids[nth]));
        assert_eq!((status.leader, header.raft_term), (cluster.ids[leader], 2), "the first election is in term 2");
        let request = MemberListRequest { linearizable: true };
        let list = cluster.servers[nth].cluster().await.member_list(request).await.unwrap().into_inner();
        let mut sorted = cluster.ids.clone();
        sorted.sort_unstable();
        assert_eq!(list.members.iter().map(|member| member.id).collect::<Vec<_>>(), sorted);
        assert!(list.members.iter().all(|member| !member.name.is_empty() && !member.is_learner));
    }
    for nth in 0..3 {
        let mut client = cluster.client(nth).await;
        client.put(format!("key/{nth}"), "value", None).await.unwrap();
        let found = client.get("key/", Some(GetOptions::new().with_prefix())).await.unwrap();
        assert_eq!(found.kvs().len(), nth + 1, "a read on one member sees a write acknowledged by another");
    }
    cluster.assert_all_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_continues_after_all_members_were_stopped() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    cluster.client(0).await.put("kept", "1", None).await.unwrap();
    for server in &mut cluster.servers {
        server.stop();
    }
    cluster.start_all();
    cluster.leader().await;
    for nth in 0..3 {
        let found = cluster.client(nth).await.get("kept", None).await.unwrap();
        assert_eq!(found.kvs()[0].value_str().unwrap(), "1");
    }
    cluster.assert_all_equal().await;
}
