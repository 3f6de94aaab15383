//! Header compression (RFC 7541).
//!
//! A header block is a list of fields. Each is an index into a table of fields, or a literal that may be added to the table. The
//! first 61 entries of the table never change; what follows is what the sender of a connection has added, newest first,
//! within a size that the receiver allows.
//!
//! Reading has to understand everything ([`decoder`]). Writing is free to be simple ([`encoder`]): our answers have two
//! fields that occur in every one of them, only these are added, and what does not occur often is a literal.

pub mod decoder;
pub mod encoder;
pub mod huffman;
mod integer;
pub mod table;

pub use decoder::Decoder;
pub use encoder::Encoder;
