//! What a member tells its cluster when it starts.

use std::sync::Arc;

use prost::Message;
use tokio::sync::oneshot;

use super::{Failure, Floors};
use crate::{
    api::{Api, maintenance::ETCD_VERSION},
    config::Config,
    error::Error,
    proto::membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest},
    state::{Kind, Response},
};

/// Tells the cluster who this member is and which version it speaks; when that is agreed, a leader exists.
pub async fn publish(config: &Config, floors: &Floors) -> Result<(), Failure> {
    let api = &floors.api;
    let attributes = Attributes {
        name: config.name.clone(),
        client_urls: config.advertise_client_urls.iter().map(|url| url.as_str().to_owned()).collect(),
    };
    let request =
        ClusterMemberAttrSetRequest { member_id: api.header.member_id(), member_attributes: Some(attributes) };
    agree(api, Kind::MemberAttributesSet, &request).await?;
    let member = format!("{:x}", api.header.member_id());
    tracing::info!({ "local-member-id" = member }, "published local member to cluster through raft");
    let version = ETCD_VERSION.rsplit_once('.').map_or_else(String::new, |(minor, _)| format!("{minor}.0"));
    if api.readers().board.read().cluster_version != version {
        agree(api, Kind::ClusterVersionSet, &ClusterVersionSetRequest { ver: version }).await?;
    }
    Ok(())
}

async fn agree(api: &Arc<Api>, kind: Kind, request: &impl Message) -> Result<Response, Failure> {
    loop {
        catch_up(api).await?;
        let (tell, told) = oneshot::channel();
        api.node.propose(
            api.ids.next(),
            kind,
            &request.encode_to_vec(),
            Box::new(move |outcome| _ = tell.send(outcome)),
        );
        match told.await.unwrap_or(Err(Error::Stopped)) {
            Ok(response) => return Ok(response),
            Err(error @ (Error::Timeout | Error::DeadlineExceeded | Error::TooManyRequests)) => {
                tracing::warn!(%error, "failed to publish local member to cluster through raft");
            }
            Err(error) => return Err(Failure::Refused(error.to_string())),
        }
    }
}

/// Returns when everything that was ever acknowledged can be read here. After a crash that is when the log is replayed; until
/// then the node is too far behind to take proposals, the server's own included.
async fn catch_up(api: &Arc<Api>) -> Result<(), Failure> {
    loop {
        let (tell, told) = oneshot::channel();
        api.node.read_barrier(Box::new(move |outcome| _ = tell.send(outcome)));
        match told.await.unwrap_or(Err(Error::Stopped)) {
            Ok(()) => return Ok(()),
            Err(error @ (Error::Timeout | Error::DeadlineExceeded | Error::LeaderChanged)) => {
                let (applied, committed) = (api.node.status().applied(), api.node.status().committed());
                tracing::warn!(%error, applied, committed, "still catching up with the log");
            }
            Err(error) => return Err(Failure::Refused(error.to_string())),
        }
    }
}
