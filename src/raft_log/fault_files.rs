//! FOR TESTS: files on a disk that can lose power.
//!
//! [`LossyFiles`] works on real files and keeps, for each of them, what a power failure would leave: the bytes at the last sync
//! and an arbitrary part of the writes since then; the names at the last directory sync and the first few of the changes since
//! then. [`crash`](LossyFiles::crash) changes the directory to such a state; [`power_failure`](LossyFiles::power_failure) writes
//! such a state to another directory, without an effect on the code that uses this one.
//!
//! The log uses either a file that guarantees only the contract of [`File`] or, with
//! [`under_os_files`](LossyFiles::under_os_files), the same type as on the operating system, over a simulated disk: direct writes
//! are durable at once, unless the disk ignores that flag, and do not update the page cache.
//!
//! [`fail_at`](LossyFiles::fail_at) makes the disk fail from the n-th operation on, so that a test can crash at each step of a
//! procedure.

mod inode;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::direct_io::BLOCK;
use super::files::{File, Files, OsFile};
use super::handle::{FileSystem, Handle};
use inode::{Inode, SplitMix64};

/// What a crash loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing, because only the process crashed, not the machine.
    Nothing,
    /// Everything that was not synced.
    Unsynced,
    /// Parts of what was not synced, chosen by this seed: sectors of the writes, and the later ones of the name changes.
    Partial(u64),
}

/// Files on a disk that can lose power. Clones share the disk.
#[derive(Debug, Clone, Default)]
pub struct LossyFiles {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug, Default, Clone)]
struct Disk {
    inodes: Vec<Inode>,
    /// All names, as the process sees them, and as they would be after a power failure.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    unsynced_changes: Vec<Change>,
    operations: u64,
    fail_at: Option<u64>,
    ignores_syncs: bool,
    ignores_durable_writes: bool,
    /// The simulated file system below files of the operating system's type; None if files are of the other type.
    file_system: Option<FileSystem>,
}

