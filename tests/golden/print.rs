//! Formats responses, events and records for scripts.

use std::fmt::Write;

use metastore::{
    mvcc::{Event, RecordKey, read::decode},
    proto::{
        etcdserverpb::{
            AlarmResponse, DeleteRangeResponse, Member, MemberAddResponse, MemberRemoveResponse, PutResponse,
            RangeResponse, ResponseOp, TxnResponse, response_op,
        },
        mvccpb::KeyValue,
    },
    state::{Effect, Kind, Members, Response},
};
use prost::Message;

/// Bytes as text; bytes that are not printable ASCII are escaped.
fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string().replace("\\x00", "\\0")
}

pub fn key_value(kv: &KeyValue) -> String {
    let lease = if kv.lease == 0 { String::new() } else { format!(" lease={}", kv.lease) };
    let (key, value) = (text(&kv.key), text(&kv.value));
    format!("{key}={value} create={} mod={} version={}{lease}", kv.create_revision, kv.mod_revision, kv.version)
}

pub fn response(kind: Kind, response: &Response) -> String {
    let body = response.body.as_slice();
    let mut out = format!("rev={}", response.revision);
    let lines = match kind {
        Kind::Put => put_lines(&PutResponse::decode(body).unwrap()),
        Kind::DeleteRange => {
            let answer = DeleteRangeResponse::decode(body).unwrap();
            _ = write!(out, " deleted={}", answer.deleted);
            delete_lines(&answer)
        }
        Kind::Txn => {
            let answer = TxnResponse::decode(body).unwrap();
            out += if answer.succeeded { " succeeded" } else { " failed" };
            txn_lines(&answer)
        }
        Kind::Alarm => {
            let alarms = AlarmResponse::decode(body).unwrap().alarms;
            alarms.iter().map(|alarm| format!("alarm {} of member {}", alarm.alarm, alarm.member_id)).collect()
        }
        Kind::MemberAdd => {
            let answer = MemberAddResponse::decode(body).unwrap();
            let added = format!("added {}", member(&answer.member.unwrap()));
            std::iter::once(added).chain(answer.members.iter().map(member)).collect()
        }
        Kind::MemberRemove | Kind::MemberPromote | Kind::MemberUpdate => {
            // The three responses have the same fields.
            MemberRemoveResponse::decode(body).unwrap().members.iter().map(member).collect()
        }
        // Their responses have only a header.
        Kind::Compact
        | Kind::LeaseGrant
        | Kind::LeaseRevoke
        | Kind::LeaseExpire
        | Kind::AuthEnable
        | Kind::AuthDisable
        | Kind::Authenticate
        | Kind::UserAdd
        | Kind::UserDelete
        | Kind::UserChangePassword
        | Kind::UserGrantRole
        | Kind::UserRevokeRole
        | Kind::RoleAdd
        | Kind::RoleDelete
        | Kind::RoleGrantPermission
        | Kind::RoleRevokePermission
        | Kind::ClusterVersionSet
        | Kind::MemberAttributesSet
        | Kind::CapabilityLevelSet => Vec::new(),
    };
    append(&mut out, &lines);
    out
}

fn append(out: &mut String, lines: &[String]) {
    for line in lines {
        _ = write!(out, "\n  {line}");
    }
}

fn put_lines(answer: &PutResponse) -> Vec<String> {
    answer.prev_kv.iter().map(|previous| format!("was {}", key_value(previous))).collect()
}

fn delete_lines(answer: &DeleteRangeResponse) -> Vec<String> {
    answer.prev_kvs.iter().map(|previous| format!("was {}", key_value(previous))).collect()
}

/// The response to a Range: one line, and one more for each key.
pub fn range(answer: &RangeResponse) -> String {
    let more = if answer.more { " more" } else { "" };
    let revision = answer.header.as_ref().map_or(0, |header| header.revision);
    let mut out = format!("rev={revision} count={}{more}", answer.count);
    append(&mut out, &answer.kvs.iter().map(key_value).collect::<Vec<_>>());
    out
}

