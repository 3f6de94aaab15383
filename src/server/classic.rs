//! Connections that hyper serves: HTTP/1.1, and HTTP/2 too where tonic was asked for.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::response::IntoResponse;
use bytes::Bytes;
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

use super::{
    front::{Outcome, too_late},
    pace::{Arriving, Counted, Paced},
};
use crate::{
    api::{Table, grpc, table::Handler, unary, unary::UnaryBody},
    config::Config,
    http2::{frame::PREFACE, limits},
};

/// Streams of one connection and the connection itself may have so much under way.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Larger header lists are refused.
const HEADER_LIST_BYTES: u32 = 64 << 10;
/// What hyper keeps for a connection of HTTP/1.1: a head, or a piece of an answer.
const BUFFER_BYTES: usize = 64 << 10;
/// A connection of HTTP/1.1 may be idle for so long between two requests, or be at the head of one.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// What one connection is served with.
#[derive(Clone)]
pub struct Service {
    pub table: Arc<Table>,
    pub router: axum::Router,
    /// What a client may take to send or to read a little.
    pub timeout: Duration,
}

/// How a request is answered, always.
type Answer = Result<http::Response<Body>, std::convert::Infallible>;

/// The body of a response: small and plain for a unary call, boxed for everything else.
enum Body {
    Unary(UnaryBody),
    Stream(axum::body::Body),
    Plain(Counted),
}

impl Service {
    /// The table's methods first: they are what everybody waits for. Everything but a plain unary call is boxed, so that
    /// the future of one is small.
    async fn answer(self, request: http::Request<Incoming>) -> Answer {
        // gRPC is spoken over HTTP/2 alone, as in etcd: below that its paths are none.
        let is_grpc = request.version() == http::Version::HTTP_2;
        let Some(method) = self.table.find(request.uri().path()).filter(|_| is_grpc).cloned() else {
            return Ok(Box::pin(self.answer_plain(request)).await);
        };
        method.started();
        if let Handler::Unary(handler) = method.handler
            && !grpc::is_compressed(request.headers())
        {
            let metadata = grpc::metadata(request.headers());
            let body = Arriving::new(request.into_body(), self.timeout);
            let response = unary::serve(self.table, method, handler, metadata, body).await;
            return Ok(response.map(Body::Unary));
        }
        let response = Box::pin(grpc::serve(self.table, method, request)).await;
        Ok(response.map(|body| Body::Stream(axum::body::Body::new(body))))
    }

    /// Answers what is not a method of the table. The answer is counted until it is read.
    async fn answer_plain(self, request: http::Request<Incoming>) -> http::Response<Body> {
        let request = request.map(|body| axum::body::Body::new(Arriving::new(body, self.timeout)));
        let Ok(mut response) = self.router.oneshot(request).await;
        let ledger = &self.table.api().ledger;
        let mut length = usize::try_from(http_body::Body::size_hint(response.body()).lower()).unwrap_or(usize::MAX);
        if !ledger.has_space_for(length) {
            length = 0;
            limits::note("held_bytes");
            let (status, text) = (http::StatusCode::SERVICE_UNAVAILABLE, "too many bytes of answers wait to be read\n");
            response = (status, text).into_response();
        }
        response.map(|body| Body::Plain(Counted::new(body, ledger.charge(length))))
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
            Self::Stream(body) => Pin::new(body).poll_frame(context),
            Self::Plain(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Unary(body) => body.is_end_stream(),
            Self::Stream(body) => body.is_end_stream(),
            Self::Plain(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Unary(body) => body.size_hint(),
            Self::Stream(body) => body.size_hint(),
            Self::Plain(body) => body.size_hint(),
        }
    }
}

/// Streams of one connection at a time. None at all is no limit, as in etcd.
pub fn most_streams(config: &Config) -> u32 {
    if config.max_concurrent_streams == 0 { u32::MAX } else { config.max_concurrent_streams }
}

/// The server that speaks both.
pub fn builder(config: &Config) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(most_streams(config))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .keep_alive_interval(config.bounds.keepalive_interval)
        .keep_alive_timeout(config.bounds.keepalive_timeout);
    builder
}

