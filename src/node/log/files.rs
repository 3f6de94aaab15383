//! The file operations that the log needs, and no others.
//!
//! The log sees files only through these two traits, so a test can stand between it and the disk: see
//! [`lossy`](super::lossy). What an operation promises is what POSIX promises, which is little: written bytes are durable
//! after [`File::sync`], a created, renamed or removed name after [`Files::sync_dir`], and not before.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

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
    /// Writes all bytes at an offset; beyond the end the file grows.
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
        Ok(Box::new(OsFile { file: fs::File::create_new(path)?, syncs: self.syncs }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = fs::File::options().read(true).write(true).open(path)?;
        Ok(Box::new(OsFile { file, syncs: self.syncs }))
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
    syncs: bool,
}

impl File for OsFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.syncs { self.file.sync_data() } else { Ok(()) }
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}
