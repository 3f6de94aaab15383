//! Settings of TLS: certificates, whether clients and members must show one, protocol versions. The rules and texts are etcd's.

use std::path::{Path, PathBuf};

use super::{parse::FlagValues, value::count};
use crate::{
    logging::{Level, Notice},
    net::{
        tls::{Allowed, GeneratedCertificate, KeyPair, Protocols, Side, TlsSettings, cipher_suites},
        url::{Url, UrlAddress},
    },
};

/// Cipher suites that etcd accepts in `--cipher-suites` and this server does not offer: they lack forward secrecy or
/// authenticated encryption, or are those of TLS 1.3, which are always on.
const KNOWN_SUITES: [&str; 19] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_RC4_128_SHA",
];
/// Go's older names.
const OLD_NAMES: [&str; 2] = ["TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Present if a listen URL for clients or for metrics asks for TLS.
    pub clients: Option<TlsSettings>,
    /// Between members. It accepts TLS if it has a server certificate.
    pub peers: TlsSettings,
    /// Certificates to be generated before the others are read.
    pub generated: Vec<GeneratedCertificate>,
    /// Whether the common name of a client's certificate is the name of a user.
    pub certificates_name_users: bool,
    /// Handshakes in progress, for clients and members each.
    pub max_waiting_handshakes: usize,
}

/// Checks the versions and what depends on them.
pub fn protocol_versions(values: &FlagValues) -> Result<(bool, bool), String> {
    let version = |flag| match values.text(flag) {
        "" => Ok(None),
        "TLS1.2" => Ok(Some(2)),
        "TLS1.3" => Ok(Some(3)),
        other => Err(format!("unexpected TLS version {other:?} (must be one of: TLS1.2, TLS1.3)")),
    };
    let (min, max) = (version("tls-min-version")?.unwrap_or(2), version("tls-max-version")?.unwrap_or(3));
    if min > max {
        let (min, max) = (values.text("tls-min-version"), values.text("tls-max-version"));
        return Err(format!("min version ({min}) is greater than max version ({max})"));
    }
    if min == 3 && !values.text("cipher-suites").is_empty() {
        return Err("cipher suites cannot be configured when only TLS1.3 is enabled".to_owned());
    }
    Ok((min == 2, max == 3))
}

/// The URLs to listen on.
#[derive(Clone, Copy)]
pub struct ListenUrls<'a> {
    /// For gRPC, for HTTP, and for both.
    pub clients: &'a [Url],
    pub peers: &'a [Url],
    pub metrics: &'a [Url],
}

impl TlsConfig {
    /// `versions` are TLS 1.2 and TLS 1.3.
    pub fn read(
        values: &FlagValues,
        versions: (bool, bool),
        listen: ListenUrls<'_>,
        data_dir: &Path,
        notices: &mut Vec<Notice>,
    ) -> Result<Self, String> {
        let ListenUrls { clients: listen_client, peers: listen_peer, metrics: listen_metrics } = listen;
        let protocols = Protocols {
            tls12: versions.0,
            tls13: versions.1,
            cipher_suites: chosen_suites(list(values.text("cipher-suites")), notices)?,
        };
        let mut generated = Vec::new();
        let mut peers = side(Side::Peers, values, &protocols)?;
        add_generated(&mut peers, values, listen_peer, data_dir, &mut generated, notices)?;
        let mut clients = side(Side::Clients, values, &protocols)?;
        add_generated(&mut clients, values, listen_client, data_dir, &mut generated, notices)?;
        warn_of_plain(&peers, values, listen_peer, notices);
        warn_of_plain(&clients, values, listen_client, notices);
        if let (None, Some(url)) = (&clients.server, listen_client.iter().find(|url| url.is_secure())) {
            return Err(format!(
                "TLS key/cert (--cert-file, --key-file) must be provided for client url {url} with HTTPS scheme"
            ));
        }
        if let (None, Some(url)) = (&peers.server, listen_peer.iter().find(|url| url.is_secure())) {
            return Err(format!("cannot listen on TLS for {url}: KeyFile and CertFile are not presented"));
        }
        let has_secure = |urls: &[Url]| urls.iter().any(Url::is_secure);
        if clients.server.is_none() && has_secure(listen_metrics) {
            let text = "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url";
            return Err(text.to_owned());
        }
        if !has_secure(listen_peer) {
            peers.server = None;
        }
        let max_waiting_handshakes = match values.get("max-waiting-handshakes") {
            0_u64 => return Err("--max-waiting-handshakes must be at least 1 (set to 0)".to_owned()),
            handshakes => count(handshakes),
        };
        Ok(Self {
            certificates_name_users: values.get("client-cert-auth"),
            clients: (has_secure(listen_client) || has_secure(listen_metrics)).then_some(clients),
            peers,
            generated,
            max_waiting_handshakes,
        })
    }
}

