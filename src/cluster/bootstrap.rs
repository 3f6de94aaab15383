//! The first start of a member: determines its initial state, and writes it.
//!
//! The members of a new cluster all start with the same state, without having communicated: the member list, and a log that
//! looks as if an entry for each of them had been appended, committed and compacted. A member that joins starts only with the
//! list of members to contact, and receives everything else from the leader.
//!
//! Nothing is written before everything is known; then all of it is written atomically.

use std::time::Duration;

use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    force_new_cluster, join,
    peer_client::{MEMBER_LIST_TIMEOUT, PeerClient},
    plan::BootstrapPlan,
};
use crate::{
    config::{ClusterState, Config, InitialCluster},
    error::{Halt, StartError},
    net::url::{self, Url},
    node::{
        data_dir::{self, DataDir},
        identity::{ClusterId, MemberId},
    },
    proto::etcdserverpb::Member,
    raft_log::{Identity, LogLocation, Position, SegmentLog},
    state::{Machine, Members},
    storage::rocks::Rocks,
};

/// Time between two queries of the other members during the first start of a new cluster.
const QUERY_INTERVAL: Duration = Duration::from_millis(100);

/// Determines the initial state of a member without data. Changes nothing.
pub async fn plan(config: &Config, client: &PeerClient) -> Result<BootstrapPlan, StartError> {
    let cluster = config.parse_initial_cluster().map_err(StartError::Refused)?;
    let plan = match cluster.state {
        ClusterState::New => {
            let plan = plan_new_cluster(&cluster)?;
            let query_time = config.election_timeout;
            refuse_repeated_bootstrap(&cluster, plan.identity.member_id, client, query_time).await.map(|()| plan)
        }
        ClusterState::Existing => {
            let timeout = config.request_timeout();
            join::plan_join(&cluster, config.auth.max_capability_level, config.max_learners, client, timeout)
                .await
                .map_err(StartError::Refused)
        }
    };
    if let Err(error) = &plan {
        report_refusal(cluster.urls_of_others(), &format!("{}: {error}", cluster.name), client).await;
    }
    plan
}

/// Tells other members why this one does not start: operators may look for the reason in their logs.
async fn report_refusal(urls: impl IntoIterator<Item = Url>, reason: &str, client: &PeerClient) {
    let report = |url: Url| {
        let (client, reason) = (client.clone(), reason.to_owned());
        async move { client.report_refusal(url.as_str(), &reason, MEMBER_LIST_TIMEOUT).await }
    };
    urls.into_iter().map(report).collect::<JoinSet<_>>().join_all().await;
}

/// Refuses a data directory of another member: with it, this member would act under that member's ID. The sign is that, according
/// to the data, the configured peer URLs belong to another member. It is refused only if a running member confirms this: the data
/// may be from before the members were moved to other URLs.
pub async fn refuse_data_of_another_member(
    config: &Config,
    own: u64,
    members: &Members,
    client: &PeerClient,
) -> Result<(), StartError> {
    let configured = &config.initial_advertise_peer_urls;
    let is_here = |member: &Member| {
        member.peer_ur_ls.iter().any(|url| configured.iter().any(|configured| configured.as_str() == url))
    };
    if !config.advertise_peer_urls_is_set || members.get(own).is_none_or(is_here) {
        return Ok(());
    }
    let Some(other) = members.iter().find(|member| is_here(member)) else { return Ok(()) };
    let urls = members.iter().filter(|member| member.id != other.id).flat_map(|member| &member.peer_ur_ls);
    let others: Vec<Url> = urls.filter_map(|url| Url::parse(url).ok()).collect();
    let lists = client.member_lists(others.clone()).await;
    let listed: Vec<&Member> = lists.iter().flat_map(|(_, list)| &list.members).filter(|it| is_here(it)).collect();
    let reason = format!(
        "the data in {} is that of member {own:x}, but {} is where member {:x} is reached: is --data-dir another member's?",
        config.data_dir.display(),
        url::joined(configured),
        other.id,
    );
    if listed.is_empty() {
        tracing::warn!(
            reason,
            "the data may be another member's, but no running member can confirm that; starting with it"
        );
    }
    if listed.is_empty() || listed.iter().any(|member| member.id == own) {
        return Ok(());
    }
    report_refusal(others, &format!("{}: {reason}", config.name), client).await;
    Err(StartError::Refused(reason))
}

