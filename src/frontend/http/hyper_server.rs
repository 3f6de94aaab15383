//! Connections that hyper serves: those of HTTP/1.1; with `--grpc-server=tonic` those of HTTP/2, and no others.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::Watcher},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tower::ServiceExt;

use super::min_rate::{ChargedBody, IsCharged, MinRateBody, MinRateWriter, begin_timed_out};
use crate::{
    config::Config,
    frontend::grpc::{
        methods::{MethodTable, REFLECTION},
        tonic,
    },
};
use http2::{call::ConnectionInfo, frame::PREFACE, ledger::Ledger, limits};

/// Flow-control windows of one stream and of one connection.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// How long an HTTP/1.1 connection may be idle between two requests, or take to send the head of one.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// The result of serving a connection to its end.
pub type ServeResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// What the requests of a connection are answered with.
#[derive(Clone)]
pub struct HyperService {
    pub router: axum::Router,
    pub ledger: Arc<Ledger>,
    /// Set if tonic serves HTTP/2, and gRPC alone.
    pub tonic: Option<TonicService>,
    /// How long a client may take to send or to read [`limits::MIN_READ_BYTES`].
    pub timeout: Duration,
    /// Whether clients may take as long as they like to send the body of a request for this path.
    pub is_open_ended: fn(&str) -> bool,
    /// What requests get as an extension; None until there is a connection.
    pub connection: Option<ConnectionInfo>,
}

/// The methods that tonic serves.
#[derive(Clone)]
pub struct TonicService {
    pub methods: Arc<MethodTable>,
    pub max_message_bytes: usize,
}

/// hyper expects a `Result`; there is always a response.
type HyperResult = Result<http::Response<axum::body::Body>, std::convert::Infallible>;

impl HyperService {
    async fn respond(self, request: http::Request<Incoming>) -> HyperResult {
        let tonic = self.tonic.clone().filter(|_| request.uri().path() != REFLECTION);
        let Some(TonicService { methods, max_message_bytes }) = tonic else {
            return Ok(self.respond_via_router(request).await);
        };
        let request = request.map(|body| MinRateBody::new(body, self.timeout));
        let response = Box::pin(tonic::serve(methods, max_message_bytes, request)).await;
        Ok(response.map(axum::body::Body::new))
    }

    /// The response is charged to the ledger until the client has read it.
    async fn respond_via_router(self, mut request: http::Request<Incoming>) -> http::Response<axum::body::Body> {
        if let Some(connection) = self.connection {
            request.extensions_mut().insert(connection);
        }
        let request = if (self.is_open_ended)(request.uri().path()) {
            request.map(axum::body::Body::new)
        } else {
            request.map(|body| axum::body::Body::new(MinRateBody::new(body, self.timeout)))
        };
        let Ok(mut response) = self.router.oneshot(request).await;
        if response.extensions().get::<IsCharged>().is_some() {
            return response;
        }
        let mut length = usize::try_from(http_body::Body::size_hint(response.body()).lower()).unwrap_or(usize::MAX);
        if !self.ledger.has_space_for(length) {
            length = 0;
            limits::count_refusal("held_bytes");
            let (status, text) = (http::StatusCode::SERVICE_UNAVAILABLE, "too many bytes of answers wait to be read\n");
            response = (status, text).into_response();
        }
        response.map(|body| axum::body::Body::new(ChargedBody::new(body, self.ledger.charge(length))))
    }
}

/// The most concurrent streams of one connection. As in etcd, 0 means no limit.
pub fn max_streams(config: &Config) -> u32 {
    if config.max_concurrent_streams == 0 { u32::MAX } else { config.max_concurrent_streams }
}

/// A server for HTTP/1.1 and HTTP/2.
pub fn builder(config: &Config) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let header_list_bytes = config.frontend.max_header_list_bytes;
    // hyper buffers a request head, or a piece of a response.
    let buffer_bytes = header_list_bytes as usize;
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(buffer_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(max_streams(config))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(header_list_bytes)
        .keep_alive_interval(config.limits.keepalive_interval)
        .keep_alive_timeout(config.limits.keepalive_timeout);
    builder
}

