//! The ring: the most recent events, in memory.
//!
//! The apply thread appends and never waits; when the ring is full, the oldest revisions are evicted. A reader that needs evicted
//! revisions reads the history table instead.
//!
//! INVARIANTS
//! * Events ascend, and the ring holds every event from revision `lowest` on.
//! * The total bytes of all events stay within the limit.

use std::collections::VecDeque;

use crate::mvcc::{Event, history::Chunk};

/// The memory of an event beside its record: the event itself, and the overhead of the record's allocation.
const EVENT_OVERHEAD_BYTES: usize = size_of::<Event>() + 48;

/// The newest events.
pub struct Ring {
    events: VecDeque<Event>,
    bytes: usize,
    max_bytes: usize,
    lowest: i64,
}

impl Ring {
    /// The total bytes of all events.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// An empty ring for the events after `head`.
    #[must_use]
    pub fn new(head: i64, max_bytes: usize) -> Self {
        Self { events: VecDeque::new(), bytes: 0, max_bytes, lowest: head + 1 }
    }

    /// The lowest revision from which on the ring is complete.
    #[must_use]
    pub fn lowest(&self) -> i64 {
        self.lowest
    }

    /// Adds all events up to `head`.
    pub fn append(&mut self, events: Vec<Event>, head: i64) {
        for event in events {
            // The key is a slice of the whole request. Replace it by a slice of the record, so that the request can be freed.
            let event =
                Event { previous: event.previous, ..Event::of_record(event.revision, event.deletion, event.record) };
            self.bytes += cost(&event);
            self.events.push_back(event);
            // Evict after each event, so that the ring does not grow to the size of a revision with a million events.
            while self.bytes > self.max_bytes {
                let evicted = self.events.pop_front().expect("an empty ring takes no bytes");
                self.bytes -= cost(&evicted);
                self.lowest = evicted.revision.main + 1;
            }
        }
        // A revision without its first events is useless.
        while self.events.front().is_some_and(|event| event.revision.main < self.lowest) {
            self.bytes -= self.events.pop_front().map_or(0, |event| cost(&event));
        }
        assert!(self.lowest <= head + 1, "only revisions up to the head can be evicted");
    }

    /// About `limit` events of the revisions `from` to `to`, in whole revisions; None if some have been evicted.
    #[must_use]
    pub fn read(&self, from: i64, to: i64, limit: usize) -> Option<Chunk> {
        if from < self.lowest {
            return None;
        }
        let first = self.events.partition_point(|event| event.revision.main < from);
        let mut events: Vec<Event> = Vec::with_capacity(limit.min(self.events.len() - first));
        let mut through = to;
        for event in self.events.range(first..).take_while(|event| event.revision.main <= to) {
            let last = events.last().map(|event| event.revision.main);
            if events.len() >= limit && last.is_some_and(|last| last < event.revision.main) {
                through = event.revision.main - 1;
                break;
            }
            events.push(event.clone());
        }
        Some(Chunk { events, through })
    }
}

fn cost(event: &Event) -> usize {
    event.record.len() + EVENT_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message;

    use super::*;
    use crate::{mvcc::Revision, proto::mvccpb::KeyValue};

    fn events(main: i64, count: u32) -> Vec<Event> {
        let event = |sub| {
            let record = KeyValue { key: format!("key{sub}").into(), ..KeyValue::default() };
            Event::of_record(Revision { main, sub }, false, Bytes::from(record.encode_to_vec()))
        };
        (0..count).map(event).collect()
    }

    fn revisions(chunk: &Chunk) -> Vec<(i64, u32)> {
        chunk.events.iter().map(|event| (event.revision.main, event.revision.sub)).collect()
    }

    #[test]
    fn events_are_read_in_whole_revisions() {
        let mut ring = Ring::new(1, 1 << 20);
        ring.append(events(2, 1), 2);
        ring.append([events(3, 3), events(4, 1)].concat(), 4);
        let chunk = ring.read(2, 4, 2).unwrap();
        assert_eq!((revisions(&chunk), chunk.through), (vec![(2, 0), (3, 0), (3, 1), (3, 2)], 3));
        let chunk = ring.read(4, 4, 2).unwrap();
        assert_eq!((revisions(&chunk), chunk.through), (vec![(4, 0)], 4));
        let chunk = ring.read(2, 2, 100).unwrap();
        assert_eq!((revisions(&chunk), chunk.through), (vec![(2, 0)], 2));
        assert!(ring.read(1, 4, 2).is_none(), "the ring does not have earlier events");
    }

    #[test]
    fn a_full_ring_evicts_whole_revisions_oldest_first() {
        let size = cost(&events(2, 1)[0]);
        let mut ring = Ring::new(1, 3 * size);
        ring.append([events(2, 2), events(3, 1)].concat(), 3);
        assert_eq!(ring.lowest(), 2);
        ring.append(events(4, 1), 4);
        assert_eq!(ring.lowest(), 3, "a revision is evicted as a whole");
        assert_eq!(revisions(&ring.read(3, 4, 10).unwrap()), [(3, 0), (4, 0)]);
        ring.append(events(5, 4), 5);
        assert_eq!((ring.lowest(), ring.bytes), (6, 0), "a revision that does not fit is not kept");
        assert_eq!(ring.read(6, 5, 10).unwrap().through, 5);
        ring.append(events(6, 10_000), 6);
        assert!(ring.lowest() == 7 && ring.events.capacity() < 100, "its memory is not kept either");
    }

    #[test]
    fn a_key_in_the_ring_is_a_slice_of_its_record() {
        let mut ring = Ring::new(1, 1 << 20);
        ring.append(events(2, 1), 2);
        let event = &ring.read(2, 2, 1).unwrap().events[0];
        assert_eq!(event.key, "key0");
        assert!(event.record.as_ptr_range().contains(&event.key.as_ptr()));
    }
}