/// The initial state of a member of a new cluster. The first election will be in term 2, as in etcd.
fn plan_new_cluster(cluster: &InitialCluster) -> Result<BootstrapPlan, StartError> {
    let id_of = |urls: &[_]| MemberId::of_initial(urls, &cluster.token);
    let mut members: Vec<Member> = Vec::new();
    for urls in cluster.members.values() {
        let id = id_of(urls);
        if members.iter().any(|member| member.id == id.get()) {
            return Err(StartError::Refused(format!("member exists with identical ID {id}")));
        }
        let peer_ur_ls = urls.iter().map(ToString::to_string).collect();
        members.push(Member { id: id.get(), peer_ur_ls, ..Member::default() });
    }
    let ids: Vec<MemberId> = cluster.members.values().map(|urls| id_of(urls)).collect();
    let identity =
        Identity { cluster_id: ClusterId::of_initial_members(&ids).get(), member_id: id_of(cluster.own_urls()).get() };
    Ok(BootstrapPlan {
        identity,
        members,
        join_contacts: Vec::new(),
        at: Position { index: ids.len() as u64, term: 1 },
    })
}

/// A member whose data was lost must not bootstrap its cluster again: it has voted and acknowledged entries, and no longer knows
/// it. If the other members know a member with this ID that has served clients, this is that member.
///
/// It keeps querying them for `query_time`: a member that is starting as well, or that is unreachable at the moment, would be
/// taken for one that has not started yet.
async fn refuse_repeated_bootstrap(
    cluster: &InitialCluster,
    own: u64,
    client: &PeerClient,
    query_time: Duration,
) -> Result<(), StartError> {
    let others = cluster.urls_of_others();
    let deadline = Instant::now() + query_time;
    while !others.is_empty() {
        for (url, list) in client.member_lists(others.clone()).await {
            if !list.is_metastore {
                return Err(StartError::Refused(join::foreign_program(&url)));
            }
            if list.members.iter().any(|member| member.id == own && !member.client_ur_ls.is_empty()) {
                return Err(StartError::Refused(format!("member {own:x} has already been bootstrapped")));
            }
        }
        if Instant::now() >= deadline {
            break;
        }
        sleep(QUERY_INTERVAL).await;
    }
    Ok(())
}

/// Prepares the data directory for the start. `plan` is present if the directory was empty when it was looked at before.
pub async fn prepare(
    config: &Config,
    client: &PeerClient,
    plan: Option<BootstrapPlan>,
    directory: &DataDir,
) -> Result<(), StartError> {
    if directory.is_initialised() {
        if config.force_new_cluster {
            force_new_cluster::become_sole_member(directory)?;
        }
        return Ok(());
    }
    let plan = match plan {
        Some(plan) => plan,
        None => self::plan(config, client).await?,
    };
    Ok(write_initial_files(&plan, directory)?)
}

