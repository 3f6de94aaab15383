//! Files that wait to become segments.
//!
//! The first sync of bytes in a new part of a file makes the file system write down where they are, which costs more than
//! the bytes. So a segment is filled before it is used: with zeros once, afterwards with whatever it held when it was
//! another segment, since nothing in the log depends on what lies behind the last group. A helper thread does the filling
//! and the renaming, so that the log rarely waits for either.
//!
//! A spare is a convenience. If none can be filled, because the disk is full, that is logged and tried again once in a while;
//! only the segment that is needed at this moment must be had. A failed sync ends the log even here, unless it only says
//! that there is no room.
//!
//! INVARIANTS
//! * A file is a spare only after its new name is durable. Otherwise a crash could show the next segment's bytes under
//!   the old segment's name.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::files::File;
use super::segment::Place;
use crate::error::Halt;

/// How many spares are kept; what a cut frees beyond that is removed.
const KEPT: usize = 3;

const FILL_BYTES: usize = 1 << 20;

/// A spare that could not be filled is tried again after this. It costs one look at the free space while there is too little.
const RETRY: Duration = Duration::from_secs(1);

/// A file full of bytes that mean nothing.
pub(super) struct Spare {
    pub path: PathBuf,
    pub file: Box<dyn File>,
    pub bytes: u64,
}

enum Order {
    /// Make a new file under this name.
    Fill(PathBuf),
    /// Rename the old segments to the spare names beside them, or remove them.
    Recycle(Vec<(PathBuf, Option<PathBuf>)>),
}

/// What came of an order.
#[derive(Default)]
struct Delivery {
    spares: Vec<Spare>,
    /// So many spares that were ordered are not to be waited for any longer: they are here, or will not come.
    settled: usize,
}

/// The spares of one log, and whoever makes them.
pub(super) struct Spares {
    place: Place,
    ready: VecDeque<Spare>,
    /// Spares that the helper will still deliver.
    ordered: usize,
    next_name: u64,
    /// None if everything is to happen in the caller's own steps.
    helper: Option<Helper>,
}

impl Spares {
    /// Takes over the spares that lie about, and removes those of another size.
    pub fn open(place: &Place, names: &[String]) -> Result<Self, Halt> {
        let mut spares = Self { place: place.clone(), ready: VecDeque::new(), ordered: 0, next_name: 1, helper: None };
        for (number, path) in names.iter().filter_map(|name| place.spare_number(name)) {
            spares.next_name = spares.next_name.max(number + 1);
            let spare = place.open_spare(path)?;
            if spare.bytes == place.segment_bytes && spares.ready.len() < KEPT {
                spares.ready.push_back(spare);
            } else {
                place.files.remove(&spare.path).map_err(Halt::io("remove", &spare.path))?;
            }
        }
        if place.files.allows_helpers() {
            spares.helper = Some(Helper::start(place)?);
        }
        spares.order_if_none()?;
        Ok(spares)
    }

    /// A spare of at least this size.
    pub fn take(&mut self, bytes: u64) -> Result<Spare, Halt> {
        if bytes > self.place.segment_bytes {
            let path = self.new_name();
            return self.place.fill(path, bytes);
        }
        self.collect(false)?;
        if self.ready.is_empty() && self.ordered > 0 {
            self.collect(true)?;
        }
        if let Some(spare) = self.ready.pop_front() {
            return Ok(spare);
        }
        let path = self.new_name();
        self.place.fill(path, self.place.segment_bytes)
    }

    /// Sees to it that there will be a spare when the next segment is needed.
    pub fn order_if_none(&mut self) -> Result<(), Halt> {
        self.collect(false)?;
        if self.ready.is_empty() && self.ordered == 0 {
            let path = self.new_name();
            self.order(Order::Fill(path), 1)?;
        }
        Ok(())
    }

