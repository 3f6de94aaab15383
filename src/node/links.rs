//! Which members can be reached, and since when.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// The connections of this member to others. A connection is active from its handshake to its first failure.
#[derive(Debug, Default)]
pub struct Links(Mutex<BTreeMap<u64, Instant>>);

impl Links {
    /// A connection stands since now; returns how many do.
    pub(super) fn up(&self, member: u64, now: Instant) -> usize {
        let mut links = self.0.lock();
        links.insert(member, now);
        links.len()
    }

    /// The connection that stood since then has failed, or is given up; another one may have taken its place.
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

    /// The member that has been connected for longest among those that `eligible` names.
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
