//! Members are added, promoted and moved to other URLs.

use metastore::proto::etcdserverpb::{
    LeaseKeepAliveRequest, MemberAddRequest, MemberListRequest, MemberPromoteRequest, MemberRemoveRequest,
    MemberUpdateRequest, PutRequest, RangeRequest, StatusRequest, TxnRequest, WatchRequest, kv_client::KvClient,
    lease_client::LeaseClient, watch_client::WatchClient,
};
use tonic::{Code, Status};

use super::{
    harness::Cluster,
    network::Proxy,
    support::{assert_refused, eventually_async, time_limit},
};

const NO_RECONFIG_CHECK: &[&str] = &["--strict-reconfig-check=false"];
const FOR_LEARNERS: &str = "etcdserver: rpc not supported for learner";

async fn promote(cluster: &Cluster, via: usize, id: u64) -> Result<usize, Status> {
    let promoted = cluster.servers[via].cluster().await.member_promote(MemberPromoteRequest { id }).await?.into_inner();
    let header = promoted.header.unwrap();
    assert_eq!((header.revision, header.member_id), (0, cluster.ids[via]), "headers of this service have no revision");
    Ok(promoted.members.iter().filter(|member| !member.is_learner).count())
}

/// Promotes a learner as soon as it is ready.
async fn promote_when_ready(cluster: &Cluster, via: usize, id: u64) -> usize {
    eventually_async("the learner is promoted", time_limit(), async || {
        let promoted = promote(cluster, via, id).await;
        if let Err(status) = &promoted {
            assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
            assert!(status.message().ends_with("in sync with leader"), "{status}");
        }
        promoted
    })
    .await
}

