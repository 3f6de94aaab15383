//! Accepts client connections and detects their protocol.
//!
//! One port serves all protocols, unless gRPC, HTTP or metrics have ports of their own ([`Traffic`]). The first bytes decide: a TLS
//! handshake, if a listen URL asks for TLS, after which the protocol is the one negotiated by ALPN; the HTTP/2 preface, which
//! selects the HTTP/2 server of this crate; anything else is HTTP/1.1, which hyper serves. Over TLS, HTTP/2 must be negotiated: a
//! client that negotiates no protocol speaks HTTP/1.1. Without TLS, a port without gRPC serves HTTP/1.1 alone. With
//! `--grpc-server=tonic` hyper serves HTTP/2 on ports for gRPC, and nothing else there.

pub mod connection_limit;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper_util::{
    rt::TokioExecutor,
    server::{conn::auto, graceful::GracefulShutdown},
};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::{
    gateway::{self, Gateway},
    grpc::{Grpc, methods::MethodTable},
    http::{
        access::AccessControl,
        hyper_server::{self, HyperService, ServeResult, TonicService},
        min_rate::begin_timed_out,
    },
    http2_service::Http2Service,
    routes::{self, Traffic},
};
use crate::{
    config::{Config, frontend::GrpcServer},
    net::{
        listener::{Port, Schemes},
        stream::{Socket, Stream},
        tls::{self, ServerTls},
    },
    service::CallerConnection,
};
use connection_limit::{ConnectionLimit, ConnectionPermit};
use http2::{
    call::ConnectionInfo,
    limits::{self, Limits},
    registry::{ConnectionGuard, ConnectionRegistry},
    service,
    task::Task,
};

/// The start of the HTTP/2 preface. No method of HTTP/1.1 starts like this.
const HTTP2_START: &[u8] = b"PRI";

/// Logs what is served at a port.
pub fn announce(port: &Port, traffic: Traffic) {
    let (address, schemes) = (port.address(), port.schemes());
    if traffic == Traffic::Metrics {
        return port.urls().for_each(|address| tracing::info!(address, "serving metrics"));
    }
    let traffic = traffic.name();
    tracing::info!("ready to serve client requests");
    if schemes.plain {
        tracing::info!(traffic, address, "serving client traffic insecurely; this is strongly discouraged!");
    }
    if schemes.secure {
        tracing::info!(traffic, address, "serving client traffic securely");
    }
}

/// Accepts client connections, and serves them.
pub struct Acceptor {
    traffic: Traffic,
    tls: Option<Arc<ServerTls>>,
    /// For connections without TLS, and with it.
    plain: Handlers,
    secure: Handlers,
    registry: Arc<ConnectionRegistry>,
    /// Serves HTTP/1.1, or with tonic HTTP/2.
    hyper: auto::Builder<TokioExecutor>,
    /// None: connections are being closed, and no more are accepted.
    graceful: Mutex<Option<GracefulShutdown>>,
}

/// What handles the requests of connections.
struct Handlers {
    /// None: hyper serves HTTP/2 as well.
    http2: Option<Arc<dyn service::Service>>,
    hyper: HyperService,
}

