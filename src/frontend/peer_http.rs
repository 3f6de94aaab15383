//! The HTTP routes of the peer port, with etcd's paths, headers and texts.
//!
//! | path | method | response |
//! | --- | --- | --- |
//! | `/members` | GET | all members |
//! | `/members/promote/<decimal ID>` | POST | all members, after the promotion |
//! | `/version` | GET | the versions of this member |
//! | `/downgrade/enabled` | GET | `false` |
//! | `/leases`, `/leases/internal` | POST | a lease, renewed or looked up, if this member leads |
//! | `/members/hashkv` | GET | a hash of the key-value data |
//! | `/members/refused` | POST | nothing: a process that was to be a member reports why it does not start |
//! | `/raft…` | any | an error: an etcd cannot be a member of this cluster |

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{FromRef, Path, State},
    handler::Handler,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, any},
};
use bytes::Bytes;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use parking_lot::Mutex;
use prost::Message;

use crate::{
    cluster::{
        Cluster, await_outcome,
        peer_client::{CAPABILITY_LEVEL, CLUSTER_ID, PROGRAM_HEADER, PROGRAM_METASTORE, json, paths},
    },
    error::Error,
    lease::LeaseId,
    net::stream::Stream,
    proto::{
        etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, MemberPromoteResponse, ResponseHeader},
        leasepb::{LeaseInternalRequest, LeaseInternalResponse},
    },
    service::{Caller, Service},
};

/// The limit of request bodies, which are short: a lease's ID, a revision.
const REQUEST_MAX_BYTES: usize = 64 << 10;
/// A connection without a request is closed after this: later than members close connections that they no longer use, so that
/// no request is sent on a closed one.
const IDLE_TIMEOUT: Duration = Duration::from_mins(2);
/// The number of hexadecimal digits of an ID.
const ID_MAX_CHARS: usize = 16;
/// Reasons are truncated to this length.
const REASON_MAX_CHARS: usize = 500;
const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const PROTOBUF: &str = "application/protobuf";

/// What the routes use.
#[derive(Clone)]
struct PeerRoutes(Arc<Service>);

impl FromRef<PeerRoutes> for Arc<Cluster> {
    fn from_ref(routes: &PeerRoutes) -> Self {
        routes.0.cluster.clone()
    }
}

/// The routes of the peer port.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route(paths::MEMBERS, only_get(members))
        .route(&format!("{}{{*id}}", paths::PROMOTE), only_post(promote))
        .route(paths::REFUSED, only_post(report_startup_failure))
        .route(paths::VERSION, only_get(version))
        .route(paths::DOWNGRADE, only_get(downgrade))
        .route(paths::LEASES, only_post(renew))
        .route(paths::LEASES_INTERNAL, only_post(look_up))
        .route(paths::HASH_KV, only_get(hash_kv))
        .route(paths::RAFT, any(reject_etcd))
        .route(&format!("{}/{{*rest}}", paths::RAFT), any(reject_etcd))
        .fallback(|| async { refusal(StatusCode::NOT_FOUND, "404 page not found") })
        .with_state(PeerRoutes(service))
}

/// Serves one connection of a member.
pub async fn serve(stream: Stream, router: Router) {
    let mut connection = auto::Builder::new(TokioExecutor::new());
    connection.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
    let connection = connection.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!(%error, "error on a connection from a member");
    }
}

/// An error response in the form of Go's HTTP servers.
fn refusal(status: StatusCode, text: impl std::fmt::Display) -> Response {
    let headers = [(header::CONTENT_TYPE, TEXT), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, format!("{text}\n")).into_response()
}

/// A route that only allows GET. HEAD is not GET.
fn only_get<H: Handler<T, PeerRoutes>, T: 'static>(handler: H) -> MethodRouter<PeerRoutes> {
    any(|| async { wrong_method("GET") }).get(handler).head(|| async { wrong_method("GET") })
}

fn only_post<H: Handler<T, PeerRoutes>, T: 'static>(handler: H) -> MethodRouter<PeerRoutes> {
    any(|| async { wrong_method("POST") }).post(handler)
}

