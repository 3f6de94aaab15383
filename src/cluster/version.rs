//! The cluster version: the lowest version of any member. The leader sets it, and raises it when all members have been upgraded.

use std::{fmt, sync::Arc, time::Duration};

use prost::Message;
use tokio::{task::JoinSet, time::sleep};

use super::{
    Cluster,
    peer_client::{PeerClient, Versions},
};
use crate::{
    node::transport::ProtocolVersion,
    proto::{etcdserverpb::Member, membershippb::ClusterVersionSetRequest},
    state::Kind,
    version::ETCD_VERSION,
};

/// How often the leader checks whether all members have been upgraded.
const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// A member that takes longer to report its version counts as unreachable.
const VERSION_TIMEOUT: Duration = Duration::from_secs(2);

/// The cluster version as long as not all members could be reached.
pub const MIN_CLUSTER_VERSION: Version = Version { major: 3, minor: 0, patch: 0 };

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u64,
    pub minor: u64,
    pub patch: u64,
}

impl Version {
    /// Parses `3.7.1`; a pre-release or build suffix, as in `3.7.0-rc.1`, is ignored.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split_once(['-', '+']).map_or(text, |(numbers, _)| numbers).split('.');
        let mut next = || numbers.next()?.parse().ok();
        let version = Self { major: next()?, minor: next()?, patch: next()? };
        numbers.next().is_none().then_some(version)
    }

    /// The version of the next minor release.
    pub fn next_minor(self) -> Self {
        Self { minor: self.minor + 1, patch: 0, ..self }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The versions that this member announces at the start of every connection to another member.
pub fn protocol_version() -> ProtocolVersion {
    let release = |version: Version| {
        let number = |number| u8::try_from(number).expect("versions are small numbers");
        (number(version.major), number(version.minor))
    };
    ProtocolVersion { version: release(local()), oldest: release(MIN_CLUSTER_VERSION) }
}

/// The version of this member.
pub fn local() -> Version {
    Version::parse(ETCD_VERSION).expect("the constant is a version")
}

/// The versions of a member; None if none of its URLs returns them.
pub async fn fetch(client: &PeerClient, member: &Member, timeout: Duration) -> Option<Versions> {
    for url in &member.peer_ur_ls {
        match client.versions(url, timeout).await {
            Ok(versions) => return Some(versions),
            Err(error) => {
                tracing::warn!({ "remote-member-id" = format_args!("{:x}", member.id), error }, "failed to get version");
            }
        }
    }
    None
}

/// Keeps the cluster version up to date while this member leads.
pub async fn update_periodically(cluster: Arc<Cluster>) {
    loop {
        sleep(CHECK_INTERVAL).await;
        update(&cluster).await;
    }
}

/// Sets the cluster version if this member leads and the version has to change.
pub async fn update(cluster: &Arc<Cluster>) {
    if !cluster.leads() {
        return;
    }
    let present = Version::parse(&cluster.versions().cluster);
    let Some(next) = next_version(present, lowest_member_version(cluster).await) else { return };
    let (from, to) = (cluster.versions().cluster, next.to_string());
    tracing::info!(from, to, "updating cluster version using v3 API");
    let request = ClusterVersionSetRequest { ver: to };
    if let Err(error) = cluster.propose(Kind::ClusterVersionSet, request.encode_to_vec()).await {
        tracing::warn!(%error, "failed to update cluster version");
    }
}

/// The version to change to, if it changes. It is never lowered automatically.
fn next_version(present: Option<Version>, lowest: Option<Version>) -> Option<Version> {
    let lowest = lowest.map(|version| Version { patch: 0, ..version });
    match (present, lowest) {
        (None, lowest) => Some(lowest.unwrap_or(MIN_CLUSTER_VERSION)),
        (Some(present), Some(lowest)) if present < lowest && present.major == lowest.major => Some(lowest),
        (Some(_), _) => None,
    }
}

/// The lowest version of any member; None if a member does not report its version.
async fn lowest_member_version(cluster: &Arc<Cluster>) -> Option<Version> {
    let mut queries = JoinSet::new();
    for member in cluster.members().into_iter().filter(|member| member.id != cluster.member_id) {
        let client = cluster.client.clone();
        queries.spawn(async move { fetch(&client, &member, VERSION_TIMEOUT).await });
    }
    let mut lowest = local();
    while let Some(versions) = queries.join_next().await {
        lowest = lowest.min(Version::parse(&versions.ok()??.server)?);
    }
    Some(lowest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Option<Version> {
        Version::parse(text)
    }

    #[test]
    fn a_version_is_three_numbers() {
        assert_eq!(version("3.7.1").unwrap().to_string(), "3.7.1");
        assert_eq!(version("3.7.0-rc.1"), version("3.7.0"));
        assert_eq!([version("not_decided"), version("3.7"), version("3.7.1.2"), version("")], [None; 4]);
        assert!(version("3.10.0") > version("3.9.9"));
    }

    #[test]
    fn the_cluster_version_is_the_lowest_of_all_members_and_never_decreases() {
        for (present, lowest, expected) in [
            ("", "3.7.1", Some("3.7.0")),
            ("", "", Some("3.0.0")),
            ("3.0.0", "", None),
            ("3.0.0", "3.7.1", Some("3.7.0")),
            ("3.7.0", "3.7.1", None),
            ("3.7.0", "3.6.5", None),
            ("3.7.0", "4.0.0", None),
        ] {
            let next = next_version(version(present), version(lowest)).map(|version| version.to_string());
            assert_eq!(next.as_deref(), expected, "from {present:?} with {lowest:?}");
        }
    }
}