/// Serves one connection to its end. The client has to send the preface or a request head within `begin_timeout`.
pub async fn serve<S>(
    builder: &auto::Builder<TokioExecutor>,
    service: HyperService,
    watcher: Watcher,
    stream: S,
    begin_timeout: Duration,
) -> ServeResult
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let read_timeout = service.timeout;
    let respond = hyper::service::service_fn(move |request| service.clone().respond(request));
    let deadline = Box::pin(tokio::time::sleep(begin_timeout));
    let stream = MinRateWriter::new(stream, read_timeout);
    let stream = BeginTimeout { stream, begin: Some(Begin { deadline, preface_bytes: 0, line: HeadLine::None }) };
    let connection = builder.serve_connection(TokioIo::new(stream), respond).into_owned();
    let end = YieldingConnection::new(watcher.watch(connection)).await;
    if end.as_ref().is_err_and(|error| error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_timeout)) {
        limits::count_refusal("slow_beginning");
    }
    end
}

/// A stream from which the HTTP/2 preface or the first request head must arrive in time. hyper itself has no limit for the
/// preface, and its limit for the head of an HTTP/1.1 request is the time for which a connection may be idle.
struct BeginTimeout<S> {
    stream: S,
    /// None: the preface or the head has arrived.
    begin: Option<Begin>,
}

/// What has arrived so far of the HTTP/2 preface, or of the first request head.
struct Begin {
    deadline: Pin<Box<Sleep>>,
    /// How many bytes of the preface have arrived; more than its length if it is not a preface.
    preface_bytes: usize,
    line: HeadLine,
}

/// The state of the last line of a request head.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HeadLine {
    /// There has been no line yet, except for empty ones: they may precede the first.
    None,
    NotEmpty,
    /// Empty so far, and follows another line.
    Empty,
}

impl Begin {
    /// Takes the bytes that have arrived; true if the preface or the head is complete.
    fn receive(&mut self, bytes: &[u8]) -> bool {
        let rest = PREFACE.get(self.preface_bytes..).unwrap_or_default();
        let both = rest.len().min(bytes.len());
        if !rest.is_empty() && rest[..both] == bytes[..both] {
            self.preface_bytes += both;
            return self.preface_bytes == PREFACE.len();
        }
        // What has matched the preface so far is the start of an ordinary line.
        if (1..PREFACE.len()).contains(&self.preface_bytes) {
            self.line = HeadLine::NotEmpty;
        }
        self.preface_bytes = usize::MAX;
        for &byte in bytes {
            self.line = match (byte, self.line) {
                (b'\n', HeadLine::Empty) => return true,
                (b'\n', HeadLine::NotEmpty) => HeadLine::Empty,
                (b'\r' | b'\n', line) => line,
                _ => HeadLine::NotEmpty,
            };
        }
        false
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for BeginTimeout<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let Some(begin) = &mut self.begin else { return read };
        if read.is_pending() {
            ready!(begin.deadline.as_mut().poll(context));
            return Poll::Ready(Err(begin_timed_out()));
        }
        if begin.receive(&buffer.filled()[before..]) {
            self.begin = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BeginTimeout<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A connection that yields to the tasks of its calls before it is polled.
///
/// The first response wakes the connection, and the scheduler would run it at once, to write that one response. If it first goes
/// to the back of the run queue, it finds the responses of all calls that were ready, and writes them with one system call.
struct YieldingConnection<C> {
    connection: Pin<Box<C>>,
    yielded: bool,
}

impl<C> YieldingConnection<C> {
    fn new(connection: C) -> Self {
        Self { connection: Box::pin(connection), yielded: false }
    }
}

impl<C: Future> Future for YieldingConnection<C> {
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<C::Output> {
        self.yielded = !self.yielded;
        if self.yielded {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.connection.as_mut().poll(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_begins_with_a_preface_or_a_request_head() {
        let complete_after = |pieces: &[&str]| {
            let deadline = Box::pin(tokio::time::sleep(Duration::ZERO));
            let mut begin = Begin { deadline, preface_bytes: 0, line: HeadLine::None };
            pieces.iter().position(|piece| begin.receive(piece.as_bytes()))
        };
        assert_eq!(complete_after(&["PRI * HTTP/2.0\r\n\r\n", "SM\r\n", "\r\n"]), Some(2));
        assert_eq!(complete_after(&["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n and more"]), Some(0));
        assert_eq!(complete_after(&["GET / HTTP/1.1\r\n", "a: b\r\n", "\r", "\n"]), Some(3));
        assert_eq!(complete_after(&["\r\n\r\nGET / HTTP/1.0\n\n"]), Some(0));
        assert_eq!(complete_after(&["P", "UT / HTTP/1.1\r\n\r\n"]), Some(1));
        assert_eq!(complete_after(&["\r\n\r\n", "GET / HTTP/1.1\r\na: ", "b"]), None);
    }
}
