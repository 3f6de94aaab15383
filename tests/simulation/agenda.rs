//! What will happen, and when: virtual time goes from one event to the next.

use std::{
    collections::{BTreeMap, btree_map::OccupiedEntry},
    time::Duration,
};

/// Events in the order of their times; of one time, in the order in which they were put down.
#[derive(Debug)]
pub struct Agenda<E> {
    now: Duration,
    count: u64,
    events: BTreeMap<(Duration, u64), E>,
}

impl<E> Agenda<E> {
    pub fn new() -> Self {
        Self { now: Duration::ZERO, count: 0, events: BTreeMap::new() }
    }

    /// The time of the last event.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Lets something happen after a while.
    pub fn after(&mut self, delay: Duration, event: E) {
        self.count += 1;
        self.events.insert((self.now + delay, self.count), event);
    }

    /// The next event, and it is now; or, if nothing comes until then, `end`.
    pub fn next(&mut self, end: Duration) -> Option<E> {
        let next = self.events.first_entry().filter(|entry| entry.key().0 <= end);
        self.now = next.as_ref().map_or(end, |next| next.key().0);
        next.map(OccupiedEntry::remove)
    }
}
