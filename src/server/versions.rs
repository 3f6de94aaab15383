//! Which version the cluster speaks: the lowest that any member speaks. The leader decides it, and raises it when all members
//! have become newer.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::sleep};

use super::publish::agree_once;
use crate::{
    api::Api,
    node::transport::Speech,
    peer::{Client, Versions},
    proto::{etcdserverpb::Member, membershippb::ClusterVersionSetRequest},
    state::Kind,
    version::ETCD_VERSION,
};

/// How often the leader looks whether all members have become newer.
const ROUND: Duration = Duration::from_secs(4);
/// A member that takes longer to say what it speaks cannot be reached.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a cluster speaks as long as not all members can be reached.
pub const OLDEST: Version = Version { major: 3, minor: 0, patch: 0 };

/// A version, three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes when old and new cannot work together.
    pub major: u64,
    /// Changes with what is spoken.
    pub minor: u64,
    /// Changes with what is mended.
    pub patch: u64,
}

impl Version {
    /// Reads `3.7.1`, and what may stand behind a dash.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split_once(['-', '+']).map_or(text, |(numbers, _)| numbers).split('.');
        let mut next = || numbers.next()?.parse().ok();
        let version = Self { major: next()?, minor: next()?, patch: next()? };
        numbers.next().is_none().then_some(version)
    }

    /// The one that the next release will speak.
    pub fn next_minor(self) -> Self {
        Self { minor: self.minor + 1, patch: 0, ..self }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What this member says of itself to others, before anything else.
pub fn speech() -> Speech {
    let release = |version: Version| {
        let number = |number| u8::try_from(number).expect("versions are small numbers");
        (number(version.major), number(version.minor))
    };
    Speech { version: release(ours()), oldest: release(OLDEST) }
}

/// What this member speaks.
pub fn ours() -> Version {
    Version::parse(ETCD_VERSION).expect("it is three numbers")
}

/// What a member speaks, if one of its URLs says so.
pub async fn ask(client: &Client, member: &Member, patience: Duration) -> Option<Versions> {
    for url in &member.peer_ur_ls {
        match client.versions(url, patience).await {
            Ok(versions) => return Some(versions),
            Err(error) => {
                tracing::warn!({ "remote-member-id" = format_args!("{:x}", member.id), error }, "failed to get version");
            }
        }
    }
    None
}

/// Decides again and again.
pub async fn watch_over(api: Arc<Api>) {
    loop {
        sleep(ROUND).await;
        decide(&api).await;
    }
}

/// Decides which version the cluster speaks, if this member leads and it is not decided.
pub async fn decide(api: &Arc<Api>) {
    if !api.leads() {
        return;
    }
    let present = Version::parse(&api.versions().cluster);
    let Some(next) = choose(present, lowest(api).await) else { return };
    let (from, to) = (api.versions().cluster, next.to_string());
    tracing::info!(from, to, "updating cluster version using v3 API");
    let request = ClusterVersionSetRequest { ver: to };
    if let Err(error) = agree_once(api, Kind::ClusterVersionSet, &request).await {
        tracing::warn!(%error, "failed to update cluster version");
    }
}

/// The version to change to, if it changes: it never goes back by itself.
fn choose(present: Option<Version>, lowest: Option<Version>) -> Option<Version> {
    let lowest = lowest.map(|version| Version { patch: 0, ..version });
    match (present, lowest) {
        (None, lowest) => Some(lowest.unwrap_or(OLDEST)),
        (Some(present), Some(lowest)) if present < lowest && present.major == lowest.major => Some(lowest),
        (Some(_), _) => None,
    }
}

/// The lowest version that any member speaks; None if one of them does not say.
async fn lowest(api: &Arc<Api>) -> Option<Version> {
    let mut asking = JoinSet::new();
    for member in api.members().into_iter().filter(|member| member.id != api.header.member_id()) {
        let client = api.company.client.clone();
        asking.spawn(async move { ask(&client, &member, PATIENCE).await });
    }
    let mut lowest = ours();
    while let Some(told) = asking.join_next().await {
        lowest = lowest.min(Version::parse(&told.ok()??.server)?);
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
    fn the_cluster_speaks_the_lowest_and_never_goes_back() {
        for (present, lowest, expected) in [
            ("", "3.7.1", Some("3.7.0")),
            ("", "", Some("3.0.0")),
            ("3.0.0", "", None),
            ("3.0.0", "3.7.1", Some("3.7.0")),
            ("3.7.0", "3.7.1", None),
            ("3.7.0", "3.6.5", None),
            ("3.7.0", "4.0.0", None),
        ] {
            let chosen = choose(version(present), version(lowest)).map(|version| version.to_string());
            assert_eq!(chosen.as_deref(), expected, "from {present:?} with {lowest:?}");
        }
    }
}
