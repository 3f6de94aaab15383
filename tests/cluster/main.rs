//! Real members in real clusters, and whatever happens to them.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test may panic")]

mod failures;
mod founding;
mod harness;
mod load;
mod partitions;
mod proxy;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
