//! Persistent state: a few ordered tables of bytes, written one atomic [`Batch`] at a time.
//!
//! The write-ahead log of the database is disabled, because the raft log serves that purpose. So a write is visible
//! immediately, but durable only after a flush, and after a crash the database holds *some* earlier batch and everything before
//! it, never a part of a batch. Each batch contains the applied index, which tells the replay where to start.
//!
//! INVARIANTS
//! * A batch is atomic across tables, and what survives a crash is a prefix of the batches.
//! * Callers must never write the same key of the history table twice: records are immutable.

pub mod memory;
pub mod rocks;
pub mod schema;

use std::{ops::ControlFlow, path::Path, sync::Arc};

use bytes::Bytes;

use crate::error::Halt;
pub use schema::Table;

/// Writes that are applied atomically.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// All keys, concatenated: one allocation per batch instead of one per key.
    keys: Vec<u8>,
    ops: Vec<Op>,
}

#[derive(Debug, Clone)]
struct Op {
    table: Table,
    key_end: usize,
    change: WriteOp,
}

/// What a write does to its key.
#[derive(Debug, Clone)]
pub enum WriteOp {
    /// Sets the value. It is not copied: the same bytes are shared with watchers and the value cache.
    Put(Bytes),
    Remove,
    /// Removes all keys from this write's key (inclusive) to this one (exclusive).
    RemoveRange(Bytes),
}

impl Batch {
    pub fn put(&mut self, table: Table, key: &[u8], value: impl Into<Bytes>) {
        self.push(table, key, WriteOp::Put(value.into()));
    }

    pub fn delete(&mut self, table: Table, key: &[u8]) {
        self.push(table, key, WriteOp::Remove);
    }

    /// Removes all keys with `from <= key < to`. This makes every later read of the table slightly slower until the database
    /// has rewritten its files, so use it only for many keys at once.
    pub fn delete_range(&mut self, table: Table, from: &[u8], to: impl Into<Bytes>) {
        self.push(table, from, WriteOp::RemoveRange(to.into()));
    }

    fn push(&mut self, table: Table, key: &[u8], change: WriteOp) {
        self.keys.extend_from_slice(key);
        self.ops.push(Op { table, key_end: self.keys.len(), change });
    }

    /// All writes, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Table, &[u8], &WriteOp)> {
        let mut start = 0;
        self.ops.iter().map(move |op| {
            let key = &self.keys[start..op.key_end];
            start = op.key_end;
            (op.table, key, &op.change)
        })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Removes all writes but keeps the allocated memory.
    pub fn clear(&mut self) {
        self.keys.clear();
        self.ops.clear();
    }
}

/// Disk and memory usage.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Live table files and memtables.
    pub total_bytes: u64,
    /// The part of `total_bytes` that holds live data.
    pub in_use_bytes: u64,
    /// Memory of the memtables, which are not flushed yet.
    pub memtable_bytes: u64,
    /// Memory of cached blocks.
    pub block_cache_bytes: u64,
}

/// What the database knows of one of its column families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableUsage {
    pub name: &'static str,
    pub file_bytes: u64,
    pub memtable_bytes: u64,
    /// An estimate.
    pub keys: u64,
    /// An estimate of the bytes that compactions have yet to rewrite.
    pub pending_compaction_bytes: u64,
}

/// There is not enough disk space to defragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "defragmenting rewrites what is in use: it needs up to {needed_bytes} bytes of free disk space, and {free_bytes} are free"
)]
pub struct InsufficientSpace {
    pub needed_bytes: u64,
    pub free_bytes: u64,
}

/// An ordered key-value store. [`rocks::Rocks`] is the real one; [`memory::Memory`] is for tests and the simulation.
pub trait Engine: Send + Sync + 'static {
    /// Writes a batch: it is visible when this returns, and durable after the next flush.
    fn write(&self, batch: &Batch) -> Result<(), Halt>;

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt>;

    /// Reads many values of one table; `keys` must ascend. If `is_scan`, the blocks that are read do not fill the block cache, so
    /// that blocks used by other requests stay in it.
    fn get_many(&self, table: Table, keys: &[&[u8]], is_scan: bool) -> Result<Vec<Option<Bytes>>, Halt>;

    /// Visits the pairs with `from <= key < to` in ascending order, from a consistent snapshot, until `visit` breaks. An empty
    /// `to` means the end of the table.
    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt>;

    /// The value as a crash right now would leave it.
    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt>;

    /// Makes everything written so far durable.
    fn flush(&self) -> Result<(), Halt>;

    /// Flushes, and opens a consistent copy of the database in `path`, which must not exist yet.
    fn copy_to(&self, path: &Path) -> Result<Arc<dyn Engine>, Halt>;

    /// Marks a database that was replaced by another: its files are deleted when the last reference is dropped.
    fn delete_on_drop(&self) {}

    /// Whether the disk space of removed data is reclaimed as soon as the removal is flushed, or only once enough files have
    /// accumulated.
    fn set_eager_compaction(&self, _tidy: bool) -> Result<(), Halt> {
        Ok(())
    }

    /// Rewrites all files so that removed data takes no disk space, unless there is too little free space to do so.
    fn defragment(&self) -> Result<Option<InsufficientSpace>, Halt>;

    fn size(&self) -> Result<Size, Halt>;

    /// The column families; none for an engine that has no files.
    fn tables(&self) -> Result<Vec<TableUsage>, Halt> {
        Ok(Vec::new())
    }
}

/// Called by a scan with each key and value.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;
