//! The listening sockets, TCP ports and unix socket files.

use std::{io, os::unix::fs::FileTypeExt, path::PathBuf};

use tokio::net::{TcpListener, TcpSocket, UnixListener, lookup_host};

use super::{
    stream::Stream,
    url::{Url, UrlAddress},
};
use crate::error::StartError;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;

pub enum Listener {
    Tcp(TcpListener),
    Unix(SocketFile),
}

/// A unix socket file that this process listens on. It is removed when the listener is dropped.
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path); // It does not matter if it has been removed already.
    }
}

impl Listener {
    /// Listens at a URL. `shares_port` lets other processes listen on the same port.
    pub async fn bind(url: &Url, shares_port: bool) -> Result<Self, StartError> {
        match url.address() {
            UrlAddress::Tcp { host, port } => bind(host, *port, shares_port).await.map(Self::Tcp),
            UrlAddress::Unix(path) => bind_file(path.clone()).map(Self::Unix),
        }
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| stream.into()),
            Self::Unix(file) => file.listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }

    /// The local address, or the path of the socket file.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => {
                listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
            }
            Self::Unix(file) => file.path.display().to_string(),
        }
    }
}

/// Listens on a peer URL.
pub async fn bind_peer_port(url: &Url, shares_port: bool) -> Result<TcpListener, StartError> {
    match url.address() {
        UrlAddress::Tcp { host, port } => bind(host, *port, shares_port).await,
        UrlAddress::Unix(_) => {
            Err(StartError::Refused(format!("{url}: unix sockets between members are not supported yet")))
        }
    }
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

    #[tokio::test]
    async fn a_socket_file_is_replaced_only_if_no_process_listens_on_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket_url = url(&format!("unix://{}", path.display()));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a process that ends leaves the file behind");
        let listener = Listener::bind(&socket_url, false).await.unwrap();
        assert_eq!(listener.address(), path.display().to_string());
        let error = Listener::bind(&socket_url, false).await.err().expect("another listener exists");
        assert_eq!(error.to_string(), format!("listen unix {}: bind: address already in use", path.display()));
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "data").unwrap();
        assert!(Listener::bind(&socket_url, false).await.is_err(), "a file that is not a socket is not replaced");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn a_port_is_shared_only_if_both_listeners_allow_it() {
        let first = Listener::bind(&url("http://127.0.0.1:0"), true).await.unwrap();
        let same = url(&format!("http://{}", first.address()));
        assert!(Listener::bind(&same, false).await.is_err());
        Listener::bind(&same, true).await.expect("both share");
    }
}
