//! Transfers of leadership, and a cluster without a leader.

use std::time::{Duration, Instant};

use metastore::proto::etcdserverpb::{MoveLeaderRequest, PutRequest, RangeRequest};
use tonic::Code;

use super::{
    harness::{Cluster, ELECTION},
    support::{assert_refused, eventually_async, scaled, time_limit},
};

/// KV-44.
#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_to_a_voter_and_only_from_the_leader() {
    let mut cluster = Cluster::bootstrap(3, &["--strict-reconfig-check=false"]);
    let leader = cluster.leader().await;
    let target = cluster.others(leader)[0];
    let learner = cluster.add_member(leader, true).await.unwrap();
    let ask = |via: usize, target_id: u64| {
        let client = cluster.servers[via].maintenance();
        async move { client.await.move_leader(MoveLeaderRequest { target_id }).await }
    };
    // A member that is not the leader says so, even if the target is invalid.
    assert_refused(ask(target, 77).await, Code::FailedPrecondition, "etcdserver: not leader");
    for invalid in [77, 0, cluster.ids[learner]] {
        let bad = "etcdserver: bad leader transferee";
        assert_refused(ask(leader, invalid).await, Code::FailedPrecondition, bad);
    }
    let moved = ask(leader, cluster.ids[leader]).await.unwrap().into_inner();
    assert_eq!(moved.header, None, "it is the leader already");
    assert_eq!(ask(leader, cluster.ids[target]).await.unwrap().into_inner().header, None);
    assert_eq!(cluster.leader_among(&[0, 1, 2]).await, target);
    cluster.client(leader).await.put("a", "1", None).await.unwrap();
    cluster.assert_equal(&[0, 1, 2]).await;
}

/// Raft aborts a transfer after an election timeout without reporting it; the request is still waiting then.
#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_to_a_voter_that_is_unreachable_for_a_while() {
    let cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let target = cluster.others(leader)[0];
    cluster.isolate(target);
    let request = MoveLeaderRequest { target_id: cluster.ids[target] };
    let mut client = cluster.servers[leader].maintenance().await;
    let (moved, ()) = tokio::join!(client.move_leader(request), async {
        tokio::time::sleep(3 * ELECTION).await;
        cluster.network.heal();
    });
    moved.unwrap();
    assert_eq!(cluster.leader().await, target);
    cluster.assert_all_equal().await;
}

/// KV-47 and KV-55.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_leader_writes_time_out_and_serializable_reads_are_answered() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    cluster.client(0).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
    cluster.servers[1].kill();
    cluster.servers[2].kill();
    let alone = &cluster.servers[0];
    let knows = async || cluster.status(0).await.unwrap().leader == 0;
    eventually_async("it reports that there is no leader", time_limit(), knows).await;
    let mut kv = alone.kv().await;
    let range = |serializable| RangeRequest { key: "a".into(), serializable, ..RangeRequest::default() };
    let started = Instant::now();
    let write = kv.put(PutRequest { key: "a".into(), value: "2".into(), ..PutRequest::default() }).await;
    let took = started.elapsed();
    assert_refused(write, Code::DeadlineExceeded, "context deadline exceeded");
    assert!((Duration::from_millis(5500)..scaled(Duration::from_secs(9))).contains(&took), "{took:?}");
    assert_eq!(kv.range(range(true)).await.unwrap().into_inner().kvs[0].value, "1");
    assert_refused(kv.range(range(false)).await, Code::Unavailable, "etcdserver: request timed out");
    assert_eq!(alone.http("GET", "/health?serializable=true").status, 200);
    let health = alone.http("GET", "/health");
    assert_eq!((health.status, health.body.as_str()), (503, "{\"health\":\"false\",\"reason\":\"RAFT NO LEADER\"}\n"));
    cluster.restart(1);
    cluster.restart(2);
    cluster.leader().await;
    cluster.assert_all_equal().await;
}
