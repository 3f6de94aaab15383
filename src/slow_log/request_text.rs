//! Requests as text for warnings: in etcd's form, with the sizes of values in place of the values, without passwords and tokens.

use std::fmt::Write;

use bytes::Bytes;

use crate::{
    auth::Change,
    mvcc::{
        Interval, Query,
        query::{Order, Target},
    },
    proto::etcdserverpb::{
        AlarmRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request as Op,
    },
    state::{Command, Request, txn},
};

/// A text is cut off here.
const MAX_BYTES: usize = 2 << 10;

/// The text of a log entry.
#[must_use]
pub fn entry(entry: &Bytes) -> String {
    let Ok(command) = Command::decode(entry.clone()) else { return String::new() };
    let mut text = format!("header:<ID:{}", command.id);
    if !command.user.is_empty() {
        _ = write!(text, " username:{:?} auth_revision:{}", command.user, command.auth_revision);
    }
    text.push_str("> ");
    text.push_str(&request(&command.request));
    cut_off(text)
}

/// The text of a Range.
#[must_use]
pub fn query(query: &Query, serializable: bool) -> String {
    let mut text = fields(query);
    if serializable {
        text.push_str(" serializable:true");
    }
    cut_off(text)
}

/// The text of a transaction.
#[must_use]
pub fn txn_request(txn: &TxnRequest) -> String {
    cut_off(transaction(txn))
}

fn cut_off(mut text: String) -> String {
    if text.len() > MAX_BYTES {
        text.truncate(text.floor_char_boundary(MAX_BYTES));
        text.push('…');
    }
    text
}

fn request(request: &Request) -> String {
    match request {
        Request::Put(put) => format!("put:<{}>", put_fields(put)),
        Request::DeleteRange(delete) => format!("delete_range:<{}>", delete_fields(delete)),
        Request::Txn(txn) => format!("txn:<{}>", transaction(txn)),
        Request::Compact(compact) => format!("compaction:<revision:{}>", compact.revision),
        Request::LeaseGrant(grant) => format!("lease_grant:<ttl:{}-second id:{:016x}>", grant.ttl, grant.id),
        Request::LeaseRevoke(revoke) | Request::LeaseExpire(revoke) => format!("lease_revoke:<id:{:016x}>", revoke.id),
        Request::Alarm(AlarmRequest { action, member_id, alarm }) => {
            format!("alarm:<action:{action} memberID:{member_id} alarm:{alarm}>")
        }
        Request::Auth(change) => change_text(change),
        Request::ClusterVersionSet(version) => format!("cluster_version_set:<ver:{:?}>", version.ver),
        Request::MemberAttributesSet(attributes) => {
            format!("cluster_member_attr_set:<member_ID:{}>", attributes.request.member_id)
        }
        Request::CapabilityLevelSet(_) => "capability_level_set:<>".to_owned(),
        Request::MemberAdd(_) => "member_add:<>".to_owned(),
        Request::MemberRemove(remove) => format!("member_remove:<ID:{}>", remove.id),
        Request::MemberPromote(promote) => format!("member_promote:<ID:{}>", promote.id),
        Request::MemberUpdate(update) => format!("member_update:<ID:{}>", update.id),
        Request::Unknown(field) => format!("{field}:<>"),
    }
}

fn change_text(change: &Change) -> String {
    match change {
        Change::Enable => "auth_enable:<>".to_owned(),
        Change::Disable => "auth_disable:<>".to_owned(),
        Change::Authenticate(login) => format!("authenticate:<name:{}>", login.name),
        Change::UserAdd(user) => format!("auth_user_add:<name:{}>", user.name),
        Change::UserDelete(user) => format!("auth_user_delete:<name:{}>", user.name),
        Change::UserChangePassword(user) => format!("auth_user_change_password:<name:{}>", user.name),
        Change::UserGrantRole(grant) => format!("auth_user_grant_role:<user:{} role:{}>", grant.user, grant.role),
        Change::UserRevokeRole(revoke) => format!("auth_user_revoke_role:<name:{} role:{}>", revoke.name, revoke.role),
        Change::RoleAdd(role) => format!("auth_role_add:<name:{}>", role.name),
        Change::RoleDelete(role) => format!("auth_role_delete:<role:{}>", role.role),
        Change::RoleGrantPermission(grant) => format!("auth_role_grant_permission:<name:{}>", grant.name),
        Change::RoleRevokePermission(revoke) => format!("auth_role_revoke_permission:<role:{}>", revoke.role),
    }
}

