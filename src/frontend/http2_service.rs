//! The method table and the HTTP routes, as a [`Service`] for this project's own server of HTTP/2.

use std::sync::Arc;

use http_body_util::BodyExt;
use tower::ServiceExt;

use super::grpc::{
    METADATA_FIELDS,
    methods::{self, MethodTable, REFLECTION},
};
use crate::node::read_pool::ReadPool;
use http2::{
    call::{CallError, MAX_METADATA_FIELDS},
    request_body::RequestBody,
    service::{Method, Response, ResponseBody, Service},
};

/// Finds the method for a path, and serves all other requests with the router.
pub struct Http2Service {
    /// None: HTTP alone is served.
    methods: Option<Arc<MethodTable>>,
    router: axum::Router,
    read_pool: ReadPool,
}

impl Http2Service {
    #[must_use]
    pub fn new(methods: Option<Arc<MethodTable>>, router: axum::Router, read_pool: ReadPool) -> Self {
        Self { methods, router, read_pool }
    }
}

impl Service for Http2Service {
    fn metadata_fields(&self) -> &'static [&'static str; MAX_METADATA_FIELDS] {
        &METADATA_FIELDS
    }

    fn find(&self, path: &str) -> Option<Arc<dyn Method>> {
        self.methods.as_ref()?.find(path).map(|method| -> Arc<dyn Method> { method })
    }

    fn refuse(&self, path: &str) -> Option<CallError> {
        (self.methods.is_some() && path != REFLECTION).then(|| methods::refuse_unknown(path))
    }

    fn run_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        self.read_pool.run(job);
    }

    fn handle_http(&self, request: http::Request<RequestBody>) -> Response {
        let answer = self.router.clone().oneshot(request.map(axum::body::Body::new));
        Box::pin(async move {
            let Ok(response) = answer.await;
            response.map(|body| -> ResponseBody { Box::pin(body.map_err(Into::into)) })
        })
    }
}
