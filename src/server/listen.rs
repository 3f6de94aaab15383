//! Where clients connect to: ports and socket files, and how many of them at a time.

use std::{io, os::unix::fs::FileTypeExt, path::PathBuf, sync::Arc};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream, lookup_host},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::Failure;
use crate::{
    http2::limits,
    urls::{Place, Url},
};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// A place where clients connect to.
pub enum Listener {
    /// A port.
    Tcp(TcpListener),
    /// A socket file.
    Unix(SocketFile),
}

/// A client that has connected.
pub enum Connection {
    /// To a port.
    Tcp(TcpStream),
    /// To a socket file.
    Unix(UnixStream),
}

/// A socket file that we listen on. It goes when nobody listens any more.
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path); // Whoever removed it before us did us no harm.
    }
}

impl Listener {
    /// Listens at a URL. `shares_port` lets other processes listen on the same port.
    pub async fn bind(url: &Url, shares_port: bool) -> Result<Self, Failure> {
        match url.place() {
            Place::Tcp { host, port } => bind(host, *port, shares_port).await.map(Self::Tcp),
            Place::Unix(path) => bind_file(path.clone()).map(Self::Unix),
        }
    }

    /// The next client.
    pub async fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                let _ = stream.set_nodelay(true);
                Connection::Tcp(stream)
            }),
            Self::Unix(file) => file.listener.accept().await.map(|(stream, _)| Connection::Unix(stream)),
        }
    }

    /// Where it is.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => {
                listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
            }
            Self::Unix(file) => file.path.display().to_string(),
        }
    }
}

/// Listens where members connect to.
pub async fn bind_for_members(url: &Url, shares_port: bool) -> Result<TcpListener, Failure> {
    match url.place() {
        Place::Tcp { host, port } => bind(host, *port, shares_port).await,
        Place::Unix(_) => Err(Failure::Refused(format!("{url}: unix sockets between members are not supported yet"))),
    }
}

async fn bind(host: &str, port: u16, shares_port: bool) -> Result<TcpListener, Failure> {
    let failure = |source| Failure::Bind { address: format!("tcp {host}:{port}"), source };
    let mut last = io::ErrorKind::AddrNotAvailable.into();
    for address in lookup_host((host, port)).await.map_err(failure)? {
        let bound = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.and_then(|socket| {
            socket.set_reuseaddr(true)?; // A restart must not wait for the last connections to be forgotten.
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

/// A socket file that nobody answers at is what an earlier life left, and makes room.
fn bind_file(path: PathBuf) -> Result<SocketFile, Failure> {
    let failure = |source| Failure::Bind { address: format!("unix {}", path.display()), source };
    let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(&path).is_err() {
        std::fs::remove_file(&path).map_err(failure)?;
    }
    let listener = UnixListener::bind(&path).map_err(failure)?;
    Ok(SocketFile { listener, path })
}

/// Files that stay free beside clients' connections: the database's, the log's, the other members'.
const RESERVED_FILES: u64 = 700;
/// etcd does not start with fewer.
const LEAST_FILES: u64 = 150;

/// Room for client connections.
#[derive(Clone)]
pub struct Slots {
    free: Arc<Semaphore>,
    all: usize,
}

impl Slots {
    /// So many; or as many as the limit of open files leaves, which is raised as far as it goes.
    pub fn new(bound: Option<usize>) -> Result<Self, Failure> {
        let files = raise_file_limit();
        if files <= LEAST_FILES {
            let text = "file descriptor limit of the process is too low; please set higher";
            return Err(Failure::Refused(format!("{text} (limit {files}, more than {LEAST_FILES} are needed)")));
        }
        let left = files - RESERVED_FILES.min(files / 2);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let all = bound.unwrap_or(left).min(left).min(Semaphore::MAX_PERMITS);
        Ok(Self { free: Arc::new(Semaphore::new(all)), all })
    }

    /// Room for one more connection, as soon as there is. It is free again when the permit is dropped.
    pub async fn take(&self) -> OwnedSemaphorePermit {
        if self.free.available_permits() == 0 {
            limits::note("connections");
            tracing::warn!(limit = self.all, "too many client connections; new ones wait until others end");
        }
        self.free.clone().acquire_owned().await.expect("nobody closes it")
    }
}

fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[tokio::test]
    async fn a_dead_socket_file_makes_room_and_a_live_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let place = url(&format!("unix://{}", path.display()));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "whoever dies leaves it behind");
        let listener = Listener::bind(&place, false).await.unwrap();
        assert_eq!(listener.address(), path.display().to_string());
        let error = Listener::bind(&place, false).await.err().expect("somebody listens there");
        assert_eq!(error.to_string(), format!("listen unix {}: bind: address already in use", path.display()));
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "somebody's").unwrap();
        assert!(Listener::bind(&place, false).await.is_err(), "a file that is no socket stays");
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
    }

    #[tokio::test]
    async fn a_port_is_shared_only_if_both_want_it() {
        let first = Listener::bind(&url("http://127.0.0.1:0"), true).await.unwrap();
        let same = url(&format!("http://{}", first.address()));
        assert!(Listener::bind(&same, false).await.is_err());
        Listener::bind(&same, true).await.expect("both share");
    }

    #[tokio::test]
    async fn who_comes_when_all_slots_are_taken_waits() {
        let slots = Slots::new(Some(1)).unwrap();
        let first = slots.take().await;
        let mut second = Box::pin(slots.take());
        let waker = std::task::Waker::noop();
        assert!(second.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
        drop(first);
        drop(second.await);
    }
}
