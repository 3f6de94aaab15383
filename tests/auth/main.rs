//! Authentication: users, roles, permissions and tokens, over the wire.
//!
//! [`matrix`] calls every RPC of the compiled descriptors as every kind of user, beside the real etcd where there is one;
//! [`walk`] types etcd's documented steps with etcdctl at both servers; [`members`] has clusters, restarts and snapshots;
//! [`tokens`] the tokens and certificates; [`logins`] many clients that log in at once.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test may panic")]

mod calls;
mod logins;
mod matrix;
mod members;
mod tokens;
mod walk;
