//! `--force-new-cluster`: the one member that is left goes on alone, with all its data.
//!
//! Whoever uses it says that the others will not come back. So everything that this member's log holds counts as agreed: the
//! others cannot say anything else any more, and what is written about the commit index may lag behind what clients were
//! told. (etcd drops what lies behind it.) Then the others are removed, by entries that look as if a quorum had agreed to
//! them. Whoever of the others comes back nevertheless is refused: it was removed.
//!
//! The log has these entries before the database does, as always. So a crash in between does no harm: the next start replays
//! them, with the flag or without.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType};

use crate::{
    error::Halt,
    node::{
        changes,
        data_dir::DataDir,
        finish_install,
        log::{self, Group, LogStore, Position, SegmentLog},
    },
    proto::etcdserverpb::{Member, MemberPromoteRequest, MemberRemoveRequest},
    state::{self, Command, Kind, Machine, Newcomer, Progress},
    storage::{Engine, rocks::Rocks},
};

/// Where others may reach a member that had been removed, until somebody says better.
const PEER_URL: &str = "http://localhost:2380";
const VALUE_CACHE_BYTES: u64 = 1 << 20;

/// Makes this member the only one. Nothing else may have its data open.
pub fn become_sole_member(directory: &DataDir) -> Result<(), Halt> {
    let (mut log, mut recovered) = SegmentLog::open(&log::Place::new(directory.log_dir()))?;
    let engine: Arc<dyn Engine> = Arc::new(Rocks::open(&directory.databases().present()?)?);
    let mut machine = Machine::open(engine.clone(), VALUE_CACHE_BYTES)?;
    let Progress { index, term, .. } = machine.applied();
    let reached = Position { index, term };
    finish_install(&mut log, &mut recovered, reached)?;
    recovered.check_applied(reached)?;
    let mut hard_state = recovered.hard_state.clone();
    for entry in &recovered.entries {
        if entry.index > machine.applied().index {
            apply(&mut machine, entry)?;
        }
    }
    let applied = machine.applied();
    hard_state.commit = applied.index;
    hard_state.term = hard_state.term.max(applied.term);
    if machine.members().is_removed(recovered.identity.member_id) {
        let text = "this member was removed from its cluster: it cannot become the only one of it";
        return Err(Halt::Refused(text.to_owned()));
    }
    let changes = changes_to_sole(&machine, recovered.identity.member_id);
    if !changes.is_empty() {
        let first = hard_state.commit + 1;
        let entries: Vec<Entry> =
            changes.into_iter().zip(first..).map(|(change, index)| entry(&change, index, hard_state.term)).collect();
        hard_state.commit += entries.len() as u64;
        log.append(&Group { entries: entries.clone(), hard_state: Some(hard_state) })?;
        for entry in &entries {
            apply(&mut machine, entry)?;
        }
    }
    machine.commit()?;
    engine.flush()
}

/// What must have been agreed for this member to be the only one.
fn changes_to_sole(machine: &Machine, own: u64) -> Vec<ConfChange> {
    let change = |kind, request: &[u8]| {
        changes::for_raft(Command::encode(0, kind, request)).expect("these are changes of the members")
    };
    let mut changes = Vec::new();
    match machine.members().get(own) {
        None => {
            let member = Member { id: own, peer_ur_ls: vec![PEER_URL.to_owned()], ..Member::default() };
            changes.push(change(Kind::MemberAdd, &Newcomer { member, max_learners: None }.encode()));
        }
        Some(member) if member.is_learner => {
            changes.push(change(Kind::MemberPromote, &MemberPromoteRequest { id: own }.encode_to_vec()));
        }
        Some(_) => (),
    }
    for other in machine.members().iter().filter(|member| member.id != own) {
        tracing::warn!({ "removed-member-id" = format_args!("{:x}", other.id) }, "forcing a member out of the cluster");
        changes.push(change(Kind::MemberRemove, &MemberRemoveRequest { id: other.id }.encode_to_vec()));
    }
    changes
}

fn entry(change: &ConfChange, index: u64, term: u64) -> Entry {
    let data = change.write_to_bytes().expect("a change of our own making can be encoded");
    Entry { entry_type: EntryType::EntryConfChange, index, term, data: data.into(), ..Entry::default() }
}

fn apply(machine: &mut Machine, entry: &Entry) -> Result<(), Halt> {
    let changes_members = entry.entry_type != EntryType::EntryNormal;
    let data: Bytes = if changes_members {
        let unreadable = |error| Halt::Refused(format!("entry {} cannot be read: {error}", entry.index));
        ConfChange::parse_from_carllerche_bytes(&entry.data).map_err(unreadable)?.context
    } else {
        entry.data.clone()
    };
    machine.apply(&state::Entry { index: entry.index, term: entry.term, data, changes_members })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::bootstrap::{self, Origin},
        *,
    };
    use crate::{node::log::Identity, state::Members};

    fn members() -> Vec<Member> {
        [1, 2].map(|id| Member { id, peer_ur_ls: vec![format!("http://127.0.0.1:{id}")], ..Member::default() }).to_vec()
    }

    /// Takes over what the first of two members has, after its log was marked; returns what it is then.
    fn taken_over(mark: Position, adopted: bool) -> (u64, Vec<u64>) {
        let temp = tempfile::tempdir().unwrap();
        let directory = DataDir::open(temp.path()).unwrap();
        let identity = Identity { cluster_id: 7, member_id: 1 };
        let at = Position { index: 2, term: 1 };
        let origin = Origin { identity, members: members(), introduced: Vec::new(), at };
        bootstrap::lay_down(&origin, &directory).unwrap();
        if adopted {
            let path = directory.databases().incoming(mark.index).keep();
            let members = Members::new(members());
            let engine = Rocks::open(&path).unwrap();
            Machine::bootstrap(&engine, identity.cluster_id, &members, (mark.index, mark.term)).unwrap();
            directory.databases().adopt(&path).unwrap();
        }
        let place = log::Place::new(directory.log_dir());
        SegmentLog::open(&place).unwrap().0.set_installing(Some(mark)).unwrap();
        become_sole_member(&directory).unwrap();
        assert_eq!(SegmentLog::open(&place).unwrap().1.installing, None, "the mark is gone");
        let engine = Rocks::open(&directory.databases().current().unwrap()).unwrap();
        let members = Members::read(&engine).unwrap().iter().map(|member| member.id).collect();
        (Progress::of(&engine).unwrap().unwrap().index, members)
    }

    #[test]
    fn a_snapshot_that_was_being_installed_is_no_obstacle() {
        let mark = Position { index: 9, term: 3 };
        assert_eq!(taken_over(mark, false), (3, vec![1]), "it never came to the database");
        assert_eq!(taken_over(mark, true), (10, vec![1]), "it had come to the database, but not to the log");
    }
}
