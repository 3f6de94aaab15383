//! The real engine: RocksDB without a write-ahead log.
//!
//! There are two column families (see [`super::schema`]). They are flushed atomically: without a log, a crash could otherwise
//! leave the newer state of one family with the older state of the other. Files of `history` never overlap, so compactions can
//! move them between levels without rewriting them, provided that all levels use the same compression.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, FlushOptions, Options, ReadOptions, ReadTier, WriteBatch, WriteOptions, checkpoint::Checkpoint,
    properties,
};
use rustix::fs::statvfs;

use super::{Batch, Engine, InsufficientSpace, Size, Table, TableUsage, Visit, WriteOp};
use crate::error::Halt;

const HISTORY: &str = "history";
const STATE: &str = "state";
/// Flushes and compactions share two cores with the rest of the process.
const BACKGROUND_JOBS: i32 = 2;
/// How many bytes of a growing file are written before they are synced.
const SYNC_BYTES: u64 = 1 << 20;
/// `level0_file_num_compaction_trigger`: RocksDB's default.
const FLUSHED_FILES: &str = "4";

/// Memory limits of one database.
#[derive(Debug, Clone, Copy)]
pub struct MemoryLimits {
    /// For the block cache.
    pub block_bytes: usize,
    /// For each memtable, of which every family has one or more.
    pub write_bytes: usize,
}

impl Default for MemoryLimits {
    fn default() -> Self {
        Self { block_bytes: 16 << 20, write_bytes: 16 << 20 }
    }
}

/// A database in a directory.
pub struct Rocks {
    db: DB,
    /// Dropped when the database is closed.
    directory: Directory,
}

/// The database's directory; deleted on drop after [`Engine::delete_on_drop`].
struct Directory {
    path: PathBuf,
    deletes_on_drop: AtomicBool,
}

impl Drop for Directory {
    fn drop(&mut self) {
        if *self.deletes_on_drop.get_mut()
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(
                path = %self.path.display(),
                %error,
                "cannot delete the directory of a replaced database; the next start tries again"
            );
        }
    }
}

impl Rocks {
    /// Opens the database; creates it if it does not exist.
    pub fn open(path: &Path) -> Result<Self, Halt> {
        Self::open_with(path, MemoryLimits::default())
    }

    /// The same, with the given memory limits.
    pub fn open_with(path: &Path, caches: MemoryLimits) -> Result<Self, Halt> {
        let cache = Cache::new_lru_cache(caches.block_bytes);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_atomic_flush(true);
        options.set_max_background_jobs(BACKGROUND_JOBS);
        options.set_avoid_unnecessary_blocking_io(true);
        // Sync files while they grow. One large sync at the end would delay the syncs of the raft log.
        options.set_bytes_per_sync(SYNC_BYTES);
        options.set_max_open_files(512);
        options.set_keep_log_file_num(4);
        options.set_max_log_file_size(4 << 20);
        let families =
            [HISTORY, STATE].map(|name| ColumnFamilyDescriptor::new(name, family_options(&cache, caches.write_bytes)));
        let db = DB::open_cf_descriptors(&options, path, families).map_err(halt)?;
        Ok(Self { db, directory: Directory { path: path.to_path_buf(), deletes_on_drop: AtomicBool::new(false) } })
    }

    fn family(&self, table: Table) -> &ColumnFamily {
        let name = if table == Table::History { HISTORY } else { STATE };
        self.db.cf_handle(name).expect("both families are created when the database is opened")
    }

    fn sum(&self, property: &properties::PropName) -> Result<u64, Halt> {
        let mut sum = 0;
        for table in [Table::History, Table::Meta] {
            sum += self.db.property_int_value_cf(self.family(table), property).map_err(halt)?.unwrap_or(0);
        }
        Ok(sum)
    }

    fn get_with(&self, table: Table, key: &[u8], options: &ReadOptions) -> Result<Option<Bytes>, Halt> {
        let found = with_key(table, key, |key| self.db.get_pinned_cf_opt(self.family(table), key, options));
        Ok(found.map_err(halt)?.map(|value| Bytes::copy_from_slice(&value)))
    }
}

fn family_options(cache: &Cache, write_bytes: usize) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    // The records of one response are stored in the order of their revisions, far apart, so each one read costs a block.
    blocks.set_block_size(4 << 10);
    blocks.set_format_version(5);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_write_buffer_size(write_bytes);
    options.set_max_write_buffer_number(4);
    options
}

/// Calls `run` with the key as stored: in the `state` family it is prefixed with the table's tag, on the stack if it fits.
fn with_key<R>(table: Table, key: &[u8], run: impl FnOnce(&[u8]) -> R) -> R {
    const INLINE: usize = 64;
    if table == Table::History {
        return run(key);
    }
    let mut inline = [0; INLINE];
    if key.len() < INLINE {
        inline[0] = table.tag();
        inline[1..=key.len()].copy_from_slice(key);
        return run(&inline[..=key.len()]);
    }
    let mut tagged = Vec::with_capacity(key.len() + 1);
    tagged.push(table.tag());
    tagged.extend_from_slice(key);
    run(&tagged)
}

