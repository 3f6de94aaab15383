//! Leases can be granted, renewed and queried through any member; only the leader tracks their expiry.

use std::time::{Duration, Instant};

use etcd_client::{Client, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions};

use super::{
    harness::Cluster,
    support::{eventually_async, time_limit},
};

const TTL: i64 = 30;

pub async fn grant(client: &mut Client, id: i64, ttl: i64) {
    client.lease_grant(ttl, Some(LeaseGrantOptions::new().with_id(id))).await.unwrap();
}

/// Renews a lease twice: once by opening the stream.
pub async fn renew(client: &mut Client, id: i64) -> i64 {
    let (mut keeper, mut answers) = client.lease_keep_alive(id).await.unwrap();
    keeper.keep_alive().await.unwrap();
    answers.message().await.unwrap().unwrap().ttl()
}

async fn time_to_live(client: &mut Client, id: i64) -> (i64, i64, usize) {
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let found = client.lease_time_to_live(id, Some(options)).await.unwrap();
    (found.ttl(), found.granted_ttl(), found.keys().len())
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_can_be_renewed_and_queried_through_every_member() {
    let cluster = Cluster::bootstrap(3, &[]);
    cluster.leader().await;
    for nth in 0..3 {
        let id = i64::try_from(nth).unwrap() + 1;
        grant(&mut cluster.client(nth).await, id, TTL).await;
        for via in 0..3 {
            // Immediately, although another member has granted it.
            let mut client = cluster.client(via).await;
            assert_eq!(renew(&mut client, id).await, TTL);
            let (left, granted, keys) = time_to_live(&mut client, id).await;
            assert!((TTL - 2..=TTL).contains(&left), "{left}");
            assert_eq!((granted, keys), (TTL, via), "each member has attached one key");
            client.put(format!("{id}/{via}"), "", Some(PutOptions::new().with_lease(id))).await.unwrap();
            let header = client.lease_time_to_live(id, None).await.unwrap();
            assert_eq!(
                header.header().unwrap().member_id(),
                cluster.ids[via],
                "the header is that of the member that was asked"
            );
            assert_eq!(time_to_live(&mut client, 999).await, (-1, 0, 0));
            assert!(client.lease_keep_alive(999).await.is_err(), "the first answer says that there is none");
        }
    }
    cluster.assert_all_equal().await;
}

/// FAULT-34: as in etcd, the TTL starts again with the new leader, and the lease ends all the same.
#[tokio::test(flavor = "multi_thread")]
async fn leases_survive_a_change_of_leader_and_expire_on_time() {
    let mut cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let mut client = cluster.client(others[0]).await;
    grant(&mut client, 1, TTL).await;
    grant(&mut client, 2, 2).await;
    client.put("long", "", Some(PutOptions::new().with_lease(1))).await.unwrap();
    client.put("short", "", Some(PutOptions::new().with_lease(2))).await.unwrap();
    cluster.servers[leader].kill();
    // While there is no leader the renewal waits for one.
    assert_eq!(renew(&mut client, 1).await, TTL);
    let renewed = Instant::now();
    assert_eq!(renew(&mut client, 2).await, 2);
    let is_gone = async || client.get("short", None).await.unwrap().kvs().is_empty();
    eventually_async("the lease expires", time_limit(), is_gone).await;
    assert!(renewed.elapsed() >= Duration::from_secs(2), "it expired {:?} after it was renewed", renewed.elapsed());
    assert_eq!(client.get("long", None).await.unwrap().count(), 1);
    cluster.restart(leader);
    cluster.assert_all_equal().await;
    assert_eq!(renew(&mut cluster.client(leader).await, 1).await, TTL);
}

/// Whether a member confirms the renewal of a lease within a second.
pub async fn claims_to_renew(client: &mut Client, id: i64) -> bool {
    let renewal = async {
        let (_keeper, mut answers) = client.lease_keep_alive(id).await.ok()?;
        answers.message().await.ok()?
    };
    let answer = tokio::time::timeout(Duration::from_secs(1), renewal).await;
    answer.ok().flatten().is_some_and(|answer| answer.ttl() > 0)
}

/// Renews a short lease through `new` for twice its TTL, while `old` must not confirm renewals.
pub async fn keep_alive_despite(old: &mut Client, new: &mut Client, id: i64, ttl: i64) {
    let until = Instant::now() + Duration::from_secs(2 * ttl.unsigned_abs());
    while Instant::now() < until {
        assert_eq!(renew(new, id).await, ttl);
        assert!(!claims_to_renew(old, id).await, "it cannot know whether the lease still exists");
    }
}

/// FAULT-32: decisions of the old leader must not reach the other members, not even later.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_quorum_neither_expires_nor_renews_leases() {
    let cluster = Cluster::bootstrap(3, &[]);
    let old = cluster.leader().await;
    let mut inside = cluster.client(old).await;
    grant(&mut inside, 1, 3).await;
    inside.put("kept", "", Some(PutOptions::new().with_lease(1))).await.unwrap();
    cluster.isolate(old);
    let new = cluster.leader_after(old).await;
    let mut outside = cluster.client(new).await;
    keep_alive_despite(&mut inside, &mut outside, 1, 3).await;
    cluster.network.heal();
    assert_eq!(renew(&mut outside, 1).await, 3);
    cluster.assert_all_equal().await;
    assert_eq!(inside.get("kept", None).await.unwrap().count(), 1, "the lease has not expired");
}
