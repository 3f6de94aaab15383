//! Maintenance of one member: status, alarms, defragmentation, hashes, leadership transfer.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::{Api, decode, decode_streamed, halt_process, not_implemented, refuse};
use crate::{
    call::{Call, CallResult, Conversation, Metadata, Reply, Step, StreamIo},
    error::{Error, Halt},
    mvcc::read::ReadError,
    peer::Versions,
    proto::etcdserverpb::{
        AlarmMember, AlarmRequest, AlarmResponse, DefragmentRequest, DefragmentResponse, DowngradeInfo,
        DowngradeRequest, HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest,
        MoveLeaderResponse, SnapshotRequest, StatusRequest, StatusResponse, alarm_request::AlarmAction,
    },
    state::Kind,
    storage::Table,
    version::{ETCD_VERSION, STORAGE_VERSION},
};

impl Api {
    /// The versions that this member reports.
    #[must_use]
    pub fn versions(&self) -> Versions {
        let cluster = self.readers().cluster.read().cluster_version.clone();
        Versions {
            server: ETCD_VERSION.to_owned(),
            cluster: if cluster.is_empty() { "not_decided".to_owned() } else { cluster },
            storage: STORAGE_VERSION.to_owned(),
        }
    }

    /// `Maintenance/Status`: answered locally, without asking other members.
    pub fn status(self: &Arc<Self>, call: Call, reply: Reply) {
        if let Err(error) = decode::<StatusRequest>(call.message) {
            return reply.answer(Err(error.into()));
        }
        if let Err(halt) = self.node.measure() {
            halt_process(&halt);
        }
        let status = self.node.status();
        let cluster_state = self.readers().cluster.read().clone();
        let no_leader = (status.leader() == 0).then(|| Error::NoLeader.to_string());
        let alarms = cluster_state.alarms.list(0).into_iter().map(|alarm| alarm_text(&alarm));
        let header = self.header.at(self.readers().keys.head());
        let response = StatusResponse {
            version: ETCD_VERSION.to_owned(),
            db_size: status.total_bytes(),
            leader: status.leader(),
            raft_index: status.committed(),
            raft_term: header.raft_term,
            raft_applied_index: status.applied(),
            errors: no_leader.into_iter().chain(alarms).collect(),
            db_size_in_use: status.in_use_bytes(),
            is_learner: cluster_state.members.get(self.header.member_id()).is_some_and(|member| member.is_learner),
            storage_version: STORAGE_VERSION.to_owned(),
            db_size_quota: self.quota_bytes,
            downgrade_info: Some(DowngradeInfo::default()),
            header: Some(header),
        };
        reply.answer(encode(&response));
    }

    /// `Maintenance/Alarm`.
    pub fn alarm(self: &Arc<Self>, call: Call, reply: Reply) {
        match decode::<AlarmRequest>(call.message.clone()) {
            Ok(request) if AlarmAction::try_from(request.action).is_err() => {
                let text = format!("etcdserver: unknown alarm action {}: 0, 1 and 2 are known", request.action);
                reply.answer(Err(Error::Unknown(text).into()));
            }
            Ok(request) if request.action == AlarmAction::Get as i32 => self.list_alarms(request.alarm, reply),
            Ok(_) => self.propose(Kind::Alarm, &call.message, reply),
            Err(error) => reply.answer(Err(error.into())),
        }
    }

    /// Answers from the alarm table, with a linearizable read. (etcd proposes the request, so that a backlog refuses it, and
    /// liveness probes then restart members that are merely busy.)
    fn list_alarms(self: &Arc<Self>, alarm: i32, reply: Reply) {
        let api = self.clone();
        self.read(false, reply, move |reply| {
            let alarms = api.readers().cluster.read().alarms.list(alarm);
            let header = Some(api.header.at(api.readers().keys.head()));
            reply.answer(encode(&AlarmResponse { header, alarms }));
        });
    }

    /// `Maintenance/HashKV`.
    pub fn hash_kv(self: &Arc<Self>, call: Call, reply: Reply) {
        let request = match decode::<HashKvRequest>(call.message) {
            Ok(request) => request,
            Err(error) => return reply.answer(Err(error.into())),
        };
        let api = self.clone();
        self.pool.run(move || {
            let answer = api.readers().keys.hash_kv(request.revision).map_err(refuse).and_then(|hash| {
                encode(&HashKvResponse {
                    header: Some(api.header.at(hash.head)),
                    hash: hash.hash,
                    compact_revision: hash.compact_revision,
                    hash_revision: hash.hash_revision,
                })
            });
            reply.answer(answer);
        });
    }

    /// `Maintenance/Hash`.
    pub fn hash(self: &Arc<Self>, call: Call, reply: Reply) {
        if let Err(error) = decode::<HashRequest>(call.message) {
            return reply.answer(Err(error.into()));
        }
        let api = self.clone();
        self.pool.run(move || {
            let answer = api.hash_everything().map_err(|halt| refuse(ReadError::Halt(halt))).and_then(|hash| {
                encode(&HashResponse { header: Some(api.header.at(api.readers().keys.head())), hash })
            });
            reply.answer(answer);
        });
    }

