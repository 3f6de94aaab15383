//! One server, seen by stock clients and over the bare wire: keys, transactions, streams, upkeep, and the HTTP beside them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod bare;
mod bounds;
mod errors;
mod etcdctl;
mod full_disk;
mod hashes;
mod http;
mod keys;
mod lists;
mod maintenance;
mod places;
mod quota;
mod services;
mod stop;
mod stream;
#[path = "../support/mod.rs"]
mod support;
