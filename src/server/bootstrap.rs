//! The first start of a member: what it begins with, and laying that down.
//!
//! Founders of a cluster all begin with the same, without having talked: the table of members, and a log that looks as if an
//! entry for each of them had been written, committed and forgotten. A member that joins begins with nothing but whom to
//! talk to, and is given everything else.
//!
//! Nothing is written before everything is known, and then all of it at once.

use std::time::Duration;

use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{Failure, joining, request_timeout, takeover};
use crate::{
    config::{ClusterState, Config, FirstStart},
    error::Halt,
    node::{
        data_dir::{self, DataDir},
        identity::{ClusterId, MemberId},
        log::{self, Identity, Position, SegmentLog},
    },
    peer::{Client, Roll},
    proto::etcdserverpb::Member,
    state::{Machine, Members},
    storage::rocks::Rocks,
    urls::{self, Url},
};

/// How long others get to say that a cluster is there already.
const GUARD: Duration = Duration::from_secs(1);
/// A founder asks the others again after this.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// What a member begins with.
pub struct Origin {
    /// Who it is.
    pub identity: Identity,
    /// The members, for who founds a cluster with them.
    pub members: Vec<Member>,
    /// The members, for who has yet to be told so by the log.
    pub introduced: Vec<Member>,
    /// Where its log begins.
    pub at: Position,
}

/// Finds out what a member without data begins with. Touches nothing.
pub async fn origin(config: &Config, client: &Client) -> Result<Origin, Failure> {
    let first = config.first_start().map_err(Failure::Refused)?;
    let origin = match first.state {
        ClusterState::New => {
            let origin = founders(&first)?;
            let asks_for = config.election_timeout;
            refuse_to_found_twice(&first, origin.identity.member_id, client, asks_for).await.map(|()| origin)
        }
        ClusterState::Existing => {
            let patience = request_timeout(config);
            joining::newcomer(&first, config.max_learners, client, patience).await.map_err(Failure::Refused)
        }
    };
    if let Err(failure) = &origin {
        tell(first.urls_of_others(), &format!("{}: {failure}", first.name), client).await;
    }
    origin
}

/// What those say of their cluster who answer soon. Silence is fine: one has not started, another is gone.
pub async fn ask_all(urls: Vec<Url>, client: &Client) -> Vec<(Url, Roll)> {
    let ask = |url: Url| {
        let client = client.clone();
        async move { Some((client.members(url.as_str(), GUARD).await.ok()?, url)) }
    };
    let answers = urls.into_iter().map(ask).collect::<JoinSet<_>>().join_all().await;
    answers.into_iter().flatten().map(|(roll, url)| (url, roll)).collect()
}

/// Tells others why this member does not start: whoever runs the cluster may look for the reason there.
async fn tell(whom: impl IntoIterator<Item = Url>, why: &str, client: &Client) {
    let tell = |url: Url| {
        let (client, why) = (client.clone(), why.to_owned());
        async move { client.tell_refused(url.as_str(), &why, GUARD).await }
    };
    whom.into_iter().map(tell).collect::<JoinSet<_>>().join_all().await;
}

