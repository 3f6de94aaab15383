//! Spare files, which will become segments.
//!
//! The first sync of bytes in a new part of a file makes the file system record their location, which costs more than writing
//! the bytes. So a segment file is filled before it is used: a new one with zeros, a recycled one is left with its old content,
//! since nothing in the log depends on what follows the last group. A helper thread fills and renames files, so that the log
//! rarely waits for either.
//!
//! A spare is an optimization. If none can be filled because the disk is full, that is logged and retried from time to time; only
//! a segment that is needed immediately must be created. A failed sync is fatal for the log even here, unless its reason is that
//! the disk is full.
//!
//! INVARIANTS
//! * A file becomes a spare only after its new name is durable. Otherwise, after a crash, the next segment's bytes could be found
//!   under the old segment's name.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::files::File;
use super::location::LogLocation;
use crate::error::Halt;

/// How many spares are kept. Further segments that a truncation frees are removed.
const MAX_SPARES: usize = 3;

const FILL_BYTES: usize = 1 << 20;

/// The interval for retrying to fill a spare. While there is too little space, an attempt only reads the free space.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A preallocated file, whose content is irrelevant.
pub(super) struct Spare {
    pub path: PathBuf,
    pub file: Box<dyn File>,
    pub bytes: u64,
}

enum Job {
    /// Create and fill a new file with this name.
    Fill(PathBuf),
    /// Rename the old segments to the given spare names, or remove those without one.
    Recycle(Vec<(PathBuf, Option<PathBuf>)>),
}

/// The result of a job.
#[derive(Default)]
struct JobResult {
    spares: Vec<Spare>,
    /// The number of requested spares that are no longer pending: they are ready, or could not be made.
    resolved: usize,
}

/// The spares of one log, and the thread that makes them.
pub(super) struct Spares {
    place: LogLocation,
    ready: VecDeque<Spare>,
    /// The number of spares that were requested from the helper thread and are pending.
    pending: usize,
    next_name: u64,
    /// None if everything is done on the caller's thread.
    helper: Option<HelperThread>,
}

impl Spares {
    /// Opens the existing spares, and removes surplus ones and those of another size.
    pub fn open(place: &LogLocation, names: &[String]) -> Result<Self, Halt> {
        let mut spares = Self { place: place.clone(), ready: VecDeque::new(), pending: 0, next_name: 1, helper: None };
        for (number, path) in names.iter().filter_map(|name| place.spare_number(name)) {
            spares.next_name = spares.next_name.max(number + 1);
            let spare = place.open_spare(path)?;
            if spare.bytes == place.segment_bytes && spares.ready.len() < MAX_SPARES {
                spares.ready.push_back(spare);
            } else {
                place.files.remove(&spare.path).map_err(Halt::io("remove", &spare.path))?;
            }
        }
        if place.files.allows_helpers() {
            spares.helper = Some(HelperThread::start(place)?);
        }
        spares.request_if_none()?;
        Ok(spares)
    }

    /// Takes a spare of at least this size.
    pub fn take(&mut self, bytes: u64) -> Result<Spare, Halt> {
        if bytes > self.place.segment_bytes {
            let path = self.new_name();
            return self.place.fill(path, bytes);
        }
        self.collect(false)?;
        if self.ready.is_empty() && self.pending > 0 {
            self.collect(true)?;
        }
        if let Some(spare) = self.ready.pop_front() {
            return Ok(spare);
        }
        let path = self.new_name();
        self.place.fill(path, self.place.segment_bytes)
    }

    /// Requests a spare if none is ready or pending, so that there is one when the next segment is needed.
    pub fn request_if_none(&mut self) -> Result<(), Halt> {
        self.collect(false)?;
        if self.ready.is_empty() && self.pending == 0 {
            let path = self.new_name();
            self.submit(Job::Fill(path), 1)?;
        }
        Ok(())
    }

    /// Makes spares of segments that are no longer needed, which are given in ascending order with their sizes.
    pub fn recycle(&mut self, segments: Vec<(PathBuf, u64)>) -> Result<(), Halt> {
        self.collect(false)?;
        let mut kept = self.ready.len() + self.pending;
        let mut requested = 0;
        let mut changes = Vec::new();
        for (path, bytes) in segments {
            let keep = kept < MAX_SPARES && bytes == self.place.segment_bytes;
            kept += usize::from(keep);
            requested += usize::from(keep);
            changes.push((path, keep.then(|| self.new_name())));
        }
        if changes.is_empty() { Ok(()) } else { self.submit(Job::Recycle(changes), requested) }
    }

