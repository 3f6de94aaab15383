//! Joining a running cluster: `--initial-cluster-state=existing`.
//!
//! The member has been added to the cluster before, so the other members know it. It fetches their member list, finds itself in
//! it by its URLs (names only serve operators), and so learns its own ID and the cluster's.
//!
//! If any of them has seen this member serve clients, its data is lost, and it must not rejoin: it could vote a second time in a
//! term in which it has voted, and lack entries that it has acknowledged. A member that stopped before any other saw it serve may
//! join.

use std::time::Duration;

use super::{
    peer_client::{MemberList, PeerClient},
    plan::BootstrapPlan,
    version::{self, Version},
};
use crate::{
    config::{InitialCluster, url_resolution},
    net::url::Url,
    proto::etcdserverpb::Member,
    raft_log::{Identity, Position},
};

/// How long each URL may take to return the member list.
const MEMBER_LIST_TIMEOUT: Duration = Duration::from_secs(10);

/// The initial state of a member that joins a cluster; `Err` says why it cannot.
pub async fn plan_join(
    cluster: &InitialCluster,
    known_level: u64,
    max_learners: u64,
    client: &PeerClient,
    timeout: Duration,
) -> Result<BootstrapPlan, String> {
    let MemberList { cluster_id, members, capability_level, .. } = fetch_member_list(cluster, client).await?;
    if capability_level > known_level {
        return Err(format!(
            "the cluster uses capability level {capability_level}, and this member knows level {known_level} only: start it \
             with a version that knows level {capability_level}, and without a lower --max-capability-level"
        ));
    }
    let member_id = find_local_member(cluster, &members)
        .map_err(|error| format!("error validating peerURLs {}: {error}", describe(cluster_id, &members)))?;
    refuse_rejoin_without_data(cluster, member_id, &members, client).await?;
    let others: Vec<&Member> = members.iter().filter(|member| member.id != member_id).collect();
    check_versions(&others, client, timeout).await?;
    if members.iter().filter(|member| member.is_learner).count() as u64 > max_learners {
        return Err("membership: too many learner members in cluster".to_owned());
    }
    let identity = Identity { cluster_id, member_id };
    Ok(BootstrapPlan { identity, members: Vec::new(), join_contacts: members, at: Position::default() })
}

async fn fetch_member_list(cluster: &InitialCluster, client: &PeerClient) -> Result<MemberList, String> {
    for url in cluster.urls_of_others() {
        match client.members(url.as_str(), MEMBER_LIST_TIMEOUT).await {
            Ok(list) if !list.is_metastore => return Err(foreign_program(&url)),
            Ok(list) if list.members.is_empty() => {
                tracing::warn!(url = url.as_str(), "the member list is empty; trying the next URL");
            }
            Ok(list) => return Ok(list),
            Err(error) => tracing::warn!(error, "failed to get cluster response"),
        }
    }
    let error = "could not retrieve cluster information from the given URLs";
    Err(format!("cannot fetch cluster info from peer urls: {error}"))
}

/// The error text if another program answers at the peer URL of a member.
pub fn foreign_program(url: &Url) -> String {
    format!(
        "{url} is no metastore, but another program, such as etcd, and the two cannot be members of one cluster: found a \
         cluster of its own and copy the keys, for example with \"etcdctl make-mirror\""
    )
}

/// Asks each of the other members: one that lags behind may not know yet that this member has served clients.
async fn refuse_rejoin_without_data(
    cluster: &InitialCluster,
    own: u64,
    members: &[Member],
    client: &PeerClient,
) -> Result<(), String> {
    let lists = client.member_lists(cluster.urls_of_others()).await;
    let mut listed = members.iter().chain(lists.iter().flat_map(|(_, list)| &list.members));
    let has_served = |it: &Member| it.id == own && !(it.name.is_empty() && it.client_ur_ls.is_empty());
    if listed.any(has_served) {
        return Err(format!(
            "member {own:x} has already been bootstrapped, but its data is not here: remove it from the cluster and add \
             it again, as a new member"
        ));
    }
    Ok(())
}

/// The ID of this member. The cluster's members must be those of `--initial-cluster`, and no others.
fn find_local_member(cluster: &InitialCluster, members: &[Member]) -> Result<u64, String> {
    if members.len() != cluster.members.len() {
        return Err("member count is unequal".to_owned());
    }
    let mut own = None;
    for member in members {
        let name = match_urls(cluster, member).map_err(|error| {
            let (id, urls) = (member.id, member.peer_ur_ls.join(" "));
            format!("PeerURLs: no match found for existing member ({id:x}, [{urls}]), last resolver error ({error})")
        })?;
        if *name == cluster.name {
            own = Some(member.id);
        }
    }
    own.ok_or_else(|| "this member is not in the cluster's member list".to_owned())
}

