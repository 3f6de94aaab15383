//! One operation, asked of one server, and the answer in a form that can be compared.

use metastore::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DefragmentRequest, DefragmentResponse,
    DeleteRangeRequest, DeleteRangeResponse, DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
    MemberListRequest, MemberListResponse, MoveLeaderRequest, MoveLeaderResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, ResponseHeader, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
    cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
    maintenance_client::MaintenanceClient,
};
use tonic::{Code, Status, transport::Channel};

/// What a server can be asked in one call.
#[derive(Debug, Clone)]
pub enum Operation {
    Range(RangeRequest),
    /// All parts, merged.
    RangeStream(RangeRequest),
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    HashKv(HashKvRequest),
    LeaseGrant(LeaseGrantRequest),
    LeaseRevoke(LeaseRevokeRequest),
    /// One round on a stream of its own.
    LeaseKeepAlive(LeaseKeepAliveRequest),
    LeaseTimeToLive(LeaseTimeToLiveRequest),
    LeaseLeases,
    Alarm(AlarmRequest),
    Status,
    MemberList(MemberListRequest),
    MoveLeader(MoveLeaderRequest),
    Downgrade(DowngradeRequest),
    Defragment,
}

/// What a server said.
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
    kv: KvClient<Channel>,
    lease: LeaseClient<Channel>,
    cluster: ClusterClient<Channel>,
    maintenance: MaintenanceClient<Channel>,
}

impl Clients {
    pub fn new(channel: &Channel) -> Self {
        Self {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(channel.clone()),
            cluster: ClusterClient::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel.clone()),
        }
    }

    /// Asks, and takes from the answer what two servers need not agree on.
    pub async fn ask(&self, operation: &Operation) -> Answer {
        let mut answer = self.call(operation.clone()).await.unwrap_or_else(Answer::from);
        settle(&mut answer);
        answer
    }

    async fn call(&self, operation: Operation) -> Result<Answer, Status> {
        let (mut kv, mut lease) = (self.kv.clone(), self.lease.clone());
        let (mut cluster, mut maintenance) = (self.cluster.clone(), self.maintenance.clone());
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
            Operation::Defragment => {
                Answer::Defragment(maintenance.defragment(DefragmentRequest {}).await?.into_inner())
            }
        })
    }
}

/// The parts of a streamed range put together; only the last one may say more than keys.
async fn merged(mut kv: KvClient<Channel>, request: RangeRequest) -> Result<RangeResponse, Status> {
    let mut parts = kv.range_stream(request).await?.into_inner();
    let mut whole = RangeResponse::default();
    while let Some(part) = parts.message().await? {
        let part = part.range_response.expect("a part has a response");
        assert!(whole.header.is_none(), "a part came after the one with the header");
        assert!(part.header.is_some() || (!part.more && part.count == 0), "only the last part counts: {part:?}");
        whole.header = part.header;
        (whole.more, whole.count) = (part.more, part.count);
        whole.kvs.extend(part.kvs);
    }
    Ok(whole)
}

/// Takes out what depends on the moment or on how a server is built, and orders what has no order.
fn settle(answer: &mut Answer) {
    match answer {
        Answer::Status(status) => {
            assert!(status.db_size > 0 && status.db_size_in_use > 0, "a size is missing: {status:?}");
            assert!(status.raft_index >= status.raft_applied_index, "applied before it was agreed on: {status:?}");
            (status.db_size, status.db_size_in_use) = (0, 0);
            (status.raft_index, status.raft_applied_index) = (0, 0);
            status.errors.sort();
            // etcd puts one blank or two between fields, at the whim of its build.
            for error in &mut status.errors {
                *error = error.replace("  ", " ");
            }
        }
        Answer::Alarm(answer) => answer.alarms.sort_by_key(|alarm| (alarm.member_id, alarm.alarm)),
        Answer::LeaseLeases(answer) => answer.leases.sort_by_key(|lease| lease.id),
        Answer::LeaseTimeToLive(answer) => {
            answer.keys.sort();
            // Time passes between the two questions, and after a restart a lease has an election timeout more.
            if answer.granted_ttl > 0 && (answer.ttl - answer.granted_ttl).abs() <= 60 {
                answer.ttl = answer.granted_ttl;
            }
        }
        _ => {}
    }
}
