//! Compares lists of URLs after resolving host names, and finds the host of the default route.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket},
    thread,
    time::Duration,
};

use crate::logging::{Level, Notice};
use crate::net::url::{Url, UrlAddress};

/// A name that does not resolve yet may do so soon: where members start together, their DNS records appear together.
const ATTEMPTS: u32 = 30;
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Whether two lists are equal, as texts or after resolving their hosts. `localhost` is not resolved.
///
/// # Errors
/// Says where they differ, in etcd's text.
pub fn resolve_to_same_addresses(a: &[Url], b: &[Url]) -> Result<(), String> {
    if a.len() != b.len() {
        return Err(format!("len({}) != len({})", quoted(a), quoted(b)));
    }
    let (mut a, mut b) = (a.to_vec(), b.to_vec());
    a.sort();
    b.sort();
    if a == b {
        return Ok(());
    }
    let (a, b) = (resolve_all(&a)?, resolve_all(&b)?);
    match a.iter().zip(&b).find(|(a, b)| a != b) {
        None => Ok(()),
        Some((a, b)) => Err(format!("resolved urls: {a:?} != {b:?}")),
    }
}

fn resolve_all(urls: &[Url]) -> Result<Vec<String>, String> {
    let mut resolved = urls.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    resolved.sort();
    Ok(resolved)
}

fn resolve(url: &Url) -> Result<String, String> {
    let UrlAddress::Tcp { host, port } = url.address() else { return Ok(url.as_str().to_owned()) };
    if host == "localhost" || host.parse::<IpAddr>().is_ok() {
        return Ok(url.as_str().to_owned());
    }
    let address = resolve_host(host, *port).map_err(|why| format!("failed to resolve {:?} ({why})", url.as_str()))?;
    let scheme = if url.is_secure() { "https" } else { "http" };
    Ok(format!("{scheme}://{address}"))
}

/// The first address that a name resolves to.
fn resolve_host(host: &str, port: u16) -> Result<SocketAddr, String> {
    let mut attempt = 1;
    loop {
        let error = match (host, port).to_socket_addrs() {
            Ok(mut addresses) => match addresses.next() {
                Some(address) => return Ok(address),
                None => format!("lookup {host}: no such host"),
            },
            Err(error) => format!("lookup {host}: {error}"),
        };
        if attempt == ATTEMPTS {
            return Err(error);
        }
        let notice = Notice::new(Level::Warn, "failed to resolve URL Host").with("host", host);
        notice.with("error", error).log();
        attempt += 1;
        thread::sleep(RETRY_INTERVAL);
    }
}

/// The local address of the default route; IPv4 is preferred over IPv6.
///
/// # Errors
/// With etcd's text, if there is no such route.
pub fn default_host() -> Result<IpAddr, String> {
    // The addresses are reserved for documentation. Connecting a UDP socket sends nothing, it only selects the route.
    let route = |local: &str, remote: &str| -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind(local)?;
        socket.connect(remote)?;
        socket.local_addr().map(|address| address.ip())
    };
    let found = route("0.0.0.0:0", "203.0.113.1:9").or_else(|_| route("[::]:0", "[2001:db8::1]:9"));
    found.map_err(|_| "could not find default route".to_owned())
}

fn quoted(urls: &[Url]) -> String {
    let quoted: Vec<_> = urls.iter().map(|url| format!("{:?}", url.as_str())).collect();
    format!("[{}]", quoted.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(text: &str) -> Vec<Url> {
        text.split(',').map(|url| Url::parse(url).unwrap()).collect()
    }

    #[test]
    fn only_the_order_of_urls_is_ignored() {
        assert_eq!(
            resolve_to_same_addresses(
                &urls("http://10.0.0.1:1,http://10.0.0.1:2"),
                &urls("http://10.0.0.1:2,http://10.0.0.1:1")
            ),
            Ok(())
        );
        assert_eq!(
            resolve_to_same_addresses(&urls("http://127.0.0.1:1"), &urls("http://localhost:1")).unwrap_err(),
            "resolved urls: \"http://127.0.0.1:1\" != \"http://localhost:1\""
        );
        assert_eq!(
            resolve_to_same_addresses(&urls("http://10.0.0.1:1"), &urls("http://10.0.0.1:1,http://10.0.0.1:1"))
                .unwrap_err(),
            "len([\"http://10.0.0.1:1\"]) != len([\"http://10.0.0.1:1\" \"http://10.0.0.1:1\"])"
        );
    }
}
