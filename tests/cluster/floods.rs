//! Expensive requests do not keep members from hearing each other: no leader is deposed because of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::{GetOptions, PutOptions};
use metastore::proto::etcdserverpb::{
    HashKvRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op::Request,
};
use tokio::task::JoinSet;

use super::{harness::Cluster, support::scaled};

const FLOOD: Duration = Duration::from_secs(5);
/// Calls of each kind that are under way at any time.
const AT_ONCE: u64 = 16;
const LEASE_SECONDS: i64 = 10;
/// What a write beside the flood may take at most.
const LONGEST: Duration = Duration::from_secs(4);

fn list() -> RangeRequest {
    RangeRequest { key: "large".into(), range_end: "largf".into(), ..RangeRequest::default() }
}

/// As many puts as are allowed.
fn large_txn(nth: u64) -> TxnRequest {
    let put = |key: u64| PutRequest {
        key: format!("t{nth}/{key}").into(),
        value: "x".repeat(100).into(),
        ..PutRequest::default()
    };
    let success = (0..128).map(|key| RequestOp { request: Some(Request::RequestPut(put(key))) }).collect();
    TxnRequest { success, ..TxnRequest::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_expensive_requests_deposes_no_leader() {
    // Long enough that a busy machine alone deposes no leader.
    let cluster = Cluster::bootstrap(3, &["--heartbeat-interval=100", "--election-timeout=3000"]);
    let leader = cluster.leader().await;
    let mut client = cluster.client(cluster.others(leader)[0]).await;
    for nth in 0..20 {
        client.put(format!("large{nth:02}"), vec![b'x'; 100_000], None).await.unwrap();
    }
    let lease = client.lease_grant(LEASE_SECONDS, None).await.unwrap().id();
    client.put("leased", "", Some(PutOptions::new().with_lease(lease))).await.unwrap();
    let (mut keeper, mut renewed) = client.lease_keep_alive(lease).await.unwrap();
    let term = cluster.status(leader).await.unwrap().raft_term;
    let (is_over, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut flood = JoinSet::new();
    for nth in 0..AT_ONCE {
        let (mut kv, mut maintenance) =
            (cluster.servers[leader].kv().await, cluster.servers[leader].maintenance().await);
        let (is_over, made) = (is_over.clone(), made.clone());
        flood.spawn(async move {
            while !is_over.load(Ordering::Relaxed) {
                // Some are refused, because a limit is reached.
                let mut reader = kv.clone();
                let outcomes = tokio::join!(
                    reader.range(list()),
                    kv.txn(large_txn(nth)),
                    maintenance.hash_kv(HashKvRequest::default())
                );
                made.fetch_add(u64::from(outcomes.0.is_ok()) + u64::from(outcomes.1.is_ok()), Ordering::Relaxed);
            }
        });
    }
    let (started, mut longest) = (Instant::now(), Duration::ZERO);
    while started.elapsed() < FLOOD {
        let asked = Instant::now();
        client.put("beside", "", None).await.unwrap();
        keeper.keep_alive().await.unwrap();
        assert!(renewed.message().await.unwrap().unwrap().ttl() > 0, "the lease is lost");
        longest = longest.max(asked.elapsed());
    }
    is_over.store(true, Ordering::Relaxed);
    flood.join_all().await;
    eprintln!(
        "{} expensive requests; a write and a renewal beside them took {longest:?} at most",
        made.load(Ordering::Relaxed)
    );
    assert!(made.load(Ordering::Relaxed) > AT_ONCE, "there was a flood");
    assert!(longest < scaled(LONGEST), "{longest:?}");
    let status = cluster.status(leader).await.unwrap();
    assert_eq!((status.raft_term, status.leader), (term, cluster.ids[leader]), "the leader is the same");
    assert_eq!(client.get("leased", Some(GetOptions::new().with_keys_only())).await.unwrap().kvs().len(), 1);
    cluster.assert_all_equal().await;
}
