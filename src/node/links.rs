//! Which members are connected, and since when.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// The connections of this member to others. A connection is active from its handshake until its first failure.
#[derive(Debug, Default)]
pub struct Links(Mutex<BTreeMap<u64, Instant>>);

impl Links {
    /// Adds a connection; returns how many there are.
    pub(super) fn up(&self, member: u64, now: Instant) -> usize {
        let mut links = self.0.lock();
        links.insert(member, now);
        links.len()
    }

    /// Removes the connection of that time, which has failed or was given up, unless another one has replaced it.
    pub(super) fn down(&self, member: u64, since: Instant) {
        let mut links = self.0.lock();
        if links.get(&member) == Some(&since) {
            links.remove(&member);
        }
    }

    /// For how long a member has been connected; None if it is not.
    #[must_use]
    pub fn active_for(&self, member: u64) -> Option<Duration> {
        self.0.lock().get(&member).map(Instant::elapsed)
    }

    /// The eligible member that has been connected for longest.
    #[must_use]
    pub fn longest(&self, eligible: impl Fn(u64) -> bool) -> Option<u64> {
        let links = self.0.lock();
        links
            .iter()
            .filter(|(member, _)| eligible(**member))
            .min_by_key(|(_, since)| **since)
            .map(|(member, _)| *member)
    }
}
