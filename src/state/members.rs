//! Who the members are: the one truth about it. Whatever else wants to know derives it from here.

use std::collections::BTreeMap;

use prost::Message;

use crate::{
    error::Halt,
    proto::etcdserverpb::Member,
    storage::{Batch, Engine, Table},
};

/// The members, by ID.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Members {
    members: BTreeMap<u64, Member>,
}

/// Who votes, and who learns, by ascending ID.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Electorate {
    /// Those whose acknowledgements count.
    pub voters: Vec<u64>,
    /// Those whose acknowledgements do not.
    pub learners: Vec<u64>,
}

impl Members {
    /// Who votes, and who learns.
    #[must_use]
    pub fn electorate(&self) -> Electorate {
        let (learners, voters): (Vec<_>, Vec<_>) = self.iter().partition(|member| member.is_learner);
        let ids = |members: Vec<&Member>| members.iter().map(|member| member.id).collect();
        Electorate { voters: ids(voters), learners: ids(learners) }
    }

    /// The IDs of those who were removed, ascending.
    pub fn removed(&self) -> impl Iterator<Item = u64> {
        std::iter::empty()
    }

    /// A cluster of these.
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = Member>) -> Self {
        Self { members: members.into_iter().map(|member| (member.id, member)).collect() }
    }

    /// Those that a database holds.
    pub fn read(engine: &dyn Engine) -> Result<Self, Halt> {
        let mut members = Self::default();
        let mut damaged = false;
        engine.scan(Table::Member, &[], &[], &mut |_, value| {
            match Member::decode(value) {
                Ok(member) => _ = members.members.insert(member.id, member),
                Err(_) => damaged = true,
            }
            std::ops::ControlFlow::Continue(())
        })?;
        if damaged { Err(Halt::Refused("the member table is damaged".into())) } else { Ok(members) }
    }

    pub(super) fn write(&self, batch: &mut Batch) {
        for member in self.members.values() {
            write(batch, member);
        }
    }

    /// All members, by ascending ID.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// One member.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Member> {
        self.members.get(&id)
    }

    /// Sets what a member says of itself when it starts: its name and where clients find it. False if there is no such
    /// member.
    pub(super) fn set_attributes(
        &mut self,
        batch: &mut Batch,
        id: u64,
        name: String,
        client_urls: Vec<String>,
    ) -> bool {
        let Some(member) = self.members.get_mut(&id) else { return false };
        member.name = name;
        member.client_ur_ls = client_urls;
        write(batch, member);
        true
    }
}

fn write(batch: &mut Batch, member: &Member) {
    batch.put(Table::Member, &member.id.to_be_bytes(), member.encode_to_vec());
}
