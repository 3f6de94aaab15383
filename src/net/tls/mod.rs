//! TLS, for clients and between members.
//!
//! ```text
//! Files ──▶ Reloaded ─┬─▶ ServerTls::accept   a client or a member connects: the handshake runs on threads of its own
//!                     └─▶ ClientTls::connect  this member connects to another one
//! ```
//!
//! Both take a plain connection and return a [`Stream`](super::stream::Stream), so that nothing above has to know what is spoken
//! below it.

mod accept;
mod connect;
mod generated;
mod reload;
mod verify;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::rustls::{
    SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::{listener::Schemes, stream::Socket};
pub use accept::{ServerTls, client_common_name};
pub use connect::ClientTls;
pub use generated::{GeneratedCertificate, generate};

/// The system's CA certificates, for when no file is configured; Debian's path first.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// HTTP/2, as a protocol of ALPN.
const HTTP2: &[u8] = b"h2";
/// The first byte of a TLS handshake record.
const HANDSHAKE: u8 = 0x16;

/// Waits for the first byte of a connection, if it decides whether a TLS handshake follows: a port that accepts both looks at it.
pub async fn begins_handshake(schemes: Schemes, socket: &Socket) -> io::Result<bool> {
    match socket {
        Socket::Tcp(_) if schemes.secure && schemes.plain => {
            let mut first = [0];
            Ok(socket.peek(&mut first).await? > 0 && first[0] == HANDSHAKE)
        }
        Socket::Tcp(_) | Socket::Unix(_) => Ok(schemes.secure && !schemes.plain),
    }
}

/// One of the two sides that have flags of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Clients,
    Peers,
}

impl Side {
    /// As in the labels of metrics, and in log lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clients => "client",
            Self::Peers => "peer",
        }
    }

    /// What the names of its flags begin with, for flags that both sides have.
    pub fn flag_prefix(self) -> &'static str {
        match self {
            Self::Clients => "",
            Self::Peers => "peer-",
        }
    }
}

/// A certificate, with its chain, and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Which certificates are accepted, of those that were issued by a trusted CA.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Allowed {
    #[default]
    Any,
    /// Those with one of these common names.
    CommonNames(Vec<String>),
    /// Those that are valid for one of these host names or addresses.
    Hostnames(Vec<String>),
}

/// The protocol versions and cipher suites that are offered and accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocols {
    /// With TLS 1.2 or TLS 1.3, or both.
    pub tls12: bool,
    pub tls13: bool,
    /// The cipher suites for TLS 1.2, by their names; empty: all. Those of TLS 1.3 cannot be chosen, as in Go.
    pub cipher_suites: Vec<String>,
}

/// The files and rules of one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    pub side: Side,
    /// Shown to clients or members that connect. None: TLS cannot be accepted.
    pub server: Option<KeyPair>,
    /// Shown when this member connects, if it is asked for a certificate.
    pub client: Option<KeyPair>,
    /// The CA certificates. None: those of the system.
    pub trusted_ca: Option<PathBuf>,
    /// Whether clients or members that connect must show a certificate.
    pub requires_client_certificate: bool,
    /// Certificates that are refused although they are valid.
    pub revocation_list: Option<PathBuf>,
    pub allowed: Allowed,
    /// Whether a certificate must be valid for the address that the connection comes from.
    pub checks_address: bool,
    /// Whether the certificates of other members are accepted unverified, because every member has generated its own.
    pub trusts_any_server: bool,
    pub protocols: Protocols,
}

impl TlsSettings {
    /// Nothing is shown, and servers are verified with the system's CA certificates.
    #[must_use]
    pub fn without_files(side: Side) -> Self {
        Self {
            side,
            server: None,
            client: None,
            trusted_ca: None,
            requires_client_certificate: false,
            revocation_list: None,
            allowed: Allowed::Any,
            checks_address: false,
            trusts_any_server: false,
            protocols: Protocols { tls12: true, tls13: true, cipher_suites: Vec::new() },
        }
    }
}

impl Protocols {
    fn versions(&self) -> Vec<&'static SupportedProtocolVersion> {
        let both = [(self.tls13, &version::TLS13), (self.tls12, &version::TLS12)];
        both.into_iter().filter_map(|(is_on, version)| is_on.then_some(version)).collect()
    }

    fn provider(&self) -> Arc<CryptoProvider> {
        let mut provider = ring::default_provider();
        if !self.cipher_suites.is_empty() {
            provider
                .cipher_suites
                .retain(|suite| suite.tls13().is_some() || self.cipher_suites.contains(&name(*suite)));
        }
        Arc::new(provider)
    }
}

/// The cipher suites for TLS 1.2 that can be chosen, by the names that Go and IANA give them.
#[must_use]
pub fn cipher_suites() -> Vec<String> {
    let all = ring::ALL_CIPHER_SUITES.iter();
    all.filter(|suite| suite.tls13().is_none()).map(|suite| name(*suite)).collect()
}

fn name(suite: SupportedCipherSuite) -> String {
    suite.suite().as_str().unwrap_or_default().to_owned()
}

/// Reads the certificates of a PEM file.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = read(path)?;
    let certificates = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| format!("{}: {error}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!("{}: the file contains no certificate", path.display()));
    }
    Ok(certificates)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| format!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| open_error(path, &error))
}

/// The error of a file that cannot be read, in Go's words.
fn open_error(path: &Path, error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default().to_lowercase();
    format!("open {}: {text}", path.display())
}

/// The trusted CA certificates: from the file of a flag, or from the system.
fn read_roots(settings: &TlsSettings) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut system = SYSTEM_ROOTS.iter().map(Path::new).filter(|path| path.exists());
    let flag = format!("--{}trusted-ca-file", settings.side.flag_prefix());
    let path = settings.trusted_ca.as_deref().or_else(|| system.next());
    let path = path.ok_or_else(|| format!("CA certificates are needed: set {flag}; the system has none"))?;
    read_certificates(path)
}

fn parse(certificate: &[u8]) -> Option<X509Certificate<'_>> {
    Some(X509Certificate::from_der(certificate).ok()?.1)
}

/// The DNS names and IP addresses for which a certificate is valid.
#[derive(Debug, Default)]
struct AlternativeNames<'a> {
    dns: Vec<&'a str>,
    addresses: Vec<std::net::IpAddr>,
}

impl<'a> AlternativeNames<'a> {
    fn of(certificate: &'a X509Certificate<'_>) -> Self {
        let mut names = Self::default();
        let Ok(Some(extension)) = certificate.subject_alternative_name() else { return names };
        for name in &extension.value.general_names {
            if let GeneralName::DNSName(name) = name {
                names.dns.push(name);
            } else if let GeneralName::IPAddress(bytes) = name {
                let v4 = <[u8; 4]>::try_from(*bytes).map(std::net::IpAddr::from);
                let v6 = <[u8; 16]>::try_from(*bytes).map(std::net::IpAddr::from);
                names.addresses.extend(v4.or(v6));
            }
        }
        names
    }
}
