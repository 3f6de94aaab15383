//! What clients call.

pub mod watch;
