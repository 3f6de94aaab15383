//! The service behind the connections under test: one method per behavior.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use http2::{
    call::{Call, CallError, CallResult, Code, Conversation, MAX_METADATA_FIELDS, Metadata, Reply, Step, StreamIo},
    request_body::RequestBody,
    service::{Method, Response, ResponseBody, Service, Shape},
};
use parking_lot::Mutex;

/// The state of the service.
#[derive(Default)]
pub struct ServiceState {
    /// Requests that have not been answered, with their replies.
    pub replies: Mutex<Vec<(Bytes, Reply)>>,
    /// Calls that were counted as started.
    pub started: AtomicUsize,
    /// Calls that were counted as ended.
    pub ended: AtomicUsize,
    /// Conversations that currently exist.
    pub conversations: AtomicUsize,
}

#[derive(Clone, Copy, PartialEq)]
enum Behavior {
    /// Answers with the request, at once.
    Echo,
    /// Keeps the reply for later.
    Later,
    Refuse,
    /// A stream: answers every message with itself.
    Chat,
    /// A stream: answers every message with a thousand bytes for each of its bytes.
    Pour,
}

/// The service. Requests for other paths are ordinary HTTP requests, answered with their own headers and body.
pub struct Server(pub Arc<ServiceState>);

impl Service for Server {
    fn metadata_fields(&self) -> &'static [&'static str; MAX_METADATA_FIELDS] {
        &["hasleader", "token", "authorization", "client-api-version"]
    }

    fn find(&self, path: &str) -> Option<Arc<dyn Method>> {
        let behavior = match path {
            "/t/Echo" => Behavior::Echo,
            "/t/Later" => Behavior::Later,
            "/t/Refuse" => Behavior::Refuse,
            "/t/Chat" => Behavior::Chat,
            "/t/Pour" => Behavior::Pour,
            _ => return None,
        };
        Some(Arc::new(TestMethod(behavior, self.0.clone())))
    }

    fn refuse(&self, _: &str) -> Option<CallError> {
        None
    }

    fn run_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        job();
    }

    fn handle_http(&self, request: Request<RequestBody>) -> Response {
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let trailers = parts.headers.clone();
            let body: ResponseBody = Box::pin(body.with_trailers(async move { Some(Ok(trailers)) }));
            let mut response = http::Response::new(body);
            *response.headers_mut() = parts.headers;
            response
        })
    }
}

struct TestMethod(Behavior, Arc<ServiceState>);

impl Method for TestMethod {
    fn shape(&self) -> Shape {
        match self.0 {
            Behavior::Echo | Behavior::Later | Behavior::Refuse => Shape::Unary,
            Behavior::Chat | Behavior::Pour => Shape::Stream,
        }
    }

    fn is_unary(&self) -> bool {
        self.shape() == Shape::Unary
    }

    fn call(&self, call: Call, reply: Reply) {
        let message = call.message;
        match self.0 {
            Behavior::Later => {
                // A copy: the buffer of a read is counted while referenced, and its size depends on how the input was split.
                self.1.replies.lock().push((Bytes::copy_from_slice(&message), reply));
            }
            Behavior::Refuse => reply.answer(Err(CallError { code: Code::NotFound, message: "no\u{e4}".into() })),
            Behavior::Echo | Behavior::Chat | Behavior::Pour => reply.run(move |reply| reply.answer(Ok(message))),
        }
    }

    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        if metadata.fields[0].is_some() {
            return Err(CallError { code: Code::Unavailable, message: "no leader".into() });
        }
        self.1.conversations.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(TestConversation { amplifies: self.0 == Behavior::Pour, pending: 0, state: self.1.clone() }))
    }

    fn started(&self) {
        self.1.started.fetch_add(1, Ordering::Relaxed);
    }

    fn received(&self, _: usize) {}

    fn sent(&self, _: usize) {}

    fn handled(&self, _: Code) {
        self.1.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn answered(&self, _: Duration, _: usize, _: &CallResult) {
        self.1.ended.fetch_add(1, Ordering::Relaxed);
    }
}

struct TestConversation {
    amplifies: bool,
    pending: usize,
    state: Arc<ServiceState>,
}

impl Drop for TestConversation {
    fn drop(&mut self) {
        self.state.conversations.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Conversation for TestConversation {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        while line.can_send() {
            if self.pending > 0 {
                let next = self.pending.min(1000);
                self.pending -= next;
                line.send(vec![b'.'; next].into());
                continue;
            }
            match line.receive() {
                Some(message) if self.amplifies => self.pending = message.len() * 1000,
                Some(message) => line.send(message),
                None if line.is_half_closed() => return Step::End(Ok(())),
                None => return Step::Wait,
            }
        }
        Step::Wait
    }
}
