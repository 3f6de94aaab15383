//! An [`Engine`] in memory, for tests and the simulation. It can simulate a crash.
//!
//! It guarantees what the real engine guarantees with its write-ahead log disabled and its column families flushed together,
//! and no more. The database in the drawing was flushed once, after the second batch. A crash leaves the state at one of the
//! marked boundaries; the caller of [`Memory::crash`] chooses which:
//!
//! ```text
//! batches     1     2     3     4     5
//!                   ^ flush           ^ now
//! crash(n)          0     1     2     3
//! ```
//!
//! It checks requirements that the real engine relies on: the keys of a `get_many` ascend, and a record of the history table is
//! never overwritten.
//!
//! INVARIANTS
//! * `current` is `durable` with all of `unflushed` applied.
//! * A scan reads a consistent snapshot and holds no lock while it visits, so a visitor may write.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Batch, Engine, InsufficientSpace, Size, Table, Visit, WriteOp};
use crate::error::Halt;

#[derive(Debug, Default)]
pub struct Memory {
    content: RwLock<Content>,
}

#[derive(Debug, Default)]
struct Content {
    /// What reads see.
    current: Tables,
    /// What survives every crash.
    durable: Tables,
    /// The batches in `current` but not in `durable`, oldest first: a crash may lose any number of them, from the end.
    unflushed: Vec<Batch>,
}

impl Memory {
    /// The number of batches that a crash right now could lose.
    #[must_use]
    pub fn unflushed(&self) -> usize {
        self.content.read().unflushed.len()
    }

    /// The engine as found after a crash: everything that was flushed, and the oldest `keep_batches` batches that were not. It
    /// is independent of `self`, so code that still writes to `self` does not affect it.
    #[must_use]
    #[allow(clippy::missing_panics_doc, reason = "the assertion says it")]
    pub fn crash(&self, keep_batches: usize) -> Self {
        let content = self.content.read();
        assert!(keep_batches <= content.unflushed.len(), "only as many batches can survive as were written");
        let mut found = content.durable.clone();
        for batch in &content.unflushed[..keep_batches] {
            found.apply(batch);
        }
        let content = Content { current: found.clone(), durable: found, unflushed: Vec::new() };
        Self { content: RwLock::new(content) }
    }
}

impl Engine for Memory {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        let content = &mut *self.content.write();
        content.current.apply(batch);
        content.unflushed.push(batch.clone());
        Ok(())
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        Ok(self.content.read().current.get(table, key))
    }

    fn get_many(&self, table: Table, keys: &[&[u8]], _is_scan: bool) -> Result<Vec<Option<Bytes>>, Halt> {
        assert!(keys.is_sorted(), "keys ascend");
        let content = self.content.read();
        Ok(keys.iter().map(|key| content.current.get(table, key)).collect())
    }

    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt> {
        let pairs = self.content.read().current.pairs(table);
        if !to.is_empty() && from >= to {
            return Ok(());
        }
        let end = if to.is_empty() { Bound::Unbounded } else { Bound::Excluded(to) };
        for (key, value) in pairs.range::<[u8], _>((Bound::Included(from), end)) {
            if let ControlFlow::Break(()) = visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        Ok(self.content.read().durable.get(table, key))
    }

    fn copy_to(&self, _path: &Path) -> Result<Arc<dyn Engine>, Halt> {
        self.flush()?;
        Ok(Arc::new(self.crash(0)))
    }

    fn flush(&self) -> Result<(), Halt> {
        let content = &mut *self.content.write();
        for batch in content.unflushed.drain(..) {
            content.durable.apply(&batch);
        }
        Ok(())
    }

    /// Nothing to do: removed data takes no space.
    fn defragment(&self) -> Result<Option<InsufficientSpace>, Halt> {
        Ok(None)
    }

    fn size(&self) -> Result<Size, Halt> {
        let bytes = self.content.read().current.bytes;
        Ok(Size { total_bytes: bytes, in_use_bytes: bytes, ..Size::default() })
    }
}

type Pairs = BTreeMap<Bytes, Bytes>;

/// All tables. Cheap to clone: each table is shared until one of the clones is written to.
#[derive(Debug, Default, Clone)]
struct Tables {
    pairs: BTreeMap<Table, Arc<Pairs>>,
    /// Total length of all keys and values.
    bytes: u64,
}

