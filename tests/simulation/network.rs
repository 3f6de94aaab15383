//! What lies between members: links that lose, delay, double and reorder messages, and that are cut, in one direction or both.
//!
//! The real transport keeps the order of what it sends over one connection and brings nothing twice. Raft must not depend on
//! that, so here some worlds have it and some do not; but a proposal that is passed on is never doubled, because it would be
//! agreed twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use raft::eraftpb::{Message, MessageType};

use super::{climate::Climate, dice::Dice};

/// All links.
#[derive(Debug, Default)]
pub struct Network {
    /// From whom to whom nothing comes through.
    cuts: BTreeSet<(u64, u64)>,
    /// When the last message of a link will have come.
    last: BTreeMap<(u64, u64), Duration>,
}

impl Network {
    /// How long each copy of a message is under way; none if it is lost.
    pub fn carry(
        &mut self,
        via: u64,
        message: &Message,
        now: Duration,
        climate: &Climate,
        dice: &mut Dice,
    ) -> Vec<Duration> {
        let link = (via, message.to);
        if self.is_cut(link.0, link.1) || dice.percent(climate.loss) {
            return Vec::new();
        }
        if climate.in_order {
            let last = self.last.entry(link).or_default();
            *last = (*last).max(now + delay(climate, dice));
            return vec![last.saturating_sub(now)];
        }
        let doubled = message.msg_type != MessageType::MsgPropose && dice.percent(climate.doubles);
        (0..=usize::from(doubled)).map(|_| delay(climate, dice)).collect()
    }

    pub fn is_cut(&self, from: u64, to: u64) -> bool {
        self.cuts.contains(&(from, to))
    }

    pub fn cut(&mut self, from: u64, to: u64) {
        self.cuts.insert((from, to));
    }

    pub fn heal(&mut self) {
        self.cuts.clear();
    }
}

fn delay(climate: &Climate, dice: &mut Dice) -> Duration {
    if dice.percent(climate.late) { dice.millis(100, 3000) } else { dice.millis(0, climate.latency) }
}
