//! What is tried with arbitrary bytes. Each target is a function of bytes that panics where a promise is broken, and some
//! seeds: inputs that lead it deep at once. libFuzzer drives them (`scripts/fuzz`), and so does an ordinary test with chance
//! alone (`tests/fuzzing.rs`), so that they cannot rot.
//!
//! | target | promise |
//! | --- | --- |
//! | [`frames`] | how bytes are cut makes no difference to the frames that are read |
//! | [`headers`] | header blocks mean what they mean to the `h2` crate |
//! | [`encoder`] | what we write is read by us and by the `h2` crate as it was meant |
//! | [`connection`] | a connection survives everything, within its bounds, and breaks no rule itself |

pub mod connection;
pub mod encoder;
pub mod frames;
pub mod headers;
mod input;
mod pipe;
mod server;
mod wire;

/// A target.
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// Tries one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 4] = [
    Target { name: "frames", run: frames::run, seeds: frames::seeds },
    Target { name: "headers", run: headers::run, seeds: headers::seeds },
    Target { name: "encoder", run: encoder::run, seeds: encoder::seeds },
    Target { name: "connection", run: connection::run, seeds: connection::seeds },
];
