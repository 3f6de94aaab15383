//! Commands: the content of a log entry, and the response to it.
//!
//! An entry is an `etcdserverpb.InternalRaftRequest`. The proposer wraps the request's bytes as it received them from the
//! client. Every replica decodes them with the same decoder, so all replicas act alike even if the bytes contain unknown
//! fields.

use bytes::{Buf, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field},
};

use super::{
    capability::{CapabilityLevelSet, MemberAttributes},
    members::NewMember,
    txn_decode,
};
use crate::{
    auth::{Change, Requester},
    proto::{
        etcdserverpb::{
            AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
            MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest, PutRequest, RequestHeader, RequestOp,
            TxnRequest, request_op,
        },
        membershippb::ClusterVersionSetRequest,
    },
};

const HEADER_FIELD: u32 = 100;
const LEGACY_ID_FIELD: u32 = 1;

/// The kinds of commands, with the field numbers of `InternalRaftRequest`. Numbers from 1401 on are our own: etcd encodes
/// membership changes differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Put = 4,
    DeleteRange = 5,
    Txn = 6,
    Compact = 7,
    LeaseGrant = 8,
    LeaseRevoke = 9,
    Alarm = 10,
    AuthEnable = 1000,
    AuthDisable = 1011,
    Authenticate = 1012,
    UserAdd = 1100,
    UserDelete = 1101,
    UserChangePassword = 1103,
    UserGrantRole = 1104,
    UserRevokeRole = 1105,
    RoleAdd = 1200,
    RoleDelete = 1201,
    RoleGrantPermission = 1203,
    RoleRevokePermission = 1204,
    ClusterVersionSet = 1300,
    MemberAttributesSet = 1301,
    MemberAdd = 1401,
    MemberRemove = 1402,
    MemberPromote = 1403,
    MemberUpdate = 1404,
    CapabilityLevelSet = 1405,
    /// A revocation of the server itself, because the lease's time is over: it needs no permission.
    LeaseExpire = 1406,
}

impl Kind {
    const ALL: [Self; 27] = [
        Self::Put,
        Self::DeleteRange,
        Self::Txn,
        Self::Compact,
        Self::LeaseGrant,
        Self::LeaseRevoke,
        Self::Alarm,
        Self::AuthEnable,
        Self::AuthDisable,
        Self::Authenticate,
        Self::UserAdd,
        Self::UserDelete,
        Self::UserChangePassword,
        Self::UserGrantRole,
        Self::UserRevokeRole,
        Self::RoleAdd,
        Self::RoleDelete,
        Self::RoleGrantPermission,
        Self::RoleRevokePermission,
        Self::ClusterVersionSet,
        Self::MemberAttributesSet,
        Self::MemberAdd,
        Self::MemberRemove,
        Self::MemberPromote,
        Self::MemberUpdate,
        Self::CapabilityLevelSet,
        Self::LeaseExpire,
    ];

    /// The capability level of the cluster from which on entries of this kind may be in the log.
    #[must_use]
    pub fn level(self) -> u64 {
        match self {
            Self::Put
            | Self::DeleteRange
            | Self::Txn
            | Self::Compact
            | Self::LeaseGrant
            | Self::LeaseRevoke
            | Self::Alarm
            | Self::ClusterVersionSet
            | Self::MemberAttributesSet
            | Self::MemberAdd
            | Self::MemberRemove
            | Self::MemberPromote
            | Self::MemberUpdate => 0,
            Self::AuthEnable
            | Self::AuthDisable
            | Self::Authenticate
            | Self::UserAdd
            | Self::UserDelete
            | Self::UserChangePassword
            | Self::UserGrantRole
            | Self::UserRevokeRole
            | Self::RoleAdd
            | Self::RoleDelete
            | Self::RoleGrantPermission
            | Self::RoleRevokePermission
            | Self::CapabilityLevelSet
            | Self::LeaseExpire => 1,
        }
    }

    fn of_field(field: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == field)
    }
}

/// The request in a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    LeaseGrant(LeaseGrantRequest),
    LeaseRevoke(LeaseRevokeRequest),
    Alarm(AlarmRequest),
    Auth(Change),
    ClusterVersionSet(ClusterVersionSetRequest),
    MemberAttributesSet(MemberAttributes),
    MemberAdd(NewMember),
    MemberRemove(MemberRemoveRequest),
    MemberPromote(MemberPromoteRequest),
    MemberUpdate(MemberUpdateRequest),
    CapabilityLevelSet(CapabilityLevelSet),
    LeaseExpire(LeaseRevokeRequest),
    /// A command that this version does not know, by field number.
    Unknown(u32),
}