fn bytes(name: &str, value: &[u8]) -> String {
    if value.is_empty() { String::new() } else { format!("{name}:\"{}\" ", value.escape_ascii()) }
}

fn number(name: &str, value: i64) -> String {
    if value == 0 { String::new() } else { format!("{name}:{value} ") }
}

fn flag(name: &str, value: bool) -> String {
    if value { format!("{name}:true ") } else { String::new() }
}

fn put_fields(put: &PutRequest) -> String {
    let size = i64::try_from(put.value.len()).unwrap_or(i64::MAX);
    [
        bytes("key", &put.key),
        number("value_size", size),
        number("lease", put.lease),
        flag("prev_kv", put.prev_kv),
        flag("ignore_value", put.ignore_value),
        flag("ignore_lease", put.ignore_lease),
    ]
    .concat()
}

fn delete_fields(delete: &DeleteRangeRequest) -> String {
    let all = [bytes("key", &delete.key), bytes("range_end", &delete.range_end), flag("prev_kv", delete.prev_kv)];
    all.concat().trim_end().to_owned()
}

fn range_fields(range: &RangeRequest) -> String {
    let text = fields(&txn::query(range.clone()));
    if range.serializable { text + " serializable:true" } else { text }
}

fn fields(query: &Query) -> String {
    let (key, end): (&[u8], &[u8]) = match &query.interval {
        Interval::Key(key) => (key, b""),
        Interval::From(key) => (key, b"\0"),
        Interval::Range(key, end) => (key, end),
    };
    let order = match query.order {
        Order::None => "",
        Order::Ascend => "sort_order:ASCEND ",
        Order::Descend => "sort_order:DESCEND ",
    };
    let target = match query.target {
        Target::Key => "",
        Target::Version => "sort_target:VERSION ",
        Target::Create => "sort_target:CREATE ",
        Target::Mod => "sort_target:MOD ",
        Target::Value => "sort_target:VALUE ",
    };
    let all = [
        bytes("key", key),
        bytes("range_end", end),
        number("limit", query.limit),
        number("revision", query.revision),
        order.to_owned(),
        target.to_owned(),
        flag("keys_only", query.keys_only),
        flag("count_only", query.count_only),
        number("min_mod_revision", query.filters.min_mod),
        number("max_mod_revision", query.filters.max_mod),
        number("min_create_revision", query.filters.min_create),
        number("max_create_revision", query.filters.max_create),
    ];
    all.concat().trim_end().to_owned()
}

fn transaction(txn: &TxnRequest) -> String {
    let compares: Vec<String> = txn.compare.iter().map(comparison).collect();
    let branch = |ops: &[RequestOp]| ops.iter().map(operation).collect::<Vec<_>>().join(" ");
    format!("compare:<{}> success:<{}> failure:<{}>", compares.join(" "), branch(&txn.success), branch(&txn.failure))
}

fn operation(op: &RequestOp) -> String {
    match &op.request {
        Some(Op::RequestPut(put)) => format!("request_put:<{}>", put_fields(put)),
        Some(Op::RequestRange(range)) => format!("request_range:<{}>", range_fields(range)),
        Some(Op::RequestDeleteRange(delete)) => format!("request_delete_range:<{}>", delete_fields(delete)),
        Some(Op::RequestTxn(txn)) => format!("request_txn:<{}>", transaction(txn)),
        None => String::new(),
    }
}

