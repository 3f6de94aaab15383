//! The handlers of unary methods.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use prost::Message;

use super::{Grpc, caller, decode, decode_txn, header::Header, not_implemented};
use crate::{
    error::Error,
    mvcc::compact::KeyHash,
    proto::{
        etcdserverpb::{
            AlarmRequest, AlarmResponse, AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest,
            AuthRoleDeleteRequest, AuthRoleGetRequest, AuthRoleGetResponse, AuthRoleGrantPermissionRequest,
            AuthRoleListRequest, AuthRoleListResponse, AuthRoleRevokePermissionRequest, AuthStatusRequest,
            AuthStatusResponse, AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest,
            AuthUserGetRequest, AuthUserGetResponse, AuthUserGrantRoleRequest, AuthUserListRequest,
            AuthUserListResponse, AuthUserRevokeRoleRequest, AuthenticateRequest, CompactionRequest, DefragmentRequest,
            DefragmentResponse, DeleteRangeRequest, DowngradeInfo, DowngradeRequest, HashKvRequest, HashKvResponse,
            HashRequest, HashResponse, LeaseGrantRequest, LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest,
            LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, Member, MemberAddRequest, MemberListRequest,
            MemberListResponse, MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberUpdateRequest,
            MoveLeaderRequest, MoveLeaderResponse, PutRequest, RangeRequest, StatusRequest, StatusResponse,
        },
        health::{
            HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
            health_check_response::ServingStatus,
        },
    },
    service::{
        Caller, Operation, Request,
        auth::{AuthStatus, Names, RolePermissions},
        cluster::PromoteOutcome,
        kv::RangeOutcome,
        lease::{LeaseInfo, LeaseList},
        maintenance::{AlarmList, AlarmOutcome, StatusOutcome, alarm_text},
    },
    version::{ETCD_VERSION, STORAGE_VERSION},
};
use http2::call::{Call, CallError, Code, Reply};

/// Decodes a call's message and passes it on, or answers that it cannot be decoded.
fn decoded<M: Message + Default>(call: Call, reply: Reply, handle: impl FnOnce(Caller, M, Reply)) {
    match decode(call.message) {
        Ok(request) => handle(caller(call.metadata), request, reply),
        Err(error) => reply.answer(Err(error.into())),
    }
}

/// The same for a request that goes into the log as the client encoded it.
fn decoded_with_raw<M: Message + Default>(call: Call, reply: Reply, handle: impl FnOnce(Caller, Request<M>, Reply)) {
    match decode(call.message.clone()) {
        Ok(parsed) => handle(caller(call.metadata), Request { parsed, raw: call.message }, reply),
        Err(error) => reply.answer(Err(error.into())),
    }
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// `KV`.
impl Grpc {
    pub fn range(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: RangeRequest, reply| {
            let reply = self.reply(reply, |header: &Header, found: RangeOutcome| header.rows(&found.rows, found.head));
            self.service.range(&caller, request, reply);
        });
    }

    pub fn put(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<PutRequest>, reply| {
            self.service.put(&caller, request, self.command_reply(reply));
        });
    }

    pub fn delete_range(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<DeleteRangeRequest>, reply| {
            self.service.delete_range(&caller, request, self.command_reply(reply));
        });
    }

    pub fn txn(self: &Arc<Self>, call: Call, reply: Reply) {
        match decode_txn(call.message.clone(), &self.service.limits) {
            Ok(parsed) => {
                let request = Request { parsed, raw: call.message };
                self.service.txn(&caller(call.metadata), request, self.command_reply(reply));
            }
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    pub fn compact(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<CompactionRequest>, reply| {
            self.service.compact(&caller, request, self.command_reply(reply));
        });
    }
}

/// `Lease`.
impl Grpc {
    pub fn lease_grant(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: LeaseGrantRequest, reply| {
            self.service.lease_grant(&caller, request, self.command_reply(reply));
        });
    }

    pub fn lease_revoke(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<LeaseRevokeRequest>, reply| {
            self.service.lease_revoke(&caller, request, self.command_reply(reply));
        });
    }

    pub fn lease_time_to_live(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: LeaseTimeToLiveRequest, reply| {
            let reply = self.reply(reply, |header: &Header, info: LeaseInfo| {
                encode(&LeaseTimeToLiveResponse { header: Some(header.at(info.head)), ..info.lease })
            });
            self.service.lease_time_to_live(&caller, request, reply);
        });
    }

    pub fn lease_leases(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: LeaseLeasesRequest, reply| {
            let reply = self.reply(reply, |header: &Header, list: LeaseList| {
                let leases = list.leases.into_iter().map(|id| LeaseStatus { id: id.0 }).collect();
                encode(&LeaseLeasesResponse { header: Some(header.at(list.head)), leases })
            });
            self.service.lease_leases(&caller, reply);
        });
    }
}

