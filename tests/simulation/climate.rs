//! What a seed's world is like: how large the cluster is, how bad the network and the disks are, and what goes wrong.
//!
//! Not everything goes wrong everywhere: a world with few kinds of trouble gets further into what these alone bring about.

use std::time::Duration;

use super::{client, dice::Dice};

/// Something that goes wrong, or that an operator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// A member's power fails.
    Crash,
    /// A member's power fails at one of the next operations of its disks.
    Fuse,
    /// Everybody's power fails.
    Blackout,
    /// Nobody hears a member, and it hears nobody.
    Isolation,
    /// Some members do not hear the others.
    Partition,
    /// One member does not hear one other, which may hear it.
    OneWay,
    /// A member's log takes its time.
    StuckLog,
    /// A member applies nothing for a while.
    StuckApply,
    /// A member's process sleeps.
    Pause,
    /// Somebody else shall lead.
    Transfer,
    /// Members come and go.
    Reconfiguration,
}

const ALL: [Trouble; 11] = [
    Trouble::Crash,
    Trouble::Fuse,
    Trouble::Blackout,
    Trouble::Isolation,
    Trouble::Partition,
    Trouble::OneWay,
    Trouble::StuckLog,
    Trouble::StuckApply,
    Trouble::Pause,
    Trouble::Transfer,
    Trouble::Reconfiguration,
];

/// A world's settings.
#[derive(Debug, Clone)]
pub struct Climate {
    pub founders: u64,
    /// For how long there is trouble.
    pub length: Duration,
    pub troubles: Vec<Trouble>,
    /// Milliseconds between two of them, at most.
    pub trouble_every: u64,
    /// Messages lost, in percent.
    pub loss: usize,
    /// Messages that come twice, in percent.
    pub doubles: usize,
    /// Messages that take seconds, in percent.
    pub late: usize,
    /// Messages between two members come in the order in which they were sent, and once, as on a real connection.
    pub in_order: bool,
    /// Milliseconds that a message takes, at most.
    pub latency: u64,
    /// Milliseconds that a sync takes, at most.
    pub sync: u64,
    /// Syncs that take much longer, in percent.
    pub slow_syncs: usize,
    /// Logs lie in segment files on a disk that can tear writes, not in memory.
    pub segment_files: bool,
    pub clients: usize,
    /// Milliseconds between two wishes of a client, at most.
    pub think: u64,
    /// How many keys they know.
    pub keys: usize,
    pub watchers: usize,
    /// Members that ask before they call an election, in percent.
    pub pre_vote: usize,
    /// Clients that hold a short lease each, and renew it or fall silent.
    pub lease_owners: usize,
}

impl Climate {
    pub fn draw(dice: &mut Dice) -> Self {
        let founders = *dice.pick(&[1, 1, 2, 3, 3, 3, 3, 4, 5, 5]);
        let kinds = *dice.pick(&[30, 60, 100]);
        let latency = *dice.pick(&[2, 20, 80]);
        let mut climate = Self {
            founders,
            length: dice.millis(4000, 14_000),
            troubles: ALL.into_iter().filter(|_| dice.percent(kinds)).collect(),
            trouble_every: *dice.pick(&[400, 1200, 3000]),
            loss: *dice.pick(&[0, 0, 3, 15]),
            doubles: *dice.pick(&[0, 2, 10]),
            late: *dice.pick(&[0, 0, 2, 10]),
            in_order: dice.percent(40),
            latency,
            sync: *dice.pick(&[1, 10, 60]),
            slow_syncs: *dice.pick(&[0, 0, 3]),
            segment_files: dice.percent(40),
            clients: 1 + dice.below(3),
            think: *dice.pick(&[30, 100, 300]),
            keys: *dice.pick(&client::KEY_SPACES),
            watchers: dice.below(3),
            pre_vote: 80,
            lease_owners: *dice.pick(&[0, 3, 12]),
        };
        if dice.percent(20) {
            climate.dwell_on_leases();
        }
        climate
    }

    /// Many leases, and what makes members lead that should not or do not know it.
    pub fn dwell_on_leases(&mut self) {
        self.founders = self.founders.max(3);
        self.troubles = vec![Trouble::Pause, Trouble::StuckLog, Trouble::Transfer, Trouble::Isolation];
        self.lease_owners = 20;
    }

    /// Everything works.
    pub fn calm(founders: u64) -> Self {
        Self {
            founders,
            length: Duration::ZERO,
            troubles: Vec::new(),
            trouble_every: 1000,
            loss: 0,
            doubles: 0,
            late: 0,
            in_order: true,
            latency: 2,
            sync: 1,
            slow_syncs: 0,
            segment_files: false,
            clients: 0,
            think: 100,
            keys: 6,
            watchers: 0,
            pre_vote: 100,
            lease_owners: 0,
        }
    }

    /// How long the next sync takes.
    pub fn sync(&self, dice: &mut Dice) -> Duration {
        if dice.percent(self.slow_syncs) { dice.millis(50, 900) } else { dice.millis(0, self.sync) }
    }
}
