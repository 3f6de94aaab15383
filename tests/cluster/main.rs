//! Tests of clusters of real member processes.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test may panic")]

mod bootstrap;
mod corruption;
mod failures;
mod floods;
mod foreign_members;
mod harness;
mod hostile;
mod invalid_peers;
mod joining;
mod leadership;
mod leases;
mod lost_leader_streams;
mod membership;
mod metrics;
mod network;
mod outage;
mod partitions;
mod paused_leader;
mod peer_port;
mod register;
mod removal;
mod snapshots;
mod stuck_disks;
mod watches;

use test_support::{self as support, load};
