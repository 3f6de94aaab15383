//! The method table: maps a path to a handler.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use prometheus::IntCounter;
use prost::Message;

use super::{Api, single::SingleRequest};
use crate::{
    call::{Call, CallError, Code, Conversation, Metadata, Reply},
    error::Error,
    metrics::METRICS,
    proto::etcdserverpb::{self as pb, RangeRequest},
};

/// Handles a unary call.
pub type UnaryHandler = fn(&Arc<Api>, Call, Reply);
/// Begins a conversation.
pub type StreamOpener = fn(&Arc<Api>, Metadata) -> Box<dyn Conversation>;

/// How a method is answered.
#[derive(Clone, Copy)]
pub enum Handler {
    /// One request, one response.
    Unary(UnaryHandler),
    /// One request, one response, which may take long: a conversation, because that is dropped when the call is canceled. To
    /// clients it is an ordinary unary call.
    Patient(StreamOpener),
    /// One request, many responses.
    ServerStream(StreamOpener),
    /// Many requests, many responses.
    Bidirectional(StreamOpener),
}

impl Handler {
    /// Whether the method is unary for the client.
    #[must_use]
    pub fn is_unary(self) -> bool {
        matches!(self, Self::Unary(_) | Self::Patient(_))
    }

    fn grpc_type(self) -> &'static str {
        match self {
            Self::Unary(_) | Self::Patient(_) => "unary",
            Self::ServerStream(_) => "server_stream",
            Self::Bidirectional(_) => "bidi_stream",
        }
    }
}

/// Whether a learner answers a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Learner {
    Refuses,
    Answers,
    /// It answers a serializable Range.
    AnswersIfSerializable,
}

impl Learner {
    fn of(path: &str) -> Self {
        match path {
            "/etcdserverpb.Maintenance/Status" | "/etcdserverpb.Maintenance/Snapshot" => Self::Answers,
            "/etcdserverpb.KV/Range" => Self::AnswersIfSerializable,
            _ => Self::Refuses,
        }
    }

    fn accepts(self, message: Option<&Bytes>) -> bool {
        match self {
            Self::Refuses => false,
            Self::Answers => true,
            Self::AnswersIfSerializable => message
                .is_some_and(|message| RangeRequest::decode(message.clone()).is_ok_and(|range| range.serializable)),
        }
    }
}

/// One method: its handler and its metrics.
pub struct Method {
    /// `/service/method`.
    pub path: &'static str,
    pub handler: Handler,
    learner: Learner,
    started: IntCounter,
    received: IntCounter,
    sent: IntCounter,
    handled: [IntCounter; CODES.len()],
}

/// gRPC's codes as Go prints them, by number.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

impl Method {
    fn new(path: &'static str, handler: Handler) -> Self {
        let (service, name) = path[1..].split_once('/').expect("paths are /service/method");
        let labels = [handler.grpc_type(), service, name];
        let with_code = |code| METRICS.handled.with_label_values(&[labels[0], service, name, code]);
        Self {
            path,
            handler,
            learner: Learner::of(path),
            started: METRICS.started.with_label_values(&labels),
            received: METRICS.received.with_label_values(&labels),
            sent: METRICS.sent.with_label_values(&labels),
            handled: CODES.map(with_code),
        }
    }

    /// Begins a conversation. A stream that requires a leader ends soon after the leader is lost; for a unary method that is
    /// checked at the beginning only.
    #[must_use]
    pub fn open(&self, api: &Arc<Api>, open: StreamOpener, metadata: Metadata) -> Box<dyn Conversation> {
        let requires_leader = metadata.require_leader && !self.handler.is_unary();
        let mut conversation = open(api, metadata);
        if let Handler::ServerStream(_) = self.handler {
            conversation = Box::new(SingleRequest::new(conversation));
        }
        if requires_leader { api.vigil.guard(conversation) } else { conversation }
    }

    /// Counts the start of a call.
    pub fn started(&self) {
        self.started.inc();
    }

    /// Counts a message from the client.
    pub fn received(&self, bytes: usize) {
        self.received.inc();
        METRICS.client_received_bytes.inc_by(bytes as u64);
    }

    /// Counts a message to the client.
    pub fn sent(&self, bytes: usize) {
        self.sent.inc();
        METRICS.client_sent_bytes.inc_by(bytes as u64);
    }

    /// Counts the end of a call.
    pub fn handled(&self, code: Code) {
        self.handled[code as usize].inc();
    }
}

/// All methods, by path.
pub struct Table {
    api: Arc<Api>,
    methods: HashMap<&'static str, Arc<Method>>,
}

