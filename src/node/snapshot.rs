//! Snapshots: copies of the database that this member sends to others, and those that it receives.
//!
//! ```text
//! raft: an entry is no longer in the log ─▶ background: flush, copy ─▶ OutboundSnapshot ─▶ raft: MsgSnapshot ─▶ transport: files
//! transport: files, checked and opened ─▶ InboundSnapshot ─▶ raft: accepted ─▶ install: adopt, reset the log, continue
//! ```
//!
//! The index of a copy and its members are always read from the copy itself. Every batch of the database is atomic, so a copy is
//! a state that this member really was in.
//!
//! INVARIANTS
//! * Sending a snapshot always ends in a report to raft, whatever happens to it.
//! * The directory of a copy is removed when the copy is not needed any more; the raft thread never waits for that.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use raft::eraftpb::{ConfState, Message, MessageType};

use crate::raft_log::Position;
use crate::{
    error::Halt,
    state::{AppliedPosition, Machine, Members, VotersAndLearners},
    storage::Engine,
};

/// A directory that is removed when the value is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Takes ownership of this path, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Gives up ownership: the directory is not removed.
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

/// A copy of the database that can be sent to other members.
#[derive(Debug)]
pub struct OutboundSnapshot {
    /// The last entry that is applied in it.
    pub at: Position,
    /// The voters and learners at that entry.
    pub conf_state: ConfState,
    pub files: Scratch,
}

impl OutboundSnapshot {
    /// Flushes a database and copies it into a directory, which must not exist yet.
    pub fn make(engine: &dyn Engine, path: PathBuf) -> Result<Self, Halt> {
        let files = Scratch::new(path);
        let copy = engine.copy_to(files.path())?;
        let no_index = || Halt::InvalidData("a copy of the database has no applied index".into());
        let AppliedPosition { index, term, .. } = AppliedPosition::of(copy.as_ref())?.ok_or_else(no_index)?;
        let conf_state = conf_state(&Members::read(copy.as_ref())?.voters_and_learners());
        Ok(Self { at: Position { index, term }, conf_state, files })
    }
}

/// Voters and learners in raft's type.
#[must_use]
pub fn conf_state(voters_and_learners: &VotersAndLearners) -> ConfState {
    let VotersAndLearners { voters, learners } = voters_and_learners.clone();
    ConfState { voters, learners, ..ConfState::default() }
}

/// Where the transport finds the copy that raft wants to be sent.
#[derive(Debug, Default)]
pub struct OutboundSlot(Mutex<Option<Arc<OutboundSnapshot>>>);

impl OutboundSlot {
    /// Sets the current copy, or removes it.
    pub fn put(&self, offer: Option<Arc<OutboundSnapshot>>) {
        *self.0.lock() = offer;
    }

    /// The current copy, if it has this index.
    #[must_use]
    pub fn find(&self, index: u64) -> Option<Arc<OutboundSnapshot>> {
        self.0.lock().clone().filter(|offer| offer.at.index == index)
    }
}

/// For how many ticks a copy is kept after it was last sent. The entries after it are kept as long, because the member that
/// received it needs them next.
const KEPT_TICKS: u32 = 300;

/// The raft thread's record of the copy that is sent to other members.
#[derive(Debug, Default)]
pub struct OutboundTracker {
    /// Where the transport finds the copy.
    pub outbound_slot: Arc<OutboundSlot>,
    offer: Option<Arc<OutboundSnapshot>>,
    /// Whether a copy is being made.
    requested: bool,
    /// The members that are being sent one.
    sending: BTreeSet<u64>,
    idle_ticks: u32,
}

impl OutboundTracker {
    /// There is no copy yet; future ones are put here.
    #[must_use]
    pub fn new(outbound_slot: Arc<OutboundSlot>) -> Self {
        Self { outbound_slot, ..Self::default() }
    }

    /// Call when a copy is needed; false if one is being made already.
    pub fn request(&mut self) -> bool {
        !std::mem::replace(&mut self.requested, true)
    }

    /// Call when a copy could not be made.
    pub fn failed(&mut self) {
        self.requested = false;
    }

    /// Sets the new copy. Returns the previous one, to be dropped on a thread that may spend time on removing files.
    pub fn offer(&mut self, offer: Arc<OutboundSnapshot>) -> Option<Arc<OutboundSnapshot>> {
        self.requested = false;
        self.idle_ticks = 0;
        self.outbound_slot.put(Some(offer.clone()));
        self.offer.replace(offer)
    }

    /// Records the snapshots among messages that are about to be sent.
    pub fn note_sends(&mut self, messages: &[Message]) {
        let snapshots = messages.iter().filter(|message| message.msg_type == MessageType::MsgSnapshot);
        self.sending.extend(snapshots.map(|message| message.to));
    }

    /// Call when sending to this member has ended, successfully or not.
    pub fn send_ended(&mut self, to: u64) {
        self.sending.remove(&to);
        self.idle_ticks = 0;
    }

    /// Advances time. Returns the copy once it has been unused for long enough, to be dropped on a thread that may spend time on
    /// removing files.
    pub fn expire(&mut self, ticks: u32) -> Option<Arc<OutboundSnapshot>> {
        if self.offer.is_none() || !self.sending.is_empty() {
            return None;
        }
        self.idle_ticks += ticks;
        if self.idle_ticks < KEPT_TICKS {
            return None;
        }
        self.outbound_slot.put(None);
        self.offer.take()
    }

    /// The copy's index: a member that receives it needs the entries after that.
    #[must_use]
    pub fn pinned_index(&self) -> Option<u64> {
        self.offer.as_ref().map(|offer| offer.at.index)
    }
}

/// A copy of another member's database, received completely and opened.
pub struct InboundSnapshot {
    /// The state in it.
    pub machine: Machine,
    /// Makes it this member's database, durably.
    pub adopt: Box<dyn FnOnce() -> Result<(), Halt> + Send>,
}
