//! HTTP/2 and gRPC framing for clients, optimised for many small calls.
//!
//! In a general HTTP stack most of the cost of a small call is overhead: a task, a body, header maps, a wake-up and a write for
//! each call. Here each connection is one task. It reads what has arrived, parses all of it, dispatches the calls of one read
//! together, and writes all responses at once.
//!
//! This crate knows no message types, only paths, bytes, replies and conversations. [`service`] is the interface that it is
//! given; requests for paths without a method are answered by an ordinary HTTP service.
//!
//! | module | |
//! | --- | --- |
//! | [`call`] | calls, replies and conversations, as handlers see them |
//! | [`frame`] | frames, parsed one at a time without connection state |
//! | [`hpack`] | header compression and decompression |
//! | [`request`] | requests, read from header blocks |
//! | [`message`] | gRPC framing, compression and escaping |
//! | [`connection`] | one connection as a value: bytes in, bytes out |
//! | [`sender`], [`output`] | outgoing frames, within flow control |
//! | [`recv_window`] | receive windows |
//! | [`reads`] | read buffers that may still be referenced |
//! | [`streams`], [`closed_streams`] | open streams, and recently closed ones |
//! | [`handler`], [`stream_handler`], [`http_handler`], [`request_body`] | handlers of streaming calls and of plain HTTP requests |
//! | [`outbox`] | responses that other threads hand to a connection |
//! | [`task`] | the task that owns a connection and its socket |
//! | [`registry`] | the registry of connections, and their shutdown |
//! | [`limits`], [`ledger`] | limits per client; the account of all bytes that are held for clients |
//! | [`metrics`] | what is counted |

/// For the service of the tests, which is compiled into the fuzz targets, too.
#[cfg(test)]
extern crate self as http2;

pub mod call;
pub mod closed_streams;
pub mod connection;
pub mod fault;
pub mod frame;
pub mod handler;
pub mod hpack;
pub mod http_handler;
pub mod ledger;
pub mod limits;
pub mod message;
pub mod metrics;
pub mod outbox;
pub mod output;
pub mod reads;
pub mod recv_window;
pub mod registry;
pub mod request;
pub mod request_body;
pub mod sender;
pub mod service;
pub mod stream_handler;
pub mod streams;
pub mod task;
