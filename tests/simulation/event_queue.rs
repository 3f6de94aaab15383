//! The queue of future events. Virtual time advances from one event to the next.

use std::{
    collections::{BTreeMap, btree_map::OccupiedEntry},
    time::Duration,
};

/// Events ordered by time; events at the same time in the order in which they were scheduled.
#[derive(Debug)]
pub struct EventQueue<E> {
    now: Duration,
    count: u64,
    events: BTreeMap<(Duration, u64), E>,
}

impl<E> EventQueue<E> {
    pub fn new() -> Self {
        Self { now: Duration::ZERO, count: 0, events: BTreeMap::new() }
    }

    /// The time of the last event.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Schedules an event `delay` from now.
    pub fn schedule(&mut self, delay: Duration, event: E) {
        self.count += 1;
        self.events.insert((self.now + delay, self.count), event);
    }

    /// Removes the next event up to `end` and advances the time to it; without one, advances the time to `end`.
    pub fn next(&mut self, end: Duration) -> Option<E> {
        let next = self.events.first_entry().filter(|entry| entry.key().0 <= end);
        self.now = next.as_ref().map_or(end, |next| next.key().0);
        next.map(OccupiedEntry::remove)
    }
}
