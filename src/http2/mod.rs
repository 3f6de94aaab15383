//! The front door: HTTP/2 and gRPC's framing, made for many small calls.
//!
//! Most of what a call costs in a general HTTP stack is not the call: a task, a body, maps of headers, a wake-up and a write
//! for each. Here a connection is one task. It reads what has come, parses all of it, hands the calls of one read over
//! together, and writes all answers at once.
//!
//! This floor knows no message of anybody: only paths, bytes, replies and conversations. [`service`] is what it wants to be
//! told; what nobody has told it is answered by a guest, an ordinary HTTP service.
//!
//! | room | |
//! | --- | --- |
//! | [`frame`] | what can be said about a frame by looking at it alone |
//! | [`hpack`] | header compression, both ways |
//! | [`request`] | what a header block asks for |
//! | [`message`] | gRPC's framing, packing and escaping |
//! | [`connection`] | one connection as a value: bytes in, bytes out |
//! | [`sender`], [`output`] | what goes out, as windows allow |
//! | [`intake`] | the windows for what comes in |
//! | [`reads`] | what was read and may still be in use |
//! | [`streams`], [`past`] | those that are open, and those that were |
//! | [`talk`], [`guest`] | who answers a stream |
//! | [`outbox`] | where answers from other threads wait |
//! | [`task`] | the task that owns a connection and its socket |
//! | [`lobby`] | all connections, and how they are asked to leave |
//! | [`limits`] | how much a client may ask of us |

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
