//! What faces a socket: accepts connections, decodes requests, calls the service, encodes its outcomes, and maps errors. Decides
//! nothing about data, reads no database and proposes nothing.

pub mod gateway;
pub mod grpc;
pub mod http;
pub mod http2_service;
pub mod listener;
pub mod peer_http;
pub mod peer_listener;
pub mod routes;
