//! metastore: an etcd-compatible metadata service.
//!
//! The layers, in reading order. A layer depends only on those below it.

pub mod api;
pub mod http2;
pub mod node;
pub mod peer;
pub mod watch;

pub mod state;

pub mod lease;
pub mod mvcc;
pub mod storage;

pub mod call;
pub mod error;
pub mod inbox;
pub mod ledger;
pub mod metrics;
pub mod proto;
pub mod urls;
pub mod version;

pub mod bench;
pub mod config;
pub mod logging;
pub mod server;
