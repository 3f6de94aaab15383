//! The audit log: who has administered what, and what was denied.
//!
//! One line per decision, whatever protocol the request came through, from the logger `audit`. With `--audit-log` the lines go to
//! a file of their own. Reads and writes of keys that are allowed are not logged.

use crate::{
    error::Error,
    logging::{Level, Notice},
    service::{Caller, auth::Identity},
};

/// Logs the outcome of an operation that changes users, members or the cluster.
pub fn administered(caller: &Caller, identity: &Identity, operation: &str, target: &str, error: Option<&Error>) {
    let decision = if error.is_some_and(is_denial) { "denied" } else { "allowed" };
    let line = line(caller, identity, operation, decision).with("target", target);
    match error {
        Some(error) => line.with("error", error.to_string()).log_audit(),
        None => line.log_audit(),
    }
}

/// Logs that an operation was refused for lack of an identity or a permission.
pub fn denied(caller: &Caller, identity: &Identity, operation: &str, error: &Error) {
    line(caller, identity, operation, "denied").with("error", error.to_string()).log_audit();
}

/// Whether an error says that a caller may not do what it has asked for.
pub fn is_denial(error: &Error) -> bool {
    matches!(
        error,
        Error::PermissionDenied
            | Error::UserEmpty
            | Error::InvalidAuthToken
            | Error::AuthFailed
            | Error::NoPasswordUser
            | Error::AuthOldRevision
    )
}

fn line(caller: &Caller, identity: &Identity, operation: &str, decision: &'static str) -> Notice {
    let address = caller.connection.as_ref().map_or("", |connection| connection.address.as_str());
    Notice::new(Level::Info, "audit")
        .with("user", identity.user())
        .with("remote-addr", address)
        .with("operation", operation)
        .with("decision", decision)
}
