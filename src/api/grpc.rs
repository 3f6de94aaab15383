//! The adapter to tonic: serves the method table as a gRPC service. This is the only file of the layer that names tonic.
//!
//! Uncompressed unary calls are served by [`super::unary`] instead, so this serves streams, and calls that use compression. A
//! streaming call's conversation is stepped by the response stream's `poll_next`. hyper polls it when the client's window has
//! capacity, so being polled means that one response can be sent.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, BufMut, Bytes};
use http::HeaderMap;
use http_body::Body as HttpBody;
use tokio_stream::Stream;
use tonic::{
    Request, Response, Status, Streaming,
    codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, StreamingService, UnaryService},
};

use super::{
    table::{Handler, Method, StreamOpener, Table, UnaryHandler},
    unary,
};
use crate::call::{Call, CallError, Code, Conversation, Metadata, Step, StreamIo};

/// The body of a response.
pub type Body = tonic::body::Body;

/// Answers a request for a method of the table.
pub async fn serve<B>(table: Arc<Table>, method: Arc<Method>, request: http::Request<B>) -> http::Response<Body>
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let max_bytes = table.api().limits.max_message_bytes();
    let mut grpc = Grpc::new(BytesCodec)
        .apply_max_message_size_config(Some(max_bytes), Some(usize::MAX))
        .accept_compressed(CompressionEncoding::Gzip);
    if is_compressed(request.headers()) {
        grpc = grpc.send_compressed(CompressionEncoding::Gzip); // A compressed request gets a compressed response.
    }
    let mut response = match method.handler {
        Handler::Unary(handler) => grpc.unary(UnaryCall { table, method: method.clone(), handler }, request).await,
        Handler::Patient(open) | Handler::ServerStream(open) | Handler::Bidirectional(open) => {
            grpc.streaming(StreamCall { table, method: method.clone(), open }, request).await
        }
    };
    rename_too_large(&mut response, &method);
    response
}

/// Whether the request is compressed.
#[must_use]
pub fn is_compressed(headers: &HeaderMap) -> bool {
    headers.get("grpc-encoding").is_some_and(|encoding| encoding != "identity")
}

/// The response to a call that is refused before it reaches a handler.
#[must_use]
pub fn refused(refusal: &CallError) -> http::Response<Body> {
    status(refusal).into_http()
}

/// Replaces tonic's error text for a message that is too large with etcd's, which clients know.
fn rename_too_large(response: &mut http::Response<Body>, method: &Method) {
    let Some(status) = Status::from_header_map(response.headers()) else { return };
    let Some(sizes) = status.message().strip_prefix("Error, decoded message length too large: found ") else { return };
    let numbers: Vec<&str> = sizes.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty()).collect();
    let [found, limit] = numbers[..] else { return };
    let text = format!("grpc: received message larger than max ({found} vs. {limit})");
    method.handled(Code::ResourceExhausted);
    *response = Status::resource_exhausted(text).into_http();
}

fn status(refusal: &CallError) -> Status {
    Status::new(tonic::Code::from_i32(refusal.code as i32), refusal.message.as_ref())
}

/// The metadata in a call's headers.
#[must_use]
pub fn metadata(headers: &HeaderMap) -> Metadata {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    Metadata {
        require_leader: text("hasleader") == Some("true"),
        token: text("token").or_else(|| text("authorization")).map(ToOwned::to_owned),
        client_api_version: headers.get("client-api-version").map(|value| Bytes::copy_from_slice(value.as_bytes())),
        deadline: None, // hyper resets the stream at the client's deadline.
    }
}

/// Passes messages through as bytes.
#[derive(Clone, Copy, Default)]
struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(message);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}

struct UnaryCall {
    table: Arc<Table>,
    method: Arc<Method>,
    handler: UnaryHandler,
}

type ResponseFuture<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

impl UnaryService<Bytes> for UnaryCall {
    type Response = Bytes;
    type Future = ResponseFuture<Bytes>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let (table, method, handler) = (self.table.clone(), self.method.clone(), self.handler);
        Box::pin(async move {
            let (headers, _, message) = request.into_parts();
            let metadata = metadata(&headers.into_headers());
            let answer = unary::answer(&table, &method, handler, Call { metadata, message }).await;
            answer.map(Response::new).map_err(|refusal| status(&refusal))
        })
    }
}

struct StreamCall {
    table: Arc<Table>,
    method: Arc<Method>,
    open: StreamOpener,
}

