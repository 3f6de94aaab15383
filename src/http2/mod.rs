//! HTTP/2 and gRPC framing for clients, optimised for many small calls.
//!
//! In a general HTTP stack most of the cost of a small call is overhead: a task, a body, header maps, a wake-up and a write for
//! each call. Here each connection is one task. It reads what has arrived, parses all of it, dispatches the calls of one read
//! together, and writes all responses at once.
//!
//! This layer knows no message types, only paths, bytes, replies and conversations. [`service`] is the interface that it is
//! given; requests for paths without a method are answered by an ordinary HTTP service.
//!
//! | module | |
//! | --- | --- |
//! | [`frame`] | frames, parsed one at a time without connection state |
//! | [`hpack`] | header compression and decompression |
//! | [`request`] | requests, read from header blocks |
//! | [`message`] | gRPC framing, compression and escaping |
//! | [`connection`] | one connection as a value: bytes in, bytes out |
//! | [`sender`], [`output`] | outgoing frames, within flow control |
//! | [`intake`] | receive windows |
//! | [`reads`] | read buffers that may still be referenced |
//! | [`streams`], [`past`] | open streams, and recently closed ones |
//! | [`talk`], [`guest`] | handlers of streaming calls and of plain HTTP requests |
//! | [`outbox`] | responses that other threads hand to a connection |
//! | [`task`] | the task that owns a connection and its socket |
//! | [`lobby`] | the registry of connections, and their shutdown |
//! | [`limits`] | limits per client |

pub mod connection;
pub mod fault;
pub mod frame;
pub mod guest;
pub mod hpack;
pub mod intake;
pub mod limits;
pub mod lobby;
pub mod message;
pub mod outbox;
pub mod output;
pub mod past;
pub mod reads;
pub mod request;
pub mod sender;
pub mod service;
pub mod streams;
pub mod talk;
pub mod task;
