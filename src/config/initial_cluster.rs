//! The initial members: the cluster that a member without data bootstraps or joins.
//!
//! Parsed and checked only at a first start. At a restart the members are known from the data, and these flags are ignored
//! (except that a member does not start if its peer URLs belong to another member: `cluster/bootstrap.rs`).

use std::collections::{BTreeMap, BTreeSet};

use super::{ClusterState, Config, url_resolution};
use crate::net::url::{self, Url};

/// Everything that a first start needs, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitialCluster {
    pub state: ClusterState,
    /// The name of this member; a key of `members`.
    pub name: String,
    /// All members by name, with the sorted peer URLs of each.
    pub members: BTreeMap<String, Vec<Url>>,
    /// The cluster token. Member and cluster IDs are derived from it and the URLs.
    pub token: String,
}

impl InitialCluster {
    /// Checks in etcd's order, and fails with etcd's texts where etcd refuses too.
    pub(super) fn read(config: &Config) -> Result<Self, String> {
        let members = initial_cluster(&config.initial_cluster)?;
        let name = &config.name;
        let listed = members
            .get(name)
            .ok_or_else(|| format!("couldn't find local name {name:?} in the initial cluster configuration"))?;
        // A joining member was announced to the others, with its URLs, before it starts.
        if config.initial_cluster_state == ClusterState::New {
            check_advertised(listed, name, &config.initial_advertise_peer_urls)?;
        }
        check_no_url_twice(&members)?;
        Ok(Self {
            state: config.initial_cluster_state,
            name: name.clone(),
            members,
            token: config.initial_cluster_token.clone(),
        })
    }

    /// The peer URLs of this member.
    ///
    /// # Panics
    /// Never: `read` has checked that the member is listed.
    #[must_use]
    pub fn own_urls(&self) -> &[Url] {
        &self.members[&self.name]
    }

    /// The peer URLs of all other members, sorted.
    #[must_use]
    pub fn urls_of_others(&self) -> Vec<Url> {
        let others = self.members.iter().filter(|(name, _)| **name != self.name);
        let mut urls: Vec<Url> = others.flat_map(|(_, urls)| urls.iter().cloned()).collect();
        urls.sort();
        urls
    }
}

/// Parses `name=url,…` into the sorted URLs of each member. A repeated name adds a URL.
fn initial_cluster(text: &str) -> Result<BTreeMap<String, Vec<Url>>, String> {
    let mut members = BTreeMap::<String, Vec<Url>>::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (name, url) = item.split_once('=').unwrap_or((item, ""));
        let url = Url::parse(url).map_err(|error| format!("error setting up initial cluster: {error}"))?;
        members.entry(name.to_owned()).or_default().push(url);
    }
    for urls in members.values_mut() {
        urls.sort();
    }
    Ok(members)
}

fn check_no_url_twice(members: &BTreeMap<String, Vec<Url>>) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    if members.values().flatten().all(|url| seen.insert(url)) {
        return Ok(());
    }
    let all: Vec<_> = members.iter().map(|(name, urls)| pairs(name, urls)).collect();
    Err(format!("initial cluster {} has duplicate url", all.join(",")))
}

/// The peer URLs that this member advertises must match those in `--initial-cluster`.
fn check_advertised(listed: &[Url], name: &str, advertised: &[Url]) -> Result<(), String> {
    let Err(cause) = url_resolution::resolve_to_same_addresses(advertised, listed) else { return Ok(()) };
    let missing_from = |urls: &[Url], others: &[Url]| -> Vec<Url> {
        urls.iter().filter(|url| !others.contains(url)).cloned().collect()
    };
    let (unadvertised, unlisted) = (missing_from(listed, advertised), missing_from(advertised, listed));
    // As in etcd, both texts show the advertised URLs, though one of them names the other flag.
    let (joined, all) = (url::joined(advertised), pairs(name, advertised));
    Err(if !unadvertised.is_empty() {
        let missing = pairs(name, &unadvertised);
        format!("--initial-cluster has {missing} but missing from --initial-advertise-peer-urls={joined} ({cause})")
    } else if !unlisted.is_empty() {
        let missing = url::joined(&unlisted);
        format!("--initial-advertise-peer-urls has {missing} but missing from --initial-cluster={all}")
    } else {
        format!("failed to resolve {joined} to match --initial-cluster={all} ({cause})")
    })
}

fn pairs(name: &str, urls: &[Url]) -> String {
    urls.iter().map(|url| format!("{name}={url}")).collect::<Vec<_>>().join(",")
}