/// All methods that clients can call.
const METHODS: &[(&str, Handler)] = &[
    ("/etcdserverpb.KV/Range", Handler::Unary(Api::range)),
    ("/etcdserverpb.KV/RangeStream", Handler::ServerStream(Api::range_stream)),
    ("/etcdserverpb.KV/Put", Handler::Unary(Api::put)),
    ("/etcdserverpb.KV/DeleteRange", Handler::Unary(Api::delete_range)),
    ("/etcdserverpb.KV/Txn", Handler::Unary(Api::txn)),
    ("/etcdserverpb.KV/Compact", Handler::Unary(Api::compact)),
    ("/etcdserverpb.Watch/Watch", Handler::Bidirectional(Api::watch)),
    ("/etcdserverpb.Lease/LeaseGrant", Handler::Unary(Api::lease_grant)),
    ("/etcdserverpb.Lease/LeaseRevoke", Handler::Unary(Api::lease_revoke)),
    ("/etcdserverpb.Lease/LeaseKeepAlive", Handler::Bidirectional(Api::lease_keep_alive)),
    ("/etcdserverpb.Lease/LeaseTimeToLive", Handler::Unary(Api::lease_time_to_live)),
    ("/etcdserverpb.Lease/LeaseLeases", Handler::Unary(Api::lease_leases)),
    ("/etcdserverpb.Auth/AuthEnable", Handler::Unary(Api::auth::<pb::AuthEnableRequest>)),
    ("/etcdserverpb.Auth/AuthDisable", Handler::Unary(Api::auth::<pb::AuthDisableRequest>)),
    ("/etcdserverpb.Auth/AuthStatus", Handler::Unary(Api::auth::<pb::AuthStatusRequest>)),
    ("/etcdserverpb.Auth/Authenticate", Handler::Unary(Api::auth::<pb::AuthenticateRequest>)),
    ("/etcdserverpb.Auth/UserAdd", Handler::Unary(Api::auth::<pb::AuthUserAddRequest>)),
    ("/etcdserverpb.Auth/UserGet", Handler::Unary(Api::auth::<pb::AuthUserGetRequest>)),
    ("/etcdserverpb.Auth/UserList", Handler::Unary(Api::auth::<pb::AuthUserListRequest>)),
    ("/etcdserverpb.Auth/UserDelete", Handler::Unary(Api::auth::<pb::AuthUserDeleteRequest>)),
    ("/etcdserverpb.Auth/UserChangePassword", Handler::Unary(Api::auth::<pb::AuthUserChangePasswordRequest>)),
    ("/etcdserverpb.Auth/UserGrantRole", Handler::Unary(Api::auth::<pb::AuthUserGrantRoleRequest>)),
    ("/etcdserverpb.Auth/UserRevokeRole", Handler::Unary(Api::auth::<pb::AuthUserRevokeRoleRequest>)),
    ("/etcdserverpb.Auth/RoleAdd", Handler::Unary(Api::auth::<pb::AuthRoleAddRequest>)),
    ("/etcdserverpb.Auth/RoleGet", Handler::Unary(Api::auth::<pb::AuthRoleGetRequest>)),
    ("/etcdserverpb.Auth/RoleList", Handler::Unary(Api::auth::<pb::AuthRoleListRequest>)),
    ("/etcdserverpb.Auth/RoleDelete", Handler::Unary(Api::auth::<pb::AuthRoleDeleteRequest>)),
    ("/etcdserverpb.Auth/RoleGrantPermission", Handler::Unary(Api::auth::<pb::AuthRoleGrantPermissionRequest>)),
    ("/etcdserverpb.Auth/RoleRevokePermission", Handler::Unary(Api::auth::<pb::AuthRoleRevokePermissionRequest>)),
    ("/etcdserverpb.Cluster/MemberAdd", Handler::Unary(Api::member_add)),
    ("/etcdserverpb.Cluster/MemberRemove", Handler::Unary(Api::member_remove)),
    ("/etcdserverpb.Cluster/MemberUpdate", Handler::Unary(Api::member_update)),
    ("/etcdserverpb.Cluster/MemberList", Handler::Unary(Api::member_list)),
    ("/etcdserverpb.Cluster/MemberPromote", Handler::Unary(Api::member_promote)),
    ("/v3lockpb.Lock/Lock", Handler::Patient(Api::lock)),
    ("/v3lockpb.Lock/Unlock", Handler::Patient(Api::unlock)),
    ("/v3electionpb.Election/Campaign", Handler::Patient(Api::campaign)),
    ("/v3electionpb.Election/Proclaim", Handler::Patient(Api::proclaim)),
    ("/v3electionpb.Election/Leader", Handler::Patient(Api::leader)),
    ("/v3electionpb.Election/Observe", Handler::ServerStream(Api::observe)),
    ("/v3electionpb.Election/Resign", Handler::Patient(Api::resign)),
    ("/etcdserverpb.Maintenance/Alarm", Handler::Unary(Api::alarm)),
    ("/etcdserverpb.Maintenance/Status", Handler::Unary(Api::status)),
    ("/etcdserverpb.Maintenance/Defragment", Handler::Unary(Api::defragment)),
    ("/etcdserverpb.Maintenance/Hash", Handler::Unary(Api::hash)),
    ("/etcdserverpb.Maintenance/HashKV", Handler::Unary(Api::hash_kv)),
    ("/etcdserverpb.Maintenance/Snapshot", Handler::ServerStream(Api::snapshot)),
    ("/etcdserverpb.Maintenance/MoveLeader", Handler::Unary(Api::move_leader)),
    ("/etcdserverpb.Maintenance/Downgrade", Handler::Unary(Api::downgrade)),
    ("/grpc.health.v1.Health/Check", Handler::Unary(Api::health_check)),
    ("/grpc.health.v1.Health/List", Handler::Unary(Api::health_list)),
    ("/grpc.health.v1.Health/Watch", Handler::ServerStream(Api::health_watch)),
];

