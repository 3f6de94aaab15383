//! Accepting client connections, and telling what they speak.
//!
//! One port serves all. The first bytes decide: a TLS handshake, where a URL asks for it, and then what the two have agreed
//! on; the preface of HTTP/2, which goes to our own loop; anything else is HTTP/1.1, which hyper serves. With
//! `--grpc-server=tonic` hyper serves both.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper_util::{
    rt::TokioExecutor,
    server::{conn::auto, graceful::GracefulShutdown},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpListener, TcpStream},
};

use super::{
    Failure,
    classic::{self, Service},
    own::Everything,
    tls::Tls,
};
use crate::{
    config::{
        Config,
        front::GrpcServer,
        urls::{Place, Url},
    },
    http2::{
        limits::Limits,
        lobby::{Lobby, Seat},
        service,
        task::Task,
    },
};

/// What a TLS handshake begins with.
const TLS_HANDSHAKE: u8 = 0x16;
/// No method of HTTP/1.1 begins like this.
const HTTP2: &[u8] = b"PRI";
/// Who connects and says nothing for so long is sent away.
const SILENCE: Duration = Duration::from_secs(10);
/// Descriptors that are not for clients.
const OTHER_DESCRIPTORS: u64 = 150;

/// How a connection ended.
pub type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A port, and what may be spoken there.
pub struct Port {
    listener: TcpListener,
    place: Place,
    is_plain: bool,
    is_secure: bool,
}

impl Port {
    /// Says where clients are served.
    pub fn announce(&self) {
        let address = self.listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
        if self.is_plain {
            let message = "serving client traffic insecurely; this is strongly discouraged!";
            tracing::info!(traffic = "grpc+http", address, "{message}");
        }
        if self.is_secure {
            tracing::info!(traffic = "grpc+http", address, "serving client traffic securely");
        }
    }
}

/// Listens on every address once: one that is named with and without TLS speaks both.
pub async fn bind_all(urls: &[Url]) -> Result<Vec<Port>, Failure> {
    let mut ports: Vec<Port> = Vec::new();
    for url in urls {
        match ports.iter_mut().find(|port| port.place == *url.place()) {
            Some(port) => {
                port.is_plain |= !url.is_secure();
                port.is_secure |= url.is_secure();
            }
            None => ports.push(Port {
                listener: bind(url).await?,
                place: url.place().clone(),
                is_plain: !url.is_secure(),
                is_secure: url.is_secure(),
            }),
        }
    }
    Ok(ports)
}

pub async fn bind(url: &Url) -> Result<TcpListener, Failure> {
    match url.place() {
        Place::Tcp { host, port } => {
            let address = format!("{host}:{port}");
            TcpListener::bind(&address).await.map_err(|source| Failure::Bind { address, source })
        }
        Place::Unix(_) => Err(Failure::Refused(format!("{}: unix sockets are not supported yet", url.as_str()))),
    }
}

/// Everything that a connection is served with.
pub struct Door {
    tls: Option<Tls>,
    own: Option<Arc<dyn service::Service>>,
    lobby: Arc<Lobby>,
    hyper: auto::Builder<TokioExecutor>,
    /// None: everybody is leaving.
    graceful: Mutex<Option<GracefulShutdown>>,
    service: Service,
}

impl Door {
    /// Reads what TLS needs.
    pub fn new(config: &Config, service: Service) -> Result<Self, Failure> {
        let own: Option<Arc<dyn service::Service>> = match config.front.grpc_server {
            GrpcServer::Own => Some(Arc::new(Everything::new(&service.table, service.router.clone()))),
            GrpcServer::Tonic => None,
        };
        let limits = Limits {
            max_streams: config.max_concurrent_streams,
            max_resets: config.front.max_resets,
            max_message: service.table.api().limits.max_message_bytes(),
            max_held: config.front.max_connection_bytes,
            max_held_in_all: config.front.max_held_bytes,
            max_connections: config.front.max_connections.unwrap_or_else(possible_connections),
            ..Limits::default()
        };
        Ok(Self {
            tls: config.front.tls.as_ref().map(Tls::open).transpose()?,
            own,
            lobby: Lobby::new(limits),
            hyper: classic::builder(config.max_concurrent_streams),
            graceful: Mutex::new(Some(GracefulShutdown::new())),
            service,
        })
    }

