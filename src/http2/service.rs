//! Who answers, as this floor sees it: a path leads to a method, or to a guest.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body::Body;

use super::guest::RequestBody;
use crate::call::{Answer, Call, Code, Conversation, Metadata, Refusal, Reply};

/// How many messages a method takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One message, one answer, which comes through a reply.
    Unary,
    /// A conversation, whatever it looks like from outside.
    Stream,
}

/// A method of the table: who answers, and who counts.
pub trait Method: Send + Sync {
    /// How many messages it takes.
    fn shape(&self) -> Shape;
    /// Whether a call looks like one message and one answer to the client, whatever its shape is here.
    fn is_unary(&self) -> bool;
    /// Answers one message. Only for [`Shape::Unary`].
    fn call(&self, call: Call, reply: Reply);
    /// Begins a conversation. Only for [`Shape::Stream`].
    fn open(&self, metadata: Metadata) -> Result<Box<dyn Conversation>, Refusal>;
    /// A call began.
    fn started(&self);
    /// The client sent a message.
    fn received(&self, bytes: usize);
    /// The client was sent a message.
    fn sent(&self, bytes: usize);
    /// A call ended.
    fn handled(&self, code: Code);
    /// A unary call ended with this answer, so long after its message of so many bytes had come. Counts what was sent, too.
    fn answered(&self, spent: Duration, request_bytes: usize, answer: &Answer);
}

/// Something that can go wrong in a body that is not ours.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// The body of a guest's answer.
pub type ResponseBody = Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>;
/// A guest's answer, when it comes.
pub type Response = Pin<Box<dyn Future<Output = http::Response<ResponseBody>> + Send>>;

/// Everything that can be asked for on a connection.
pub trait Service: Send + Sync {
    /// The method at a path, if the table holds it.
    fn find(&self, path: &str) -> Option<Arc<dyn Method>>;
    /// Why a call for a path that the table does not hold is refused; None if a guest answers such calls.
    fn refuse(&self, path: &str) -> Option<Refusal>;
    /// Runs something that would hold up a connection, on a thread that no connection needs.
    fn run_elsewhere(&self, job: Box<dyn FnOnce() + Send>);
    /// Answers what the table does not hold: an ordinary request with ordinary bodies.
    fn guest(&self, request: http::Request<RequestBody>) -> Response;
}