/// `Cluster`. The headers of these responses have no revision.
impl Grpc {
    pub fn member_list(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: MemberListRequest, reply| {
            let reply = self.reply(reply, |header: &Header, members: Vec<Member>| {
                encode(&MemberListResponse { header: Some(header.at(0)), members })
            });
            self.service.member_list(&caller, request.linearizable, reply);
        });
    }

    pub fn member_add(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: MemberAddRequest, reply| {
            self.service.member_add(&caller, request, self.command_reply(reply));
        });
    }

    pub fn member_remove(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<MemberRemoveRequest>, reply| {
            self.service.member_remove(&caller, request, self.command_reply(reply));
        });
    }

    pub fn member_update(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<MemberUpdateRequest>, reply| {
            self.service.member_update(&caller, request, self.command_reply(reply));
        });
    }

    pub fn member_promote(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: MemberPromoteRequest, reply| {
            let reply = self.reply(reply, |header: &Header, promoted: PromoteOutcome| match promoted {
                PromoteOutcome::Here(outcome) => header.with_body(outcome.revision, &outcome.body),
                PromoteOutcome::ByLeader(members) => {
                    encode(&MemberPromoteResponse { header: Some(header.at(0)), members })
                }
            });
            self.service.member_promote(&caller, request.id, reply);
        });
    }
}

/// `Maintenance`.
impl Grpc {
    pub fn status(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: StatusRequest, reply| {
            self.service.status(&caller, self.reply(reply, encode_status));
        });
    }

    pub fn alarm(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AlarmRequest>, reply| {
            let reply = self.reply(reply, |header: &Header, outcome: AlarmOutcome| match outcome {
                AlarmOutcome::List(AlarmList { head, alarms }) => {
                    encode(&AlarmResponse { header: Some(header.at(head)), alarms })
                }
                AlarmOutcome::Changed(outcome) => header.with_body(outcome.revision, &outcome.body),
            });
            self.service.alarm(&caller, request, reply);
        });
    }

    pub fn hash_kv(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: HashKvRequest, reply| {
            let reply = self.reply(reply, |header: &Header, hash: KeyHash| {
                encode(&HashKvResponse {
                    header: Some(header.at(hash.head)),
                    hash: hash.hash,
                    compact_revision: hash.compact_revision,
                    hash_revision: hash.hash_revision,
                })
            });
            self.service.hash_kv(&caller, request.revision, reply);
        });
    }

    pub fn hash(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: HashRequest, reply| {
            let reply = self.reply(reply, |header: &Header, (head, hash): (i64, u32)| {
                encode(&HashResponse { header: Some(header.at(head)), hash })
            });
            self.service.hash(&caller, reply);
        });
    }

    pub fn defragment(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: DefragmentRequest, reply| {
            let reply = self.reply(reply, |_: &Header, ()| encode(&DefragmentResponse::default()));
            self.service.defragment(&caller, reply);
        });
    }

    pub fn move_leader(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: MoveLeaderRequest, reply| {
            let reply = self.reply(reply, |_: &Header, ()| encode(&MoveLeaderResponse::default()));
            self.service.move_leader(&caller, request.target_id, reply);
        });
    }

    pub fn downgrade(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: DowngradeRequest, reply| {
            let error = self.service.admit(&caller, &Operation::Downgrade).err();
            let not_yet = not_implemented("this version of metastore cannot be downgraded yet");
            reply.answer(Err(error.map_or(not_yet, Into::into)));
        });
    }
}