fn txn_lines(answer: &TxnResponse) -> Vec<String> {
    answer.responses.iter().flat_map(op_lines).collect()
}

fn op_lines(op: &ResponseOp) -> Vec<String> {
    let (first, rest) = match op.response.as_ref().expect("an operation has a response") {
        response_op::Response::ResponseRange(answer) => {
            let lines: Vec<String> = range(answer).lines().map(|line| line.trim().to_owned()).collect();
            (format!("get {}", lines[0]), lines[1..].to_vec())
        }
        response_op::Response::ResponsePut(answer) => {
            (format!("put rev={}", answer.header.as_ref().unwrap().revision), put_lines(answer))
        }
        response_op::Response::ResponseDeleteRange(answer) => {
            let revision = answer.header.as_ref().unwrap().revision;
            (format!("delete rev={revision} deleted={}", answer.deleted), delete_lines(answer))
        }
        response_op::Response::ResponseTxn(answer) => {
            let header = answer.header.as_ref().expect("a nested transaction's header is there, but empty");
            assert_eq!(*header, metastore::proto::etcdserverpb::ResponseHeader::default());
            (if answer.succeeded { "txn succeeded" } else { "txn failed" }.to_owned(), txn_lines(answer))
        }
    };
    std::iter::once(first).chain(rest.into_iter().map(|line| format!("  {line}"))).collect()
}

fn member(member: &Member) -> String {
    let learner = if member.is_learner { " learner" } else { "" };
    let (id, peers, clients) = (member.id, member.peer_ur_ls.join(" "), member.client_ur_ls.join(" "));
    format!("member {id}{learner} at [{peers}] named {:?} for clients at [{clients}]", member.name)
}

/// The member table, without what [`member`] shows.
pub fn members(members: &Members) -> String {
    let voters_and_learners = members.voters_and_learners();
    let removed: Vec<u64> = members.removed().collect();
    assert!(removed.iter().all(|&id| members.is_removed(id) && members.get(id).is_none()));
    format!("voters {:?} learners {:?} removed {removed:?}", voters_and_learners.voters, voters_and_learners.learners)
}

/// An event as watchers get it.
pub fn event(event: &Event) -> String {
    let record = decode(event.record.clone()).unwrap();
    assert_eq!(record.key, event.key, "an event's record is about its key");
    let previous = event.previous.map_or(String::new(), |at| format!(", before it {}.{}", at.main, at.sub));
    let (main, sub) = (event.revision.main, event.revision.sub);
    if event.deletion {
        format!("event {main}.{sub} delete {}{previous}", text(&event.key))
    } else {
        assert_eq!(record.mod_revision, main);
        format!("event {main}.{sub} put {}{previous}", key_value(&record))
    }
}

pub fn effect(effect: &Effect) -> String {
    match effect {
        Effect::LeaseGranted { id, ttl } => format!("lease {id} granted for {ttl} s"),
        Effect::LeaseRevoked { id } => format!("lease {id} revoked"),
        Effect::CompactionScheduled { at } => format!("compaction at {at} scheduled"),
        Effect::AlarmsChanged => "alarms changed".to_owned(),
        Effect::MembersChanged => "members changed".to_owned(),
        Effect::MemberStarted { id, level } => format!("member {id} started, and knows level {level}"),
        Effect::Tokens(effect) => format!("tokens: {effect:?}"),
    }
}

/// A record of the history table, decoded.
pub fn record(key: &[u8], value: &[u8]) -> String {
    let (revision, deletion) = RecordKey::decode(key).unwrap();
    let record = decode(value.to_vec().into()).unwrap();
    let (main, sub) = (revision.main, revision.sub);
    if deletion {
        assert_eq!(record, KeyValue { key: record.key.clone(), ..KeyValue::default() }, "a deletion has only a key");
        return format!("{main}.{sub} delete {}", text(&record.key));
    }
    format!("{main}.{sub} put {}", key_value(&record))
}

/// A record of the history table, as hexadecimal bytes.
pub fn raw_record(key: &[u8], value: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    format!("{} {}", hex(key), hex(value))
}
