//! etcd's JSON API: the methods of gRPC as `POST` requests below `/v3/`, with JSON in both directions.
//!
//! ```text
//! body ─ scanner, values ─▶ value ─ decode ─▶ message ─▶ method ─▶ message ─ encode ─▶ body
//! ```
//!
//! A body is split into JSON values as it arrives. A value is decoded into the wire format of its message, from the compiled
//! descriptors ([`schema`]): no type of a message is named here. The call then takes the way of any call of gRPC through the
//! method table, and is counted as one, so whatever holds for the method holds here. What the method answers is encoded
//! as JSON, straight from its wire format.
//!
//! * A unary call has one value, and what follows it is ignored. Streams are conversations, whose messages are the values of the
//!   body, and the lines of the answer; they live as long as the client wants.
//! * Nothing is held that is not charged to the ledger: what has arrived of a value, the message, the answer until it is sent.
//! * The texts of errors are those of etcd's gateway, of which clients have learnt some by heart.
//! * A certificate does not identify the client of a JSON call; a token does, in `Authorization`.

pub mod conversation;
pub mod decode;
pub mod encode;
pub mod error;
pub mod lines;
pub mod metadata;
pub mod number;
#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::format_collect,
    clippy::format_push_string,
    clippy::single_match_else,
    clippy::wildcard_enum_match_arm,
    reason = "it makes random messages and their text, where neither speed nor the value of a number matters"
)]
mod oracle;
pub mod quote;
pub mod requests;
pub mod routes;
pub mod scanner;
pub mod schema;
pub mod values;

use std::{collections::HashMap, future::poll_fn, sync::Arc, time::Instant};

use axum::body::Body;
use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Method as HttpMethod, Request, Response, StatusCode,
    header::{CONTENT_TYPE, WWW_AUTHENTICATE},
};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    grpc::{
        Grpc, direct,
        methods::{GrpcMethod, MethodTable},
        status,
    },
    http::{
        error as plain_error,
        min_rate::{ChargedBody, IsCharged},
    },
};
use crate::{error::Error, service::CallerConnection};
use conversation::ConversationCall;
use http2::{
    call::{Call, CallError, Code, ConnectionInfo, Metadata},
    ledger::{self, Charge},
    service::{Method, Shape},
};
use lines::{Beginning, LineEncoder, Lines};
use requests::{BodyRequests, MessageDecoder, Requests};
use schema::{Methods, Schema, TypeId};
use values::Values;

/// What gRPC sends with each answer, and how etcd's gateway passes it on.
const METADATA: (HeaderName, HeaderValue) =
    (HeaderName::from_static("grpc-metadata-content-type"), HeaderValue::from_static("application/grpc"));
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// JSON takes this much more space than the message that it stands for: base64, names, and space. What takes even more is refused.
const JSON_FACTOR: usize = 4;
const JSON_OVERHEAD_BYTES: usize = 64 << 10;
/// etcd's text.
const NAME_IGNORED: &str =
    "CommonName of client sending a request against gateway will be ignored and not used as expected";
/// A longer answer is encoded where it blocks no connection.
const LONG_ANSWER_BYTES: usize = 256 << 10;

/// Serves the JSON API.
pub struct Gateway {
    grpc: Arc<Grpc>,
    schema: Arc<Schema>,
    routes: HashMap<&'static str, Route>,
    /// As in etcd, where the gateway is one client of the server, its calls share one limit of concurrent streams.
    calls: Arc<Semaphore>,
    max_held_bytes: usize,
}

/// What a path leads to.
struct Route {
    method: Arc<GrpcMethod>,
    request: TypeId,
    response: TypeId,
    takes_stream: bool,
}

impl Gateway {
    /// `max_held_bytes` is what a call may make the server hold.
    #[must_use]
    pub fn new(grpc: &Arc<Grpc>, methods: &MethodTable, max_streams: u32, max_held_bytes: usize) -> Arc<Self> {
        let declared = Methods::new(crate::proto::DESCRIPTORS);
        let types = |path: &str| declared.get(path).unwrap_or_else(|| panic!("{path} is declared"));
        let names = routes::ROUTES.iter().flat_map(|(_, path)| [&types(path).request, &types(path).response]);
        let schema = Schema::new(crate::proto::DESCRIPTORS, &names.cloned().collect::<Vec<_>>());
        let find = |name: &str| schema.find(name).expect("the schema has the messages of all routes");
        let route = |&(path, method): &(&'static str, &str)| {
            let declared = types(method);
            let route = Route {
                method: methods.find(method).expect("routes lead to known methods"),
                request: find(&declared.request),
                response: find(&declared.response),
                takes_stream: declared.takes_stream,
            };
            (path, route)
        };
        let routes = routes::ROUTES.iter().map(route).collect();
        let max_calls = usize::try_from(max_streams).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let calls = Arc::new(Semaphore::new(max_calls));
        Arc::new(Self { grpc: grpc.clone(), schema: Arc::new(schema), routes, calls, max_held_bytes })
    }

