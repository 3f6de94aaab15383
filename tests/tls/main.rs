//! TLS: clients, members, moving a cluster to it, renewed certificates and CAs, hostile clients.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod authority;
mod clients;
mod hostile;
mod listeners;
mod members;
mod moving;
mod rotation;
use test_support::{self as support, load};
