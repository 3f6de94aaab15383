//! The standard gRPC services (reflection, health), and the methods that are not implemented yet, with both HTTP/2 servers.

use std::collections::BTreeSet;

use metastore::proto::{self, etcdserverpb::SnapshotRequest, health::HealthListRequest};
use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use tonic::{Code, Status, codec::Streaming};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::{Server, assert_refused};

/// A server with each HTTP/2 implementation.
fn both() -> impl Iterator<Item = Server> {
    ["--grpc-server=own", "--grpc-server=tonic"].into_iter().map(|choice| Server::start(&[choice]))
}

/// The descriptors of all files in `proto/`.
fn described() -> Vec<FileDescriptorProto> {
    FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file
}

async fn reflect(server: &Server, request: MessageRequest) -> Result<MessageResponse, Status> {
    let mut client = ServerReflectionClient::new(server.channel().await);
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await?.into_inner();
    let answer = answers.message().await?.expect("each request has an answer");
    Ok(answer.message_response.expect("each answer has content"))
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
async fn streaming_snapshots_is_not_implemented_yet() {
    for server in both() {
        // The error arrives with the call or with the first message, depending on whether headers were sent before.
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
async fn health_is_reported_for_the_server_as_a_whole() {
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
        assert!(!matches!(watch.message().await, Ok(Some(_))), "a stopped server is no longer reported as serving");
    }
}

/// Only the whole server, with the empty name, has a health status.
#[tokio::test]
async fn the_health_of_single_services_is_unknown() {
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
