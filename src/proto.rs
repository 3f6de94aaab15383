//! The messages of `proto/`, as Rust types. Generated; nothing here is written by hand.

#![allow(missing_docs, clippy::pedantic, clippy::allow_attributes_without_reason, reason = "generated code")]

/// What clients say and hear.
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}
/// Keys and events.
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}
/// Users and roles.
pub mod authpb {
    tonic::include_proto!("authpb");
}
/// Members, as the log describes them.
pub mod membershippb {
    tonic::include_proto!("membershippb");
}
/// Leases, as they are stored.
pub mod leasepb {
    tonic::include_proto!("leasepb");
}
/// Named locks.
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}
/// Named elections.
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}
/// The health of the server.
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// All of `proto/` in descriptor form, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
