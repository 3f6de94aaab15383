//! How clients are served: who speaks HTTP/2 with them, what they may ask of him, and TLS.

use std::{path::PathBuf, time::Duration};

use super::{
    flags::{Flag, Kind, flag},
    parse::Typed,
    resolve::{count, time},
    value,
};
use crate::{
    logging::{Level, Notice},
    urls::Url,
};

/// The flags that are not etcd's.
pub const FLAGS: &[Flag] = &[
    flag("grpc-server", Kind::Choice(&["own", "tonic"]), "own", "Who speaks HTTP/2 with clients: `own` or `tonic`."),
    flag("max-resets-per-second", Kind::Unsigned32, "1000", "Calls in progress that one connection may take back."),
    flag(
        "max-connection-bytes",
        Kind::Unsigned,
        "268435456",
        "What one connection may make the server keep: requests, answers that are not read, and heads of open streams.",
    ),
    flag(
        "max-held-bytes",
        Kind::Unsigned,
        "2147483648",
        "The same, of all connections; beyond it only those that hold more than a fair share are refused.",
    ),
    flag(
        "client-begin-timeout",
        Kind::Duration,
        "10s",
        "How long a client may take to say anything, to shake hands, or to finish a preface or a block of headers.",
    ),
    flag(
        "client-read-timeout",
        Kind::Duration,
        "1m0s",
        "How long a client may take to read 64 KiB of what is written to it, or to send the next piece of a request's body.",
    ),
    flag(
        "client-idle-timeout",
        Kind::Duration,
        "0s",
        "How long an HTTP/2 connection may be open without a call; 0s: for ever.",
    ),
];
/// Whoever is asked for less would be sent away for a bad moment of the network.
const SHORTEST_TIMEOUT: Duration = Duration::from_secs(1);

/// How clients are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Front {
    /// Who speaks HTTP/2.
    pub grpc_server: GrpcServer,
    /// Calls in progress that one connection may take back in a second.
    pub max_resets: u32,
    /// Bytes that are kept for one connection.
    pub max_connection_bytes: usize,
    /// Bytes that are kept for all of them.
    pub max_held_bytes: usize,
    /// How long a client may take to begin.
    pub begin_timeout: Duration,
    /// How long one may take to read a little of what is written to it.
    pub read_timeout: Duration,
    /// How long a connection may be open without a call. None: for ever.
    pub idle_timeout: Option<Duration>,
    /// How TLS is spoken, where a URL asks for it.
    pub tls: Option<TlsFiles>,
}

/// Who speaks HTTP/2 with clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrpcServer {
    /// Our own loop.
    Own,
    /// tonic, over hyper.
    Tonic,
}

/// The files that TLS for clients needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our certificate, and who signed it.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who signs clients' certificates.
    pub trusted_ca: Option<PathBuf>,
    /// Whether clients have to show one.
    pub client_cert_auth: bool,
}

impl Front {
    /// What was typed about it.
    pub(super) fn read(typed: &Typed, listen: &[Url], notices: &mut Vec<Notice>) -> Result<Self, String> {
        let timeout = |flag| match time(typed, flag) {
            time if time >= SHORTEST_TIMEOUT => Ok(time),
            _ => Err(format!("--{flag} must be at least 1s (set to {})", typed.text(flag))),
        };
        let unsigned_32 = |flag| value::unsigned_32(typed.text(flag)).expect("a text is checked when it is set");
        Ok(Self {
            grpc_server: if typed.text("grpc-server") == "tonic" { GrpcServer::Tonic } else { GrpcServer::Own },
            max_resets: unsigned_32("max-resets-per-second"),
            max_connection_bytes: count(typed.get("max-connection-bytes")),
            max_held_bytes: count(typed.get("max-held-bytes")),
            begin_timeout: timeout("client-begin-timeout")?,
            read_timeout: timeout("client-read-timeout")?,
            idle_timeout: match time(typed, "client-idle-timeout") {
                Duration::ZERO => None,
                _ => Some(timeout("client-idle-timeout")?),
            },
            tls: tls_files(typed, listen, notices)?,
        })
    }
}

/// etcd's rules: a secure URL needs certificate and key; those of a plain one are ignored, with a warning.
fn tls_files(typed: &Typed, listen: &[Url], notices: &mut Vec<Notice>) -> Result<Option<TlsFiles>, String> {
    let path = |flag| Some(typed.text(flag)).filter(|text| !text.is_empty()).map(PathBuf::from);
    let (cert, key, trusted_ca) = (path("cert-file"), path("key-file"), path("trusted-ca-file"));
    let client_cert_auth = typed.get::<bool>("client-cert-auth") || trusted_ca.is_some();
    for url in listen.iter().filter(|url| !url.is_secure()) {
        if cert.is_some() || key.is_some() {
            let message = "scheme is http or unix while cert and key files are present; ignoring cert and key files";
            notices.push(Notice::new(Level::Warn, message).with("client-url", url.as_str()));
        }
        if typed.get("client-cert-auth") {
            let message =
                "scheme is http or unix while --client-cert-auth is enabled; ignoring client cert auth for this URL";
            notices.push(Notice::new(Level::Warn, message).with("client-url", url.as_str()));
        }
    }
    let Some(secure) = listen.iter().find(|url| url.is_secure()) else { return Ok(None) };
    match (cert, key) {
        (Some(cert), Some(key)) => Ok(Some(TlsFiles { cert, key, trusted_ca, client_cert_auth })),
        _ => Err(format!(
            "TLS key/cert (--cert-file, --key-file) must be provided for client url {secure} with HTTPS scheme"
        )),
    }
}
