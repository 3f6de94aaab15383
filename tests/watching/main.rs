//! Watching, without threads and without a network: real streams over a real state machine in memory, stepped by hand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod aftermath;
mod client;
mod contract;
mod lagging;
mod progress;
mod race;
mod random;
mod speed;
mod world;
