//! Small direct writes (`O_DIRECT`), each durable when it returns (`RWF_DSYNC`).
//!
//! The log appends a few hundred bytes and waits for the disk, over and over. Through the page cache that is a copy, a search
//! for dirty pages, a write and a flush; a direct write is only the write, and if the disk supports it, the flush is part of it
//! (FUA). Also, an error is returned by the write that failed, not by the next call that happens to ask. Direct writes must
//! consist of whole blocks, from memory aligned to blocks, so the block in which the last write ended is kept in memory.
//!
//! The page cache may still hold data that a direct write has replaced on the disk. So a file that is written with direct writes
//! is also read with direct reads: here, where a write begins inside a block, and at the next start, when the log is recovered.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::handle::Handle;

/// The alignment and granularity of writes. Disks may have smaller blocks; hardly any has larger ones.
pub(super) const BLOCK: usize = 4096;

/// The limit for direct writes. Larger ones gain nothing, because the time the disk takes dominates.
const MAX_WRITE_BYTES: usize = 256 << 10;

/// The size of one read.
const READ_BYTES: usize = 1 << 20;

/// Opens a file for direct I/O.
pub(super) fn open(path: &Path) -> io::Result<fs::File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    fs::File::options().read(true).write(true).custom_flags(flags).open(path)
}

/// Whether an error says that a file does not support direct I/O, or not with this block size. Some file systems return it only
/// when the file is used, not when it is opened.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

/// A file that is open for direct I/O, and the write that is prepared for it.
pub(super) struct Direct<H> {
    file: H,
    /// Holds blocks of the file, from its first address that is aligned to a block on. Empty until the first write.
    buffer: Vec<u8>,
    /// The offset of the first of these blocks in the file.
    block: u64,
    /// How many of their bytes are known to be the file's content.
    known: usize,
    /// The offset in the buffer from which on the bytes are not written yet; None if all are written.
    staged: Option<usize>,
}

impl<H: Handle> Direct<H> {
    pub fn over(file: H) -> Self {
        Self { file, buffer: Vec::new(), block: 0, known: 0, staged: None }
    }

    /// Prepares a write of these bytes at this offset of a file of this size; false if it cannot be a direct write.
    pub fn stage(&mut self, offset: u64, bytes: &[u8], file_bytes: u64) -> io::Result<bool> {
        let before = offset_in_block(offset);
        let end = before + bytes.len();
        let padded = end.next_multiple_of(BLOCK);
        if self.staged.is_some() || padded > MAX_WRITE_BYTES || offset - before as u64 + padded as u64 > file_bytes {
            return Ok(false);
        }
        let buffer = self.load_block(offset)?;
        buffer[before..end].copy_from_slice(bytes);
        buffer[end..padded].fill(0);
        (self.known, self.staged) = (end, Some(before));
        Ok(true)
    }

    /// The content of the block before this offset, for a write through the page cache: the page cache would complete the block
    /// with stale data. Nothing may be staged.
    pub fn head(&mut self, offset: u64) -> io::Result<&[u8]> {
        let before = offset_in_block(offset);
        if before == 0 {
            self.known = 0;
            return Ok(&[]);
        }
        Ok(&self.load_block(offset)?[..before])
    }

    /// Makes the block at this offset the first one in the buffer, with the bytes before the offset filled in.
    fn load_block(&mut self, offset: u64) -> io::Result<&mut [u8]> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; MAX_WRITE_BYTES + BLOCK];
        }
        let (before, known) = (offset_in_block(offset), std::mem::take(&mut self.known));
        let buffer = blocks(&mut self.buffer);
        if self.block + known as u64 == offset && known >= before {
            buffer.copy_within(known - before..known, 0);
        } else if before > 0 {
            let read = self.file.read_at(&mut buffer[..BLOCK], offset - before as u64)?;
            buffer[read.min(before)..before].fill(0); // Beyond the end of the file.
        }
        (self.block, self.known) = (offset - before as u64, before);
        Ok(buffer)
    }

    /// Returns the staged bytes that are not written, from the beginning of their block on, and their offset, for the caller to
    /// write. The content of the buffer counts as unknown afterwards.
    pub fn take_staged(&mut self) -> Option<(u64, &[u8])> {
        let end = std::mem::take(&mut self.known);
        self.staged.take()?;
        Some((self.block, &blocks(&mut self.buffer)[..end]))
    }

    /// Writes the staged bytes. After an error they are still staged.
    pub fn write(&mut self) -> io::Result<()> {
        if self.staged.is_some() {
            let padded = self.known.next_multiple_of(BLOCK);
            let written = self.file.write_durably_at(&blocks(&mut self.buffer)[..padded], self.block)?;
            if written < padded {
                return Err(io::Error::other(format!("only {written} of {padded} bytes were written")));
            }
            self.staged = None;
        }
        Ok(())
    }

    /// All bytes of the file, read from the disk.
    pub fn read_all(&self, file_bytes: u64) -> io::Result<Vec<u8>> {
        let file_bytes = usize::try_from(file_bytes).map_err(io::Error::other)?;
        let mut piece = vec![0; READ_BYTES.min(file_bytes.next_multiple_of(BLOCK)) + BLOCK];
        let piece = blocks(&mut piece);
        let mut all = Vec::with_capacity(file_bytes);
        while all.len() < file_bytes {
            let read = self.file.read_at(piece, all.len() as u64)?;
            all.extend_from_slice(&piece[..read]);
            // A read returns a partial block only at the end of the file.
            if read == 0 || !read.is_multiple_of(BLOCK) {
                break;
            }
        }
        Ok(all)
    }
}

/// The offset within its block.
fn offset_in_block(offset: u64) -> usize {
    usize::try_from(offset % BLOCK as u64).expect("less than a block")
}

/// The aligned blocks in a buffer that is one block larger: where they begin depends on the address of the buffer.
fn blocks(buffer: &mut [u8]) -> &mut [u8] {
    let start = buffer.as_ptr().align_offset(BLOCK);
    let end = start + buffer.len() - BLOCK;
    &mut buffer[start..end]
}