fn side(side: Side, values: &FlagValues, protocols: &Protocols) -> Result<TlsSettings, String> {
    let prefix = side.flag_prefix();
    let path = |name: &str| {
        let text = values.text(&format!("{prefix}{name}"));
        (!text.is_empty()).then(|| PathBuf::from(text))
    };
    let text = |path: Option<PathBuf>| path.map_or_else(String::new, |path| path.display().to_string());
    let server = match (path("cert-file"), path("key-file")) {
        (Some(cert), Some(key)) => Some(KeyPair { cert, key }),
        (None, None) => None,
        (cert, key) => {
            return Err(format!("KeyFile and CertFile must both be present[key: {}, cert: {}]", text(key), text(cert)));
        }
    };
    let client = match (path("client-cert-file"), path("client-key-file")) {
        (Some(cert), Some(key)) => Some(KeyPair { cert, key }),
        (None, None) => server.clone(),
        (cert, key) => {
            return Err(format!(
                "ClientKeyFile and ClientCertFile must both be present or both absent: key: {}, cert: {}]",
                text(key),
                text(cert)
            ));
        }
    };
    let trusted_ca = path("trusted-ca-file");
    Ok(TlsSettings {
        side,
        server,
        client,
        requires_client_certificate: values.get(&format!("{prefix}client-cert-auth")) || trusted_ca.is_some(),
        trusted_ca,
        revocation_list: path(if side == Side::Peers { "crl-file" } else { "client-crl-file" }),
        allowed: allowed(side, values)?,
        checks_address: side == Side::Peers && !values.get::<bool>("peer-skip-client-san-verification"),
        protocols: protocols.clone(),
        ..TlsSettings::without_files(side)
    })
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn allowed(side: Side, values: &FlagValues) -> Result<Allowed, String> {
    let names = |flag| list(values.text(flag)).map(str::to_owned).collect::<Vec<_>>();
    let (common_names, hostnames) = match side {
        Side::Clients => (Vec::new(), names("client-cert-allowed-hostname")),
        Side::Peers => (names("peer-cert-allowed-cn"), names("peer-cert-allowed-hostname")),
    };
    match (common_names.is_empty(), hostnames.is_empty()) {
        (false, false) => {
            let quoted = |names: &[String]| names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" ");
            let (common_names, hostnames) = (quoted(&common_names), quoted(&hostnames));
            Err(format!(
                "AllowedCNs and AllowedHostnames are mutually exclusive (cns=[{common_names}], hostnames=[{hostnames}])"
            ))
        }
        (false, true) => Ok(Allowed::CommonNames(common_names)),
        (true, false) => Ok(Allowed::Hostnames(hostnames)),
        (true, true) => Ok(Allowed::Any),
    }
}

/// `--auto-tls` and `--peer-auto-tls`: a certificate that this member generates for itself.
fn add_generated(
    settings: &mut TlsSettings,
    values: &FlagValues,
    listen: &[Url],
    data_dir: &Path,
    generated: &mut Vec<GeneratedCertificate>,
    notices: &mut Vec<Notice>,
) -> Result<(), String> {
    let side = settings.side;
    if !values.get::<bool>(&format!("{}auto-tls", side.flag_prefix())) {
        return Ok(());
    }
    if settings.server.is_some() {
        let message = format!("ignoring {} auto TLS since certs given", side.name());
        notices.push(Notice::new(Level::Warn, message));
        return Ok(());
    }
    let validity_years = match values.get("self-signed-cert-validity") {
        0_u64 => return Err("selfSignedCertValidity is invalid,it should be greater than 0".to_owned()),
        years => u32::try_from(years).unwrap_or(u32::MAX).min(1000),
    };
    let host = |url: &Url| match url.address() {
        UrlAddress::Tcp { host, .. } => Some(host.clone()),
        UrlAddress::Unix(_) => None,
    };
    let wanted = GeneratedCertificate {
        directory: data_dir.join("fixtures").join(side.name()),
        hosts: listen.iter().filter_map(host).collect(),
        validity_years,
    };
    // As in etcd, nothing else that is configured applies: there is no CA that could verify anything.
    settings.server = Some(wanted.pair());
    settings.client = None;
    settings.requires_client_certificate = false;
    settings.trusts_any_server = true;
    generated.push(wanted);
    Ok(())
}

fn warn_of_plain(settings: &TlsSettings, values: &FlagValues, listen: &[Url], notices: &mut Vec<Notice>) {
    let (scheme, label) = match settings.side {
        Side::Clients => ("http or unix", "client-url"),
        Side::Peers => ("HTTP", "peer-url"),
    };
    let flag = format!("{}client-cert-auth", settings.side.flag_prefix());
    for url in listen.iter().filter(|url| !url.is_secure()) {
        let mut warn = |text: String| {
            notices
                .push(Notice::new(Level::Warn, format!("scheme is {scheme} while {text}")).with(label, url.as_str()));
        };
        if settings.server.is_some() {
            warn("key and cert files are present; ignoring key and cert files".to_owned());
        }
        if values.get(&flag) {
            warn(format!("--{flag} is enabled; ignoring client cert auth for this URL"));
        }
    }
}

/// The cipher suites of the flag that this server offers. Those that only etcd offers are ignored, with a warning.
fn chosen_suites<'a>(names: impl Iterator<Item = &'a str>, notices: &mut Vec<Notice>) -> Result<Vec<String>, String> {
    let offered = cipher_suites();
    let (mut chosen, mut ignored) = (Vec::new(), Vec::new());
    for name in names {
        let full_name = if OLD_NAMES.contains(&name) { format!("{name}_SHA256") } else { name.to_owned() };
        if offered.contains(&full_name) {
            chosen.push(full_name);
        } else if KNOWN_SUITES.contains(&name) {
            ignored.push(name);
        } else {
            return Err(format!("unexpected TLS cipher suite {name:?}"));
        }
    }
    if !ignored.is_empty() {
        if chosen.is_empty() {
            return Err(format!(
                "--cipher-suites names none that this server offers with TLS 1.2; it offers {}",
                offered.join(", ")
            ));
        }
        let message = "some of --cipher-suites are not offered, or are always offered with TLS 1.3; they are ignored";
        notices.push(Notice::new(Level::Warn, message).with("ignored", ignored.join(",")));
    }
    Ok(chosen)
}