/// The name that `--initial-cluster` gives a member. Host names are resolved only if no entry has textually equal URLs.
fn match_urls<'a>(cluster: &'a InitialCluster, member: &Member) -> Result<&'a String, String> {
    let mut urls = member.peer_ur_ls.iter().map(|url| Url::parse(url)).collect::<Result<Vec<_>, _>>()?;
    urls.sort();
    if let Some((name, _)) = cluster.members.iter().find(|(_, known)| **known == urls) {
        return Ok(name);
    }
    let mut last_error = String::new();
    for (name, known) in &cluster.members {
        match url_resolution::resolve_to_same_addresses(&urls, known) {
            Ok(()) => return Ok(name),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

/// At least one member must report a compatible cluster version, and none an incompatible one.
async fn check_versions(others: &[&Member], client: &PeerClient, timeout: Duration) -> Result<(), String> {
    let local = Version { patch: 0, ..version::local() };
    let newest = if is_downgrading(others, client, timeout).await { local.next_minor() } else { local };
    let oldest = if newest > local { newest } else { version::MIN_CLUSTER_VERSION };
    let mut any_compatible = false;
    for member in others {
        let Some(versions) = version::fetch(client, member, timeout).await else { continue };
        let Some(cluster) = Version::parse(&versions.cluster) else { continue };
        if cluster < oldest || cluster > newest {
            let (id, cluster) = (format!("{:x}", member.id), cluster.to_string());
            tracing::warn!({ "remote-member-id" = id, "remote-member-cluster-version" = cluster }, "incompatible version");
            return Err("incompatible with current running cluster".to_owned());
        }
        any_compatible = true;
    }
    if any_compatible { Ok(()) } else { Err("incompatible with current running cluster".to_owned()) }
}

async fn is_downgrading(others: &[&Member], client: &PeerClient, timeout: Duration) -> bool {
    for url in others.iter().flat_map(|member| &member.peer_ur_ls) {
        match client.is_downgrading(url, timeout).await {
            Ok(downgrading) => return downgrading,
            Err(error) => tracing::warn!(error, "failed to get downgrade enabled status"),
        }
    }
    false
}

/// A cluster, as Go prints it.
fn describe(cluster_id: u64, members: &[Member]) -> String {
    let members = members.iter().map(|member| {
        let (id, learner, name) = (member.id, member.is_learner, &member.name);
        let (peers, clients) = (member.peer_ur_ls.join(" "), member.client_ur_ls.join(" "));
        format!(
            "&{{ID:{id:x} RaftAttributes:{{PeerURLs:[{peers}] IsLearner:{learner}}} \
             Attributes:{{Name:{name} ClientURLs:[{clients}]}}}}"
        )
    });
    let members = members.collect::<Vec<_>>().join(" ");
    format!("{{ClusterID:{cluster_id:x} Members:[{members}] RemovedMemberIDs:[]}}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::ClusterState, net::tls::ClientTls};

    fn initial_cluster(members: &[(&str, &str)]) -> InitialCluster {
        let urls = |text: &str| text.split(',').map(|url| Url::parse(url).unwrap()).collect();
        InitialCluster {
            state: ClusterState::Existing,
            name: "me".to_owned(),
            members: members.iter().map(|(name, text)| ((*name).to_owned(), urls(text))).collect(),
            token: String::new(),
        }
    }

    fn member(id: u64, urls: &[&str]) -> Member {
        Member { id, peer_ur_ls: urls.iter().map(ToString::to_string).collect(), ..Member::default() }
    }

    #[test]
    fn a_joining_member_finds_itself_by_its_urls() {
        let cluster = initial_cluster(&[("a", "http://10.0.0.1:1,http://10.0.0.1:2"), ("me", "http://10.0.0.2:1")]);
        let other = member(1, &["http://10.0.0.1:2", "http://10.0.0.1:1"]);
        assert_eq!(find_local_member(&cluster, &[other.clone(), member(7, &["http://10.0.0.2:1"])]), Ok(7));
        assert_eq!(find_local_member(&cluster, std::slice::from_ref(&other)).unwrap_err(), "member count is unequal");
        assert_eq!(
            find_local_member(&cluster, &[other, member(7, &["http://10.0.0.3:1"])]).unwrap_err(),
            "PeerURLs: no match found for existing member (7, [http://10.0.0.3:1]), last resolver error (resolved urls: \
             \"http://10.0.0.3:1\" != \"http://10.0.0.2:1\")"
        );
    }

    /// Starts a member that reports this version.
    async fn start_member(version: &'static str) -> Member {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let versions = format!(r#"{{"etcdserver":"{version}.0","etcdcluster":"{version}.0"}}"#);
        let router = axum::Router::new()
            .route("/version", axum::routing::get(|| async { versions }))
            .route("/downgrade/enabled", axum::routing::get(|| async { "false" }));
        tokio::spawn(axum::serve(listener, router).into_future());
        member(1, &[&url])
    }

    #[tokio::test]
    async fn a_member_joins_only_a_cluster_of_a_compatible_version() {
        let client = PeerClient::new(MEMBER_LIST_TIMEOUT, ClientTls::without_certificates());
        let check = async |members: &[&Member]| check_versions(members, &client, MEMBER_LIST_TIMEOUT).await;
        let refused = Err("incompatible with current running cluster".to_owned());
        let (same, old, new) = tokio::join!(start_member("3.7"), start_member("2.3"), start_member("3.9"));
        assert_eq!(check(&[&same]).await, Ok(()));
        assert_eq!(check(&[&same, &old]).await, refused);
        assert_eq!(check(&[&new]).await, refused);
        let unreachable = member(2, &["http://127.0.0.1:1"]);
        assert_eq!(check(&[&unreachable]).await, refused);
        assert_eq!(check(&[&unreachable, &same]).await, Ok(()));
    }

    #[test]
    fn a_cluster_is_described_as_go_prints_it() {
        let named = Member { name: "a".into(), client_ur_ls: vec!["http://c:1".into()], ..member(10, &["http://b:1"]) };
        assert_eq!(
            describe(0xab, &[named, member(11, &["http://d:1", "http://d:2"])]),
            "{ClusterID:ab Members:[&{ID:a RaftAttributes:{PeerURLs:[http://b:1] IsLearner:false} Attributes:{Name:a \
             ClientURLs:[http://c:1]}} &{ID:b RaftAttributes:{PeerURLs:[http://d:1 http://d:2] IsLearner:false} \
             Attributes:{Name: ClientURLs:[]}}] RemovedMemberIDs:[]}"
        );
    }
}
