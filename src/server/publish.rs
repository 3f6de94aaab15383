//! What a member tells its cluster when it starts: its name, and where clients find it. When that is agreed, it is ready.

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

/// Between two attempts that failed at once.
const PAUSE: Duration = Duration::from_millis(500);

/// Tells the cluster who this member is, however long that takes. `Err` only if the node has stopped.
pub async fn publish(config: &Config, api: &Arc<Api>) -> Result<(), Error> {
    let attributes = Attributes {
        name: config.name.clone(),
        client_urls: config.advertise_client_urls.iter().map(ToString::to_string).collect(),
    };
    let member_id = api.header.member_id();
    let request = ClusterMemberAttrSetRequest { member_id, member_attributes: Some(attributes) };
    loop {
        catch_up(api).await?;
        match agree_once(api, Kind::MemberAttributesSet, &request).await {
            Ok(_) => break,
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => {
                tracing::warn!(%error, "failed to publish local member to cluster through raft");
                sleep(PAUSE).await;
            }
        }
    }
    let member = format!("{member_id:x}");
    tracing::info!({ "local-member-id" = member }, "published local member to cluster through raft");
    versions::decide(api).await;
    Ok(())
}

/// Proposes something of this member's own.
pub async fn agree_once(api: &Arc<Api>, kind: Kind, request: &impl Message) -> Result<Response, Error> {
    outcome(|waiter| api.node.propose(api.ids.next(), kind, &request.encode_to_vec(), waiter)).await
}

/// Returns when everything that was ever acknowledged can be read here. After a crash that is when the log is replayed; until
/// then the node is too far behind to take proposals, the server's own included.
async fn catch_up(api: &Arc<Api>) -> Result<(), Error> {
    loop {
        match outcome(|waiter| api.node.read_barrier(waiter)).await {
            Ok(()) => return Ok(()),
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => {
                let (applied, committed) = (api.node.status().applied(), api.node.status().committed());
                tracing::warn!(%error, applied, committed, "still catching up with the log");
                sleep(PAUSE).await;
            }
        }
    }
}
