//! Who answers on the connections that are tried: a method for each way in which one can.

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
use metastore::{
    call::{Answer, Call, Code, Conversation, Line, Metadata, Refusal, Reply, Step},
    http2::{
        guest::RequestBody,
        service::{Method, Response, ResponseBody, Service, Shape},
    },
};
use parking_lot::Mutex;

/// What the service has seen.
#[derive(Default)]
pub struct Seen {
    /// Replies that wait for somebody to use them.
    pub replies: Mutex<Vec<(Bytes, Reply)>>,
    /// Calls that have begun.
    pub started: AtomicUsize,
    /// Calls that were counted as ended.
    pub ended: AtomicUsize,
    /// Conversations that exist.
    pub talks: AtomicUsize,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Answers with the request, at once.
    Echo,
    /// Keeps the reply.
    Later,
    Refuse,
    /// Answers every message with itself.
    Chat,
    /// Answers every message with a thousand bytes for each of its bytes.
    Pour,
}

/// The service. What it does not know is mirrored by a guest.
pub struct Server(pub Arc<Seen>);

impl Service for Server {
    fn find(&self, path: &str) -> Option<Arc<dyn Method>> {
        let way = match path {
            "/t/Echo" => Way::Echo,
            "/t/Later" => Way::Later,
            "/t/Refuse" => Way::Refuse,
            "/t/Chat" => Way::Chat,
            "/t/Pour" => Way::Pour,
            _ => return None,
        };
        Some(Arc::new(Known(way, self.0.clone())))
    }

    fn refuse(&self, _: &str) -> Option<Refusal> {
        None
    }

    fn run_elsewhere(&self, job: Box<dyn FnOnce() + Send>) {
        job();
    }

    fn guest(&self, request: Request<RequestBody>) -> Response {
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

struct Known(Way, Arc<Seen>);

impl Method for Known {
    fn shape(&self) -> Shape {
        match self.0 {
            Way::Echo | Way::Later | Way::Refuse => Shape::Unary,
            Way::Chat | Way::Pour => Shape::Stream,
        }
    }

    fn is_unary(&self) -> bool {
        self.shape() == Shape::Unary
    }

    fn call(&self, call: Call, reply: Reply) {
        let message = call.message;
        match self.0 {
            Way::Later => {
                // A copy: what a read keeps alive is counted, and depends on how it was cut.
                self.1.replies.lock().push((Bytes::copy_from_slice(&message), reply));
            }
            Way::Refuse => reply.answer(Err(Refusal { code: Code::NotFound, message: "no\u{e4}".into() })),
            Way::Echo | Way::Chat | Way::Pour => reply.run(move |reply| reply.answer(Ok(message))),
        }
    }

    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, Refusal> {
        if metadata.require_leader {
            return Err(Refusal { code: Code::Unavailable, message: "nobody leads".into() });
        }
        self.1.talks.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Talk { pours: self.0 == Way::Pour, left: 0, seen: self.1.clone() }))
    }

    fn started(&self) {
        self.1.started.fetch_add(1, Ordering::Relaxed);
    }

    fn received(&self, _: usize) {}

    fn sent(&self, _: usize) {}

    fn handled(&self, _: Code) {
        self.1.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn answered(&self, _: Duration, _: usize, _: &Answer) {
        self.1.ended.fetch_add(1, Ordering::Relaxed);
    }
}

struct Talk {
    pours: bool,
    left: usize,
    seen: Arc<Seen>,
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.seen.talks.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Conversation for Talk {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        while line.has_room() {
            if self.left > 0 {
                let next = self.left.min(1000);
                self.left -= next;
                line.send(vec![b'.'; next].into());
                continue;
            }
            match line.receive() {
                Some(message) if self.pours => self.left = message.len() * 1000,
                Some(message) => line.send(message),
                None if line.ended() => return Step::End(Ok(())),
                None => return Step::Wait,
            }
        }
        Step::Wait
    }
}
