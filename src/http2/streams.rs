//! The streams of a connection that are open, by ID and by place.
//!
//! A stream's slot is its ID and its place in one number: what comes back from afar finds its stream without a search, and
//! never another one that has taken the place since.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;

use super::{
    guest::HttpHandler, intake::RecvWindow, message::Deframer, request::Request, sender::Outbound, talk::StreamHandler,
};

/// One stream.
pub struct Stream {
    /// Its number on the wire.
    pub id: u32,
    /// What was asked for.
    pub request: Arc<Request>,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// What comes in.
    pub inbound: Inbound,
    /// What goes out.
    pub outbound: Outbound,
    /// Who answers.
    pub handler: Handler,
    /// It waits to be stepped.
    pub is_due: bool,
    /// It waits for room in what is to be sent.
    pub is_stalled: bool,
    /// What it is counted for as long as it is open.
    pub weight: usize,
    /// What its conversation says that it keeps.
    pub kept: usize,
}

/// Who answers a stream, and how far that is.
pub enum Handler {
    /// A unary call whose message has not come.
    AwaitingMessage,
    /// A unary call whose message has come, and waits to be called.
    Ready(ReadyCall),
    /// A unary call that waits for its answer.
    Called {
        /// When its message of so many bytes came.
        since: Instant,
        /// How long it was.
        bytes: usize,
    },
    /// A unary call whose answer is being packed.
    Compressing,
    /// A conversation.
    Stream(Box<StreamHandler>),
    /// Somebody behind the table.
    Http(Box<HttpHandler>),
    /// Nobody any more; what was said is still being sent.
    Answered,
}

/// The message of a unary call.
pub struct ReadyCall {
    /// As it came.
    pub message: Bytes,
    /// Whether it is to be unpacked.
    pub is_packed: bool,
    /// It is a copy: nothing larger is kept for it.
    pub is_copy: bool,
    /// When it came.
    pub since: Instant,
}

/// The receiving side of a stream.
pub struct Inbound {
    /// How much the other side may still send.
    pub recv_window: RecvWindow,
    /// How much has come.
    pub received: u64,
    /// The other side has ended it.
    pub ended: bool,
    /// Messages, or parts of one.
    pub deframer: Deframer,
    /// How much is kept of what has come: there, or by a guest.
    pub held: usize,
}

impl Default for Inbound {
    fn default() -> Self {
        let deframer = Deframer::default();
        Self { recv_window: RecvWindow::for_stream(), received: 0, ended: false, deframer, held: 0 }
    }
}

/// All of a connection.
pub struct Streams {
    entries: Vec<Option<Stream>>,
    free: Vec<u32>,
    by_id: HashMap<u32, u32, MultiplicativeHash>,
    /// The one that was asked for last: frames of a stream come together.
    latest: (u32, u32),
}

impl Default for Streams {
    fn default() -> Self {
        let hash = MultiplicativeHash { factor: RandomState::new().hash_one(0) | 1 };
        Self { entries: Vec::new(), free: Vec::new(), by_id: HashMap::with_hasher(hash), latest: (0, 0) }
    }
}

impl Streams {
    /// How many are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether none is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Adds one; returns its slot.
    pub fn insert(&mut self, stream: Stream) -> u64 {
        let id = stream.id;
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            u32::try_from(self.entries.len() - 1).expect("stream IDs have 31 bits")
        });
        self.entries[index as usize] = Some(stream);
        self.by_id.insert(id, index);
        self.latest = (id, index);
        slot(id, index)
    }

    /// The slot of the stream with this ID.
    pub fn find(&mut self, id: u32) -> Option<u64> {
        if self.latest.0 != id {
            self.latest = (id, *self.by_id.get(&id)?);
        }
        Some(slot(id, self.latest.1))
    }

    /// The stream in a slot, if it is still open.
    pub fn get(&mut self, slot: u64) -> Option<&mut Stream> {
        let (id, index) = parts(slot);
        self.entries.get_mut(index as usize)?.as_mut().filter(|stream| stream.id == id)
    }

    /// Takes a stream out.
    pub fn remove(&mut self, slot: u64) -> Option<Stream> {
        let (id, index) = parts(slot);
        let stream = self.entries.get_mut(index as usize)?.take_if(|stream| stream.id == id)?;
        self.by_id.remove(&id);
        self.latest = (0, 0);
        self.free.push(index);
        if self.by_id.is_empty() && self.entries.len() > 64 {
            (self.entries, self.free) = (Vec::new(), Vec::new()); // A busy hour is over.
        }
        Some(stream)
    }

    /// All of them, with their slots, in the order of their places.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Stream)> {
        let numbered = (0_u32..).zip(&mut self.entries);
        numbered.filter_map(|(index, stream)| stream.as_mut().map(|stream| (slot(stream.id, index), stream)))
    }
}

fn slot(id: u32, index: u32) -> u64 {
    u64::from(id) << 32 | u64::from(index)
}

fn parts(slot: u64) -> (u32, u32) {
    let id = u32::try_from(slot >> 32).expect("the upper half");
    (id, u32::try_from(slot & u64::from(u32::MAX)).expect("the lower half"))
}

/// Hashes an ID by one multiplication. Nobody outside knows the factor, so nobody can choose IDs that collide.
struct MultiplicativeHash {
    factor: u64,
}

struct MultiplicativeHasher {
    factor: u64,
    value: u64,
}

impl BuildHasher for MultiplicativeHash {
    type Hasher = MultiplicativeHasher;

    fn build_hasher(&self) -> MultiplicativeHasher {
        MultiplicativeHasher { factor: self.factor, value: 0 }
    }
}

impl Hasher for MultiplicativeHasher {
    fn finish(&self) -> u64 {
        self.value
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        let product = (self.value ^ u64::from(id)).wrapping_mul(self.factor);
        self.value = product ^ product >> 32;
    }
}
