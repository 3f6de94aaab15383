//! Files that wait to become segments.
//!
//! The first sync of bytes in a new part of a file makes the file system write down where they are, which costs more than
//! the bytes. So a segment is filled before it is used: with zeros once, afterwards with whatever it held when it was
//! another segment, since nothing in the log depends on what lies behind the last group. A helper thread does the filling
//! and the renaming, so that the log rarely waits for either.
//!
//! INVARIANTS
//! * A file is a spare only after its new name is durable. Otherwise a crash could show the next segment's bytes under
//!   the old segment's name.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::files::File;
use super::segment::Place;
use crate::error::Halt;

/// How many spares are kept; what a cut frees beyond that is removed.
const KEPT: usize = 3;

const FILL_BYTES: usize = 1 << 20;

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

type Delivery = Result<Vec<Spare>, Halt>;

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
        self.ready.extend(self.place.fulfil(order)?);
        Ok(())
    }

    /// Takes what the helper has delivered, waiting for a spare if told to.
    fn collect(&mut self, wait: bool) -> Result<(), Halt> {
        while let Some(delivery) = self.helper.as_ref().and_then(|helper| helper.receive(wait && self.ready.is_empty()))
        {
            let spares = delivery?;
            self.ordered -= spares.len();
            self.ready.extend(spares);
        }
        Ok(())
    }

    fn new_name(&mut self) -> PathBuf {
        self.next_name += 1;
        self.place.spare_path(self.next_name - 1)
    }
}

impl Place {
    fn fulfil(&self, order: Order) -> Delivery {
        match order {
            Order::Fill(path) => Ok(vec![self.fill(path, self.segment_bytes)?]),
            Order::Recycle(changes) => self.recycle(changes),
        }
    }

    /// Makes a file of zeros. Its name becomes durable when it becomes a segment's.
    pub(super) fn fill(&self, path: PathBuf, bytes: u64) -> Result<Spare, Halt> {
        let mut file = self.files.create(&path).map_err(Halt::io("create", &path))?;
        zero(file.as_mut(), 0, bytes).map_err(Halt::io("fill", &path))?;
        file.sync().map_err(Halt::io("sync", &path))?;
        Ok(Spare { path, file, bytes })
    }

    fn recycle(&self, changes: Vec<(PathBuf, Option<PathBuf>)>) -> Delivery {
        for (old, new) in &changes {
            match new {
                Some(new) => self.files.rename(old, new).map_err(Halt::io("rename", old))?,
                None => self.files.remove(old).map_err(Halt::io("remove", old))?,
            }
        }
        self.sync_dir()?;
        changes.into_iter().filter_map(|(_, new)| new).map(|path| self.open_spare(path)).collect()
    }

    fn open_spare(&self, path: PathBuf) -> Result<Spare, Halt> {
        let file = self.files.open(&path).map_err(Halt::io("open", &path))?;
        let bytes = file.size_bytes().map_err(Halt::io("open", &path))?;
        Ok(Spare { path, file, bytes })
    }
}

/// Overwrites a part of a file with zeros.
pub(super) fn zero(file: &mut dyn File, from: u64, to: u64) -> std::io::Result<()> {
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
    deliveries: Receiver<Delivery>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    fn start(place: &Place) -> Result<Self, Halt> {
        let (orders, inbox) = channel();
        let (outbox, deliveries) = channel();
        let own = place.clone();
        let work = move || {
            for order in inbox {
                let delivery = own.fulfil(order);
                let failed = delivery.is_err();
                if outbox.send(delivery).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("log-spares".to_owned()).spawn(work);
        let thread = thread.map_err(Halt::io("start a helper thread for", &place.dir))?;
        Ok(Self { orders: Some(orders), deliveries, thread: Some(thread) })
    }

    fn send(&self, order: Order) -> Result<(), Halt> {
        let orders = self.orders.as_ref().expect("taken only when dropped");
        // The helper ends before us only by an error, which is the last thing it delivered.
        orders.send(order).map_err(|_| self.deliveries.iter().find_map(Result::err).unwrap_or_else(Self::gone))
    }

    fn receive(&self, wait: bool) -> Option<Delivery> {
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