/// The insert hint of a batch is the position of its last key in the memtable. Range deletes go into a memtable of their own,
/// but RocksDB uses the same hint for both, which corrupts them: so batches with range deletes must not use hints.
fn write_options(has_ranges: bool) -> WriteOptions {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    options.set_memtable_insert_hint_per_batch(!has_ranges);
    options
}

fn halt(error: rocksdb::Error) -> Halt {
    Halt::Database(error.into_string())
}

impl Engine for Rocks {
    fn write(&self, batch: &Batch) -> Result<(), Halt> {
        let mut writes = WriteBatch::default();
        let (history, state) = (self.family(Table::History), self.family(Table::Meta));
        let mut has_ranges = false;
        for (table, key, change) in batch.iter() {
            let family = if table == Table::History { history } else { state };
            with_key(table, key, |key| match change {
                WriteOp::Put(value) => writes.put_cf(family, key, value),
                WriteOp::Remove => writes.delete_cf(family, key),
                WriteOp::RemoveRange(end) => {
                    has_ranges = true;
                    with_key(table, end, |end| writes.delete_range_cf(family, key, end));
                }
            });
        }
        self.db.write_opt(writes, &write_options(has_ranges)).map_err(halt)
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        self.get_with(table, key, &ReadOptions::default())
    }

    fn get_many(&self, table: Table, keys: &[&[u8]], is_scan: bool) -> Result<Vec<Option<Bytes>>, Halt> {
        let mut options = ReadOptions::default();
        options.fill_cache(!is_scan);
        let read = |keys: &mut dyn Iterator<Item = &[u8]>| {
            let keys: Vec<&[u8]> = keys.collect();
            self.db
                .batched_multi_get_cf_opt(self.family(table), keys, true, &options)
                .into_iter()
                .map(|found| Ok(found.map_err(halt)?.map(|value| Bytes::copy_from_slice(&value))))
                .collect()
        };
        if table == Table::History {
            return read(&mut keys.iter().copied());
        }
        let tagged: Vec<Vec<u8>> = keys.iter().map(|key| with_key(table, key, <[u8]>::to_vec)).collect();
        read(&mut tagged.iter().map(Vec::as_slice))
    }

