//! `--force-new-cluster`: one surviving member forms a new cluster of one, with all its data.
//!
//! The operator asserts with the flag that the other members will not come back. Therefore everything in this member's log counts
//! as committed: the other members cannot decide otherwise any more, and the stored commit index may lag behind what was
//! acknowledged to clients. (etcd drops the entries after it.) Then the other members are removed, by entries that look as if a
//! quorum had committed them. A member that comes back nevertheless is refused, because it was removed.
//!
//! As always, these entries are in the log before they are in the database. So a crash in between is harmless: the next start
//! replays them, with the flag or without.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType};

use crate::{
    error::Halt,
    node::{conf_change, data_dir::DataDir, finish_install},
    proto::etcdserverpb::{Member, MemberPromoteRequest, MemberRemoveRequest},
    raft_log::{Group, LogLocation, LogStore, Position, SegmentLog},
    state::{self, AppliedPosition, Command, Kind, Machine, NewMember},
    storage::{Engine, rocks::Rocks},
};

/// The peer URL of a member that had been removed, until it is updated.
const PEER_URL: &str = "http://localhost:2380";
const VALUE_CACHE_BYTES: u64 = 1 << 20;

/// Makes this member the only one of its cluster. No other process or object may have its data open.
pub fn become_sole_member(directory: &DataDir) -> Result<(), Halt> {
    let (mut log, mut recovered) = SegmentLog::open(&LogLocation::new(directory.log_dir()))?;
    let engine: Arc<dyn Engine> = Arc::new(Rocks::open(&directory.databases().current_existing()?)?);
    let mut machine = Machine::open(engine.clone(), VALUE_CACHE_BYTES)?;
    let AppliedPosition { index, term, .. } = machine.applied();
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
        let text = "this member was removed from its cluster: it cannot become its only member";
        return Err(Halt::InvalidData(text.to_owned()));
    }
    let changes = changes_to_sole_member(&machine, recovered.identity.member_id);
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

/// The membership changes after which this member is the only one.
fn changes_to_sole_member(machine: &Machine, own: u64) -> Vec<ConfChange> {
    let change = |kind, request: &[u8]| {
        conf_change::to_conf_change(Command::encode(0, kind, request)).expect("these are membership changes")
    };
    let mut changes = Vec::new();
    match machine.members().get(own) {
        None => {
            let member = Member { id: own, peer_ur_ls: vec![PEER_URL.to_owned()], ..Member::default() };
            changes.push(change(Kind::MemberAdd, &NewMember { member, max_learners: None }.encode()));
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
    let data = change.write_to_bytes().expect("a change that was just built can be encoded");
    Entry { entry_type: EntryType::EntryConfChange, index, term, data: data.into(), ..Entry::default() }
}

fn apply(machine: &mut Machine, entry: &Entry) -> Result<(), Halt> {
    let changes_members = entry.entry_type != EntryType::EntryNormal;
    let data: Bytes = if changes_members {
        let unreadable = |error| Halt::InvalidData(format!("entry {} cannot be read: {error}", entry.index));
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
        super::{bootstrap, plan::BootstrapPlan},
        *,
    };
    use crate::{raft_log::Identity, state::Members};

    fn members() -> Vec<Member> {
        [1, 2].map(|id| Member { id, peer_ur_ls: vec![format!("http://127.0.0.1:{id}")], ..Member::default() }).to_vec()
    }

    /// Forces a new cluster with the data of the first of two members, whose log says that it is installing the snapshot at
    /// `mark`. Returns the applied index, and the IDs of the members.
    fn force_new_cluster(mark: Position, adopted: bool) -> (u64, Vec<u64>) {
        let temp = tempfile::tempdir().unwrap();
        let directory = DataDir::open(temp.path()).unwrap();
        let identity = Identity { cluster_id: 7, member_id: 1 };
        let at = Position { index: 2, term: 1 };
        let plan = BootstrapPlan { identity, members: members(), join_contacts: Vec::new(), at };
        bootstrap::write_initial_files(&plan, &directory).unwrap();
        if adopted {
            let path = directory.databases().incoming(mark.index).keep();
            let members = Members::new(members());
            let engine = Rocks::open(&path).unwrap();
            Machine::bootstrap(&engine, identity.cluster_id, &members, (mark.index, mark.term)).unwrap();
            directory.databases().adopt(&path).unwrap();
        }
        let place = LogLocation::new(directory.log_dir());
        SegmentLog::open(&place).unwrap().0.set_installing(Some(mark)).unwrap();
        become_sole_member(&directory).unwrap();
        assert_eq!(SegmentLog::open(&place).unwrap().1.installing, None, "the mark is removed");
        let engine = Rocks::open(&directory.databases().current().unwrap()).unwrap();
        let members = Members::read(&engine).unwrap().iter().map(|member| member.id).collect();
        (AppliedPosition::of(&engine).unwrap().unwrap().index, members)
    }

    #[test]
    fn an_interrupted_installation_of_a_snapshot_is_finished_or_dropped() {
        let mark = Position { index: 9, term: 3 };
        assert_eq!(force_new_cluster(mark, false), (3, vec![1]), "the database was not replaced yet");
        assert_eq!(force_new_cluster(mark, true), (10, vec![1]), "the database was replaced, but not the log");
    }
}
