//! Copies of the database: those that this member gives to others, and those that it is given.
//!
//! ```text
//! raft: "that is no longer in the log" ─▶ keeper: flush, copy ─▶ Offer ─▶ raft: MsgSnapshot ─▶ transport: files
//! transport: files, checked and opened ─▶ Incoming ─▶ raft: accepted ─▶ shell: adopt, reset the log, go on
//! ```
//!
//! A copy says by itself how far it is and who the members were then: it is read from the copy, never from beside it. Every
//! batch of the database is whole, so a copy is a state that this member really was in.
//!
//! INVARIANTS
//! * A snapshot in flight always ends in a report to raft, whatever happens to it.
//! * What lies in a copy's directory is gone when nobody needs it any more; the raft thread never waits for that.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use raft::eraftpb::{ConfState, Message, MessageType};

use super::log::Position;
use crate::{
    error::Halt,
    state::{Electorate, Machine, Members, Progress},
    storage::Engine,
};

/// A directory that is removed with the value.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Whatever will be at this path is ours.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What is there stays.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.0.as_os_str().is_empty() {
            return;
        }
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "cannot remove a copy of the database");
            }
            _ => (),
        }
    }
}

/// A copy of the database that others may be given.
#[derive(Debug)]
pub struct Offer {
    /// How far it is.
    pub at: Position,
    /// Who voted then.
    pub conf_state: ConfState,
    /// Its files.
    pub files: Scratch,
}

impl Offer {
    /// Copies a database into a directory that is not there yet, flushing it first.
    pub fn make(engine: &dyn Engine, path: PathBuf) -> Result<Self, Halt> {
        let files = Scratch::new(path);
        let copy = engine.copy_to(files.path())?;
        let nowhere = || Halt::Refused("a copy of the database does not say how far it is".into());
        let Progress { index, term, .. } = Progress::of(copy.as_ref())?.ok_or_else(nowhere)?;
        let conf_state = conf_state(&Members::read(copy.as_ref())?.electorate());
        Ok(Self { at: Position { index, term }, conf_state, files })
    }
}

/// Who votes and who learns, in raft's words.
#[must_use]
pub fn conf_state(electorate: &Electorate) -> ConfState {
    let Electorate { voters, learners } = electorate.clone();
    ConfState { voters, learners, ..ConfState::default() }
}

/// Where the transport finds the copy that raft wants sent.
#[derive(Debug, Default)]
pub struct Shelf(Mutex<Option<Arc<Offer>>>);

impl Shelf {
    /// Puts a copy there, or takes away the one that is there.
    pub fn put(&self, offer: Option<Arc<Offer>>) {
        *self.0.lock() = offer;
    }

    /// The copy as of an index.
    #[must_use]
    pub fn find(&self, index: u64) -> Option<Arc<Offer>> {
        self.0.lock().clone().filter(|offer| offer.at.index == index)
    }
}

/// Ticks that a copy is kept for after the last member got it: the entries behind it are, too, and it will ask for them.
const KEPT_TICKS: u32 = 300;

/// What the raft thread knows of the copy that it gives away.
#[derive(Debug, Default)]
pub struct OutboundTracker {
    /// Where the transport finds it.
    pub shelf: Arc<Shelf>,
    offer: Option<Arc<Offer>>,
    /// One is being made.
    requested: bool,
    /// Who is being sent one.
    sending: BTreeSet<u64>,
    idle_ticks: u32,
}

impl OutboundTracker {
    /// Nothing yet; what there will be is put on this shelf.
    #[must_use]
    pub fn new(shelf: Arc<Shelf>) -> Self {
        Self { shelf, ..Self::default() }
    }

    /// One is wanted; false if it is being made already.
    pub fn request(&mut self) -> bool {
        !std::mem::replace(&mut self.requested, true)
    }

    /// It could not be made.
    pub fn failed(&mut self) {
        self.requested = false;
    }

    /// It is made. Returns the one before, to be dropped where there is time to remove files.
    pub fn offer(&mut self, offer: Arc<Offer>) -> Option<Arc<Offer>> {
        self.requested = false;
        self.idle_ticks = 0;
        self.shelf.put(Some(offer.clone()));
        self.offer.replace(offer)
    }

    /// These are about to be sent.
    pub fn note_sends(&mut self, messages: &[Message]) {
        let snapshots = messages.iter().filter(|message| message.msg_type == MessageType::MsgSnapshot);
        self.sending.extend(snapshots.map(|message| message.to));
    }

    /// A member got it, or did not.
    pub fn send_ended(&mut self, to: u64) {
        self.sending.remove(&to);
        self.idle_ticks = 0;
    }

    /// Time goes by; returns the copy if it has lain there for long enough, to be dropped where there is time for it.
    pub fn expire(&mut self, ticks: u32) -> Option<Arc<Offer>> {
        if self.offer.is_none() || !self.sending.is_empty() {
            return None;
        }
        self.idle_ticks += ticks;
        if self.idle_ticks < KEPT_TICKS {
            return None;
        }
        self.shelf.put(None);
        self.offer.take()
    }

    /// The lowest index that somebody who is given a copy now will ask for next.
    #[must_use]
    pub fn pinned_index(&self) -> Option<u64> {
        self.offer.as_ref().map(|offer| offer.at.index)
    }
}

/// A copy of another member's database, complete and opened.
pub struct Incoming {
    /// The state that it holds.
    pub machine: Machine,
    /// Makes it this member's database, durably.
    pub adopt: Box<dyn FnOnce() -> Result<(), Halt> + Send>,
}
