//! FOR TESTS: files that lose power.
//!
//! [`LossyFiles`] works on real files and remembers, for each of them, what a power cut would leave: the bytes at the last
//! sync, and of the writes since then whatever the disk felt like; the names at the last directory sync, and of the changes
//! since then the first few. [`crash`](LossyFiles::crash) puts the directory into that state;
//! [`power_cut`](LossyFiles::power_cut) lays that state down elsewhere, while whoever works here goes on and notices nothing.
//!
//! [`fail_at`](LossyFiles::fail_at) breaks the disk at the n-th operation, so that a test can go through a procedure and
//! crash at each of its steps.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::direct::BLOCK;
use super::files::{File, Files};

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
}

#[derive(Debug, Default, Clone)]
struct Inode {
    durable: Vec<u8>,
    unsynced_writes: Vec<(usize, Vec<u8>)>,
    /// Whether a sync failed. The system may then take the writes for done, so that no later sync writes them.
    sync_failed: bool,
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

    /// Opens the real file behind a name.
    fn handle(&self, path: &Path, inode: usize) -> io::Result<Box<dyn File>> {
        let real = fs::File::options().read(true).write(true).open(path)?;
        Ok(Box::new(LossyFile { disk: Arc::clone(&self.disk), real, inode }))
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
        let known = self.disk().names.get(path).copied();
        let inode = known.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        self.handle(path, inode)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
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

    fn allows_helpers(&self) -> bool {
        false
    }
}

struct LossyFile {
    disk: Arc<Mutex<Disk>>,
    real: fs::File,
    inode: usize,
}

impl LossyFile {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("a test that panics here has failed already")
    }
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
        let mut disk = self.disk();
        let outcome = disk.count();
        let place = usize::try_from(offset).expect("tests write small files");
        let bytes = with_rest_of_block(place, bytes, self.real.metadata()?.len());
        self.real.write_all_at(&bytes, offset)?;
        disk.inodes[self.inode].unsynced_writes.push((place, bytes));
        outcome
    }

    fn sync(&mut self) -> io::Result<()> {
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

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.real.metadata()?.len())
    }
}

impl Inode {
    fn settle(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.unsynced_writes) {
            self.put(offset, &bytes);
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        self.durable.resize(self.durable.len().max(end), 0);
        self.durable[offset..end].copy_from_slice(bytes);
    }

    /// The next process finds all bytes, but those of a failed sync only in the page cache.
    fn restart(&mut self) {
        if std::mem::take(&mut self.sync_failed) {
            self.unsynced_writes.clear();
        }
    }

    /// Of each write there survives, as the dice fall, nothing, all, a beginning, or any of the sectors.
    fn lose(&mut self, dice: Option<&mut Dice>) {
        let writes = std::mem::take(&mut self.unsynced_writes);
        self.sync_failed = false;
        let Some(dice) = dice else { return };
        for (offset, bytes) in writes {
            match dice.below(4) {
                0 => {}
                1 => self.put(offset, &bytes),
                2 => self.put(offset, &bytes[..dice.below(bytes.len() + 1)]),
                _ => self.put_sectors(offset, &bytes, dice),
            }
        }
    }

    fn put_sectors(&mut self, offset: usize, bytes: &[u8], dice: &mut Dice) {
        const SECTOR: usize = 512;
        let end = offset + bytes.len();
        let mut from = offset;
        while from < end {
            let to = (from / SECTOR * SECTOR + SECTOR).min(end);
            if dice.below(2) == 0 {
                self.put(from, &bytes[from - offset..to - offset]);
            }
            from = to;
        }
    }
}

/// Numbers from a seed, by the splitmix64 sequence.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % limit as u64).expect("below a usize")
    }
}
