//! The file operations that the log needs.
//!
//! The log uses files only through these two traits, so that tests can replace the disk: see [`fault_files`](super::fault_files).
//! An operation guarantees what POSIX guarantees, which is little: written bytes are durable after [`File::sync`], a created,
//! renamed or removed name after [`Files::sync_dir`], and not before.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::statvfs;

use super::direct_io::{self, Direct};
use super::handle::{FileSystem, Handle};

/// A directory tree.
pub trait Files: Send + Sync {
    /// Creates a directory and its parents, unless it exists.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Creates an empty file; fails if it exists.
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Opens an existing file.
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Reads all bytes of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// The names in a directory, in no particular order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Renames a file within its directory.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes created, renamed and removed names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// The free space on the directory's file system.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;

    /// Whether a helper thread may prepare files concurrently. Tests that count operations return false.
    fn allows_helpers(&self) -> bool {
        true
    }
}

/// An open file.
pub trait File: Send {
    /// Writes all bytes at an offset; beyond the end the file grows. The rest of their last block of 4,096 bytes may be zeroed.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes everything that was written durable, with no more metadata than reading it back requires.
    fn sync(&mut self) -> io::Result<()>;

    fn size_bytes(&self) -> io::Result<u64>;

    /// A description for operators of how writes become durable.
    fn sync_method(&self) -> String;
}

/// The operating system's files.
#[derive(Debug, Clone, Copy)]
pub struct OsFiles {
    /// Whether to wait for the disk. If not, a crash of the machine loses acknowledged writes.
    pub syncs: bool,
}

impl OsFiles {
    fn opened(self, file: fs::File, path: &Path) -> io::Result<OsFile<fs::File>> {
        OsFile::new(file, self.syncs, || direct_io::open(path))
    }

    fn open_file(self, path: &Path) -> io::Result<OsFile<fs::File>> {
        self.opened(fs::File::options().read(true).write(true).open(path)?, path)
    }
}

