//! The JSON API below `/v3/`: each route, malformed requests and streams, beside a real etcd; what clients can make it hold.
//! The pages of plain HTTP, and the quick HTTP API.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test may panic")]

mod bounds;
mod client;
mod etcd3gw;
mod pages;
mod pair;
mod quick_api;
mod random;
mod session;
mod streams;
mod tokens;
use test_support as support;
