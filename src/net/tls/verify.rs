//! Verification of certificates: of clients and members that connect, and of members that this one connects to.
//!
//! The chain, the validity and the purpose are verified by webpki. Added are etcd's rules: revocation lists, which name serial
//! numbers; allow-lists of common names or host names; for members, the address that the connection comes from. So is one
//! leniency of Go's, which small installations rely on: a certificate that is itself a trusted CA may be shown as that of a
//! server or a client.

use std::{
    collections::BTreeSet,
    fmt::{self, Write},
    net::IpAddr,
    path::Path,
    sync::Arc,
};

use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime, pem::PemObject},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList, x509::X509Name};

use super::{Allowed, AlternativeNames, Side, TlsSettings, parse, read, read_roots};

/// etcd's text for a certificate that is not on the allow-list.
const NOT_ALLOWED: &str = "client certificate authentication failed";

/// etcd's rules, beyond what webpki verifies.
#[derive(Debug)]
struct Rules {
    side: Side,
    roots: Vec<CertificateDer<'static>>,
    /// Without leading zeros.
    revoked: BTreeSet<Vec<u8>>,
    allowed: Allowed,
}

/// Why a certificate is refused, in words of this module.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn refusal(text: String) -> Error {
    CertificateError::Other(OtherError(Arc::new(Refusal(text)))).into()
}

impl Rules {
    fn read(settings: &TlsSettings) -> Result<Self, String> {
        let revoked = settings.revocation_list.as_deref().map(read_revoked).transpose()?;
        Ok(Self {
            side: settings.side,
            roots: read_roots(settings)?,
            revoked: revoked.unwrap_or_default(),
            allowed: settings.allowed.clone(),
        })
    }

    fn store(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.roots.iter().cloned());
        Arc::new(roots)
    }

    /// Checks a certificate whose chain is verified.
    fn check(&self, leaf: &CertificateDer<'_>, chain: &[CertificateDer<'_>]) -> Result<(), Error> {
        for certificate in std::iter::once(leaf).chain(chain) {
            let parsed = parse(certificate).ok_or(CertificateError::BadEncoding)?;
            let serial = without_zeros(parsed.raw_serial());
            if self.revoked.contains(serial) {
                return Err(refusal(format!("transport: certificate serial {} revoked", hex(serial))));
            }
        }
        let parsed = parse(leaf).ok_or(CertificateError::BadEncoding)?;
        let is_allowed = match &self.allowed {
            Allowed::Any => true,
            Allowed::CommonNames(names) => names.iter().any(|name| name == common_name(parsed.subject())),
            Allowed::Hostnames(names) => names.iter().any(|name| is_valid_for(leaf, name)),
        };
        if is_allowed { Ok(()) } else { Err(refusal(self.not_allowed(common_name(parsed.subject()), &parsed))) }
    }

    /// The text names what the certificate has and what was expected.
    fn not_allowed(&self, common_name: &str, certificate: &x509_parser::certificate::X509Certificate<'_>) -> String {
        let prefix = if self.side == Side::Peers { "peer-cert" } else { "client-cert" };
        match &self.allowed {
            Allowed::CommonNames(expected) => format!(
                "{NOT_ALLOWED}: its common name is {common_name:?}, and --{prefix}-allowed-cn expects one of {expected:?}"
            ),
            Allowed::Hostnames(expected) => {
                let names = AlternativeNames::of(certificate).texts();
                format!(
                    "{NOT_ALLOWED}: it is valid for {names:?}, and --{prefix}-allowed-hostname expects one of {expected:?}"
                )
            }
            Allowed::Any => NOT_ALLOWED.to_owned(),
        }
    }

    /// Whether a certificate that webpki refuses, because it is one of a CA, is to be accepted: it is trusted itself.
    fn is_trusted_itself(&self, leaf: &CertificateDer<'_>, error: &Error, now: UnixTime) -> bool {
        let is_ca_error = matches!(error, Error::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("CaUsedAsEndEntity"));
        let is_valid_now = || {
            let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
            parse(leaf).is_some_and(|parsed| {
                let validity = parsed.validity();
                (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&seconds)
            })
        };
        is_ca_error && self.roots.iter().any(|root| root.as_ref() == leaf.as_ref()) && is_valid_now()
    }
}

