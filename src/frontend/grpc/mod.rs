//! etcd's gRPC services, and gRPC's own: decodes requests, calls the service, encodes its outcomes.
//!
//! [`methods`] maps a path to a handler. A unary handler takes a [`Call`](call::Call) and a [`call::Reply`](Reply); it
//! passes a typed request on to the service, with a [`GrpcReply`] that encodes the outcome, and never blocks. A streaming
//! handler returns a [`Conversation`](call::Conversation). Nothing here names a type of a server of HTTP/2, but for the
//! adapter in [`tonic`].

pub mod concurrency;
pub mod direct;
pub mod header;
pub mod methods;
pub mod status;
pub mod streams;
pub mod tonic;
pub mod unary;
pub mod watch;

use std::sync::Arc;

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::{
    error::Error,
    metrics::METRICS,
    proto::etcdserverpb::TxnRequest,
    service::{Caller, Outcome, Reply, RequestLimits, Service},
    state::txn_decode::{self, TxnDecodeError},
};
use header::Header;
use http2::{
    call::{self, CallError, Code, MAX_METADATA_FIELDS, Metadata},
    ledger::Charge,
};

/// The handlers of all methods.
pub struct Grpc {
    pub service: Arc<Service>,
    pub header: Header,
}

impl Grpc {
    /// What etcd adds to the largest request, for the envelope of a gRPC message.
    const MESSAGE_OVERHEAD_BYTES: usize = 512 << 10;

    #[must_use]
    pub fn new(service: Arc<Service>) -> Self {
        let cluster = &service.cluster;
        let header = Header::new(cluster.cluster_id, cluster.member_id, cluster.node.status().clone());
        Self { service, header }
    }

    /// The largest message that is accepted from a client.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        self.service.limits.max_request_bytes.saturating_add(Self::MESSAGE_OVERHEAD_BYTES)
    }

    /// A reply that encodes an outcome as a message.
    fn reply<T, E: FnOnce(&Header, T) -> Bytes>(&self, reply: call::Reply, encode: E) -> GrpcReply<E> {
        GrpcReply { reply, header: self.header.clone(), encode }
    }

    /// The reply of a command, whose response is encoded already, all but its header.
    fn command_reply<M: Send + 'static>(&self, reply: call::Reply) -> impl Reply<Outcome<M>> + use<M> {
        self.reply(reply, |header: &Header, outcome: Outcome<M>| header.with_body(outcome.revision, &outcome.body))
    }
}

/// Answers a call with an outcome that it encodes.
pub struct GrpcReply<E> {
    reply: call::Reply,
    header: Header,
    encode: E,
}

impl<T, E: FnOnce(&Header, T) -> Bytes + Send + 'static> Reply<T> for GrpcReply<E> {
    fn answer(self, outcome: Result<T, Error>) {
        let Self { reply, header, encode } = self;
        reply.answer(outcome.map(|outcome| encode(&header, outcome)).map_err(Into::into));
    }

    fn answer_counted(self, outcome: Result<T, Error>, mut charge: Charge) {
        let Self { reply, header, encode } = self;
        let answer = outcome.map(|outcome| encode(&header, outcome));
        // What was read is dropped by now; only the message is left.
        charge.set(answer.as_ref().map_or(0, Bytes::len));
        reply.answer(answer.map_err(Into::into));
    }

    fn run(self, work: impl FnOnce(Self) + Send + 'static) {
        let Self { reply, header, encode } = self;
        reply.run(move |reply| work(Self { reply, header, encode }));
    }

    fn is_wanted(&self) -> bool {
        self.reply.is_wanted()
    }
}

/// The header fields that matter to the handlers.
pub const METADATA_FIELDS: [&str; MAX_METADATA_FIELDS] = ["hasleader", "token", "authorization", "client-api-version"];

/// On whose behalf a call is made.
#[must_use]
pub fn caller(metadata: Metadata) -> Caller {
    let Metadata { fields: [has_leader, token, authorization, _], deadline, connection } = metadata;
    Caller {
        token: token.or(authorization),
        connection: connection.and_then(|attached| attached.downcast().ok()),
        deadline,
        require_leader: requires_leader(has_leader.as_ref()),
        ..Caller::default()
    }
}

fn requires_leader(has_leader: Option<&Bytes>) -> bool {
    has_leader.is_some_and(|value| value == "true")
}

/// Decodes the message of a unary call.
pub fn decode<M: Message + Default>(message: Bytes) -> Result<M, Error> {
    M::decode(message).map_err(|error| malformed(&error))
}

/// Decodes a message of a stream. As in grpc-go, the error text differs from that of a unary call.
pub fn decode_streamed<M: Message + Default>(message: Bytes) -> Result<M, CallError> {
    M::decode(message).map_err(|error| {
        let message = format!("grpc: failed to unmarshal the received message: {}", decode_error_text(&error));
        CallError { code: Code::Internal, message: message.into() }
    })
}

/// Decodes a client's transaction.
fn decode_txn(message: Bytes, limits: &RequestLimits) -> Result<TxnRequest, Error> {
    txn_decode::decode(message).map_err(|why| match why {
        TxnDecodeError::Malformed(error) => malformed(&error),
        TxnDecodeError::TooDeep(_) => limits.refuse_levels(),
    })
}

fn malformed(error: &DecodeError) -> Error {
    Error::Malformed(decode_error_text(error).to_owned())
}

/// Go's error text for a message that cannot be decoded.
fn decode_error_text(error: &DecodeError) -> &'static str {
    tracing::debug!(%error, "failed to decode a request");
    METRICS.refused.with_label_values(&["message"]).inc();
    if error.to_string().ends_with("UTF-8 encoded") {
        "string field contains invalid UTF-8"
    } else {
        "proto: cannot parse invalid wire-format data"
    }
}

/// The error of a method that is not implemented yet.
fn not_implemented(what: &'static str) -> CallError {
    CallError { code: Code::Unimplemented, message: what.into() }
}
