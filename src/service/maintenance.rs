//! Maintenance of one member: status, alarms, defragmentation, hashes, leadership transfer.

use std::{sync::Arc, time::Instant};

use super::{Caller, Operation, Outcome, Reply, Request, Service, read_error};
use crate::{
    cluster::too_many_scans,
    error::{Error, Halt},
    metrics::METRICS,
    mvcc::{compact::KeyHash, read::ReadError},
    proto::etcdserverpb::{AlarmMember, AlarmRequest, AlarmResponse, alarm_request::AlarmAction},
    state::Kind,
    storage::Table,
};

/// The state of this member.
#[derive(Debug)]
pub struct StatusOutcome {
    /// The newest revision.
    pub head: i64,
    pub db_size_bytes: i64,
    pub db_in_use_bytes: i64,
    pub quota_bytes: i64,
    /// 0 if there is none.
    pub leader: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    pub is_learner: bool,
    pub alarms: Vec<AlarmMember>,
}

/// Raised alarms, at a revision.
#[derive(Debug)]
pub struct AlarmList {
    pub head: i64,
    pub alarms: Vec<AlarmMember>,
}

/// What became of an Alarm request.
pub enum AlarmOutcome {
    List(AlarmList),
    Changed(Outcome<AlarmResponse>),
}

impl Service {
    /// Answered locally, without asking other members.
    pub fn status(self: &Arc<Self>, caller: &Caller, reply: impl Reply<StatusOutcome>) {
        if let Err(error) = self.admit(caller, &Operation::Status) {
            return self.refuse(caller, "Status", error, reply, Self::status);
        }
        if let Err(halt) = self.node().measure() {
            halt.abort();
        }
        let status = self.node().status();
        let cluster = self.readers().cluster.read().clone();
        reply.answer(Ok(StatusOutcome {
            head: self.head(),
            db_size_bytes: status.total_bytes(),
            db_in_use_bytes: status.in_use_bytes(),
            quota_bytes: self.quota_bytes,
            leader: status.leader(),
            committed_index: status.committed(),
            applied_index: status.applied(),
            is_learner: cluster.members.get(self.cluster.member_id).is_some_and(|member| member.is_learner),
            alarms: cluster.alarms.list(0),
        }));
    }

    pub fn alarm(self: &Arc<Self>, caller: &Caller, request: Request<AlarmRequest>, reply: impl Reply<AlarmOutcome>) {
        let AlarmRequest { action, alarm, member_id } = request.parsed;
        let action = AlarmAction::try_from(action);
        if action == Ok(AlarmAction::Get) {
            return self.list_alarms(caller, alarm, reply);
        }
        let target = format!("{} {member_id:x}", alarm_text(&AlarmMember { member_id: 0, alarm }));
        self.administer(caller, Operation::AlarmChange, target, reply, move |service, identity, reply| {
            if action.is_ok() {
                return service.propose(identity, Kind::Alarm, &request.raw, ChangedAlarm(reply));
            }
            let text = format!("etcdserver: unknown alarm action {}: 0, 1 and 2 are known", request.parsed.action);
            reply.answer(Err(Error::Unknown(text)));
        });
    }

    /// Answers from the replicated table. (etcd sends the request through the log, where a backlog refuses it. Liveness probes
    /// then restart members that are merely busy.)
    fn list_alarms(self: &Arc<Self>, caller: &Caller, alarm: i32, reply: impl Reply<AlarmOutcome>) {
        if let Err(error) = self.admit(caller, &Operation::AlarmGet) {
            return self.refuse(caller, "AlarmGet", error, reply, move |service, caller, reply| {
                service.list_alarms(caller, alarm, reply);
            });
        }
        let service = self.clone();
        self.read(false, reply, move |reply| {
            let alarms = service.readers().cluster.read().alarms.list(alarm);
            reply.answer(Ok(AlarmOutcome::List(AlarmList { head: service.head(), alarms })));
        });
    }

    /// The hash of the history up to a revision (0: all of it), on this member.
    pub fn hash_kv(self: &Arc<Self>, caller: &Caller, revision: i64, reply: impl Reply<KeyHash>) {
        self.administer(caller, Operation::HashKv, String::new(), reply, move |service, _, reply| {
            service.scan(reply, move |service, reply| {
                if !reply.is_wanted() {
                    return;
                }
                reply.answer(service.node().hash_kv(revision).map_err(read_error));
            });
        });
    }

