//! Where a log is, and what its files are called.

use std::path::PathBuf;
use std::sync::Arc;

use super::files::{Files, OsFiles};
use crate::error::Halt;

/// The location of a log, and the size of its files.
#[derive(Clone)]
pub struct LogLocation {
    /// The directory, which is for this log alone.
    pub dir: PathBuf,
    /// Access to the files.
    pub files: Arc<dyn Files>,
    /// The size of a segment.
    pub segment_bytes: u64,
}

impl LogLocation {
    /// The default size of a segment.
    pub const SEGMENT_BYTES: u64 = 16 << 20;

    /// A directory of the operating system, with segments of the default size.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), files: Arc::new(OsFiles { syncs: true }), segment_bytes: Self::SEGMENT_BYTES }
    }

    /// The same location without syncs.
    #[must_use]
    pub fn without_syncs(self) -> Self {
        Self { files: Arc::new(OsFiles { syncs: false }), ..self }
    }

    pub(super) fn segment_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}.segment"))
    }

    pub(super) fn spare_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}.spare"))
    }

    pub(super) fn spare_number(&self, name: &str) -> Option<(u64, PathBuf)> {
        let number = name.strip_suffix(".spare")?.parse().ok()?;
        Some((number, self.spare_path(number)))
    }

    pub(super) fn names(&self) -> Result<Vec<String>, Halt> {
        let mut names = self.files.list(&self.dir).map_err(Halt::io("list", &self.dir))?;
        names.sort_unstable();
        Ok(names)
    }

    pub(super) fn segments(names: &[String]) -> Vec<u64> {
        names.iter().filter_map(|name| name.strip_suffix(".segment")?.parse().ok()).collect()
    }

    pub(super) fn sync_dir(&self) -> Result<(), Halt> {
        self.files.sync_dir(&self.dir).map_err(Halt::io("sync", &self.dir))
    }
}

/// A segment file.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub number: u64,
    pub bytes: u64,
    /// The highest index of any entry in it; 0 if it has none that could still be needed.
    pub last_index: u64,
}
