//! Header compression (RFC 7541).
//!
//! A header block is a list of fields. Each is an index into a table of fields, or a literal that may be added to the table. The
//! first 61 entries of the table are static; the others were added by the sender, newest first, within a size that the receiver
//! allows.
//!
//! The decoder has to understand everything ([`decoder`]). The encoder may be simple ([`encoder`]): it adds only the two fields
//! that occur in every gRPC response, and writes all others as literals or static indexes.

pub mod decoder;
pub mod encoder;
pub mod huffman;
mod integer;
pub mod table;

pub use decoder::Decoder;
pub use encoder::Encoder;
