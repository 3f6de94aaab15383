//! How much room this member has left, and telling the cluster when it has none.
//!
//! The database is measured twice a second, which is far too seldom for a bound and far too dear for every entry. So whatever
//! was written since the last measurement is added to it, as the quota charges for it.
//!
//! The quota is looked at twice. A write that is known not to fit is refused before it is proposed. One that was admitted and
//! turns out too large when it is applied *stays*: members have quotas of their own, and must not differ in data. Its
//! waiter hears "no space" nevertheless, and the alarm that follows refuses all that come later, on every member.
//!
//! Nobody is told before the alarm is raised: who asks why finds it.

use std::sync::Arc;

use parking_lot::Mutex;
use prost::Message;

use super::{
    applier::Quota, driver::Input, identity::RequestIds, inbox::Inbox, status::Status, waiters::ProposalWaiter,
};
use crate::{
    error::Error,
    proto::etcdserverpb::{AlarmRequest, AlarmType, alarm_request::AlarmAction},
    state::{Command, Kind},
};

/// The room of one member.
pub struct QuotaEnforcer {
    quota: Quota,
    member_id: u64,
    status: Arc<Status>,
    raft: Arc<Inbox<Input>>,
    ids: Arc<RequestIds>,
    /// While an alarm is on its way: who is told "no space" when it is raised.
    awaiting_alarm: Mutex<Option<Vec<ProposalWaiter>>>,
}

impl QuotaEnforcer {
    /// The room that `member_id` has under this quota.
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

    /// Whether something of this cost still fits.
    #[must_use]
    pub fn admits(&self, cost: u64) -> bool {
        self.quota.admits(cost, self.status.estimated_bytes())
    }

    /// Counts what was written. False if that was more than there was room for.
    #[must_use]
    pub fn charge(&self, cost: u64) -> bool {
        let fits = self.admits(cost);
        self.status.add_written(cost);
        fits
    }

    /// Raises the alarm for this member, then tells these, if anybody, that there is no space.
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
        if let Err(Input::Propose { waiter, .. }) = self.raft.send(Input::Propose { id, data, waiter }) {
            waiter(Err(Error::Stopped));
        }
    }
}

#[cfg(test)]
mod tests;