impl StreamingService<Bytes> for StreamCall {
    type Response = Bytes;
    type ResponseStream = ConversationStream;
    type Future = ResponseFuture<ConversationStream>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let (table, method, open) = (self.table.clone(), self.method.clone(), self.open);
        Box::pin(async move {
            let metadata = metadata(request.metadata().as_ref());
            if let Err(refusal) = table.admit(&method, &metadata, None) {
                method.handled(refusal.code);
                return Err(status(&refusal));
            }
            let conversation = method.open(table.api(), open, metadata);
            let mut stream = ConversationStream::new(conversation, request.into_inner(), method);
            // As in etcd, response headers are sent with the first message, and a stream that fails without one is answered with
            // the error alone.
            match std::future::poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await {
                Some(Ok(first)) => stream.first = Some(first),
                Some(Err(status)) => return Err(status),
                None => (),
            }
            Ok(Response::new(stream))
        })
    }
}

/// A conversation as a stream of responses.
struct ConversationStream {
    conversation: Option<Box<dyn Conversation>>,
    requests: Streaming<Bytes>,
    is_half_closed: bool,
    /// The error of the request stream.
    request_error: Option<Status>,
    /// The first response, which was taken out of the stream to see whether there is one.
    first: Option<Bytes>,
    /// The end of the conversation, while its last response is being sent.
    pending_end: Option<Result<(), CallError>>,
    method: Arc<Method>,
}

impl ConversationStream {
    fn new(conversation: Box<dyn Conversation>, requests: Streaming<Bytes>, method: Arc<Method>) -> Self {
        Self {
            conversation: Some(conversation),
            requests,
            is_half_closed: false,
            request_error: None,
            first: None,
            pending_end: None,
            method,
        }
    }

    fn end_with_pending(&mut self) {
        let code = match &self.pending_end {
            Some(Err(refusal)) => refusal.code,
            Some(Ok(())) | None => Code::Ok,
        };
        self.end(code);
    }

    fn end(&mut self, code: Code) {
        if self.conversation.take().is_some() {
            self.method.handled(code);
        }
    }
}

impl Drop for ConversationStream {
    fn drop(&mut self) {
        self.end(Code::Canceled);
    }
}

impl Stream for ConversationStream {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let this = &mut *self;
        let Some(conversation) = &mut this.conversation else {
            return Poll::Ready(this.pending_end.take().and_then(Result::err).map(|refusal| Err(status(&refusal))));
        };
        let mut line = PollLine {
            context,
            requests: &mut this.requests,
            is_half_closed: &mut this.is_half_closed,
            request_error: &mut this.request_error,
            method: &this.method,
            response: None,
        };
        let step = conversation.step(&mut line);
        let response = line.response.take();
        if let Some(status) = this.request_error.take() {
            this.end(Code::Canceled);
            return Poll::Ready(Some(Err(status)));
        }
        match (response, step) {
            (Some(response), Step::Wait) => Poll::Ready(Some(Ok(response))),
            (Some(response), Step::End(end)) => {
                this.pending_end = Some(end); // The last response is sent first.
                this.end_with_pending();
                Poll::Ready(Some(Ok(response)))
            }
            (None, Step::Wait) => Poll::Pending,
            (None, Step::End(Ok(()))) => {
                this.end(Code::Ok);
                Poll::Ready(None)
            }
            (None, Step::End(Err(refusal))) => {
                this.end(refusal.code);
                Poll::Ready(Some(Err(status(&refusal))))
            }
        }
    }
}

/// The line of one poll, with capacity for one response.
struct PollLine<'a, 'b> {
    context: &'a mut Context<'b>,
    requests: &'a mut Streaming<Bytes>,
    is_half_closed: &'a mut bool,
    request_error: &'a mut Option<Status>,
    method: &'a Method,
    response: Option<Bytes>,
}

impl StreamIo for PollLine<'_, '_> {
    fn receive(&mut self) -> Option<Bytes> {
        if *self.is_half_closed || self.request_error.is_some() {
            return None;
        }
        match Pin::new(&mut *self.requests).poll_next(self.context) {
            Poll::Ready(Some(Ok(message))) => {
                self.method.received(message.len());
                Some(message)
            }
            Poll::Ready(Some(Err(status))) => {
                *self.request_error = Some(status);
                None
            }
            Poll::Ready(None) => {
                *self.is_half_closed = true;
                None
            }
            Poll::Pending => None,
        }
    }

    fn is_half_closed(&self) -> bool {
        *self.is_half_closed
    }

    fn can_send(&self) -> bool {
        self.response.is_none()
    }

    fn send(&mut self, message: Bytes) {
        assert!(self.response.is_none(), "conversations check can_send before they send");
        self.method.sent(message.len());
        self.response = Some(message);
    }

    fn waker(&self) -> &Waker {
        self.context.waker()
    }
}
