//! The file format of bbolt, the embedded database of etcd: a reader that trusts nothing, and a writer that streams.
//!
//! This crate knows nothing of etcd, only buckets, keys and values. It maps no files, locks none, and changes none in place.
//!
//! | module | |
//! | --- | --- |
//! | [`format`](mod@format) | the bytes of page headers and meta pages, and limits |
//! | [`error`] | what can be wrong with a file, or with what is to be written |
//! | [`reader`] | a database that is read, and its buckets |
//! | [`cursor`] | the entries of a bucket, in order or from a key on |
//! | [`check`], [`page_set`] | the check of a whole file |
//! | [`file`](mod@file), [`node`], [`source`] | below the buckets: the meta page that counts, and single nodes |
//! | [`writer`] | a database that is written, in one pass or two |
//! | [`tree`] | the tree of a bucket that is written: when a page is full |
//!
//! # The format
//!
//! A file is a sequence of pages of equal size, a power of two, usually 4096. All integers are little-endian, except inside keys and
//! values, which are bytes.
//!
//! ```text
//!  page 0     1     2          3 …
//!  ┌──────┬──────┬──────────┬──────┬────────┬ ─ ─ ─ ─ ─ ─ ─ ─ ─ ┬──────┐
//!  │ meta │ meta │ freelist │ leaf │ branch │ leaf with overflow │ leaf │   anything but the meta pages may be anywhere
//!  └──────┴──────┴──────────┴──────┴────────┴ ─ ─ ─ ─ ─ ─ ─ ─ ─ ┴──────┘
//! ```
//!
//! **Pages.** Each begins with a header of 16 bytes: its own number (u64), its kind (u16: 1 branch, 2 leaf, 4 meta, 16 freelist), a
//! count (u16) and the number of further pages that it extends over (u32, the *overflow*). Pages that others extend over have no
//! header. A branch or a leaf with its overflow is a *node*.
//!
//! **Meta pages.** After the header: magic number, version 2, page size, flags (u32 each); root page and sequence of the root bucket;
//! the page of the freelist; the number of pages in use, called the high-water mark; the number of the transaction that wrote it (u64
//! each); and the FNV-1a checksum of these 56 bytes. A transaction writes all its pages to unused places, then the meta page with
//! the older number. So one of the two is always valid, and the valid one with the higher number counts. *Nothing else has a
//! checksum*: a changed byte in a value is noticed by no reader of this format.
//!
//! **Nodes.** The header is followed by a table of elements, 16 bytes each, then by their keys and values, in the same order:
//!
//! ```text
//!  leaf element     flags u32 (1: the value is a bucket) · position u32 · length of key u32 · length of value u32
//!  branch element   position u32 · length of key u32 · child page u64
//! ```
//!
//! A position counts from the beginning of the element itself. Keys ascend strictly. All keys below an element of a branch are at
//! least that element's key and less than the next one's; the leaves are all entries, in order.
//!
//! **Buckets** are entries of other buckets. The value is the number of the root page and a sequence (u64 each). Root page 0 means
//! that the bucket is *inline*: its only page, a leaf, follows in the value. bbolt does that with buckets of up to a
//! quarter of a page. The root bucket, to which the meta page points, holds nothing but buckets.
//!
//! **The freelist** names the pages below the high-water mark that are unused: sorted u64, as many as the header's count says; if that
//! is 65535 the first number is the count. A meta page may say `0xffffffffffffffff` instead: the freelist was not stored, and
//! what no bucket reaches is free.
//!
//! # Reading
//!
//! [`Database`] takes no number in a file on trust. A node is validated once, when it is loaded: kind, own number, extent,
//! each element's position and lengths, order of keys, and that they are within what the parent announced. Memory is limited
//! to the nodes from the root to a leaf, and those to [`Options::max_held_bytes`]. Work is limited, too: pages may
//! overlap or form circles in a hostile file, so one pass over a bucket loads at most as many pages as the file has. Buckets may still
//! refer to each other; a caller that follows all of them should call [`check`](Database::check) first, which refuses pages that are
//! used twice.
//!
//! # Writing
//!
//! Entries arrive in order, bucket after bucket, and pages leave in order, so memory is limited to the open pages of each level.
//! But the first page names the root, which is known last, and the recipient may want to know the size first. Both follow
//! from the *lengths* of keys and values alone. So there are two passes over the same data: [`Measure`] takes lengths,
//! does the same as a writer but for the bytes, and gives a [`Layout`]; [`Writer`] takes bytes, and
//! fails if they do not come to that layout. The first pass copies nothing, and costs nanoseconds per entry beside the iteration.
//! Where the output can be changed afterwards, as a file can, one pass does: [`Writer::unmeasured`].
//!
//! What else was considered: a root at a fixed place needs an upper bound of the size, filled up with free pages, and such a bound is
//! twice the size for unfavourable lengths; a temporary file is as large as the data.
//!
//! What is written is meant to be used by bbolt, not only read:
//!
//! * Pages are filled to the last byte but one, because bbolt splits a node as soon as it is as large as a page.
//! * Up to four entries share a leaf of several pages where that fills its pages better, because bbolt leaves such leaves alone. With
//!   entries a little larger than a page, it saves a third of the file. An entry of more than 64 KiB is alone, and not copied.
//! * A branch has two children at least. With one child it would pass bbolt's check, but when that child becomes small, bbolt looks
//!   for its sibling and panics.
//! * Small buckets are inline, as bbolt would write them.
//! * An empty freelist is stored, so bbolt need not search the whole file for unused pages when it opens it.
//! * Both meta pages have the same root.

mod check;
mod cursor;
mod error;
mod file;
mod format;
mod node;
mod page_set;
mod reader;
mod source;
mod tree;
mod writer;

pub use check::Report;
pub use cursor::{Cursor, Entry, Value};
pub use error::{Place, ReadError, WriteError};
pub use file::Options;
pub use format::{DEFAULT_PAGE_SIZE, MAX_DEPTH, MAX_KEY_LENGTH, MAX_VALUE_LENGTH, PAGE_SIZES};
pub use reader::{Bucket, Database};
pub use source::Source;
pub use writer::{Layout, Measure, Writer};