/// The error of a call for an unknown path, with grpc-go's text.
#[must_use]
pub fn refuse_unknown(path: &str) -> CallError {
    let has_service = |service: &str| {
        METHODS.iter().any(|(known, _)| known[1..].rsplit_once('/').is_some_and(|(name, _)| name == service))
    };
    let message = match path.strip_prefix('/').and_then(|named| named.rsplit_once('/')) {
        Some((service, method)) if has_service(service) => format!("unknown method {method} for service {service}"),
        Some((service, _)) => format!("unknown service {service}"),
        None => format!("malformed method name: {path:?}"),
    };
    CallError { code: Code::Unimplemented, message: message.into() }
}

impl Table {
    #[must_use]
    pub fn new(api: Arc<Api>) -> Self {
        let methods = METHODS.iter().map(|&(path, handler)| (path, Arc::new(Method::new(path, handler))));
        Self { api, methods: methods.collect() }
    }

    #[must_use]
    pub fn find(&self, path: &str) -> Option<&Arc<Method>> {
        self.methods.get(path)
    }

    /// All methods, with their paths.
    pub fn methods(&self) -> impl Iterator<Item = (&'static str, &Arc<Method>)> {
        self.methods.iter().map(|(path, method)| (*path, method))
    }

    #[must_use]
    pub fn api(&self) -> &Arc<Api> {
        &self.api
    }

    /// The checks that precede every method: of this member's role and of the metadata. `message` is the request of a unary
    /// call.
    pub fn admit(&self, method: &Method, metadata: &Metadata, message: Option<&Bytes>) -> Result<(), CallError> {
        let status = self.api.node.status();
        if status.is_learner() && !method.learner.accepts(message) {
            return Err(Error::NotSupportedForLearner.into());
        }
        let version = metadata.client_api_version.as_deref().unwrap_or_default();
        if std::str::from_utf8(version).is_err() {
            return Err(Error::InvalidClientApiVersion.into());
        }
        if metadata.require_leader && status.leader() == 0 {
            return Err(Error::NoLeader.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trap 35.
    #[test]
    fn a_learner_answers_status_and_serializable_reads() {
        let range =
            |serializable| Bytes::from(RangeRequest { serializable, ..RangeRequest::default() }.encode_to_vec());
        let (fresh, stale, garbage) = (range(false), range(true), Bytes::from_static(b"\xff"));
        for (path, handler) in METHODS {
            let learner = Learner::of(path);
            match *path {
                "/etcdserverpb.Maintenance/Status" => assert!(learner.accepts(Some(&fresh))),
                "/etcdserverpb.Maintenance/Snapshot" => assert!(learner.accepts(None)),
                "/etcdserverpb.KV/Range" => {
                    assert!(learner.accepts(Some(&stale)));
                    assert!(!learner.accepts(Some(&fresh)) && !learner.accepts(Some(&garbage)));
                }
                _ => {
                    assert!(!learner.accepts(Some(&stale)) && !learner.accepts(None), "{path}");
                    assert!(!handler.grpc_type().is_empty());
                }
            }
        }
    }
}