impl AlternativeNames<'_> {
    fn texts(&self) -> Vec<String> {
        let names = self.dns.iter().map(|name| (*name).to_owned());
        names.chain(self.addresses.iter().map(ToString::to_string)).collect()
    }
}

/// The common name; empty if there is none.
pub(super) fn common_name<'a>(subject: &'a X509Name<'_>) -> &'a str {
    subject.iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default()
}

fn is_valid_for(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let name = name.trim_matches(['[', ']']); // As an IPv6 address may be written.
    let Ok(name) = ServerName::try_from(name) else { return false };
    ParsedCertificate::try_from(certificate).is_ok_and(|certificate| verify_server_name(&certificate, &name).is_ok())
}

/// The serial numbers of a revocation list, which may be DER or PEM.
fn read_revoked(path: &Path) -> Result<BTreeSet<Vec<u8>>, String> {
    let bytes = read(path)?;
    let lists = match CertificateRevocationListDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>() {
        Ok(lists) if !lists.is_empty() => lists,
        _ => vec![CertificateRevocationListDer::from(bytes)],
    };
    let mut revoked = BTreeSet::new();
    for list in &lists {
        let (_, parsed) = CertificateRevocationList::from_der(list)
            .map_err(|_| format!("{}: the file contains no certificate revocation list", path.display()))?;
        revoked.extend(parsed.iter_revoked_certificates().map(|it| without_zeros(it.raw_serial()).to_vec()));
    }
    Ok(revoked)
}

fn without_zeros(serial: &[u8]) -> &[u8] {
    &serial[serial.iter().take_while(|&&byte| byte == 0).count()..]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // A string takes everything.
        text
    })
}

/// The methods of a verifier that have nothing to do with trust: signatures prove that the other side has the certificate's key.
macro_rules! verify_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, certificate, signature, &self.algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, certificate, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

/// Verifies the certificates of clients and members that connect.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    rules: Rules,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientVerifier {
    pub fn new(settings: &TlsSettings, provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        let rules = Rules::read(settings)?;
        let inner = WebPkiClientVerifier::builder_with_provider(rules.store(), provider.clone()).build();
        let inner = inner.map_err(|error| error.to_string())?;
        Ok(Self { inner, rules, algorithms: provider.signature_verification_algorithms })
    }
}

impl ClientCertVerifier for ClientVerifier {
    verify_signatures!();

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.inner.verify_client_cert(leaf, chain, now) {
            Err(error) if !self.rules.is_trusted_itself(leaf, &error, now) => return Err(error),
            _ => (),
        }
        self.rules.check(leaf, chain)?;
        Ok(ClientCertVerified::assertion())
    }
}

/// Verifies the certificates of members that this one connects to.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    inner: Arc<WebPkiServerVerifier>,
    rules: Rules,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub fn new(settings: &TlsSettings, provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        let rules = Rules::read(settings)?;
        let inner = WebPkiServerVerifier::builder_with_provider(rules.store(), provider.clone()).build();
        let inner = inner.map_err(|error| error.to_string())?;
        Ok(Self { inner, rules, algorithms: provider.signature_verification_algorithms })
    }
}

impl ServerCertVerifier for ServerVerifier {
    verify_signatures!();

    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.inner.verify_server_cert(leaf, chain, server_name, ocsp_response, now) {
            Err(error) if self.rules.is_trusted_itself(leaf, &error, now) => {
                verify_server_name(&ParsedCertificate::try_from(leaf)?, server_name)?;
            }
            verified => _ = verified?,
        }
        self.rules.check(leaf, chain)?;
        Ok(ServerCertVerified::assertion())
    }
}

/// Accepts any certificate: with automatic TLS every member has generated its own, so there is nothing to verify it with. The
/// signatures are still verified, so the connection is private.
#[derive(Debug)]
pub(super) struct AnyServer {
    pub algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for AnyServer {
    verify_signatures!();

    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }
}

