//! Settings of the listeners for clients: which HTTP/2 server, limits per connection, timeouts.

use std::{ops::RangeInclusive, time::Duration};

use super::{
    parse::FlagValues,
    value::{self, count},
};

/// Flags that only the HTTP/2 server of this project honours.
pub const OWN_SERVER_FLAGS: [&str; 4] =
    ["max-resets-per-second", "max-connection-bytes", "max-held-bytes", "client-idle-timeout"];
/// With a shorter timeout, a momentary network problem would close connections.
const MIN_TIMEOUT: Duration = Duration::from_secs(1);
/// With less, a request with a token would be refused; more is more than the frames of a header block may contain.
const HEADER_LIST_BYTES: RangeInclusive<u32> = 8 << 10..=1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontendConfig {
    pub grpc_server: GrpcServer,
    /// Whether the JSON API is served.
    pub json_api: bool,
    /// Calls in progress that one connection may cancel per second.
    pub max_resets: u32,
    /// Bytes of the header fields of a request, and 32 bytes for each field.
    pub max_header_list_bytes: u32,
    /// Bytes that the server holds for one connection.
    pub max_connection_bytes: usize,
    /// Bytes that the server holds for all connections together.
    pub max_held_bytes: usize,
    /// How long a client may take to send its first byte, or to complete a handshake, a preface or a header block.
    pub begin_timeout: Duration,
    /// How long a client may take to read 64 KiB of what is written to it, or to send the next piece of a request's body.
    pub read_timeout: Duration,
    /// How long an HTTP/2 connection may stay open without a call. None: no limit.
    pub idle_timeout: Option<Duration>,
}

/// The HTTP/2 server for clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrpcServer {
    /// The implementation in `http2`.
    Own,
    /// tonic, on hyper.
    Tonic,
}

impl FrontendConfig {
    pub(super) fn read(values: &FlagValues) -> Result<Self, String> {
        let timeout = |flag| match values.duration(flag) {
            time if time >= MIN_TIMEOUT => Ok(time),
            _ => Err(format!("--{flag} must be at least 1s (set to {})", values.text(flag))),
        };
        let unsigned_32 = |flag| value::unsigned_32(values.text(flag)).expect("a text is checked when it is set");
        Ok(Self {
            grpc_server: if values.text("grpc-server") == "tonic" { GrpcServer::Tonic } else { GrpcServer::Own },
            json_api: values.get("enable-grpc-gateway"),
            max_resets: unsigned_32("max-resets-per-second"),
            max_header_list_bytes: match unsigned_32("max-header-list-bytes") {
                bytes if HEADER_LIST_BYTES.contains(&bytes) => bytes,
                bytes => {
                    let (least, most) = HEADER_LIST_BYTES.into_inner();
                    return Err(format!("--max-header-list-bytes must be from {least} to {most} (set to {bytes})"));
                }
            },
            max_connection_bytes: count(values.get("max-connection-bytes")),
            max_held_bytes: count(values.get("max-held-bytes")),
            begin_timeout: timeout("client-begin-timeout")?,
            read_timeout: timeout("client-read-timeout")?,
            idle_timeout: match values.duration("client-idle-timeout") {
                Duration::ZERO => None,
                _ => Some(timeout("client-idle-timeout")?),
            },
        })
    }
}
