//! Accepting client connections, and telling what they speak.
//!
//! One port serves all. The first bytes decide: a TLS handshake, where a URL asks for it, and then what the two have agreed
//! on; the preface of HTTP/2, which goes to our own loop; anything else is HTTP/1.1, which hyper serves. With
//! `--grpc-server=tonic` hyper serves both. Over TLS HTTP/2 has to be agreed on: whoever agrees on nothing speaks HTTP/1.1.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper_util::{
    rt::TokioExecutor,
    server::{conn::auto, graceful::GracefulShutdown},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
};

use super::{
    Failure,
    classic::{self, Service},
    listen::{Connection, Listener, Slots},
    own::Everything,
    tls::Tls,
};
use crate::{
    config::{Config, frontend::GrpcServer},
    http2::{
        limits::{self, Limits},
        lobby::{Lobby, Seat},
        service,
        task::Task,
    },
    urls::{Place, Url},
};

/// What a TLS handshake begins with.
const TLS_HANDSHAKE: u8 = 0x16;
/// No method of HTTP/1.1 begins like this.
const HTTP2: &[u8] = b"PRI";

/// How a connection ended.
pub type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A port, and what may be spoken there.
pub struct Port {
    listener: Listener,
    place: Place,
    is_plain: bool,
    is_secure: bool,
}

impl Port {
    /// Says where clients are served.
    pub fn announce(&self) {
        let address = self.listener.address();
        if self.is_plain {
            tracing::info!(
                traffic = "grpc+http",
                address,
                "serving client traffic insecurely; this is strongly discouraged!"
            );
        }
        if self.is_secure {
            tracing::info!(traffic = "grpc+http", address, "serving client traffic securely");
        }
    }
}

/// Listens on every address once: one that is named with and without TLS speaks both.
pub async fn bind_all(urls: &[Url], shares_port: bool) -> Result<Vec<Port>, Failure> {
    let mut ports: Vec<Port> = Vec::new();
    for url in urls {
        match ports.iter_mut().find(|port| port.place == *url.place()) {
            Some(port) => {
                port.is_plain |= !url.is_secure();
                port.is_secure |= url.is_secure();
            }
            None => ports.push(Port {
                listener: Listener::bind(url, shares_port).await?,
                place: url.place().clone(),
                is_plain: !url.is_secure(),
                is_secure: url.is_secure(),
            }),
        }
    }
    Ok(ports)
}

/// Everything that a connection is served with.
pub struct Door {
    tls: Option<Tls>,
    own: Option<Arc<dyn service::Service>>,
    lobby: Arc<Lobby>,
    hyper: auto::Builder<TokioExecutor>,
    /// The same, without HTTP/2.
    http1: auto::Builder<TokioExecutor>,
    /// None: everybody is leaving.
    graceful: Mutex<Option<GracefulShutdown>>,
    service: Service,
}

impl Door {
    /// Closed, so far.
    pub fn new(config: &Config, tls: Option<Tls>, service: Service) -> Self {
        let own: Option<Arc<dyn service::Service>> = match config.front.grpc_server {
            GrpcServer::Own => Some(Arc::new(Everything::new(&service.table, service.router.clone()))),
            GrpcServer::Tonic => None,
        };
        let limits = Limits {
            max_streams: classic::most_streams(config),
            max_resets: config.front.max_resets,
            max_message: service.table.api().limits.max_message_bytes(),
            max_held: config.front.max_connection_bytes,
            patience: config.front.begin_timeout,
            slow_reader: config.front.read_timeout,
            idle_timeout: config.front.idle_timeout,
            keepalive_interval: config.bounds.keepalive_interval,
            keepalive_timeout: config.bounds.keepalive_timeout,
            ..Limits::default()
        };
        Self {
            tls,
            own,
            lobby: Lobby::new(limits, service.table.api().ledger.clone()),
            hyper: classic::builder(config),
            http1: classic::builder(config).http1_only(),
            graceful: Mutex::new(Some(GracefulShutdown::new())),
            service,
        }
    }

