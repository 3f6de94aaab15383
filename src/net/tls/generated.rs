//! Certificates that a server generates for itself: `--auto-tls`, `--peer-auto-tls`.
//!
//! They protect from eavesdropping, not from a man in the middle: they are signed by no CA.

use std::{
    fs, io,
    io::Write,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType};
use time::{Duration, OffsetDateTime};

use super::KeyPair;
use crate::error::StartError;

/// A certificate to be generated, unless its files exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedCertificate {
    pub directory: PathBuf,
    /// The names and addresses for which it is valid.
    pub hosts: Vec<String>,
    pub validity_years: u32,
}

impl GeneratedCertificate {
    /// The files, which exist once [`generate`] was called.
    #[must_use]
    pub fn pair(&self) -> KeyPair {
        KeyPair { cert: self.directory.join("cert.pem"), key: self.directory.join("key.pem") }
    }
}

/// Generates a certificate and its key, unless both exist.
pub fn generate(wanted: &GeneratedCertificate) -> Result<(), StartError> {
    let pair = wanted.pair();
    if pair.cert.exists() && pair.key.exists() {
        return Ok(());
    }
    let failed = |error: &dyn std::fmt::Display| {
        StartError::Refused(format!("cannot generate a certificate in {}: {error}", wanted.directory.display()))
    };
    let not_before = OffsetDateTime::now_utc();
    let not_after = not_before + Duration::days(365 * i64::from(wanted.validity_years));
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, "etcd");
    (parameters.not_before, parameters.not_after) = (not_before, not_after);
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for host in &wanted.hosts {
        parameters.subject_alt_names.push(match host.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(host.as_str().try_into().map_err(|error| failed(&error))?),
        });
    }
    let key = rcgen::KeyPair::generate().map_err(|error| failed(&error))?;
    let certificate = parameters.self_signed(&key).map_err(|error| failed(&error))?;
    let written = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&wanted.directory)
        .and_then(|()| write(&pair.key, 0o600, &key.serialize_pem()))
        .and_then(|()| write(&pair.cert, 0o644, &certificate.pem()));
    written.map_err(|error| failed(&error))?;
    tracing::warn!(
        { "certificate-validity-bound-not-after" = not_after.to_string() },
        "automatically generate certificates"
    );
    tracing::info!(path = %pair.cert.display(), "created cert file");
    tracing::info!(path = %pair.key.display(), "created key file");
    Ok(())
}

fn write(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mut file = fs::File::options().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{
        super::{AlternativeNames, parse, read_certificates},
        *,
    };

    #[test]
    fn a_certificate_is_generated_once() {
        let directory = tempfile::tempdir().unwrap();
        let wanted = GeneratedCertificate {
            directory: directory.path().join("fixtures/client"),
            hosts: ["127.0.0.1", "localhost"].map(str::to_owned).to_vec(),
            validity_years: 2,
        };
        generate(&wanted).unwrap();
        let read = || read_certificates(&wanted.pair().cert).unwrap().remove(0);
        let first = read();
        let certificate = parse(&first).unwrap();
        let names = AlternativeNames::of(&certificate);
        assert_eq!((names.dns, names.addresses), (vec!["localhost"], vec![IpAddr::from([127, 0, 0, 1])]));
        let validity = certificate.validity();
        assert_eq!(validity.not_after.timestamp() - validity.not_before.timestamp(), 2 * 365 * 24 * 60 * 60);
        assert_eq!(fs::metadata(wanted.pair().key).unwrap().permissions().mode() & 0o777, 0o600);
        generate(&wanted).unwrap();
        assert_eq!(read(), first);
    }
}
