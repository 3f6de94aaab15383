//! The network between members: links that lose, delay, duplicate and reorder messages, and that can be blocked in one
//! direction or both.
//!
//! The real transport keeps messages of one connection in order and delivers none twice. Raft must not depend on that, so some
//! worlds guarantee it and some do not; but a forwarded proposal is never duplicated, because it would be committed twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use raft::eraftpb::{Message, MessageType};

use super::{config::WorldConfig, rng::Rng};

/// The links between all members.
#[derive(Debug, Default)]
pub struct Network {
    /// Blocked links, as (from, to).
    blocked: BTreeSet<(u64, u64)>,
    /// When the last message of each link arrives.
    last: BTreeMap<(u64, u64), Duration>,
}

impl Network {
    /// The delay of each copy of a message; empty if it is lost.
    pub fn transmit(
        &mut self,
        via: u64,
        message: &Message,
        now: Duration,
        config: &WorldConfig,
        rng: &mut Rng,
    ) -> Vec<Duration> {
        let link = (via, message.to);
        if self.is_blocked(link.0, link.1) || rng.percent(config.loss) {
            return Vec::new();
        }
        if config.in_order {
            let last = self.last.entry(link).or_default();
            *last = (*last).max(now + delay(config, rng));
            return vec![last.saturating_sub(now)];
        }
        let duplicated = message.msg_type != MessageType::MsgPropose && rng.percent(config.duplicates);
        (0..=usize::from(duplicated)).map(|_| delay(config, rng)).collect()
    }

    pub fn is_blocked(&self, from: u64, to: u64) -> bool {
        self.blocked.contains(&(from, to))
    }

    pub fn block(&mut self, from: u64, to: u64) {
        self.blocked.insert((from, to));
    }

    pub fn heal(&mut self) {
        self.blocked.clear();
    }
}

fn delay(config: &WorldConfig, rng: &mut Rng) -> Duration {
    if rng.percent(config.late) { rng.millis(100, 3000) } else { rng.millis(0, config.latency) }
}