    fn scan(&self, table: Table, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), Halt> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        let skip = usize::from(table != Table::History);
        if !to.is_empty() {
            options.set_iterate_upper_bound(with_key(table, to, <[u8]>::to_vec));
        } else if table != Table::History {
            options.set_iterate_upper_bound([table.tag() + 1]);
        }
        let mut rows = self.db.raw_iterator_cf_opt(self.family(table), options);
        with_key(table, from, |from| rows.seek(from));
        while let Some((key, value)) = rows.item() {
            if visit(&key[skip..], value) == ControlFlow::Break(()) {
                return Ok(());
            }
            rows.next();
        }
        rows.status().map_err(halt)
    }

    fn get_durable(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Halt> {
        let mut options = ReadOptions::default();
        // With the write-ahead log disabled, this tier excludes the memtables.
        options.set_read_tier(ReadTier::Persisted);
        self.get_with(table, key, &options)
    }

    /// Files are hard links, so the copy takes disk space only as the two databases diverge.
    fn copy_to(&self, path: &Path) -> Result<Arc<dyn Engine>, Halt> {
        let checkpoint = Checkpoint::new(&self.db).map_err(halt)?;
        checkpoint.create_checkpoint(path).map_err(halt)?;
        Ok(Arc::new(Self::open(path)?))
    }

    fn delete_on_drop(&self) {
        self.directory.deletes_on_drop.store(true, Ordering::Relaxed);
    }

    fn flush(&self) -> Result<(), Halt> {
        let mut options = FlushOptions::default();
        options.set_wait(true);
        let families = [self.family(Table::History), self.family(Table::Meta)];
        self.db.flush_cfs_opt(&families, &options).map_err(halt)
    }

    /// Normally the flushed files of level 0 are compacted only once there are a few of them. A range delete is in one small
    /// file, but may cover most of the database.
    fn set_eager_compaction(&self, tidy: bool) -> Result<(), Halt> {
        let files = if tidy { "1" } else { FLUSHED_FILES };
        let option = ("level0_file_num_compaction_trigger", files);
        self.db.set_options_cf(self.family(Table::History), &[option]).map_err(halt)
    }

    /// If the disk filled up in between, the process would end, so this requires free space for a full copy of the live data.
    fn defragment(&self) -> Result<Option<InsufficientSpace>, Halt> {
        let Size { in_use_bytes, memtable_bytes, .. } = self.size()?;
        let disk = statvfs(&self.directory.path)
            .map_err(|error| Halt::io("get the free space of", &self.directory.path)(error.into()))?;
        let lack = InsufficientSpace {
            needed_bytes: in_use_bytes + memtable_bytes,
            free_bytes: disk.f_bavail * disk.f_frsize,
        };
        if lack.free_bytes < lack.needed_bytes {
            return Ok(Some(lack));
        }
        self.flush()?;
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        options.set_exclusive_manual_compaction(false);
        for table in [Table::History, Table::Meta] {
            self.db.compact_range_cf_opt(self.family(table), None::<&[u8]>, None::<&[u8]>, &options);
        }
        Ok(None)
    }

    fn size(&self) -> Result<Size, Halt> {
        let memtable_bytes = self.sum(properties::CUR_SIZE_ALL_MEM_TABLES)?;
        let total_bytes = self.sum(properties::LIVE_SST_FILES_SIZE)? + memtable_bytes;
        let in_use_bytes = self.sum(properties::ESTIMATE_LIVE_DATA_SIZE)?.min(total_bytes);
        // Both families share one block cache.
        let block_cache = self.db.property_int_value_cf(self.family(Table::History), properties::BLOCK_CACHE_USAGE);
        let block_cache_bytes = block_cache.map_err(halt)?.unwrap_or(0);
        Ok(Size { total_bytes, in_use_bytes, memtable_bytes, block_cache_bytes })
    }

    fn tables(&self) -> Result<Vec<TableUsage>, Halt> {
        let usage = |(name, table)| {
            let number = |property| {
                self.db.property_int_value_cf(self.family(table), property).map(Option::unwrap_or_default).map_err(halt)
            };
            Ok(TableUsage {
                name,
                file_bytes: number(properties::LIVE_SST_FILES_SIZE)?,
                memtable_bytes: number(properties::CUR_SIZE_ALL_MEM_TABLES)?,
                keys: number(properties::ESTIMATE_NUM_KEYS)?,
                pending_compaction_bytes: number(properties::ESTIMATE_PENDING_COMPACTION_BYTES)?,
            })
        };
        [(HISTORY, Table::History), (STATE, Table::Meta)].into_iter().map(usage).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> (tempfile::TempDir, Rocks) {
        let dir = tempfile::tempdir().unwrap();
        let engine = Rocks::open(&dir.path().join("db")).unwrap();
        (dir, engine)
    }

    fn key(nth: u32) -> [u8; 4] {
        nth.to_be_bytes()
    }

    /// The numbers of all keys below `end`.
    fn keys_below(engine: &Rocks, end: u32) -> Vec<u32> {
        let mut keys = Vec::new();
        let mut visit = |key: &[u8], _: &[u8]| {
            keys.push(u32::from_be_bytes(key.try_into().unwrap()));
            ControlFlow::Continue(())
        };
        engine.scan(Table::History, &[], &key(end), &mut visit).unwrap();
        keys
    }

    #[test]
    fn data_removed_by_a_range_delete_is_reclaimed_soon() {
        let (_dir, engine) = open();
        let mut batch = Batch::default();
        for nth in 0..4000 {
            let random: Vec<u8> = (0..128_u64).flat_map(|_| rand::random::<u64>().to_be_bytes()).collect();
            batch.put(Table::History, &key(nth), random);
        }
        engine.write(&batch).unwrap();
        assert!(engine.defragment().unwrap().is_none(), "there is enough disk space");
        let before = engine.size().unwrap().total_bytes;
        let mut batch = Batch::default();
        batch.delete_range(Table::History, &key(10), key(3990).to_vec());
        engine.write(&batch).unwrap();
        engine.flush().unwrap();
        engine.set_eager_compaction(true).unwrap();
        while engine.size().unwrap().total_bytes > before / 10 {
            std::thread::park_timeout(std::time::Duration::from_millis(5));
        }
        engine.set_eager_compaction(false).unwrap();
        assert_eq!(keys_below(&engine, 4000), (0..10).chain(3990..4000).collect::<Vec<_>>());
    }

    /// Regression: with concurrent writes to the memtable, removed keys reappeared, or a scan returned invalid keys.
    #[test]
    fn batches_with_range_deletes_and_deletes_are_correct_beside_another_writer() {
        let (_dir, engine) = open();
        let mut all = Batch::default();
        (0..100_000).for_each(|nth| all.put(Table::History, &key(nth), "value"));
        engine.write(&all).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for nth in (1_000_000..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    let mut batch = Batch::default();
                    batch.put(Table::History, &key(nth), "value");
                    engine.write(&batch).unwrap();
                }
            });
            for first in (0..100_000).step_by(100) {
                let mut batch = Batch::default();
                (0..10).for_each(|nth| batch.delete(Table::History, &key(first + 3 * nth)));
                batch.delete_range(Table::History, &key(first + 40), key(first + 90).to_vec());
                batch.delete(Table::History, &key(first + 95));
                engine.write(&batch).unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
        });
        let is_left =
            |nth: &u32| !matches!(nth % 100, 40..90 | 95) && (nth % 100 > 27 || !(nth % 100).is_multiple_of(3));
        for also_flushes in [false, true] {
            assert_eq!(keys_below(&engine, 1_000_000), (0..100_000).filter(is_left).collect::<Vec<_>>());
            if also_flushes {
                engine.flush().unwrap();
                assert!(engine.defragment().unwrap().is_none(), "there is enough disk space");
            }
        }
        assert_eq!(engine.get(Table::History, &key(40)).unwrap(), None);
        let found = engine.get_many(Table::History, &[&key(189), &key(190)], false).unwrap();
        assert!(found[0].is_none() && found[1].is_some());
    }
}
