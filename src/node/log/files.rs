//! The file operations that the log needs, and no others.
//!
//! The log sees files only through these two traits, so a test can stand between it and the disk: see
//! [`lossy`](super::lossy). What an operation promises is what POSIX promises, which is little: written bytes are durable
//! after [`File::sync`], a created, renamed or removed name after [`Files::sync_dir`], and not before.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::direct::Direct;

/// A directory tree.
pub trait Files: Send + Sync {
    /// Makes a directory, and those above it, unless it is there.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Makes an empty file; fails if the name is taken.
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Opens a file that is there.
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// All bytes of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// The names in a directory, in no particular order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Gives a file another name in the same directory.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Whether a helper thread may prepare files beside the caller. Tests that count operations say no.
    fn allows_helpers(&self) -> bool {
        true
    }
}

/// An open file.
pub trait File: Send {
    /// Writes all bytes at an offset; beyond the end the file grows. What lies behind them in their last block, of 4,096 bytes,
    /// may become zeros.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes everything written durable, with as little metadata as reading it back needs.
    fn sync(&mut self) -> io::Result<()>;

    /// How long the file is.
    fn size_bytes(&self) -> io::Result<u64>;
}

/// The operating system's files.
#[derive(Debug, Clone, Copy)]
pub struct OsFiles {
    /// Whether it is waited for the disk. Without that a crash of the machine loses what was acknowledged.
    pub syncs: bool,
}

impl Files for OsFiles {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = fs::File::options().read(true).write(true).create_new(true).open(path)?;
        Ok(Box::new(OsFile::new(file, path, self.syncs)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = fs::File::options().read(true).write(true).open(path)?;
        Ok(Box::new(OsFile::new(file, path, self.syncs)?))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if self.syncs { fs::File::open(dir)?.sync_all() } else { Ok(()) }
    }
}

struct OsFile {
    file: fs::File,
    bytes: u64,
    syncs: bool,
    /// Whether the page cache holds what the disk may not.
    is_dirty: bool,
    direct: Option<Direct>,
}

impl OsFile {
    fn new(file: fs::File, path: &Path, syncs: bool) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let direct = if syncs { Direct::open(path) } else { None };
        Ok(Self { file, bytes, syncs, is_dirty: false, direct })
    }

    fn write_cached(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        self.bytes = self.bytes.max(offset + bytes.len() as u64);
        self.is_dirty = true;
        Ok(())
    }

    /// What was to go past the page cache goes there, after all.
    fn unstage(&mut self) -> io::Result<()> {
        if let Some((offset, bytes)) = self.direct.as_mut().and_then(Direct::take_back) {
            self.file.write_all_at(bytes, offset)?;
            self.is_dirty = true;
        }
        Ok(())
    }
}

impl File for OsFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let Self { file, direct, .. } = self;
        if let Some(direct) = direct
            && !self.is_dirty
            && direct.stage(offset, bytes, self.bytes, |head, at| file.read_exact_at(head, at))?
        {
            return Ok(());
        }
        self.unstage()?;
        self.write_cached(offset, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        match self.direct.as_mut().map_or(Ok(()), Direct::write) {
            Ok(()) => (),
            // Some file systems let a file be opened for such writes, and then want none, or none of this size.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                tracing::debug!(%error, "no writes past the page cache");
                self.unstage()?;
                self.direct = None;
            }
            Err(error) => return Err(error),
        }
        if self.syncs && self.is_dirty {
            self.file.sync_data()?;
        }
        self.is_dirty = false;
        Ok(())
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::node::log::direct::BLOCK;

    /// The log's way of writing: on and on, and from the front again when the file has a new life.
    #[derive(Debug, Clone)]
    enum Step {
        Append(Vec<u8>),
        StartOver,
        Reopen,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let bytes = prop_oneof![1..600_usize, 4000..4200_usize, 1..70_000_usize, 250_000..300_000_usize];
        let group = (bytes, 1..=255_u8).prop_map(|(bytes, byte)| vec![byte; bytes]);
        let step = prop_oneof![12 => group.prop_map(Step::Append), 1 => Just(Step::StartOver), 1 => Just(Step::Reopen)];
        prop::collection::vec(step, 1..30)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn what_was_synced_lies_there_and_nothing_else_has_changed_but_the_rest_of_its_block(steps in steps()) {
            const BYTES: usize = 1_000_003; // The last block is short.
            let dir = tempfile::tempdir().unwrap();
            let (files, path) = (OsFiles { syncs: true }, dir.path().join("file"));
            let (mut end, mut before) = (0, vec![0xEE; BYTES]);
            let mut file = files.create(&path).unwrap();
            file.write_at(0, &before).unwrap();
            file.sync().unwrap();
            for step in steps {
                match step {
                    Step::StartOver => end = 0,
                    Step::Reopen => file = files.open(&path).unwrap(),
                    Step::Append(group) if end + group.len() > BYTES => end = 0,
                    Step::Append(group) => {
                        file.write_at(end as u64, &group).unwrap();
                        file.sync().unwrap();
                        before[end..end + group.len()].copy_from_slice(&group);
                        end += group.len();
                        let found = fs::read(&path).unwrap();
                        let block_end = end.next_multiple_of(BLOCK).min(BYTES);
                        let rest = &found[end..block_end];
                        prop_assert!(found[..end] == before[..end]);
                        prop_assert!(rest == &before[end..block_end] || rest.iter().all(|byte| *byte == 0));
                        prop_assert!(found[block_end..] == before[block_end..]);
                        before = found;
                    }
                }
            }
        }
    }

    fn with_direct(path: &Path, direct: &str, writable: bool) -> OsFile {
        fs::write(path, [0xEE; 10_000]).unwrap();
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let mut file = OsFile::new(file, path, true).unwrap();
        let other = fs::File::options().read(true).write(writable).open(direct).unwrap();
        file.direct = Some(Direct::over(other));
        file
    }

    #[test]
    fn a_file_system_that_wants_no_such_writes_gets_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // The kernel refuses anything but a number there, as it refuses writes that are not aligned.
        let mut file = with_direct(&path, "/proc/self/oom_score_adj", true);
        for (offset, group) in [(5, b"one"), (8, b"two")] {
            file.write_at(offset, group).unwrap();
            file.sync().unwrap();
            assert!(file.direct.is_none());
        }
        assert_eq!(fs::read(&path).unwrap()[..12], *b"\xEE\xEE\xEE\xEE\xEEonetwo\xEE");
    }

    #[test]
    fn any_other_error_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = with_direct(&path, "/dev/null", false);
        file.write_at(0, b"group").unwrap();
        assert!(file.sync().is_err(), "the file is not open for writing");
        assert_eq!(fs::read(&path).unwrap(), [0xEE; 10_000]);
    }
}