impl Files for OsFiles {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = fs::File::options().read(true).write(true).create_new(true).open(path)?;
        Ok(Box::new(self.opened(file, path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(Box::new(self.open_file(path)?))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.open_file(path)?.read_all()
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

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let disk = statvfs(dir)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

/// A file that is written with direct I/O if its file system is known to honour it, and through the page cache otherwise.
pub(super) struct OsFile<H> {
    file: H,
    file_system: FileSystem,
    bytes: u64,
    syncs: bool,
    /// Whether the page cache may hold data that is not on the disk.
    is_dirty: bool,
    direct: Option<Direct<H>>,
}

impl<H: Handle> OsFile<H> {
    /// `open_direct` opens the same file a second time, for direct I/O.
    pub fn new(file: H, syncs: bool, open_direct: impl FnOnce() -> io::Result<H>) -> io::Result<Self> {
        let (bytes, file_system) = (file.size_bytes()?, file.file_system()?);
        let mut opened = Self { file, file_system, bytes, syncs, is_dirty: false, direct: None };
        if syncs && file_system.has_durable_writes() {
            match open_direct() {
                Ok(file) => opened.direct = Some(Direct::over(file)),
                Err(error) => opened.give_up_direct(&error),
            }
        }
        Ok(opened)
    }

    fn give_up_direct(&mut self, error: &io::Error) {
        tracing::info!(%error, "no direct I/O for this file of the raft log, using cached writes and fdatasync");
        self.direct = None;
    }

    pub fn read_all(&mut self) -> io::Result<Vec<u8>> {
        match self.direct.as_ref().map(|direct| direct.read_all(self.bytes)) {
            Some(Err(error)) if direct_io::is_refusal(&error) => self.give_up_direct(&error),
            Some(read) => return read,
            None => (),
        }
        let mut all = vec![0; usize::try_from(self.bytes).map_err(io::Error::other)?];
        let mut read = 0;
        while read < all.len() {
            match self.file.read_at(&mut all[read..], read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        all.truncate(read);
        Ok(all)
    }

    fn stage(&mut self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        let Some(direct) = self.direct.as_mut().filter(|_| !self.is_dirty) else { return Ok(false) };
        match direct.stage(offset, bytes, self.bytes) {
            Err(error) if direct_io::is_refusal(&error) => {
                self.give_up_direct(&error);
                Ok(false)
            }
            staged => staged,
        }
    }

    /// Writes through the page cache. The first block is written from its beginning, because the cache may hold stale data of it.
    fn write_cached(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(direct) = &mut self.direct {
            match direct.head(offset) {
                Ok([]) => (),
                Ok(head) => self.file.write_all_at(head, offset - head.len() as u64)?,
                Err(error) if direct_io::is_refusal(&error) => self.give_up_direct(&error),
                Err(error) => return Err(error),
            }
        }
        self.file.write_all_at(bytes, offset)?;
        self.bytes = self.bytes.max(offset + bytes.len() as u64);
        self.is_dirty = true;
        Ok(())
    }

    /// Writes staged bytes through the page cache instead.
    fn unstage(&mut self) -> io::Result<()> {
        if let Some((offset, bytes)) = self.direct.as_mut().and_then(Direct::take_staged) {
            self.file.write_all_at(bytes, offset)?;
            self.is_dirty = true;
        }
        Ok(())
    }
}

impl<H: Handle> File for OsFile<H> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.stage(offset, bytes)? {
            return Ok(());
        }
        self.unstage()?;
        self.write_cached(offset, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        match self.direct.as_mut().map_or(Ok(()), Direct::write) {
            Err(error) if direct_io::is_refusal(&error) => {
                self.unstage()?;
                self.give_up_direct(&error);
            }
            written => written?,
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

    fn sync_method(&self) -> String {
        let how = match (self.syncs, &self.direct) {
            (false, _) => "never, as --unsafe-no-fsync asks for",
            (true, Some(_)) => "writes with O_DIRECT and RWF_DSYNC",
            (true, None) => "cached writes and fdatasync",
        };
        format!("{how} (file system: {})", self.file_system)
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use proptest::prelude::*;
    use rustix::fs::{Advice, fadvise};
    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::*;
    use crate::raft_log::direct_io::BLOCK;

    /// How the log uses a file: it appends, and starts again at the beginning when the file is reused.
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
        fn synced_bytes_are_in_the_file_and_only_the_rest_of_their_block_may_change(steps in steps()) {
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

    /// A file on ext4 that fails the direct I/O call named in `refused` with `InvalidInput`, or, if that is "nothing", fails
    /// direct writes with `StorageFull`.
    struct RefusingHandle {
        file: fs::File,
        is_direct: bool,
        refused: &'static str,
    }

    impl RefusingHandle {
        fn check(&self, call: &str) -> io::Result<()> {
            match (self.is_direct, self.refused) {
                (true, refused) if refused == call => Err(io::ErrorKind::InvalidInput.into()),
                (true, "nothing") if call == "write" => Err(io::ErrorKind::StorageFull.into()),
                _ => Ok(()),
            }
        }
    }

    impl Handle for RefusingHandle {
        fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
            self.check("read")?;
            Handle::read_at(&self.file, bytes, offset)
        }

        fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            assert!(!self.is_direct);
            Handle::write_all_at(&self.file, bytes, offset)
        }

        fn write_durably_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
            assert!(self.is_direct);
            self.check("write")?;
            Handle::write_durably_at(&self.file, bytes, offset)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.file.sync_data()
        }

        fn size_bytes(&self) -> io::Result<u64> {
            Handle::size_bytes(&self.file)
        }

        fn file_system(&self) -> io::Result<FileSystem> {
            Ok(FileSystem::EXT4)
        }
    }

    fn refusing_file(path: &Path, refused: &'static str) -> OsFile<RefusingHandle> {
        let open = || fs::File::options().read(true).write(true).open(path).unwrap();
        let direct = RefusingHandle { file: open(), is_direct: true, refused };
        let opens = if refused == "open" { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(direct) };
        OsFile::new(RefusingHandle { file: open(), is_direct: false, refused }, true, || opens).unwrap()
    }

    #[test]
    fn a_file_that_does_not_support_direct_io_is_used_through_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for refused in ["open", "read", "write"] {
            fs::write(&path, [0xEE; 10_000]).unwrap();
            let mut file = refusing_file(&path, refused);
            for (offset, group) in [(5, b"one"), (8, b"two")] {
                file.write_at(offset, group).unwrap();
                file.sync().unwrap();
                assert!(file.direct.is_none(), "{refused}");
            }
            assert_eq!(file.sync_method(), "cached writes and fdatasync (file system: ext4)");
            assert_eq!(fs::read(&path).unwrap()[..12], *b"\xEE\xEE\xEE\xEE\xEEonetwo\xEE");
            assert_eq!(refusing_file(&path, refused).read_all().unwrap(), fs::read(&path).unwrap());
        }
    }

    #[test]
    fn any_other_error_is_returned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, [0xEE; 10_000]).unwrap();
        let mut file = refusing_file(&path, "nothing");
        file.write_at(0, b"group").unwrap();
        assert_eq!(file.sync().unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(&path).unwrap(), [0xEE; 10_000]);
    }

    /// Whether the first bytes of a file are in the page cache. The check itself may bring them there.
    fn is_cached(path: &Path) -> bool {
        let file = fs::File::open(path).unwrap();
        let read = preadv2(&file, &mut [IoSliceMut::new(&mut [0; BLOCK])], 0, ReadWriteFlags::NOWAIT);
        !matches!(read, Err(Errno::AGAIN))
    }

    #[test]
    fn a_file_that_is_written_with_direct_io_is_read_with_direct_io() {
        // In the directory of this program, because the one for temporary files may be on tmpfs.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(1_500_000).collect(); // The last block is short.
        let uncached = |name| {
            let path = dir.path().join(name);
            fs::write(&path, &bytes).unwrap();
            let file = fs::File::open(&path).unwrap();
            file.sync_all().unwrap();
            fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            let has_durable_writes = file.file_system().unwrap().has_durable_writes();
            (path, has_durable_writes)
        };
        let (path, has_durable_writes) = uncached("log");
        assert!(OsFiles { syncs: true }.read(&path).unwrap() == bytes);
        assert_eq!(is_cached(&path), !has_durable_writes);
        let (other, _) = uncached("other");
        assert!(fs::read(&other).unwrap() == bytes);
        assert!(is_cached(&other), "the check detects cached files");
    }

    #[test]
    fn direct_io_is_used_on_known_file_systems_only() {
        let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
        let path = dir.path().join("file");
        let mut file = OsFiles { syncs: true }.create(&path).unwrap();
        file.write_at(0, &[7; 8192]).unwrap();
        file.sync().unwrap();
        file.write_at(4096, &[8; 512]).unwrap();
        file.sync().unwrap();
        assert_eq!(file.sync_method(), "cached writes and fdatasync (file system: type 0x1021994)");
        assert_eq!(OsFiles { syncs: true }.read(&path).unwrap()[4000..5000], fs::read(&path).unwrap()[4000..5000]);
    }
}
