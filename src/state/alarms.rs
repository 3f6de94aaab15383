//! Alarms: a problem of one member that restricts the whole cluster.

use std::collections::BTreeSet;

use prost::Message;

use crate::{
    error::Halt,
    proto::etcdserverpb::{AlarmMember, AlarmType},
    storage::{Batch, Engine, Table},
};

/// A member has exceeded its quota: all members refuse to add data.
pub const NOSPACE: i32 = AlarmType::Nospace as i32;
/// A member's data differs from the others': all members refuse all changes.
pub const CORRUPT: i32 = AlarmType::Corrupt as i32;

/// The raised alarms, by type and member. Unknown types are stored like any other, and restrict nothing.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Alarms {
    raised: BTreeSet<(i32, u64)>,
}

impl Alarms {
    pub(super) fn read(engine: &dyn Engine) -> Result<Self, Halt> {
        let mut alarms = Self::default();
        let mut damaged = false;
        engine.scan(Table::Alarm, &[], &[], &mut |_, value| {
            match AlarmMember::decode(value) {
                Ok(alarm) => _ = alarms.raised.insert((alarm.alarm, alarm.member_id)),
                Err(_) => damaged = true,
            }
            std::ops::ControlFlow::Continue(())
        })?;
        if damaged {
            Err(Halt::InvalidData("the database is corrupt: cannot decode the alarm table".into()))
        } else {
            Ok(alarms)
        }
    }

    /// Whether an alarm of this type is raised for any member.
    #[must_use]
    pub fn any(&self, alarm: i32) -> bool {
        self.raised.range((alarm, 0)..=(alarm, u64::MAX)).next().is_some()
    }

    /// The raised alarms of one type; zero means all types.
    #[must_use]
    pub fn list(&self, alarm: i32) -> Vec<AlarmMember> {
        let wanted = self.raised.iter().filter(|(raised, _)| alarm == 0 || *raised == alarm);
        wanted.map(|&(alarm, member_id)| AlarmMember { member_id, alarm }).collect()
    }

    /// Raises an alarm; false if it was raised already.
    pub(super) fn raise(&mut self, batch: &mut Batch, alarm: i32, member: u64) -> bool {
        let value = AlarmMember { member_id: member, alarm }.encode_to_vec();
        batch.put(Table::Alarm, &key(alarm, member), value);
        self.raised.insert((alarm, member))
    }

    /// Clears an alarm; false if it was not raised.
    pub(super) fn clear(&mut self, batch: &mut Batch, alarm: i32, member: u64) -> bool {
        batch.delete(Table::Alarm, &key(alarm, member));
        self.raised.remove(&(alarm, member))
    }
}

fn key(alarm: i32, member: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&i64::from(alarm).to_be_bytes());
    key[8..].copy_from_slice(&member.to_be_bytes());
    key
}
