//! The one adapter to tonic: the same method table, served plainly by tonic and hyper. It is a reference for the server of this
//! project's own, and serves etcd's gRPC alone. Every tonic type of this layer is in this file.
//!
//! A conversation is stepped by the `poll_next` of the response stream. hyper polls it only when the client's flow-control window
//! has capacity, so being polled means that one response can be sent.

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
    server::{Grpc as TonicGrpc, StreamingService, UnaryService},
};

use super::{
    METADATA_FIELDS, direct,
    methods::{self, GrpcMethod, MethodTable},
};
use http2::{
    call::{Call, CallError, Code, Conversation, Metadata, Step, StreamIo},
    service::{Method, Shape},
};

/// The body of a response.
pub type Body = tonic::body::Body;

/// Answers a request with a method of the table.
pub async fn serve<B>(
    table: Arc<MethodTable>,
    max_message_bytes: usize,
    request: http::Request<B>,
) -> http::Response<Body>
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let path = request.uri().path();
    let Some(method) = table.find(path) else { return error_response(&methods::refuse_unknown(path)) };
    method.started();
    let mut grpc = TonicGrpc::new(BytesCodec)
        .apply_max_message_size_config(Some(max_message_bytes), Some(usize::MAX))
        .accept_compressed(CompressionEncoding::Gzip);
    if is_compressed(request.headers()) {
        grpc = grpc.send_compressed(CompressionEncoding::Gzip); // The response is compressed if the request is.
    }
    let mut response = match method.shape() {
        Shape::Unary => grpc.unary(UnaryCall(method.clone()), request).await,
        Shape::Stream => grpc.streaming(StreamCall(method.clone()), request).await,
    };
    rename_too_large(&mut response, &method);
    response
}

/// Whether the client compresses its messages.
fn is_compressed(headers: &HeaderMap) -> bool {
    headers.get("grpc-encoding").is_some_and(|encoding| encoding != "identity")
}

/// The response to a call that fails before its handler.
#[must_use]
pub fn error_response(error: &CallError) -> http::Response<Body> {
    status(error).into_http()
}

/// Replaces tonic's error text for a message that is too large with etcd's, which clients know.
fn rename_too_large(response: &mut http::Response<Body>, method: &GrpcMethod) {
    let Some(status) = Status::from_header_map(response.headers()) else { return };
    let Some(sizes) = status.message().strip_prefix("Error, decoded message length too large: found ") else { return };
    let numbers: Vec<&str> = sizes.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty()).collect();
    let [found, limit] = numbers[..] else { return };
    let text = format!("grpc: received message larger than max ({found} vs. {limit})");
    method.handled(Code::ResourceExhausted);
    *response = Status::resource_exhausted(text).into_http();
}

fn status(error: &CallError) -> Status {
    Status::new(tonic::Code::from_i32(error.code as i32), error.message.as_ref())
}

/// The metadata in a call's headers. There is no deadline: hyper resets the stream at the client's.
fn metadata(headers: &HeaderMap) -> Metadata {
    let value = |name| headers.get(name).map(|value| Bytes::copy_from_slice(value.as_bytes()));
    Metadata { fields: METADATA_FIELDS.map(value), ..Metadata::default() }
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

struct UnaryCall(Arc<GrpcMethod>);

type ResponseFuture<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

impl UnaryService<Bytes> for UnaryCall {
    type Response = Bytes;
    type Future = ResponseFuture<Bytes>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let method = self.0.clone();
        Box::pin(async move {
            let (headers, _, message) = request.into_parts();
            let metadata = metadata(&headers.into_headers());
            let answer = direct::call(&method, Call { metadata, message }).await;
            answer.map(Response::new).map_err(|error| status(&error))
        })
    }
}

struct StreamCall(Arc<GrpcMethod>);

impl StreamingService<Bytes> for StreamCall {
    type Response = Bytes;
    type ResponseStream = ConversationStream;
    type Future = ResponseFuture<ConversationStream>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let method = self.0.clone();
        Box::pin(async move {
            let conversation = method.open(metadata(request.metadata().as_ref())).map_err(|error| {
                method.handled(error.code);
                status(&error)
            })?;
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
    method: Arc<GrpcMethod>,
}

impl ConversationStream {
    fn new(conversation: Box<dyn Conversation>, requests: Streaming<Bytes>, method: Arc<GrpcMethod>) -> Self {
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
            Some(Err(error)) => error.code,
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
            return Poll::Ready(this.pending_end.take().and_then(Result::err).map(|error| Err(status(&error))));
        };
        let mut io = PollIo {
            context,
            requests: &mut this.requests,
            is_half_closed: &mut this.is_half_closed,
            request_error: &mut this.request_error,
            method: &this.method,
            response: None,
        };
        let step = conversation.step(&mut io);
        let response = io.response.take();
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
            (None, Step::End(Err(error))) => {
                this.end(error.code);
                Poll::Ready(Some(Err(status(&error))))
            }
        }
    }
}

/// The stream of one poll, with capacity for one response.
struct PollIo<'a, 'b> {
    context: &'a mut Context<'b>,
    requests: &'a mut Streaming<Bytes>,
    is_half_closed: &'a mut bool,
    request_error: &'a mut Option<Status>,
    method: &'a GrpcMethod,
    response: Option<Bytes>,
}

impl StreamIo for PollIo<'_, '_> {
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
