//! Gets entries agreed among the members and hands them to the state.
//!
//! This is the only floor that knows raft-rs and the only one that owns threads. Its rooms are values with non-blocking
//! steps; a thread is a thin shell around one of them, so the same code runs under the server and under a simulation.
//!
//! INVARIANTS
//! * Nothing is applied that the log has not synced: applied ≤ persisted ≤ last.
//! * Nothing is cut from the log that the database has not made durable: truncated ≤ durable applied ≤ applied.

pub mod log;
