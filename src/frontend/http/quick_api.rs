//! The quick HTTP API of `--port`: keys and members for `curl`, without a client library.
//!
//! ```text
//! PUT /<key>       the body is the value         204
//! GET /<key>       the value as it is            200, 404
//! DELETE /<key>                                  204
//! GET /-/members                                 200, JSON
//! POST /-/members  the body is a peer URL        201, JSON
//! DELETE /-/members/<id>                         204
//! ```
//!
//! * A key is the path without its first slash, percent-decoded. Paths that begin with `/-/` are not keys.
//! * A write is answered once it is committed. A read is linearizable unless it says `?serializable`.
//! * A request becomes a call of gRPC through the method table, so limits, permissions and counters are those of the method. The
//!   client is identified by a token in `Authorization`, or by its certificate.
//! * With `--port-admin`, `POST /<number>` and `DELETE /<number>` add and remove members, too. The number is that of `--id`.

use std::{borrow::Cow, sync::Arc};

use axum::{
    body::Body,
    http::{HeaderValue, Method as HttpMethod, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use prost::Message;
use serde::Serialize;

use super::{error, percent};
use crate::{
    error::Error,
    frontend::grpc::{Grpc, METADATA_FIELDS, direct, methods::MethodTable, status::http_status},
    proto::etcdserverpb::{
        DeleteRangeRequest, DeleteRangeResponse, Member, MemberAddRequest, MemberAddResponse, MemberListRequest,
        MemberListResponse, MemberRemoveRequest, MemberRemoveResponse, PutRequest, PutResponse, RangeRequest,
        RangeResponse,
    },
};
use http2::{
    call::{Call, CallError, ConnectionInfo, Metadata},
    ledger::{self, Charge, Ledger},
    service::Method,
};

/// What follows is about this server, and is no key.
const RESERVED: &str = "-/";
const MEMBERS: &str = "-/members";
/// Far more than a list of URLs takes.
const MAX_URLS_BYTES: usize = 16 << 10;
/// Of a body that is too large, this much is read before it is refused.
const MAX_DISCARDED_BYTES: usize = 16 << 20;

pub struct QuickApi {
    methods: Arc<MethodTable>,
    ledger: Arc<Ledger>,
    max_value_bytes: usize,
    /// Whether `POST` and `DELETE` of a number are about members (`--port-admin`).
    numbers_are_members: bool,
}

/// What a path refers to.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Key(Vec<u8>),
    Members,
    /// By its identifier.
    Member(String),
    /// By its number among `--cluster`.
    Number(u64),
}

/// Why a request is refused.
struct Refusal {
    status: StatusCode,
    text: Cow<'static, str>,
    /// The methods that are allowed instead.
    allowed: &'static str,
}

type Answer = Result<Response, Refusal>;

fn refuse(status: StatusCode, text: impl Into<Cow<'static, str>>) -> Refusal {
    Refusal { status, text: text.into(), allowed: "" }
}

impl From<CallError> for Refusal {
    fn from(failed: CallError) -> Self {
        let is_too_large = failed == Error::RequestTooLarge.into();
        let status = if is_too_large { StatusCode::PAYLOAD_TOO_LARGE } else { http_status(failed.code) };
        refuse(status, failed.message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = error(self.status, &self.text);
        let headers = response.headers_mut();
        if !self.allowed.is_empty() {
            headers.insert(header::ALLOW, HeaderValue::from_static(self.allowed));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl QuickApi {
    #[must_use]
    pub fn new(grpc: &Arc<Grpc>, methods: Arc<MethodTable>, numbers_are_members: bool) -> Self {
        let ledger = grpc.service.ledger.clone();
        Self { methods, ledger, max_value_bytes: grpc.max_message_bytes(), numbers_are_members }
    }

    pub async fn respond(&self, request: axum::extract::Request) -> Response {
        let (parts, body) = request.into_parts();
        self.answer(parts, body).await.unwrap_or_else(IntoResponse::into_response)
    }

    async fn answer(&self, parts: Parts, body: Body) -> Answer {
        let (method, target) = (parts.method.clone(), self.target(&parts)?);
        let is_serializable = is_serializable(&parts)?;
        let client = metadata(&parts);
        match (target, method.as_str()) {
            (Target::Key(key), "GET" | "HEAD") => self.get(client, key, is_serializable).await,
            (Target::Key(key), "PUT") => self.put(client, key, body).await,
            (Target::Key(key), "DELETE") => {
                let request = DeleteRangeRequest { key: key.into(), ..Default::default() };
                self.call::<DeleteRangeResponse>("/etcdserverpb.KV/DeleteRange", client, &request).await?;
                Ok(StatusCode::NO_CONTENT.into_response())
            }
            (Target::Members, "GET" | "HEAD") => {
                let members = self.members(client, !is_serializable).await?;
                Ok(json(StatusCode::OK, &Members { members: members.iter().map(MemberEntry::from).collect() }))
            }
            (Target::Members, "POST") => {
                let added = self.add_member(client, body).await?;
                Ok(json(StatusCode::CREATED, &MemberEntry::from(&added)))
            }
            (Target::Member(id), "DELETE") => {
                let id = u64::from_str_radix(&id, 16).map_err(|_| {
                    refuse(StatusCode::BAD_REQUEST, format!("{id:?} is no member ID: GET /-/members lists them"))
                })?;
                self.remove_member(client, id).await
            }
            (Target::Number(number), "POST") => {
                if let Some(known) = self.numbered(client.clone(), number).await? {
                    let text = format!("member {:x} has this number: its name is {}", known.id, known.name);
                    return Err(refuse(StatusCode::CONFLICT, text));
                }
                self.add_member(client, body).await?;
                Ok(StatusCode::NO_CONTENT.into_response())
            }
            (Target::Number(number), "DELETE") => {
                let Some(member) = self.numbered(client.clone(), number).await? else {
                    let text = format!("no member is named node{number}: GET /-/members lists them");
                    return Err(refuse(StatusCode::NOT_FOUND, text));
                };
                self.remove_member(client, member.id).await
            }
            (target, _) => Err(Refusal {
                allowed: match target {
                    Target::Key(_) => "GET, HEAD, PUT, DELETE",
                    Target::Members => "GET, HEAD, POST",
                    Target::Member(_) => "DELETE",
                    Target::Number(_) => "GET, HEAD, PUT, POST, DELETE",
                },
                ..refuse(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
            }),
        }
    }

    fn target(&self, parts: &Parts) -> Result<Target, Refusal> {
        let path = parts.uri.path();
        let Some(path) = path.strip_prefix('/') else {
            return Err(refuse(StatusCode::BAD_REQUEST, "the path does not begin with a slash"));
        };
        let Some(key) = percent::decoded_bytes(path) else {
            return Err(refuse(StatusCode::BAD_REQUEST, "in a path, % must precede two hexadecimal digits"));
        };
        if key.is_empty() {
            return Err(refuse(
                StatusCode::BAD_REQUEST,
                "etcdserver: key is not provided: it is the path, without its first slash",
            ));
        }
        let Ok(text) = std::str::from_utf8(&key) else { return Ok(Target::Key(key.into_owned())) };
        if text == MEMBERS {
            return Ok(Target::Members);
        }
        if let Some(id) = text.strip_prefix(MEMBERS).and_then(|rest| rest.strip_prefix('/')) {
            return Ok(Target::Member(id.to_owned()));
        }
        if text.starts_with(RESERVED) {
            let text =
                "404 page not found: below /-/ there is only /-/members; keys that begin with -/ need another API";
            return Err(refuse(StatusCode::NOT_FOUND, text));
        }
        let is_for_members = self.numbers_are_members && matches!(parts.method, HttpMethod::POST | HttpMethod::DELETE);
        match text.parse() {
            Ok(number) if is_for_members && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(Target::Number(number))
            }
            _ => Ok(Target::Key(key.into_owned())),
        }
    }

    async fn get(&self, client: Metadata, key: Vec<u8>, serializable: bool) -> Answer {
        let request = RangeRequest { key: key.into(), serializable, ..Default::default() };
        let answered: RangeResponse = self.call("/etcdserverpb.KV/Range", client, &request).await?;
        let Some(found) = answered.kvs.into_iter().next() else {
            return Err(refuse(StatusCode::NOT_FOUND, "key not found"));
        };
        let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
        Ok((headers, Body::from(found.value)).into_response())
    }

    async fn put(&self, client: Metadata, key: Vec<u8>, body: Body) -> Answer {
        let mut charge = self.ledger.charge(0);
        let value = self.read(body, self.max_value_bytes, &mut charge).await?;
        let request = PutRequest { key: key.into(), value, ..Default::default() };
        self.call::<PutResponse>("/etcdserverpb.KV/Put", client, &request).await?;
        Ok(StatusCode::NO_CONTENT.into_response())
    }

    async fn members(&self, client: Metadata, linearizable: bool) -> Result<Vec<Member>, Refusal> {
        let request = MemberListRequest { linearizable };
        let listed: MemberListResponse = self.call("/etcdserverpb.Cluster/MemberList", client, &request).await?;
        Ok(listed.members)
    }

    /// The member with this number.
    async fn numbered(&self, client: Metadata, number: u64) -> Result<Option<Member>, Refusal> {
        let name = format!("node{number}");
        let members = self.members(client, true).await?;
        Ok(members.into_iter().find(|member| member.name == name))
    }

    async fn add_member(&self, client: Metadata, body: Body) -> Result<Member, Refusal> {
        let mut charge = self.ledger.charge(0);
        let text = self.read(body, MAX_URLS_BYTES, &mut charge).await?;
        let urls = std::str::from_utf8(&text).unwrap_or_default().trim();
        if urls.is_empty() {
            let text = "the body must be the peer URL of the new member, such as http://10.0.0.4:2380";
            return Err(refuse(StatusCode::BAD_REQUEST, text));
        }
        let peer_ur_ls = urls.split(',').map(|url| url.trim().to_owned()).collect();
        let request = MemberAddRequest { peer_ur_ls, is_learner: false };
        let added: MemberAddResponse = self.call("/etcdserverpb.Cluster/MemberAdd", client, &request).await?;
        Ok(added.member.unwrap_or_default())
    }

    async fn remove_member(&self, client: Metadata, id: u64) -> Answer {
        let request = MemberRemoveRequest { id };
        self.call::<MemberRemoveResponse>("/etcdserverpb.Cluster/MemberRemove", client, &request).await?;
        Ok(StatusCode::NO_CONTENT.into_response())
    }

    /// The whole body. It is charged as it arrives.
    async fn read(&self, mut body: Body, max_bytes: usize, charge: &mut Charge) -> Result<Bytes, Refusal> {
        let too_large = || Refusal::from(CallError::from(Error::RequestTooLarge));
        let announced = usize::try_from(http_body::Body::size_hint(&body).lower()).unwrap_or(usize::MAX);
        if announced > max_bytes {
            // A client that is still sending would not see the answer, but only that its connection is closed.
            while announced <= MAX_DISCARDED_BYTES && matches!(body.frame().await, Some(Ok(_))) {}
            return Err(too_large());
        }
        let mut whole = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| refuse(StatusCode::BAD_REQUEST, "the body ended early: unexpected EOF"))?;
            let Ok(data) = frame.into_data() else { continue };
            if data.len() > max_bytes - whole.len() {
                return Err(too_large());
            }
            if !charge.try_grow(data.len()) {
                return Err(ledger::request_over_limit().into());
            }
            whole.extend_from_slice(&data);
        }
        Ok(whole.freeze())
    }

    /// Calls a method of gRPC.
    async fn call<A: Message + Default>(
        &self,
        path: &str,
        metadata: Metadata,
        request: &impl Message,
    ) -> Result<A, Refusal> {
        let method = self.methods.find(path).expect("the method is in the table");
        method.started();
        let answered = direct::call(&method, Call { metadata, message: request.encode_to_vec().into() }).await?;
        A::decode(answered).map_err(|error| {
            refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer of {path} is malformed: {error}"))
        })
    }
}

/// Whether a read asks for what this member knows, without asking the others.
fn is_serializable(parts: &Parts) -> Result<bool, Refusal> {
    let query = parts.uri.query().unwrap_or_default();
    let is_read = matches!(parts.method, HttpMethod::GET | HttpMethod::HEAD);
    let unknown = query.split('&').find(|pair| {
        let name = pair.split('=').next().unwrap_or_default();
        !(name.is_empty() || is_read && name == "serializable")
    });
    if let Some(unknown) = unknown {
        let text = format!("unknown parameter {unknown:?}: GET knows `serializable`, and there are no others");
        return Err(refuse(StatusCode::BAD_REQUEST, text));
    }
    match percent::query_values(query, "serializable").next().as_deref() {
        None | Some("false") => Ok(false),
        Some("" | "true") => Ok(true),
        Some(other) => {
            let text = format!("serializable={other}: `true` or `false` is expected, or the name alone");
            Err(refuse(StatusCode::BAD_REQUEST, text))
        }
    }
}

/// What identifies the client.
fn metadata(parts: &Parts) -> Metadata {
    let connection = parts.extensions.get::<ConnectionInfo>().cloned();
    let token = parts.headers.get(header::AUTHORIZATION);
    let fields = METADATA_FIELDS.map(|name| {
        let token = token.filter(|_| name == header::AUTHORIZATION.as_str())?;
        Some(Bytes::copy_from_slice(token.as_bytes()))
    });
    Metadata { fields, deadline: None, connection }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let mut text = serde_json::to_string(value).expect("texts and numbers can be written");
    text.push('\n');
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

#[derive(Serialize)]
struct Members<'a> {
    members: Vec<MemberEntry<'a>>,
}

/// A member, with the names of etcd's first API for members.
#[derive(Serialize)]
struct MemberEntry<'a> {
    /// In hexadecimal, as in log lines and in etcdctl.
    id: String,
    name: &'a str,
    #[serde(rename = "peerURLs")]
    peer_urls: &'a [String],
    #[serde(rename = "clientURLs")]
    client_urls: &'a [String],
    #[serde(rename = "isLearner")]
    is_learner: bool,
}

impl<'a> From<&'a Member> for MemberEntry<'a> {
    fn from(member: &'a Member) -> Self {
        Self {
            id: format!("{:x}", member.id),
            name: &member.name,
            peer_urls: &member.peer_ur_ls,
            client_urls: &member.client_ur_ls,
            is_learner: member.is_learner,
        }
    }
}
