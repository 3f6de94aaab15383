//! Unary calls, with gRPC's framing implemented here: most calls are unary, and most of a call's cost is its framing.
//!
//! A gRPC message is prefixed with five bytes (a compression flag and the length). A unary call has one message each way, then
//! trailers with the status. A request usually lies in a single frame and is passed on without copying. Calls that use
//! compression are not served here.
//!
//! The call's mailbox holds one parcel and the waker of the task that waits for it. It is one allocation for the whole call,
//! regardless of how often work is put into it.

use std::{
    borrow::Cow,
    fmt::Write,
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;

use super::{
    Api,
    table::{Method, Table, UnaryHandler},
};
use crate::call::{Call, CallError, CallResult, Code, Delivery, Metadata, Reply, ReplySink};

const PREFIX_LEN: usize = 5;
/// A message up to this size is copied behind its prefix, so that both are sent as one frame.
const COPIED_BYTES: usize = 16 << 10;

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The mailbox of one unary call.
#[derive(Default)]
struct UnaryMailbox {
    state: Mutex<(Option<Delivery>, Option<Waker>)>,
}

impl ReplySink for UnaryMailbox {
    fn put(self: Arc<Self>, _slot: u64, parcel: Delivery) {
        let mut state = self.state.lock();
        state.0 = Some(parcel);
        let waker = state.1.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl UnaryMailbox {
    async fn next_parcel(&self) -> Delivery {
        std::future::poll_fn(|context| {
            let mut state = self.state.lock();
            if let Some(parcel) = state.0.take() {
                return Poll::Ready(parcel);
            }
            state.1 = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// Calls a handler and waits for its answer. Work that the handler puts into the mailbox runs here.
pub async fn run(api: &Arc<Api>, handler: UnaryHandler, call: Call) -> CallResult {
    let mailbox = Arc::new(UnaryMailbox::default());
    handler(api, call, Reply::new(mailbox.clone(), 0));
    loop {
        match mailbox.next_parcel().await {
            Delivery::Answer(answer) => return answer,
            Delivery::Work(work) => work(Reply::new(mailbox.clone(), 0)),
        }
    }
}

/// Answers one call.
pub async fn serve<B>(
    table: Arc<Table>,
    method: Arc<Method>,
    handler: UnaryHandler,
    metadata: Metadata,
    body: B,
) -> Response<UnaryBody>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    match read(body, table.api().limits.max_message_bytes()).await {
        Ok(message) => match answer(&table, &method, handler, Call { metadata, message }).await {
            Ok(message) => accept(message),
            Err(refusal) => refuse(&refusal),
        },
        Err(refusal) => {
            method.handled(refusal.code);
            refuse(&refusal)
        }
    }
}

/// Answers a call whose request has been read, and counts the call.
pub async fn answer(table: &Table, method: &Method, handler: UnaryHandler, call: Call) -> CallResult {
    let (started, request_bytes) = (Instant::now(), call.message.len());
    method.received(request_bytes);
    let answer = match table.admit(method, &call.metadata, Some(&call.message)) {
        Ok(()) => run(table.api(), handler, call).await,
        Err(refusal) => Err(refusal),
    };
    table.api().slow.note_call(method, started.elapsed(), request_bytes, &answer);
    match &answer {
        Ok(message) => {
            method.sent(message.len());
            method.handled(Code::Ok);
        }
        Err(refusal) => method.handled(refusal.code),
    }
    answer
}

/// Reads the message of a request.
async fn read<B: HttpBody<Data = Bytes> + Unpin>(mut body: B, max_bytes: usize) -> Result<Bytes, CallError> {
    let mut received = MessageBuffer::default();
    loop {
        if let Some(message) = received.take_message(max_bytes)? {
            return Ok(message);
        }
        let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        let Some(Ok(frame)) = frame else {
            let text = if received.len() < PREFIX_LEN { "EOF" } else { "unexpected EOF" };
            return Err(CallError { code: Code::Unknown, message: Cow::Borrowed(text) });
        };
        if let Ok(data) = frame.into_data() {
            received.push(data);
        }
    }
}

/// The received part of a message: the first piece as it is, or several in one buffer, into which each is copied once.
#[derive(Default)]
struct MessageBuffer {
    single: Bytes,
    joined: BytesMut,
}

impl MessageBuffer {
    fn len(&self) -> usize {
        self.single.len() + self.joined.len()
    }

    fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.single = data;
            return;
        }
        self.joined.extend_from_slice(&std::mem::take(&mut self.single));
        self.joined.extend_from_slice(&data);
    }

    /// The message at the front, if it is complete.
    fn take_message(&mut self, max_bytes: usize) -> Result<Option<Bytes>, CallError> {
        let front = if self.joined.is_empty() { &self.single[..] } else { &self.joined[..] };
        let Some(range) = find_message(front, max_bytes)? else { return Ok(None) };
        let framed = if self.joined.is_empty() { self.single.clone() } else { self.joined.split().freeze() };
        Ok(Some(framed.slice(range)))
    }
}

/// The range of the first message, if it is complete.
fn find_message(received: &[u8], max_bytes: usize) -> Result<Option<Range<usize>>, CallError> {
    let Some(mut prefix) = received.get(..PREFIX_LEN) else { return Ok(None) };
    if prefix.get_u8() != 0 {
        let text = "grpc: compressed flag set with identity or empty encoding";
        return Err(CallError { code: Code::Internal, message: Cow::Borrowed(text) });
    }
    let len = prefix.get_u32() as usize;
    if len > max_bytes {
        let text = format!("grpc: received message larger than max ({len} vs. {max_bytes})");
        return Err(CallError { code: Code::ResourceExhausted, message: Cow::Owned(text) });
    }
    let range = PREFIX_LEN..PREFIX_LEN + len;
    Ok((range.end <= received.len()).then_some(range))
}

fn accept(message: Bytes) -> Response<UnaryBody> {
    let len = u32::try_from(message.len());
    let Ok(len) = len else {
        let text = format!("grpc: trying to send message larger than max ({} vs. {})", message.len(), u32::MAX);
        return refuse(&CallError { code: Code::ResourceExhausted, message: Cow::Owned(text) });
    };
    let copied = if message.len() <= COPIED_BYTES { message.len() } else { 0 };
    let mut first = BytesMut::with_capacity(PREFIX_LEN + copied);
    first.put_u8(0);
    first.put_u32(len);
    first.extend_from_slice(&message[..copied]);
    let rest = (copied < message.len()).then_some(message);
    respond(UnaryBody { first: Some(first.freeze()), rest, trailers: true }, None)
}

fn refuse(refusal: &CallError) -> Response<UnaryBody> {
    respond(UnaryBody { first: None, rest: None, trailers: false }, Some(refusal))
}

fn respond(body: UnaryBody, refusal: Option<&CallError>) -> Response<UnaryBody> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, GRPC);
    if let Some(refusal) = refusal {
        headers.insert(GRPC_STATUS, HeaderValue::from(refusal.code as u16));
        headers.insert(GRPC_MESSAGE, percent_encode(&refusal.message));
    }
    response
}

/// `grpc-message` is text in a header: everything but plain printable ASCII is escaped.
fn percent_encode(text: &str) -> HeaderValue {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}"); // Writing to a string cannot fail.
        }
    }
    HeaderValue::try_from(out).expect("what is left is printable ASCII")
}

