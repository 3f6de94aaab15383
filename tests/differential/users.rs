//! The users of a comparison with authentication: root, and one that may read some keys and write others.

use metastore::proto::{
    authpb::{Permission, permission::Type},
    etcdserverpb::{
        AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthUserAddRequest,
        AuthUserGrantRoleRequest, AuthenticateRequest, TxnRequest,
        auth_client::AuthClient,
        request_op::Request::{RequestDeleteRange, RequestPut, RequestRange, RequestTxn},
    },
};
use tonic::transport::Channel;

use super::answers::{Operation, Token};

const ROOT: &str = "root";
const LIMITED: &str = "ann";

/// What the second user may do; ranges that touch, and one without an end.
const PERMISSIONS: [(Type, &str, &str); 6] = [
    (Type::Read, "k00", "k12"),
    (Type::Readwrite, "k12", "k25"),
    (Type::Write, "k25", "k3"),
    (Type::Read, "k30", ""),
    (Type::Write, "a", "b"),
    (Type::Read, "k35", "\0"),
];

/// Logs both in; the first time, adds them and enables authentication.
pub async fn log_in(channel: &Channel) -> [Token; 2] {
    let mut client = AuthClient::new(channel.clone());
    let request = |name: &str| AuthenticateRequest { name: name.into(), password: "pw".into() };
    if client.authenticate(request(ROOT)).await.is_err() {
        set_up(&mut client).await;
    }
    let mut tokens = Vec::new();
    for name in [ROOT, LIMITED] {
        let token = client.authenticate(request(name)).await.unwrap().into_inner().token;
        tokens.push(Token(Some(token.parse().unwrap())));
    }
    tokens.try_into().expect("there are two users")
}

async fn set_up(client: &mut AuthClient<Channel>) {
    for name in [ROOT, LIMITED] {
        let request = AuthUserAddRequest { name: name.into(), password: "pw".into(), ..Default::default() };
        client.user_add(request).await.unwrap();
    }
    client.role_add(AuthRoleAddRequest { name: "r".into() }).await.unwrap();
    for (kind, key, range_end) in PERMISSIONS {
        let perm = Permission { perm_type: kind as i32, key: key.into(), range_end: range_end.into() };
        let request = AuthRoleGrantPermissionRequest { name: "r".into(), perm: Some(perm) };
        client.role_grant_permission(request).await.unwrap();
    }
    for (user, role) in [(ROOT, ROOT), (LIMITED, "r")] {
        client.user_grant_role(AuthUserGrantRoleRequest { user: user.into(), role: role.into() }).await.unwrap();
    }
    client.auth_enable(AuthEnableRequest {}).await.unwrap();
}

/// Whether an operation has a range whose end is not after its beginning. Whether etcd denies such a range depends on the shape
/// of the tree in which it keeps permissions.
pub fn has_range_without_keys(operation: &Operation) -> bool {
    match operation {
        Operation::Range(range) | Operation::RangeStream(range) => is_without_keys(&range.key, &range.range_end),
        Operation::DeleteRange(delete) => is_without_keys(&delete.key, &delete.range_end),
        Operation::Txn(txn) => txn_has_range_without_keys(txn),
        _ => false,
    }
}

fn txn_has_range_without_keys(txn: &TxnRequest) -> bool {
    let compares = txn.compare.iter().any(|compare| is_without_keys(&compare.key, &compare.range_end));
    compares
        || txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
            Some(RequestRange(range)) => is_without_keys(&range.key, &range.range_end),
            Some(RequestDeleteRange(delete)) => is_without_keys(&delete.key, &delete.range_end),
            Some(RequestTxn(txn)) => txn_has_range_without_keys(txn),
            Some(RequestPut(_)) | None => false,
        })
}

fn is_without_keys(key: &[u8], range_end: &[u8]) -> bool {
    !range_end.is_empty() && range_end != b"\0" && range_end <= key
}
