//! Watches without threads or network: real watch streams over a real state machine in memory, stepped by hand. Only the effects
//! on other clients are measured on real servers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod client;
mod contract;
mod expensive;
mod install_and_stop;
mod lagging;
mod other_clients;
mod progress;
mod race;
mod random;
mod speed;
mod world;

/// The allocator of the server, which also counts the allocations of each thread.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
use test_support as support;
