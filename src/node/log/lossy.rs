//! FOR TESTS: files that lose power.
//!
//! [`LossyFiles`] works on real files and remembers, for each of them, what a power cut would leave: the bytes at the last
//! sync, and of the writes since then whatever the disk felt like; the names at the last directory sync, and of the changes
//! since then the first few. [`crash`](LossyFiles::crash) puts the directory into that state;
//! [`power_cut`](LossyFiles::power_cut) lays that state down elsewhere, while whoever works here goes on and notices nothing.
//!
//! What the log holds in its hands is either a file that keeps nothing but the contract of [`File`], or, with
//! [`under_os_files`](LossyFiles::under_os_files), the same type as on the operating system, over a disk that loses power:
//! writes past the page cache are durable at once, if the disk does what it is asked for, and the page cache never hears of
//! them.
//!
//! [`fail_at`](LossyFiles::fail_at) breaks the disk at the n-th operation, so that a test can go through a procedure and
//! crash at each of its steps.

mod inode;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::direct::BLOCK;
use super::files::{File, Files, OsFile};
use super::handle::{FileSystem, Handle};
use inode::{Dice, Inode};

/// What a crash costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The process is gone, the machine is not: nothing, for now.
    Nothing,
    /// Everything that was not synced.
    Unsynced,
    /// Of what was not synced, parts chosen by this seed: sectors of the writes, and the later ones of the name changes.
    Parts(u64),
}

/// Files on a disk that can lose power; a handle to be cloned.
#[derive(Debug, Clone, Default)]
pub struct LossyFiles {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug, Default, Clone)]
struct Disk {
    inodes: Vec<Inode>,
    /// Every name, as the process sees it, and as it would be after a power cut.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    unsynced_changes: Vec<Change>,
    operations: u64,
    fail_at: Option<u64>,
    lies: bool,
    ignores_durable_writes: bool,
    /// Where files lie that are of the operating system's type; None if they are not.
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

    fn make(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Create(path, inode) => {
                names.insert(path.clone(), *inode);
            }
            Self::Rename(from, to) => {
                let inode = names.remove(from).expect("changes become durable in their order");
                names.insert(to.clone(), inode);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

impl LossyFiles {
    /// An intact disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An intact disk with this file system, and the operating system's type of file over it.
    #[must_use]
    pub fn under_os_files(file_system: FileSystem) -> Self {
        let disk = Disk { file_system: Some(file_system), ..Disk::default() };
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    /// Breaks the disk at the n-th operation from now on, counted from 1: it and all later ones fail, and whether that one
    /// has an effect is up to the crash.
    pub fn fail_at(&self, operation: u64) {
        let mut disk = self.disk();
        disk.fail_at = Some(disk.operations + operation);
    }

    /// From now on a sync of a file reports success and does nothing: for tests that must find out.
    pub fn lie_about_syncs(&self) {
        self.disk().lies = true;
    }

    /// From now on a write that is to be durable when it returns is like any other, as where a file system does not know
    /// `RWF_DSYNC`. Syncs are honest.
    pub fn ignore_durable_writes(&self) {
        self.disk().ignores_durable_writes = true;
    }

    /// How many operations that change something there were.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.disk().operations
    }

    /// Loses what the crash costs, and repairs the disk. Files that were open before must not be used any more.
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
        disk.lay_down()
    }

    /// Lays down in another directory what a power cut at this very moment would leave; all files must lie in one. Whoever
    /// works on this disk goes on, and cannot reach its successor.
    pub fn power_cut(&self, loss: Loss, to: &Path) -> io::Result<Self> {
        assert!(loss != Loss::Nothing, "a power cut takes at least what only the process knew");
        let mut disk = self.disk().clone();
        disk.lose(loss);
        let elsewhere = |names: &BTreeMap<PathBuf, usize>| {
            let moved = names.iter().map(|(path, inode)| (to.join(path.file_name().expect("of a file")), *inode));
            moved.collect::<BTreeMap<_, _>>()
        };
        (disk.names, disk.durable_names) = (elsewhere(&disk.names), elsewhere(&disk.durable_names));
        fs::create_dir_all(to)?;
        disk.lay_down()?;
        Ok(Self { disk: Arc::new(Mutex::new(disk)) })
    }

    /// Changes a file's bytes behind everybody's back, as a decaying disk does.
    pub fn rewrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = *disk.names.get(path).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        disk.inodes[inode] = Inode { durable: bytes.to_vec(), ..Inode::default() };
        fs::write(path, bytes)
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("a test that panics here has failed already")
    }

    fn file(&self, path: &Path, inode: usize) -> io::Result<LossyFile> {
        let real = fs::File::options().read(true).write(true).open(path)?;
        Ok(LossyFile { disk: Arc::clone(&self.disk), real, inode })
    }

    /// Opens the real file behind a name.
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

    /// Notes a change of names and whether it is reported as failed.
    fn change(&self, change: Change, really: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut disk = self.disk();
        let outcome = disk.count();
        really()?;
        change.make(&mut disk.names);
        disk.unsynced_changes.push(change);
        outcome
    }
}

impl Disk {
    /// Becomes what the crash leaves, and intact again; false if the real files need no change.
    fn lose(&mut self, loss: Loss) -> bool {
        self.fail_at = None;
        if loss == Loss::Nothing {
            self.inodes.iter_mut().for_each(Inode::restart);
            return false;
        }
        let mut dice = if let Loss::Parts(seed) = loss { Some(Dice(seed)) } else { None };
        let survivors = dice.as_mut().map_or(0, |dice| dice.below(self.unsynced_changes.len() + 1));
        let Self { unsynced_changes, durable_names, names, inodes, .. } = self;
        unsynced_changes.drain(..).take(survivors).for_each(|change| change.make(durable_names));
        for inode in inodes {
            inode.lose(dice.as_mut());
        }
        names.clone_from(durable_names);
        true
    }

