//! The first start of a member.

use super::Failure;
use crate::{
    config::Config,
    node::{
        data_dir::{self, DataDir},
        identity::{ClusterId, MemberId},
        log::{self, Identity, Position, SegmentLog},
    },
    proto::etcdserverpb::Member,
    state::{Machine, Members},
    storage::rocks::Rocks,
};

/// The first start of a cluster's only member: identity, log and database, all or nothing.
pub fn found_cluster(config: &Config, directory: &DataDir) -> Result<(), Failure> {
    let first = config.first_start().map_err(Failure::Refused)?;
    let member_id = MemberId::of_first(&first.peer_urls, &first.token);
    let cluster_id = ClusterId::of_founders(&[member_id]);
    let member = Member {
        id: member_id.get(),
        peer_ur_ls: first.peer_urls.iter().map(|url| url.as_str().to_owned()).collect(),
        ..Member::default()
    };
    tracing::info!(
        { "cluster-id" = %cluster_id, "local-member-id" = %member_id },
        "founding a cluster of one member"
    );
    // As if the entry that adds this member had been written, committed and forgotten: the first election is in term 2.
    let origin = Position { index: 1, term: 1 };
    let hard_state = raft::eraftpb::HardState { term: origin.term, commit: origin.index, ..Default::default() };
    let identity = Identity { cluster_id: cluster_id.get(), member_id: member_id.get() };
    directory.initialise(|draft| {
        SegmentLog::create(&log::Place::new(data_dir::log_in(draft)), identity, origin, &hard_state)?;
        let engine = Rocks::open(&data_dir::db_in(draft))?;
        let members = Members::new([member]);
        Machine::bootstrap(&engine, identity.cluster_id, &members, (origin.index, origin.term))
    })?;
    Ok(())
}