/// Serves one connection to its end. The other side may take `patience` to begin.
pub async fn serve<S>(
    builder: &auto::Builder<TokioExecutor>,
    service: Service,
    watcher: Watcher,
    stream: S,
    patience: Duration,
) -> Outcome
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service_timeout = service.timeout;
    let answer = hyper::service::service_fn(move |request| service.clone().answer(request));
    let late = Box::pin(tokio::time::sleep(patience));
    let stream = Paced::new(stream, service_timeout);
    let stream = Prompt { stream, beginning: Some(Beginning { late, seen: 0, line: Line::Nothing }) };
    let connection = builder.serve_connection(TokioIo::new(stream), answer).into_owned();
    let end = Patient::new(watcher.watch(connection)).await;
    if end.as_ref().is_err_and(|error| error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_timeout)) {
        limits::note("slow_beginning");
    }
    end
}

/// A stream whose other side has to begin in time. Hyper itself waits for HTTP/2's preface as long as it takes, and for the
/// head of a request of HTTP/1.1 as long as a connection may be idle.
struct Prompt<S> {
    stream: S,
    /// None: it has begun.
    beginning: Option<Beginning>,
}

/// What has come so far of HTTP/2's preface, or of a first head.
struct Beginning {
    late: Pin<Box<Sleep>>,
    /// So much of the preface; more than there is of it if it is none.
    seen: usize,
    line: Line,
}

/// The last line of a head, so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    /// There may be empty ones before the first.
    Nothing,
    Something,
    /// Behind another one.
    Empty,
}

impl Beginning {
    /// Sees what has come; true if that is all of it.
    fn see(&mut self, bytes: &[u8]) -> bool {
        let rest = PREFACE.get(self.seen..).unwrap_or_default();
        let both = rest.len().min(bytes.len());
        if !rest.is_empty() && rest[..both] == bytes[..both] {
            self.seen += both;
            return self.seen == PREFACE.len();
        }
        // The preface's own beginning is a line like others.
        if (1..PREFACE.len()).contains(&self.seen) {
            self.line = Line::Something;
        }
        self.seen = usize::MAX;
        for &byte in bytes {
            self.line = match (byte, self.line) {
                (b'\n', Line::Empty) => return true,
                (b'\n', Line::Something) => Line::Empty,
                (b'\r' | b'\n', line) => line,
                _ => Line::Something,
            };
        }
        false
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prompt<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let Some(beginning) = &mut self.beginning else { return read };
        if read.is_pending() {
            ready!(beginning.late.as_mut().poll(context));
            return Poll::Ready(Err(too_late()));
        }
        if beginning.see(&buffer.filled()[before..]) {
            self.beginning = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prompt<S> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_beginning_is_a_preface_or_a_head() {
        let begins = |pieces: &[&str]| {
            let late = Box::pin(tokio::time::sleep(Duration::ZERO));
            let mut beginning = Beginning { late, seen: 0, line: Line::Nothing };
            pieces.iter().position(|piece| beginning.see(piece.as_bytes()))
        };
        assert_eq!(begins(&["PRI * HTTP/2.0\r\n\r\n", "SM\r\n", "\r\n"]), Some(2));
        assert_eq!(begins(&["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n and more"]), Some(0));
        assert_eq!(begins(&["GET / HTTP/1.1\r\n", "a: b\r\n", "\r", "\n"]), Some(3));
        assert_eq!(begins(&["\r\n\r\nGET / HTTP/1.0\n\n"]), Some(0));
        assert_eq!(begins(&["P", "UT / HTTP/1.1\r\n\r\n"]), Some(1));
        assert_eq!(begins(&["\r\n\r\n", "GET / HTTP/1.1\r\na: ", "b"]), None);
    }
}
