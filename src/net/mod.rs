//! Sockets: where the server listens, what it connects to, and what is spoken below its protocols.

pub mod listener;
pub mod stream;
pub mod tls;
mod tls_error;
pub mod url;