    /// Writes every file as it is on the disk.
    fn lay_down(&self) -> io::Result<()> {
        self.names.iter().try_for_each(|(path, inode)| fs::write(path, &self.inodes[*inode].durable))
    }

    /// Counts an operation; `Err` if the disk is broken.
    fn count(&mut self) -> io::Result<()> {
        self.operations += 1;
        match self.fail_at {
            Some(fail_at) if self.operations >= fail_at => Err(io::Error::other("the test broke the disk")),
            Some(_) | None => Ok(()),
        }
    }
}

impl Files for LossyFiles {
    /// Directories are durable at once: the log makes none but its own, whose caller sees to that.
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
        synced.for_each(|change| change.make(durable_names));
        Ok(())
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn allows_helpers(&self) -> bool {
        false
    }
}

/// A file that promises what [`File`] promises, and no more.
struct LossyFile {
    disk: Arc<Mutex<Disk>>,
    real: fs::File,
    inode: usize,
}

impl LossyFile {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("a test that panics here has failed already")
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut disk = self.disk();
        let outcome = disk.count();
        let lies = disk.lies;
        let inode = &mut disk.inodes[self.inode];
        if outcome.is_ok() {
            if !lies {
                inode.settle();
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
        disk.inodes[self.inode].unsynced_writes.push((place(offset), bytes));
        outcome
    }
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).expect("tests write small files")
}

/// Half of all writes clear the rest of their last block, unless the file ends there: both is allowed.
fn with_rest_of_block(place: usize, bytes: &[u8], file_bytes: u64) -> Vec<u8> {
    let (mut bytes, end) = (bytes.to_vec(), place + bytes.len());
    let block_end = end.next_multiple_of(BLOCK);
    if end.is_multiple_of(2) && block_end as u64 <= file_bytes {
        bytes.resize(block_end - place, 0);
    }
    bytes
}

impl File for LossyFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(offset, with_rest_of_block(place(offset), bytes, self.real.metadata()?.len()))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.real.metadata()?.len())
    }

    fn how_it_syncs(&self) -> String {
        "until a test cuts the power".to_owned()
    }
}

/// What the operating system would do with such a file, opened through the page cache or past it.
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
        self.file.disk().inodes[self.file.inode].read(place(offset), &mut bytes[..read]);
        Ok(read)
    }

    /// The page cache holds whole pages: with the bytes it writes what else it believes to be in them.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(!self.is_direct, "past the page cache only durable writes go");
        let (start, end) = (place(offset), place(offset) + bytes.len());
        let size = usize::try_from(self.size_bytes()?).expect("tests write small files").max(end);
        let (first, behind) = (start / BLOCK * BLOCK, end.next_multiple_of(BLOCK).min(size));
        let mut pages = vec![0; behind - first];
        let mut read = 0;
        while let more @ 1.. = FileExt::read_at(&self.file.real, &mut pages[read..], (first + read) as u64)? {
            read += more;
        }
        pages[start - first..end - first].copy_from_slice(bytes);
        self.file.write(first as u64, pages)
    }

    /// The page cache keeps what it has, as it may if it was busy.
    fn write_durably_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        assert!(self.is_direct, "only past the page cache");
        assert_aligned(bytes, offset);
        let mut disk = self.file.disk();
        let (outcome, ignored) = (disk.count(), disk.ignores_durable_writes);
        let inode = &mut disk.inodes[self.file.inode];
        if outcome.is_ok() && !ignored {
            inode.put_durably(place(offset), bytes);
        } else {
            inode.unsynced_writes.push((place(offset), bytes.to_vec()));
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
        Ok(self.file.disk().file_system.expect("files of this type have one"))
    }
}

fn assert_aligned(bytes: &[u8], offset: u64) {
    let is_aligned = offset.is_multiple_of(BLOCK as u64) && bytes.len().is_multiple_of(BLOCK);
    assert!(is_aligned && bytes.as_ptr().addr().is_multiple_of(BLOCK), "the system would refuse this");
}