    /// Accepts until it is told to stop.
    pub async fn accept(self: Arc<Self>, port: Port, mut stopped: tokio::sync::watch::Receiver<()>) {
        loop {
            let accepted = tokio::select! {
                accepted = port.listener.accept() => accepted,
                _ = stopped.changed() => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let Some(seat) = self.lobby.enter() else { continue };
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(serve(self.clone(), (port.is_plain, port.is_secure), stream, peer, seat));
                }
                Err(error) => {
                    // Out of descriptors, most likely: what is open goes on, and closing some makes room.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Asks everybody to leave, and lets nobody enter any more.
    pub fn close(&self) {
        self.lobby.close();
    }

    /// Returns when everybody has left.
    pub async fn wait_until_empty(&self) {
        let graceful = self.graceful.lock().take();
        if let Some(graceful) = graceful {
            graceful.shutdown().await;
        }
        self.lobby.wait_until_empty().await;
    }

    /// A connection that hyper serves.
    async fn serve_classic<S>(&self, stream: S) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let watcher = self.graceful.lock().as_ref().map(GracefulShutdown::watcher);
        match watcher {
            Some(watcher) => classic::serve(&self.hyper, self.service.clone(), watcher, stream).await,
            None => Ok(()),
        }
    }

    /// A connection without TLS, or with what came out of it.
    async fn serve_stream<S>(&self, stream: S, first: Bytes, is_http2: bool, seat: Seat) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match &self.own {
            Some(own) if is_http2 => Ok(Task::new(stream, first, own.clone(), seat).await?),
            _ => {
                let (reader, writer) = tokio::io::split(stream);
                self.serve_classic(tokio::io::join(io::Cursor::new(first).chain(reader), writer)).await
            }
        }
    }

    async fn serve_plain(&self, mut stream: TcpStream, seat: Seat) -> Outcome {
        if self.own.is_none() {
            return self.serve_classic(stream).await;
        }
        let first = tokio::time::timeout(SILENCE, first_bytes(&mut stream)).await??;
        let is_http2 = first.starts_with(HTTP2);
        if !is_http2 && !may_be_http1(&first) {
            return Err("neither HTTP/2 nor HTTP/1.1".into());
        }
        self.serve_stream(stream, first, is_http2, seat).await
    }

    async fn serve_tls(&self, tls: &Tls, stream: TcpStream, peer: SocketAddr, seat: Seat) -> Outcome {
        match tls.accept(stream).await {
            Ok((stream, is_http2)) => self.serve_stream(stream, Bytes::new(), is_http2, seat).await,
            Err(error) => {
                tracing::warn!({ "remote-addr" = %peer, error = %error }, "rejected connection on client endpoint");
                Ok(())
            }
        }
    }
}

/// Serves one connection to its end.
async fn serve(door: Arc<Door>, (is_plain, is_secure): (bool, bool), stream: TcpStream, peer: SocketAddr, seat: Seat) {
    let outcome = match &door.tls {
        Some(tls) if is_secure => match if is_plain { speaks_tls(&stream).await } else { Ok(true) } {
            Ok(true) => door.serve_tls(tls, stream, peer, seat).await,
            Ok(false) => door.serve_plain(stream, seat).await,
            Err(error) => Err(error.into()),
        },
        _ => door.serve_plain(stream, seat).await,
    };
    if let Err(error) = outcome {
        tracing::debug!(%peer, %error, "a connection ended badly");
    }
}

async fn speaks_tls(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0];
    let count = tokio::time::timeout(SILENCE, stream.peek(&mut first)).await??;
    Ok(count > 0 && first[0] == TLS_HANDSHAKE)
}

/// What a client says first, as far as it takes to tell what it speaks.
async fn first_bytes(stream: &mut TcpStream) -> io::Result<Bytes> {
    let mut first = Vec::with_capacity(4096);
    while first.len() < HTTP2.len() && HTTP2.starts_with(&first) {
        if stream.read_buf(&mut first).await? == 0 {
            break;
        }
    }
    Ok(first.into())
}

/// Whether the first line, if all of it has come, is one of HTTP/1.
fn may_be_http1(first: &[u8]) -> bool {
    let Some(end) = first.iter().position(|&byte| byte == b'\n') else { return true };
    let line = first[..end].trim_ascii_end();
    // Blank lines may come before it.
    line.is_empty() || line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0")
}

/// Most connections that leave some descriptors for ourselves.
fn possible_connections() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit.saturating_sub(OTHER_DESCRIPTORS).max(1)).unwrap_or(usize::MAX)
}
