//! The open streams of a connection, by ID and by index.
//!
//! A slot combines a stream's ID and its index in one number. A response from another thread finds its stream by slot without a
//! search, and never reaches a later stream that reuses the index.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
    sync::Arc,
    time::Instant,
};

use super::{message::Deframer, recv_window::RecvWindow, request::Request, sender::Outbound};

/// An open stream, and `H`, what handles it.
pub struct Stream<H> {
    pub id: u32,
    pub request: Arc<Request>,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// The receiving side.
    pub inbound: Inbound,
    /// The sending side.
    pub outbound: Outbound,
    /// What handles the stream.
    pub handler: H,
    /// It is in the queue of streams to be stepped.
    pub is_due: bool,
    /// It waits until there is room for more output.
    pub is_stalled: bool,
    /// How many bytes it is counted for while it is open.
    pub weight: usize,
    /// How many bytes its conversation says that it keeps.
    pub kept: usize,
}

pub struct Inbound {
    /// How much the client may still send.
    pub recv_window: RecvWindow,
    /// How many bytes of data have arrived.
    pub received: u64,
    /// The client has ended the stream.
    pub ended: bool,
    /// Received messages, or parts of one.
    pub deframer: Deframer,
    /// How many received bytes are kept, here or by an HTTP handler.
    pub held: usize,
}

impl Default for Inbound {
    fn default() -> Self {
        let deframer = Deframer::default();
        Self { recv_window: RecvWindow::for_stream(), received: 0, ended: false, deframer, held: 0 }
    }
}

pub struct Streams<H> {
    entries: Vec<Option<Stream<H>>>,
    free: Vec<u32>,
    by_id: HashMap<u32, u32, MultiplicativeHash>,
    /// The last stream that was looked up: consecutive frames tend to belong to the same stream.
    latest: (u32, u32),
}

impl<H> Default for Streams<H> {
    fn default() -> Self {
        let hash = MultiplicativeHash { factor: RandomState::new().hash_one(0) | 1 };
        Self { entries: Vec::new(), free: Vec::new(), by_id: HashMap::with_hasher(hash), latest: (0, 0) }
    }
}

impl<H> Streams<H> {
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Adds a stream; returns its slot.
    pub fn insert(&mut self, stream: Stream<H>) -> u64 {
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
    pub fn get(&mut self, slot: u64) -> Option<&mut Stream<H>> {
        let (id, index) = parts(slot);
        self.entries.get_mut(index as usize)?.as_mut().filter(|stream| stream.id == id)
    }

    /// Removes a stream.
    pub fn remove(&mut self, slot: u64) -> Option<Stream<H>> {
        let (id, index) = parts(slot);
        let stream = self.entries.get_mut(index as usize)?.take_if(|stream| stream.id == id)?;
        self.by_id.remove(&id);
        self.latest = (0, 0);
        self.free.push(index);
        if self.by_id.is_empty() && self.entries.len() > 64 {
            (self.entries, self.free) = (Vec::new(), Vec::new()); // Release the memory of a busy period.
        }
        Some(stream)
    }

    /// All streams with their slots, in the order of their indexes.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Stream<H>)> {
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

/// Hashes an ID by one multiplication with a secret random factor, so that a client cannot choose IDs that collide.
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
