//! Who the first members are: what a member without data founds or joins.
//!
//! Read and checked only for a first start; a restart knows from its data who the members are, and ignores what is typed. (But
//! whoever types where another member is does not get to be this one: `server/bootstrap.rs`.)

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ClusterState, Config, names,
    urls::{self, Url},
};

/// Everything that a first start needs, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstStart {
    /// Whether to found a cluster or to join one.
    pub state: ClusterState,
    /// What this member is called among the members.
    pub name: String,
    /// All members, with the sorted URLs of each.
    pub members: BTreeMap<String, Vec<Url>>,
    /// The cluster's token: with the URLs, what identities are made from.
    pub token: String,
}

impl FirstStart {
    /// Reads and checks it, in etcd's order and in etcd's words where etcd refuses too.
    pub(super) fn read(config: &Config) -> Result<Self, String> {
        let members = initial_cluster(&config.initial_cluster)?;
        let name = &config.name;
        let told = members
            .get(name)
            .ok_or_else(|| format!("couldn't find local name {name:?} in the initial cluster configuration"))?;
        // Who joins has told the others his URLs before he starts.
        if config.initial_cluster_state == ClusterState::New {
            check_advertised(told, name, &config.initial_advertise_peer_urls)?;
        }
        check_no_url_twice(&members)?;
        Ok(Self {
            state: config.initial_cluster_state,
            name: name.clone(),
            members,
            token: config.initial_cluster_token.clone(),
        })
    }

    /// The URLs of this member.
    ///
    /// # Panics
    /// Never: that there are some was checked.
    #[must_use]
    pub fn own_urls(&self) -> &[Url] {
        &self.members[&self.name]
    }

    /// The URLs of all others, sorted.
    #[must_use]
    pub fn urls_of_others(&self) -> Vec<Url> {
        let others = self.members.iter().filter(|(name, _)| **name != self.name);
        let mut urls: Vec<Url> = others.flat_map(|(_, urls)| urls.iter().cloned()).collect();
        urls.sort();
        urls
    }
}

/// Reads `name=url,…`: the URLs of each member, sorted. A name that comes again adds a URL.
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

/// What this member advertises must be what the others were told of it.
fn check_advertised(told: &[Url], name: &str, advertised: &[Url]) -> Result<(), String> {
    let Err(cause) = names::lead_to_the_same(advertised, told) else { return Ok(()) };
    let lacking = |urls: &[Url], others: &[Url]| -> Vec<Url> {
        urls.iter().filter(|url| !others.contains(url)).cloned().collect()
    };
    let (unadvertised, untold) = (lacking(told, advertised), lacking(advertised, told));
    // As in etcd, both name what is advertised, though the flag is another.
    let (joined, all) = (urls::joined(advertised), pairs(name, advertised));
    Err(if !unadvertised.is_empty() {
        let missing = pairs(name, &unadvertised);
        format!("--initial-cluster has {missing} but missing from --initial-advertise-peer-urls={joined} ({cause})")
    } else if !untold.is_empty() {
        let missing = urls::joined(&untold);
        format!("--initial-advertise-peer-urls has {missing} but missing from --initial-cluster={all}")
    } else {
        format!("failed to resolve {joined} to match --initial-cluster={all} ({cause})")
    })
}

fn pairs(name: &str, urls: &[Url]) -> String {
    urls.iter().map(|url| format!("{name}={url}")).collect::<Vec<_>>().join(",")
}