/// Checks that a member's certificate is valid for the address that it connects from, as etcd does: one of its addresses, or a
/// name that resolves to it. A certificate without either is accepted. The resolver may take long.
pub(super) fn check_address(leaf: &CertificateDer<'_>, address: IpAddr) -> Result<(), String> {
    let parsed = parse(leaf).ok_or("x509: malformed certificate")?;
    let names = AlternativeNames::of(&parsed);
    let address = address.to_canonical();
    if names.addresses.contains(&address) || (names.addresses.is_empty() && names.dns.is_empty()) {
        return Ok(());
    }
    if names.dns.is_empty() {
        return Err(format!("x509: certificate is valid for {}, not {address}", names.texts().join(", ")));
    }
    let found = dns_lookup::lookup_addr(&address).unwrap_or_default();
    let found = found.trim_end_matches('.');
    let matches = |name: &&str| match name.strip_prefix('*') {
        Some(domain) if domain.starts_with('.') => found.ends_with(domain),
        _ => *name == found,
    };
    if !found.is_empty() && names.dns.iter().any(matches) {
        return Ok(());
    }
    let resolves = |name: &&&str| {
        !name.starts_with("*.") && dns_lookup::lookup_host(name).is_ok_and(|mut found| found.any(|it| it == address))
    };
    if names.dns.iter().any(|name| resolves(&name)) {
        return Ok(());
    }
    Err(format!("tls: \"{address}\" does not match any of DNSNames {:?}", names.dns))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(names: &[&str]) -> CertificateDer<'static> {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, "alice");
        parameters.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn rules(allowed: Allowed) -> Rules {
        Rules { side: Side::Peers, roots: Vec::new(), revoked: BTreeSet::new(), allowed }
    }

    fn own_text(error: Error) -> String {
        let Error::InvalidCertificate(CertificateError::Other(own)) = error else { panic!("{error}") };
        own.0.to_string()
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn an_allow_list_names_what_it_expects() {
        let certificate = certificate(&["a.example.com", "127.0.0.1"]);
        let check = |allowed| rules(allowed).check(&certificate, &[]).map_err(own_text);
        check(Allowed::Any).unwrap();
        check(Allowed::CommonNames(names(&["bob", "alice"]))).unwrap();
        check(Allowed::Hostnames(names(&["b", "127.0.0.1"]))).unwrap();
        check(Allowed::Hostnames(names(&["a.example.com"]))).unwrap();
        let refused = check(Allowed::CommonNames(names(&["bob"]))).unwrap_err();
        assert_eq!(
            refused,
            "client certificate authentication failed: its common name is \"alice\", and --peer-cert-allowed-cn expects one of \
             [\"bob\"]"
        );
        let refused = check(Allowed::Hostnames(names(&["b.example.com"]))).unwrap_err();
        assert!(refused.contains("it is valid for [\"a.example.com\", \"127.0.0.1\"]"), "{refused}");
    }

    #[test]
    fn a_revoked_serial_number_is_refused_anywhere_in_the_chain() {
        let [good, bad] = [certificate(&["a"]), certificate(&["b"])];
        let serial = without_zeros(parse(&bad).unwrap().raw_serial()).to_vec();
        let mut rules = rules(Allowed::Any);
        rules.revoked.insert(serial.clone());
        rules.check(&good, &[]).unwrap();
        for refused in [rules.check(&bad, &[]), rules.check(&good, std::slice::from_ref(&bad))] {
            let text = own_text(refused.unwrap_err());
            assert!(text.contains(&format!("transport: certificate serial {} revoked", hex(&serial))), "{text}");
        }
    }

    #[test]
    fn an_address_must_be_one_of_the_certificate() {
        let here = "127.0.0.1".parse().unwrap();
        check_address(&certificate(&["127.0.0.1"]), here).unwrap();
        check_address(&certificate(&[]), here).unwrap();
        check_address(&certificate(&["10.0.0.1", "localhost"]), here).unwrap();
        assert_eq!(
            check_address(&certificate(&["10.0.0.1"]), here).unwrap_err(),
            "x509: certificate is valid for 10.0.0.1, not 127.0.0.1"
        );
        assert_eq!(
            check_address(&certificate(&["other.invalid", "*.invalid"]), here).unwrap_err(),
            "tls: \"127.0.0.1\" does not match any of DNSNames [\"other.invalid\", \"*.invalid\"]"
        );
    }
}