/// `Auth`.
impl Grpc {
    pub fn auth_enable(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthEnableRequest>, reply| {
            self.service.auth_enable(&caller, request, self.command_reply(reply));
        });
    }

    pub fn auth_disable(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthDisableRequest>, reply| {
            self.service.auth_disable(&caller, request, self.command_reply(reply));
        });
    }

    pub fn auth_status(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: AuthStatusRequest, reply| {
            let reply = self.reply(reply, |header: &Header, status: AuthStatus| {
                let AuthStatus { head, enabled, auth_revision } = status;
                encode(&AuthStatusResponse { header: Some(header.at(head)), enabled, auth_revision })
            });
            self.service.auth_status(&caller, reply);
        });
    }

    pub fn authenticate(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: AuthenticateRequest, reply| {
            self.service.authenticate(&caller, request, self.command_reply(reply));
        });
    }

    pub fn user_add(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: AuthUserAddRequest, reply| {
            self.service.user_add(&caller, request, self.command_reply(reply));
        });
    }

    pub fn user_get(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: AuthUserGetRequest, reply| {
            let reply = self.reply(reply, |header: &Header, Names { head, names }: Names| {
                encode(&AuthUserGetResponse { header: Some(header.at(head)), roles: names })
            });
            self.service.user_get(&caller, request.name, reply);
        });
    }

    pub fn user_list(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: AuthUserListRequest, reply| {
            let reply = self.reply(reply, |header: &Header, Names { head, names }: Names| {
                encode(&AuthUserListResponse { header: Some(header.at(head)), users: names })
            });
            self.service.user_list(&caller, reply);
        });
    }

    pub fn user_delete(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthUserDeleteRequest>, reply| {
            self.service.user_delete(&caller, request, self.command_reply(reply));
        });
    }

    pub fn user_change_password(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: AuthUserChangePasswordRequest, reply| {
            self.service.user_change_password(&caller, request, self.command_reply(reply));
        });
    }

    pub fn user_grant_role(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthUserGrantRoleRequest>, reply| {
            self.service.user_grant_role(&caller, request, self.command_reply(reply));
        });
    }

    pub fn user_revoke_role(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthUserRevokeRoleRequest>, reply| {
            self.service.user_revoke_role(&caller, request, self.command_reply(reply));
        });
    }

    pub fn role_add(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthRoleAddRequest>, reply| {
            self.service.role_add(&caller, request, self.command_reply(reply));
        });
    }

    pub fn role_get(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: AuthRoleGetRequest, reply| {
            let reply = self.reply(reply, |header: &Header, role: RolePermissions| {
                encode(&AuthRoleGetResponse { header: Some(header.at(role.head)), perm: role.permissions })
            });
            self.service.role_get(&caller, request.role, reply);
        });
    }

    pub fn role_list(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: AuthRoleListRequest, reply| {
            let reply = self.reply(reply, |header: &Header, Names { head, names }: Names| {
                encode(&AuthRoleListResponse { header: Some(header.at(head)), roles: names })
            });
            self.service.role_list(&caller, reply);
        });
    }

    pub fn role_delete(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthRoleDeleteRequest>, reply| {
            self.service.role_delete(&caller, request, self.command_reply(reply));
        });
    }

    pub fn role_grant_permission(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthRoleGrantPermissionRequest>, reply| {
            self.service.role_grant_permission(&caller, request, self.command_reply(reply));
        });
    }

    pub fn role_revoke_permission(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded_with_raw(call, reply, |caller, request: Request<AuthRoleRevokePermissionRequest>, reply| {
            self.service.role_revoke_permission(&caller, request, self.command_reply(reply));
        });
    }
}

/// gRPC's health checking. Only the server as a whole has a name, the empty one, and it serves for as long as it can answer at
/// all. The state of the cluster is what `/health` reports.
impl Grpc {
    pub fn health_check(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, request: HealthCheckRequest, reply| {
            let unknown = || CallError { code: Code::NotFound, message: "unknown service".into() };
            reply.answer(match self.service.admit(&caller, &Operation::Health) {
                Ok(_) if request.service.is_empty() => Ok(encode(&serving())),
                Ok(_) => Err(unknown()),
                Err(error) => Err(error.into()),
            });
        });
    }

    pub fn health_list(self: &Arc<Self>, call: Call, reply: Reply) {
        decoded(call, reply, |caller, _: HealthListRequest, reply| {
            let statuses = HashMap::from([(String::new(), serving())]);
            let admitted = self.service.admit(&caller, &Operation::Health);
            reply.answer(admitted.map(|_| encode(&HealthListResponse { statuses })).map_err(Into::into));
        });
    }
}

pub(super) fn serving() -> HealthCheckResponse {
    HealthCheckResponse { status: ServingStatus::Serving as i32 }
}

fn encode_status(header: &Header, status: StatusOutcome) -> Bytes {
    let no_leader = (status.leader == 0).then(|| Error::NoLeader.to_string());
    let header = header.at(status.head);
    encode(&StatusResponse {
        version: ETCD_VERSION.to_owned(),
        db_size: status.db_size_bytes,
        leader: status.leader,
        raft_index: status.committed_index,
        raft_term: header.raft_term,
        raft_applied_index: status.applied_index,
        errors: no_leader.into_iter().chain(status.alarms.iter().map(alarm_text)).collect(),
        db_size_in_use: status.db_in_use_bytes,
        is_learner: status.is_learner,
        storage_version: STORAGE_VERSION.to_owned(),
        db_size_quota: status.quota_bytes,
        downgrade_info: Some(DowngradeInfo::default()),
        header: Some(header),
    })
}