/// Writes a member's first files, all or none.
pub fn write_initial_files(plan: &BootstrapPlan, directory: &DataDir) -> Result<(), Halt> {
    let BootstrapPlan { identity, members, join_contacts, at } = plan;
    tracing::info!(
        {
            "cluster-id" = format_args!("{:x}", identity.cluster_id),
            "local-member-id" = format_args!("{:x}", identity.member_id),
            "initial-members" = members.len(),
            "join-contacts" = join_contacts.len()
        },
        "first start of this member"
    );
    let hard_state = raft::eraftpb::HardState { term: at.term, commit: at.index, ..Default::default() };
    directory.initialise(|draft| {
        SegmentLog::create(&LogLocation::new(data_dir::log_in(draft)), *identity, *at, &hard_state)?;
        let engine = Rocks::open(&data_dir::db_in(draft))?;
        Members::write_join_contacts(&engine, join_contacts)?;
        Machine::bootstrap(&engine, identity.cluster_id, &Members::new(members.iter().cloned()), (at.index, at.term))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::{cluster::peer_client::json, net::tls::ClientTls, proto::etcdserverpb::Member};

    fn initial_cluster(members: &[(&str, &str)], name: &str) -> InitialCluster {
        InitialCluster {
            state: ClusterState::New,
            name: name.to_owned(),
            members: members
                .iter()
                .map(|(name, urls)| ((*name).to_owned(), urls.split(',').map(|url| Url::parse(url).unwrap()).collect()))
                .collect(),
            token: "etcd-cluster-1".to_owned(),
        }
    }

    #[test]
    fn all_members_of_a_new_cluster_start_with_the_same_state() {
        let members =
            [("a", "http://127.0.0.1:12380"), ("b", "http://127.0.0.1:22380"), ("c", "http://127.0.0.1:32380")];
        let plans = ["a", "b", "c"].map(|name| plan_new_cluster(&initial_cluster(&members, name)).unwrap());
        let ids = plans.each_ref().map(|plan| format!("{:x}", plan.identity.member_id));
        assert_eq!(ids, ["8211f1d0f64f3269", "91bc3c398fb3c146", "fd422379fda50e48"]);
        for plan in &plans {
            assert_eq!(format!("{:x}", plan.identity.cluster_id), "ef37ad9dc622a7c4");
            assert_eq!(plan.at, Position { index: 3, term: 1 });
            assert_eq!(plan.members, plans[0].members);
        }
        let urls: Vec<&Member> = plans[0].members.iter().collect();
        assert!(urls.iter().all(|member| member.name.is_empty() && member.peer_ur_ls.len() == 1));
    }

    const QUERY_TIME: Duration = Duration::from_millis(300);

    /// Starts a member that closes its first `unanswered` connections, and answers on all later ones that the member with this ID
    /// has served clients. Returns its URL, and the number of connections.
    async fn start_member_that_knows(id: u64, unanswered: usize) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let known = Member { id, client_ur_ls: vec!["http://127.0.0.1:1".to_owned()], ..Member::default() };
        let body = json::write_members([&known]);
        let answer = format!(
            "HTTP/1.1 200 OK\r\nserver: metastore\r\nx-etcd-cluster-id: 1\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                if counter.fetch_add(1, Ordering::Relaxed) >= unanswered {
                    let _ = stream.read(&mut [0; 1024]).await;
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        (url, connections)
    }

    #[tokio::test]
    async fn a_repeated_bootstrap_is_refused_even_if_the_answer_comes_late() {
        let (url, connections) = start_member_that_knows(7, 2).await;
        let cluster = initial_cluster(&[("a", "http://127.0.0.1:1"), ("b", &url)], "a");
        let client = PeerClient::new(MEMBER_LIST_TIMEOUT, ClientTls::without_certificates());
        // Enough time for as many queries as it takes, even on a busy machine.
        let refusal = refuse_repeated_bootstrap(&cluster, 7, &client, Duration::from_mins(1)).await.err().unwrap();
        assert_eq!(refusal.to_string(), "member 7 has already been bootstrapped");
        assert!(connections.load(Ordering::Relaxed) > 2);
    }

    #[tokio::test]
    async fn other_members_are_queried_for_a_while_and_a_single_member_waits_for_nothing() {
        let client = PeerClient::new(MEMBER_LIST_TIMEOUT, ClientTls::without_certificates());
        let (url, connections) = start_member_that_knows(8, 0).await;
        let both = initial_cluster(&[("a", "http://127.0.0.1:1"), ("b", &url)], "a");
        let started = Instant::now();
        refuse_repeated_bootstrap(&both, 7, &client, QUERY_TIME).await.unwrap();
        assert!(started.elapsed() >= QUERY_TIME && connections.load(Ordering::Relaxed) > 0);

        let alone = initial_cluster(&[("a", "http://127.0.0.1:1")], "a");
        let query = refuse_repeated_bootstrap(&alone, 7, &client, Duration::from_hours(1));
        tokio::time::timeout(Duration::from_mins(1), query).await.expect("there is no other member to query").unwrap();
    }

    #[test]
    fn two_members_with_the_same_id_are_refused() {
        // The ID is a digest of all URLs, sorted and concatenated.
        let twins = [("a", "http://a:1,http://b:2"), ("b", "http://b:2,http://a:1")];
        let refusal = plan_new_cluster(&initial_cluster(&twins, "a")).err().unwrap().to_string();
        assert!(refusal.starts_with("member exists with identical ID "), "{refusal}");
    }
}
