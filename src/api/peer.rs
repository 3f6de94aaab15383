//! What other members are told over HTTP: the routes of the peer port, with etcd's paths, headers and words.
//!
//! | path | method | answer |
//! | --- | --- | --- |
//! | `/members` | GET | all members |
//! | `/members/promote/<decimal ID>` | POST | all members, one of them promoted |
//! | `/version` | GET | which versions this member speaks |
//! | `/downgrade/enabled` | GET | `false` |
//! | `/leases`, `/leases/internal` | POST | a lease, renewed or looked at, if this member leads |
//! | `/members/hashkv` | GET | a hash over the data |
//! | `/members/refused` | POST | nothing: somebody who would be a member says why it does not start |
//! | `/raft…` | any | that an etcd cannot be a member here |

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Path, State},
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
use tokio::net::TcpStream;

use super::{Api, company::outcome, halt_process};
use crate::{
    error::Error,
    lease::{LeaseId, Renewal},
    mvcc::read::Failure,
    peer::{CLUSTER_ID, METASTORE, PROGRAM, json, paths},
    proto::{
        etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, MemberPromoteResponse, ResponseHeader},
        leasepb::{LeaseInternalRequest, LeaseInternalResponse},
    },
};

/// Questions have few bytes: a lease's ID, a revision.
const QUESTION_MAX_BYTES: usize = 64 << 10;
/// A connection without a question is closed after this: later than members close one that they do not need any more, so
/// that no question meets a closed one.
const IDLE: Duration = Duration::from_mins(2);
/// IDs have so many digits.
const ID_MAX_CHARS: usize = 16;
/// Reasons are cut here.
const REASON_MAX_CHARS: usize = 500;
const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const PROTOBUF: &str = "application/protobuf";

/// The routes of the peer port.
pub fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route(paths::MEMBERS, only_get(members))
        .route(&format!("{}{{*id}}", paths::PROMOTE), only_post(promote))
        .route(paths::REFUSED, only_post(refused))
        .route(paths::VERSION, only_get(version))
        .route(paths::DOWNGRADE, only_get(downgrade))
        .route(paths::LEASES, only_post(renew))
        .route(paths::LEASES_INTERNAL, only_post(look_at))
        .route(paths::HASH_KV, only_get(hash_kv))
        .route(paths::RAFT, any(turn_etcd_away))
        .route(&format!("{}/{{*rest}}", paths::RAFT), any(turn_etcd_away))
        .fallback(|| async { refusal(StatusCode::NOT_FOUND, "404 page not found") })
        .with_state(api)
}

/// Serves one connection of a member.
pub async fn serve(stream: TcpStream, router: Router) {
    let _ = stream.set_nodelay(true);
    let mut connection = auto::Builder::new(TokioExecutor::new());
    connection.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    let connection = connection.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a member's connection ended badly");
    }
}

/// An answer that is not the one that was wanted, as Go's servers give it.
fn refusal(status: StatusCode, text: impl std::fmt::Display) -> Response {
    let headers = [(header::CONTENT_TYPE, TEXT), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, format!("{text}\n")).into_response()
}

/// A route of one method. HEAD is another one than GET.
fn only_get<H: Handler<T, Arc<Api>>, T: 'static>(handler: H) -> MethodRouter<Arc<Api>> {
    any(|| async { wrong_method("GET") }).get(handler).head(|| async { wrong_method("GET") })
}

fn only_post<H: Handler<T, Arc<Api>>, T: 'static>(handler: H) -> MethodRouter<Arc<Api>> {
    any(|| async { wrong_method("POST") }).post(handler)
}

