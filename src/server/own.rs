//! The method table and the HTTP routes, as a [`Service`] for the HTTP/2 server of this crate.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http_body_util::BodyExt;
use tower::ServiceExt;

use super::routes::REFLECTION;
use crate::{
    api::{
        Table,
        pool::Pool,
        table::{self, Handler},
    },
    call::{Call, CallError, CallResult, Code, Conversation, Metadata, Reply},
    http2::{
        http_handler::RequestBody,
        service::{Method, Response, ResponseBody, Service, Shape},
    },
};

/// Finds the method for a path, and serves all other requests with the router.
pub struct Http2Service {
    methods: HashMap<&'static str, Arc<dyn Method>>,
    router: axum::Router,
    pool: Pool,
}

impl Http2Service {
    pub fn new(table: &Arc<Table>, router: axum::Router) -> Self {
        let with_handler = |(path, method): (&'static str, &Arc<table::Method>)| {
            let handler: Arc<dyn Method> = Arc::new(MethodHandler { table: table.clone(), method: method.clone() });
            (path, handler)
        };
        Self { methods: table.methods().map(with_handler).collect(), router, pool: table.api().pool.clone() }
    }
}

impl Service for Http2Service {
    fn find(&self, path: &str) -> Option<Arc<dyn Method>> {
        self.methods.get(path).cloned()
    }

    fn refuse(&self, path: &str) -> Option<CallError> {
        (path != REFLECTION).then(|| table::refuse_unknown(path))
    }

    fn run_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        self.pool.run(job);
    }

    fn handle_http(&self, request: http::Request<RequestBody>) -> Response {
        let answer = self.router.clone().oneshot(request.map(axum::body::Body::new));
        Box::pin(async move {
            let Ok(response) = answer.await;
            response.map(|body| -> ResponseBody { Box::pin(body.map_err(Into::into)) })
        })
    }
}

/// A method of the table, with the table itself.
struct MethodHandler {
    table: Arc<Table>,
    method: Arc<table::Method>,
}

impl Method for MethodHandler {
    fn shape(&self) -> Shape {
        match self.method.handler {
            Handler::Unary(_) => Shape::Unary,
            Handler::Patient(_) | Handler::ServerStream(_) | Handler::Bidirectional(_) => Shape::Stream,
        }
    }

    fn is_unary(&self) -> bool {
        self.method.handler.is_unary()
    }

    fn call(&self, call: Call, reply: Reply) {
        let Handler::Unary(handler) = self.method.handler else { return };
        match self.table.admit(&self.method, &call.metadata, Some(&call.message)) {
            Ok(()) => handler(self.table.api(), call, reply),
            Err(refusal) => reply.answer(Err(refusal)),
        }
    }

    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        self.table.admit(&self.method, &metadata, None)?;
        match self.method.handler {
            Handler::Patient(open) | Handler::ServerStream(open) | Handler::Bidirectional(open) => {
                Ok(self.method.open(self.table.api(), open, metadata))
            }
            Handler::Unary(_) => {
                Err(CallError { code: Code::Internal, message: "a unary call is not a stream".into() })
            }
        }
    }

    fn started(&self) {
        self.method.started();
    }

    fn received(&self, bytes: usize) {
        self.method.received(bytes);
    }

    fn sent(&self, bytes: usize) {
        self.method.sent(bytes);
    }

    fn handled(&self, code: Code) {
        self.method.handled(code);
    }

    fn answered(&self, spent: Duration, request_bytes: usize, answer: &CallResult) {
        self.table.api().slow.note_call(&self.method, spent, request_bytes, answer);
        match answer {
            Ok(message) => {
                self.method.sent(message.len());
                self.method.handled(Code::Ok);
            }
            Err(refusal) => self.method.handled(refusal.code),
        }
    }
}