impl Acceptor {
    /// Accepts nothing until [`Self::accept`] is called.
    #[must_use]
    pub fn new(traffic: Traffic, config: &Config, tls: Option<Arc<ServerTls>>, grpc: &Arc<Grpc>) -> Self {
        let limits = Limits {
            max_streams: hyper_server::max_streams(config),
            max_resets: config.frontend.max_resets,
            max_header_list: config.frontend.max_header_list_bytes as usize,
            max_message: grpc.max_message_bytes(),
            max_held: config.frontend.max_connection_bytes,
            begin_timeout: config.frontend.begin_timeout,
            read_timeout: config.frontend.read_timeout,
            idle_timeout: config.frontend.idle_timeout,
            keepalive_interval: config.limits.keepalive_interval,
            keepalive_timeout: config.limits.keepalive_timeout,
        };
        let methods = Arc::new(MethodTable::new(grpc));
        let has_gateway = matches!(traffic, Traffic::GrpcAndHttp | Traffic::Http) && config.frontend.json_api;
        let gateway = has_gateway.then(|| {
            Gateway::new(grpc, &methods, hyper_server::max_streams(config), config.frontend.max_connection_bytes)
        });
        let handlers = |is_secure| Handlers::new(traffic, config, grpc, methods.clone(), gateway.clone(), is_secure);
        let [plain, secure] = [false, true].map(handlers);
        let hyper = hyper_server::builder(config);
        Self {
            traffic,
            tls,
            hyper: if plain.http2.is_some() { hyper.http1_only() } else { hyper.http2_only() },
            plain,
            secure,
            registry: ConnectionRegistry::new(limits, grpc.service.ledger.clone()),
            graceful: Mutex::new(Some(GracefulShutdown::new())),
        }
    }

