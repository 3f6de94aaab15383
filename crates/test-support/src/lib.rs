//! What integration tests share.
//!
//! * [`Server`]: real processes of `metastore`, and of etcd to compare with, in temporary directories. Only this crate starts
//!   them. A server of our own listens on ports that the system chooses and logs its addresses.
//! * [`eventually`]: every wait has an end, and says what it waited for. No test sleeps for something to happen.
//! * [`load`](load::Load): clients that write all the time, and remember what was acknowledged.
//! * [`require`]: what a test needs beside the program under test. Without it the test is skipped visibly, or fails.

#![allow(clippy::unwrap_used, reason = "what fails in a test ends the test")]

mod http_client;
pub mod load;
pub mod network_namespace;
mod ports;
mod process;
pub mod requirements;
mod server;
mod wait;

use std::fmt;

pub use http_client::{HttpResponse, http};
pub use process::Process;
pub use requirements::require;
pub use server::{Server, free_url, program};
pub use wait::{eventually, eventually_async, scaled, time_limit};

/// Asserts that a call was refused with this code and message.
#[track_caller]
pub fn assert_refused<T: fmt::Debug>(answer: Result<T, tonic::Status>, code: tonic::Code, message: &str) {
    let status = answer.expect_err("the call is refused");
    assert_eq!((status.code(), status.message()), (code, message));
}
