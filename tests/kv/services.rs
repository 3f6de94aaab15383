//! What every gRPC server offers beside its own methods, and what this one does not offer yet; with either server of HTTP/2.

use std::collections::BTreeSet;

use metastore::proto::{self, etcdserverpb::SnapshotRequest, health::HealthListRequest};
use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use tonic::{Code, Request, Status, client::Grpc, codec::Streaming};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::{Server, assert_refused};

/// One with each server of HTTP/2.
fn both() -> impl Iterator<Item = Server> {
    ["--grpc-server=own", "--grpc-server=tonic"].into_iter().map(|choice| Server::start(&[choice]))
}

/// All of `proto/`.
fn described() -> Vec<FileDescriptorProto> {
    FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file
}

async fn reflect(server: &Server, request: MessageRequest) -> Result<MessageResponse, Status> {
    let mut client = ServerReflectionClient::new(server.channel().await);
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await?.into_inner();
    let answer = answers.message().await?.expect("each request has an answer");
    Ok(answer.message_response.expect("each answer says something"))
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let expected: BTreeSet<String> = described()
        .iter()
        .flat_map(|file| file.service.iter().map(|service| format!("{}.{}", file.package(), service.name())))
        .chain(["grpc.reflection.v1.ServerReflection".to_owned()])
        .collect();
    assert!(expected.contains("etcdserverpb.Watch") && expected.contains("v3electionpb.Election"));
    for server in both() {
        let answer = reflect(&server, MessageRequest::ListServices(String::new())).await.unwrap();
        let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
        assert_eq!(list.service.into_iter().map(|service| service.name).collect::<BTreeSet<_>>(), expected);
    }
}

#[tokio::test]
async fn reflection_finds_the_file_that_defines_a_symbol() {
    let file = |name: &str| described().into_iter().find(|file| file.name() == name).unwrap();
    let symbols = [("etcdserverpb.KV", "etcd/rpc.proto"), ("mvccpb.KeyValue", "etcd/kv.proto")];
    for server in both() {
        for (symbol, name) in symbols {
            let answer = reflect(&server, MessageRequest::FileContainingSymbol(symbol.to_owned())).await.unwrap();
            let MessageResponse::FileDescriptorResponse(found) = answer else { panic!("{answer:?}") };
            let found: Vec<_> = found.file_descriptor_proto.iter().map(Vec::as_slice).collect();
            assert_eq!(found, [file(name).encode_to_vec()], "{symbol}");
        }
        let unknown = reflect(&server, MessageRequest::FileContainingSymbol("etcdserverpb.No".to_owned())).await;
        assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
    }
}

#[tokio::test]
async fn every_method_about_users_says_that_there_are_none_yet() {
    let auth = described().into_iter().flat_map(|file| file.service).find(|service| service.name() == "Auth").unwrap();
    assert_eq!(auth.method.len(), 17);
    for server in both() {
        let mut grpc = Grpc::new(server.channel().await);
        for method in &auth.method {
            grpc.ready().await.unwrap();
            let path = format!("/etcdserverpb.Auth/{}", method.name()).parse().unwrap();
            let answer = grpc.unary(Request::new(()), path, ProstCodec::<(), ()>::default()).await;
            let clear = "this version of metastore has no users, roles and permissions yet";
            assert_refused(answer, Code::Unimplemented, clear);
        }
    }
}

#[tokio::test]
async fn a_saved_snapshot_is_refused_as_not_there_yet() {
    for server in both() {
        // Where the refusal is found depends on whether headers came before it.
        let refused = match server.maintenance().await.snapshot(SnapshotRequest {}).await {
            Ok(stream) => stream.into_inner().message().await.map(|_| ()),
            Err(status) => Err(status),
        };
        assert_refused(refused, Code::Unimplemented, "this version of metastore cannot stream snapshots yet");
    }
}

async fn watch_health(server: &Server, service: &str) -> Result<Streaming<HealthCheckResponse>, Status> {
    let request = HealthCheckRequest { service: service.to_owned() };
    Ok(HealthClient::new(server.channel().await).watch(request).await?.into_inner())
}

#[tokio::test]
async fn health_is_told_of_the_server_as_a_whole() {
    for mut server in both() {
        let mut listing = proto::health::health_client::HealthClient::new(server.channel().await);
        let list = listing.list(HealthListRequest {}).await.unwrap().into_inner();
        let all: Vec<_> = list.statuses.iter().map(|(name, health)| (name.as_str(), health.status)).collect();
        assert_eq!(all, [("", ServingStatus::Serving as i32)]);
        let mut client = HealthClient::new(server.channel().await);
        let check = client.check(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert_eq!(check.status(), ServingStatus::Serving);
        let mut watch = watch_health(&server, "").await.unwrap();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        server.stop();
        assert!(!matches!(watch.message().await, Ok(Some(_))), "who has stopped is no longer said to serve");
    }
}

/// Only the whole server has a name.
#[tokio::test]
async fn the_health_of_anything_else_is_not_known() {
    for server in both() {
        for service in ["etcdserverpb.KV", "no.such.Service"] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let check = HealthClient::new(server.channel().await).check(request).await;
            assert_refused(check, Code::NotFound, "unknown service");
            let mut watch = watch_health(&server, service).await.unwrap();
            assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown, "{service}");
        }
    }
}
