//! The member table: the only source of truth about the members. Everything else is derived from it.
//!
//! A change is validated when it is applied, against this table alone, so that every replica accepts or refuses it alike. A
//! limit that comes from the flags of one member (the maximum number of learners) is therefore part of the command.
//!
//! INVARIANTS
//! * A removed ID is never added again.
//! * The last voter cannot be removed.
//! * No two members have the same peer URL, unless the cluster was bootstrapped that way.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;

use crate::{
    error::{Error, Halt},
    proto::etcdserverpb::{Member, MemberListResponse},
    storage::{
        Batch, Engine, Table,
        schema::{decode_u64, meta},
    },
};

/// The members by ID, and the IDs of those that were removed.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Members {
    by_id: BTreeMap<u64, Member>,
    /// The capability level that each member has published, unless it is 0.
    levels: BTreeMap<u64, u64>,
    removed: BTreeSet<u64>,
}

/// The IDs of voters and learners, each in ascending order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct VotersAndLearners {
    pub voters: Vec<u64>,
    pub learners: Vec<u64>,
}

/// A member to be added.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct NewMember {
    /// Has an ID, sorted peer URLs, and whether it is a learner.
    pub member: Member,
    /// A learner is refused if there are this many already; None means no limit.
    pub max_learners: Option<u64>,
}

/// The fields that the encoding of a new member has in addition to those of `etcdserverpb.Member`.
#[derive(Clone, PartialEq, Message)]
struct NewMemberOptions {
    #[prost(uint64, optional, tag = "100")]
    max_learners: Option<u64>,
}

/// The field that a stored member has in addition to those of `etcdserverpb.Member`.
#[derive(Clone, Copy, PartialEq, Message)]
struct StoredLevel {
    #[prost(uint64, tag = "100")]
    level: u64,
}

impl NewMember {
    /// The encoding in a log entry: an `etcdserverpb.Member` with one more field.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.member.encode_to_vec();
        NewMemberOptions { max_learners: self.max_learners }.encode(&mut bytes).expect("a vector grows");
        bytes
    }

    pub(super) fn decode(bytes: bytes::Bytes) -> Result<Self, prost::DecodeError> {
        let NewMemberOptions { max_learners } = NewMemberOptions::decode(bytes.clone())?;
        Ok(Self { member: Member::decode(bytes)?, max_learners })
    }
}

