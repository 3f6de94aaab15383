//! Where the state lies on disk: a few ordered tables of bytes, written one atomic [`Batch`] at a time.
//!
//! The write-ahead log of the database is off: the raft log is the log. So a write is visible at once, durable only after a
//! flush, and after a crash the database holds *some* earlier batch and everything before it, never a part of one. Each
//! batch carries the applied index, which is how the replay knows where to start.
//!
//! INVARIANTS
//! * A batch is atomic across tables, and what survives a crash is a prefix of the batches.
//! * Whoever writes the history table never writes the same key twice: records are immutable.

pub mod memory;
pub mod rocks;
pub mod schema;

use std::{ops::ControlFlow, path::Path, sync::Arc};

use bytes::Bytes;

use crate::error::Halt;
pub use schema::Table;

/// The writes of one step, applied together or not at all.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// All keys, back to back: one allocation for the batch instead of one per key.
    keys: Vec<u8>,
    ops: Vec<Op>,
}

#[derive(Debug, Clone)]
struct Op {
    table: Table,
    key_end: usize,
    change: Change,
}

/// What a write does at its key.
#[derive(Debug, Clone)]
pub enum Change {
    /// Sets the value, which is shared, not copied: the same bytes go to watchers and to the value cache.
    Put(Bytes),
    /// Removes the key.
    Remove,
    /// Removes everything from the key up to this one, which stays.
    RemoveTo(Bytes),
}

impl Batch {
    /// Sets `key` to `value`.
    pub fn put(&mut self, table: Table, key: &[u8], value: impl Into<Bytes>) {
        self.push(table, key, Change::Put(value.into()));
    }

    /// Removes `key`.
    pub fn delete(&mut self, table: Table, key: &[u8]) {
        self.push(table, key, Change::Remove);
    }

    /// Removes everything with `from <= key < to`. Every later read of the table pays for it a little, until the database has
    /// rewritten its files: this is for many keys at once.
    pub fn delete_range(&mut self, table: Table, from: &[u8], to: impl Into<Bytes>) {
        self.push(table, from, Change::RemoveTo(to.into()));
    }

    fn push(&mut self, table: Table, key: &[u8], change: Change) {
        self.keys.extend_from_slice(key);
        self.ops.push(Op { table, key_end: self.keys.len(), change });
    }

    /// Every write, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Table, &[u8], &Change)> {
        let mut start = 0;
        self.ops.iter().map(move |op| {
            let key = &self.keys[start..op.key_end];
            start = op.key_end;
            (op.table, key, &op.change)
        })
    }

    /// How many writes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Forgets all writes, keeping the room for the next ones.
    pub fn clear(&mut self) {
        self.keys.clear();
        self.ops.clear();
    }
}

/// How much room the data takes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// All live table files and memtables.
    pub total_bytes: u64,
    /// The part of them that holds data which has not been removed.
    pub in_use_bytes: u64,
    /// Memory for what is not in a file yet.
    pub memtable_bytes: u64,
    /// Memory for blocks of files.
    pub block_cache_bytes: u64,
}

/// Room on the disk that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "defragmenting rewrites what is in use: it needs up to {needed_bytes} bytes of free disk space, and {free_bytes} are free"
)]
pub struct Lack {
    /// So much is needed for a while.
    pub needed_bytes: u64,
    /// So much there is.
    pub free_bytes: u64,
}

/// An ordered store of bytes. [`rocks::Rocks`] is the real one; [`memory::Memory`] serves tests and the simulation.
pub trait Engine: Send + Sync + 'static {
    /// Applies a batch: all of it is visible when this returns, and durable after the next flush.
    fn write(&self, batch: &Batch) -> Result<(), Halt>;

    /// One value.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt>;

    /// Many values of one table; `keys` ascend. A scan does not come back for the blocks in between: what others use stays
    /// in memory.
    fn get_many(&self, table: Table, keys: &[&[u8]], is_scan: bool) -> Result<Vec<Option<Bytes>>, Halt>;

    /// Visits the pairs with `from <= key < to` in ascending order, as of one moment, until told to stop. An empty `to` is
    /// the end of the table.
    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt>;

    /// What a crash right now would leave of this value.
    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt>;

    /// Makes everything written so far durable.
    fn flush(&self) -> Result<(), Halt>;

    /// Flushes, and opens a copy of everything as of one moment, in a directory that is not there yet.
    fn copy_to(&self, path: &Path) -> Result<Arc<dyn Engine>, Halt>;

    /// Another database has taken this one's place: when nobody reads it any more, its files go.
    fn retire(&self) {}

    /// Whether what is removed shall be given room back for as soon as it is flushed, or when enough has gathered.
    fn set_tidy(&self, _tidy: bool) -> Result<(), Halt> {
        Ok(())
    }

    /// Rewrites files until removed data takes no room any more; or says why it does not begin.
    fn reclaim(&self) -> Result<Option<Lack>, Halt>;

    /// How much room the data takes.
    fn size(&self) -> Result<Size, Halt>;
}

/// What a scan calls with each key and value.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;
