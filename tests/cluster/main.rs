//! Tests of clusters of real member processes.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test may panic")]

mod corruption;
mod failures;
mod founding;
mod harness;
mod hostile;
mod intruders;
mod joining;
mod leadership;
mod leases;
mod load;
mod membership;
mod orphans;
mod outage;
mod partitions;
mod paused_leader;
mod peer_port;
#[path = "../process/mod.rs"]
mod process;
mod proxy;
mod register;
mod removal;
mod snapshots;
mod strangers;
mod stuck;
#[path = "../support/mod.rs"]
mod support;
mod watches;
