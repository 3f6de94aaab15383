//! The client port from outside: one port for all protocols, TLS, third-party clients, and abusive clients.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod access;
mod clients;
mod conformance;
mod floods;
mod h2spec;
mod ledger;
mod mixed_floods;
mod odd_calls;
mod raw;
mod soak;
mod stalls;
use test_support as support;
