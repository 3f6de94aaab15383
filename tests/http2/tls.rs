//! TLS for clients: ALPN, client certificates, and renewed certificates.

use std::{fs, path::PathBuf, process::Command, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    },
};

use crate::support::{Server, requirements::etcdctl, time_limit};

/// A certificate authority, and a directory for the certificates that it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { issuer: Issuer::new(params, key), directory }
    }

    /// Signs a certificate with this serial number.
    fn sign(&self, name: &str, serial: u64, purpose: ExtendedKeyUsagePurpose) {
        let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(serial.into());
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.directory.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
        fs::write(self.directory.path().join(format!("{name}.pem")), certificate.pem()).unwrap();
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn flag(&self, flag: &str, file: &str) -> String {
        format!("--{flag}={}", self.path(file).display())
    }

    /// A server with a certificate of this authority.
    fn server(&self, urls: &str, more: &[String]) -> Server {
        self.sign("server", 1, ExtendedKeyUsagePurpose::ServerAuth);
        let mut arguments = vec![format!("--listen-client-urls={urls}")];
        arguments.extend([self.flag("cert-file", "server.pem"), self.flag("key-file", "server.key")]);
        arguments.extend_from_slice(more);
        Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The certificate that a new connection sees.
    async fn shown_certificate(&self, server: &Server) -> Vec<u8> {
        let stream = self.connect(server, &["h2"], None).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].as_ref().to_vec()
    }

    /// Completes a TLS handshake, with or without a client certificate.
    async fn connect(
        &self,
        server: &Server,
        protocols: &[&str],
        shown: Option<&str>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.path("ca.pem")).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let certificate = CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap();
                let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let stream = TcpStream::connect(server.address()).await.unwrap();
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
    }
}

/// Requests a page over HTTP/2.
async fn page(stream: TlsStream<TcpStream>) -> Result<String, h2::Error> {
    let (mut client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let request = http::Request::get("https://localhost/health").body(()).unwrap();
    let (response, _) = client.send_request(request, true)?;
    let mut body = response.await?.into_body();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        text.extend_from_slice(&data);
    }
    Ok(String::from_utf8(text).unwrap())
}

async fn page_of_http1(mut stream: TlsStream<TcpStream>) -> String {
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

const HEALTHY: &str = r#"{"health":"true","reason":""}"#;
const SECURE: &str = "https://127.0.0.1:0";

#[tokio::test]
async fn tonic_disconnects_clients_that_are_silent_after_the_handshake_too() {
    let authority = Authority::new();
    let flags = ["--client-begin-timeout=1s".to_owned(), "--grpc-server=tonic".to_owned()];
    let server = authority.server(SECURE, &flags);
    let mut silent = authority.connect(&server, &["h2"], None).await.unwrap();
    let read = tokio::time::timeout(std::time::Duration::from_mins(1), silent.read_to_end(&mut Vec::new())).await;
    assert!(read.is_ok(), "the server must close the connection");
}

#[tokio::test]
async fn alpn_decides_the_protocol() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &["--client-begin-timeout=1s".to_owned()]);
    let connect = async |protocols: &[&str]| authority.connect(&server, protocols, None).await;
    assert_eq!(page(connect(&["h2", "http/1.1"]).await.unwrap()).await.unwrap(), HEALTHY);
    for protocols in [&["http/1.1"][..], &[]] {
        let text = page_of_http1(connect(protocols).await.unwrap()).await;
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with(HEALTHY), "{text}");
    }
    // HTTP/2 has to be negotiated by ALPN, and a silent client is disconnected.
    assert!(page(connect(&[]).await.unwrap()).await.is_err());
    let mut silent = connect(&[]).await.unwrap();
    let mut reserved = connect(&["h2"]).await.unwrap();
    let limit = time_limit();
    let mut received = Vec::new();
    assert!(tokio::time::timeout(limit, silent.read_to_end(&mut received)).await.is_ok() && received.is_empty());
    assert!(tokio::time::timeout(limit, reserved.read_to_end(&mut received)).await.is_ok());
    assert_eq!(received.get(3), Some(&4), "SETTINGS, and then GOAWAY");
    let error = connect(&["spdy/1"]).await.unwrap_err().to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
}

#[tokio::test]
async fn plaintext_and_tls_urls_work_together() {
    let authority = Authority::new();
    let server = authority.server("http://127.0.0.1:0,https://127.0.0.1:0", &[]);
    assert_eq!(page(authority.connect(&server, &["h2"], None).await.unwrap()).await.unwrap(), HEALTHY);
    assert_eq!(server.http("GET", "/health").body, HEALTHY);
    server.client().await.put("a", "1", None).await.unwrap();
}

