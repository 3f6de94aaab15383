//! Asks other members over HTTP what does not go through the log: who the members are, before one belongs to them; leases and
//! promotions, which only the leader knows about; versions and hashes, to compare.
//!
//! ```text
//! api, server ──▶ Client ══ HTTP/1.1 ══▶ the peer port of another member (`api/peer.rs`)
//! ```
//!
//! Paths, headers and bodies are etcd's. Connections are kept and used again; every question has its patience, so nobody
//! waits for a member that has gone.

pub mod json;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use prost::Message;

use crate::{
    error::Error,
    proto::{
        etcdserverpb::{
            LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, Member,
        },
        leasepb::{LeaseInternalRequest, LeaseInternalResponse},
    },
};
pub use json::{Hash, Versions};

/// The paths of the peer port.
pub mod paths {
    /// Who the members are.
    pub const MEMBERS: &str = "/members";
    /// Makes a voter of the learner whose ID follows, in decimal digits.
    pub const PROMOTE: &str = "/members/promote/";
    /// Which versions are spoken.
    pub const VERSION: &str = "/version";
    /// Whether the cluster goes back to an older version.
    pub const DOWNGRADE: &str = "/downgrade/enabled";
    /// Renews a lease.
    pub const LEASES: &str = "/leases";
    /// Looks at a lease.
    pub const LEASES_INTERNAL: &str = "/leases/internal";
    /// Says why somebody does not start who would be a member.
    pub const REFUSED: &str = "/members/refused";
    /// Where etcd's members talk to each other.
    pub const RAFT: &str = "/raft";
    /// A hash over the data.
    pub const HASH_KV: &str = "/members/hashkv";
}

/// Names the cluster that a member belongs to, or that is asked for.
pub const CLUSTER_ID: HeaderName = HeaderName::from_static("x-etcd-cluster-id");

/// Names the program that answers. Its members talk to each other in a way of their own, and have no other among them.
pub const PROGRAM: HeaderName = header::SERVER;
/// This one.
pub const METASTORE: HeaderValue = HeaderValue::from_static("metastore");

/// Answers may have so many bytes; those about leases may name many keys.
const ANSWER_MAX_BYTES: usize = 100 << 20;
/// Connections that nobody uses are closed after this.
const IDLE: Duration = Duration::from_secs(90);
const IDLE_CONNECTIONS: usize = 64;

/// Asks other members.
#[derive(Clone)]
pub struct Client {
    http: HttpClient<HttpConnector, Full<Bytes>>,
}

/// What a member answered.
struct Answer {
    status: StatusCode,
    cluster_id: Option<String>,
    is_metastore: bool,
    body: Bytes,
}

/// What a member says of its cluster.
pub struct Roll {
    /// The cluster's ID.
    pub cluster_id: u64,
    /// Who is in it.
    pub members: Vec<Member>,
    /// Who says so is a metastore.
    pub is_metastore: bool,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end().to_owned()
    }

    /// The answer, if all is well.
    fn well(self) -> Result<Self, String> {
        if self.status == StatusCode::OK { Ok(self) } else { Err(format!("{}: {}", self.status, self.text())) }
    }
}

/// A question, but for whom it is asked.
struct Question {
    method: Method,
    path: String,
    header: Option<(HeaderName, String)>,
    body: Vec<u8>,
    patience: Duration,
}

impl Question {
    fn get(path: &str, patience: Duration) -> Self {
        Self { method: Method::GET, path: path.to_owned(), header: None, body: Vec::new(), patience }
    }

    fn post(path: &str, patience: Duration, body: Vec<u8>) -> Self {
        let header = Some((header::CONTENT_TYPE, "application/protobuf".to_owned()));
        Self { method: Method::POST, path: path.to_owned(), header, body, patience }
    }
}

