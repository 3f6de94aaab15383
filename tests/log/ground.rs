//! A log on files that can lose power, the steps that can be taken with it, and what it should hold after them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use metastore::error::Halt;
use metastore::node::log::lossy::LossyFiles;
use metastore::node::log::volatile::VolatileLog;
use metastore::node::log::{FileSystem, Group, Identity, LogStore, Place, Position, Recovered, SegmentLog};
use raft::eraftpb::{Entry, EntryType, HardState};
use tempfile::TempDir;

pub const IDENTITY: Identity = Identity { cluster_id: 7, member_id: 1 };
pub const START: Position = Position { index: 3, term: 1 };
pub const SEGMENT_BYTES: u64 = 2048;

/// What a log is tested on, and how large everything is there.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Over which file system the files are of the operating system's type; None if they keep only what the log relies on.
    pub os_files: Option<FileSystem>,
    /// Whether writes that are to be durable at once are like any other.
    pub ignores_durable_writes: bool,
    pub segment_bytes: u64,
    /// Entries are so many times as large as they are said to be.
    pub scale: usize,
}

/// Files that keep what the log relies on, and no more. Small ones, because each byte of them is of interest.
pub const CONTRACT: Terms =
    Terms { os_files: None, ignores_durable_writes: false, segment_bytes: SEGMENT_BYTES, scale: 1 };

/// The files of the operating system on a disk of the test's own: segments of several blocks, groups for writes past the page
/// cache and others that are too large for them.
pub const OS_FILES: Terms =
    Terms { os_files: Some(FileSystem::EXT4), segment_bytes: SEGMENT_BYTES * SCALE as u64, scale: SCALE, ..CONTRACT };
const SCALE: usize = 32;

impl Terms {
    fn files(&self) -> LossyFiles {
        let files = self.os_files.map_or_else(LossyFiles::new, LossyFiles::under_os_files);
        if self.ignores_durable_writes {
            files.ignore_durable_writes();
        }
        files
    }

    pub fn entry(&self, index: u64, term: u64, bytes: usize) -> Entry {
        entry(index, term, bytes * self.scale)
    }

    pub fn group(&self, first: u64, last: u64, term: u64, bytes: usize) -> Group {
        group(first, last, term, bytes * self.scale)
    }
}

pub fn hard_state(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit, ..HardState::default() }
}

pub fn entry(index: u64, term: u64, bytes: usize) -> Entry {
    let fill = u8::try_from(index % 251).unwrap();
    Entry { index, term, data: Bytes::from(vec![fill; bytes]), ..Entry::default() }
}

/// Entries `first..=last` of one term and size.
pub fn group(first: u64, last: u64, term: u64, bytes: usize) -> Group {
    Group { entries: (first..=last).map(|index| entry(index, term, bytes)).collect(), hard_state: None }
}

pub fn at(index: u64, term: u64) -> Position {
    Position { index, term }
}

/// Anything that can be done to a log.
#[derive(Debug, Clone)]
pub enum Step {
    Append(Group),
    Cut(Position),
    Reset(Position, HardState),
    Installing(Option<Position>),
}

impl Step {
    pub fn take(&self, log: &mut dyn LogStore) -> Result<(), Halt> {
        match self {
            Self::Append(group) => log.append(group),
            Self::Cut(at) => log.cut(*at),
            Self::Reset(at, hard_state) => log.reset(*at, hard_state),
            Self::Installing(snapshot) => log.set_installing(*snapshot),
        }
    }
}

/// What a log should hold after these steps.
pub fn expected(steps: &[Step]) -> Recovered {
    let mut model = VolatileLog::create(IDENTITY, START, &hard_state(1, 3));
    for step in steps {
        step.take(&mut model).unwrap();
    }
    model.open().unwrap()
}

/// A log on files that can lose power.
pub struct Ground {
    _root: TempDir,
    pub files: LossyFiles,
    pub place: Place,
}

impl Ground {
    pub fn empty(terms: Terms) -> Self {
        let root = tempfile::tempdir().unwrap();
        let files = terms.files();
        let segment_bytes = terms.segment_bytes;
        let place = Place { dir: root.path().join("log"), files: Arc::new(files.clone()), segment_bytes };
        Self { _root: root, files, place }
    }

    pub fn on(terms: Terms) -> Self {
        let ground = Self::empty(terms);
        ground.create().unwrap();
        ground
    }

    pub fn new(segment_bytes: u64) -> Self {
        Self::on(Terms { segment_bytes, ..CONTRACT })
    }

    pub fn create(&self) -> Result<(), Halt> {
        SegmentLog::create(&self.place, IDENTITY, START, &hard_state(1, 3))
    }

    /// Opens the log; a torn tail is returned apart from what the log holds.
    pub fn open(&self) -> Result<(SegmentLog, Recovered, bool), Halt> {
        let (log, mut recovered) = SegmentLog::open(&self.place)?;
        let torn = recovered.torn_tail.take().is_some();
        Ok((log, recovered, torn))
    }

    pub fn take(&self, steps: &[Step]) {
        let (mut log, ..) = self.open().unwrap();
        for step in steps {
            step.take(&mut log).unwrap();
        }
    }

    pub fn named(&self, ending: &str) -> Vec<PathBuf> {
        let names = std::fs::read_dir(&self.place.dir).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = names.filter(|path| path.extension().is_some_and(|own| own == ending)).collect();
        paths.sort();
        paths
    }

    pub fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.named("segment").into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }
}

/// Steps that rotate several times, overwrite a conflicting tail, and hold a group larger than a segment.
pub fn a_varied_life() -> Vec<Step> {
    a_varied_life_on(CONTRACT)
}

/// The same, with entries of another size.
pub fn a_varied_life_on(terms: Terms) -> Vec<Step> {
    let mut change = terms.entry(23, 2, 10);
    change.entry_type = EntryType::EntryConfChangeV2;
    change.context = Bytes::from_static(b"context");
    let hard_state = Some(hard_state(2, 6));
    vec![
        Step::Append(terms.group(4, 8, 1, 100)),
        Step::Append(Group { entries: vec![], hard_state: hard_state.clone() }),
        Step::Append(Group { entries: vec![terms.entry(7, 2, 0), terms.entry(8, 2, 300)], hard_state }),
        Step::Append(terms.group(9, 20, 2, 150)),
        Step::Append(terms.group(21, 22, 2, 6000)),
        Step::Append(Group { entries: vec![change], hard_state: None }),
        Step::Append(terms.group(24, 30, 3, 220)),
        Step::Append(terms.group(28, 29, 4, 40)),
    ]
}