/// A directory with the data of another member would have this one act in its name: where this one is said to be reached,
/// another member is. Refused only if some member that runs says so too: these data may be from before the members moved.
pub async fn refuse_anothers_data(
    config: &Config,
    own: u64,
    members: &Members,
    client: &Client,
) -> Result<(), Failure> {
    let told = &config.initial_advertise_peer_urls;
    let is_here = |member: &Member| member.peer_ur_ls.iter().any(|url| told.iter().any(|told| told.as_str() == url));
    if !config.says_where_it_is || members.get(own).is_none_or(is_here) {
        return Ok(());
    }
    let Some(other) = members.iter().find(|member| is_here(member)) else { return Ok(()) };
    let urls = members.iter().filter(|member| member.id != other.id).flat_map(|member| &member.peer_ur_ls);
    let others: Vec<Url> = urls.filter_map(|url| Url::parse(url).ok()).collect();
    let rolls = ask_all(others.clone(), client).await;
    let listed: Vec<&Member> = rolls.iter().flat_map(|(_, roll)| &roll.members).filter(|it| is_here(it)).collect();
    let why = format!(
        "the data in {} is that of member {own:x}, but {} is where member {:x} is reached: is --data-dir another member's?",
        config.data_dir.display(),
        urls::joined(told),
        other.id,
    );
    if listed.is_empty() {
        tracing::warn!(reason = why, "nobody who runs can say whether this is right");
    }
    if listed.is_empty() || listed.iter().any(|member| member.id == own) {
        return Ok(());
    }
    tell(others, &format!("{}: {why}", config.name), client).await;
    Err(Failure::Refused(why))
}

/// The first election will be in term 2, as in etcd.
fn founders(first: &FirstStart) -> Result<Origin, Failure> {
    let id_of = |urls: &[_]| MemberId::of_first(urls, &first.token);
    let mut members: Vec<Member> = Vec::new();
    for urls in first.members.values() {
        let id = id_of(urls);
        if members.iter().any(|member| member.id == id.get()) {
            return Err(Failure::Refused(format!("member exists with identical ID {id}")));
        }
        let peer_ur_ls = urls.iter().map(ToString::to_string).collect();
        members.push(Member { id: id.get(), peer_ur_ls, ..Member::default() });
    }
    let ids: Vec<MemberId> = first.members.values().map(|urls| id_of(urls)).collect();
    let identity =
        Identity { cluster_id: ClusterId::of_founders(&ids).get(), member_id: id_of(first.own_urls()).get() };
    Ok(Origin { identity, members, introduced: Vec::new(), at: Position { index: ids.len() as u64, term: 1 } })
}

/// A member whose data was lost must not found its cluster again: it has promised things that it does not remember. If the
/// others know a member of this ID that has served clients, this is it.
///
/// It keeps asking for this long: others that are starting, too, or that the network does not reach at this moment, would be
/// taken for founders that have not started yet.
async fn refuse_to_found_twice(
    first: &FirstStart,
    own: u64,
    client: &Client,
    asks_for: Duration,
) -> Result<(), Failure> {
    let others = first.urls_of_others();
    let ends = Instant::now() + asks_for;
    while !others.is_empty() {
        for (url, roll) in ask_all(others.clone(), client).await {
            if !roll.is_metastore {
                return Err(Failure::Refused(joining::among_strangers(&url)));
            }
            if roll.members.iter().any(|member| member.id == own && !member.client_ur_ls.is_empty()) {
                return Err(Failure::Refused(format!("member {own:x} has already been bootstrapped")));
            }
        }
        if Instant::now() >= ends {
            break;
        }
        sleep(ASK_AGAIN).await;
    }
    Ok(())
}

/// Makes the data directory one to start from. `known` is what it begins with, if it was seen to be empty before.
pub async fn prepare(
    config: &Config,
    client: &Client,
    known: Option<Origin>,
    directory: &DataDir,
) -> Result<(), Failure> {
    if directory.is_initialised() {
        if config.force_new_cluster {
            takeover::become_sole_member(directory)?;
        }
        return Ok(());
    }
    let origin = match known {
        Some(origin) => origin,
        None => origin(config, client).await?,
    };
    Ok(lay_down(&origin, directory)?)
}

