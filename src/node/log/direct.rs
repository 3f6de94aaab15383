//! Small writes past the page cache, each durable when it returns.
//!
//! The log appends a few hundred bytes and waits for the disk, over and over. Through the page cache that is a copy, a search
//! for dirty pages, a write and a flush; like this it is the write alone, and where the disk can, the flush rides on it. An
//! error is told to whoever wrote, too, not to whoever asks first. Such writes are whole blocks from memory that is aligned
//! to them, so the block in which the last write ended is kept.

use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::{ReadWriteFlags, pwritev2, retry_on_intr};

/// What writes are multiples of. Disks may have smaller blocks, and hardly any has larger ones.
pub(super) const BLOCK: usize = 4096;

/// Larger writes gain nothing: there the disk's own work counts.
const ROOM: usize = 256 << 10;

/// A file that is written so, and what it will be given next.
pub(super) struct Direct {
    file: fs::File,
    /// Blocks of the file, from the first multiple of a block's size in memory on. Empty until the first write.
    room: Vec<u8>,
    /// Where the first of them lies in the file.
    block: u64,
    /// So many of their bytes are known.
    known: usize,
    /// From which on they are not written yet; None if all are.
    staged: Option<usize>,
}

impl Direct {
    /// None where files cannot be written so.
    pub fn open(path: &Path) -> Option<Self> {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let file = fs::File::options().write(true).custom_flags(flags).open(path);
        let refused =
            |error: &io::Error| tracing::debug!(path = %path.display(), %error, "no writes past the page cache");
        Some(Self::over(file.inspect_err(refused).ok()?))
    }

    pub(super) fn over(file: fs::File) -> Self {
        Self { file, room: Vec::new(), block: 0, known: 0, staged: None }
    }

    /// Takes bytes that are to be written at this offset of a file of this size; false if they are not for this kind of
    /// write. `read` reads what lies in their first block before them.
    pub fn stage(
        &mut self,
        offset: u64,
        bytes: &[u8],
        file_bytes: u64,
        read: impl FnOnce(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<bool> {
        let before = usize::try_from(offset % BLOCK as u64).expect("less than a block");
        let block = offset - before as u64;
        let end = before + bytes.len();
        let padded = end.next_multiple_of(BLOCK);
        if self.staged.is_some() || padded > ROOM || block + padded as u64 > file_bytes {
            return Ok(false);
        }
        if self.room.is_empty() {
            self.room = vec![0; ROOM + BLOCK];
        }
        let room = blocks(&mut self.room);
        if self.block + self.known as u64 == offset && self.known >= before {
            room.copy_within(self.known - before..self.known, 0);
        } else {
            read(&mut room[..before], block)?;
        }
        room[before..end].copy_from_slice(bytes);
        room[end..padded].fill(0);
        (self.block, self.known, self.staged) = (block, end, Some(before));
        Ok(true)
    }

    /// What was staged and is not written, and where it belongs. Somebody else writes, so nothing is known of the file now.
    pub fn take_back(&mut self) -> Option<(u64, &[u8])> {
        let end = std::mem::take(&mut self.known);
        let from = self.staged.take()?;
        Some((self.block + from as u64, &blocks(&mut self.room)[from..end]))
    }

    /// Writes what was staged. After an error it is still staged.
    pub fn write(&mut self) -> io::Result<()> {
        if self.staged.is_some() {
            let padded = self.known.next_multiple_of(BLOCK);
            let whole = &blocks(&mut self.room)[..padded];
            let whole = [IoSlice::new(whole)];
            let written = retry_on_intr(|| pwritev2(&self.file, &whole, self.block, ReadWriteFlags::DSYNC))?;
            if written < padded {
                return Err(io::Error::other(format!("the disk took {written} of {padded} bytes")));
            }
            self.staged = None;
        }
        Ok(())
    }
}

/// The blocks in it: where they begin depends on where it was allocated.
fn blocks(room: &mut [u8]) -> &mut [u8] {
    let start = room.as_ptr().align_offset(BLOCK);
    &mut room[start..start + ROOM]
}
