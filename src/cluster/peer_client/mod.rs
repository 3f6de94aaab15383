//! HTTP client for requests to other members that do not go through the log: the member list, for a member that joins; lease
//! renewals and learner promotions, which only the leader can decide; versions and hashes, for comparison.
//!
//! ```text
//! service, cluster ──▶ PeerClient ══ HTTP/1.1 ══▶ the peer port of another member (`frontend/peer_http.rs`)
//! ```
//!
//! Paths, headers and bodies are etcd's. Connections are pooled. Every request has a timeout, so that no caller waits for a
//! member that is down.

pub mod json;

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header, uri::Scheme};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::Client as HttpClient,
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use prost::Message;
use tokio::task::JoinSet;

use crate::{
    error::Error,
    net::{
        stream::{Socket, Stream},
        tls::ClientTls,
        url::Url,
    },
    proto::{
        etcdserverpb::{
            LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, Member,
        },
        leasepb::{LeaseInternalRequest, LeaseInternalResponse},
    },
};
pub use json::{PeerHash, Versions};

/// The paths of the peer port.
pub mod paths {
    /// The member list.
    pub const MEMBERS: &str = "/members";
    /// Promotes the learner whose ID follows in decimal.
    pub const PROMOTE: &str = "/members/promote/";
    /// The versions of the member and of the cluster.
    pub const VERSION: &str = "/version";
    /// Whether the cluster is being downgraded.
    pub const DOWNGRADE: &str = "/downgrade/enabled";
    /// Renews a lease.
    pub const LEASES: &str = "/leases";
    /// The time to live of a lease.
    pub const LEASES_INTERNAL: &str = "/leases/internal";
    /// Reports why a member does not start.
    pub const REFUSED: &str = "/members/refused";
    /// The raft transport of etcd.
    pub const RAFT: &str = "/raft";
    /// The hash of the data at a revision.
    pub const HASH_KV: &str = "/members/hashkv";
}

/// The cluster ID: in a response that of the member, in a request the expected one.
pub const CLUSTER_ID: HeaderName = HeaderName::from_static("x-etcd-cluster-id");

/// The program that responds. Members of a cluster must run the same program, because the raft transport is not etcd's.
pub const PROGRAM_HEADER: HeaderName = header::SERVER;
/// The value for this program.
pub const PROGRAM_METASTORE: HeaderValue = HeaderValue::from_static("metastore");
/// The capability level of the cluster, as far as the member that responds knows.
pub const CAPABILITY_LEVEL: HeaderName = HeaderName::from_static("x-metastore-capability-level");

/// The maximum size of a response. One about a lease may list many keys.
const MAX_RESPONSE_BYTES: usize = 100 << 20;
/// Idle connections are closed after this time.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
const MAX_IDLE_CONNECTIONS: usize = 64;

/// How long other members may take to answer with the member list, when a member starts.
pub const MEMBER_LIST_TIMEOUT: Duration = Duration::from_secs(1);

/// The client for other members.
#[derive(Clone)]
pub struct PeerClient {
    http: HttpClient<Connector, Full<Bytes>>,
}

/// The response of a member.
struct PeerResponse {
    status: StatusCode,
    cluster_id: Option<String>,
    is_metastore: bool,
    capability_level: u64,
    body: Bytes,
}

/// The members of a cluster, as one of them reports them.
pub struct MemberList {
    pub cluster_id: u64,
    pub members: Vec<Member>,
    /// Whether the response comes from a metastore server.
    pub is_metastore: bool,
    pub capability_level: u64,
}

impl PeerResponse {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end().to_owned()
    }

    /// The response if its status is 200, else the error text.
    fn into_ok(self) -> Result<Self, String> {
        if self.status == StatusCode::OK { Ok(self) } else { Err(format!("{}: {}", self.status, self.text())) }
    }
}

/// A request, without the URL of the member that it is sent to.
struct PeerRequest {
    method: Method,
    path: String,
    header: Option<(HeaderName, String)>,
    body: Vec<u8>,
    timeout: Duration,
}

impl PeerRequest {
    fn get(path: &str, timeout: Duration) -> Self {
        Self { method: Method::GET, path: path.to_owned(), header: None, body: Vec::new(), timeout }
    }

