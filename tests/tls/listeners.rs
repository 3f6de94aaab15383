//! TLS on listeners for gRPC alone, for HTTP alone and for metrics, beside etcd.

use metastore::proto::etcdserverpb::{RangeRequest, kv_client::KvClient};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::rustls::version;

use super::{
    authority::{Authority, Wanted, connect_with},
    clients::{HEALTHY, page},
};
use crate::support::{Server, free_url, program, requirements::etcd};

/// The answer to a request over HTTP/1.1 or HTTP/2, or why there is none.
async fn ask(authority: &Authority, address: &str, protocol: &str, shown: Option<&str>) -> Result<String, String> {
    let config = authority.client_config(&[protocol], shown, &[&version::TLS13]);
    let mut stream = connect_with(config, address).await.map_err(|error| error.to_string())?;
    if protocol == "h2" {
        return page(stream).await.map_err(|error| error.to_string());
    }
    let mut text = String::new();
    let request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.map_err(|error| error.to_string())?;
    stream.read_to_string(&mut text).await.map_err(|error| error.to_string())?;
    let (_, body) = text.split_once("\r\n\r\n").ok_or_else(|| format!("no answer: {text:?}"))?;
    Ok(body.to_owned())
}

async fn get_key(authority: &Authority, address: &str, shown: Option<&str>) -> Result<i64, String> {
    let channel = authority.channel_to(address, shown).await.map_err(|error| error.to_string())?;
    let request = RangeRequest { key: "a".into(), ..RangeRequest::default() };
    let answer = KvClient::new(channel).range(request).await.map_err(|status| status.to_string())?;
    Ok(answer.into_inner().count)
}

#[tokio::test]
async fn each_listener_serves_its_traffic_and_metrics_check_the_address_of_a_client() {
    for program in [Some(program()), etcd()].into_iter().flatten() {
        let authority = Authority::new();
        authority.issue("server", Wanted::default());
        authority.issue("here", Wanted { serial: 2, ..Wanted::default() });
        authority.issue("elsewhere", Wanted { serial: 3, hosts: &["192.0.2.1"], ..Wanted::default() });
        let urls = [free_url(), free_url(), free_url()].map(|url| url.replace("http:", "https:"));
        let flags = ["listen-client-urls", "listen-client-http-urls", "listen-metrics-urls"];
        let mut arguments: Vec<_> = flags.iter().zip(&urls).map(|(flag, url)| format!("--{flag}={url}")).collect();
        arguments.push("--unsafe-no-fsync".to_owned());
        for (flag, file) in [("cert-file", "server.pem"), ("key-file", "server.key"), ("trusted-ca-file", "ca.pem")] {
            arguments.push(authority.flag(flag, file));
        }
        let server = Server::start_program(&program, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        server.wait_for_log("\"traffic\":\"http\"");
        let [grpc, http, metrics] = urls.each_ref().map(|url| url.strip_prefix("https://").unwrap());
        for protocol in ["http/1.1", "h2"] {
            for (address, shown) in [(http, "here"), (http, "elsewhere"), (metrics, "here")] {
                let answer = ask(&authority, address, protocol, Some(shown)).await;
                assert_eq!(answer.as_deref(), Ok(HEALTHY), "{protocol} with {shown}");
            }
            for shown in [None, Some("elsewhere")] {
                let answer = ask(&authority, metrics, protocol, shown).await;
                assert!(answer.is_err(), "metrics with {protocol} and {shown:?}: {answer:?}");
            }
            let answer = ask(&authority, grpc, protocol, Some("here")).await;
            assert_ne!(answer.as_deref(), Ok(HEALTHY), "HTTP on the listener for gRPC");
        }
        assert_eq!(get_key(&authority, grpc, Some("elsewhere")).await, Ok(0));
        for address in [http, metrics] {
            let answer = get_key(&authority, address, Some("here")).await;
            assert!(answer.is_err(), "gRPC on a listener for HTTP: {answer:?}");
        }
    }
}

#[tokio::test]
async fn the_quick_api_is_served_as_clients_are() {
    let authority = Authority::new();
    authority.issue("server", Wanted::default());
    authority.issue("here", Wanted { serial: 2, ..Wanted::default() });
    let [clients, quick] = [free_url(), free_url()].map(|url| url.replace("http:", "https:"));
    let address = quick.strip_prefix("https://").unwrap();
    let mut arguments = vec![format!("--listen-client-urls={clients}"), "--client-cert-auth".to_owned()];
    arguments.push(format!("--port={}", address.split_once(':').unwrap().1));
    for (flag, file) in [("cert-file", "server.pem"), ("key-file", "server.key"), ("trusted-ca-file", "ca.pem")] {
        arguments.push(authority.flag(flag, file));
    }
    let server = Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    server.wait_for_log("\"traffic\":\"quick http\"");
    for protocol in ["http/1.1", "h2"] {
        let answer = ask(&authority, address, protocol, Some("here")).await;
        assert_eq!(answer.as_deref(), Ok("key not found\n"), "{protocol}: the page is a key here");
        let answer = ask(&authority, address, protocol, None).await;
        assert!(answer.is_err(), "{protocol} without a certificate: {answer:?}");
    }
}
