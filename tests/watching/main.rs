//! Watching, without threads and without a network: real streams over a real state machine in memory, stepped by hand. Only
//! what other clients notice is measured on real servers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod aftermath;
mod client;
mod contract;
mod expensive;
mod lagging;
mod neighbours;
mod progress;
mod race;
mod random;
mod speed;
#[path = "../support/mod.rs"]
mod support;
mod world;

/// As in the server; and it counts what each thread allocates.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
