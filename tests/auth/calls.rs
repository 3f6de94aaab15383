//! Calls of any method with raw messages, and the requests that set up users.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use metastore::proto::{
    authpb::{Permission, permission::Type},
    etcdserverpb::{
        AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthUserAddRequest,
        AuthUserGrantRoleRequest, AuthenticateRequest, AuthenticateResponse,
    },
};
use prost::Message;
use test_support::time_limit;
use tonic::{
    Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

/// A stream is left after its first message, or after this long without one.
const STREAM_WAIT: Duration = Duration::from_millis(700);

/// Passes messages on as bytes.
#[derive(Clone, Copy)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls a method with one message; returns the first message of the answer, None if a stream sends none.
pub async fn call(
    channel: &Channel,
    path: &str,
    token: Option<&str>,
    message: impl Into<Bytes>,
) -> Result<Option<Bytes>, Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    // The client's side of the stream stays open: some methods end when it does.
    let messages = tokio_stream::StreamExt::chain(tokio_stream::once(message.into()), tokio_stream::pending());
    let keeps_open = path.ends_with("/Watch") || path.ends_with("/LeaseKeepAlive");
    let wait = if keeps_open || path.ends_with("/Observe") { STREAM_WAIT } else { time_limit() };
    let path = path.parse().unwrap();
    let first = async {
        let mut answers = if keeps_open {
            client.streaming(with_token(messages, token), path, RawCodec).await?.into_inner()
        } else {
            let one = tokio_stream::StreamExt::take(messages, 1);
            client.streaming(with_token(one, token), path, RawCodec).await?.into_inner()
        };
        answers.message().await
    };
    tokio::time::timeout(wait, first).await.unwrap_or(Ok(None))
}

fn with_token<S>(stream: S, token: Option<&str>) -> Request<S> {
    let mut request = Request::new(stream);
    if let Some(token) = token {
        request.metadata_mut().insert("token", token.parse().unwrap());
    }
    request
}

/// Calls a unary method that must succeed.
pub async fn must(channel: &Channel, path: &str, token: Option<&str>, message: &impl Message) -> Bytes {
    let answer = call(channel, path, token, message.encode_to_vec()).await;
    answer.unwrap_or_else(|status| panic!("{path}: {status}")).expect("a unary call has an answer")
}

pub async fn log_in(channel: &Channel, name: &str, password: &str) -> Result<String, Status> {
    let request = AuthenticateRequest { name: name.into(), password: password.into() };
    let answer = call(channel, "/etcdserverpb.Auth/Authenticate", None, request.encode_to_vec()).await?;
    Ok(AuthenticateResponse::decode(answer.expect("a unary call has an answer")).unwrap().token)
}

pub async fn add_user(channel: &Channel, token: Option<&str>, name: &str, password: &str) {
    let request = AuthUserAddRequest { name: name.into(), password: password.into(), ..Default::default() };
    must(channel, "/etcdserverpb.Auth/UserAdd", token, &request).await;
}

pub async fn add_role(channel: &Channel, token: Option<&str>, name: &str) {
    must(channel, "/etcdserverpb.Auth/RoleAdd", token, &AuthRoleAddRequest { name: name.into() }).await;
}

pub async fn grant_role(channel: &Channel, token: Option<&str>, user: &str, role: &str) {
    let request = AuthUserGrantRoleRequest { user: user.into(), role: role.into() };
    must(channel, "/etcdserverpb.Auth/UserGrantRole", token, &request).await;
}

pub async fn permit(channel: &Channel, token: Option<&str>, role: &str, kind: Type, key: &str, range_end: &str) {
    let perm =
        Permission { perm_type: kind as i32, key: key.to_owned().into(), range_end: range_end.to_owned().into() };
    let request = AuthRoleGrantPermissionRequest { name: role.into(), perm: Some(perm) };
    must(channel, "/etcdserverpb.Auth/RoleGrantPermission", token, &request).await;
}

/// The users `root`, `reader` and `writer` of the keys from `a` to `b`, and `idle` without a role. Each has its name as password.
pub async fn set_up_users(channel: &Channel) {
    for name in ["root", "reader", "writer", "idle"] {
        add_user(channel, None, name, name).await;
    }
    for (role, kind) in [("r", Type::Read), ("w", Type::Readwrite)] {
        add_role(channel, None, role).await;
        permit(channel, None, role, kind, "a", "b").await;
    }
    add_role(channel, None, "root").await;
    for (user, role) in [("root", "root"), ("reader", "r"), ("writer", "w")] {
        grant_role(channel, None, user, role).await;
    }
}

pub async fn enable(channel: &Channel) {
    must(channel, "/etcdserverpb.Auth/AuthEnable", None, &AuthEnableRequest {}).await;
}
