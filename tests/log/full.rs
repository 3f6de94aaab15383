//! A full disk. Spare segments are optional: only the segment that is needed right now must be created.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use metastore::error::Halt;
use metastore::raft_log::files::{File, Files, OsFiles};
use metastore::raft_log::{LogLocation, SegmentLog};
use tempfile::TempDir;
use test_support::{eventually, time_limit};

use crate::fixture::{IDENTITY, START, Step, at, expected, group, hard_state};

const SEGMENT_BYTES: u64 = 8192;

/// The operating system's files, on a disk that can be full.
#[derive(Clone)]
struct Disk {
    files: OsFiles,
    is_full: Arc<AtomicBool>,
    /// Whether `free_bytes` reports a full disk; otherwise only writes fail.
    reports_full: bool,
    /// How often an operation was refused because the disk is full, or was not attempted for that reason.
    refused: Arc<AtomicUsize>,
}

impl Disk {
    fn new(reports_full: bool) -> Self {
        Self { files: OsFiles { syncs: true }, is_full: Arc::default(), reports_full, refused: Arc::default() }
    }

    fn is_full(&self) -> bool {
        let is_full = self.is_full.load(Ordering::SeqCst);
        if is_full {
            self.refused.fetch_add(1, Ordering::SeqCst);
        }
        is_full
    }

    fn check_space(&self) -> io::Result<()> {
        if self.is_full() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn set_full(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::SeqCst);
    }

    /// Waits until another operation is refused.
    fn await_refusal(&self) {
        let before = self.refused.load(Ordering::SeqCst);
        eventually("a background fill is refused", time_limit(), || self.refused.load(Ordering::SeqCst) > before);
    }
}

impl Files for Disk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.files.create_dir(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(Box::new(OnDisk { file: self.files.create(path)?, disk: self.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(Box::new(OnDisk { file: self.files.open(path)?, disk: self.clone() }))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.files.read(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.files.list(dir)
    }

    /// A rename to a segment's name, which has the same length, always works; for another name the directory may have to grow.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if to.extension().is_some_and(|extension| extension == "spare") {
            self.check_space()?;
        }
        self.files.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.files.sync_dir(dir)
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(if self.reports_full && self.is_full() { SEGMENT_BYTES - 1 } else { u64::MAX })
    }
}

struct OnDisk {
    file: Box<dyn File>,
    disk: Disk,
}

impl File for OnDisk {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset + bytes.len() as u64 > self.file.size_bytes()? {
            self.disk.check_space()?;
        }
        self.file.write_at(offset, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.file.size_bytes()
    }

    fn sync_method(&self) -> String {
        self.file.sync_method()
    }
}

/// A log on such a disk, and the steps that were applied to it.
struct LogOnDisk {
    root: TempDir,
    disk: Disk,
    log: Option<SegmentLog>,
    steps: Vec<Step>,
    next: u64,
}

impl LogOnDisk {
    /// A log of several segments without a spare one, on a disk that has just become full.
    fn on_full_disk(reports_full: bool) -> Self {
        let (root, disk) = (tempfile::tempdir().unwrap(), Disk::new(reports_full));
        let mut log = Self { root, disk, log: None, steps: Vec::new(), next: START.index + 1 };
        SegmentLog::create(&log.place(), IDENTITY, START, &hard_state(1, 3)).unwrap();
        log.open();
        log.append_until(|log| log.count("segment") == 3);
        eventually("there is a spare segment", time_limit(), || log.count("spare") > 0);
        log.open(); // Takes over the spare segment that the helper thread has made.
        log.disk.set_full(true);
        log.append_until(|log| log.count("spare") == 0);
        log
    }

    fn place(&self) -> LogLocation {
        LogLocation {
            dir: self.root.path().join("log"),
            files: Arc::new(self.disk.clone()),
            segment_bytes: SEGMENT_BYTES,
        }
    }

    fn open(&mut self) {
        self.log = None;
        let (log, recovered) = SegmentLog::open(&self.place()).unwrap();
        assert_eq!(recovered, expected(&self.steps));
        self.log = Some(log);
    }

    fn try_step(&mut self, step: Step) -> Result<(), Halt> {
        step.apply(self.log.as_mut().unwrap())?;
        self.steps.push(step);
        Ok(())
    }

    fn try_append(&mut self) -> Result<(), Halt> {
        self.next += 1;
        self.try_step(Step::Append(group(self.next - 1, self.next - 1, 1, 500)))
    }

    fn append(&mut self) {
        self.try_append().unwrap();
    }

    /// Appends as often as it takes, which is less often than a few segments have space for.
    fn append_until(&mut self, is_done: impl Fn(&Self) -> bool) {
        for _ in 0..100 {
            if is_done(self) {
                return;
            }
            self.append();
        }
        panic!("100 appends do not suffice: {} segments, {} spare", self.count("segment"), self.count("spare"));
    }

    fn count(&self, extension: &str) -> usize {
        let names = std::fs::read_dir(self.root.path().join("log")).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.extension().is_some_and(|found| found == extension)).count()
    }
}

/// A process used to end at the next truncation, which needs no space, or at the next start.
#[test]
fn operations_that_need_no_space_work_without_a_spare_segment() {
    for reports_full in [true, false] {
        let mut log = LogOnDisk::on_full_disk(reports_full);
        log.disk.await_refusal();
        log.append();
        log.try_step(Step::Truncate(at(START.index + 1, 1))).unwrap();
        log.open();
        log.disk.await_refusal();
        log.append();
        let last = log.next - 1;
        log.try_step(Step::Truncate(at(last, 1))).unwrap();
        log.open();
        assert_eq!((log.count("segment"), log.count("spare")), (1, 0), "truncated segments are removed");

        log.disk.set_full(false);
        eventually("there is a spare segment once there is space", time_limit(), || log.count("spare") == 1);
        let segments = log.count("segment");
        log.append_until(|log| log.count("segment") > segments);
        log.open();
    }
}

#[test]
fn without_space_for_a_needed_segment_an_append_fails() {
    for reports_full in [true, false] {
        let mut log = LogOnDisk::on_full_disk(reports_full);
        let refused = (0..100).find_map(|_| log.try_append().err()).expect("there is no space for so many");
        assert!(refused.to_string().contains("cannot fill"), "{refused}");
        log.open();
    }
}