/// The body of a response: the message in one frame or two, then trailers with the status OK.
pub struct UnaryBody {
    first: Option<Bytes>,
    rest: Option<Bytes>,
    trailers: bool,
}

impl HttpBody for UnaryBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if let Some(data) = this.first.take().or_else(|| this.rest.take()) {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if std::mem::take(&mut this.trailers) {
            let mut trailers = HeaderMap::with_capacity(1);
            trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_none() && !self.trailers
    }

    fn size_hint(&self) -> SizeHint {
        let left = self.first.as_ref().map_or(0, Bytes::len) + self.rest.as_ref().map_or(0, Bytes::len);
        SizeHint::with_exact(left as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(flag: u8, message: &[u8]) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(flag);
        out.put_u32(u32::try_from(message.len()).unwrap());
        out.extend_from_slice(message);
        out.freeze()
    }

    #[test]
    fn a_message_is_returned_once_it_is_complete() {
        let whole = framed(0, b"message");
        let message = Bytes::from_static(b"message");
        for split in 1..whole.len() {
            let mut received = MessageBuffer::default();
            received.push(whole.slice(..split));
            assert_eq!(received.take_message(100), Ok(None), "after {split} bytes");
            for byte in whole[split..].chunks(1) {
                assert_eq!(received.take_message(100), Ok(None));
                received.push(Bytes::copy_from_slice(byte));
            }
            assert_eq!(received.take_message(100), Ok(Some(message.clone())));
        }
        let mut received = MessageBuffer::default();
        received.push(whole);
        assert_eq!(received.take_message(100), Ok(Some(message)));
    }

    #[test]
    fn a_message_that_is_too_large_is_refused_once_its_prefix_is_read() {
        let refusal = find_message(&framed(0, b"message")[..5], 6).unwrap_err();
        assert_eq!(refusal.code, Code::ResourceExhausted);
        assert_eq!(refusal.message, "grpc: received message larger than max (7 vs. 6)");
        assert_eq!(find_message(&framed(1, b"x"), 100).unwrap_err().code, Code::Internal);
    }

    #[test]
    fn error_texts_are_encoded_for_a_header() {
        assert_eq!(percent_encode("etcdserver: no leader"), "etcdserver: no leader");
        assert_eq!(percent_encode("50% \u{e9}\n"), "50%25 %C3%A9%0A");
    }
}
