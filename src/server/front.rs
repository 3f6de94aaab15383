//! Accepting and answering client connections.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto, graceful::GracefulShutdown},
};
use tokio::net::TcpListener;
use tower::ServiceExt;

use super::Failure;
use crate::{
    api::{self, Api, Table, grpc, table::Handler, unary, unary::UnaryBody},
    config::urls::{Place, Url},
};

/// Streams of one connection and the connection itself may have so much under way.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Larger header lists are refused.
const HEADER_LIST_BYTES: u32 = 64 << 10;
/// The server asks a silent client whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_hours(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

pub fn announce(listener: &TcpListener) {
    let address = listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
    tracing::info!(traffic = "grpc+http", address, "serving client traffic insecurely; this is strongly discouraged!");
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

/// Everything on the client port that the method table does not hold.
pub fn routes(api: &Arc<Api>) -> axum::Router {
    let (health, health_service) = tonic_health::server::health_reporter();
    tokio::spawn(async move { health.set_service_status("", tonic_health::ServingStatus::Serving).await });
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
        .build_v1()
        .expect("the descriptors were made by the build");
    let grpc = tonic::service::Routes::new(health_service).add_service(reflection).into_axum_router();
    let grpc = grpc.fallback(|| async { grpc::unknown_method() });
    let plain = api::http::router(api.clone());
    axum::Router::new().fallback(move |request: axum::extract::Request| {
        let content = request.headers().get(http::header::CONTENT_TYPE);
        let is_grpc = content.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        let router = if is_grpc { grpc.clone() } else { plain.clone() };
        router.oneshot(request)
    })
}

/// What one connection is served with.
#[derive(Clone)]
pub struct Service {
    pub table: Arc<Table>,
    pub router: axum::Router,
}

type Answer = Result<http::Response<Body>, std::convert::Infallible>;

/// The body of a response: small and plain for a unary call, boxed for everything else.
enum Body {
    Unary(UnaryBody),
    Other(axum::body::Body),
}

impl Service {
    /// The table's methods first: they are what everybody waits for. Everything but a plain unary call is boxed, so that
    /// the future of one is small.
    async fn answer(self, request: http::Request<Incoming>) -> Answer {
        let Some(method) = self.table.find(request.uri().path()).cloned() else {
            let response = Box::pin(self.router.oneshot(request.map(axum::body::Body::new))).await;
            return response.map(|response| response.map(Body::Other));
        };
        method.started();
        if let Handler::Unary(handler) = method.handler
            && !grpc::is_compressed(request.headers())
        {
            let metadata = grpc::metadata(request.headers());
            let response = unary::serve(self.table, method, handler, metadata, request.into_body()).await;
            return Ok(response.map(Body::Unary));
        }
        let response = Box::pin(grpc::serve(self.table, method, request)).await;
        Ok(response.map(|body| Body::Other(axum::body::Body::new(body))))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        match self.get_mut() {
            Self::Unary(body) => Pin::new(body).poll_frame(context),
            Self::Other(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Unary(body) => body.is_end_stream(),
            Self::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Unary(body) => body.size_hint(),
            Self::Other(body) => body.size_hint(),
        }
    }
}

pub async fn accept(
    listener: TcpListener,
    service: Service,
    max_streams: u32,
    graceful: Arc<GracefulShutdown>,
    mut stopped: tokio::sync::watch::Receiver<()>,
) {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http2()
        .timer(hyper_util::rt::TokioTimer::new())
        .max_concurrent_streams(max_streams)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let builder = Arc::new(builder);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.changed() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                let (builder, service, watcher) = (builder.clone(), service.clone(), graceful.watcher());
                tokio::spawn(async move {
                    let answer = hyper::service::service_fn(move |request| service.clone().answer(request));
                    let connection = builder.serve_connection(TokioIo::new(stream), answer).into_owned();
                    log_end(Patient::new(watcher.watch(connection)).await, peer);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: what is open goes on, and closing some makes room.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// A connection that lets the tasks of its calls go first.
///
/// The first answer wakes the connection, and the scheduler would run it at once, to write that one answer. Going to the
/// back of the queue first, it finds the answers of all calls that were ready, and writes them with one system call.
struct Patient<C> {
    connection: Pin<Box<C>>,
    waited: bool,
}

impl<C> Patient<C> {
    fn new(connection: C) -> Self {
        Self { connection: Box::pin(connection), waited: false }
    }
}

impl<C: Future> Future for Patient<C> {
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<C::Output> {
        self.waited = !self.waited;
        if self.waited {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.connection.as_mut().poll(context)
    }
}

fn log_end(outcome: Result<(), Box<dyn std::error::Error + Send + Sync>>, peer: SocketAddr) {
    if let Err(error) = outcome {
        tracing::debug!(%peer, %error, "a connection ended badly");
    }
}
