//! A certificate authority, and clients that trust it.

use std::{fs, path::PathBuf, sync::Arc};

use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, SupportedProtocolVersion,
        client::Resumption,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        version,
    },
};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::support::{Server, time_limit};

pub const SECURE: &str = "https://127.0.0.1:0";

/// A certificate authority, and a directory for the certificates that it signs.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: TempDir,
}

/// A certificate to be signed.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub common_name: &'a str,
    pub hosts: &'a [&'a str],
    pub purposes: &'a [ExtendedKeyUsagePurpose],
    pub serial: u64,
    pub has_expired: bool,
}

pub const BOTH_PURPOSES: [ExtendedKeyUsagePurpose; 2] =
    [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

impl Default for Wanted<'_> {
    fn default() -> Self {
        Self {
            common_name: "member",
            hosts: &["localhost", "127.0.0.1"],
            purposes: &BOTH_PURPOSES,
            serial: 1,
            has_expired: false,
        }
    }
}

impl Authority {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, format!("CA {}", rand::random::<u32>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { issuer: Issuer::new(params, key), directory }
    }

    /// Signs a certificate, in the files `<file>.pem` and `<file>.key`. Each file is replaced at once.
    pub fn issue(&self, file: &str, wanted: Wanted<'_>) {
        self.issue_into(self, file, wanted);
    }

    /// As [`issue`](Self::issue), into the directory of another authority.
    pub fn issue_into(&self, other: &Self, file: &str, wanted: Wanted<'_>) {
        let hosts: Vec<_> = wanted.hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.extended_key_usages = wanted.purposes.to_vec();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, wanted.common_name);
        params.serial_number = Some(wanted.serial.into());
        if wanted.has_expired {
            (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        other.replace(&format!("{file}.key"), key.serialize_pem().as_bytes());
        other.replace(&format!("{file}.pem"), certificate.pem().as_bytes());
    }

    /// Signs a certificate for one purpose.
    pub fn sign(&self, name: &str, serial: u64, purpose: ExtendedKeyUsagePurpose) {
        self.issue(name, Wanted { common_name: name, purposes: &[purpose], serial, ..Wanted::default() });
    }

    /// Writes a revocation list, in DER.
    pub fn revoke(&self, file: &str, serials: &[u64]) {
        let revoked = |&serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2124, 1, 1),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        self.replace(file, params.signed_by(&self.issuer).unwrap().der());
    }

    /// Replaces a file at once, as a program that renews certificates does.
    pub fn replace(&self, file: &str, content: &[u8]) {
        let next = self.path(&format!("{file}.next"));
        fs::write(&next, content).unwrap();
        fs::rename(next, self.path(file)).unwrap();
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    pub fn flag(&self, flag: &str, file: &str) -> String {
        format!("--{flag}={}", self.path(file).display())
    }

    /// A server that listens for clients at these URLs, with a certificate of this authority.
    pub fn server(&self, urls: &str, more: &[String]) -> Server {
        self.sign("server", 1, ExtendedKeyUsagePurpose::ServerAuth);
        let mut arguments = vec![format!("--listen-client-urls={urls}")];
        arguments.extend([self.flag("cert-file", "server.pem"), self.flag("key-file", "server.key")]);
        arguments.extend_from_slice(more);
        Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The certificate that a new connection sees.
    pub async fn shown_certificate(&self, server: &Server) -> Vec<u8> {
        let stream = self.connect(server, &["h2"], None).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].as_ref().to_vec()
    }

    /// What a client is configured with: it trusts every CA of `ca.pem`, and shows a certificate or none.
    pub fn client_config(
        &self,
        protocols: &[&str],
        shown: Option<&str>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(self.path("ca.pem")).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(versions).unwrap().with_root_certificates(roots);
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let certificate = CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap();
                let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        config.resumption = Resumption::disabled();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        config
    }

    /// Completes a TLS handshake, with or without a client certificate.
    pub async fn connect(
        &self,
        server: &Server,
        protocols: &[&str],
        shown: Option<&str>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        connect_with(self.client_config(protocols, shown, &[&version::TLS13, &version::TLS12]), server.address()).await
    }

    /// A connection for gRPC clients, with or without a client certificate.
    pub async fn channel(&self, server: &Server, shown: Option<&str>) -> Result<Channel, tonic::transport::Error> {
        self.channel_to(server.address(), shown).await
    }

    /// The same, to an address.
    pub async fn channel_to(&self, address: &str, shown: Option<&str>) -> Result<Channel, tonic::transport::Error> {
        let config = self.client_config(&["h2"], shown, &[&version::TLS13, &version::TLS12]);
        let address = address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let (config, address) = (config.clone(), address.clone());
            async move { connect_with(config, &address).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://localhost").timeout(time_limit()).connect_with_connector(connector).await
    }
}

pub async fn connect_with(config: ClientConfig, address: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?; // As gRPC clients do.
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
}