impl Members {
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = Member>) -> Self {
        let by_id = members.into_iter().map(|member| (member.id, member)).collect();
        Self { by_id, levels: BTreeMap::new(), removed: BTreeSet::new() }
    }

    /// Reads the member table from a database.
    pub fn read(engine: &dyn Engine) -> Result<Self, Halt> {
        let mut table = Self::default();
        let mut damaged = false;
        engine.scan(Table::Member, &[], &[], &mut |_, value| {
            match (StoredLevel::decode(value), Member::decode(value)) {
                (Ok(StoredLevel { level }), Ok(member)) => {
                    if level > 0 {
                        table.levels.insert(member.id, level);
                    }
                    table.by_id.insert(member.id, member);
                }
                _ => damaged = true,
            }
            std::ops::ControlFlow::Continue(())
        })?;
        engine.scan(Table::Removed, &[], &[], &mut |key, _| {
            match decode_u64(key) {
                Some(id) => _ = table.removed.insert(id),
                None => damaged = true,
            }
            std::ops::ControlFlow::Continue(())
        })?;
        if damaged {
            Err(Halt::InvalidData("the database is corrupt: cannot decode the member table".into()))
        } else {
            Ok(table)
        }
    }

    pub(super) fn write(&self, batch: &mut Batch) {
        for id in self.by_id.keys() {
            self.write_member(batch, *id);
        }
        for id in &self.removed {
            batch.put(Table::Removed, &id.to_be_bytes(), Vec::new());
        }
    }

    /// Stores the members that a joining member contacts until it has received the member table.
    pub fn write_join_contacts(engine: &dyn Engine, members: &[Member]) -> Result<(), Halt> {
        if members.is_empty() {
            return Ok(());
        }
        let list = MemberListResponse { header: None, members: members.to_vec() };
        let mut batch = Batch::default();
        batch.put(Table::Meta, meta::BOOTSTRAP_MEMBERS, list.encode_to_vec());
        engine.write(&batch)
    }

    /// The members stored by [`Members::write_join_contacts`].
    pub fn join_contacts(engine: &dyn Engine) -> Result<Vec<Member>, Halt> {
        let list = engine.get(Table::Meta, meta::BOOTSTRAP_MEMBERS)?.unwrap_or_default();
        let damaged =
            |_| Halt::InvalidData("the database is corrupt: cannot decode the list of members to join".into());
        Ok(MemberListResponse::decode(list).map_err(damaged)?.members)
    }

    /// All members, by ascending ID.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.by_id.values()
    }

    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Member> {
        self.by_id.get(&id)
    }

    /// Whether a member with this ID was removed; the ID cannot be used again.
    #[must_use]
    pub fn is_removed(&self, id: u64) -> bool {
        self.removed.contains(&id)
    }

    /// The IDs of removed members, ascending.
    pub fn removed(&self) -> impl Iterator<Item = u64> {
        self.removed.iter().copied()
    }

    /// The capability level that a member has published.
    #[must_use]
    pub fn level(&self, id: u64) -> u64 {
        self.levels.get(&id).copied().unwrap_or(0)
    }

    /// The capability level that all members know.
    #[must_use]
    pub fn lowest_level(&self) -> u64 {
        self.by_id.keys().map(|id| self.level(*id)).min().unwrap_or(0)
    }

    /// All members know this level: those whose entry here is older have published it all the same.
    pub(super) fn raise_levels(&mut self, batch: &mut Batch, level: u64) {
        let ids: Vec<u64> = self.by_id.keys().copied().filter(|id| self.level(*id) < level).collect();
        for id in ids {
            self.levels.insert(id, level);
            self.write_member(batch, id);
        }
    }

    pub fn voters(&self) -> impl Iterator<Item = &Member> {
        self.by_id.values().filter(|member| !member.is_learner)
    }

    #[must_use]
    pub fn voters_and_learners(&self) -> VotersAndLearners {
        let (learners, voters): (Vec<_>, Vec<_>) = self.iter().partition(|member| member.is_learner);
        let ids = |members: Vec<&Member>| members.iter().map(|member| member.id).collect();
        VotersAndLearners { voters: ids(voters), learners: ids(learners) }
    }

    pub(super) fn add(&mut self, batch: &mut Batch, newcomer: NewMember) -> Result<Member, Error> {
        let NewMember { member, max_learners } = newcomer;
        self.check_not_removed(member.id)?;
        if self.by_id.contains_key(&member.id) {
            return Err(Error::MemberExists);
        }
        self.check_urls_are_free(member.id, &member.peer_ur_ls)?;
        let learners = self.by_id.values().filter(|member| member.is_learner).count() as u64;
        if member.is_learner && max_learners.is_some_and(|most| learners >= most) {
            return Err(Error::TooManyLearners);
        }
        self.by_id.insert(member.id, member.clone());
        self.write_member(batch, member.id);
        Ok(member)
    }

    /// Removes a member permanently.
    pub(super) fn remove(&mut self, batch: &mut Batch, id: u64) -> Result<(), Error> {
        let member = self.find(id)?;
        if !member.is_learner && self.voters().count() == 1 {
            return Err(Error::MemberNotEnoughStarted); // Without a voter no entry could ever be committed.
        }
        batch.delete(Table::Member, &id.to_be_bytes());
        batch.put(Table::Removed, &id.to_be_bytes(), Vec::new());
        self.by_id.remove(&id);
        self.levels.remove(&id);
        self.removed.insert(id);
        Ok(())
    }

    /// Turns a learner into a voter.
    pub(super) fn promote(&mut self, batch: &mut Batch, id: u64) -> Result<(), Error> {
        if !self.find(id)?.is_learner {
            return Err(Error::MemberNotLearner);
        }
        self.change(batch, id, |member| member.is_learner = false)
    }

    pub(super) fn set_peer_urls(&mut self, batch: &mut Batch, id: u64, urls: Vec<String>) -> Result<(), Error> {
        self.find(id)?;
        self.check_urls_are_free(id, &urls)?;
        self.change(batch, id, |member| member.peer_ur_ls = urls)
    }

    /// Sets the attributes that a member publishes when it starts: its name, its client URLs and its capability level.
    pub(super) fn set_attributes(
        &mut self,
        batch: &mut Batch,
        id: u64,
        name: String,
        client_urls: Vec<String>,
        level: u64,
    ) -> Result<(), Error> {
        if level == 0 {
            self.levels.remove(&id);
        } else if self.by_id.contains_key(&id) {
            self.levels.insert(id, level);
        }
        self.change(batch, id, |member| {
            member.name = name;
            member.client_ur_ls = client_urls;
        })
    }

    fn change(&mut self, batch: &mut Batch, id: u64, change: impl FnOnce(&mut Member)) -> Result<(), Error> {
        let member = self.by_id.get_mut(&id).ok_or(Error::MemberNotFound)?;
        change(member);
        self.write_member(batch, id);
        Ok(())
    }

    fn write_member(&self, batch: &mut Batch, id: u64) {
        let mut bytes = self.by_id[&id].encode_to_vec();
        StoredLevel { level: self.level(id) }.encode(&mut bytes).expect("a vector grows");
        batch.put(Table::Member, &id.to_be_bytes(), bytes);
    }

    fn find(&self, id: u64) -> Result<&Member, Error> {
        self.check_not_removed(id)?;
        self.get(id).ok_or(Error::MemberNotFound)
    }

    fn check_not_removed(&self, id: u64) -> Result<(), Error> {
        if self.is_removed(id) { Err(Error::MemberNotFound) } else { Ok(()) }
    }

    fn check_urls_are_free(&self, id: u64, urls: &[String]) -> Result<(), Error> {
        let mut others = self.iter().filter(|member| member.id != id).flat_map(|member| &member.peer_ur_ls);
        if others.any(|taken| urls.contains(taken)) { Err(Error::PeerUrlExists) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::Memory;

    fn member(id: u64, url: &str, is_learner: bool) -> Member {
        Member { id, peer_ur_ls: vec![url.to_owned()], is_learner, ..Member::default() }
    }

    fn newcomer(id: u64, url: &str, is_learner: bool) -> NewMember {
        NewMember { member: member(id, url, is_learner), max_learners: Some(1) }
    }

    /// Two voters and a learner; member 9 was removed.
    fn cluster() -> (Members, Batch) {
        let mut members = Members::new([member(1, "u1", false), member(2, "u2", false), member(9, "u9", false)]);
        let mut batch = Batch::default();
        members.remove(&mut batch, 9).unwrap();
        members.add(&mut batch, newcomer(3, "u3", true)).unwrap();
        (members, batch)
    }

    #[test]
    fn additions_are_refused_for_the_first_reason_that_applies() {
        let (members, _) = cluster();
        for (newcomer, refusal) in [
            (newcomer(9, "u1", true), Error::MemberNotFound),
            (newcomer(1, "u1", true), Error::MemberExists),
            (newcomer(4, "u3", true), Error::PeerUrlExists),
            (newcomer(4, "u4", true), Error::TooManyLearners),
        ] {
            let (mut changed, mut batch) = (members.clone(), Batch::default());
            assert_eq!(changed.add(&mut batch, newcomer), Err(refusal));
            assert!(batch.is_empty() && changed == members, "a refusal changes nothing");
        }
        let more = NewMember { max_learners: None, ..newcomer(4, "u4", true) };
        let voter = NewMember { max_learners: Some(0), ..newcomer(5, "u5", false) };
        let (mut members, mut batch) = (members, Batch::default());
        members.add(&mut batch, more).unwrap();
        members.add(&mut batch, voter).unwrap();
        assert_eq!(members.voters_and_learners(), VotersAndLearners { voters: vec![1, 2, 5], learners: vec![3, 4] });
    }

    #[test]
    fn a_removal_is_permanent_and_the_last_voter_stays() {
        let (mut members, mut batch) = cluster();
        assert_eq!(members.remove(&mut batch, 9), Err(Error::MemberNotFound));
        assert_eq!(members.remove(&mut batch, 7), Err(Error::MemberNotFound));
        members.remove(&mut batch, 1).unwrap();
        assert_eq!(members.remove(&mut batch, 2), Err(Error::MemberNotEnoughStarted));
        members.remove(&mut batch, 3).unwrap();
        assert_eq!(members.voters_and_learners(), VotersAndLearners { voters: vec![2], learners: vec![] });
        assert!([1, 3, 9].into_iter().all(|id| members.is_removed(id)) && !members.is_removed(2));
        assert_eq!(members.add(&mut batch, newcomer(1, "u1", false)), Err(Error::MemberNotFound));
    }

    #[test]
    fn only_a_learner_is_promoted() {
        let (mut members, mut batch) = cluster();
        assert_eq!(members.promote(&mut batch, 9), Err(Error::MemberNotFound));
        assert_eq!(members.promote(&mut batch, 7), Err(Error::MemberNotFound));
        assert_eq!(members.promote(&mut batch, 1), Err(Error::MemberNotLearner));
        members.promote(&mut batch, 3).unwrap();
        assert_eq!(members.voters_and_learners().voters, [1, 2, 3]);
    }

    #[test]
    fn an_update_changes_only_the_peer_urls() {
        let (mut members, mut batch) = cluster();
        members.set_attributes(&mut batch, 3, "three".into(), vec!["c3".into()], 0).unwrap();
        let update = |members: &mut Members, batch: &mut Batch, id, url: &str| {
            members.set_peer_urls(batch, id, vec![url.to_owned()])
        };
        assert_eq!(update(&mut members, &mut batch, 9, "u"), Err(Error::MemberNotFound));
        assert_eq!(update(&mut members, &mut batch, 7, "u"), Err(Error::MemberNotFound));
        assert_eq!(update(&mut members, &mut batch, 3, "u2"), Err(Error::PeerUrlExists));
        update(&mut members, &mut batch, 3, "u3").unwrap();
        update(&mut members, &mut batch, 3, "v3").unwrap();
        let expected = Member { name: "three".into(), client_ur_ls: vec!["c3".into()], ..member(3, "v3", true) };
        assert_eq!(members.get(3), Some(&expected));
    }

    #[test]
    fn the_lowest_level_is_that_of_all_members() {
        let (mut members, mut batch) = cluster();
        assert_eq!(members.lowest_level(), 0);
        for (id, level) in [(1, 2), (2, 1)] {
            members.set_attributes(&mut batch, id, String::new(), vec![], level).unwrap();
            assert_eq!(members.lowest_level(), 0, "the learner has not published yet");
        }
        members.set_attributes(&mut batch, 3, String::new(), vec![], 2).unwrap();
        assert_eq!(members.lowest_level(), 1);
        members.set_attributes(&mut batch, 2, String::new(), vec![], 0).unwrap();
        assert_eq!(members.lowest_level(), 0, "it went back to an earlier build");
        members.raise_levels(&mut batch, 2);
        assert_eq!(members.lowest_level(), 2);
        members.add(&mut batch, newcomer(4, "u4", false)).unwrap();
        assert_eq!(members.lowest_level(), 0);
    }

    #[test]
    fn the_member_table_is_restored_from_the_database() {
        let (mut members, mut batch) = cluster();
        members.set_attributes(&mut batch, 2, "two".into(), vec![], 1).unwrap();
        let engine = Memory::default();
        let mut first = Batch::default();
        Members::new([member(1, "u1", false), member(2, "u2", false), member(9, "u9", false)]).write(&mut first);
        engine.write(&first).unwrap();
        engine.write(&batch).unwrap();
        assert_eq!(Members::read(&engine).unwrap(), members);
        let (whole, copy) = (Memory::default(), &mut Batch::default());
        members.write(copy);
        whole.write(copy).unwrap();
        assert_eq!(Members::read(&whole).unwrap(), members);
    }

    #[test]
    fn a_joining_member_remembers_which_members_to_contact() {
        let engine = Memory::default();
        assert_eq!(Members::join_contacts(&engine).unwrap(), []);
        let members = [member(1, "u1", false), member(2, "u2", true)];
        Members::write_join_contacts(&engine, &members).unwrap();
        assert_eq!(Members::join_contacts(&engine).unwrap(), members);
        assert_eq!(Members::read(&engine).unwrap(), Members::default(), "they are not in the member table");
    }

    #[test]
    fn a_new_member_is_encoded_as_a_member_with_options() {
        for max_learners in [None, Some(0), Some(7)] {
            let newcomer = NewMember { max_learners, ..newcomer(5, "u5", true) };
            let bytes = newcomer.encode();
            assert_eq!(Member::decode(bytes.as_slice()).unwrap(), newcomer.member);
            assert_eq!(NewMember::decode(bytes.into()).unwrap(), newcomer);
        }
    }
}