fn comparison(compare: &Compare) -> String {
    // Fields that are zero are left out.
    let (result, target) = (compare.result(), compare.target());
    let is_zero = (result == CompareResult::Equal, target == CompareTarget::Version);
    let result = if is_zero.0 { String::new() } else { format!("result:{} ", result.as_str_name()) };
    let target = if is_zero.1 { String::new() } else { format!("target:{} ", target.as_str_name()) };
    let with = match &compare.target_union {
        Some(TargetUnion::Version(version)) => format!("version:{version} "),
        Some(TargetUnion::CreateRevision(revision)) => format!("create_revision:{revision} "),
        Some(TargetUnion::ModRevision(revision)) => format!("mod_revision:{revision} "),
        Some(TargetUnion::Value(value)) => format!("value_size:{} ", value.len()),
        Some(TargetUnion::Lease(lease)) => format!("lease:{lease} "),
        None => String::new(),
    };
    [result, target, bytes("key", &compare.key), with, bytes("range_end", &compare.range_end)].concat()
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{auth::Requester, proto::etcdserverpb::LeaseGrantRequest, state::Kind};

    fn put(key: &'static str, value: &'static str) -> PutRequest {
        PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }
    }

    fn op(put: PutRequest) -> RequestOp {
        RequestOp { request: Some(Op::RequestPut(put)) }
    }

    /// As a real etcd has logged them.
    #[test]
    fn requests_read_as_in_etcds_log() {
        let text = |kind, message: Vec<u8>| entry(&Command::encode(7, kind, &message));
        assert_eq!(
            text(Kind::Put, put("a", "secretvalue").encode_to_vec()),
            r#"header:<ID:7> put:<key:"a" value_size:11 >"#
        );
        let compare = Compare {
            target: CompareTarget::Value as i32,
            key: "a".into(),
            target_union: Some(TargetUnion::Value("secret1".into())),
            ..Compare::default()
        };
        let txn = TxnRequest {
            compare: vec![compare],
            success: vec![op(put("b", "secret2"))],
            failure: vec![op(put("c", "secret3"))],
        };
        assert_eq!(
            text(Kind::Txn, txn.encode_to_vec()),
            concat!(
                r#"header:<ID:7> txn:<compare:<target:VALUE key:"a" value_size:7 > "#,
                r#"success:<request_put:<key:"b" value_size:7 >> failure:<request_put:<key:"c" value_size:7 >>>"#
            )
        );
        let grant = LeaseGrantRequest { ttl: 60, id: 0x2040_a22e_4b33_1c07 };
        assert_eq!(
            text(Kind::LeaseGrant, grant.encode_to_vec()),
            "header:<ID:7> lease_grant:<ttl:60-second id:2040a22e4b331c07>"
        );
        let range = RangeRequest { key: "a".into(), serializable: true, ..RangeRequest::default() };
        assert_eq!(query(&txn::query(range), true), r#"key:"a" serializable:true"#);
    }

    #[test]
    fn values_passwords_and_tokens_are_left_out_at_every_level() {
        use crate::proto::etcdserverpb::{AuthUserAddRequest, InternalAuthenticateRequest};
        let nested = TxnRequest { success: vec![op(put("k", "hidden"))], ..TxnRequest::default() };
        let txn =
            TxnRequest { failure: vec![RequestOp { request: Some(Op::RequestTxn(nested)) }], ..TxnRequest::default() };
        let user = AuthUserAddRequest {
            name: "u".into(),
            password: "hidden".into(),
            hashed_password: "hidden".into(),
            ..AuthUserAddRequest::default()
        };
        let login =
            InternalAuthenticateRequest { name: "u".into(), password: "hidden".into(), simple_token: "hidden".into() };
        let requester = Requester { user: "root", auth_revision: 3 };
        for (kind, message) in [
            (Kind::Txn, txn.encode_to_vec()),
            (Kind::UserAdd, user.encode_to_vec()),
            (Kind::Authenticate, login.encode_to_vec()),
        ] {
            let text = entry(&Command::encode_for(requester, 7, kind, &message));
            assert!(text.starts_with("header:<ID:7 username:\"root\" auth_revision:3> "), "{text}");
            assert!(!text.contains("hidden"), "{text}");
        }
    }

    #[test]
    fn a_long_text_is_cut_off() {
        let long = "k".repeat(5000);
        let put = PutRequest { key: long.into(), ..PutRequest::default() };
        let text = entry(&Command::encode(7, Kind::Put, &put.encode_to_vec()));
        assert!(text.ends_with('…') && text.len() < 2100, "{}", text.len());
        assert_eq!(entry(&Bytes::from_static(&[0x22, 0x7f, 1])), "", "an entry that cannot be decoded has no text");
    }
}
