//! Publishes the member's attributes, its name and its client URLs, to the cluster at every start. The member serves clients once
//! they are committed.

use std::{sync::Arc, time::Duration};

use prost::Message;
use tokio::time::sleep;

use super::versions;
use crate::{
    api::{Api, company::outcome},
    config::Config,
    error::Error,
    proto::membershippb::{Attributes, ClusterMemberAttrSetRequest},
    state::{Kind, Response},
};

/// Time between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// Publishes the attributes, retrying without a limit. `Err` only if the node has stopped.
pub async fn publish(config: &Config, api: &Arc<Api>) -> Result<(), Error> {
    let attributes = Attributes {
        name: config.name.clone(),
        client_urls: config.advertise_client_urls.iter().map(ToString::to_string).collect(),
    };
    let member_id = api.header.member_id();
    let request = ClusterMemberAttrSetRequest { member_id, member_attributes: Some(attributes) };
    loop {
        catch_up(api).await?;
        match propose(api, Kind::MemberAttributesSet, &request).await {
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
    versions::update(api).await;
    Ok(())
}

/// Proposes a command on behalf of the server itself, once, and waits for its outcome.
pub async fn propose(api: &Arc<Api>, kind: Kind, request: &impl Message) -> Result<Response, Error> {
    outcome(|waiter| api.node.propose(api.ids.next(), kind, &request.encode_to_vec(), waiter)).await
}

/// Waits until everything that was ever acknowledged can be read here. After a crash, that is when the log has been replayed;
/// until then the node is too far behind to accept proposals, including the server's own.
async fn catch_up(api: &Arc<Api>) -> Result<(), Error> {
    loop {
        match outcome(|waiter| api.node.read_barrier(waiter)).await {
            Ok(()) => return Ok(()),
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => {
                let (applied, committed) = (api.node.status().applied(), api.node.status().committed());
                tracing::warn!(%error, applied, committed, "still catching up with the log");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}