    /// Accepts until it is told to stop.
    pub async fn accept(self: Arc<Self>, port: Port, slots: Slots, mut stopped: tokio::sync::watch::Receiver<()>) {
        let spoken = (port.is_plain, port.is_secure);
        loop {
            let accepted = tokio::select! {
                accepted = port.listener.accept() => accepted,
                _ = stopped.changed() => return,
            };
            let connection = match accepted {
                Ok(connection) => connection,
                Err(error) => {
                    // Out of descriptors, most likely: what is open goes on, and closing some makes room.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let slot = tokio::select! {
                slot = slots.take() => slot,
                _ = stopped.changed() => return,
            };
            let Some(seat) = self.lobby.enter() else { return };
            tokio::spawn(attend(self.clone(), spoken, connection, seat, slot));
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
    async fn serve_classic<S>(&self, builder: &auto::Builder<TokioExecutor>, stream: S) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let watcher = self.graceful.lock().as_ref().map(GracefulShutdown::watcher);
        let patience = self.lobby.shared().limits.patience;
        match watcher {
            Some(watcher) => classic::serve(builder, self.service.clone(), watcher, stream, patience).await,
            None => Ok(()),
        }
    }

    /// A connection that speaks HTTP/1.1, of which something was read already.
    async fn serve_http1<S>(&self, stream: S, first: Bytes) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        if first.starts_with(HTTP2) || !may_be_http1(&first) {
            limits::note("first_line");
            return Err("neither HTTP/1.1, nor HTTP/2 where it was agreed on".into());
        }
        let (reader, writer) = tokio::io::split(stream);
        self.serve_classic(&self.http1, tokio::io::join(io::Cursor::new(first).chain(reader), writer)).await
    }

    async fn serve_plain<S>(&self, mut stream: S, seat: Seat) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some(own) = &self.own else { return self.serve_classic(&self.hyper, stream).await };
        let first = self.in_time(first_bytes(&mut stream)).await?;
        if first.starts_with(HTTP2) {
            return Ok(Task::new(stream, first, own.clone(), seat).await?);
        }
        self.serve_http1(stream, first).await
    }

    async fn serve_tls<S>(&self, tls: &Tls, stream: S, peer: String, seat: Seat) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match (self.in_time(tls.accept(stream)).await, &self.own) {
            (Ok((stream, true)), Some(own)) => Ok(Task::new(stream, Bytes::new(), own.clone(), seat).await?),
            (Ok((stream, true)), None) => self.serve_classic(&self.hyper, stream).await,
            (Ok((mut stream, false)), _) => {
                let first = self.in_time(first_bytes(&mut stream)).await?;
                self.serve_http1(stream, first).await
            }
            (Err(error), _) => {
                tracing::warn!({ "remote-addr" = peer, error = %error }, "rejected connection on client endpoint");
                Ok(())
            }
        }
    }

    /// Waits for something that a client begins with, and no longer than it may take.
    async fn in_time<T>(&self, beginning: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let patience = self.lobby.shared().limits.patience;
        tokio::time::timeout(patience, beginning).await.unwrap_or_else(|_| Err(too_late()))
    }

    async fn speaks_tls(&self, stream: &TcpStream) -> io::Result<bool> {
        let mut first = [0];
        let count = self.in_time(stream.peek(&mut first)).await?;
        Ok(count > 0 && first[0] == TLS_HANDSHAKE)
    }

    async fn serve(&self, (is_plain, is_secure): (bool, bool), connection: Connection, seat: Seat) -> Outcome {
        let tls = self.tls.as_ref().filter(|_| is_secure);
        match (connection, tls) {
            (Connection::Tcp(stream), Some(tls)) if !is_plain || self.speaks_tls(&stream).await? => {
                let peer = stream.peer_addr().map_or_else(|_| String::new(), |address| address.to_string());
                self.serve_tls(tls, stream, peer, seat).await
            }
            (Connection::Tcp(stream), _) => self.serve_plain(stream, seat).await,
            (Connection::Unix(stream), Some(tls)) if !is_plain => {
                self.serve_tls(tls, stream, String::new(), seat).await
            }
            (Connection::Unix(stream), _) => self.serve_plain(stream, seat).await,
        }
    }
}

/// Counts a client that does not begin; why its connection ends.
pub fn too_late() -> io::Error {
    limits::note("slow_beginning");
    io::Error::new(io::ErrorKind::TimedOut, "a client that does not begin")
}

/// Serves one connection to its end. Its slot is free then.
async fn attend(
    door: Arc<Door>,
    spoken: (bool, bool),
    connection: Connection,
    seat: Seat,
    _slot: OwnedSemaphorePermit,
) {
    if let Err(error) = door.serve(spoken, connection, seat).await {
        tracing::debug!(%error, "a connection ended badly");
    }
}

/// What a client says first, as far as it takes to tell what it speaks.
async fn first_bytes(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
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