#[tokio::test]
async fn clients_without_a_required_certificate_are_rejected() {
    let authority = Authority::new();
    for flags in [&["trusted-ca-file"][..], &["trusted-ca-file", "client-cert-auth"]] {
        let mut more = vec![authority.flag("trusted-ca-file", "ca.pem")];
        more.extend(flags.get(1).map(|flag| format!("--{flag}")));
        let server = authority.server(SECURE, &more);
        authority.sign("client", 2, ExtendedKeyUsagePurpose::ClientAuth);
        authority.sign("other", 3, ExtendedKeyUsagePurpose::ServerAuth);
        let other_ca = Authority::new();
        other_ca.sign("other_ca", 4, ExtendedKeyUsagePurpose::ClientAuth);
        for file in ["other_ca.pem", "other_ca.key"] {
            fs::copy(other_ca.path(file), authority.path(file)).unwrap();
        }
        let ask = async |shown| match authority.connect(&server, &["h2"], shown).await {
            Ok(stream) => page(stream).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!(ask(Some("client")).await.as_deref(), Ok(HEALTHY));
        for shown in [None, Some("other"), Some("other_ca")] {
            assert!(ask(shown).await.is_err(), "{shown:?}");
        }
        server.wait_for_log("rejected connection on client endpoint");
    }
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &[]);
    let shown = || authority.shown_certificate(&server);
    let before = shown().await;
    assert_eq!(shown().await, before);
    authority.sign("server", 99, ExtendedKeyUsagePurpose::ServerAuth);
    assert_ne!(shown().await, before);
}

#[tokio::test]
async fn the_previous_certificate_is_used_while_the_new_one_cannot_be_read() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &[]);
    let shown = || authority.shown_certificate(&server);
    let before = shown().await;
    fs::remove_file(authority.path("server.key")).unwrap();
    assert_eq!(shown().await, before);
    server.wait_for_log("cannot use the renewed TLS certificate; clients still see the one before");
    fs::write(authority.path("server.pem"), "no certificate").unwrap();
    assert_eq!(shown().await, before);
    authority.sign("server", 99, ExtendedKeyUsagePurpose::ServerAuth);
    assert_ne!(shown().await, before);
}

#[test]
fn etcdctl_works_with_a_client_certificate() {
    let Some(etcdctl) = etcdctl() else { return };
    let authority = Authority::new();
    let server = authority.server(SECURE, &[authority.flag("trusted-ca-file", "ca.pem")]);
    authority.sign("client", 2, ExtendedKeyUsagePurpose::ClientAuth);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&etcdctl);
        command.env_clear().args(arguments).arg(format!("--endpoints=https://{}", server.address()));
        command.arg(authority.flag("cacert", "ca.pem"));
        command.args([authority.flag("cert", "client.pem"), authority.flag("key", "client.key")]);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    assert_eq!(run(&["put", "greeting", "hello"]), "OK\n");
    assert_eq!(run(&["get", "greeting"]), "greeting\nhello\n");
}

#[test]
fn an_unreadable_certificate_prevents_the_start() {
    let files = ["--cert-file=/nowhere/cert.pem", "--key-file=/nowhere/key.pem"];
    let mut server = Server::single(&[&["--listen-client-urls=https://127.0.0.1:0"][..], &files].concat());
    server.launch();
    let line = server.wait_for_log("\"level\":\"fatal\"");
    assert!(line.contains("open /nowhere/cert.pem: No such file or directory"), "{line}");
}

/// AUTH-17: with client certificates, the common name is the user, unless the client shows a token.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_names_its_user() {
    let Some(etcdctl) = etcdctl() else { return };
    let authority = Authority::new();
    let more = [authority.flag("trusted-ca-file", "ca.pem"), "--client-cert-auth".to_owned()];
    let server = authority.server("https://127.0.0.1:0", &more);
    for name in ["root", "ann", "stranger"] {
        authority.sign(name, 7, ExtendedKeyUsagePurpose::ClientAuth);
    }
    let ask = |name: &str, words: &str| {
        let mut command = Command::new(&etcdctl);
        command.arg(format!("--endpoints=https://{}", server.address())).arg(authority.flag("cacert", "ca.pem"));
        command.args([authority.flag("cert", &format!("{name}.pem")), authority.flag("key", &format!("{name}.key"))]);
        let ran = command.args(words.split(' ')).output().unwrap();
        let refusal = String::from_utf8_lossy(&ran.stderr).lines().last().unwrap_or_default().to_owned();
        if ran.status.success() { Ok(()) } else { Err(refusal) }
    };
    for words in [
        "user add root --no-password",
        "user add ann --no-password",
        "user add bob:pw",
        "role add r",
        "role grant-permission r readwrite a",
        "user grant-role ann r",
        "auth enable",
    ] {
        assert_eq!(ask("stranger", words), Ok(()), "{words}");
    }
    assert_eq!(ask("root", "user list"), Ok(()));
    assert_eq!(ask("ann", "put a 1"), Ok(()));
    let denied = Err("Error: etcdserver: permission denied".to_owned());
    assert_eq!(
        (ask("ann", "put b 1"), ask("ann", "user list"), ask("stranger", "put a 1")),
        (denied.clone(), denied.clone(), denied.clone())
    );
    assert_eq!(ask("ann", "--user bob:pw put a 1"), denied, "a token counts for more than the certificate");
}
