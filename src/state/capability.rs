//! The capability level: which kinds of log entries the cluster uses.
//!
//! Clients' bytes go into the log as they came, and every member must do the same with them. So nothing that is new may enter the
//! log before all members know it. Each member publishes, with its name and its URLs, the highest level that it knows. Once all
//! members have, those that cannot be reached included, the leader raises the cluster's level by an entry. A level is never
//! lowered: until it is raised, each member can go back to the build that it ran before.
//!
//! A member that meets an entry above the level that it knows stops, and says so. If it went on without the entry, its data would
//! differ from the others' for good.
//!
//! | level | adds |
//! | --- | --- |
//! | 0 | keys, leases, alarms, members, the cluster version |
//! | 1 | users, roles, logins; in an entry's header the user and the auth revision; this level itself |
//!
//! A member that does not know levels stores the attributes of others without their level. So a member publishes again when
//! another one has, for as long as the level is not raised (`cluster/capability.rs`).

use bytes::Bytes;
use prost::{DecodeError, Message};

use super::{Machine, Response};
use crate::{
    error::{Error, Halt},
    proto::membershippb::ClusterMemberAttrSetRequest,
    storage::{Table, schema::meta},
};

/// What a member publishes about itself at every start.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct MemberAttributes {
    /// Its name and its client URLs.
    pub request: ClusterMemberAttrSetRequest,
    /// The capability level that it knows.
    pub level: u64,
    /// Whether it has published this before, since it was started.
    pub repeated: bool,
}

/// The fields that the encoding of the attributes has in addition to those of `membershippb.ClusterMemberAttrSetRequest`.
#[derive(Clone, Copy, PartialEq, Message)]
struct PublishedLevel {
    #[prost(uint64, tag = "100")]
    level: u64,
    #[prost(bool, tag = "101")]
    repeated: bool,
}

impl MemberAttributes {
    /// The encoding in a log entry.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.request.encode_to_vec();
        PublishedLevel { level: self.level, repeated: self.repeated }.encode(&mut bytes).expect("a vector grows");
        bytes
    }

    pub(super) fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        let PublishedLevel { level, repeated } = PublishedLevel::decode(bytes.clone())?;
        Ok(Self { request: Message::decode(bytes)?, level, repeated })
    }
}

/// Raises the level of the cluster.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct CapabilityLevelSet {
    #[prost(uint64, tag = "1")]
    pub level: u64,
}

impl Machine {
    /// Makes this member act as a build that knows no more than this level.
    pub fn limit_level(&mut self, known: u64) -> Result<(), Halt> {
        self.known_level = known;
        self.check_known(self.cluster.capability_level)
    }

    /// A member must know the level of its cluster.
    pub(super) fn check_known(&self, level: u64) -> Result<(), Halt> {
        let known = self.known_level;
        if level <= known {
            return Ok(());
        }
        Err(Halt::NewerVersionRequired(format!(
            "the cluster uses capability level {level}, and this member knows level {known} only: start it with a version \
             that knows level {level}, and without a lower --max-capability-level"
        )))
    }

    /// An entry that this member cannot execute as the others do.
    pub(super) fn unknown_entry(&self, index: u64) -> Halt {
        Halt::NewerVersionRequired(format!(
            "log entry {index} is of a kind that this member, which knows capability level {}, does not know: it was \
             proposed by a newer version. Start this member with that version; its data is intact up to this entry",
            self.known_level
        ))
    }

    pub(super) fn set_capability_level(
        &mut self,
        request: CapabilityLevelSet,
    ) -> Result<Result<Response, Error>, Halt> {
        let CapabilityLevelSet { level } = request;
        let present = self.cluster.capability_level;
        if level < present {
            let text = format!("etcdserver: the capability level is {present}, and is never lowered");
            return Ok(Err(Error::Unknown(text)));
        }
        self.check_known(level)?;
        self.batch.put(Table::Meta, meta::CAPABILITY_LEVEL, level.to_be_bytes().to_vec());
        self.cluster.capability_level = level;
        self.cluster.members.raise_levels(&mut self.batch, level);
        self.note_changed_members();
        Ok(Ok(Response::header_only(self.store.head())))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        proto::membershippb::Attributes,
        state::{Command, Entry, Kind, Members},
        storage::{Engine, memory::Memory},
    };

