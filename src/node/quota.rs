//! Enforces this member's quota, and raises the cluster's NOSPACE alarm when it is exceeded.
//!
//! The database is measured twice a second, which is far too seldom for a limit, while measuring it for every entry would be far
//! too expensive. So the cost of writes since the last measurement, as the quota charges for them, is added to it.
//!
//! The quota is checked twice. A write that is known not to fit is refused before it is proposed. One that was admitted and
//! turns out too large when it is applied *stays*: members have different quotas, but must have the same data. Its waiter gets
//! "no space" nevertheless, and the alarm that follows refuses all later writes, on every member.
//!
//! Waiters are answered only after the alarm is raised, so that a client that got "no space" can see the alarm.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prost::Message;

use super::{identity::RequestIds, inbox::Inbox, messages::Input, status::Status, waiters::ProposalWaiter};
use crate::{
    error::Error,
    proto::etcdserverpb::{AlarmRequest, AlarmType, alarm_request::AlarmAction},
    state::{Command, Kind},
};

/// The maximum size of this member's database.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// Bytes; zero or less means unlimited.
    pub bytes: i64,
}

impl Quota {
    /// Whether a write of this cost still fits.
    #[must_use]
    pub fn admits(&self, cost: u64, total_bytes: i64) -> bool {
        cost == 0 || self.bytes <= 0 || total_bytes.saturating_add_unsigned(cost) < self.bytes
    }
}

/// How the database has grown lately.
#[derive(Debug, Default)]
pub struct Growth {
    /// Sizes in bytes, the oldest first.
    sizes: VecDeque<(Instant, i64)>,
}

impl Growth {
    /// The time between two sizes, and how many are kept: ten minutes in all.
    const INTERVAL: Duration = Duration::from_secs(10);
    const SIZES: usize = 60;

    /// Adds the present size, unless one was added a moment ago.
    pub fn add(&mut self, bytes: i64, now: Instant) {
        if self.sizes.back().is_some_and(|(at, _)| now.saturating_duration_since(*at) < Self::INTERVAL) {
            return;
        }
        if self.sizes.len() == Self::SIZES {
            self.sizes.pop_front();
        }
        self.sizes.push_back((now, bytes));
    }

    /// In how many seconds the quota is used up at this rate; infinite if the database does not grow, or has no quota.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "it is an estimate")]
    pub fn seconds_until(&self, quota: Quota) -> f64 {
        let (Some((began, first)), Some((ended, last))) = (self.sizes.front(), self.sizes.back()) else {
            return f64::INFINITY;
        };
        let grown = last - first;
        if quota.bytes <= 0 || grown <= 0 {
            return f64::INFINITY;
        }
        let rate = grown as f64 / ended.saturating_duration_since(*began).as_secs_f64();
        (quota.bytes - last).max(0) as f64 / rate
    }
}

/// Checks writes against the quota of one member.
pub struct QuotaEnforcer {
    quota: Quota,
    member_id: u64,
    status: Arc<Status>,
    raft: Arc<Inbox<Input>>,
    ids: Arc<RequestIds>,
    /// While an alarm is proposed: the waiters that get "no space" when it is raised.
    awaiting_alarm: Mutex<Option<Vec<ProposalWaiter>>>,
}

impl QuotaEnforcer {
    #[must_use]
    pub fn new(
        quota: Quota,
        member_id: u64,
        status: Arc<Status>,
        raft: Arc<Inbox<Input>>,
        ids: Arc<RequestIds>,
    ) -> Self {
        Self { quota, member_id, status, raft, ids, awaiting_alarm: Mutex::new(None) }
    }

    /// Whether a write of this cost still fits.
    #[must_use]
    pub fn admits(&self, cost: u64) -> bool {
        self.quota.admits(cost, self.status.estimated_bytes())
    }

    /// Adds the cost of a write. False if it exceeded the quota.
    #[must_use]
    pub fn charge(&self, cost: u64) -> bool {
        let fits = self.admits(cost);
        self.status.add_written(cost);
        fits
    }

    /// Raises the alarm for this member, then answers these waiters, if any, that there is no space.
    pub fn raise_no_space(self: &Arc<Self>, waiters: Vec<ProposalWaiter>) {
        let mut awaiting_alarm = self.awaiting_alarm.lock();
        if let Some(earlier) = awaiting_alarm.as_mut() {
            return earlier.extend(waiters);
        }
        *awaiting_alarm = Some(waiters);
        drop(awaiting_alarm);
        tracing::warn!({ "quota-size-bytes" = self.quota.bytes }, "message exceeded backend quota; raising alarm");
        self.propose_alarm();
    }

    fn propose_alarm(self: &Arc<Self>) {
        let alarm = AlarmRequest {
            action: AlarmAction::Activate as i32,
            member_id: self.member_id,
            alarm: AlarmType::Nospace as i32,
        };
        let id = self.ids.next();
        let data = Command::encode(id, Kind::Alarm, &alarm.encode_to_vec());
        let quota = self.clone();
        let waiter: ProposalWaiter = Box::new(move |_| {
            let waiters = quota.awaiting_alarm.lock().take();
            waiters.into_iter().flatten().for_each(|waiter| waiter(Err(Error::NoSpace)));
        });
        if let Err(Input::Propose { waiter, .. }) =
            self.raft.send(Input::Propose { id, data, since: Instant::now(), waiter })
        {
            waiter(Err(Error::Stopped));
        }
    }
}

#[cfg(test)]
mod tests;