    fn post(path: &str, timeout: Duration, body: Vec<u8>) -> Self {
        let header = Some((header::CONTENT_TYPE, "application/protobuf".to_owned()));
        Self { method: Method::POST, path: path.to_owned(), header, body, timeout }
    }
}

/// Connects to other members.
#[derive(Clone)]
struct Connector {
    timeout: Duration,
    tls: Arc<ClientTls>,
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Stream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let Self { timeout, tls } = self.clone();
        Box::pin(async move {
            let host = url.host().unwrap_or_default().trim_matches(['[', ']']); // As an IPv6 address is written.
            let is_secure = url.scheme() == Some(&Scheme::HTTPS);
            let connected = async {
                let socket = Socket::connect(host, url.port_u16().unwrap_or(if is_secure { 443 } else { 80 })).await?;
                if is_secure { tls.connect(socket, host).await } else { Ok(Stream::Plain(socket)) }
            };
            tokio::time::timeout(timeout, connected).await?.map(TokioIo::new)
        })
    }
}

impl PeerClient {
    /// A client that may take `dial` to connect.
    #[must_use]
    pub fn new(dial: Duration, tls: Arc<ClientTls>) -> Self {
        let connector = Connector { timeout: dial, tls };
        let mut builder = HttpClient::builder(TokioExecutor::new());
        builder
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS);
        Self { http: builder.build(connector) }
    }

    /// The member lists of those members that answer soon. A member may not have started yet, or be down: that is no error.
    pub async fn member_lists(&self, urls: Vec<Url>) -> Vec<(Url, MemberList)> {
        let fetch = |url: Url| {
            let client = self.clone();
            async move { Some((client.members(url.as_str(), MEMBER_LIST_TIMEOUT).await.ok()?, url)) }
        };
        let answers = urls.into_iter().map(fetch).collect::<JoinSet<_>>().join_all().await;
        answers.into_iter().flatten().map(|(list, url)| (url, list)).collect()
    }

    /// The member list of the member at `url`.
    pub async fn members(&self, url: &str, timeout: Duration) -> Result<MemberList, String> {
        let response = self.send(url, PeerRequest::get(paths::MEMBERS, timeout)).await?.into_ok()?;
        let members = json::read_members(&response.body)?;
        let text = response.cluster_id.unwrap_or_default();
        let cluster_id = u64::from_str_radix(&text, 16).map_err(|_| format!("{text:?} is not a cluster ID"))?;
        let PeerResponse { is_metastore, capability_level, .. } = response;
        Ok(MemberList { cluster_id, members, is_metastore, capability_level })
    }

    /// Tells a member why this one does not start. A failure is ignored: other programs do not know the path.
    pub async fn report_refusal(&self, url: &str, reason: &str, timeout: Duration) {
        let body = reason.as_bytes().to_vec();
        let request = PeerRequest { header: None, ..PeerRequest::post(paths::REFUSED, timeout, body) };
        let _ = self.send(url, request).await;
    }

    /// The versions of a member.
    pub async fn versions(&self, url: &str, timeout: Duration) -> Result<Versions, String> {
        Versions::read(&self.send(url, PeerRequest::get(paths::VERSION, timeout)).await?.into_ok()?.body)
    }

    /// Whether the cluster is being downgraded.
    pub async fn is_downgrading(&self, url: &str, timeout: Duration) -> Result<bool, String> {
        let response = self.send(url, PeerRequest::get(paths::DOWNGRADE, timeout)).await?.into_ok()?;
        response.text().parse().map_err(|_| format!("{:?} is neither true nor false", response.text()))
    }

    /// Asks the leader to promote a learner. The inner error is final; after the outer one a retry may succeed.
    pub async fn promote(
        &self,
        url: &str,
        id: u64,
        token: Option<String>,
        timeout: Duration,
    ) -> Result<Result<Vec<Member>, Error>, String> {
        let mut request = PeerRequest::post(&format!("{}{id}", paths::PROMOTE), timeout, Vec::new());
        request.header = token.map(|token| (header::AUTHORIZATION, token));
        let response = self.send(url, request).await?;
        let has_text = |error: &Error| response.text().contains(json::text_without_prefix(error).as_str());
        Ok(match response.status {
            StatusCode::NOT_FOUND => Err(Error::MemberNotFound),
            StatusCode::PRECONDITION_FAILED if has_text(&Error::LearnerNotReady) => Err(Error::LearnerNotReady),
            StatusCode::PRECONDITION_FAILED if has_text(&Error::MemberNotLearner) => Err(Error::MemberNotLearner),
            _ => Ok(json::read_members(&response.into_ok()?.body)?),
        })
    }

    /// Asks the leader to renew a lease, and returns its time to live. None if it does not exist.
    pub async fn renew(&self, url: &str, id: i64, timeout: Duration) -> Result<Option<i64>, String> {
        let body = LeaseKeepAliveRequest { id }.encode_to_vec();
        let response = self.send(url, PeerRequest::post(paths::LEASES, timeout, body)).await?;
        if response.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let renewed = LeaseKeepAliveResponse::decode(response.into_ok()?.body).map_err(|error| error.to_string())?;
        if renewed.id == id { Ok(Some(renewed.ttl)) } else { Err(format!("another lease was renewed: {}", renewed.id)) }
    }

    /// Asks the leader for the time to live of a lease. None if it does not exist.
    pub async fn time_to_live(
        &self,
        url: &str,
        request: LeaseTimeToLiveRequest,
        timeout: Duration,
    ) -> Result<Option<LeaseTimeToLiveResponse>, String> {
        let body = LeaseInternalRequest { lease_time_to_live_request: Some(request) }.encode_to_vec();
        let response = self.send(url, PeerRequest::post(paths::LEASES_INTERNAL, timeout, body)).await?;
        if response.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let found = LeaseInternalResponse::decode(response.into_ok()?.body).map_err(|error| error.to_string())?;
        match found.lease_time_to_live_response {
            Some(found) if found.id == request.id => Ok(Some(found)),
            _ => Err("the response is about another lease".to_owned()),
        }
    }

    /// The hash of a member's data at a revision. The inner error is the member's answer.
    pub async fn hash_kv(
        &self,
        url: &str,
        cluster: u64,
        revision: i64,
        timeout: Duration,
    ) -> Result<Result<PeerHash, Error>, String> {
        let mut request = PeerRequest::get(paths::HASH_KV, timeout);
        request.body = json::hash_request(revision);
        request.header = Some((CLUSTER_ID, format!("{cluster:x}")));
        let response = self.send(url, request).await?;
        let has_text = |error: &Error| response.text().contains(json::text_without_prefix(error).as_str());
        Ok(match response.status {
            StatusCode::BAD_REQUEST if has_text(&Error::Compacted) => Err(Error::Compacted),
            StatusCode::BAD_REQUEST if has_text(&Error::FutureRev) => Err(Error::FutureRev),
            _ => Ok(PeerHash::read(&response.into_ok()?.body)?),
        })
    }

    async fn send(&self, url: &str, request: PeerRequest) -> Result<PeerResponse, String> {
        let PeerRequest { method, path, header, body, timeout } = request;
        let uri = format!("{url}{path}");
        let mut request = Request::builder().method(method).uri(&uri);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let request = request.body(Full::from(body)).map_err(|error| format!("{uri}: {error}"))?;
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| with_causes(&error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_RESPONSE_BYTES).collect().await.map_err(|error| error.to_string())?;
            let cluster_id = head.headers.get(&CLUSTER_ID).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let is_metastore = head.headers.get(&PROGRAM_HEADER) == Some(&PROGRAM_METASTORE);
            // A member that does not know levels sends none.
            let level = head.headers.get(&CAPABILITY_LEVEL).and_then(|value| value.to_str().ok()?.parse().ok());
            Ok(PeerResponse {
                status: head.status,
                cluster_id,
                is_metastore,
                capability_level: level.unwrap_or(0),
                body: body.to_bytes(),
            })
        };
        match tokio::time::timeout(timeout, exchange).await {
            Ok(response) => response.map_err(|error: String| format!("{uri}: {error}")),
            Err(_) => Err(format!("{uri}: no response within {timeout:?}")),
        }
    }
}

/// An error with all its causes: the text of the error itself is not specific.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
