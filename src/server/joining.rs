//! How a member comes to a cluster that runs: `--initial-cluster-state=existing`.
//!
//! Somebody has added it there before, so the others know it. It asks them who they are, finds itself among them by its
//! URLs (names are for people), and thereby learns its own ID and the cluster's.
//!
//! If any of them has seen it serve, its data is lost, and it must not come back: it would vote a second time in a term in
//! which it has voted, and deny entries that it has acknowledged. A member that died before anybody saw it serve goes on.

use std::time::Duration;

use super::{
    bootstrap::{Origin, ask_all},
    versions::{self, Version},
};
use crate::{
    config::{FirstStart, url_resolution},
    node::log::{Identity, Position},
    peer::{Client, Roll},
    proto::etcdserverpb::Member,
    urls::Url,
};

/// How long each URL gets to say who the members are.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a member begins with that joins; `Err` says why it cannot.
pub async fn newcomer(
    first: &FirstStart,
    max_learners: u64,
    client: &Client,
    patience: Duration,
) -> Result<Origin, String> {
    let Roll { cluster_id, members, .. } = fetch(first, client).await?;
    let member_id = find_oneself(first, &members)
        .map_err(|error| format!("error validating peerURLs {}: {error}", describe(cluster_id, &members)))?;
    refuse_to_live_twice(first, member_id, &members, client).await?;
    let others: Vec<&Member> = members.iter().filter(|member| member.id != member_id).collect();
    check_versions(&others, client, patience).await?;
    if members.iter().filter(|member| member.is_learner).count() as u64 > max_learners {
        return Err("membership: too many learner members in cluster".to_owned());
    }
    let identity = Identity { cluster_id, member_id };
    Ok(Origin { identity, members: Vec::new(), introduced: members, at: Position::default() })
}

async fn fetch(first: &FirstStart, client: &Client) -> Result<Roll, String> {
    for url in first.urls_of_others() {
        match client.members(url.as_str(), PATIENCE).await {
            Ok(roll) if !roll.is_metastore => return Err(among_strangers(&url)),
            Ok(roll) if roll.members.is_empty() => tracing::warn!(url = url.as_str(), "it has no members yet"),
            Ok(roll) => return Ok(roll),
            Err(error) => tracing::warn!(error, "failed to get cluster response"),
        }
    }
    let error = "could not retrieve cluster information from the given URLs";
    Err(format!("cannot fetch cluster info from peer urls: {error}"))
}

/// Why nobody is a member beside what answers there.
pub fn among_strangers(url: &Url) -> String {
    format!(
        "{url} is no metastore, but another program, such as etcd, and the two cannot be members of one cluster: found a \
         cluster of its own and copy the keys, for example with \"etcdctl make-mirror\""
    )
}

/// Each of the others is asked: one that is behind may not have seen it yet.
async fn refuse_to_live_twice(first: &FirstStart, own: u64, members: &[Member], client: &Client) -> Result<(), String> {
    let rolls = ask_all(first.urls_of_others(), client).await;
    let mut told = members.iter().chain(rolls.iter().flat_map(|(_, roll)| &roll.members));
    let has_lived = |it: &Member| it.id == own && !(it.name.is_empty() && it.client_ur_ls.is_empty());
    if told.any(has_lived) {
        return Err(format!(
            "member {own:x} has already been bootstrapped, but its data is not here: remove it from the cluster and add \
             it again, as a new member"
        ));
    }
    Ok(())
}

/// Each member must be one of those that this one was told of, and there must be no others.
fn find_oneself(first: &FirstStart, members: &[Member]) -> Result<u64, String> {
    if members.len() != first.members.len() {
        return Err("member count is unequal".to_owned());
    }
    let mut own = None;
    for member in members {
        let name = match_urls(first, member).map_err(|error| {
            let (id, urls) = (member.id, member.peer_ur_ls.join(" "));
            format!("PeerURLs: no match found for existing member ({id:x}, [{urls}]), last resolver error ({error})")
        })?;
        if *name == first.name {
            own = Some(member.id);
        }
    }
    own.ok_or_else(|| "this member is none of them".to_owned())
}

