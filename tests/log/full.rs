//! A disk without room: spare segments are a convenience, so only the segment that is needed at this moment must be had.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use metastore::error::Halt;
use metastore::node::log::files::{File, Files, OsFiles};
use metastore::node::log::{Place, SegmentLog};
use tempfile::TempDir;

use crate::ground::{IDENTITY, START, Step, at, expected, group, hard_state};

const PATIENCE: Duration = Duration::from_mins(1);
const SEGMENT_BYTES: u64 = 8192;

/// The operating system's files, on a disk that can be full.
#[derive(Clone)]
struct Disk {
    files: OsFiles,
    is_full: Arc<AtomicBool>,
    /// Whether it says so when it is asked, or only when it is written to.
    tells: bool,
    /// How often something was refused for want of room, or was not even tried.
    refused: Arc<AtomicUsize>,
}

impl Disk {
    fn new(tells: bool) -> Self {
        Self { files: OsFiles { syncs: true }, is_full: Arc::default(), tells, refused: Arc::default() }
    }

    fn is_full(&self) -> bool {
        let is_full = self.is_full.load(Ordering::SeqCst);
        if is_full {
            self.refused.fetch_add(1, Ordering::SeqCst);
        }
        is_full
    }

    fn room(&self) -> io::Result<()> {
        if self.is_full() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn set_full(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::SeqCst);
    }

    /// Waits until something more was refused.
    fn await_refusal(&self) {
        let before = self.refused.load(Ordering::SeqCst);
        eventually("a background fill without room", || self.refused.load(Ordering::SeqCst) > before);
    }
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "there was to be {what}");
        std::thread::sleep(Duration::from_millis(5));
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

    /// The segment's own name is of the same length; a directory may have to grow for another.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if to.extension().is_some_and(|ending| ending == "spare") {
            self.room()?;
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
        Ok(if self.tells && self.is_full() { SEGMENT_BYTES - 1 } else { u64::MAX })
    }
}

struct OnDisk {
    file: Box<dyn File>,
    disk: Disk,
}

impl File for OnDisk {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset + bytes.len() as u64 > self.file.size_bytes()? {
            self.disk.room()?;
        }
        self.file.write_at(offset, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }

    fn size_bytes(&self) -> io::Result<u64> {
        self.file.size_bytes()
    }

    fn how_it_syncs(&self) -> String {
        self.file.how_it_syncs()
    }
}

/// A log on such a disk, and all that was done with it.
struct Life {
    root: TempDir,
    disk: Disk,
    log: Option<SegmentLog>,
    steps: Vec<Step>,
    next: u64,
}

impl Life {
    /// A log that fills several segments, on a disk that has just become full; no spare is left.
    fn in_want(tells: bool) -> Self {
        let (root, disk) = (tempfile::tempdir().unwrap(), Disk::new(tells));
        let mut life = Self { root, disk, log: None, steps: Vec::new(), next: START.index + 1 };
        SegmentLog::create(&life.place(), IDENTITY, START, &hard_state(1, 3)).unwrap();
        life.open();
        while life.count("segment") < 3 {
            life.append();
        }
        eventually("a spare segment", || life.count("spare") > 0);
        life.open(); // Which takes over what the helper thread has made.
        life.disk.set_full(true);
        while life.count("spare") > 0 {
            life.append();
        }
        life
    }

    fn place(&self) -> Place {
        Place { dir: self.root.path().join("log"), files: Arc::new(self.disk.clone()), segment_bytes: SEGMENT_BYTES }
    }

    fn open(&mut self) {
        self.log = None;
        let (log, recovered) = SegmentLog::open(&self.place()).unwrap();
        assert_eq!(recovered, expected(&self.steps));
        self.log = Some(log);
    }

    fn try_to(&mut self, step: Step) -> Result<(), Halt> {
        step.take(self.log.as_mut().unwrap())?;
        self.steps.push(step);
        Ok(())
    }

    fn try_to_append(&mut self) -> Result<(), Halt> {
        self.next += 1;
        self.try_to(Step::Append(group(self.next - 1, self.next - 1, 1, 500)))
    }

    fn append(&mut self) {
        self.try_to_append().unwrap();
    }

    fn count(&self, ending: &str) -> usize {
        let names = std::fs::read_dir(self.root.path().join("log")).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.extension().is_some_and(|own| own == ending)).count()
    }
}

/// The process ended at the next truncation, which needs no room, or at the next start.
#[test]
fn what_needs_no_room_goes_on_without_a_spare_segment() {
    for tells in [true, false] {
        let mut life = Life::in_want(tells);
        life.disk.await_refusal();
        life.append();
        life.try_to(Step::Cut(at(START.index + 1, 1))).unwrap();
        life.open();
        life.disk.await_refusal();
        life.append();
        let last = life.next - 1;
        life.try_to(Step::Cut(at(last, 1))).unwrap();
        life.open();
        assert_eq!((life.count("segment"), life.count("spare")), (1, 0), "what was cut off is gone");

        life.disk.set_full(false);
        eventually("a spare segment once there is room", || life.count("spare") == 1);
        let segments = life.count("segment");
        while life.count("segment") == segments {
            life.append();
        }
        life.open();
    }
}

#[test]
fn a_segment_that_is_needed_must_be_had() {
    for tells in [true, false] {
        let mut life = Life::in_want(tells);
        let refused = (0..100).find_map(|_| life.try_to_append().err()).expect("no room for so many");
        assert!(refused.to_string().contains("cannot fill"), "{refused}");
        life.open();
    }
}
