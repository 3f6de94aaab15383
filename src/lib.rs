//! metastore: an etcd-compatible metadata service.
//!
//! The layers, in reading order. A layer depends only on those below it.

pub mod cli;
pub mod server;

pub mod frontend;
pub mod service;

pub mod cluster;
pub mod node;
pub mod raft_log;
pub mod watch;

pub mod state;

pub mod auth;
pub mod lease;
pub mod mvcc;
pub mod storage;

pub mod config;
pub mod logging;
pub mod net;

pub mod slow_log;

pub mod error;
pub mod inbox;
pub mod metrics;
pub mod proto;
pub mod repeats;
pub mod version;
