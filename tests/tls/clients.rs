//! Clients over TLS: ALPN, client certificates, renewed certificates, revocation, versions and cipher suites.

use std::{fs, process::Command};

use rcgen::ExtendedKeyUsagePurpose;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{client::TlsStream, rustls::version};

use metastore::proto::etcdserverpb::{
    AuthEnableRequest, AuthUserAddRequest, AuthUserGrantRoleRequest, AuthUserListRequest, auth_client::AuthClient,
};

use super::authority::{Authority, SECURE, Wanted, connect_with};
use crate::support::{Server, requirements::etcdctl, time_limit};

/// Requests a page over HTTP/2.
pub async fn page(stream: TlsStream<TcpStream>) -> Result<String, h2::Error> {
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

async fn page_of_http1(stream: TlsStream<TcpStream>) -> String {
    get(stream, "/health").await
}

async fn get(mut stream: TlsStream<TcpStream>, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

pub const HEALTHY: &str = r#"{"health":"true","reason":""}"#;

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
    server.wait_for_log("cannot use the changed TLS files; those read before stay in use");
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
    assert!(line.contains("open /nowhere/cert.pem: no such file or directory"), "{line}");
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

/// AUTH-17: a trusted CA demands certificates, but only `--client-cert-auth` makes their names those of users.
#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_ca_alone_names_no_users() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &[authority.flag("trusted-ca-file", "ca.pem")]);
    authority.sign("root", 2, ExtendedKeyUsagePurpose::ClientAuth);
    let channel = authority.channel(&server, Some("root")).await.unwrap();
    let mut auth = AuthClient::new(channel);
    let add = AuthUserAddRequest { name: "root".to_owned(), password: "pw".to_owned(), ..Default::default() };
    auth.user_add(add).await.unwrap();
    let grant = AuthUserGrantRoleRequest { user: "root".to_owned(), role: "root".to_owned() };
    auth.user_grant_role(grant).await.unwrap();
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
    let refused = auth.user_list(AuthUserListRequest {}).await.unwrap_err();
    assert_eq!(refused.message(), "etcdserver: user name is empty");
}

/// FAULT-45.
#[tokio::test]
async fn a_revoked_certificate_is_refused_from_the_next_connection_on() {
    let authority = Authority::new();
    authority.revoke("crl", &[77]);
    let more = [authority.flag("trusted-ca-file", "ca.pem"), authority.flag("client-crl-file", "crl")];
    let server = authority.server(SECURE, &more);
    authority.sign("good", 5, ExtendedKeyUsagePurpose::ClientAuth);
    authority.sign("bad", 77, ExtendedKeyUsagePurpose::ClientAuth);
    let ask = async |shown| {
        page(authority.connect(&server, &["h2"], Some(shown)).await?).await.map_err(std::io::Error::other)
    };
    assert_eq!(ask("good").await.unwrap(), HEALTHY);
    ask("bad").await.expect_err("it is revoked");
    server.wait_for_log("transport: certificate serial 4d revoked");
    authority.revoke("crl", &[5]);
    assert_eq!(ask("bad").await.unwrap(), HEALTHY, "the list is read again");
    ask("good").await.expect_err("it is revoked now");
}

#[tokio::test]
async fn a_client_certificate_must_be_valid_for_an_allowed_host_name() {
    let authority = Authority::new();
    let more = [
        authority.flag("trusted-ca-file", "ca.pem"),
        "--client-cert-allowed-hostname=ops.example.com,10.1.2.3".to_owned(),
    ];
    let server = authority.server(SECURE, &more);
    let issue =
        |name: &str, hosts: &[&str]| authority.issue(name, Wanted { common_name: name, hosts, ..Wanted::default() });
    issue("named", &["ops.example.com"]);
    issue("wild", &["*.example.com"]);
    issue("address", &["10.1.2.3"]);
    issue("other", &["example.com"]);
    let ask = async |shown| {
        page(authority.connect(&server, &["h2"], Some(shown)).await?).await.map_err(std::io::Error::other)
    };
    for allowed in ["named", "wild", "address"] {
        assert_eq!(ask(allowed).await.unwrap(), HEALTHY, "{allowed}");
    }
    ask("other").await.expect_err("its name is not allowed");
    let line = server.wait_for_log("client certificate authentication failed");
    assert!(line.contains("ops.example.com") && line.contains("rejected connection on client endpoint"), "{line}");
}

#[tokio::test]
async fn versions_and_cipher_suites_are_as_configured() {
    let authority = Authority::new();
    let connect = async |server: &Server, version| {
        let stream = connect_with(authority.client_config(&["h2"], None, &[version]), server.address()).await?;
        let session = stream.get_ref().1;
        Ok::<_, std::io::Error>(format!("{:?}", session.negotiated_cipher_suite().unwrap().suite()))
    };
    let newest = authority.server(SECURE, &["--tls-min-version=TLS1.3".to_owned()]);
    connect(&newest, &version::TLS13).await.unwrap();
    connect(&newest, &version::TLS12).await.unwrap_err();
    newest.wait_for_log("tls: client offered only unsupported versions");
    let oldest = authority.server(SECURE, &["--tls-max-version=TLS1.2".to_owned()]);
    connect(&oldest, &version::TLS12).await.unwrap();
    connect(&oldest, &version::TLS13).await.unwrap_err();
    let suite = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256";
    let chosen = authority.server(SECURE, &[format!("--cipher-suites={suite},TLS_RSA_WITH_AES_128_CBC_SHA")]);
    assert_eq!(connect(&chosen, &version::TLS12).await.unwrap(), suite);
    chosen.wait_for_log("\"ignored\":\"TLS_RSA_WITH_AES_128_CBC_SHA\"");
}

/// `--auto-tls`: the certificate is generated once, and kept.
#[tokio::test]
async fn a_certificate_is_generated_on_request() {
    let mut server = Server::start(&["--listen-client-urls=https://127.0.0.1:0", "--auto-tls"]);
    let generated = server.data_dir().join("fixtures/client/cert.pem");
    let first = fs::read(&generated).unwrap();
    let authority = Authority::new();
    fs::write(authority.path("ca.pem"), &first).unwrap();
    let config = || authority.client_config(&["h2"], None, &[&version::TLS13]);
    // It is valid for the address of the listen URL, and for no name.
    let refused = connect_with(config(), server.address()).await.unwrap_err().to_string();
    assert!(refused.contains("NotValidForName") || refused.contains("not valid for"), "{refused}");
    server.kill_and_restart();
    assert_eq!(fs::read(&generated).unwrap(), first);
    let Some(etcdctl) = etcdctl() else { return };
    let mut command = Command::new(etcdctl);
    command.arg(format!("--endpoints=https://{}", server.address())).arg("--insecure-skip-tls-verify");
    let ran = command.args(["--insecure-transport=false", "put", "a", "1"]).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

#[tokio::test]
async fn a_certificate_that_is_a_trusted_ca_itself_is_accepted_as_in_go() {
    let authority = Authority::new();
    let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    fs::write(authority.path("own.pem"), certificate.pem()).unwrap();
    fs::write(authority.path("own.key"), key.serialize_pem()).unwrap();
    fs::write(authority.path("both.pem"), fs::read_to_string(authority.path("ca.pem")).unwrap() + &certificate.pem())
        .unwrap();
    let server = authority.server(SECURE, &[authority.flag("trusted-ca-file", "both.pem")]);
    let stream = authority.connect(&server, &["h2"], Some("own")).await.unwrap();
    assert_eq!(page(stream).await.unwrap(), HEALTHY);
}

#[tokio::test]
async fn a_server_says_when_its_certificate_expires() {
    let authority = Authority::new();
    let server = authority.server(SECURE, &[]);
    let metrics = get(authority.connect(&server, &["http/1.1"], None).await.unwrap(), "/metrics").await;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("metastore_certificate_expiry_timestamp_seconds{flag=\"cert-file\"}"));
    let seconds: f64 = line.expect("there is a metric").rsplit(' ').next().unwrap().parse().unwrap();
    assert!(seconds > 2e9, "{seconds}");
    server.wait_for_log("TLS certificate in use");
    authority.issue("server", Wanted { has_expired: true, ..Wanted::default() });
    authority.connect(&server, &["h2"], None).await.unwrap_err();
    server.wait_for_log("the TLS certificate has expired: connections fail until it is renewed");
}

/// FAULT-45: the name in a certificate is that of a user for gRPC, and the JSON API says that it takes no notice of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_names_no_user_of_the_json_api() {
    let authority = Authority::new();
    let more = [authority.flag("trusted-ca-file", "ca.pem"), "--client-cert-auth".to_owned()];
    let server = authority.server(SECURE, &more);
    authority.sign("root", 2, ExtendedKeyUsagePurpose::ClientAuth);
    authority.issue("nameless", Wanted { common_name: "", ..Wanted::default() });
    let ask = async |shown, protocols: &[&str]| {
        let stream = authority.connect(&server, protocols, Some(shown)).await.unwrap();
        if protocols == ["h2"] { post_http2(stream).await } else { post_http1(stream).await }
    };
    for protocols in [["h2"], ["http/1.1"]] {
        assert_eq!(ask("root", &protocols).await.0, 200, "{protocols:?}: without authentication there are no users");
    }
    let channel = authority.channel(&server, Some("root")).await.unwrap();
    let mut auth = AuthClient::new(channel);
    let add = AuthUserAddRequest { name: "root".to_owned(), password: "pw".to_owned(), ..Default::default() };
    auth.user_add(add).await.unwrap();
    let grant = AuthUserGrantRoleRequest { user: "root".to_owned(), role: "root".to_owned() };
    auth.user_grant_role(grant).await.unwrap();
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
    auth.user_list(AuthUserListRequest {}).await.expect("for gRPC it names the user");
    for protocols in [["h2"], ["http/1.1"]] {
        let refused = ask("root", &protocols).await;
        let text = "CommonName of client sending a request against gateway will be ignored and not used as expected\n";
        assert_eq!(refused, (400, text.to_owned()), "{protocols:?}");
        assert_eq!(ask("nameless", &protocols).await.0, 200, "{protocols:?}");
    }
}

const STATUS_PATH: &str = "/v3/auth/status";

async fn post_http1(mut stream: TlsStream<TcpStream>) -> (u16, String) {
    let request =
        format!("POST {STATUS_PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn post_http2(stream: TlsStream<TcpStream>) -> (u16, String) {
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("https://localhost{STATUS_PATH}")).body(()).unwrap();
    let (head, mut body) = client.send_request(request, true).unwrap().0.await.unwrap().into_parts();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        text.extend_from_slice(&data.unwrap());
    }
    (head.status.as_u16(), String::from_utf8(text).unwrap())
}
