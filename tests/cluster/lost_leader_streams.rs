//! Streams on a member that loses its leader: those that were opened with `hasleader` end, all others stay open.

use std::time::Instant;

use metastore::proto::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, RangeRequest, WatchCreateRequest, WatchRequest,
    WatchResponse, lease_client::LeaseClient, watch_client::WatchClient, watch_request::RequestUnion,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, codec::Streaming};

use super::{
    harness::{Cluster, ELECTION},
    support::{Server, assert_refused, time_limit},
};

const TTL: i64 = 120;
const NO_LEADER: &str = "etcdserver: no leader";

fn request<M>(message: M, want_leader: bool) -> Request<M> {
    let mut request = Request::new(message);
    if want_leader {
        request.metadata_mut().insert("hasleader", "true".parse().unwrap());
    }
    request
}

/// One stream of each kind on one member, after its first response.
struct Streams {
    watch: Streaming<WatchResponse>,
    renewals: mpsc::Sender<LeaseKeepAliveRequest>,
    renewed: Streaming<LeaseKeepAliveResponse>,
}

impl Streams {
    async fn open(server: &Server, lease: i64, want_leader: bool) -> Self {
        let (renewals, outgoing) = mpsc::channel(1);
        renewals.send(LeaseKeepAliveRequest { id: lease }).await.unwrap();
        let renewed = keep_alive(server, ReceiverStream::new(outgoing), want_leader).await.unwrap();
        let mut streams = Self { watch: watch(server, want_leader).await.unwrap(), renewals, renewed };
        assert!(streams.watch.message().await.unwrap().unwrap().created);
        assert_eq!(streams.renewed.message().await.unwrap().unwrap().ttl, TTL);
        streams
    }
}

async fn watch(server: &Server, want_leader: bool) -> Result<Streaming<WatchResponse>, Status> {
    let create = WatchCreateRequest { key: "a".into(), ..WatchCreateRequest::default() };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    // The end of the requests does not end the stream.
    let request = request(tokio_stream::once(create), want_leader);
    Ok(WatchClient::new(server.channel().await).watch(request).await?.into_inner())
}

async fn keep_alive(
    server: &Server,
    renewals: ReceiverStream<LeaseKeepAliveRequest>,
    want_leader: bool,
) -> Result<Streaming<LeaseKeepAliveResponse>, Status> {
    Ok(LeaseClient::new(server.channel().await).lease_keep_alive(request(renewals, want_leader)).await?.into_inner())
}

/// First a follower, then the leader is isolated from all others.
/// WATCH-11.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_require_a_leader_end_without_one_and_all_others_stay_open() {
    let cluster = Cluster::bootstrap(3, &[]);
    for (lease, leads) in [(1, false), (2, true)] {
        let leader = cluster.leader().await;
        let lost = if leads { leader } else { cluster.others(leader)[0] };
        let server = &cluster.servers[lost];
        let grant = LeaseGrantRequest { id: lease, ttl: TTL };
        LeaseClient::new(server.channel().await).lease_grant(grant).await.unwrap();
        let mut requiring = Streams::open(server, lease, true).await;
        let mut others = Streams::open(server, lease, false).await;
        cluster.isolate(lost);
        let began = Instant::now();
        let ended = timeout(time_limit(), requiring.watch.message()).await.expect("it ends");
        let took = began.elapsed();
        assert_refused(ended, Code::Unavailable, NO_LEADER);
        assert!(took >= 2 * ELECTION, "it takes three checks that find no leader, but took {took:?}");
        let ended = timeout(time_limit(), requiring.renewed.message()).await.expect("it ends");
        assert_refused(ended, Code::Unavailable, NO_LEADER);
        assert_all_refused(server).await;
        let silence = timeout(ELECTION, others.watch.message()).await;
        assert!(silence.is_err(), "it stays open without a response: {silence:?}");

        cluster.network.heal();
        cluster.leader().await;
        cluster.client(cluster.others(lost)[0]).await.put("a", "1", None).await.unwrap();
        let response = timeout(time_limit(), others.watch.message()).await.expect("it is still open").unwrap().unwrap();
        assert_eq!(response.events.len(), 1);
        others.renewals.send(LeaseKeepAliveRequest { id: lease }).await.unwrap();
        let renewed =
            timeout(time_limit(), others.renewed.message()).await.expect("it is still open").unwrap().unwrap();
        assert_eq!(renewed.ttl, TTL);
        Streams::open(server, lease, true).await;
    }
    cluster.assert_all_equal().await;
}

/// Requests that require a leader are refused at once if there is none.
async fn assert_all_refused(server: &Server) {
    assert_refused(watch(server, true).await.map(|_| ()), Code::Unavailable, NO_LEADER);
    let (_renewals, outgoing) = mpsc::channel(1);
    let refused = keep_alive(server, ReceiverStream::new(outgoing), true).await;
    assert_refused(refused.map(|_| ()), Code::Unavailable, NO_LEADER);
    let range = RangeRequest { key: "a".into(), serializable: true, ..RangeRequest::default() };
    assert_refused(server.kv().await.range(request(range, true)).await, Code::Unavailable, NO_LEADER);
}