#[derive(Debug, Clone)]
enum Change {
    Create(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl Change {
    fn dir(&self) -> Option<&Path> {
        match self {
            Self::Create(path, _) | Self::Rename(path, _) | Self::Remove(path) => path.parent(),
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Create(path, inode) => {
                names.insert(path.clone(), *inode);
            }
            Self::Rename(from, to) => {
                let inode = names.remove(from).expect("changes become durable in order");
                names.insert(to.clone(), inode);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

impl LossyFiles {
    /// A working disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A working disk with this file system, used through the operating system's type of file.
    #[must_use]
    pub fn under_os_files(file_system: FileSystem) -> Self {
        let disk = Disk { file_system: Some(file_system), ..Disk::default() };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// Makes the disk fail at the n-th operation from now on, counted from 1: it and all later ones return an error. Whether they
    /// have an effect is decided by the crash.
    pub fn fail_at(&self, operation: u64) {
        let mut disk = self.disk();
        disk.fail_at = Some(disk.operations + operation);
    }

    /// From now on a sync of a file reports success and does nothing, for tests that must detect it.
    pub fn ignore_syncs(&self) {
        self.disk().ignores_syncs = true;
    }

    /// From now on a write with `RWF_DSYNC` is like any other, as on a file system that ignores the flag. Syncs work.
    pub fn ignore_durable_writes(&self) {
        self.disk().ignores_durable_writes = true;
    }

    /// The number of operations so far that change something.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.disk().operations
    }

    /// Simulates a crash with this loss; the disk works again afterwards. Files that were open before must not be used any more.
    pub fn crash(&self, loss: Loss) -> io::Result<()> {
        let mut disk = self.disk();
        let before: BTreeSet<PathBuf> = disk.names.keys().chain(disk.durable_names.keys()).cloned().collect();
        if !disk.lose(loss) {
            return Ok(());
        }
        for path in before {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        disk.write_files()
    }

    /// Writes to another directory what a power failure at this moment would leave; all files must be in one directory. Code
    /// that uses this disk is not affected, and cannot change the new one.
    pub fn power_failure(&self, loss: Loss, to: &Path) -> io::Result<Self> {
        assert!(loss != Loss::Nothing, "a power failure loses at least what only the process had");
        let mut disk = self.disk().clone();
        disk.lose(loss);
        let moved = |names: &BTreeMap<PathBuf, usize>| {
            let names = names
                .iter()
                .map(|(path, inode)| (to.join(path.file_name().expect("the path of a file has a name")), *inode));
            names.collect::<BTreeMap<_, _>>()
        };
        (disk.names, disk.durable_names) = (moved(&disk.names), moved(&disk.durable_names));
        fs::create_dir_all(to)?;
        disk.write_files()?;
        Ok(Self { disk: Arc::new(Mutex::new(disk)) })
    }

    /// Changes the bytes of a file, as disk corruption does.
    pub fn rewrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = *disk.names.get(path).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        disk.inodes[inode] = Inode { durable: bytes.to_vec(), ..Inode::default() };
        fs::write(path, bytes)
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("the lock is poisoned only if the test has failed")
    }

    fn file(&self, path: &Path, inode: usize) -> io::Result<LossyFile> {
        let real = fs::File::options().read(true).write(true).open(path)?;
        Ok(LossyFile { disk: Arc::clone(&self.disk), real, inode })
    }

    /// Opens the real file with this name.
    fn handle(&self, path: &Path, inode: usize) -> io::Result<Box<dyn File>> {
        if self.disk().file_system.is_none() {
            return Ok(Box::new(self.file(path, inode)?));
        }
        Ok(Box::new(self.os_file(path, inode)?))
    }

    fn os_file(&self, path: &Path, inode: usize) -> io::Result<OsFile<LossyHandle>> {
        let handle = |is_direct| Ok(LossyHandle { file: self.file(path, inode)?, is_direct });
        OsFile::new(handle(false)?, true, || handle(true))
    }

    fn inode(&self, path: &Path) -> io::Result<usize> {
        self.disk().names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes a change of names, and returns an error if the disk is broken.
    fn change(&self, change: Change, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut disk = self.disk();
        let outcome = disk.count();
        make()?;
        change.apply(&mut disk.names);
        disk.unsynced_changes.push(change);
        outcome
    }
}

impl Disk {
    /// Applies a crash, and repairs the disk; false if the real files need no change.
    fn lose(&mut self, loss: Loss) -> bool {
        self.fail_at = None;
        if loss == Loss::Nothing {
            self.inodes.iter_mut().for_each(Inode::restart);
            return false;
        }
        let mut random = if let Loss::Partial(seed) = loss { Some(SplitMix64(seed)) } else { None };
        let survivors = random.as_mut().map_or(0, |random| random.below(self.unsynced_changes.len() + 1));
        let Self { unsynced_changes, durable_names, names, inodes, .. } = self;
        unsynced_changes.drain(..).take(survivors).for_each(|change| change.apply(durable_names));
        for inode in inodes {
            inode.lose(random.as_mut());
        }
        names.clone_from(durable_names);
        true
    }

    /// Writes the durable content of every file.
    fn write_files(&self) -> io::Result<()> {
        self.names.iter().try_for_each(|(path, inode)| fs::write(path, &self.inodes[*inode].durable))
    }

    /// Counts an operation; `Err` if the disk is broken.
    fn count(&mut self) -> io::Result<()> {
        self.operations += 1;
        match self.fail_at {
            Some(fail_at) if self.operations >= fail_at => Err(io::Error::other("the simulated disk is broken")),
            Some(_) | None => Ok(()),
        }
    }
}

impl Files for LossyFiles {
    /// Directories are durable at once: the log creates only its own, and making that durable is up to its caller.
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let inode = {
            let mut disk = self.disk();
            disk.inodes.push(Inode::default());
            disk.inodes.len() - 1
        };
        self.change(Change::Create(path.to_path_buf(), inode), || fs::File::create_new(path).map(|_| ()))?;
        self.handle(path, inode)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.handle(path, self.inode(path)?)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        if self.disk().file_system.is_none() {
            fs::read(path)
        } else {
            self.os_file(path, self.inode(path)?)?.read_all()
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let disk = self.disk();
        let here = disk.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(here.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(Change::Rename(from.to_path_buf(), to.to_path_buf()), || fs::rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change(Change::Remove(path.to_path_buf()), || fs::remove_file(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.count()?;
        let Disk { unsynced_changes, durable_names, .. } = &mut *disk;
        let synced = unsynced_changes.extract_if(.., |change| change.dir() == Some(dir));
        synced.for_each(|change| change.apply(durable_names));
        Ok(())
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn allows_helpers(&self) -> bool {
        false
    }
}

/// A file that guarantees only the contract of [`File`].
struct LossyFile {
    disk: Arc<Mutex<Disk>>,
    real: fs::File,
    inode: usize,
}

impl LossyFile {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("the lock is poisoned only if the test has failed")
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut disk = self.disk();
        let outcome = disk.count();
        let ignores_syncs = disk.ignores_syncs;
        let inode = &mut disk.inodes[self.inode];
        if outcome.is_ok() {
            if !ignores_syncs {
                inode.sync();
            }
        } else {
            inode.sync_failed = true;
        }
        outcome
    }

    /// Writes into the page cache.
    fn write(&self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        let mut disk = self.disk();
        let outcome = disk.count();
        FileExt::write_all_at(&self.real, &bytes, offset)?;
        disk.inodes[self.inode].unsynced_writes.push((to_usize(offset), bytes));
        outcome
    }
}

fn to_usize(offset: u64) -> usize {
    usize::try_from(offset).expect("tests write small files")
}

/// Zeroes the rest of the last block for half of all writes, unless the file ends there: both are allowed.
fn with_rest_of_block(start: usize, bytes: &[u8], file_bytes: u64) -> Vec<u8> {
    let (mut bytes, end) = (bytes.to_vec(), start + bytes.len());
    let block_end = end.next_multiple_of(BLOCK);
    if end.is_multiple_of(2) && block_end as u64 <= file_bytes {
        bytes.resize(block_end - start, 0);
    }
    bytes
}

impl File for LossyFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(offset, with_rest_of_block(to_usize(offset), bytes, self.real.metadata()?.len()))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.real.metadata()?.len())
    }

    fn sync_method(&self) -> String {
        "on a simulated disk".to_owned()
    }
}

/// Simulates the operating system's file handle, with the page cache or with direct I/O.
struct LossyHandle {
    file: LossyFile,
    is_direct: bool,
}

impl Handle for LossyHandle {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        if !self.is_direct {
            return FileExt::read_at(&self.file.real, bytes, offset);
        }
        assert_aligned(bytes, offset);
        let left = usize::try_from(self.size_bytes()?.saturating_sub(offset)).expect("tests write small files");
        let read = bytes.len().min(left);
        self.file.disk().inodes[self.file.inode].read(to_usize(offset), &mut bytes[..read]);
        Ok(read)
    }

    /// The page cache writes whole pages, with its own, possibly stale, content around the bytes.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(!self.is_direct, "direct writes are durable writes");
        let (start, end) = (to_usize(offset), to_usize(offset) + bytes.len());
        let size = usize::try_from(self.size_bytes()?).expect("tests write small files").max(end);
        let (first, after) = (start / BLOCK * BLOCK, end.next_multiple_of(BLOCK).min(size));
        let mut pages = vec![0; after - first];
        let mut read = 0;
        while let more @ 1.. = FileExt::read_at(&self.file.real, &mut pages[read..], (first + read) as u64)? {
            read += more;
        }
        pages[start - first..end - first].copy_from_slice(bytes);
        self.file.write(first as u64, pages)
    }

    /// The page cache keeps its content, as the real one may if it is in use.
    fn write_durably_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        assert!(self.is_direct, "durable writes are direct writes");
        assert_aligned(bytes, offset);
        let mut disk = self.file.disk();
        let (outcome, ignored) = (disk.count(), disk.ignores_durable_writes);
        let inode = &mut disk.inodes[self.file.inode];
        if outcome.is_ok() && !ignored {
            inode.put_durably(to_usize(offset), bytes);
        } else {
            inode.unsynced_writes.push((to_usize(offset), bytes.to_vec()));
        }
        outcome.map(|()| bytes.len())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.file.size_bytes()
    }

    fn file_system(&self) -> io::Result<FileSystem> {
        Ok(self.file.disk().file_system.expect("files of this type have a file system"))
    }
}

fn assert_aligned(bytes: &[u8], offset: u64) {
    let is_aligned = offset.is_multiple_of(BLOCK as u64) && bytes.len().is_multiple_of(BLOCK);
    assert!(is_aligned && bytes.as_ptr().addr().is_multiple_of(BLOCK), "direct I/O must be aligned");
}