    /// Answers a request for a path below `/v3/`.
    pub async fn respond(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        let connection = request.extensions().get::<ConnectionInfo>().and_then(|info| info.downcast_ref()).cloned();
        if self.ignores_name(connection.as_ref()) {
            return plain_error(StatusCode::BAD_REQUEST, NAME_IGNORED);
        }
        let path = routes::route_path(request.uri().path()).into_owned();
        let Some(route) = self.routes.get(path.as_str()) else {
            return error_response(&CallError { code: Code::NotFound, message: "Not Found".into() });
        };
        if request.method() != HttpMethod::POST {
            return error_response(&CallError { code: Code::Unimplemented, message: "Method Not Allowed".into() });
        }
        let (parts, body) = request.into_parts();
        // The name in a certificate names no user here.
        let connection = connection.map(|known| CallerConnection { common_name: None, ..known });
        let connection = connection.map(|connection| -> ConnectionInfo { Arc::new(connection) });
        let metadata = metadata::metadata(&parts.headers).map(|metadata| Metadata { connection, ..metadata });
        let answer = match metadata {
            Ok(metadata) if route.takes_stream => Ok(self.converse(route, metadata, body).await),
            Ok(metadata) => self.call(route, metadata, body).await,
            Err(error) => Err(error),
        };
        let mut response = answer.unwrap_or_else(|error| error_response(&error));
        response.extensions_mut().insert(IsCharged);
        response
    }

    /// Whether a client may believe that its certificate is taken for that of a user, as with gRPC.
    fn ignores_name(&self, connection: Option<&CallerConnection>) -> bool {
        let service = &self.grpc.service;
        connection.is_some_and(|connection| connection.common_name.is_some())
            && service.authentication.certificates_name_users
            && service.auth_is_enabled()
    }

    /// A call with one request.
    async fn call(&self, route: &Route, metadata: Metadata, body: Body) -> Result<Response<Body>, CallError> {
        let mut charge = self.grpc.service.ledger.charge(0);
        let value = self.first_value(body, &mut charge).await?;
        let message = self.decoder(route).decode(&value)?;
        drop(value);
        charge.set(message.len());
        let deadline = metadata.deadline;
        let permit = self.permit(deadline).await?;
        if !route.method.is_unary() {
            route.method.started();
            let requests = Requests::One(Some(message));
            return Ok(match self.open(route, metadata, requests, permit) {
                Ok(call) => self.lines(route, call).await,
                Err(error) => stream_error_response(&error),
            });
        }
        let answered = before(deadline, self.call_unary(route, metadata, message, permit)).await?;
        charge.set(answered.len());
        let (body, charge) = self.encode(route.response, answered, charge).await?;
        let mut response = Response::new(Body::new(ChargedBody::new(Body::from(body), charge)));
        response.headers_mut().extend([(CONTENT_TYPE, JSON), METADATA]);
        Ok(response)
    }

    async fn call_unary(
        &self,
        route: &Route,
        metadata: Metadata,
        message: Bytes,
        permit: OwnedSemaphorePermit,
    ) -> Result<Bytes, CallError> {
        route.method.started();
        if route.method.shape() == Shape::Unary {
            return direct::call(&route.method, Call { metadata, message }).await;
        }
        let mut call = self.open(route, metadata, Requests::One(Some(message)), permit)?;
        let answer = poll_fn(|context| call.poll_message(context)).await?;
        poll_fn(|context| call.poll_message(context)).await?;
        answer.ok_or_else(|| CallError { code: Code::Internal, message: "the call ended without an answer".into() })
    }

    /// A call whose requests are the values in a body.
    async fn converse(&self, route: &Route, metadata: Metadata, body: Body) -> Response<Body> {
        let begun = async {
            let permit = self.permit(metadata.deadline).await?;
            route.method.started();
            let values = Values::new(self.max_value_bytes());
            let charge = self.grpc.service.ledger.charge(0);
            let requests = Requests::Body(Box::new(BodyRequests::new(body, values, self.decoder(route), charge)));
            self.open(route, metadata, requests, permit)
        };
        match begun.await {
            Ok(call) => self.lines(route, call).await,
            Err(error) => stream_error_response(&error),
        }
    }