/// KV-35.
async fn assert_learns_only(cluster: &Cluster, nth: usize) {
    let server = &cluster.servers[nth];
    let channel = server.channel().await;
    let mut kv = KvClient::new(channel.clone());
    let range = |serializable| RangeRequest { key: "a".into(), serializable, ..RangeRequest::default() };
    let refused = Code::FailedPrecondition;
    assert_refused(kv.range(range(false)).await, refused, FOR_LEARNERS);
    assert_refused(kv.put(PutRequest { key: "a".into(), ..Default::default() }).await, refused, FOR_LEARNERS);
    assert_refused(kv.txn(TxnRequest::default()).await, refused, FOR_LEARNERS);
    assert_refused(kv.range_stream(range(true)).await.map(drop), refused, FOR_LEARNERS);
    let list = MemberListRequest { linearizable: false };
    assert_refused(server.cluster().await.member_list(list).await, refused, FOR_LEARNERS);
    let watches = tokio_stream::iter([WatchRequest::default()]);
    assert_refused(WatchClient::new(channel.clone()).watch(watches).await.map(drop), refused, FOR_LEARNERS);
    let renewals = tokio_stream::iter([LeaseKeepAliveRequest { id: 1 }]);
    assert_refused(LeaseClient::new(channel.clone()).lease_keep_alive(renewals).await.map(drop), refused, FOR_LEARNERS);
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let check = tonic_health::pb::HealthCheckRequest::default();
    assert_refused(health.check(check).await.map(drop), refused, FOR_LEARNERS);
    assert_eq!(kv.range(range(true)).await.unwrap().into_inner().count, 1, "a serializable read is answered");
    let status = server.maintenance().await.status(StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.is_learner);
    assert_eq!(server.http("GET", "/health").status, 200, "the leader answers its linearizable read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_can_be_added_and_promoted_through_any_member() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    let leader = cluster.leader().await;
    let follower = cluster.others(leader)[0];
    cluster.client(leader).await.put("a", "1", None).await.unwrap();
    let learner = cluster.add_member(follower, true).await.unwrap();
    let id = cluster.ids[learner];
    let refused = cluster.add_member(follower, true).await.map(drop);
    assert_refused(refused, Code::FailedPrecondition, "etcdserver: too many learner members in cluster");
    // A follower forwards the request to the leader.
    for via in [leader, follower] {
        let not_ready = "etcdserver: can only promote a learner member which is in sync with leader";
        assert_refused(promote(&cluster, via, id).await, Code::FailedPrecondition, not_ready);
        assert_refused(promote(&cluster, via, 77).await, Code::NotFound, "etcdserver: member not found");
        let voter = cluster.ids[via];
        let not_learner = "etcdserver: can only promote a learner member";
        assert_refused(promote(&cluster, via, voter).await, Code::FailedPrecondition, not_learner);
    }
    let listed = cluster.members(follower).await;
    let unstarted = listed.iter().find(|member| member.id == id).unwrap();
    assert!(unstarted.is_learner && unstarted.name.is_empty() && unstarted.client_ur_ls.is_empty());
    cluster.restart(learner);
    assert_learns_only(&cluster, learner).await;
    assert_eq!(promote_when_ready(&cluster, follower, id).await, 4);
    // It applies the change last.
    let applied = async || !cluster.status(learner).await.unwrap().is_learner;
    eventually_async("the promoted member knows that it is a voter", time_limit(), applied).await;
    cluster.client(learner).await.put("b", "2", None).await.unwrap();
    cluster.assert_all_equal().await;
    for nth in 0..4 {
        assert_eq!(cluster.members(nth).await, cluster.members(leader).await);
    }
    cluster.servers[learner].stop();
    cluster.restart(learner);
    assert_eq!(cluster.members(learner).await, cluster.members(leader).await, "it has stored the member list");
}

/// FAULT-38.
#[tokio::test(flavor = "multi_thread")]
async fn changes_that_could_lose_the_quorum_are_refused() {
    let started = "etcdserver: re-configuration failed due to not enough started members";
    let mut cluster = Cluster::bootstrap(1, &[]);
    let mut client = cluster.servers[0].cluster().await;
    let remove = |id| MemberRemoveRequest { id };
    assert_refused(client.member_remove(remove(cluster.ids[0])).await, Code::Unknown, started);
    assert_refused(client.member_remove(remove(77)).await, Code::NotFound, "etcdserver: member not found");
    let second = cluster.add_member(0, false).await.expect("a second member can always be added");
    // One of two members has started: there is no quorum until the other one has.
    assert_refused(cluster.add_member(0, false).await.map(drop), Code::Unknown, started);
    assert_refused(client.member_remove(remove(cluster.ids[0])).await, Code::Unknown, started);
    cluster.restart(second);
    // Both have started, but have not been connected for long enough.
    let third = eventually_async("both count as connected", time_limit(), async || {
        let added = cluster.add_member(0, false).await;
        if let Err(status) = &added {
            assert_refused::<()>(Err(status.clone()), Code::Unavailable, "etcdserver: unhealthy cluster");
        }
        added
    })
    .await;
    cluster.restart(third);
    cluster.client(third).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
}

/// A serializable member list needs no quorum.
#[tokio::test(flavor = "multi_thread")]
async fn a_serializable_member_list_needs_no_quorum() {
    let cluster = Cluster::bootstrap(1, &[]);
    let mut client = cluster.servers[0].cluster().await;
    let request = MemberAddRequest { peer_ur_ls: vec!["http://127.0.0.1:1".to_owned()], is_learner: false };
    // It may be answered or not: once it is applied, one of two members is missing.
    let adding = tokio::spawn({
        let mut client = client.clone();
        async move { client.member_add(request).await }
    });
    eventually_async("the second member is listed", time_limit(), async || {
        let stale = client.member_list(MemberListRequest { linearizable: false }).await.unwrap().into_inner();
        if stale.members.len() == 2 { Ok(()) } else { Err(stale.members) }
    })
    .await;
    let mut linearizable = tonic::Request::new(MemberListRequest { linearizable: true });
    linearizable.metadata_mut().insert("grpc-timeout", "1S".parse().unwrap());
    let refused = client.member_list(linearizable).await.unwrap_err();
    assert!(matches!(refused.code(), Code::DeadlineExceeded | Code::Cancelled), "{refused}");
    adding.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_changes_at_once_are_both_answered() {
    let cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    let leader = cluster.leader().await;
    let mut adding = tokio::task::JoinSet::new();
    for nth in 0..6 {
        let mut client = cluster.servers[if nth % 2 == 0 { leader } else { cluster.others(leader)[0] }].cluster().await;
        let request = MemberAddRequest { peer_ur_ls: vec![format!("http://127.0.0.1:{}", nth + 1)], is_learner: true };
        adding.spawn(async move { client.member_add(request).await });
    }
    let mut added = 0;
    while let Some(answer) = adding.join_next().await {
        match answer.unwrap() {
            Ok(_) => added += 1,
            Err(status) => assert_refused::<()>(
                Err(status),
                Code::FailedPrecondition,
                "etcdserver: too many learner members in cluster",
            ),
        }
    }
    assert_eq!(added, 1, "one learner is allowed, and the other requests are refused");
    assert_eq!(cluster.members(leader).await.len(), 4);
    cluster.assert_all_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_addresses_are_refused_and_good_ones_can_change() {
    let mut cluster = Cluster::bootstrap(3, NO_RECONFIG_CHECK);
    let leader = cluster.leader().await;
    let moving = cluster.others(leader)[0];
    let mut client = cluster.servers[leader].cluster().await;
    let bad = "etcdserver: given member URLs are invalid";
    let unreachable = [vec!["unix://localhost:1"], vec!["http://127.0.0.1:1", "unixs://localhost:1"]];
    for urls in
        [vec![], vec!["nonsense"], vec!["http://127.0.0.1:1", "http://127.0.0.1"]].into_iter().chain(unreachable)
    {
        let peer_ur_ls = urls.into_iter().map(str::to_owned).collect();
        let request = MemberAddRequest { peer_ur_ls, is_learner: false };
        assert_refused(client.member_add(request).await, Code::InvalidArgument, bad);
    }
    let taken = MemberAddRequest { peer_ur_ls: vec![cluster.proxies[moving].url()], is_learner: false };
    assert_refused(client.member_add(taken).await, Code::FailedPrecondition, "etcdserver: Peer URLs already exists");
    let update = |id, url: &str| MemberUpdateRequest { id, peer_ur_ls: vec![url.to_owned()] };
    assert_refused(client.member_update(update(cluster.ids[moving], "::")).await, Code::InvalidArgument, bad);
    for &id in &cluster.ids {
        let nowhere = MemberUpdateRequest { id, peer_ur_ls: Vec::new() };
        assert_refused(client.member_update(nowhere).await, Code::InvalidArgument, bad);
    }
    let socket = update(cluster.ids[moving], "unix://localhost:1");
    assert_refused(client.member_update(socket).await, Code::InvalidArgument, bad);
    let unknown = client.member_update(update(77, "http://127.0.0.1:1")).await;
    assert_refused(unknown, Code::NotFound, "etcdserver: member not found");
    let taken = update(cluster.ids[moving], &cluster.proxies[leader].url());
    assert_refused(client.member_update(taken).await, Code::FailedPrecondition, "etcdserver: Peer URLs already exists");
    // The member moves to another proxy; the old one is dropped.
    let proxy = Proxy::start(&cluster.network);
    let moved = client.member_update(update(cluster.ids[moving], &proxy.url())).await.unwrap().into_inner();
    let listed = moved.members.iter().find(|member| member.id == cluster.ids[moving]).unwrap();
    assert_eq!((listed.peer_ur_ls.as_slice(), listed.name.as_str()), (&[proxy.url()][..], &*format!("m{moving}")));
    cluster.servers[moving].stop();
    cluster.proxies[moving] = proxy;
    cluster.restart(moving);
    cluster.client(moving).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
}
