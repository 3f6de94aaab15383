//! The operations that a server can be sent, and its answers in a form that can be compared.

use metastore::proto::{
    etcdserverpb::{
        AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DefragmentRequest, DefragmentResponse,
        DeleteRangeRequest, DeleteRangeResponse, DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse,
        LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
        LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
        MemberListRequest, MemberListResponse, MoveLeaderRequest, MoveLeaderResponse, PutRequest, PutResponse,
        RangeRequest, RangeResponse, ResponseHeader, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
        cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
        maintenance_client::MaintenanceClient,
    },
    v3electionpb::{
        CampaignRequest, CampaignResponse, LeaderRequest, LeaderResponse, ProclaimRequest, ProclaimResponse,
        ResignRequest, ResignResponse, election_client::ElectionClient,
    },
    v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse, lock_client::LockClient},
};
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// What calls show, if they are made as a user.
#[derive(Debug, Clone, Default)]
pub struct Token(pub Option<MetadataValue<Ascii>>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("token", token.clone());
        }
        Ok(request)
    }
}

/// A connection, used as one user.
pub type Caller = InterceptedService<Channel, Token>;

/// A request to a server.
#[derive(Debug, Clone)]
pub enum Operation {
    Range(RangeRequest),
    /// All parts of the stream, merged.
    RangeStream(RangeRequest),
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    HashKv(HashKvRequest),
    LeaseGrant(LeaseGrantRequest),
    LeaseRevoke(LeaseRevokeRequest),
    /// One request on a stream of its own.
    LeaseKeepAlive(LeaseKeepAliveRequest),
    LeaseTimeToLive(LeaseTimeToLiveRequest),
    LeaseLeases,
    Alarm(AlarmRequest),
    Status,
    MemberList(MemberListRequest),
    MoveLeader(MoveLeaderRequest),
    Downgrade(DowngradeRequest),
    Defragment,
    Lock(LockRequest),
    Unlock(UnlockRequest),
    Campaign(CampaignRequest),
    Proclaim(ProclaimRequest),
    Leader(LeaderRequest),
    /// The first response of the stream.
    Observe(LeaderRequest),
    Resign(ResignRequest),
}

/// The answer of a server.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Range(RangeResponse),
    Put(PutResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    Compact(CompactionResponse),
    HashKv(HashKvResponse),
    LeaseGrant(LeaseGrantResponse),
    LeaseRevoke(LeaseRevokeResponse),
    LeaseKeepAlive(Option<LeaseKeepAliveResponse>),
    LeaseTimeToLive(LeaseTimeToLiveResponse),
    LeaseLeases(LeaseLeasesResponse),
    Alarm(AlarmResponse),
    Status(StatusResponse),
    MemberList(MemberListResponse),
    MoveLeader(MoveLeaderResponse),
    Downgrade(DowngradeResponse),
    Defragment(DefragmentResponse),
    Lock(LockResponse),
    Unlock(UnlockResponse),
    Campaign(CampaignResponse),
    Proclaim(ProclaimResponse),
    Leader(LeaderResponse),
    Observe(Option<LeaderResponse>),
    Resign(ResignResponse),
    Refused(Code, String),
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        Self::Refused(status.code(), status.message().to_owned())
    }
}

impl Answer {
    /// The revision of the header.
    pub fn revision(&self) -> Option<i64> {
        let header: &Option<ResponseHeader> = match self {
            Self::Range(answer) => &answer.header,
            Self::Put(answer) => &answer.header,
            Self::DeleteRange(answer) => &answer.header,
            Self::Txn(answer) => &answer.header,
            Self::LeaseRevoke(answer) => &answer.header,
            _ => &None,
        };
        header.map(|header| header.revision)
    }
}

/// The clients of one server.
#[derive(Clone)]
pub struct Clients {
    kv: KvClient<Caller>,
    lease: LeaseClient<Caller>,
    cluster: ClusterClient<Caller>,
    maintenance: MaintenanceClient<Caller>,
    lock: LockClient<Caller>,
    election: ElectionClient<Caller>,
}

