//! The method table: maps a path to a handler, and counts the calls of each method.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prometheus::{Histogram, IntCounter};

use super::{
    Grpc, requires_leader,
    status::CODES,
    streams::{RequiresLeader, SingleRequest},
};
use crate::{
    error::Error,
    metrics::{self, METRICS},
};
use http2::{
    call::{Call, CallError, CallResult, Code, Conversation, Metadata, Reply, Step, StreamIo},
    service::{Method, Shape},
};

/// The path of the only method that tonic implements, with either HTTP/2 server.
pub const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// Handles a unary call.
pub type UnaryHandler = fn(&Arc<Grpc>, Call, Reply);
/// Begins a conversation.
pub type StreamOpener = fn(&Arc<Grpc>, Metadata) -> Result<Box<dyn Conversation>, CallError>;

/// How a method is answered.
#[derive(Clone, Copy)]
pub enum Handler {
    /// One request, one response.
    Unary(UnaryHandler),
    /// One request, one response, which may take long: a conversation, because that is dropped when the call is canceled. To
    /// clients it is an ordinary unary call.
    CancellableUnary(StreamOpener),
    /// One request, many responses.
    ServerStream(StreamOpener),
    /// Many requests, many responses.
    Bidirectional(StreamOpener),
}

impl Handler {
    fn is_unary(self) -> bool {
        matches!(self, Self::Unary(_) | Self::CancellableUnary(_))
    }

    fn grpc_type(self) -> &'static str {
        match self {
            Self::Unary(_) | Self::CancellableUnary(_) => "unary",
            Self::ServerStream(_) => "server_stream",
            Self::Bidirectional(_) => "bidi_stream",
        }
    }
}

/// One method: its handler and its metrics.
pub struct GrpcMethod {
    grpc: Arc<Grpc>,
    /// `/service/method`.
    path: &'static str,
    handler: Handler,
    started: IntCounter,
    received: IntCounter,
    sent: IntCounter,
    handled: [IntCounter; CODES.len()],
    /// With `--metrics=extensive`: how long the calls take.
    seconds: Option<Histogram>,
}

impl GrpcMethod {
    fn new(grpc: Arc<Grpc>, path: &'static str, handler: Handler) -> Self {
        let (service, name) = path[1..].split_once('/').expect("paths are /service/method");
        let labels = [handler.grpc_type(), service, name];
        let with_code = |code| METRICS.handled.with_label_values(&[labels[0], service, name, code]);
        Self {
            grpc,
            path,
            handler,
            started: METRICS.started.with_label_values(&labels),
            received: METRICS.received.with_label_values(&labels),
            sent: METRICS.sent.with_label_values(&labels),
            handled: CODES.map(with_code),
            seconds: metrics::call_seconds(&labels),
        }
    }

    /// Counts a call by the API version that its client states, as etcd does: unless it is refused because there is no leader,
    /// or because this member is a learner.
    fn count_client(&self, metadata: &Metadata) {
        thread_local! {
            /// The version of the last stream and of the last unary call, and its counter: nearly all clients state the same.
            static LAST: RefCell<[Option<(Bytes, IntCounter)>; 2]> = const { RefCell::new([None, None]) };
        }
        let status = self.grpc.service.node().status();
        let lacks_leader = || requires_leader(metadata.fields[0].as_ref()) && status.leader() == 0;
        if status.is_learner() && !SERVED_BY_LEARNERS.contains(&self.path) || lacks_leader() {
            return;
        }
        let [.., version] = &metadata.fields;
        let version = version.as_deref().unwrap_or_default();
        let is_unary = self.handler.is_unary();
        LAST.with_borrow_mut(|last| {
            let last = &mut last[usize::from(is_unary)];
            if let Some((known, counter)) = last
                && known == version
            {
                return counter.inc();
            }
            let kind = if is_unary { "unary" } else { "stream" };
            let counter = metrics::client_requests(kind, std::str::from_utf8(version).unwrap_or_default());
            counter.inc();
            *last = Some((Bytes::copy_from_slice(version), counter));
        });
    }

    fn observe(&self, spent: Duration) {
        if let Some(seconds) = &self.seconds {
            seconds.observe(spent.as_secs_f64());
        }
    }
}

/// The methods that a learner serves.
const SERVED_BY_LEARNERS: [&str; 3] =
    ["/etcdserverpb.KV/Range", "/etcdserverpb.Maintenance/Status", "/etcdserverpb.Maintenance/Snapshot"];

/// A conversation that is measured until it is dropped.
struct Measured {
    conversation: Box<dyn Conversation>,
    since: Instant,
    seconds: Histogram,
}

