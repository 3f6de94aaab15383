//! The service behind the connections under test: one method per behavior. The fuzz targets (`tests/fuzz`) use it, too.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http2::{
    call::{Call, CallError, CallResult, Code, Conversation, MAX_METADATA_FIELDS, Metadata, Reply, Step, StreamIo},
    request_body::RequestBody,
    service::{Method, Response, Service, Shape},
};
use parking_lot::Mutex;

/// What the service has seen.
#[derive(Default)]
pub struct Seen {
    /// Requests that have not been answered, with their replies.
    pub replies: Mutex<Vec<(Bytes, Reply)>>,
    /// Calls that were counted as started.
    pub started: AtomicUsize,
    /// The codes of the calls that were counted as ended.
    pub handled: Mutex<Vec<Code>>,
    /// Conversations that currently exist.
    pub conversations: AtomicUsize,
    /// The metadata of unary calls, if [`TestService::keeps_what_it_gets`].
    pub metadata: Mutex<Vec<Metadata>>,
    /// Jobs for another thread, if [`TestService::keeps_what_it_gets`].
    pub jobs: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

pub struct TestService {
    pub seen: Arc<Seen>,
    /// Answers ordinary HTTP requests, which are those for other paths.
    pub handle_http: fn(Request<RequestBody>) -> Response,
    /// Whether it keeps metadata, jobs, and requests in the buffers that they came in. Otherwise jobs are run at once, and
    /// requests are copied, so that the memory in use does not depend on how the input was split.
    pub keeps_what_it_gets: bool,
}

impl Service for TestService {
    fn metadata_fields(&self) -> &'static [&'static str; MAX_METADATA_FIELDS] {
        &["hasleader", "version", "token", "authorization"]
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
        let (seen, keeps_what_it_gets) = (self.seen.clone(), self.keeps_what_it_gets);
        Some(Arc::new(TestMethod { behavior, seen, keeps_what_it_gets }))
    }

    fn refuse(&self, path: &str) -> Option<CallError> {
        let message = "nothing like that".into();
        path.starts_with("/t/").then_some(CallError { code: Code::Unimplemented, message })
    }

    fn run_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        if self.keeps_what_it_gets {
            self.seen.jobs.lock().push(job);
        } else {
            job();
        }
    }

    fn handle_http(&self, request: Request<RequestBody>) -> Response {
        (self.handle_http)(request)
    }
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
    /// A stream: answers every message with a thousand bytes for each of its bytes, in messages of a thousand bytes, while there
    /// is room.
    Pour,
}

struct TestMethod {
    behavior: Behavior,
    seen: Arc<Seen>,
    keeps_what_it_gets: bool,
}

impl Method for TestMethod {
    fn shape(&self) -> Shape {
        match self.behavior {
            Behavior::Echo | Behavior::Later | Behavior::Refuse => Shape::Unary,
            Behavior::Chat | Behavior::Pour => Shape::Stream,
        }
    }

    fn is_unary(&self) -> bool {
        self.shape() == Shape::Unary
    }

    fn call(&self, call: Call, reply: Reply) {
        if self.keeps_what_it_gets {
            self.seen.metadata.lock().push(call.metadata);
        }
        let copy = Bytes::copy_from_slice(&call.message);
        match self.behavior {
            Behavior::Later => {
                let request = if self.keeps_what_it_gets { call.message } else { copy };
                self.seen.replies.lock().push((request, reply));
            }
            Behavior::Refuse => reply.answer(Err(CallError { code: Code::NotFound, message: "no\u{e4}".into() })),
            // No response keeps the read buffer of its request alive.
            Behavior::Echo | Behavior::Chat | Behavior::Pour => reply.run(move |reply| reply.answer(Ok(copy))),
        }
    }

    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        if metadata.fields[0].is_some() {
            return Err(CallError { code: Code::Unavailable, message: "no leader".into() });
        }
        self.seen.conversations.fetch_add(1, Ordering::Relaxed);
        let amplifies = self.behavior == Behavior::Pour;
        Ok(Box::new(TestConversation { amplifies, pending: 0, seen: self.seen.clone() }))
    }

    fn started(&self) {
        self.seen.started.fetch_add(1, Ordering::Relaxed);
    }

    fn received(&self, _: usize) {}

    fn sent(&self, _: usize) {}

    fn handled(&self, code: Code) {
        self.seen.handled.lock().push(code);
    }

    fn answered(&self, _: Duration, _: usize, answer: &CallResult) {
        self.handled(answer.as_ref().map_or_else(|refusal| refusal.code, |_| Code::Ok));
    }
}

struct TestConversation {
    amplifies: bool,
    pending: usize,
    seen: Arc<Seen>,
}

impl Drop for TestConversation {
    fn drop(&mut self) {
        self.seen.conversations.fetch_sub(1, Ordering::Relaxed);
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