    /// Makes spares of segments that are no longer needed, given in ascending order with their sizes.
    pub fn recycle(&mut self, segments: Vec<(PathBuf, u64)>) -> Result<(), Halt> {
        self.collect(false)?;
        let mut kept = self.ready.len() + self.ordered;
        let mut coming = 0;
        let mut changes = Vec::new();
        for (path, bytes) in segments {
            let keep = kept < KEPT && bytes == self.place.segment_bytes;
            kept += usize::from(keep);
            coming += usize::from(keep);
            changes.push((path, keep.then(|| self.new_name())));
        }
        if changes.is_empty() { Ok(()) } else { self.order(Order::Recycle(changes), coming) }
    }

    fn order(&mut self, order: Order, spares: usize) -> Result<(), Halt> {
        if let Some(helper) = &self.helper {
            self.ordered += spares;
            return helper.send(order);
        }
        let delivery = match order {
            Order::Fill(path) => match self.place.fill_ahead(path.clone())? {
                Ok(spare) => Delivery { spares: vec![spare], settled: 0 },
                Err(error) => {
                    warn_no_spare(&path, &error);
                    Delivery::default()
                }
            },
            Order::Recycle(changes) => self.place.recycle(changes)?,
        };
        self.ready.extend(delivery.spares);
        Ok(())
    }

    /// Takes what the helper has delivered, waiting for a spare if told to.
    fn collect(&mut self, wait: bool) -> Result<(), Halt> {
        loop {
            let waits = wait && self.ready.is_empty() && self.ordered > 0;
            let Some(delivery) = self.helper.as_ref().and_then(|helper| helper.receive(waits)) else { return Ok(()) };
            let Delivery { spares, settled } = delivery?;
            self.ordered -= settled;
            self.ready.extend(spares);
        }
    }

    fn new_name(&mut self) -> PathBuf {
        self.next_name += 1;
        self.place.spare_path(self.next_name - 1)
    }
}

impl Place {
    /// Makes a file of zeros. Its name becomes durable when it becomes a segment's.
    pub(super) fn fill(&self, path: PathBuf, bytes: u64) -> Result<Spare, Halt> {
        let mut file = self.create_filled(&path, bytes).map_err(Halt::io("fill", &path))?;
        file.sync().map_err(Halt::io("sync", &path))?;
        Ok(Spare { path, file, bytes })
    }

