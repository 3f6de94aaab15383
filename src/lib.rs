//! metastore: an etcd-compatible metadata service.
//!
//! The floors, in reading order. A floor knows only those below it.

pub mod lease;
pub mod storage;

pub mod call;
pub mod error;
pub mod proto;
