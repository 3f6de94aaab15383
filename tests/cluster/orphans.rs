//! Streams at a member that loses its leader: those that were opened with `hasleader` end, all others go on.

use std::time::Instant;

use metastore::proto::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, RangeRequest, WatchCreateRequest, WatchRequest,
    WatchResponse, lease_client::LeaseClient, watch_client::WatchClient, watch_request::RequestUnion,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, codec::Streaming};

use super::{
    harness::{Cluster, ELECTION, PATIENCE},
    support::{Server, assert_refused},
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

/// One stream of each kind, at one member. Each was answered once.
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
    // That nothing more is asked does not end the stream.
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

/// A member that follows, then the one that leads, is cut off from all others.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_want_a_leader_end_without_one_and_all_others_go_on() {
    let cluster = Cluster::found(3, &[]);
    for (lease, leads) in [(1, false), (2, true)] {
        let leader = cluster.leader().await;
        let lost = if leads { leader } else { cluster.others(leader)[0] };
        let server = &cluster.servers[lost];
        let grant = LeaseGrantRequest { id: lease, ttl: TTL };
        LeaseClient::new(server.channel().await).lease_grant(grant).await.unwrap();
        let mut wanting = Streams::open(server, lease, true).await;
        let mut content = Streams::open(server, lease, false).await;
        cluster.isolate(lost);
        let began = Instant::now();
        let ended = timeout(PATIENCE, wanting.watch.message()).await.expect("it ends");
        let took = began.elapsed();
        assert_refused(ended, Code::Unavailable, NO_LEADER);
        assert!(took >= 2 * ELECTION, "it takes three looks that find no leader, not {took:?}");
        let ended = timeout(PATIENCE, wanting.renewed.message()).await.expect("it ends");
        assert_refused(ended, Code::Unavailable, NO_LEADER);
        assert_all_refused(server).await;
        let silence = timeout(ELECTION, content.watch.message()).await;
        assert!(silence.is_err(), "it waits for its leader: {silence:?}");

        cluster.network.heal();
        cluster.leader().await;
        cluster.client(cluster.others(lost)[0]).await.put("a", "1", None).await.unwrap();
        let heard = timeout(PATIENCE, content.watch.message()).await.expect("it goes on").unwrap().unwrap();
        assert_eq!(heard.events.len(), 1);
        content.renewals.send(LeaseKeepAliveRequest { id: lease }).await.unwrap();
        let renewed = timeout(PATIENCE, content.renewed.message()).await.expect("it goes on").unwrap().unwrap();
        assert_eq!(renewed.ttl, TTL);
        Streams::open(server, lease, true).await;
    }
    cluster.assert_all_equal().await;
}

/// Whoever wants a leader where there is none is refused at once.
async fn assert_all_refused(server: &Server) {
    assert_refused(watch(server, true).await.map(|_| ()), Code::Unavailable, NO_LEADER);
    let (_renewals, outgoing) = mpsc::channel(1);
    let refused = keep_alive(server, ReceiverStream::new(outgoing), true).await;
    assert_refused(refused.map(|_| ()), Code::Unavailable, NO_LEADER);
    let range = RangeRequest { key: "a".into(), serializable: true, ..RangeRequest::default() };
    assert_refused(server.kv().await.range(request(range, true)).await, Code::Unavailable, NO_LEADER);
}
