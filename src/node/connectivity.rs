//! Which members are connected, and since when.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// The connections of this member to others. A connection is active from its handshake until its first failure.
#[derive(Debug, Default)]
pub struct Connectivity(Mutex<BTreeMap<u64, Instant>>);

impl Connectivity {
    /// Adds a connection; returns how many there are.
    pub(super) fn connected(&self, member: u64, now: Instant) -> usize {
        let mut connectivity = self.0.lock();
        connectivity.insert(member, now);
        connectivity.len()
    }

    /// Removes the connection of that time, which has failed or was given up, unless another one has replaced it.
    pub(super) fn disconnected(&self, member: u64, since: Instant) {
        let mut connectivity = self.0.lock();
        if connectivity.get(&member) == Some(&since) {
            connectivity.remove(&member);
        }
    }

    /// For how long a member has been connected; None if it is not.
    #[must_use]
    pub fn active_for(&self, member: u64) -> Option<Duration> {
        self.0.lock().get(&member).map(Instant::elapsed)
    }

    /// The eligible member that has been connected for longest.
    #[must_use]
    pub fn longest_connected(&self, eligible: impl Fn(u64) -> bool) -> Option<u64> {
        let connectivity = self.0.lock();
        connectivity
            .iter()
            .filter(|(member, _)| eligible(**member))
            .min_by_key(|(_, since)| **since)
            .map(|(member, _)| *member)
    }
}