impl Client {
    /// A client that gives up connecting after `dial`.
    #[must_use]
    pub fn new(dial: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(dial));
        connector.set_nodelay(true);
        let mut builder = HttpClient::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE).pool_max_idle_per_host(IDLE_CONNECTIONS);
        Self { http: builder.build(connector) }
    }

    /// The members that the one at `url` knows.
    pub async fn members(&self, url: &str, patience: Duration) -> Result<Roll, String> {
        let answer = self.ask(url, Question::get(paths::MEMBERS, patience)).await?.well()?;
        let members = json::read_members(&answer.body)?;
        let text = answer.cluster_id.unwrap_or_default();
        let cluster_id = u64::from_str_radix(&text, 16).map_err(|_| format!("{text:?} is no cluster ID"))?;
        Ok(Roll { cluster_id, members, is_metastore: answer.is_metastore })
    }

    /// Tells a member why this one does not start. Whoever does not understand that need not.
    pub async fn tell_refused(&self, url: &str, why: &str, patience: Duration) {
        let question = Question { header: None, ..Question::post(paths::REFUSED, patience, why.as_bytes().to_vec()) };
        let _ = self.ask(url, question).await;
    }

    /// The versions that a member speaks.
    pub async fn versions(&self, url: &str, patience: Duration) -> Result<Versions, String> {
        Versions::read(&self.ask(url, Question::get(paths::VERSION, patience)).await?.well()?.body)
    }

    /// Whether the cluster goes back to an older version.
    pub async fn is_downgrading(&self, url: &str, patience: Duration) -> Result<bool, String> {
        let answer = self.ask(url, Question::get(paths::DOWNGRADE, patience)).await?.well()?;
        answer.text().parse().map_err(|_| format!("{:?} is neither true nor false", answer.text()))
    }

    /// Has the leader make a voter of a learner. The inner error is its last word; after the outer one another attempt may
    /// come to something else.
    pub async fn promote(
        &self,
        url: &str,
        id: u64,
        token: Option<String>,
        patience: Duration,
    ) -> Result<Result<Vec<Member>, Error>, String> {
        let mut question = Question::post(&format!("{}{id}", paths::PROMOTE), patience, Vec::new());
        question.header = token.map(|token| (header::AUTHORIZATION, token));
        let answer = self.ask(url, question).await?;
        let says = |error: &Error| answer.text().contains(json::bare(error).as_str());
        Ok(match answer.status {
            StatusCode::NOT_FOUND => Err(Error::MemberNotFound),
            StatusCode::PRECONDITION_FAILED if says(&Error::LearnerNotReady) => Err(Error::LearnerNotReady),
            StatusCode::PRECONDITION_FAILED if says(&Error::MemberNotLearner) => Err(Error::MemberNotLearner),
            _ => Ok(json::read_members(&answer.well()?.body)?),
        })
    }

    /// Has the leader renew a lease; None if there is none.
    pub async fn renew(&self, url: &str, id: i64, patience: Duration) -> Result<Option<i64>, String> {
        let body = LeaseKeepAliveRequest { id }.encode_to_vec();
        let answer = self.ask(url, Question::post(paths::LEASES, patience, body)).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let renewed = LeaseKeepAliveResponse::decode(answer.well()?.body).map_err(|error| error.to_string())?;
        if renewed.id == id { Ok(Some(renewed.ttl)) } else { Err(format!("another lease was renewed: {}", renewed.id)) }
    }

    /// Has the leader look at a lease; None if there is none.
    pub async fn time_to_live(
        &self,
        url: &str,
        request: LeaseTimeToLiveRequest,
        patience: Duration,
    ) -> Result<Option<LeaseTimeToLiveResponse>, String> {
        let body = LeaseInternalRequest { lease_time_to_live_request: Some(request) }.encode_to_vec();
        let answer = self.ask(url, Question::post(paths::LEASES_INTERNAL, patience, body)).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let found = LeaseInternalResponse::decode(answer.well()?.body).map_err(|error| error.to_string())?;
        match found.lease_time_to_live_response {
            Some(found) if found.id == request.id => Ok(Some(found)),
            _ => Err("the answer is about another lease".to_owned()),
        }
    }

    /// A member's hash over its data up to a revision. The inner error is that member's refusal.
    pub async fn hash_kv(
        &self,
        url: &str,
        cluster: u64,
        revision: i64,
        patience: Duration,
    ) -> Result<Result<Hash, Error>, String> {
        let mut question = Question::get(paths::HASH_KV, patience);
        question.body = json::hash_request(revision);
        question.header = Some((CLUSTER_ID, format!("{cluster:x}")));
        let answer = self.ask(url, question).await?;
        let says = |error: &Error| answer.text().contains(json::bare(error).as_str());
        Ok(match answer.status {
            StatusCode::BAD_REQUEST if says(&Error::Compacted) => Err(Error::Compacted),
            StatusCode::BAD_REQUEST if says(&Error::FutureRev) => Err(Error::FutureRev),
            _ => Ok(Hash::read(&answer.well()?.body)?),
        })
    }

    async fn ask(&self, url: &str, question: Question) -> Result<Answer, String> {
        let Question { method, path, header, body, patience } = question;
        let uri = format!("{url}{path}");
        let mut request = Request::builder().method(method).uri(&uri);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let request = request.body(Full::from(body)).map_err(|error| format!("{uri}: {error}"))?;
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| causes(&error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_MAX_BYTES).collect().await.map_err(|error| error.to_string())?;
            let cluster_id = head.headers.get(&CLUSTER_ID).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let is_metastore = head.headers.get(&PROGRAM) == Some(&METASTORE);
            Ok(Answer { status: head.status, cluster_id, is_metastore, body: body.to_bytes() })
        };
        match tokio::time::timeout(patience, exchange).await {
            Ok(answer) => answer.map_err(|why: String| format!("{uri}: {why}")),
            Err(_) => Err(format!("{uri}: no answer within {patience:?}")),
        }
    }
}

/// An error with what caused it: by itself it says only that something went wrong.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