impl Tables {
    fn apply(&mut self, batch: &Batch) {
        for (table, key, change) in batch.iter() {
            let pairs = Arc::make_mut(self.pairs.entry(table).or_default());
            match change {
                WriteOp::Put(value) => {
                    let old = pairs.insert(Bytes::copy_from_slice(key), value.clone());
                    let rewritten = table == Table::History && old.is_some();
                    assert!(!rewritten, "a record of the history table is never overwritten: {key:02x?}");
                    self.bytes += pair_bytes(key, value);
                    self.bytes -= old.map_or(0, |old| pair_bytes(key, &old));
                }
                WriteOp::Remove => self.bytes -= pairs.remove(key).map_or(0, |old| pair_bytes(key, &old)),
                WriteOp::RemoveRange(end) => {
                    let gone = pairs.extract_if(Bytes::copy_from_slice(key)..end.clone(), |_, _| true);
                    self.bytes -= gone.map(|(key, value)| pair_bytes(&key, &value)).sum::<u64>();
                }
            }
        }
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<Bytes> {
        self.pairs.get(&table)?.get(key).cloned()
    }

    /// A snapshot of one table.
    fn pairs(&self, table: Table) -> Arc<Pairs> {
        self.pairs.get(&table).cloned().unwrap_or_default()
    }
}

fn pair_bytes(key: &[u8], value: &[u8]) -> u64 {
    (key.len() + value.len()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(engine: &Memory, table: Table, key: &str, value: &str) {
        let mut batch = Batch::default();
        batch.put(table, key.as_bytes(), value.as_bytes().to_vec());
        engine.write(&batch).unwrap();
    }

    fn get(engine: &Memory, table: Table, key: &str) -> Option<String> {
        text(engine.get(table, key.as_bytes()).unwrap())
    }

    fn text(value: Option<Bytes>) -> Option<String> {
        value.map(|value| String::from_utf8(value.to_vec()).unwrap())
    }

    fn scan(engine: &Memory, from: &str, to: &str) -> String {
        let mut seen = Vec::new();
        engine
            .scan(Table::Meta, from.as_bytes(), to.as_bytes(), &mut |key, _| {
                seen.push(String::from_utf8(key.to_vec()).unwrap());
                ControlFlow::Continue(())
            })
            .unwrap();
        seen.join(" ")
    }

    #[test]
    fn tables_do_not_see_each_other() {
        let engine = Memory::default();
        put(&engine, Table::Meta, "a", "meta");
        put(&engine, Table::Lease, "a", "lease");
        assert_eq!(get(&engine, Table::Meta, "a").as_deref(), Some("meta"));
        assert_eq!(get(&engine, Table::Lease, "a").as_deref(), Some("lease"));
        assert_eq!(get(&engine, Table::Alarm, "a"), None);
    }

    #[test]
    fn the_last_write_to_a_key_in_a_batch_wins() {
        let engine = Memory::default();
        let mut batch = Batch::default();
        batch.put(Table::Meta, b"a", "1");
        batch.delete(Table::Meta, b"a");
        batch.put(Table::Meta, b"b", "1");
        batch.put(Table::Meta, b"b", "2");
        engine.write(&batch).unwrap();
        assert_eq!(get(&engine, Table::Meta, "a"), None);
        assert_eq!(get(&engine, Table::Meta, "b").as_deref(), Some("2"));
        let values = engine.get_many(Table::Meta, &[b"a", b"b"], false).unwrap();
        assert_eq!(values, [None, Some(Bytes::from("2"))]);
    }

    #[test]
    fn the_end_of_a_scan_is_exclusive_and_an_empty_end_is_the_end_of_the_table() {
        let engine = Memory::default();
        for key in ["a", "b", "c", "d"] {
            put(&engine, Table::Meta, key, "");
        }
        put(&engine, Table::Lease, "e", "");
        assert_eq!(scan(&engine, "b", "d"), "b c");
        assert_eq!(scan(&engine, "b", ""), "b c d");
        assert_eq!(scan(&engine, "", ""), "a b c d");
        assert_eq!(scan(&engine, "c", "b"), "", "an empty range is empty, not an error");
    }

    #[test]
    fn a_scan_reads_a_snapshot_even_if_its_visitor_writes() {
        let engine = Memory::default();
        put(&engine, Table::Meta, "a", "1");
        put(&engine, Table::Meta, "b", "1");
        let mut seen = Vec::new();
        engine
            .scan(Table::Meta, b"", b"", &mut |key, value| {
                put(&engine, Table::Meta, "b", "2");
                put(&engine, Table::Meta, "c", "2");
                seen.push((key.to_vec(), value.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(seen, [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"1".to_vec())]);
        assert_eq!(scan(&engine, "", ""), "a b c");
    }

    #[test]
    fn a_crash_keeps_flushed_batches_and_as_many_others_as_requested() {
        let engine = Memory::default();
        for value in ["1", "2", "3", "4"] {
            put(&engine, Table::Meta, "a", value);
            put(&engine, Table::Lease, value, "");
            if value == "2" {
                engine.flush().unwrap();
            }
        }
        assert_eq!(engine.unflushed(), 4);
        assert_eq!(text(engine.get_durable(Table::Meta, b"a").unwrap()).as_deref(), Some("2"));
        for (keep, value, lease) in [(0, "2", "2"), (1, "3", "2"), (2, "3", "3"), (3, "4", "3"), (4, "4", "4")] {
            let found = engine.crash(keep);
            assert_eq!(get(&found, Table::Meta, "a").as_deref(), Some(value), "keeping {keep}");
            assert_eq!(get(&found, Table::Lease, lease).as_deref(), Some(""), "keeping {keep}");
            assert_eq!(text(found.get_durable(Table::Meta, b"a").unwrap()).as_deref(), Some(value));
            assert_eq!(found.unflushed(), 0, "everything found after a crash is durable");
        }
    }

    #[test]
    fn writes_to_a_crashed_engine_do_not_affect_its_successor() {
        let engine = Memory::default();
        put(&engine, Table::Meta, "a", "1");
        let found = engine.crash(1);
        put(&engine, Table::Meta, "a", "2");
        assert_eq!(get(&found, Table::Meta, "a").as_deref(), Some("1"));
    }

    #[test]
    fn size_counts_only_current_data() {
        let engine = Memory::default();
        put(&engine, Table::Meta, "key", "value");
        put(&engine, Table::Meta, "key", "longer value");
        put(&engine, Table::Lease, "k", "");
        assert_eq!(engine.size().unwrap(), Size { total_bytes: 16, in_use_bytes: 16, ..Size::default() });
        let mut batch = Batch::default();
        batch.delete(Table::Meta, b"key");
        batch.delete(Table::Meta, b"never there");
        engine.write(&batch).unwrap();
        assert_eq!(engine.size().unwrap().in_use_bytes, 1);
        assert_eq!(engine.crash(0).size().unwrap().in_use_bytes, 0);
    }

    #[test]
    #[should_panic(expected = "a record of the history table is never overwritten")]
    fn overwriting_a_history_record_panics() {
        let engine = Memory::default();
        put(&engine, Table::History, "r", "1");
        put(&engine, Table::History, "r", "2");
    }
}