impl Clients {
    pub fn new(channel: &Channel, token: &Token) -> Self {
        Self {
            kv: KvClient::with_interceptor(channel.clone(), token.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::with_interceptor(channel.clone(), token.clone()),
            cluster: ClusterClient::with_interceptor(channel.clone(), token.clone()),
            maintenance: MaintenanceClient::with_interceptor(channel.clone(), token.clone()),
            lock: LockClient::with_interceptor(channel.clone(), token.clone()),
            election: ElectionClient::with_interceptor(channel.clone(), token.clone()),
        }
    }

    /// Sends an operation, and removes from the answer what may differ between two servers.
    pub async fn ask(&self, operation: &Operation) -> Answer {
        let mut answer = self.call(operation.clone()).await.unwrap_or_else(Answer::from);
        normalize(&mut answer);
        answer
    }

    /// The stream of the leaders of an election.
    pub async fn observe(&self, name: &'static str) -> Streaming<LeaderResponse> {
        self.election.clone().observe(LeaderRequest { name: name.into() }).await.unwrap().into_inner()
    }

    async fn call(&self, operation: Operation) -> Result<Answer, Status> {
        let (mut kv, mut lease) = (self.kv.clone(), self.lease.clone());
        let (mut cluster, mut maintenance) = (self.cluster.clone(), self.maintenance.clone());
        let (mut lock, mut election) = (self.lock.clone(), self.election.clone());
        Ok(match operation {
            Operation::Range(request) => Answer::Range(kv.range(request).await?.into_inner()),
            Operation::RangeStream(request) => Answer::Range(merged(kv, request).await?),
            Operation::Put(request) => Answer::Put(kv.put(request).await?.into_inner()),
            Operation::DeleteRange(request) => Answer::DeleteRange(kv.delete_range(request).await?.into_inner()),
            Operation::Txn(request) => Answer::Txn(kv.txn(request).await?.into_inner()),
            Operation::Compact(request) => Answer::Compact(kv.compact(request).await?.into_inner()),
            Operation::HashKv(request) => Answer::HashKv(maintenance.hash_kv(request).await?.into_inner()),
            Operation::LeaseGrant(request) => Answer::LeaseGrant(lease.lease_grant(request).await?.into_inner()),
            Operation::LeaseRevoke(request) => Answer::LeaseRevoke(lease.lease_revoke(request).await?.into_inner()),
            Operation::LeaseKeepAlive(request) => {
                let mut answers = lease.lease_keep_alive(tokio_stream::once(request)).await?.into_inner();
                Answer::LeaseKeepAlive(answers.message().await?)
            }
            Operation::LeaseTimeToLive(request) => {
                Answer::LeaseTimeToLive(lease.lease_time_to_live(request).await?.into_inner())
            }
            Operation::LeaseLeases => {
                Answer::LeaseLeases(lease.lease_leases(LeaseLeasesRequest {}).await?.into_inner())
            }
            Operation::Alarm(request) => Answer::Alarm(maintenance.alarm(request).await?.into_inner()),
            Operation::Status => Answer::Status(maintenance.status(StatusRequest {}).await?.into_inner()),
            Operation::MemberList(request) => Answer::MemberList(cluster.member_list(request).await?.into_inner()),
            Operation::MoveLeader(request) => Answer::MoveLeader(maintenance.move_leader(request).await?.into_inner()),
            Operation::Downgrade(request) => Answer::Downgrade(maintenance.downgrade(request).await?.into_inner()),
            Operation::Lock(request) => Answer::Lock(lock.lock(request).await?.into_inner()),
            Operation::Unlock(request) => Answer::Unlock(lock.unlock(request).await?.into_inner()),
            Operation::Campaign(request) => Answer::Campaign(election.campaign(request).await?.into_inner()),
            Operation::Proclaim(request) => Answer::Proclaim(election.proclaim(request).await?.into_inner()),
            Operation::Leader(request) => Answer::Leader(election.leader(request).await?.into_inner()),
            Operation::Observe(request) => {
                Answer::Observe(election.observe(request).await?.into_inner().message().await?)
            }
            Operation::Resign(request) => Answer::Resign(election.resign(request).await?.into_inner()),
            Operation::Defragment => {
                Answer::Defragment(maintenance.defragment(DefragmentRequest {}).await?.into_inner())
            }
        })
    }
}

/// Merges the parts of a streamed range; only the last part may contain more than keys.
async fn merged(mut kv: KvClient<Caller>, request: RangeRequest) -> Result<RangeResponse, Status> {
    let mut parts = kv.range_stream(request).await?.into_inner();
    let mut whole = RangeResponse::default();
    while let Some(part) = parts.message().await? {
        let part = part.range_response.expect("a part has a response");
        assert!(whole.header.is_none(), "a part came after the one with the header");
        assert!(part.header.is_some() || (!part.more && part.count == 0), "only the last part has a count: {part:?}");
        whole.header = part.header;
        (whole.more, whole.count) = (part.more, part.count);
        whole.kvs.extend(part.kvs);
    }
    Ok(whole)
}

/// Removes what depends on timing or on the implementation, and sorts what has no defined order.
fn normalize(answer: &mut Answer) {
    match answer {
        Answer::Status(status) => {
            assert!(status.db_size > 0 && status.db_size_in_use > 0, "a size is missing: {status:?}");
            assert!(status.raft_index >= status.raft_applied_index, "applied before it was committed: {status:?}");
            (status.db_size, status.db_size_in_use) = (0, 0);
            (status.raft_index, status.raft_applied_index) = (0, 0);
            status.errors.sort();
            // etcd puts one space or two between fields, depending on its build.
            for error in &mut status.errors {
                *error = error.replace("  ", " ");
            }
        }
        Answer::Alarm(answer) => answer.alarms.sort_by_key(|alarm| (alarm.member_id, alarm.alarm)),
        Answer::LeaseLeases(answer) => answer.leases.sort_by_key(|lease| lease.id),
        Answer::LeaseTimeToLive(answer) => {
            answer.keys.sort();
            // Time passes between the two requests, and after a restart a lease has an election timeout more.
            if answer.granted_ttl > 0 && (answer.ttl - answer.granted_ttl).abs() <= 60 {
                answer.ttl = answer.granted_ttl;
            }
        }
        _ => {}
    }
}
