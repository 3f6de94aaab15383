//! The interface between connections and what handles their requests: a path leads to a registered method, or to an HTTP service.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body::Body;

use super::request_body::{BoxError, RequestBody};
use crate::call::{Call, CallError, CallResult, Code, Conversation, MAX_METADATA_FIELDS, Metadata, Reply};

/// How a method exchanges messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One request message and one response, which is sent through a reply.
    Unary,
    /// A conversation, whatever the client sees.
    Stream,
}

/// A registered method, and its metrics.
pub trait Method: Send + Sync {
    fn shape(&self) -> Shape;
    /// Whether the call is unary for the client, whatever its shape is here.
    fn is_unary(&self) -> bool;
    /// Handles one message. Only for [`Shape::Unary`].
    fn call(&self, call: Call, reply: Reply);
    /// Starts a conversation. Only for [`Shape::Stream`].
    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError>;
    /// Metrics: a call has started.
    fn started(&self);
    /// Metrics: the client has sent a message.
    fn received(&self, bytes: usize);
    /// Metrics: a message was sent to the client.
    fn sent(&self, bytes: usize);
    /// Metrics: a call has ended.
    fn handled(&self, code: Code);
    /// Metrics: a unary call has ended with this answer, `spent` after its message of `request_bytes` arrived. Counts the sent
    /// message, too.
    fn answered(&self, spent: Duration, request_bytes: usize, answer: &CallResult);
}

/// The body of an HTTP response.
pub type ResponseBody = Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>;
/// The future of an HTTP response.
pub type Response = Pin<Box<dyn Future<Output = http::Response<ResponseBody>> + Send>>;

/// Everything that can be requested on a connection.
pub trait Service: Send + Sync {
    /// The names of the header fields that methods are told of, in lower case.
    fn metadata_fields(&self) -> &'static [&'static str; MAX_METADATA_FIELDS] {
        &[""; MAX_METADATA_FIELDS]
    }
    /// The method that is registered for a path.
    fn find(&self, path: &str) -> Option<Arc<dyn Method>>;
    /// Why a gRPC call for a path without a method is refused; `None` if the HTTP service handles such calls.
    fn refuse(&self, path: &str) -> Option<CallError>;
    /// Runs a job that would block a connection on a thread that no connection uses.
    fn run_blocking(&self, job: Box<dyn FnOnce() + Send>);
    /// Handles a request whose path names no method.
    fn handle_http(&self, request: http::Request<RequestBody>) -> Response;
}
