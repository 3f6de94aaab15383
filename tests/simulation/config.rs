//! The configuration drawn from a seed: how large the cluster is, how unreliable the network and the disks are, and which
//! disruptions occur.
//!
//! Not every world has every kind of disruption: one with only a few kinds explores their combinations more deeply.

use std::time::Duration;

use super::{client, rng::Rng};

/// A fault, or an action of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disruption {
    /// A member's power fails.
    Crash,
    /// A member's power fails at one of the next operations of its disks.
    CrashDuringIo,
    /// The power of all members fails.
    CrashAll,
    /// One member is cut off from all others.
    Isolation,
    /// Some members are cut off from the others.
    Partition,
    /// Messages from one member to another are lost; the opposite direction may work.
    OneWayPartition,
    /// A member's log thread stalls.
    StalledLog,
    /// A member's apply thread stalls.
    StalledApply,
    /// A member's process is paused.
    Pause,
    /// Leadership is transferred to another member.
    LeaderTransfer,
    /// Members are added, removed or promoted.
    Reconfiguration,
}

const ALL: [Disruption; 11] = [
    Disruption::Crash,
    Disruption::CrashDuringIo,
    Disruption::CrashAll,
    Disruption::Isolation,
    Disruption::Partition,
    Disruption::OneWayPartition,
    Disruption::StalledLog,
    Disruption::StalledApply,
    Disruption::Pause,
    Disruption::LeaderTransfer,
    Disruption::Reconfiguration,
];

/// The configuration of a world.
#[derive(Debug, Clone)]
pub struct WorldConfig {
    pub founders: u64,
    /// How long disruptions go on.
    pub length: Duration,
    pub disruptions: Vec<Disruption>,
    /// Milliseconds between two disruptions, at most.
    pub disruption_interval: u64,
    /// Messages lost, in percent.
    pub loss: usize,
    /// Messages that arrive twice, in percent.
    pub duplicates: usize,
    /// Messages that take seconds, in percent.
    pub late: usize,
    /// Messages between two members arrive once and in the order in which they were sent, as on a real connection.
    pub in_order: bool,
    /// Milliseconds that a message takes, at most.
    pub latency: u64,
    /// Milliseconds that a sync takes, at most.
    pub sync: u64,
    /// Syncs that take much longer, in percent.
    pub slow_syncs: usize,
    /// Logs are segment files on a disk that can tear writes, instead of being in memory.
    pub segment_files: bool,
    pub clients: usize,
    /// Milliseconds between two requests of a client, at most.
    pub think_time: u64,
    /// How many keys clients use.
    pub keys: usize,
    pub watchers: usize,
    /// Members with pre-vote enabled, in percent.
    pub pre_vote: usize,
    /// Clients that each hold a short lease, and renew it or stop doing so.
    pub lease_owners: usize,
}

impl WorldConfig {
    pub fn random(rng: &mut Rng) -> Self {
        let founders = *rng.pick(&[1, 1, 2, 3, 3, 3, 3, 4, 5, 5]);
        let kinds = *rng.pick(&[30, 60, 100]);
        let latency = *rng.pick(&[2, 20, 80]);
        let mut config = Self {
            founders,
            length: rng.millis(4000, 14_000),
            disruptions: ALL.into_iter().filter(|_| rng.percent(kinds)).collect(),
            disruption_interval: *rng.pick(&[400, 1200, 3000]),
            loss: *rng.pick(&[0, 0, 3, 15]),
            duplicates: *rng.pick(&[0, 2, 10]),
            late: *rng.pick(&[0, 0, 2, 10]),
            in_order: rng.percent(40),
            latency,
            sync: *rng.pick(&[1, 10, 60]),
            slow_syncs: *rng.pick(&[0, 0, 3]),
            segment_files: rng.percent(40),
            clients: 1 + rng.below(3),
            think_time: *rng.pick(&[30, 100, 300]),
            keys: *rng.pick(&client::KEY_SPACES),
            watchers: rng.below(3),
            pre_vote: 80,
            lease_owners: *rng.pick(&[0, 3, 12]),
        };
        if rng.percent(20) {
            config.focus_on_leases();
        }
        config
    }

    /// Many leases, and the disruptions that leave a member believing that it leads when it does not, or the reverse.
    pub fn focus_on_leases(&mut self) {
        self.founders = self.founders.max(3);
        self.disruptions =
            vec![Disruption::Pause, Disruption::StalledLog, Disruption::LeaderTransfer, Disruption::Isolation];
        self.lease_owners = 20;
    }

    /// Nothing fails.
    pub fn fault_free(founders: u64) -> Self {
        Self {
            founders,
            length: Duration::ZERO,
            disruptions: Vec::new(),
            disruption_interval: 1000,
            loss: 0,
            duplicates: 0,
            late: 0,
            in_order: true,
            latency: 2,
            sync: 1,
            slow_syncs: 0,
            segment_files: false,
            clients: 0,
            think_time: 100,
            keys: 6,
            watchers: 0,
            pre_vote: 100,
            lease_owners: 0,
        }
    }

    /// How long the next sync takes.
    pub fn sync(&self, rng: &mut Rng) -> Duration {
        if rng.percent(self.slow_syncs) { rng.millis(50, 900) } else { rng.millis(0, self.sync) }
    }
}