/// Writes a member's first files, all or none.
pub fn lay_down(origin: &Origin, directory: &DataDir) -> Result<(), Halt> {
    let Origin { identity, members, introduced, at } = origin;
    tracing::info!(
        {
            "cluster-id" = format_args!("{:x}", identity.cluster_id),
            "local-member-id" = format_args!("{:x}", identity.member_id),
            founders = members.len(),
            introduced = introduced.len()
        },
        "first start of this member"
    );
    let hard_state = raft::eraftpb::HardState { term: at.term, commit: at.index, ..Default::default() };
    directory.initialise(|draft| {
        SegmentLog::create(&log::Place::new(data_dir::log_in(draft)), *identity, *at, &hard_state)?;
        let engine = Rocks::open(&data_dir::db_in(draft))?;
        Members::introduce(&engine, introduced)?;
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
    use crate::{peer::json, proto::etcdserverpb::Member};

    fn first(members: &[(&str, &str)], name: &str) -> FirstStart {
        FirstStart {
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
    fn founders_begin_alike() {
        let members =
            [("a", "http://127.0.0.1:12380"), ("b", "http://127.0.0.1:22380"), ("c", "http://127.0.0.1:32380")];
        let origins = ["a", "b", "c"].map(|name| founders(&first(&members, name)).unwrap());
        let ids = origins.each_ref().map(|origin| format!("{:x}", origin.identity.member_id));
        assert_eq!(ids, ["8211f1d0f64f3269", "91bc3c398fb3c146", "fd422379fda50e48"]);
        for origin in &origins {
            assert_eq!(format!("{:x}", origin.identity.cluster_id), "ef37ad9dc622a7c4");
            assert_eq!(origin.at, Position { index: 3, term: 1 });
            assert_eq!(origin.members, origins[0].members);
        }
        let urls: Vec<&Member> = origins[0].members.iter().collect();
        assert!(urls.iter().all(|member| member.name.is_empty() && member.peer_ur_ls.len() == 1));
    }

    const ASKS_FOR: Duration = Duration::from_millis(300);

    /// A member at a port of its own that closes its first connections without a word, and says on all later ones that the
    /// member with this ID has served clients. Returns its URL, and counts the connections.
    async fn member_that_knows(id: u64, silent: usize) -> (String, Arc<AtomicUsize>) {
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
                if counter.fetch_add(1, Ordering::Relaxed) >= silent {
                    let _ = stream.read(&mut [0; 1024]).await;
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        (url, connections)
    }

    #[tokio::test]
    async fn a_founder_is_refused_by_a_member_that_answers_late() {
        let (url, connections) = member_that_knows(7, 2).await;
        let first = first(&[("a", "http://127.0.0.1:1"), ("b", &url)], "a");
        let client = Client::new(GUARD);
        // Time for as many questions as it takes, however busy the machine is.
        let refusal = refuse_to_found_twice(&first, 7, &client, Duration::from_mins(1)).await.err().unwrap();
        assert_eq!(refusal.to_string(), "member 7 has already been bootstrapped");
        assert!(connections.load(Ordering::Relaxed) > 2);
    }

    #[tokio::test]
    async fn a_founder_asks_others_for_a_while_and_nobody_if_it_is_alone() {
        let client = Client::new(GUARD);
        let (url, connections) = member_that_knows(8, 0).await;
        let both = first(&[("a", "http://127.0.0.1:1"), ("b", &url)], "a");
        let started = Instant::now();
        refuse_to_found_twice(&both, 7, &client, ASKS_FOR).await.unwrap();
        assert!(started.elapsed() >= ASKS_FOR && connections.load(Ordering::Relaxed) > 0);

        let alone = first(&[("a", "http://127.0.0.1:1")], "a");
        let asking = refuse_to_found_twice(&alone, 7, &client, Duration::from_hours(1));
        tokio::time::timeout(Duration::from_mins(1), asking).await.expect("there is nobody to ask").unwrap();
    }

    #[test]
    fn two_founders_cannot_have_the_same_id() {
        // The digest is over all URLs in one piece.
        let twins = [("a", "http://a:1,http://b:2"), ("b", "http://b:2,http://a:1")];
        let refusal = founders(&first(&twins, "a")).err().unwrap().to_string();
        assert!(refusal.starts_with("member exists with identical ID "), "{refusal}");
    }
}
