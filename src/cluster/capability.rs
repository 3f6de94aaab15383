//! Raises the cluster's capability level once all members know a higher one. (`state/capability.rs` says what levels are for.)
//!
//! A member that knows no levels drops those that others publish. After it was upgraded it lacks them, and so would not raise the
//! level when it leads. Therefore each member publishes again when another one was started, until the level is raised.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use tokio::time::sleep;

use super::Cluster;
use crate::state::{CapabilityLevelSet, Kind, MemberAttributes};

/// How long a member that has started waits for the level to be raised, if all members know a higher one.
const RAISE_TIMEOUT: Duration = Duration::from_secs(1);

/// The level that the cluster can be raised to, if any: what all members know, this one included.
fn raisable(cluster: &Cluster) -> Option<u64> {
    let readers = cluster.node.readers();
    let state = readers.cluster.read();
    let lowest = state.members.lowest_level().min(cluster.known_level);
    (lowest > state.capability_level).then_some(lowest)
}

/// Raises the level, if this member leads and all members know a higher one.
async fn raise(cluster: &Cluster) {
    let Some(level) = raisable(cluster).filter(|_| cluster.leads()) else { return };
    match cluster.propose(Kind::CapabilityLevelSet, CapabilityLevelSet { level }.encode_to_vec()).await {
        Ok(_) => tracing::info!(level, "raised the capability level of the cluster: all members know it"),
        Err(error) => tracing::warn!(level, %error, "failed to raise the capability level of the cluster"),
    }
}

/// Raises the level, or waits for the leader to do so, before this member begins to serve clients: so what needs the level works
/// as soon as the last member of a cluster is ready.
pub async fn raise_or_await(cluster: &Cluster) {
    let until = Instant::now() + RAISE_TIMEOUT;
    while raisable(cluster).is_some() && Instant::now() < until {
        raise(cluster).await;
        sleep(cluster.heartbeat_interval / 10).await;
    }
}

/// Until the level is the highest that this member knows: raises it while this member leads, and publishes the attributes again
/// when another member was started.
pub async fn maintain(cluster: Arc<Cluster>, attributes: MemberAttributes) {
    let repeated = MemberAttributes { repeated: true, ..attributes }.encode();
    let status = cluster.node.status().clone();
    let mut answered = 0;
    while status.capability_level() < cluster.known_level {
        let started = status.started_members();
        if started > answered && cluster.propose(Kind::MemberAttributesSet, repeated.clone()).await.is_ok() {
            answered = started;
        }
        raise(&cluster).await;
        sleep(cluster.heartbeat_interval).await;
    }
}