    /// Begins a conversation. The start of the call has been counted.
    fn open(
        &self,
        route: &Route,
        metadata: Metadata,
        requests: Requests,
        permit: OwnedSemaphorePermit,
    ) -> Result<ConversationCall, CallError> {
        let deadline = metadata.deadline;
        let conversation = route.method.open(metadata).inspect_err(|error| route.method.handled(error.code))?;
        let limits = (self.grpc.service.ledger.clone(), self.max_held_bytes);
        Ok(ConversationCall::new(route.method.clone(), conversation, requests, deadline, limits, permit))
    }

    /// Answers with a line for each message. As in etcd, the headers are sent with the first.
    async fn lines(&self, route: &Route, call: ConversationCall) -> Response<Body> {
        let encoder = LineEncoder { schema: self.schema.clone(), response: route.response };
        match Lines::begin(call, encoder, self.grpc.service.ledger.charge(0)).await {
            Beginning::Message(lines) => {
                let mut response = Response::new(Body::new(lines));
                response.headers_mut().extend([(CONTENT_TYPE, JSON), METADATA]);
                response
            }
            Beginning::End => Response::new(Body::empty()),
            Beginning::Error(error) => stream_error_response(&error),
        }
    }

    /// The first value of a body; an empty object if there is none. The rest of the body is ignored.
    async fn first_value(&self, mut body: Body, charge: &mut Charge) -> Result<Vec<u8>, CallError> {
        let mut values = Values::new(self.max_value_bytes());
        let value = loop {
            match body.frame().await {
                Some(Ok(frame)) => {
                    let Ok(mut data) = frame.into_data() else { continue };
                    if let Some(value) = values.push(&mut data)? {
                        break Some(value);
                    }
                    if !charge.try_grow(values.held_bytes() - charge.bytes()) {
                        return Err(ledger::request_over_limit());
                    }
                }
                Some(Err(_)) => return Err(values::invalid("unexpected EOF".to_owned())),
                None => break values.end()?,
            }
        };
        while let Some(Ok(_)) = body.frame().await {}
        Ok(value.unwrap_or_else(|| b"{}".to_vec()))
    }

    fn decoder(&self, route: &Route) -> MessageDecoder {
        MessageDecoder { schema: self.schema.clone(), request: route.request, max_bytes: self.grpc.max_message_bytes() }
    }

    fn max_value_bytes(&self) -> usize {
        self.grpc.max_message_bytes().saturating_mul(JSON_FACTOR).saturating_add(JSON_OVERHEAD_BYTES)
    }

    /// Waits until there are fewer calls than the limit.
    async fn permit(&self, deadline: Option<Instant>) -> Result<OwnedSemaphorePermit, CallError> {
        let acquired = self.calls.clone().acquire_owned();
        before(deadline, async { Ok(acquired.await.expect("the semaphore is never closed")) }).await
    }

    /// Encodes an answer. The charge grows with it.
    async fn encode(&self, id: TypeId, answer: Bytes, charge: Charge) -> Result<(String, Charge), CallError> {
        let schema = self.schema.clone();
        let is_long = answer.len() > LONG_ANSWER_BYTES;
        let encode = move || {
            let mut charge = charge;
            let body = encode::encode_body(&schema, id, &answer, &mut |more| charge.try_grow(more));
            let body = body.map_err(|encode::OverLimit| ledger::response_over_limit())?;
            charge.set(body.len());
            Ok((body, charge))
        };
        if !is_long {
            return encode();
        }
        let (sender, encoded) = tokio::sync::oneshot::channel();
        self.grpc.service.read_pool().run(move || _ = sender.send(encode()));
        encoded.await.expect("the read pool runs every job")
    }
}

/// Awaits something until a deadline. If that has passed, it is not even begun.
async fn before<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    let Some(deadline) = deadline else { return work.await };
    if deadline <= Instant::now() {
        return Err(Error::DeadlineExceeded.into());
    }
    tokio::time::timeout_at(deadline.into(), work).await.unwrap_or_else(|_| Err(Error::DeadlineExceeded.into()))
}

/// An answer that is an error.
fn error_response(error: &CallError) -> Response<Body> {
    let mut response = with_status(error, error::body(error));
    if error.code == Code::Unauthenticated
        && let Ok(message) = HeaderValue::from_str(&error.message)
    {
        response.headers_mut().insert(WWW_AUTHENTICATE, message);
    }
    response
}

/// The answer to a call with many responses that fails before the first.
fn stream_error_response(error: &CallError) -> Response<Body> {
    with_status(error, error::line(error))
}

fn with_status(error: &CallError, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status::http_status(error.code);
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}
