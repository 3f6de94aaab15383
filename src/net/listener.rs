//! The listening sockets, TCP ports and unix socket files.

use std::{io, os::unix::fs::FileTypeExt, path::PathBuf};

use tokio::net::{TcpListener, TcpSocket, UnixListener, lookup_host};

use super::{
    stream::Socket,
    url::{Url, UrlAddress},
};
use crate::error::StartError;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;

enum Listener {
    Tcp(TcpListener),
    Unix(SocketFile),
}

/// A unix socket file that this process listens on. It is removed when the listener is dropped.
struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path); // It does not matter if it has been removed already.
    }
}

impl Listener {
    async fn bind(url: &Url, shares_port: bool) -> Result<Self, StartError> {
        match url.address() {
            UrlAddress::Tcp { host, port } => bind(host, *port, shares_port).await.map(Self::Tcp),
            UrlAddress::Unix(path) => bind_file(path.clone()).map(Self::Unix),
        }
    }
}

/// Which of plain connections and TLS a port accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schemes {
    pub plain: bool,
    pub secure: bool,
}

/// A port that this server listens on, or a socket file.
pub struct Port {
    listener: Listener,
    url_address: UrlAddress,
    schemes: Schemes,
}

impl Port {
    /// The next connection.
    pub async fn accept(&self) -> io::Result<Socket> {
        match &self.listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| stream.into()),
            Listener::Unix(file) => file.listener.accept().await.map(|(stream, _)| Socket::Unix(stream)),
        }
    }

    /// The local address, or the path of the socket file.
    pub fn address(&self) -> String {
        match &self.listener {
            Listener::Tcp(listener) => {
                listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
            }
            Listener::Unix(file) => file.path.display().to_string(),
        }
    }

    pub fn schemes(&self) -> Schemes {
        self.schemes
    }

    /// The URLs of [`Self::address`].
    pub fn urls(&self) -> impl Iterator<Item = String> {
        let (plain, secure) =
            if matches!(self.listener, Listener::Tcp(_)) { ("http", "https") } else { ("unix", "unixs") };
        let schemes = [(self.schemes.plain, plain), (self.schemes.secure, secure)];
        schemes
            .into_iter()
            .filter(|(is_served, _)| *is_served)
            .map(|(_, scheme)| format!("{scheme}://{}", self.address()))
    }

    /// Lets the runtime that calls this accept the connections, instead of the one that has bound the port.
    pub fn move_to_this_runtime(self) -> io::Result<Self> {
        let listener = match self.listener {
            Listener::Tcp(listener) => Listener::Tcp(TcpListener::from_std(listener.into_std()?)?),
            Listener::Unix(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(Self { listener, ..self })
    }
}

/// Listens on every address once: one that is listed with and without TLS accepts both. `shares_port` lets other processes
/// listen on the same ports.
pub async fn bind_all(urls: &[Url], shares_port: bool) -> Result<Vec<Port>, StartError> {
    let mut ports: Vec<Port> = Vec::new();
    for url in urls {
        match ports.iter_mut().find(|port| port.url_address == *url.address()) {
            Some(Port { schemes, .. }) if url.is_secure() => schemes.secure = true,
            Some(Port { schemes, .. }) => schemes.plain = true,
            None => ports.push(Port {
                listener: Listener::bind(url, shares_port).await?,
                url_address: url.address().clone(),
                schemes: Schemes { plain: !url.is_secure(), secure: url.is_secure() },
            }),
        }
    }
    Ok(ports)
}

/// As [`bind_all`], for peer URLs.
pub async fn bind_peer_ports(urls: &[Url], shares_port: bool) -> Result<Vec<Port>, StartError> {
    if let Some(url) = urls.iter().find(|url| matches!(url.address(), UrlAddress::Unix(_))) {
        return Err(StartError::Refused(format!("{url}: unix sockets between members are not supported yet")));
    }
    bind_all(urls, shares_port).await
}

async fn bind(host: &str, port: u16, shares_port: bool) -> Result<TcpListener, StartError> {
    let failure = |source| StartError::Bind { address: format!("tcp {host}:{port}"), source };
    let mut last = io::ErrorKind::AddrNotAvailable.into();
    for address in lookup_host((host, port)).await.map_err(failure)? {
        let bound = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.and_then(|socket| {
            socket.set_reuseaddr(true)?; // A restart must not wait until earlier connections have left TIME_WAIT.
            socket.set_reuseport(shares_port)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        });
        match bound {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(failure(last))
}

/// A socket file that accepts no connections was left behind by an earlier process, and is replaced.
fn bind_file(path: PathBuf) -> Result<SocketFile, StartError> {
    let failure = |source| StartError::Bind { address: format!("unix {}", path.display()), source };
    let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(&path).is_err() {
        std::fs::remove_file(&path).map_err(failure)?;
    }
    let listener = UnixListener::bind(&path).map_err(failure)?;
    Ok(SocketFile { listener, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    async fn bind_one(url: &Url, shares_port: bool) -> Result<Port, StartError> {
        Ok(bind_all(std::slice::from_ref(url), shares_port).await?.remove(0))
    }

    #[tokio::test]
    async fn a_socket_file_is_replaced_only_if_no_process_listens_on_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket_url = url(&format!("unix://{}", path.display()));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a process that ends leaves the file behind");
        let port = bind_one(&socket_url, false).await.unwrap();
        assert_eq!(port.address(), path.display().to_string());
        let error = bind_one(&socket_url, false).await.err().expect("another listener exists");
        assert_eq!(error.to_string(), format!("listen unix {}: bind: address already in use", path.display()));
        drop(port);
        assert!(!path.exists());
        std::fs::write(&path, "data").unwrap();
        assert!(bind_one(&socket_url, false).await.is_err(), "a file that is not a socket is not replaced");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn a_port_is_shared_only_if_both_listeners_allow_it() {
        let first = bind_one(&url("http://127.0.0.1:0"), true).await.unwrap();
        let same = url(&format!("http://{}", first.address()));
        assert!(bind_one(&same, false).await.is_err());
        bind_one(&same, true).await.expect("both share");
    }

    #[tokio::test]
    async fn an_address_with_both_schemes_is_one_port() {
        let free = bind_one(&url("http://127.0.0.1:0"), false).await.unwrap().address();
        let urls = [url(&format!("http://{free}")), url(&format!("https://{free}")), url("https://127.0.0.1:0")];
        let ports = bind_all(&urls, false).await.unwrap();
        let schemes: Vec<_> = ports.iter().map(|port| (port.schemes.plain, port.schemes.secure)).collect();
        assert_eq!(schemes, [(true, true), (false, true)]);
    }
}
