//! TLS for clients.
//!
//! Certificate and key are looked at for every handshake and read again when they have changed, so that they can be renewed
//! without a restart. Who signs clients' certificates is read once.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    },
    server::TlsStream,
};

use super::Failure;
use crate::config::frontend::TlsFiles;

/// Whom the system trusts, where nobody is named. Debian's place first.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Speaks TLS with clients.
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    current: Mutex<(Stamps, Arc<ServerConfig>)>,
}

/// When certificate and key were written, and how long they are.
type Stamps = [(SystemTime, u64); 2];

impl Tls {
    /// Reads everything once.
    pub fn open(files: &TlsFiles) -> Result<Self, Failure> {
        let verifier = files.client_cert_auth.then(|| verifier(files.trusted_ca.as_deref())).transpose()?;
        let (cert, key) = (files.cert.clone(), files.key.clone());
        let current = stamps(&cert, &key)
            .map_err(|error| error.to_string())
            .and_then(|stamps| Ok((stamps, configure(&cert, &key, verifier.as_ref())?)))
            .map_err(Failure::Refused)?;
        Ok(Self { cert, key, verifier, current: Mutex::new(current) })
    }

    /// Shakes hands. True if the client wants HTTP/2.
    pub async fn accept<S>(&self, stream: S) -> io::Result<(TlsStream<S>, bool)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let acceptor = TlsAcceptor::from(self.config()?);
        let stream = acceptor.accept(stream).await?;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(PROTOCOLS[0]);
        Ok((stream, is_http2))
    }

    fn config(&self) -> io::Result<Arc<ServerConfig>> {
        let stamps = stamps(&self.cert, &self.key)?;
        let mut current = self.current.lock();
        if current.0 != stamps {
            let config = configure(&self.cert, &self.key, self.verifier.as_ref()).map_err(io::Error::other)?;
            *current = (stamps, config);
        }
        Ok(current.1.clone())
    }
}

fn stamps(cert: &Path, key: &Path) -> io::Result<Stamps> {
    let stamp = |path: &Path| {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("open {}: {error}", path.display()));
        let metadata = fs::metadata(path).map_err(named)?;
        Ok::<_, io::Error>((metadata.modified()?, metadata.len()))
    };
    Ok([stamp(cert)?, stamp(key)?])
}

fn configure(
    cert: &Path,
    key: &Path,
    verifier: Option<&Arc<dyn ClientCertVerifier>>,
) -> Result<Arc<ServerConfig>, String> {
    let chain = certificates(cert)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{}: {error}", key.display()))?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain, private)
        .map_err(|error| format!("{} and {}: {error}", cert.display(), key.display()))?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| named(&error))?;
    let certificates = certificates.collect::<Result<Vec<_>, _>>().map_err(|error| named(&error))?;
    if certificates.is_empty() {
        return Err(named(&"there is no certificate in it"));
    }
    Ok(certificates)
}

/// Clients have to show a certificate that one of these has signed.
fn verifier(trusted_ca: Option<&Path>) -> Result<Arc<dyn ClientCertVerifier>, Failure> {
    let mut system = SYSTEM_ROOTS.iter().map(Path::new).filter(|path| path.exists());
    let path = trusted_ca.or_else(|| system.next()).ok_or_else(|| {
        Failure::Refused("--client-cert-auth: nobody is trusted, neither by --trusted-ca-file nor by the system".into())
    })?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(path).map_err(Failure::Refused)?);
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()))
        .build()
        .map(|verifier| verifier as Arc<dyn ClientCertVerifier>)
        .map_err(|error| Failure::Refused(format!("{}: {error}", path.display())))
}
