//! The system calls for one open file, and what is known about its file system.
//!
//! [`OsFile`](super::files::OsFile) uses only these few calls. Tests replace them with a disk that loses power, so that the logic
//! above them is tested.

use std::fmt;
use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use rustix::fs::fstatfs;
use rustix::io::{ReadWriteFlags, pwritev2, retry_on_intr};

/// An open file. Whether its calls use the page cache or direct I/O was decided when it was opened.
pub(super) trait Handle: Send {
    /// Reads up to as many bytes as fit into the buffer; none at the end of the file.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all bytes. They are durable after [`sync_data`](Self::sync_data).
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes bytes, which are durable when this returns, and returns how many were written.
    fn write_durably_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;

    /// Makes the written bytes and the file's length durable.
    fn sync_data(&self) -> io::Result<()>;

    fn size_bytes(&self) -> io::Result<u64>;

    fn file_system(&self) -> io::Result<FileSystem>;
}

impl Handle for fs::File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        retry_on_intr(|| rustix::io::pread(self, &mut *bytes, offset)).map_err(Into::into)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn write_durably_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let bytes = [IoSlice::new(bytes)];
        retry_on_intr(|| pwritev2(self, &bytes, offset, ReadWriteFlags::DSYNC)).map_err(Into::into)
    }

    fn sync_data(&self) -> io::Result<()> {
        fs::File::sync_data(self)
    }

    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn file_system(&self) -> io::Result<FileSystem> {
        Ok(u64::try_from(fstatfs(self)?.f_type).map_or(FileSystem::UNKNOWN, FileSystem))
    }
}

/// A file system type, as the number that `fstatfs` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem(pub u64);

impl FileSystem {
    /// An unknown type.
    pub const UNKNOWN: Self = Self(0);

    /// ext4, ext3 and ext2.
    pub const EXT4: Self = Self(0xEF53);

    /// The types that honour `O_DIRECT` and `RWF_DSYNC`. Others accept the flags and may ignore them: overlay, user-space and
    /// network file systems. On those only a sync can be relied upon.
    const WITH_DURABLE_WRITES: [(Self, &'static str); 4] =
        [(Self::EXT4, "ext4"), (Self(0x5846_5342), "xfs"), (Self(0x9123_683E), "btrfs"), (Self(0xF2F5_2010), "f2fs")];

    /// Whether a direct write with `RWF_DSYNC` is durable when it returns.
    pub(super) fn has_durable_writes(self) -> bool {
        self.name().is_some()
    }

    fn name(self) -> Option<&'static str> {
        Self::WITH_DURABLE_WRITES.iter().find(|(known, _)| *known == self).map(|(_, name)| *name)
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => out.write_str(name),
            None => write!(out, "type {:#x}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_four_file_systems_are_trusted_with_durable_writes() {
        for (number, name) in [(0xEF53, "ext4"), (0x5846_5342, "xfs"), (0x9123_683E, "btrfs"), (0xF2F5_2010, "f2fs")] {
            assert!(FileSystem(number).has_durable_writes());
            assert_eq!(FileSystem(number).to_string(), name);
        }
        // tmpfs, overlayfs, NFS, FUSE, CIFS, ZFS.
        for number in [0, 0x0102_1994, 0x794C_7630, 0x6969, 0x6573_5546, 0xFF53_4D42, 0x2FC1_2FC1] {
            assert!(!FileSystem(number).has_durable_writes());
            assert_eq!(FileSystem(number).to_string(), format!("type {number:#x}"));
        }
    }

    #[test]
    fn the_file_system_of_a_file_is_read_from_the_system() {
        let proc = fs::File::open("/proc/self/stat").unwrap();
        assert_eq!(proc.file_system().unwrap(), FileSystem(0x9FA0));
    }
}