impl Conversation for Measured {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        self.conversation.step(line)
    }

    fn held_bytes(&self) -> usize {
        self.conversation.held_bytes()
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.seconds.observe(self.since.elapsed().as_secs_f64());
    }
}

/// The one check of metadata that is gRPC's alone.
fn check_metadata(metadata: &Metadata) -> Result<(), Error> {
    let [.., version] = &metadata.fields;
    if std::str::from_utf8(version.as_deref().unwrap_or_default()).is_ok() {
        Ok(())
    } else {
        Err(Error::InvalidClientApiVersion)
    }
}

impl Method for GrpcMethod {
    fn shape(&self) -> Shape {
        match self.handler {
            Handler::Unary(_) => Shape::Unary,
            Handler::CancellableUnary(_) | Handler::ServerStream(_) | Handler::Bidirectional(_) => Shape::Stream,
        }
    }

    fn is_unary(&self) -> bool {
        self.handler.is_unary()
    }

    fn call(&self, call: Call, reply: Reply) {
        let Handler::Unary(handler) = self.handler else { return };
        match check_metadata(&call.metadata) {
            Ok(()) => {
                self.count_client(&call.metadata);
                handler(&self.grpc, call, reply);
            }
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// A stream that requires a leader ends soon after the leader is lost; for a unary method that is checked at the beginning
    /// only.
    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        check_metadata(&metadata)?;
        self.count_client(&metadata);
        let requires_leader = requires_leader(metadata.fields[0].as_ref()) && !self.handler.is_unary();
        let conversation = match self.handler {
            Handler::CancellableUnary(open) | Handler::Bidirectional(open) => open(&self.grpc, metadata)?,
            Handler::ServerStream(open) => Box::new(SingleRequest::new(open(&self.grpc, metadata)?)),
            Handler::Unary(_) => {
                return Err(CallError { code: Code::Internal, message: "a unary call is no stream".into() });
            }
        };
        let conversation: Box<dyn Conversation> = match &self.seconds {
            Some(seconds) => Box::new(Measured { conversation, since: Instant::now(), seconds: seconds.clone() }),
            None => conversation,
        };
        Ok(if requires_leader {
            Box::new(RequiresLeader::new(conversation, self.grpc.service.leader_watch.register()))
        } else {
            conversation
        })
    }

    fn started(&self) {
        self.started.inc();
    }

    fn received(&self, bytes: usize) {
        self.received.inc();
        METRICS.client_received_bytes.inc_by(bytes as u64);
    }

    fn sent(&self, bytes: usize) {
        self.sent.inc();
        METRICS.client_sent_bytes.inc_by(bytes as u64);
    }

    fn handled(&self, code: Code) {
        self.handled[code as usize].inc();
    }

    fn answered(&self, spent: Duration, request_bytes: usize, answer: &CallResult) {
        let response_bytes = answer.as_ref().map_or(0, Bytes::len);
        self.observe(spent);
        self.grpc.service.thresholds.note_call(self.path, spent, request_bytes, response_bytes);
        match answer {
            Ok(message) => {
                self.sent(message.len());
                self.handled(Code::Ok);
            }
            Err(error) => self.handled(error.code),
        }
    }
}

const METHODS: &[(&str, Handler)] = &[
    ("/etcdserverpb.KV/Range", Handler::Unary(Grpc::range)),
    ("/etcdserverpb.KV/RangeStream", Handler::ServerStream(Grpc::range_stream)),
    ("/etcdserverpb.KV/Put", Handler::Unary(Grpc::put)),
    ("/etcdserverpb.KV/DeleteRange", Handler::Unary(Grpc::delete_range)),
    ("/etcdserverpb.KV/Txn", Handler::Unary(Grpc::txn)),
    ("/etcdserverpb.KV/Compact", Handler::Unary(Grpc::compact)),
    ("/etcdserverpb.Watch/Watch", Handler::Bidirectional(Grpc::watch)),
    ("/etcdserverpb.Lease/LeaseGrant", Handler::Unary(Grpc::lease_grant)),
    ("/etcdserverpb.Lease/LeaseRevoke", Handler::Unary(Grpc::lease_revoke)),
    ("/etcdserverpb.Lease/LeaseKeepAlive", Handler::Bidirectional(Grpc::lease_keep_alive)),
    ("/etcdserverpb.Lease/LeaseTimeToLive", Handler::Unary(Grpc::lease_time_to_live)),
    ("/etcdserverpb.Lease/LeaseLeases", Handler::Unary(Grpc::lease_leases)),
    ("/etcdserverpb.Auth/AuthEnable", Handler::Unary(Grpc::auth_enable)),
    ("/etcdserverpb.Auth/AuthDisable", Handler::Unary(Grpc::auth_disable)),
    ("/etcdserverpb.Auth/AuthStatus", Handler::Unary(Grpc::auth_status)),
    ("/etcdserverpb.Auth/Authenticate", Handler::Unary(Grpc::authenticate)),
    ("/etcdserverpb.Auth/UserAdd", Handler::Unary(Grpc::user_add)),
    ("/etcdserverpb.Auth/UserGet", Handler::Unary(Grpc::user_get)),
    ("/etcdserverpb.Auth/UserList", Handler::Unary(Grpc::user_list)),
    ("/etcdserverpb.Auth/UserDelete", Handler::Unary(Grpc::user_delete)),
    ("/etcdserverpb.Auth/UserChangePassword", Handler::Unary(Grpc::user_change_password)),
    ("/etcdserverpb.Auth/UserGrantRole", Handler::Unary(Grpc::user_grant_role)),
    ("/etcdserverpb.Auth/UserRevokeRole", Handler::Unary(Grpc::user_revoke_role)),
    ("/etcdserverpb.Auth/RoleAdd", Handler::Unary(Grpc::role_add)),
    ("/etcdserverpb.Auth/RoleGet", Handler::Unary(Grpc::role_get)),
    ("/etcdserverpb.Auth/RoleList", Handler::Unary(Grpc::role_list)),
    ("/etcdserverpb.Auth/RoleDelete", Handler::Unary(Grpc::role_delete)),
    ("/etcdserverpb.Auth/RoleGrantPermission", Handler::Unary(Grpc::role_grant_permission)),
    ("/etcdserverpb.Auth/RoleRevokePermission", Handler::Unary(Grpc::role_revoke_permission)),
    ("/etcdserverpb.Cluster/MemberAdd", Handler::Unary(Grpc::member_add)),
    ("/etcdserverpb.Cluster/MemberRemove", Handler::Unary(Grpc::member_remove)),
    ("/etcdserverpb.Cluster/MemberUpdate", Handler::Unary(Grpc::member_update)),
    ("/etcdserverpb.Cluster/MemberList", Handler::Unary(Grpc::member_list)),
    ("/etcdserverpb.Cluster/MemberPromote", Handler::Unary(Grpc::member_promote)),
    ("/v3lockpb.Lock/Lock", Handler::CancellableUnary(Grpc::lock)),
    ("/v3lockpb.Lock/Unlock", Handler::CancellableUnary(Grpc::unlock)),
    ("/v3electionpb.Election/Campaign", Handler::CancellableUnary(Grpc::campaign)),
    ("/v3electionpb.Election/Proclaim", Handler::CancellableUnary(Grpc::proclaim)),
    ("/v3electionpb.Election/Leader", Handler::CancellableUnary(Grpc::leader)),
    ("/v3electionpb.Election/Observe", Handler::ServerStream(Grpc::observe)),
    ("/v3electionpb.Election/Resign", Handler::CancellableUnary(Grpc::resign)),
    ("/etcdserverpb.Maintenance/Alarm", Handler::Unary(Grpc::alarm)),
    ("/etcdserverpb.Maintenance/Status", Handler::Unary(Grpc::status)),
    ("/etcdserverpb.Maintenance/Defragment", Handler::Unary(Grpc::defragment)),
    ("/etcdserverpb.Maintenance/Hash", Handler::Unary(Grpc::hash)),
    ("/etcdserverpb.Maintenance/HashKV", Handler::Unary(Grpc::hash_kv)),
    ("/etcdserverpb.Maintenance/Snapshot", Handler::ServerStream(Grpc::snapshot)),
    ("/etcdserverpb.Maintenance/MoveLeader", Handler::Unary(Grpc::move_leader)),
    ("/etcdserverpb.Maintenance/Downgrade", Handler::Unary(Grpc::downgrade)),
    ("/grpc.health.v1.Health/Check", Handler::Unary(Grpc::health_check)),
    ("/grpc.health.v1.Health/List", Handler::Unary(Grpc::health_list)),
    ("/grpc.health.v1.Health/Watch", Handler::ServerStream(Grpc::health_watch)),
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

/// All methods, by path.
pub struct MethodTable {
    methods: HashMap<&'static str, Arc<GrpcMethod>>,
}

impl MethodTable {
    #[must_use]
    pub fn new(grpc: &Arc<Grpc>) -> Self {
        let method = |&(path, handler)| (path, Arc::new(GrpcMethod::new(grpc.clone(), path, handler)));
        Self { methods: METHODS.iter().map(method).collect() }
    }

    /// The method at a path.
    #[must_use]
    pub fn find(&self, path: &str) -> Option<Arc<GrpcMethod>> {
        self.methods.get(path).cloned()
    }
}