    /// The hash of all tables, at a revision.
    pub fn hash(self: &Arc<Self>, caller: &Caller, reply: impl Reply<(i64, u32)>) {
        self.administer(caller, Operation::Hash, String::new(), reply, |service, _, reply| {
            service.scan(reply, |service, reply| {
                if !reply.is_wanted() {
                    return;
                }
                let started = Instant::now();
                let hash = service.hash_all_tables();
                METRICS.hash_seconds.observe(started.elapsed().as_secs_f64());
                let hash = hash.map_err(|halt| read_error(ReadError::Halt(halt)));
                reply.answer(hash.map(|hash| (service.head(), hash)));
            });
        });
    }

    /// Runs something that reads all data, on a thread of its own: while it runs, reads go on, and a few others may wait for it.
    fn scan<T, R: Reply<T>>(self: &Arc<Self>, reply: R, scan: impl FnOnce(&Arc<Self>, R) + Send + 'static) {
        let service = self.clone();
        if let Err(reply) = self.scans.run(reply, move |reply| scan(&service, reply)) {
            reply.answer(Err(too_many_scans(&self.scans)));
        }
    }

    /// A checksum over every table: its tag, then its keys and values.
    fn hash_all_tables(&self) -> Result<u32, Halt> {
        let mut crc = 0;
        let tables =
            [Table::Alarm, Table::History, Table::Lease, Table::Member, Table::Removed, Table::Role, Table::User];
        for table in tables {
            crc = crc32c::crc32c_append(crc, &[table.tag()]);
            self.node().engine().scan(table, &[], &[], &mut |key, value| {
                crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, key), value);
                std::ops::ControlFlow::Continue(())
            })?;
        }
        Ok(crc)
    }

    /// Answers once deleted data occupies no space any more. Reads and writes continue meanwhile.
    pub fn defragment(self: &Arc<Self>, caller: &Caller, reply: impl Reply<()>) {
        self.administer(caller, Operation::Defragment, String::new(), reply, |service, _, reply| {
            let service = service.clone();
            service.clone().node().await_compaction(Box::new(move || {
                service.scan(reply, |service, reply| match service.node().defragment() {
                    Ok(None) => reply.answer(Ok(())),
                    Ok(Some(lack)) => {
                        tracing::warn!(%lack, "failed to defragment");
                        reply.answer(Err(Error::Unknown(lack.to_string())));
                    }
                    Err(halt) => halt.abort(),
                });
            }));
        });
    }

    /// Answers once the other member leads. A member that does not lead says so before it looks at the target (KV-44).
    pub fn move_leader(self: &Arc<Self>, caller: &Caller, target: u64, reply: impl Reply<()>) {
        self.administer(caller, Operation::MoveLeader, format!("{target:x}"), reply, move |service, _, reply| {
            if !service.cluster.leads() {
                return reply.answer(Err(Error::NotLeader));
            }
            if !service.readers().cluster.read().members.voters().any(|voter| voter.id == target) {
                return reply.answer(Err(Error::BadLeaderTransferee));
            }
            if target == service.cluster.member_id {
                return reply.answer(Ok(()));
            }
            let cluster = service.cluster.clone();
            service.cluster.runtime.spawn(async move {
                let (from, to) = (format!("{:x}", cluster.member_id), format!("{target:x}"));
                tracing::info!({ "current-leader-member-id" = from, "transferee-member-id" = to }, "leadership transfer starting");
                // The client's own deadline ends the call sooner; ours only ends the waiting.
                reply.answer(cluster.move_leadership(target, |leader| leader == target).await);
            });
        });
    }
}

/// The reply of an alarm that is raised or cleared through the log.
struct ChangedAlarm<R>(R);

impl<R: Reply<AlarmOutcome>> Reply<Outcome<AlarmResponse>> for ChangedAlarm<R> {
    fn answer(self, outcome: Result<Outcome<AlarmResponse>, Error>) {
        self.0.answer(outcome.map(AlarmOutcome::Changed));
    }

    fn run(self, work: impl FnOnce(Self) + Send + 'static) {
        self.0.run(|reply| work(Self(reply)));
    }
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