    /// Accepts connections until `stopped` changes.
    pub async fn accept(
        self: Arc<Self>,
        port: Port,
        limit: ConnectionLimit,
        mut stopped: tokio::sync::watch::Receiver<()>,
    ) {
        let schemes = port.schemes();
        loop {
            let accepted = tokio::select! {
                accepted = port.accept() => accepted,
                _ = stopped.changed() => return,
            };
            let socket = match accepted {
                Ok(socket) => socket,
                Err(error) => {
                    // Most likely out of file descriptors: open connections are still served, and some will be closed.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let client = socket.peer_address().map(|address| address.ip());
            let permit = tokio::select! {
                permit = limit.acquire(client) => permit,
                _ = stopped.changed() => return,
            };
            let Some(permit) = permit else { continue };
            let Some(guard) = self.registry.register() else { return };
            tokio::spawn(serve_connection(self.clone(), schemes, socket, guard, permit));
        }
    }

    /// Starts the graceful shutdown of all connections; no more are accepted.
    pub fn close(&self) {
        self.registry.shut_down();
    }

    /// Returns when all connections are closed.
    pub async fn wait_until_empty(&self) {
        let graceful = self.graceful.lock().take();
        if let Some(graceful) = graceful {
            graceful.shutdown().await;
        }
        self.registry.wait_until_empty().await;
    }

    /// Serves a connection with hyper.
    async fn serve_with_hyper<S>(&self, handlers: &Handlers, stream: S, connection: ConnectionInfo) -> ServeResult
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let watcher = self.graceful.lock().as_ref().map(GracefulShutdown::watcher);
        match watcher {
            Some(watcher) => {
                let service = HyperService { connection: Some(connection), ..handlers.hyper.clone() };
                hyper_server::serve(&self.hyper, service, watcher, stream, self.begin_timeout()).await
            }
            None => Ok(()),
        }
    }

    /// Serves an HTTP/1.1 connection, of which the first bytes have been read already.
    async fn serve_http1(
        &self,
        handlers: &Handlers,
        stream: Stream,
        first: Bytes,
        connection: ConnectionInfo,
    ) -> ServeResult {
        if first.starts_with(HTTP2_START) || !may_be_http1(&first) {
            limits::count_refusal("first_line");
            return Err("neither HTTP/1.1 nor negotiated HTTP/2".into());
        }
        let (reader, writer) = tokio::io::split(stream);
        let stream = tokio::io::join(io::Cursor::new(first).chain(reader), writer);
        self.serve_with_hyper(handlers, stream, connection).await
    }

    /// Awaits something that a client has to send first, within `--client-begin-timeout`.
    async fn with_begin_timeout<T>(&self, first: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        tokio::time::timeout(self.begin_timeout(), first).await.unwrap_or_else(|_| Err(begin_timed_out()))
    }

    fn begin_timeout(&self) -> Duration {
        self.registry.shared().limits.begin_timeout
    }

    async fn serve(&self, schemes: Schemes, socket: Socket, guard: ConnectionGuard) -> ServeResult {
        let is_tls = self.tls.is_some() && self.with_begin_timeout(tls::begins_handshake(schemes, &socket)).await?;
        let (mut stream, is_http2, handlers) = match &self.tls {
            Some(tls) if is_tls => {
                let (stream, is_http2) = if self.traffic == Traffic::Metrics {
                    tls.accept_from_own_address(socket, self.begin_timeout()).await?
                } else {
                    tls.accept(socket, self.begin_timeout()).await?
                };
                (stream, is_http2, &self.secure)
            }
            _ => (Stream::Plain(socket), false, &self.plain),
        };
        let address = stream.peer_address().map_or_else(String::new, |address| address.to_string());
        let connection = Arc::new(CallerConnection { address, common_name: tls::client_common_name(&stream) });
        let Some(http2) = &handlers.http2 else { return self.serve_with_hyper(handlers, stream, connection).await };
        if is_http2 || (self.traffic == Traffic::Grpc && !is_tls) {
            return Ok(Task::new(stream, Bytes::new(), http2.clone(), guard.with_info(connection)).await?);
        }
        if self.traffic == Traffic::Grpc {
            return Err("HTTP/2 was not negotiated on a port for gRPC alone".into());
        }
        let first = self.with_begin_timeout(first_bytes(&mut stream)).await?;
        if !is_tls && self.traffic == Traffic::GrpcAndHttp && first.starts_with(HTTP2_START) {
            return Ok(Task::new(stream, first, http2.clone(), guard.with_info(connection)).await?);
        }
        self.serve_http1(handlers, stream, first, connection).await
    }
}

impl Handlers {
    fn new(
        traffic: Traffic,
        config: &Config,
        grpc: &Arc<Grpc>,
        methods: Arc<MethodTable>,
        gateway: Option<Arc<Gateway>>,
        is_secure: bool,
    ) -> Self {
        let router =
            routes::routes(traffic, grpc, &methods, gateway, AccessControl::new(config.access.clone(), is_secure));
        let ledger = grpc.service.ledger.clone();
        let (http2, tonic): (Option<Arc<dyn service::Service>>, _) = match config.frontend.grpc_server {
            GrpcServer::Tonic if traffic.has_grpc() => {
                (None, Some(TonicService { methods, max_message_bytes: grpc.max_message_bytes() }))
            }
            GrpcServer::Own | GrpcServer::Tonic => {
                let (methods, read_pool) =
                    (Some(methods).filter(|_| traffic.has_grpc()), grpc.service.read_pool().clone());
                (Some(Arc::new(Http2Service::new(methods, router.clone(), read_pool))), None)
            }
        };
        let (timeout, is_open_ended) = (config.frontend.read_timeout, gateway::routes::is_open_ended);
        Self { http2, hyper: HyperService { router, ledger, tonic, timeout, is_open_ended, connection: None } }
    }
}

/// Serves one connection to its end, and then releases its permit.
async fn serve_connection(
    acceptor: Arc<Acceptor>,
    schemes: Schemes,
    socket: Socket,
    guard: ConnectionGuard,
    _permit: ConnectionPermit,
) {
    if let Err(error) = acceptor.serve(schemes, socket, guard).await {
        tracing::debug!(%error, "client connection closed with an error");
    }
}

/// The first bytes from a client, as many as it takes to detect the protocol.
async fn first_bytes(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut first = Vec::with_capacity(4096);
    while first.len() < HTTP2_START.len() && HTTP2_START.starts_with(&first) {
        if stream.read_buf(&mut first).await? == 0 {
            break;
        }
    }
    Ok(first.into())
}

/// Whether the first line, if it is complete, is an HTTP/1 request line.
fn may_be_http1(first: &[u8]) -> bool {
    let Some(end) = first.iter().position(|&byte| byte == b'\n') else { return true };
    let line = first[..end].trim_ascii_end();
    // Blank lines may precede it.
    line.is_empty() || line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0")
}
