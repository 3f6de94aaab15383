//! A log on files that can lose power, steps that change it, and the contents that are expected after them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use metastore::error::Halt;
use metastore::node::log::lossy::LossyFiles;
use metastore::node::log::volatile::VolatileLog;
use metastore::node::log::{Group, Identity, LogStore, Place, Position, Recovered, SegmentLog};
use raft::eraftpb::{Entry, EntryType, HardState};
use tempfile::TempDir;

pub const IDENTITY: Identity = Identity { cluster_id: 7, member_id: 1 };
pub const START: Position = Position { index: 3, term: 1 };
pub const SEGMENT_BYTES: u64 = 2048;

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
            Self::Truncate(at) => log.cut(*at),
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
    pub place: Place,
}

impl TestLog {
    pub fn empty(segment_bytes: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let files = LossyFiles::new();
        let place = Place { dir: root.path().join("log"), files: Arc::new(files.clone()), segment_bytes };
        Self { _root: root, files, place }
    }

    pub fn new(segment_bytes: u64) -> Self {
        let test_log = Self::empty(segment_bytes);
        test_log.create().unwrap();
        test_log
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
    let mut change = entry(23, 2, 10);
    change.entry_type = EntryType::EntryConfChangeV2;
    change.context = Bytes::from_static(b"context");
    vec![
        Step::Append(group(4, 8, 1, 100)),
        Step::Append(Group { entries: vec![], hard_state: Some(hard_state(2, 6)) }),
        Step::Append(Group { entries: vec![entry(7, 2, 0), entry(8, 2, 300)], hard_state: Some(hard_state(2, 6)) }),
        Step::Append(group(9, 20, 2, 150)),
        Step::Append(group(21, 22, 2, 3000)),
        Step::Append(Group { entries: vec![change], hard_state: None }),
        Step::Append(group(24, 30, 3, 220)),
        Step::Append(group(28, 29, 4, 40)),
    ]
}
