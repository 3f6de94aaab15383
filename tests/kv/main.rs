//! One server, through stock clients and raw gRPC: keys, transactions, streams, maintenance, and the HTTP endpoints on the same
//! port.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod bounds;
mod errors;
mod etcdctl;
mod full_disk;
mod hashes;
mod http;
mod keys;
mod listeners;
mod lists;
mod maintenance;
mod metrics;
mod quota;
mod services;
mod stop;
mod stream;
mod unix_sockets;
mod without_flags;

use test_support as support;
