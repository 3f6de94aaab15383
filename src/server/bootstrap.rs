//! The first start of a member.

use super::Failure;
use crate::{
    config::{ClusterState, FirstStart},
    error::Halt,
    node::{
        data_dir::{self, DataDir},
        identity::{ClusterId, MemberId},
        log::{self, Identity, Position, SegmentLog},
    },
    proto::etcdserverpb::Member,
    state::{Machine, Members},
    storage::rocks::Rocks,
};

/// What a member begins with. The founders of a cluster all begin with the same, without having talked.
struct Origin {
    identity: Identity,
    members: Members,
    at: Position,
}

/// A founder's first start: identity, log and database, all or nothing.
pub fn found_cluster(first: &FirstStart, directory: &DataDir) -> Result<(), Failure> {
    if first.state == ClusterState::Existing {
        return Err(Failure::Refused("joining a running cluster is not supported yet".to_owned()));
    }
    let origin = founders(first)?;
    let Identity { cluster_id, member_id } = origin.identity;
    tracing::info!(
        {
            "cluster-id" = format_args!("{cluster_id:x}"),
            "local-member-id" = format_args!("{member_id:x}"),
            members = origin.at.index
        },
        "founding a cluster"
    );
    Ok(lay_down(&origin, directory)?)
}

/// As if an entry for each member had been written, committed and forgotten: the first election is in term 2.
fn founders(first: &FirstStart) -> Result<Origin, Failure> {
    let id_of = |urls: &[_]| MemberId::of_first(urls, &first.token);
    let ids: Vec<MemberId> = first.members.values().map(|urls| id_of(urls)).collect();
    let members = Members::new(first.members.values().map(|urls| Member {
        id: id_of(urls).get(),
        peer_ur_ls: urls.iter().map(ToString::to_string).collect(),
        ..Member::default()
    }));
    let own = id_of(first.own_urls());
    if members.iter().count() < ids.len() {
        return Err(Failure::Refused(format!("member exists with identical ID {own}")));
    }
    let identity = Identity { cluster_id: ClusterId::of_founders(&ids).get(), member_id: own.get() };
    Ok(Origin { identity, members, at: Position { index: ids.len() as u64, term: 1 } })
}

fn lay_down(origin: &Origin, directory: &DataDir) -> Result<(), Halt> {
    let Origin { identity, members, at } = origin;
    let hard_state = raft::eraftpb::HardState { term: at.term, commit: at.index, ..Default::default() };
    directory.initialise(|draft| {
        SegmentLog::create(&log::Place::new(data_dir::log_in(draft)), *identity, *at, &hard_state)?;
        let engine = Rocks::open(&data_dir::db_in(draft))?;
        Machine::bootstrap(&engine, identity.cluster_id, members, (at.index, at.term))
    })
}
