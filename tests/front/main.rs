//! The front door from outside: one port for everything, TLS, other people's clients, and clients that mean no good.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod clients;
mod floods;
mod h2spec;
mod ledger;
mod loop_and_tonic;
mod odd_calls;
mod raw;
mod soak;
mod stalls;
#[path = "../support/mod.rs"]
mod support;
mod tls;