/// Which of those that this member was told of it is. Names are looked up only where no text is the same.
fn match_urls<'a>(first: &'a FirstStart, member: &Member) -> Result<&'a String, String> {
    let mut urls = member.peer_ur_ls.iter().map(|url| Url::parse(url)).collect::<Result<Vec<_>, _>>()?;
    urls.sort();
    if let Some((name, _)) = first.members.iter().find(|(_, known)| **known == urls) {
        return Ok(name);
    }
    let mut trouble = String::new();
    for (name, known) in &first.members {
        match url_resolution::lead_to_the_same(&urls, known) {
            Ok(()) => return Ok(name),
            Err(error) => trouble = error,
        }
    }
    Err(trouble)
}

/// At least one member must be of a cluster that speaks as we do, and none of another.
async fn check_versions(others: &[&Member], client: &Client, patience: Duration) -> Result<(), String> {
    let ours = Version { patch: 0, ..versions::ours() };
    let newest = if is_downgrading(others, client, patience).await { ours.next_minor() } else { ours };
    let oldest = if newest > ours { newest } else { versions::OLDEST };
    let mut speaks_with_one = false;
    for member in others {
        let Some(told) = versions::ask(client, member, patience).await else { continue };
        let Some(cluster) = Version::parse(&told.cluster) else { continue };
        if cluster < oldest || cluster > newest {
            let (id, cluster) = (format!("{:x}", member.id), cluster.to_string());
            tracing::warn!({ "remote-member-id" = id, "remote-member-cluster-version" = cluster }, "not compatible");
            return Err("incompatible with current running cluster".to_owned());
        }
        speaks_with_one = true;
    }
    if speaks_with_one { Ok(()) } else { Err("incompatible with current running cluster".to_owned()) }
}

async fn is_downgrading(others: &[&Member], client: &Client, patience: Duration) -> bool {
    for url in others.iter().flat_map(|member| &member.peer_ur_ls) {
        match client.is_downgrading(url, patience).await {
            Ok(downgrading) => return downgrading,
            Err(error) => tracing::warn!(error, "failed to get downgrade enabled status"),
        }
    }
    false
}

/// A cluster as Go prints it.
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
    use crate::config::ClusterState;

    fn first(members: &[(&str, &str)]) -> FirstStart {
        let urls = |text: &str| text.split(',').map(|url| Url::parse(url).unwrap()).collect();
        FirstStart {
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
    fn a_joiner_finds_itself_by_its_urls() {
        let first = first(&[("a", "http://10.0.0.1:1,http://10.0.0.1:2"), ("me", "http://10.0.0.2:1")]);
        let them = member(1, &["http://10.0.0.1:2", "http://10.0.0.1:1"]);
        assert_eq!(find_oneself(&first, &[them.clone(), member(7, &["http://10.0.0.2:1"])]), Ok(7));
        assert_eq!(find_oneself(&first, std::slice::from_ref(&them)).unwrap_err(), "member count is unequal");
        assert_eq!(
            find_oneself(&first, &[them, member(7, &["http://10.0.0.3:1"])]).unwrap_err(),
            "PeerURLs: no match found for existing member (7, [http://10.0.0.3:1]), last resolver error (resolved urls: \
             \"http://10.0.0.3:1\" != \"http://10.0.0.2:1\")"
        );
    }

    /// A member that says it speaks this version.
    async fn member_of(version: &'static str) -> Member {
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
    async fn who_would_join_has_to_speak_as_the_cluster_does() {
        let client = Client::new(PATIENCE);
        let check = async |members: &[&Member]| check_versions(members, &client, PATIENCE).await;
        let refused = Err("incompatible with current running cluster".to_owned());
        let (ours, old, new) = tokio::join!(member_of("3.7"), member_of("2.3"), member_of("3.9"));
        assert_eq!(check(&[&ours]).await, Ok(()));
        assert_eq!(check(&[&ours, &old]).await, refused);
        assert_eq!(check(&[&new]).await, refused);
        let nobody = member(2, &["http://127.0.0.1:1"]);
        assert_eq!(check(&[&nobody]).await, refused);
        assert_eq!(check(&[&nobody, &ours]).await, Ok(()));
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