    fn submit(&mut self, job: Job, spares: usize) -> Result<(), Halt> {
        if let Some(helper) = &self.helper {
            self.pending += spares;
            return helper.send(job);
        }
        let result = match job {
            Job::Fill(path) => match self.place.fill_ahead(path.clone())? {
                Ok(spare) => JobResult { spares: vec![spare], resolved: 0 },
                Err(error) => {
                    warn_no_spare(&path, &error);
                    JobResult::default()
                }
            },
            Job::Recycle(changes) => self.place.recycle(changes)?,
        };
        self.ready.extend(result.spares);
        Ok(())
    }

    /// Collects the results of the helper thread. Waits for a spare if `wait` is set.
    fn collect(&mut self, wait: bool) -> Result<(), Halt> {
        loop {
            let waits = wait && self.ready.is_empty() && self.pending > 0;
            let Some(result) = self.helper.as_ref().and_then(|helper| helper.receive(waits)) else { return Ok(()) };
            let JobResult { spares, resolved } = result?;
            self.pending -= resolved;
            self.ready.extend(spares);
        }
    }

    fn new_name(&mut self) -> PathBuf {
        self.next_name += 1;
        self.place.spare_path(self.next_name - 1)
    }
}

impl LogLocation {
    /// Creates a file filled with zeros. Its name becomes durable when the file becomes a segment.
    pub(super) fn fill(&self, path: PathBuf, bytes: u64) -> Result<Spare, Halt> {
        let mut file = self.create_filled(&path, bytes).map_err(Halt::io("fill", &path))?;
        file.sync().map_err(Halt::io("sync", &path))?;
        Ok(Spare { path, file, bytes })
    }

    /// The same for a file that is not needed yet: the inner error is not fatal.
    fn fill_ahead(&self, path: PathBuf) -> Result<io::Result<Spare>, Halt> {
        let bytes = self.segment_bytes;
        // Checked beforehand, because a failed attempt would leave no free space for anything else until its file is removed.
        if let Some(free) = self.files.free_bytes(&self.dir).ok().filter(|free| *free < bytes) {
            let reason = format!("{free} bytes are free, {bytes} are needed");
            return Ok(Err(io::Error::new(io::ErrorKind::StorageFull, reason)));
        }
        let mut file = match self.create_filled(&path, bytes) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        match file.sync() {
            Ok(()) => Ok(Ok(Spare { path, file, bytes })),
            Err(error) if is_full(&error) => {
                self.discard(&path);
                Ok(Err(error))
            }
            Err(error) => Err(Halt::io("sync", &path)(error)),
        }
    }

    fn create_filled(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
        let mut file = self.files.create(path)?;
        let filled = zero(file.as_mut(), 0, bytes);
        if filled.is_err() {
            self.discard(path);
        }
        filled.map(|()| file)
    }

    /// Removes an unfinished file, to free its space. If that fails, the next start removes it.
    fn discard(&self, path: &Path) {
        if let Err(error) = self.files.remove(path) {
            tracing::debug!(file = %path.display(), %error, "cannot remove an unfinished file of the raft log");
        }
    }

    fn recycle(&self, changes: Vec<(PathBuf, Option<PathBuf>)>) -> Result<JobResult, Halt> {
        let resolved = changes.iter().filter(|(_, new)| new.is_some()).count();
        let mut recycled = Vec::new();
        for (old, new) in changes {
            let Some(new) = new else {
                self.files.remove(&old).map_err(Halt::io("remove", &old))?;
                continue;
            };
            match self.files.rename(&old, &new) {
                Ok(()) => recycled.push(new),
                // Some file systems need free space for the new name, but none for removing the old one.
                Err(error) if is_full(&error) => self.files.remove(&old).map_err(Halt::io("remove", &old))?,
                Err(error) => return Err(Halt::io("rename", &old)(error)),
            }
        }
        self.sync_dir()?;
        let spares = recycled.into_iter().map(|path| self.open_spare(path)).collect::<Result<_, _>>()?;
        Ok(JobResult { spares, resolved })
    }

    fn open_spare(&self, path: PathBuf) -> Result<Spare, Halt> {
        let file = self.files.open(&path).map_err(Halt::io("open", &path))?;
        let bytes = file.size_bytes().map_err(Halt::io("open", &path))?;
        Ok(Spare { path, file, bytes })
    }
}

