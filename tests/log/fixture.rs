//! A log on files that can lose power, steps that change it, and the contents that are expected after them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use metastore::error::Halt;
use metastore::raft_log::fault_files::LossyFiles;
use metastore::raft_log::simulated_log::VolatileLog;
use metastore::raft_log::{FileSystem, Group, Identity, LogLocation, LogStore, Position, Recovered, SegmentLog};
use raft::eraftpb::{Entry, EntryType, HardState};
use tempfile::TempDir;

pub const IDENTITY: Identity = Identity { cluster_id: 7, member_id: 1 };
pub const START: Position = Position { index: 3, term: 1 };
pub const SEGMENT_BYTES: u64 = 2048;

/// The files that a log is tested on, and the sizes of segments and entries.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// The file system that files of the operating system's type are on. None: files that guarantee only what the log relies on.
    pub os_files: Option<FileSystem>,
    /// Whether writes that should be durable when they return are like any other.
    pub ignores_durable_writes: bool,
    pub segment_bytes: u64,
    /// The factor by which entries are larger than the size that is passed to `entry` and `group`.
    pub scale: usize,
}

/// Files that guarantee what the log relies on, and no more. They are small, because tests look at each of their bytes.
pub const CONTRACT: Setup =
    Setup { os_files: None, ignores_durable_writes: false, segment_bytes: SEGMENT_BYTES, scale: 1 };

/// Files of the operating system's type on a simulated disk: segments of several blocks, groups that are written past the page
/// cache, and others that are too large for that.
pub const OS_FILES: Setup =
    Setup { os_files: Some(FileSystem::EXT4), segment_bytes: SEGMENT_BYTES * SCALE as u64, scale: SCALE, ..CONTRACT };
const SCALE: usize = 32;

impl Setup {
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

/// A change to a log.
#[derive(Debug, Clone)]
pub enum Step {
    Append(Group),
    Truncate(Position),
    Reset(Position, HardState),
    Installing(Option<Position>),
}

impl Step {
    pub fn apply(&self, log: &mut dyn LogStore) -> Result<(), Halt> {
        match self {
            Self::Append(group) => log.append(group),
            Self::Truncate(at) => log.truncate(*at),
            Self::Reset(at, hard_state) => log.reset(*at, hard_state),
            Self::Installing(snapshot) => log.set_installing(*snapshot),
        }
    }
}

/// The expected contents of a log after these steps.
pub fn expected(steps: &[Step]) -> Recovered {
    let mut model = VolatileLog::create(IDENTITY, START, &hard_state(1, 3));
    for step in steps {
        step.apply(&mut model).unwrap();
    }
    model.open().unwrap()
}

/// A log on files that can lose power.
pub struct TestLog {
    _root: TempDir,
    pub files: LossyFiles,
    pub place: LogLocation,
}

impl TestLog {
    pub fn empty(setup: Setup) -> Self {
        let root = tempfile::tempdir().unwrap();
        let files = setup.files();
        let segment_bytes = setup.segment_bytes;
        let place = LogLocation { dir: root.path().join("log"), files: Arc::new(files.clone()), segment_bytes };
        Self { _root: root, files, place }
    }

    pub fn with(setup: Setup) -> Self {
        let test_log = Self::empty(setup);
        test_log.create().unwrap();
        test_log
    }

    pub fn new(segment_bytes: u64) -> Self {
        Self::with(Setup { segment_bytes, ..CONTRACT })
    }

    pub fn create(&self) -> Result<(), Halt> {
        SegmentLog::create(&self.place, IDENTITY, START, &hard_state(1, 3))
    }

    /// Opens the log. Whether it had a torn tail is returned separately from its contents.
    pub fn open(&self) -> Result<(SegmentLog, Recovered, bool), Halt> {
        let (log, mut recovered) = SegmentLog::open(&self.place)?;
        let torn = recovered.torn_tail.take().is_some();
        Ok((log, recovered, torn))
    }

    pub fn apply(&self, steps: &[Step]) {
        let (mut log, ..) = self.open().unwrap();
        for step in steps {
            step.apply(&mut log).unwrap();
        }
    }

    pub fn files_with_extension(&self, extension: &str) -> Vec<PathBuf> {
        let names = std::fs::read_dir(&self.place.dir).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = names.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
        paths.sort();
        paths
    }

    pub fn segment_contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.files_with_extension("segment")
            .into_iter()
            .map(|path| (path.clone(), std::fs::read(path).unwrap()))
            .collect()
    }
}

/// Steps that rotate several times, overwrite a conflicting tail, and include a group larger than a segment.
pub fn varied_steps() -> Vec<Step> {
    varied_steps_on(CONTRACT)
}

/// The same, with the entry size of `setup`.
pub fn varied_steps_on(setup: Setup) -> Vec<Step> {
    let mut change = setup.entry(23, 2, 10);
    change.entry_type = EntryType::EntryConfChangeV2;
    change.context = Bytes::from_static(b"context");
    let hard_state = Some(hard_state(2, 6));
    vec![
        Step::Append(setup.group(4, 8, 1, 100)),
        Step::Append(Group { entries: vec![], hard_state: hard_state.clone() }),
        Step::Append(Group { entries: vec![setup.entry(7, 2, 0), setup.entry(8, 2, 300)], hard_state }),
        Step::Append(setup.group(9, 20, 2, 150)),
        Step::Append(setup.group(21, 22, 2, 6000)),
        Step::Append(Group { entries: vec![change], hard_state: None }),
        Step::Append(setup.group(24, 30, 3, 220)),
        Step::Append(setup.group(28, 29, 4, 40)),
    ]
}
