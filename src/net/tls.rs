//! TLS for clients.
//!
//! The files of the certificate and the key are checked at every handshake and read again when they have changed, so that they
//! can be renewed without a restart. If that fails, because one of them is missing or they do not match yet, the last valid pair
//! is used. The CA certificates for client certificates are read once.
//!
//! Handshakes run on threads of their own: signing takes a millisecond with some keys, and the disk may hang; neither must affect
//! clients that are connected already.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    runtime::Runtime,
    task::AbortHandle,
};
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

use crate::error::StartError;

/// The system's CA certificates, for when no file is configured; Debian's path first.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Threads for handshakes: one per this many processors, up to a maximum.
const PROCESSORS_PER_THREAD: usize = 4;
const MAX_THREADS: usize = 4;

/// The files for client TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server certificate, with its chain.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// The CA certificates that client certificates are verified against.
    pub trusted_ca: Option<PathBuf>,
    /// Whether clients must present a certificate.
    pub client_cert_auth: bool,
}

/// Performs TLS handshakes with clients.
pub struct Tls {
    files: Arc<Files>,
    /// The threads for handshakes. None: dropped.
    threads: Option<Runtime>,
}

/// The files of the certificate and the key, and what was loaded from them.
struct Files {
    cert: PathBuf,
    key: PathBuf,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    current: Mutex<Loaded>,
}

struct Loaded {
    stamps: Stamps,
    /// From the last valid pair.
    config: Arc<ServerConfig>,
    /// Why the newest pair is invalid, if that has been logged.
    failure: Option<String>,
}

/// The modification times and lengths of both files.
type Stamps = [(SystemTime, u64); 2];

impl Tls {
    /// Reads everything once.
    pub fn open(files: &TlsFiles) -> Result<Self, StartError> {
        let verifier = files.client_cert_auth.then(|| verifier(files.trusted_ca.as_deref())).transpose()?;
        let (cert, key) = (files.cert.clone(), files.key.clone());
        let current = stamps(&cert, &key)
            .map_err(|error| error.to_string())
            .and_then(|stamps| Ok(Loaded { stamps, config: configure(&cert, &key, verifier.as_ref())?, failure: None }))
            .map_err(StartError::Refused)?;
        let files = Arc::new(Files { cert, key, verifier, current: Mutex::new(current) });
        let mut threads = tokio::runtime::Builder::new_multi_thread();
        let count =
            (std::thread::available_parallelism().map_or(2, usize::from) / PROCESSORS_PER_THREAD).clamp(1, MAX_THREADS);
        let threads = threads.worker_threads(count).thread_name("tls").build();
        let threads = threads
            .map_err(|error| StartError::Refused(format!("cannot start threads for TLS handshakes: {error}")))?;
        Ok(Self { files, threads: Some(threads) })
    }

    /// Performs the handshake. True if HTTP/2 was negotiated.
    pub async fn accept<S>(&self, stream: S) -> io::Result<(TlsStream<S>, bool)>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let threads = self.threads.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let files = self.files.clone();
        let handshake = threads.spawn(async move { TlsAcceptor::from(files.config()).accept(stream).await });
        let _abort_on_drop = AbortOnDrop(handshake.abort_handle());
        let stream = handshake.await.map_err(io::Error::other)??;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(PROTOCOLS[0]);
        Ok((stream, is_http2))
    }
}

/// The common name of the certificate by which a client was verified; None if it has shown none.
#[must_use]
pub fn client_common_name<S>(stream: &TlsStream<S>) -> Option<Arc<str>> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.into())
}

impl Drop for Tls {
    fn drop(&mut self) {
        if let Some(threads) = self.threads.take() {
            threads.shutdown_background(); // This is dropped in async code, where waiting is not allowed.
        }
    }
}

/// Aborts a task when nothing awaits it any more.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Files {
    /// The configuration from the current files, or from the last valid pair.
    fn config(&self) -> Arc<ServerConfig> {
        let stamps = stamps(&self.cert, &self.key);
        let mut current = self.current.lock();
        let renewed = match stamps {
            Ok(stamps) if stamps == current.stamps => return current.config.clone(),
            Ok(stamps) => {
                current.stamps = stamps; // An invalid pair is not read again until it changes.
                configure(&self.cert, &self.key, self.verifier.as_ref())
            }
            Err(error) => Err(error.to_string()),
        };
        match renewed {
            Ok(config) => (current.config, current.failure) = (config, None),
            Err(error) if current.failure.as_ref() == Some(&error) => (),
            Err(error) => {
                tracing::warn!(%error, "cannot use the renewed TLS certificate; clients still see the one before");
                current.failure = Some(error);
            }
        }
        current.config.clone()
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
        return Err(named(&"the file contains no certificate"));
    }
    Ok(certificates)
}

/// Verifies that clients present a certificate that was issued by one of these CAs.
fn verifier(trusted_ca: Option<&Path>) -> Result<Arc<dyn ClientCertVerifier>, StartError> {
    let mut system = SYSTEM_ROOTS.iter().map(Path::new).filter(|path| path.exists());
    let path = trusted_ca.or_else(|| system.next()).ok_or_else(|| {
        StartError::Refused(
            "--client-cert-auth needs CA certificates: set --trusted-ca-file; the system has none".into(),
        )
    })?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(path).map_err(StartError::Refused)?);
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()))
        .build()
        .map(|verifier| verifier as Arc<dyn ClientCertVerifier>)
        .map_err(|error| StartError::Refused(format!("{}: {error}", path.display())))
}