/// Whether the disk or the user's disk quota is full.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn warn_no_spare(path: &Path, error: &io::Error) {
    tracing::warn!(
        file = %path.display(),
        %error,
        "cannot prepare a spare segment for the raft log, will try again; this member stops if the disk is still full when \
         the log needs the segment"
    );
}

/// Overwrites a part of a file with zeros.
pub(super) fn zero(file: &mut dyn File, from: u64, to: u64) -> io::Result<()> {
    let step = usize::try_from(to.saturating_sub(from)).unwrap_or(FILL_BYTES).min(FILL_BYTES);
    let zeros = vec![0; step];
    let mut offset = from;
    while offset < to {
        let left = usize::try_from(to - offset).unwrap_or(step).min(step);
        file.write_at(offset, &zeros[..left])?;
        offset += left as u64;
    }
    Ok(())
}

/// A thread that runs jobs one after the other. It ends after its first error.
struct HelperThread {
    jobs: Option<Sender<Job>>,
    results: Receiver<Result<JobResult, Halt>>,
    thread: Option<JoinHandle<()>>,
}

impl HelperThread {
    fn start(place: &LogLocation) -> Result<Self, Halt> {
        let (jobs, queue) = channel();
        let (sender, results) = channel();
        let mut work = HelperState { place: place.clone(), failed: None };
        let run = move || {
            while let Some(result) = work.next(&queue) {
                let failed = result.is_err();
                if sender.send(result).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("log-spares".to_owned()).spawn(run);
        let thread = thread.map_err(Halt::io("start a helper thread for", &place.dir))?;
        Ok(Self { jobs: Some(jobs), results, thread: Some(thread) })
    }

    fn send(&self, job: Job) -> Result<(), Halt> {
        let jobs = self.jobs.as_ref().expect("taken only when dropped");
        // The thread ends before its owner only after an error, which is its last result.
        jobs.send(job).map_err(|_| self.results.iter().find_map(Result::err).unwrap_or_else(Self::gone))
    }

    fn receive(&self, wait: bool) -> Option<Result<JobResult, Halt>> {
        if wait {
            return Some(self.results.recv().unwrap_or_else(|_| Err(Self::gone())));
        }
        self.results.try_recv().ok()
    }

    fn gone() -> Halt {
        Halt::InvalidData("the helper thread of the raft log has ended".to_owned())
    }
}

impl Drop for HelperThread {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            // If it panicked, the owner has the error already, or will not need it.
            let _ = thread.join();
        }
    }
}

/// The state of the helper thread.
struct HelperState {
    place: LogLocation,
    /// A spare that could not be filled, which is retried.
    failed: Option<PathBuf>,
}

impl HelperState {
    /// Runs jobs, and retries what failed, until there is a result to report; None if the owner is gone.
    fn next(&mut self, queue: &Receiver<Job>) -> Option<Result<JobResult, Halt>> {
        loop {
            let job = if self.failed.is_some() {
                queue.recv_timeout(RETRY_INTERVAL)
            } else {
                queue.recv().map_err(Into::into)
            };
            match job {
                Ok(Job::Fill(path)) => return Some(self.fill(path, 1)),
                Ok(Job::Recycle(changes)) => return Some(self.recycle(changes)),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let path = self.failed.clone().expect("there is a timeout only if a spare failed");
                    match self.fill(path, 0) {
                        Ok(JobResult { spares, .. }) if spares.is_empty() => (),
                        result => return Some(result),
                    }
                }
            }
        }
    }

    /// Fills a file. `resolved` is the number of requested spares that this resolves: none if it is a retry.
    fn fill(&mut self, path: PathBuf, resolved: usize) -> Result<JobResult, Halt> {
        match self.place.fill_ahead(path.clone())? {
            Ok(spare) => {
                self.clear_failed(&path);
                Ok(JobResult { spares: vec![spare], resolved })
            }
            Err(error) => {
                if self.failed.replace(path.clone()).is_none() {
                    warn_no_spare(&path, &error);
                }
                Ok(JobResult { spares: Vec::new(), resolved })
            }
        }
    }

    fn recycle(&mut self, changes: Vec<(PathBuf, Option<PathBuf>)>) -> Result<JobResult, Halt> {
        let result = self.place.recycle(changes)?;
        if let Some(spare) = result.spares.first() {
            self.clear_failed(&spare.path);
        }
        Ok(result)
    }

    fn clear_failed(&mut self, spare: &Path) {
        if self.failed.take().is_some() {
            tracing::info!(file = %spare.display(), "the raft log has a spare segment again");
        }
    }
}