    /// The same for a file that nothing needs yet: the inner error says why there is none.
    fn fill_ahead(&self, path: PathBuf) -> Result<io::Result<Spare>, Halt> {
        let bytes = self.segment_bytes;
        // Not by trying: until the failure is noticed and the file is removed, all others would be without room, too.
        if let Some(free) = self.files.free_bytes(&self.dir).ok().filter(|free| *free < bytes) {
            let lack = format!("{free} bytes are free, {bytes} are needed");
            return Ok(Err(io::Error::new(io::ErrorKind::StorageFull, lack)));
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

    /// Gives back the room that an unfinished file takes. If that fails, the next start removes it.
    fn discard(&self, path: &Path) {
        if let Err(error) = self.files.remove(path) {
            tracing::debug!(file = %path.display(), %error, "an unfinished file of the raft log was left");
        }
    }

    fn recycle(&self, changes: Vec<(PathBuf, Option<PathBuf>)>) -> Result<Delivery, Halt> {
        let settled = changes.iter().filter(|(_, new)| new.is_some()).count();
        let mut recycled = Vec::new();
        for (old, new) in changes {
            let Some(new) = new else {
                self.files.remove(&old).map_err(Halt::io("remove", &old))?;
                continue;
            };
            match self.files.rename(&old, &new) {
                Ok(()) => recycled.push(new),
                // Some file systems need room for the new name, but none of them for removing the old one.
                Err(error) if is_full(&error) => self.files.remove(&old).map_err(Halt::io("remove", &old))?,
                Err(error) => return Err(Halt::io("rename", &old)(error)),
            }
        }
        self.sync_dir()?;
        let spares = recycled.into_iter().map(|path| self.open_spare(path)).collect::<Result<_, _>>()?;
        Ok(Delivery { spares, settled })
    }

    fn open_spare(&self, path: PathBuf) -> Result<Spare, Halt> {
        let file = self.files.open(&path).map_err(Halt::io("open", &path))?;
        let bytes = file.size_bytes().map_err(Halt::io("open", &path))?;
        Ok(Spare { path, file, bytes })
    }
}

/// Whether there is no room, on the disk or for this user.
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

/// A thread that fulfils orders in turn. Its first error is its last word.
struct Helper {
    orders: Option<Sender<Order>>,
    deliveries: Receiver<Result<Delivery, Halt>>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    fn start(place: &Place) -> Result<Self, Halt> {
        let (orders, inbox) = channel();
        let (outbox, deliveries) = channel();
        let mut work = Work { place: place.clone(), failed: None };
        let run = move || {
            while let Some(delivery) = work.next(&inbox) {
                let failed = delivery.is_err();
                if outbox.send(delivery).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("log-spares".to_owned()).spawn(run);
        let thread = thread.map_err(Halt::io("start a helper thread for", &place.dir))?;
        Ok(Self { orders: Some(orders), deliveries, thread: Some(thread) })
    }

    fn send(&self, order: Order) -> Result<(), Halt> {
        let orders = self.orders.as_ref().expect("taken only when dropped");
        // The helper ends before us only by an error, which is the last thing it delivered.
        orders.send(order).map_err(|_| self.deliveries.iter().find_map(Result::err).unwrap_or_else(Self::gone))
    }

    fn receive(&self, wait: bool) -> Option<Result<Delivery, Halt>> {
        if wait {
            return Some(self.deliveries.recv().unwrap_or_else(|_| Err(Self::gone())));
        }
        self.deliveries.try_recv().ok()
    }

    fn gone() -> Halt {
        Halt::Refused("the log's helper thread ended".to_owned())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.orders.take();
        if let Some(thread) = self.thread.take() {
            // It panicked, if at all, on an error that its owner has or will never need.
            let _ = thread.join();
        }
    }
}

/// What the helper thread does.
struct Work {
    place: Place,
    /// The spare that could not be filled, and is tried again.
    failed: Option<PathBuf>,
}

impl Work {
    /// Fulfils the next order, or tries again what failed, if there is something new to say; None if nothing is wanted any
    /// more.
    fn next(&mut self, inbox: &Receiver<Order>) -> Option<Result<Delivery, Halt>> {
        loop {
            let order =
                if self.failed.is_some() { inbox.recv_timeout(RETRY) } else { inbox.recv().map_err(Into::into) };
            match order {
                Ok(Order::Fill(path)) => return Some(self.fill(path, 1)),
                Ok(Order::Recycle(changes)) => return Some(self.recycle(changes)),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let path = self.failed.clone().expect("only then there is a timeout");
                    match self.fill(path, 0) {
                        Ok(Delivery { spares, .. }) if spares.is_empty() => (),
                        news => return Some(news),
                    }
                }
            }
        }
    }

    /// Fills a file. `settled` spares were ordered with it: none if this is another attempt.
    fn fill(&mut self, path: PathBuf, settled: usize) -> Result<Delivery, Halt> {
        match self.place.fill_ahead(path.clone())? {
            Ok(spare) => {
                self.no_longer_failed(&path);
                Ok(Delivery { spares: vec![spare], settled })
            }
            Err(error) => {
                if self.failed.replace(path.clone()).is_none() {
                    warn_no_spare(&path, &error);
                }
                Ok(Delivery { spares: Vec::new(), settled })
            }
        }
    }

    fn recycle(&mut self, changes: Vec<(PathBuf, Option<PathBuf>)>) -> Result<Delivery, Halt> {
        let delivery = self.place.recycle(changes)?;
        if let Some(spare) = delivery.spares.first() {
            self.no_longer_failed(&spare.path);
        }
        Ok(delivery)
    }

    fn no_longer_failed(&mut self, spare: &Path) {
        if self.failed.take().is_some() {
            tracing::info!(file = %spare.display(), "the raft log has a spare segment again");
        }
    }
}