impl Request {
    /// etcd's name for its kind, for metrics; empty for changes of voters and learners, which etcd does not count.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        match self {
            Self::Put(_) => "Put",
            Self::DeleteRange(_) => "DeleteRange",
            Self::Txn(_) => "Txn",
            Self::Compact(_) => "Compaction",
            Self::LeaseGrant(_) => "LeaseGrant",
            Self::LeaseRevoke(_) | Self::LeaseExpire(_) => "LeaseRevoke",
            Self::Alarm(_) => "Alarm",
            Self::Auth(change) => match change {
                Change::Enable => "AuthEnable",
                Change::Disable => "AuthDisable",
                Change::Authenticate(_) => "Authenticate",
                Change::UserAdd(_) => "AuthUserAdd",
                Change::UserDelete(_) => "AuthUserDelete",
                Change::UserChangePassword(_) => "AuthUserChangePassword",
                Change::UserGrantRole(_) => "AuthUserGrantRole",
                Change::UserRevokeRole(_) => "AuthUserRevokeRole",
                Change::RoleAdd(_) => "AuthRoleAdd",
                Change::RoleDelete(_) => "AuthRoleDelete",
                Change::RoleGrantPermission(_) => "AuthRoleGrantPermission",
                Change::RoleRevokePermission(_) => "AuthRoleRevokePermission",
            },
            Self::ClusterVersionSet(_) => "ClusterVersionSet",
            Self::MemberAttributesSet(_) => "ClusterMemberAttrSet",
            Self::CapabilityLevelSet(_) => "CapabilityLevelSet",
            Self::MemberAdd(_)
            | Self::MemberRemove(_)
            | Self::MemberPromote(_)
            | Self::MemberUpdate(_)
            | Self::Unknown(_) => "",
        }
    }

    /// Whether it changes voters or learners. Raft must know of such a change, so it must be in a configuration change entry.
    #[must_use]
    pub fn changes_members(&self) -> bool {
        match self {
            Self::MemberAdd(_) | Self::MemberRemove(_) | Self::MemberPromote(_) => true,
            Self::Put(_)
            | Self::DeleteRange(_)
            | Self::Txn(_)
            | Self::Compact(_)
            | Self::LeaseGrant(_)
            | Self::LeaseRevoke(_)
            | Self::Alarm(_)
            | Self::Auth(_)
            | Self::CapabilityLevelSet(_)
            | Self::LeaseExpire(_)
            | Self::ClusterVersionSet(_)
            | Self::MemberAttributesSet(_)
            | Self::MemberUpdate(_)
            | Self::Unknown(_) => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    /// The request ID, by which the proposer finds its waiter; unique among all proposals of the cluster.
    pub id: u64,
    /// The user on whose behalf it was proposed, and the auth revision at which that was identified. Empty and 0 if
    /// authentication was disabled, or if the server itself proposed it.
    pub user: String,
    pub auth_revision: u64,
    /// The level of its kind; unknown kinds have a level above all others.
    pub level: u64,
    pub request: Request,
}

impl Command {
    /// Builds an entry around an encoded request, for the server itself or while authentication is disabled.
    #[must_use]
    pub fn encode(id: u64, kind: Kind, request: &[u8]) -> Bytes {
        Self::encode_for(Requester::default(), id, kind, request)
    }

    /// Builds an entry around an encoded request.
    #[must_use]
    pub fn encode_for(requester: Requester<'_>, id: u64, kind: Kind, request: &[u8]) -> Bytes {
        let Requester { user, auth_revision } = requester;
        let header = RequestHeader { id, username: user.to_owned(), auth_revision };
        let mut entry = Vec::with_capacity(request.len() + user.len() + 44);
        encode_key(kind as u32, WireType::LengthDelimited, &mut entry);
        encode_varint(request.len() as u64, &mut entry);
        entry.extend_from_slice(request);
        encode_key(HEADER_FIELD, WireType::LengthDelimited, &mut entry);
        encode_varint(header.encoded_len() as u64, &mut entry);
        header.encode_raw(&mut entry);
        entry.into()
    }

    /// Whether an entry begins as that of a put does. Others may begin in the same way.
    #[must_use]
    pub fn is_put(entry: &[u8]) -> bool {
        const PUT_KEY: u8 = ((Kind::Put as u8) << 3) | WireType::LengthDelimited as u8;
        entry.first() == Some(&PUT_KEY)
    }

    /// Decodes an entry. Fields share its bytes.
    pub fn decode(mut entry: Bytes) -> Result<Self, DecodeError> {
        let (mut header, mut legacy_id) = (RequestHeader::default(), 0);
        let (mut request, mut level) = (Request::Unknown(0), u64::MAX);
        while entry.has_remaining() {
            let (field, wire) = decode_key(&mut entry)?;
            match (field, wire) {
                (LEGACY_ID_FIELD, WireType::Varint) => legacy_id = decode_varint(&mut entry)?,
                (HEADER_FIELD, WireType::LengthDelimited) => {
                    header = RequestHeader::decode_length_delimited(&mut entry)?;
                }
                (field, WireType::LengthDelimited) => {
                    level = Kind::of_field(field).map_or(u64::MAX, Kind::level);
                    request = read(field, take(&mut entry)?)?;
                }
                (field, wire) => skip_field(wire, field, &mut entry, DecodeContext::default())?,
            }
        }
        let RequestHeader { id, username, auth_revision } = header;
        let id = if legacy_id == 0 { id } else { legacy_id };
        Ok(Self { id, user: username, auth_revision, level, request })
    }
}

fn take(entry: &mut Bytes) -> Result<Bytes, DecodeError> {
    let len = decode_varint(entry)?;
    match usize::try_from(len) {
        Ok(len) if len <= entry.len() => Ok(entry.split_to(len)),
        // The error that prost itself returns: "buffer underflow".
        Ok(_) | Err(_) => Err(decode_varint(&mut Bytes::new()).expect_err("an empty buffer cannot be decoded")),
    }
}

fn read(field: u32, message: Bytes) -> Result<Request, DecodeError> {
    Ok(match Kind::of_field(field) {
        Some(Kind::Put) => Request::Put(Message::decode(message)?),
        Some(Kind::DeleteRange) => Request::DeleteRange(Message::decode(message)?),
        Some(Kind::Txn) => Request::Txn(txn_decode::decode(message)?),
        Some(Kind::Compact) => Request::Compact(Message::decode(message)?),
        Some(Kind::LeaseGrant) => Request::LeaseGrant(Message::decode(message)?),
        Some(Kind::LeaseRevoke) => Request::LeaseRevoke(Message::decode(message)?),
        Some(Kind::Alarm) => Request::Alarm(Message::decode(message)?),
        Some(Kind::AuthEnable) => Request::Auth(Change::Enable),
        Some(Kind::AuthDisable) => Request::Auth(Change::Disable),
        Some(Kind::Authenticate) => Request::Auth(Change::Authenticate(Message::decode(message)?)),
        Some(Kind::UserAdd) => Request::Auth(Change::UserAdd(Message::decode(message)?)),
        Some(Kind::UserDelete) => Request::Auth(Change::UserDelete(Message::decode(message)?)),
        Some(Kind::UserChangePassword) => Request::Auth(Change::UserChangePassword(Message::decode(message)?)),
        Some(Kind::UserGrantRole) => Request::Auth(Change::UserGrantRole(Message::decode(message)?)),
        Some(Kind::UserRevokeRole) => Request::Auth(Change::UserRevokeRole(Message::decode(message)?)),
        Some(Kind::RoleAdd) => Request::Auth(Change::RoleAdd(Message::decode(message)?)),
        Some(Kind::RoleDelete) => Request::Auth(Change::RoleDelete(Message::decode(message)?)),
        Some(Kind::RoleGrantPermission) => Request::Auth(Change::RoleGrantPermission(Message::decode(message)?)),
        Some(Kind::RoleRevokePermission) => Request::Auth(Change::RoleRevokePermission(Message::decode(message)?)),
        Some(Kind::ClusterVersionSet) => Request::ClusterVersionSet(Message::decode(message)?),
        Some(Kind::MemberAttributesSet) => Request::MemberAttributesSet(MemberAttributes::decode(message)?),
        Some(Kind::MemberAdd) => Request::MemberAdd(NewMember::decode(message)?),
        Some(Kind::MemberRemove) => Request::MemberRemove(Message::decode(message)?),
        Some(Kind::MemberPromote) => Request::MemberPromote(Message::decode(message)?),
        Some(Kind::MemberUpdate) => Request::MemberUpdate(Message::decode(message)?),
        Some(Kind::CapabilityLevelSet) => Request::CapabilityLevelSet(Message::decode(message)?),
        Some(Kind::LeaseExpire) => Request::LeaseExpire(Message::decode(message)?),
        None => Request::Unknown(field),
    })
}

/// The response to a command, without the part of the header that only the responding member knows.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Response {
    /// The revision for the header.
    pub revision: i64,
    /// All fields of the message after the header, encoded.
    pub body: Vec<u8>,
}