fn wrong_method(allowed: &'static str) -> Response {
    ([(header::ALLOW, allowed)], refusal(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")).into_response()
}

fn with_type(content_type: &'static str, body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, content_type)], body.into()).into_response()
}

fn cluster_id(cluster: &Cluster) -> String {
    format!("{:x}", cluster.cluster_id)
}

/// Adds the headers that name this cluster and this program.
fn identified(cluster: &Cluster, mut response: Response) -> Response {
    let value = cluster_id(cluster).parse().expect("digits are a valid header value");
    response.headers_mut().insert(CLUSTER_ID, value);
    response.headers_mut().insert(PROGRAM_HEADER, PROGRAM_METASTORE);
    response.headers_mut().insert(CAPABILITY_LEVEL, cluster.node.status().capability_level().into());
    response
}

async fn members(State(cluster): State<Arc<Cluster>>) -> Response {
    identified(&cluster, with_type(JSON, json::write_members(&cluster.members())))
}

/// Limits the rate of log lines that any process on the network can cause.
struct LogRateLimit(Mutex<Option<Instant>>);

impl LogRateLimit {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    fn allows(&self, interval: Duration) -> bool {
        let (now, mut last) = (Instant::now(), self.0.lock());
        let is_allowed = last.is_none_or(|last| now - last >= interval);
        if is_allowed {
            *last = Some(now);
        }
        is_allowed
    }
}

/// Refuses an etcd as a raft peer. etcd logs this error text for its administrator.
async fn reject_etcd(State(cluster): State<Arc<Cluster>>, headers: HeaderMap) -> Response {
    static LIMIT: LogRateLimit = LogRateLimit::new();
    if LIMIT.allows(Duration::from_mins(1)) {
        let from = headers.get("x-server-from").and_then(|value| value.to_str().ok()).unwrap_or("unknown");
        let from: String = from.chars().take(ID_MAX_CHARS).collect();
        tracing::warn!(
            "remote-peer-id" = from,
            "rejected a raft connection from an etcd: etcd and metastore members cannot share a cluster"
        );
    }
    identified(&cluster, refusal(StatusCode::PRECONDITION_FAILED, "incompatible version"))
}

/// Logs why another process could not start as a member, because the administrator may look in this log first. Any process on
/// the network can call this, so the line is short.
async fn report_startup_failure(State(cluster): State<Arc<Cluster>>, body: Body) -> Response {
    static LIMIT: LogRateLimit = LogRateLimit::new();
    let Ok(reason) = to_bytes(body, REQUEST_MAX_BYTES).await else {
        return identified(&cluster, refusal(StatusCode::PAYLOAD_TOO_LARGE, "request body too large"));
    };
    if LIMIT.allows(Duration::from_secs(1)) {
        let reason: String = String::from_utf8_lossy(&reason).chars().take(REASON_MAX_CHARS).collect();
        tracing::warn!(reason, "a process that was to join this cluster failed to start");
    }
    identified(&cluster, StatusCode::NO_CONTENT.into_response())
}

/// The only route that needs a user, while authentication is enabled: root, by the token that the client has shown to the member
/// that it asked.
async fn promote(
    State(PeerRoutes(service)): State<PeerRoutes>,
    State(cluster): State<Arc<Cluster>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    let token = headers.get(header::AUTHORIZATION).map(|token| Bytes::copy_from_slice(token.as_bytes()));
    let promoted = match id.parse() {
        Ok(id) => match service.allow_promotion(Caller { token, ..Caller::default() }).await {
            Ok(()) => cluster.promote(id).await,
            Err(error) => Err(error),
        },
        Err(_) => {
            return identified(&cluster, refusal(StatusCode::NOT_FOUND, format!("member {id} not found in cluster")));
        }
    };
    let answer = match promoted {
        Ok(response) => match MemberPromoteResponse::decode(response.body.as_slice()) {
            Ok(promoted) => with_type(JSON, json::write_members(&promoted.members)),
            Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
        Err(Error::MemberNotFound) => refusal(StatusCode::NOT_FOUND, "membership: ID not found"),
        Err(Error::MemberNotLearner) => {
            refusal(StatusCode::PRECONDITION_FAILED, "membership: can only promote a learner member")
        }
        Err(error @ Error::LearnerNotReady) => refusal(StatusCode::PRECONDITION_FAILED, error),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
    };
    identified(&cluster, answer)
}

async fn version(State(cluster): State<Arc<Cluster>>) -> Response {
    with_type(JSON, cluster.versions().write())
}

async fn downgrade(State(cluster): State<Arc<Cluster>>) -> Response {
    identified(
        &cluster,
        match await_outcome(|waiter| cluster.node.read_barrier(waiter)).await {
            Ok(()) => with_type("text/plain", "false"), // There are no downgrades.
            Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("failed linearized read: {error}")),
        },
    )
}

/// Reads a request about a lease, and waits until everything that this member knows to be committed is applied, so that every
/// lease whose grant was acknowledged is known.
#[allow(clippy::result_large_err, reason = "the caller sends it immediately")]
async fn lease_request<M: Message + Default>(cluster: &Arc<Cluster>, body: Body) -> Result<M, Response> {
    let body = to_bytes(body, REQUEST_MAX_BYTES).await;
    let body = body.map_err(|_| refusal(StatusCode::PAYLOAD_TOO_LARGE, "request body too large"))?;
    let request = M::decode(body);
    let request = request.map_err(|_| refusal(StatusCode::BAD_REQUEST, "error unmarshalling request"))?;
    let late = "waiting for node to catch up its applied index has timed out";
    let caught_up = await_outcome(|waiter| cluster.node.catch_up(waiter)).await;
    caught_up.map_err(|_| refusal(StatusCode::REQUEST_TIMEOUT, late))?;
    Ok(request)
}

async fn renew(State(cluster): State<Arc<Cluster>>, body: Body) -> Response {
    let LeaseKeepAliveRequest { id } = match lease_request(&cluster, body).await {
        Ok(request) => request,
        Err(refused) => return refused,
    };
    match cluster.renew(LeaseId(id)).await {
        Ok(Some(ttl)) => with_type(PROTOBUF, LeaseKeepAliveResponse { header: None, id, ttl }.encode_to_vec()),
        Ok(None) => refusal(StatusCode::NOT_FOUND, "lease not found"),
        Err(error) => refusal(StatusCode::BAD_REQUEST, error),
    }
}

async fn look_up(State(cluster): State<Arc<Cluster>>, body: Body) -> Response {
    let request = match lease_request::<LeaseInternalRequest>(&cluster, body).await {
        Ok(request) => request.lease_time_to_live_request.unwrap_or_default(),
        Err(refused) => return refused,
    };
    match cluster.time_to_live(request).await {
        Ok(Some(mut found)) => {
            found.header = Some(ResponseHeader::default());
            let answer = LeaseInternalResponse { lease_time_to_live_response: Some(found) };
            with_type(PROTOBUF, answer.encode_to_vec())
        }
        Ok(None) => refusal(StatusCode::NOT_FOUND, "lease not found"),
        Err(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, Error::NotPrimary),
    }
}

async fn hash_kv(State(cluster): State<Arc<Cluster>>, headers: HeaderMap, body: Body) -> Response {
    let requested = headers.get(&CLUSTER_ID).map(|value| value.as_bytes().to_vec());
    if requested.is_some_and(|requested| !requested.is_empty() && requested != cluster_id(&cluster).as_bytes()) {
        return refusal(StatusCode::PRECONDITION_FAILED, "cluster ID mismatch");
    }
    let body: Bytes = match to_bytes(body, REQUEST_MAX_BYTES).await {
        Ok(body) => body,
        Err(_) => return refusal(StatusCode::BAD_REQUEST, "error reading body"),
    };
    let Ok(revision) = json::read_hash_request(&body) else {
        return refusal(StatusCode::BAD_REQUEST, "error unmarshalling request");
    };
    match cluster.hash_at(revision).await {
        Ok(hash) => identified(&cluster, with_type(JSON, hash.write())),
        Err(error) => refusal(StatusCode::BAD_REQUEST, json::text_without_prefix(&error)),
    }
}
