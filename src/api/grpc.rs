//! The one adapter: the method table as a gRPC service over tonic. Every tonic type of this floor is in this file.
//!
//! Plain unary calls never come here: [`super::unary`] frames them by hand. What is left is streams, and calls that use
//! compression. A streaming call's conversation is stepped by the response stream's own `poll_next`: hyper polls it when
//! the client's window has room, so "room" is being polled at all.

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
    table::{Handler, Method, Open, Table, Unary},
    unary,
};
use crate::call::{Call, Code, Conversation, Line, Metadata, Refusal, Step};

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
        grpc = grpc.send_compressed(CompressionEncoding::Gzip); // Answered in kind.
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

/// Whether the caller compresses.
#[must_use]
pub fn is_compressed(headers: &HeaderMap) -> bool {
    headers.get("grpc-encoding").is_some_and(|encoding| encoding != "identity")
}

/// The answer to a call that is refused before anybody looks at it.
#[must_use]
pub fn refused(refusal: &Refusal) -> http::Response<Body> {
    status(refusal).into_http()
}

/// tonic says in its own words that a message is too large; clients know etcd's.
fn rename_too_large(response: &mut http::Response<Body>, method: &Method) {
    let Some(status) = Status::from_header_map(response.headers()) else { return };
    let Some(sizes) = status.message().strip_prefix("Error, decoded message length too large: found ") else { return };
    let numbers: Vec<&str> = sizes.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty()).collect();
    let [found, limit] = numbers[..] else { return };
    let text = format!("grpc: received message larger than max ({found} vs. {limit})");
    method.handled(Code::ResourceExhausted);
    *response = Status::resource_exhausted(text).into_http();
}

fn status(refusal: &Refusal) -> Status {
    Status::new(tonic::Code::from_i32(refusal.code as i32), refusal.message.as_ref())
}

/// What a caller says in headers.
#[must_use]
pub fn metadata(headers: &HeaderMap) -> Metadata {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    Metadata {
        require_leader: text("hasleader") == Some("true"),
        token: text("token").or_else(|| text("authorization")).map(ToOwned::to_owned),
        client_api_version: headers.get("client-api-version").map(|value| Bytes::copy_from_slice(value.as_bytes())),
        deadline: None, // hyper resets the stream when the client's time is over.
    }
}

/// Messages as they are: nothing is encoded or decoded here.
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
    handler: Unary,
}

type Answering<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

impl UnaryService<Bytes> for UnaryCall {
    type Response = Bytes;
    type Future = Answering<Bytes>;

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
    open: Open,
}

impl StreamingService<Bytes> for StreamCall {
    type Response = Bytes;
    type ResponseStream = Talk;
    type Future = Answering<Talk>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let (table, method, open) = (self.table.clone(), self.method.clone(), self.open);
        Box::pin(async move {
            let metadata = metadata(request.metadata().as_ref());
            if let Err(refusal) = table.admit(&method, &metadata, None) {
                method.handled(refusal.code);
                return Err(status(&refusal));
            }
            let conversation = method.open(table.api(), open, metadata);
            let mut talk = Talk::new(conversation, request.into_inner(), method);
            // Response headers go out with the first message, as etcd's do; and a stream that ends without one is refused
            // as a whole.
            match std::future::poll_fn(|context| Pin::new(&mut talk).poll_next(context)).await {
                Some(Ok(first)) => talk.first = Some(first),
                Some(Err(status)) => return Err(status),
                None => (),
            }
            Ok(Response::new(talk))
        })
    }
}

/// A conversation as a stream of responses.
struct Talk {
    conversation: Option<Box<dyn Conversation>>,
    requests: Streaming<Bytes>,
    ended: bool,
    broken: Option<Status>,
    /// A response that was taken out of the stream to see whether there is one.
    first: Option<Bytes>,
    /// How the conversation ended, when its last response has yet to be sent.
    ending: Option<Result<(), Refusal>>,
    method: Arc<Method>,
}

impl Talk {
    fn new(conversation: Box<dyn Conversation>, requests: Streaming<Bytes>, method: Arc<Method>) -> Self {
        Self {
            conversation: Some(conversation),
            requests,
            ended: false,
            broken: None,
            first: None,
            ending: None,
            method,
        }
    }

    fn hang_up(&mut self) {
        let code = match &self.ending {
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

impl Drop for Talk {
    fn drop(&mut self) {
        self.end(Code::Canceled);
    }
}

impl Stream for Talk {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let this = &mut *self;
        let Some(conversation) = &mut this.conversation else {
            return Poll::Ready(this.ending.take().and_then(Result::err).map(|refusal| Err(status(&refusal))));
        };
        let mut line = Polled {
            context,
            requests: &mut this.requests,
            ended: &mut this.ended,
            broken: &mut this.broken,
            method: &this.method,
            response: None,
        };
        let step = conversation.step(&mut line);
        let response = line.response.take();
        if let Some(status) = this.broken.take() {
            this.end(Code::Canceled);
            return Poll::Ready(Some(Err(status)));
        }
        match (response, step) {
            (Some(response), Step::Wait) => Poll::Ready(Some(Ok(response))),
            (Some(response), Step::End(end)) => {
                this.ending = Some(end); // Its last words go out first.
                this.hang_up();
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

/// The line of one poll: room for one response.
struct Polled<'a, 'b> {
    context: &'a mut Context<'b>,
    requests: &'a mut Streaming<Bytes>,
    ended: &'a mut bool,
    broken: &'a mut Option<Status>,
    method: &'a Method,
    response: Option<Bytes>,
}

impl Line for Polled<'_, '_> {
    fn receive(&mut self) -> Option<Bytes> {
        if *self.ended || self.broken.is_some() {
            return None;
        }
        match Pin::new(&mut *self.requests).poll_next(self.context) {
            Poll::Ready(Some(Ok(message))) => {
                self.method.received(message.len());
                Some(message)
            }
            Poll::Ready(Some(Err(status))) => {
                *self.broken = Some(status);
                None
            }
            Poll::Ready(None) => {
                *self.ended = true;
                None
            }
            Poll::Pending => None,
        }
    }

    fn ended(&self) -> bool {
        *self.ended
    }

    fn has_room(&self) -> bool {
        self.response.is_none()
    }

    fn send(&mut self, message: Bytes) {
        assert!(self.response.is_none(), "conversations ask for room first");
        self.method.sent(message.len());
        self.response = Some(message);
    }

    fn waker(&self) -> &Waker {
        self.context.waker()
    }
}
