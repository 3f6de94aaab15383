//! Where the quick HTTP API is served, and what it offers.

use super::parse::FlagValues;
use crate::net::url::{Url, UrlAddress};

/// The flags that are read here.
pub const FLAGS: [&str; 2] = ["port", "port-admin"];
/// Without an address for clients over TCP.
const DEFAULT_HOST: &str = "127.0.0.1";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuickApiConfig {
    pub listen_urls: Vec<Url>,
    /// Whether `POST` and `DELETE` of a number are about members.
    pub numbers_are_members: bool,
}

impl QuickApiConfig {
    /// None if there is no quick HTTP API. It is where clients are served, with another port.
    pub(super) fn read(values: &FlagValues, listen_client: &[Url]) -> Result<Option<Self>, String> {
        let (text, numbers_are_members) = (values.text("port"), values.get("port-admin"));
        let port = match values.get::<u64>("port").try_into() {
            Ok(0) if numbers_are_members => return Err("--port-admin needs --port".to_owned()),
            Ok(0) => return Ok(None),
            Ok(port) => port,
            Err(_) => return Err(format!("--port must be from 0 to 65535 (set to {text})")),
        };
        let mut listen_urls: Vec<Url> = listen_client.iter().filter_map(|url| with_port(url, port)).collect();
        listen_urls.sort();
        listen_urls.dedup();
        if listen_urls.is_empty() {
            listen_urls.extend(Url::parse(&format!("http://{DEFAULT_HOST}:{port}")));
        }
        Ok(Some(Self { listen_urls, numbers_are_members }))
    }
}

/// The same host and scheme with another port; None for a socket file.
fn with_port(url: &Url, port: u16) -> Option<Url> {
    let UrlAddress::Tcp { host, .. } = url.address() else { return None };
    let scheme = if url.is_secure() { "https" } else { "http" };
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    Url::parse(&format!("{scheme}://{host}:{port}")).ok()
}
