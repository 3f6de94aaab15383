//! Publishes the member's attributes to the cluster at every start: its name, its client URLs and the capability level that it
//! knows. The member serves clients once they are committed.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{Cluster, await_outcome, capability, version};
use crate::{
    config::Config,
    error::Error,
    proto::membershippb::{Attributes, ClusterMemberAttrSetRequest},
    state::{Kind, MemberAttributes},
};

/// Time between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// Publishes the attributes, retrying without a limit, and returns them. `Err` only if the node has stopped.
pub async fn publish(config: &Config, cluster: &Arc<Cluster>) -> Result<MemberAttributes, Error> {
    let attributes = Attributes {
        name: config.name.clone(),
        client_urls: config.advertise_client_urls.iter().map(ToString::to_string).collect(),
    };
    let member_id = cluster.member_id;
    let request = ClusterMemberAttrSetRequest { member_id, member_attributes: Some(attributes) };
    let attributes = MemberAttributes { request, level: cluster.known_level, repeated: false };
    loop {
        catch_up(cluster).await?;
        match cluster.propose(Kind::MemberAttributesSet, attributes.encode()).await {
            Ok(_) => break,
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => {
                tracing::warn!(%error, "failed to publish local member to cluster through raft");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
    let member = format!("{member_id:x}");
    tracing::info!({ "local-member-id" = member }, "published local member to cluster through raft");
    version::update(cluster).await;
    capability::raise_or_await(cluster).await;
    Ok(attributes)
}

/// Waits until everything that was ever acknowledged can be read here. After a crash, that is when the log has been replayed;
/// until then the node is too far behind to accept proposals, including the server's own.
async fn catch_up(cluster: &Arc<Cluster>) -> Result<(), Error> {
    loop {
        match await_outcome(|waiter| cluster.node.read_barrier(waiter)).await {
            Ok(()) => return Ok(()),
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => {
                let (applied, committed) = (cluster.node.status().applied(), cluster.node.status().committed());
                tracing::warn!(%error, applied, committed, "still catching up with the log");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}