    /// A checksum over the tables: each one's tag, then its keys and values.
    fn hash_everything(&self) -> Result<u32, Halt> {
        let mut crc = 0;
        for table in [Table::Alarm, Table::History, Table::Lease, Table::Member, Table::Removed] {
            crc = crc32c::crc32c_append(crc, &[table.tag()]);
            self.node.engine().scan(table, &[], &[], &mut |key, value| {
                crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, key), value);
                std::ops::ControlFlow::Continue(())
            })?;
        }
        Ok(crc)
    }

    /// `Maintenance/Defragment`: answers when removed data takes no space any more. Reads and writes continue meanwhile.
    pub fn defragment(self: &Arc<Self>, call: Call, reply: Reply) {
        if let Err(error) = decode::<DefragmentRequest>(call.message) {
            return reply.answer(Err(error.into()));
        }
        let api = self.clone();
        self.node.await_compaction(Box::new(move || {
            // On a thread of its own: this may take minutes, and the threads of the read pool are for reads.
            let defragment = move || match api.node.defragment() {
                Ok(None) => reply.answer(encode(&DefragmentResponse::default())),
                Ok(Some(lack)) => {
                    tracing::warn!(%lack, "failed to defragment");
                    reply.answer(Err(Error::Unknown(lack.to_string()).into()));
                }
                Err(halt) => halt_process(&halt),
            };
            std::thread::Builder::new().name("defragment".into()).spawn(defragment).map_or_else(
                |error| tracing::warn!(%error, "failed to start the defragmentation thread"),
                |_running| (),
            );
        }));
    }

    /// `Maintenance/MoveLeader`: answers when the other member leads. Trap 44: a member that does not lead fails with that error
    /// before it checks the target.
    pub fn move_leader(self: &Arc<Self>, call: Call, reply: Reply) {
        let target = match decode::<MoveLeaderRequest>(call.message) {
            Ok(request) => request.target_id,
            Err(error) => return reply.answer(Err(error.into())),
        };
        if !self.leads() {
            return reply.answer(Err(Error::NotLeader.into()));
        }
        if !self.readers().cluster.read().members.voters().any(|voter| voter.id == target) {
            return reply.answer(Err(Error::BadLeaderTransferee.into()));
        }
        if target == self.header.member_id() {
            return reply.answer(encode(&MoveLeaderResponse::default()));
        }
        let api = self.clone();
        self.company.runtime.spawn(async move {
            let (from, to) = (format!("{:x}", api.header.member_id()), format!("{target:x}"));
            tracing::info!({ "current-leader-member-id" = from, "transferee-member-id" = to }, "leadership transfer starting");
            // The client's own deadline may end the call sooner; this one only ends the waiting.
            let moved = api.move_leadership(target, |leader| leader == target).await;
            reply.answer(moved.map_err(Into::into).and_then(|()| encode(&MoveLeaderResponse::default())));
        });
    }

    /// `Maintenance/Snapshot`.
    pub fn snapshot(self: &Arc<Self>, _metadata: Metadata) -> Box<dyn Conversation> {
        Box::new(NotImplemented("this version of metastore cannot stream snapshots yet"))
    }

    /// `Maintenance/Downgrade`.
    pub fn downgrade(self: &Arc<Self>, call: Call, reply: Reply) {
        reply.answer(Err(match decode::<DowngradeRequest>(call.message) {
            Ok(_) => not_implemented("this version of metastore cannot be downgraded yet"),
            Err(error) => error.into(),
        }));
    }
}

/// A stream that fails because it is not implemented yet.
struct NotImplemented(&'static str);

impl Conversation for NotImplemented {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        match line.receive().map(decode_streamed::<SnapshotRequest>) {
            Some(Ok(_)) => Step::End(Err(not_implemented(self.0))),
            Some(Err(refusal)) => Step::End(Err(refusal)),
            None => Step::Wait,
        }
    }
}

#[allow(clippy::unnecessary_wraps, reason = "handlers answer with a `Result`")]
fn encode(message: &impl Message) -> CallResult {
    Ok(Bytes::from(message.encode_to_vec()))
}

/// An alarm in protobuf's text form, zero fields left out.
#[must_use]
pub fn alarm_text(alarm: &AlarmMember) -> String {
    use crate::proto::etcdserverpb::AlarmType;
    let member = (alarm.member_id != 0).then(|| format!("memberID:{}", alarm.member_id));
    let name =
        AlarmType::try_from(alarm.alarm).map_or_else(|_| alarm.alarm.to_string(), |name| name.as_str_name().to_owned());
    let kind = (alarm.alarm != 0).then(|| format!("alarm:{name}"));
    member.into_iter().chain(kind).collect::<Vec<_>>().join(" ")
}