fn wrong_method(allowed: &'static str) -> Response {
    ([(header::ALLOW, allowed)], refusal(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")).into_response()
}

fn of_kind(kind: &'static str, body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, kind)], body.into()).into_response()
}

impl Api {
    fn cluster_id_text(&self) -> String {
        format!("{:x}", self.header.cluster_id())
    }

    /// Says whose answer it is.
    fn signed(&self, mut response: Response) -> Response {
        let value = self.cluster_id_text().parse().expect("digits are a header's value");
        response.headers_mut().insert(CLUSTER_ID, value);
        response.headers_mut().insert(PROGRAM, METASTORE);
        response
    }
}

async fn members(State(api): State<Arc<Api>>) -> Response {
    api.signed(of_kind(JSON, json::write_members(&api.members())))
}

/// What anybody may cause, and is said once in a while.
struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    fn is_due(&self, pause: Duration) -> bool {
        let (now, mut last) = (Instant::now(), self.0.lock());
        let is_due = last.is_none_or(|last| now - last >= pause);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

/// The words are those by which an etcd tells its own administrator that it is ignored.
async fn turn_etcd_away(State(api): State<Arc<Api>>, headers: HeaderMap) -> Response {
    static SAID: Seldom = Seldom::new();
    if SAID.is_due(Duration::from_mins(1)) {
        let from = headers.get("x-server-from").and_then(|value| value.to_str().ok()).unwrap_or("somebody");
        let from: String = from.chars().take(ID_MAX_CHARS).collect();
        tracing::warn!(
            "remote-peer-id" = from,
            "an etcd would talk to this member: it cannot be in a cluster of metastores"
        );
    }
    api.signed(refusal(StatusCode::PRECONDITION_FAILED, "incompatible version"))
}

/// The administrator may look here first. Anybody may call, so it makes a short line.
async fn refused(State(api): State<Arc<Api>>, body: Body) -> Response {
    static SAID: Seldom = Seldom::new();
    let Ok(why) = to_bytes(body, QUESTION_MAX_BYTES).await else {
        return api.signed(refusal(StatusCode::PAYLOAD_TOO_LARGE, "more than a reason"));
    };
    if SAID.is_due(Duration::from_secs(1)) {
        let why: String = String::from_utf8_lossy(&why).chars().take(REASON_MAX_CHARS).collect();
        tracing::warn!(reason = why, "somebody who would be a member of this cluster does not start");
    }
    api.signed(StatusCode::NO_CONTENT.into_response())
}

async fn promote(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Response {
    let promoted = match id.parse() {
        Ok(id) => api.promote(id).await,
        Err(_) => {
            return api.signed(refusal(StatusCode::NOT_FOUND, format!("member {id} not found in cluster")));
        }
    };
    let answer = match promoted {
        Ok(response) => match MemberPromoteResponse::decode(response.body.as_slice()) {
            Ok(promoted) => of_kind(JSON, json::write_members(&promoted.members)),
            Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
        Err(Error::MemberNotFound) => refusal(StatusCode::NOT_FOUND, "membership: ID not found"),
        Err(Error::MemberNotLearner) => {
            refusal(StatusCode::PRECONDITION_FAILED, "membership: can only promote a learner member")
        }
        Err(error @ Error::LearnerNotReady) => refusal(StatusCode::PRECONDITION_FAILED, error),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
    };
    api.signed(answer)
}

async fn version(State(api): State<Arc<Api>>) -> Response {
    of_kind(JSON, api.versions().write())
}

async fn downgrade(State(api): State<Arc<Api>>) -> Response {
    api.signed(match outcome(|waiter| api.node.read_barrier(waiter)).await {
        Ok(()) => of_kind("text/plain", "false"), // There are no downgrades.
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("failed linearized read: {error}")),
    })
}

/// Reads a question about a lease; waits until everything that this member knows to be agreed is applied, so that a lease
/// which anybody was told of is known.
#[allow(clippy::result_large_err, reason = "the caller sends it at once")]
async fn question<M: Message + Default>(api: &Arc<Api>, body: Body) -> Result<M, Response> {
    let body = to_bytes(body, QUESTION_MAX_BYTES).await;
    let body = body.map_err(|_| refusal(StatusCode::PAYLOAD_TOO_LARGE, "request body too large"))?;
    let question = M::decode(body);
    let question = question.map_err(|_| refusal(StatusCode::BAD_REQUEST, "error unmarshalling request"))?;
    let late = "waiting for node to catch up its applied index has timed out";
    let caught_up = outcome(|waiter| api.node.catch_up(waiter)).await;
    caught_up.map_err(|_| refusal(StatusCode::REQUEST_TIMEOUT, late))?;
    Ok(question)
}

async fn renew(State(api): State<Arc<Api>>, body: Body) -> Response {
    let LeaseKeepAliveRequest { id } = match question(&api, body).await {
        Ok(question) => question,
        Err(refused) => return refused,
    };
    loop {
        let timekeeper = api.node.timekeeper();
        match timekeeper.renew(LeaseId(id)) {
            Renewal::Renewed(ttl) => {
                let answer = LeaseKeepAliveResponse { header: None, id, ttl };
                return of_kind(PROTOBUF, answer.encode_to_vec());
            }
            Renewal::Unknown => return refusal(StatusCode::NOT_FOUND, "lease not found"),
            Renewal::NotPrimary if api.leads() => {
                if let Err(error) = outcome(|waiter| timekeeper.await_primary(waiter)).await {
                    return refusal(StatusCode::BAD_REQUEST, error);
                }
            }
            Renewal::NotPrimary => return refusal(StatusCode::BAD_REQUEST, Error::NotPrimary),
            Renewal::Expired => {
                let ended = outcome(|waiter| timekeeper.await_end(LeaseId(id), waiter)).await;
                if let Err(error) = ended {
                    return refusal(StatusCode::BAD_REQUEST, error);
                }
            }
        }
    }
}

async fn look_at(State(api): State<Arc<Api>>, body: Body) -> Response {
    let request = match question::<LeaseInternalRequest>(&api, body).await {
        Ok(question) => question.lease_time_to_live_request.unwrap_or_default(),
        Err(refused) => return refused,
    };
    let looked = loop {
        if api.leads() && outcome(|waiter| api.node.timekeeper().await_primary(waiter)).await.is_err() {
            return refusal(StatusCode::INTERNAL_SERVER_ERROR, Error::NotPrimary);
        }
        match api.look_at_lease(&request) {
            Err(Error::LeaderChanged) if api.leads() => (), // It was away for a moment.
            looked => break looked,
        }
    };
    match looked {
        Ok(Some(mut found)) => {
            if request.keys {
                let looking = api.clone();
                let with_keys = outcome(|waiter| api.pool.run(move || waiter(Ok(looking.with_keys(found))))).await;
                found = match with_keys {
                    Ok(found) => found,
                    Err(error) => return refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
                };
            }
            found.header = Some(ResponseHeader::default());
            let answer = LeaseInternalResponse { lease_time_to_live_response: Some(found) };
            of_kind(PROTOBUF, answer.encode_to_vec())
        }
        Ok(None) => refusal(StatusCode::NOT_FOUND, "lease not found"),
        Err(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, Error::NotPrimary),
    }
}

async fn hash_kv(State(api): State<Arc<Api>>, headers: HeaderMap, body: Body) -> Response {
    let asked = headers.get(&CLUSTER_ID).map(|value| value.as_bytes().to_vec());
    if asked.is_some_and(|asked| !asked.is_empty() && asked != api.cluster_id_text().as_bytes()) {
        return refusal(StatusCode::PRECONDITION_FAILED, "cluster ID mismatch");
    }
    let body: Bytes = match to_bytes(body, QUESTION_MAX_BYTES).await {
        Ok(body) => body,
        Err(_) => return refusal(StatusCode::BAD_REQUEST, "error reading body"),
    };
    let Ok(revision) = json::read_hash_request(&body) else {
        return refusal(StatusCode::BAD_REQUEST, "error unmarshalling request");
    };
    match api.hash_at(revision).await {
        Ok(hash) => api.signed(of_kind(JSON, hash.write())),
        Err(error) => refusal(StatusCode::BAD_REQUEST, json::bare(&error)),
    }
}

impl Api {
    /// The hash over this member's data up to a revision, computed on the pool.
    pub async fn hash_at(self: &Arc<Self>, revision: i64) -> Result<json::Hash, Error> {
        let (pool, api) = (self.pool.clone(), self.clone());
        let hash = outcome(|waiter| {
            pool.run(move || {
                waiter(match api.readers().keys.hash_kv(revision) {
                    Ok(hash) => Ok(hash),
                    Err(Failure::Refused(error)) => Err(error),
                    Err(Failure::Halted(halt)) => halt_process(&halt),
                });
            });
        });
        let hash = hash.await?;
        Ok(json::Hash {
            hash: hash.hash,
            hash_revision: hash.hash_revision,
            compact_revision: hash.compact_revision,
            head: hash.head,
        })
    }
}
