//! Small writes past the page cache, each durable when it returns.
//!
//! The log appends a few hundred bytes and waits for the disk, over and over. Through the page cache that is a copy, a search
//! for dirty pages, a write and a flush; like this it is the write alone, and where the disk can, the flush rides on it. An
//! error is told to whoever wrote, too, not to whoever asks first. Such writes are whole blocks from memory that is aligned
//! to them, so the block in which the last write ended is kept.
//!
//! The page cache may keep what such a write has replaced on the disk. So a file that is written like this is read like this,
//! too: here, where a write begins inside a block, and at the next start, where the log is read back.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::handle::Handle;

/// What writes are multiples of. Disks may have smaller blocks, and hardly any has larger ones.
pub(super) const BLOCK: usize = 4096;

/// Larger writes gain nothing: there the disk's own work counts.
const ROOM: usize = 256 << 10;

/// So much is read at once.
const READ_BYTES: usize = 1 << 20;

/// Opens a file past the page cache.
pub(super) fn open(path: &Path) -> io::Result<fs::File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    fs::File::options().read(true).write(true).custom_flags(flags).open(path)
}

/// Whether an error says that a file cannot be used past the page cache, or not in pieces of this size. Some file systems
/// let it be opened so all the same.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

/// A file that is written so, and what it will be given next.
pub(super) struct Direct<H> {
    file: H,
    /// Blocks of the file, from the first multiple of a block's size in memory on. Empty until the first write.
    room: Vec<u8>,
    /// Where the first of them lies in the file.
    block: u64,
    /// So many of their bytes are known.
    known: usize,
    /// From which on they are not written yet; None if all are.
    staged: Option<usize>,
}

impl<H: Handle> Direct<H> {
    pub fn over(file: H) -> Self {
        Self { file, room: Vec::new(), block: 0, known: 0, staged: None }
    }

    /// Takes bytes that are to be written at this offset of a file of this size; false if they are not for this kind of
    /// write.
    pub fn stage(&mut self, offset: u64, bytes: &[u8], file_bytes: u64) -> io::Result<bool> {
        let before = in_block(offset);
        let end = before + bytes.len();
        let padded = end.next_multiple_of(BLOCK);
        if self.staged.is_some() || padded > ROOM || offset - before as u64 + padded as u64 > file_bytes {
            return Ok(false);
        }
        let room = self.begin_at(offset)?;
        room[before..end].copy_from_slice(bytes);
        room[end..padded].fill(0);
        (self.known, self.staged) = (end, Some(before));
        Ok(true)
    }

    /// What the block holds before this offset, for a write that goes through the page cache: it would complete the block
    /// with what it finds there. Nothing may be staged.
    pub fn head(&mut self, offset: u64) -> io::Result<&[u8]> {
        let before = in_block(offset);
        if before == 0 {
            self.known = 0;
            return Ok(&[]);
        }
        Ok(&self.begin_at(offset)?[..before])
    }

    /// Makes the block at this offset the first one here, its bytes before the offset being known.
    fn begin_at(&mut self, offset: u64) -> io::Result<&mut [u8]> {
        if self.room.is_empty() {
            self.room = vec![0; ROOM + BLOCK];
        }
        let (before, known) = (in_block(offset), std::mem::take(&mut self.known));
        let room = blocks(&mut self.room);
        if self.block + known as u64 == offset && known >= before {
            room.copy_within(known - before..known, 0);
        } else if before > 0 {
            let read = self.file.read_at(&mut room[..BLOCK], offset - before as u64)?;
            room[read.min(before)..before].fill(0); // Behind the end of the file.
        }
        (self.block, self.known) = (offset - before as u64, before);
        Ok(room)
    }

    /// What was staged and is not written, from the beginning of its block on, and where it belongs. Somebody else writes, so
    /// nothing is known of the file now.
    pub fn take_back(&mut self) -> Option<(u64, &[u8])> {
        let end = std::mem::take(&mut self.known);
        self.staged.take()?;
        Some((self.block, &blocks(&mut self.room)[..end]))
    }

    /// Writes what was staged. After an error it is still staged.
    pub fn write(&mut self) -> io::Result<()> {
        if self.staged.is_some() {
            let padded = self.known.next_multiple_of(BLOCK);
            let written = self.file.write_durably_at(&blocks(&mut self.room)[..padded], self.block)?;
            if written < padded {
                return Err(io::Error::other(format!("the disk took {written} of {padded} bytes")));
            }
            self.staged = None;
        }
        Ok(())
    }

    /// All bytes of the file, as they are on the disk.
    pub fn read_all(&self, file_bytes: u64) -> io::Result<Vec<u8>> {
        let file_bytes = usize::try_from(file_bytes).map_err(io::Error::other)?;
        let mut piece = vec![0; READ_BYTES.min(file_bytes.next_multiple_of(BLOCK)) + BLOCK];
        let piece = blocks(&mut piece);
        let mut all = Vec::with_capacity(file_bytes);
        while all.len() < file_bytes {
            let read = self.file.read_at(piece, all.len() as u64)?;
            all.extend_from_slice(&piece[..read]);
            // Less than whole blocks comes only at the end.
            if read == 0 || !read.is_multiple_of(BLOCK) {
                break;
            }
        }
        Ok(all)
    }
}

/// How far behind the beginning of a block an offset lies.
fn in_block(offset: u64) -> usize {
    usize::try_from(offset % BLOCK as u64).expect("less than a block")
}

/// The whole blocks in memory that has a block more: where they begin depends on where it was allocated.
fn blocks(room: &mut [u8]) -> &mut [u8] {
    let start = room.as_ptr().align_offset(BLOCK);
    let end = start + room.len() - BLOCK;
    &mut room[start..end]
}
