//! The front door.

pub mod fault;
pub mod frame;
pub mod hpack;
