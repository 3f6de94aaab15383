//! Fuzz targets. Each one is a function of arbitrary bytes that panics if a property does not hold, with some seeds: inputs that
//! reach much of the code at once. libFuzzer drives the targets (`scripts/fuzz`); an ordinary test runs them with random inputs
//! (`tests/fuzzing.rs`), so that they keep compiling and passing.
//!
//! | target | property |
//! | --- | --- |
//! | [`frames`] | the frames that are read do not depend on how the bytes are split |
//! | [`headers`] | header blocks are understood as the `h2` crate understands them |
//! | [`encoder`] | our decoder and the `h2` crate read the header blocks that we write |
//! | [`connection`] | a connection survives any input within its limits and never violates the protocol itself |
//! | [`database`] | any file in bbolt's format is read to an end, or refused; what is written is read again |
//! | [`permissions`] | what a user may read and write is what checking each key says |
//! | [`tokens`] | a token names a user only if it is signed and says so |

pub mod connection;
pub mod database;
pub mod encoder;
pub mod frames;
pub mod headers;
mod input;
pub mod permissions;
mod pipe;
#[path = "../../../crates/http2/src/connection/tests/test_service.rs"]
mod test_service;
pub mod tokens;
mod wire;

pub struct Target {
    pub name: &'static str,
    /// Tries one input.
    pub run: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

pub const TARGETS: [Target; 7] = [
    Target { name: "frames", run: frames::run, seeds: frames::seeds },
    Target { name: "headers", run: headers::run, seeds: headers::seeds },
    Target { name: "encoder", run: encoder::run, seeds: encoder::seeds },
    Target { name: "connection", run: connection::run, seeds: connection::seeds },
    Target { name: "database", run: database::run, seeds: database::seeds },
    Target { name: "permissions", run: permissions::run, seeds: permissions::seeds },
    Target { name: "tokens", run: tokens::run, seeds: tokens::seeds },
];
