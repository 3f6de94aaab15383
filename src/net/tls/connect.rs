//! Connections to other members.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Instant,
};

use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, ClientConnection, client::Resumption, pki_types::ServerName},
};

use super::{
    HTTP2, Side, TlsSettings, read_certificates, read_key,
    reload::{Loaded, Reloaded, expiry},
    verify::{AnyServer, ServerVerifier},
};
use crate::{
    error::StartError,
    net::{
        stream::{BlockingStream, Socket, Stream},
        tls_error,
    },
};

/// Connects to other members with TLS.
pub struct ClientTls {
    settings: TlsSettings,
    /// Without flags they are the system's CA certificates, which are read when a member with TLS is first connected to.
    files: OnceLock<Arc<Reloaded<ClientConfig>>>,
}

impl ClientTls {
    /// Reads the files that are configured.
    pub fn open(settings: &TlsSettings) -> Result<Self, StartError> {
        let client = Self { settings: settings.clone(), files: OnceLock::new() };
        if settings.client.is_some() || settings.trusted_ca.is_some() {
            client.files().map_err(|error| StartError::Refused(error.to_string()))?;
        }
        Ok(client)
    }

    /// For clusters without TLS.
    #[must_use]
    pub fn without_certificates() -> Arc<Self> {
        let settings = TlsSettings::without_files(Side::Peers);
        Arc::new(Self { settings, files: OnceLock::new() })
    }

    fn files(&self) -> io::Result<&Arc<Reloaded<ClientConfig>>> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let settings = self.settings.clone();
        let mut paths: Vec<_> = settings.client.iter().flat_map(|pair| [pair.cert.clone(), pair.key.clone()]).collect();
        if !settings.trusts_any_server {
            paths.extend(settings.trusted_ca.iter().chain(&settings.revocation_list).cloned());
        }
        let files = Reloaded::open(settings.side, "peer-client-cert-file", paths, move || load(&settings));
        let files = files.map_err(io::Error::other)?;
        Ok(self.files.get_or_init(|| Arc::new(files)))
    }

    fn config(&self) -> io::Result<Arc<ClientConfig>> {
        self.files().map(|files| files.current())
    }

    /// To be called regularly.
    pub fn refresh(&self) {
        if let Some(files) = self.files.get() {
            files.refresh();
        }
    }

    /// Performs the handshake on a connection, for tasks. The caller limits the time.
    pub async fn connect(self: &Arc<Self>, socket: Socket, host: &str) -> io::Result<Stream> {
        let this = self.clone();
        // Files are read on a thread that may wait for the disk.
        let config = tokio::task::spawn_blocking(move || this.config()).await.map_err(io::Error::other)??;
        let connected = TlsConnector::from(config).connect(server_name(host)?, socket).await;
        connected.map(|stream| Stream::Tls(Box::new(stream.into()))).map_err(|error| in_go_words(&error))
    }

    /// Performs the handshake on a connection, for threads, until a deadline.
    pub fn connect_blocking(
        &self,
        stream: BlockingStream,
        host: &str,
        deadline: Instant,
    ) -> io::Result<BlockingStream> {
        let session = ClientConnection::new(self.config()?, server_name(host)?).map_err(io::Error::other)?;
        stream.start_tls(session, deadline).map_err(|error| in_go_words(&error))
    }
}

fn in_go_words(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), tls_error::text(error))
}

/// The name that a member's certificate must be valid for: the host of its URL.
fn server_name(host: &str) -> io::Result<ServerName<'static>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(ServerName::from(address));
    }
    ServerName::try_from(host.to_owned()).map_err(|_| io::Error::other(format!("{host:?} is not a valid host name")))
}

fn load(settings: &TlsSettings) -> Result<Loaded<ClientConfig>, String> {
    let provider = settings.protocols.provider();
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_protocol_versions(&settings.protocols.versions()).map_err(|error| error.to_string())?;
    let builder = builder.dangerous();
    let builder = if settings.trusts_any_server {
        builder.with_custom_certificate_verifier(Arc::new(AnyServer {
            algorithms: provider.signature_verification_algorithms,
        }))
    } else {
        builder.with_custom_certificate_verifier(Arc::new(ServerVerifier::new(settings, &provider)?))
    };
    let mut expires = None;
    let mut config = match &settings.client {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let chain = read_certificates(&pair.cert)?;
            expires = expiry(&chain);
            builder
                .with_client_auth_cert(chain, read_key(&pair.key)?)
                .map_err(|error| format!("{} and {}: {error}", pair.cert.display(), pair.key.display()))?
        }
    };
    config.alpn_protocols = match settings.side {
        Side::Clients => vec![HTTP2.to_vec()], // The load generator.
        Side::Peers => Vec::new(),
    };
    // A resumed session would not verify the certificate again, which may have expired or been revoked since.
    config.resumption = Resumption::disabled();
    Ok(Loaded { value: Arc::new(config), expires })
}