impl Response {
    /// A response that has only a header.
    #[must_use]
    pub fn header_only(revision: i64) -> Self {
        Self { revision, body: Vec::new() }
    }
}

/// The bytes that the quota charges for a put in addition to its key and value.
const PUT_OVERHEAD_BYTES: u64 = 256;
const LEASE_BYTES: u64 = 64;

/// The bytes that the quota charges for a put.
#[must_use]
pub fn put_cost(put: &PutRequest) -> u64 {
    PUT_OVERHEAD_BYTES + put.key.len() as u64 + put.value.len() as u64
}

/// The bytes that the quota charges for a lease.
#[must_use]
pub fn lease_cost() -> u64 {
    LEASE_BYTES
}

/// The bytes that the quota charges for a transaction: those of its more expensive branch, whichever is taken. Deletions and
/// reads are free.
#[must_use]
pub fn txn_cost(txn: &TxnRequest) -> u64 {
    let branch = |ops: &[RequestOp]| ops.iter().map(op_cost).sum::<u64>();
    branch(&txn.success).max(branch(&txn.failure))
}

fn op_cost(op: &RequestOp) -> u64 {
    match &op.request {
        Some(request_op::Request::RequestPut(put)) => put_cost(put),
        Some(request_op::Request::RequestTxn(txn)) => txn_cost(txn),
        Some(request_op::Request::RequestRange(_) | request_op::Request::RequestDeleteRange(_)) | None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_decodes_from_its_entry() {
        let put = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() };
        let requester = Requester { user: "u", auth_revision: 3 };
        let entry = Command::encode_for(requester, 7, Kind::Put, &put.encode_to_vec());
        let expected = Command { id: 7, user: "u".into(), auth_revision: 3, level: 0, request: Request::Put(put) };
        assert!(Command::is_put(&entry) && !Command::is_put(&Command::encode(7, Kind::Txn, &[])));
        assert_eq!(Command::decode(entry).unwrap(), expected);
    }

    #[test]
    fn an_entry_is_encoded_as_etcd_encodes_it() {
        use crate::proto::etcdserverpb::InternalRaftRequest;
        let put = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() };
        let header = RequestHeader { id: 7, ..RequestHeader::default() };
        let theirs = InternalRaftRequest { header: Some(header), put: Some(put.clone()), ..Default::default() };
        assert_eq!(Command::encode(7, Kind::Put, &put.encode_to_vec()), theirs.encode_to_vec());
    }

    #[test]
    fn malformed_and_unknown_entries_are_distinguished() {
        assert!(Command::decode(Bytes::from_static(&[0x22, 0x7f, 1])).is_err());
        let foreign = Command::decode(Bytes::from_static(&[0xca, 0x3e, 0])).unwrap();
        assert_eq!((foreign.request, foreign.level), (Request::Unknown(1001), u64::MAX));
    }

    /// KV-32.
    #[test]
    fn a_transaction_costs_its_more_expensive_branch_at_every_level() {
        let put = |value: &'static str| PutRequest { key: "k".into(), value: value.into(), ..Default::default() };
        let op = |request| RequestOp { request: Some(request) };
        let inner =
            TxnRequest { success: vec![op(request_op::Request::RequestPut(put("12345")))], ..Default::default() };
        let txn = TxnRequest {
            success: vec![op(request_op::Request::RequestTxn(inner)), op(request_op::Request::RequestPut(put("1")))],
            failure: vec![op(request_op::Request::RequestDeleteRange(DeleteRangeRequest::default()))],
            ..Default::default()
        };
        assert_eq!(txn_cost(&txn), (256 + 1 + 5) + (256 + 1 + 1));
        let mirrored = TxnRequest { success: txn.failure, failure: txn.success, ..txn };
        assert_eq!(txn_cost(&mirrored), (256 + 1 + 5) + (256 + 1 + 1));
    }
}