    fn machine() -> Machine {
        let engine: Arc<dyn Engine> = Arc::new(Memory::default());
        Machine::bootstrap(engine.as_ref(), 7, &Members::default(), (0, 0)).unwrap();
        Machine::open(engine, 1 << 20).unwrap()
    }

    fn entry(machine: &Machine, data: Bytes) -> Entry {
        Entry { index: machine.applied().index + 1, term: 1, data, changes_members: false }
    }

    fn apply(machine: &mut Machine, kind: Kind, request: &[u8]) -> Result<Result<Response, Error>, Halt> {
        let entry = entry(machine, Command::encode(1, kind, request));
        Ok(machine.apply(&entry)?.outcome)
    }

    fn raise(machine: &mut Machine, level: u64) -> Result<Result<Response, Error>, Halt> {
        apply(machine, Kind::CapabilityLevelSet, &CapabilityLevelSet { level }.encode_to_vec())
    }

    #[test]
    fn entries_of_a_level_are_refused_until_it_is_raised() {
        let mut machine = machine();
        assert_eq!(apply(&mut machine, Kind::RoleAdd, &[0x0a, 1, b'r']).unwrap(), Err(Error::NotCapable));
        raise(&mut machine, 1).unwrap().unwrap();
        apply(&mut machine, Kind::RoleAdd, &[0x0a, 1, b'r']).unwrap().unwrap();
        machine.commit().unwrap();
        let mut again = Machine::open(machine.engine().clone(), 1 << 20).unwrap();
        assert_eq!(again.capability_level(), 1);
        let lowered = raise(&mut again, 0).unwrap().unwrap_err();
        assert_eq!(lowered.to_string(), "etcdserver: the capability level is 1, and is never lowered");
    }

    #[test]
    fn a_member_stops_at_an_entry_that_it_does_not_know() {
        let mut machine = machine();
        let unknown = entry(&machine, Bytes::from_static(&[0xca, 0x3e, 0]));
        let halt = machine.apply(&unknown).unwrap_err().to_string();
        assert!(halt.starts_with("log entry 1 is of a kind that this member"), "{halt}");
    }

    #[test]
    fn a_member_that_knows_a_lower_level_stops_where_the_cluster_goes_beyond_it() {
        let mut machine = machine();
        machine.limit_level(0).unwrap();
        let halt = raise(&mut machine, 1).unwrap_err().to_string();
        assert!(halt.starts_with("log entry 1 is of a kind that this member"), "{halt}");
        let mut other = self::machine();
        raise(&mut other, 1).unwrap().unwrap();
        other.commit().unwrap();
        let halt = Machine::open(other.engine().clone(), 1 << 20).unwrap().limit_level(0).unwrap_err().to_string();
        assert!(halt.starts_with("the cluster uses capability level 1, and this member knows level 0 only"), "{halt}");
    }

    #[test]
    fn attributes_are_encoded_as_etcds_with_one_more_field() {
        let attributes = Attributes { name: "a".into(), client_urls: vec!["http://c:1".into()] };
        let request = ClusterMemberAttrSetRequest { member_id: 7, member_attributes: Some(attributes) };
        for level in [0, 3] {
            let published = MemberAttributes { request: request.clone(), level, repeated: level > 0 };
            let bytes = published.encode();
            assert_eq!(ClusterMemberAttrSetRequest::decode(bytes.as_slice()).unwrap(), request);
            assert_eq!(MemberAttributes::decode(bytes.into()).unwrap(), published);
        }
    }
}
