//! The test harness: a cluster of real member processes, whose network links can be cut, and helpers that all tests use.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use etcd_client::Client;
use metastore::{
    node::identity::MemberId,
    proto::etcdserverpb::{Member, MemberAddRequest, MemberListRequest, StatusRequest, StatusResponse},
};
use tonic::{Code, Status};

use super::{
    load::Urls,
    network::{Network, Proxy},
    support::{Server, eventually_async, http, time_limit},
};

const TOKEN: &str = "etcd-cluster";

/// Short ticks, for fast elections.
pub const QUICK: &[&str] = &["--heartbeat-interval", "50", "--election-timeout", "500"];
pub const ELECTION: Duration = Duration::from_millis(500);

/// A cluster of members.
pub struct Cluster {
    pub servers: Vec<Server>,
    pub ids: Vec<u64>,
    pub proxies: Vec<Proxy>,
    pub network: Network,
    /// The client URLs of the members, which change with every start.
    pub urls: Urls,
}

impl Cluster {
    /// Starts a new cluster of this size, and waits until all members serve clients.
    pub fn bootstrap(size: usize, arguments: &[&str]) -> Self {
        let mut cluster = Self::prepare(size, arguments);
        cluster.start_all();
        cluster
    }

    /// A new cluster, whose members are not started.
    pub fn prepare(size: usize, arguments: &[&str]) -> Self {
        let network = Network::default();
        let proxies: Vec<Proxy> = (0..size).map(|_| Proxy::start(&network)).collect();
        let all: Vec<_> = proxies.iter().enumerate().map(|(nth, proxy)| format!("m{nth}={}", proxy.url())).collect();
        let arguments = [QUICK, arguments].concat();
        let servers = proxies.iter().enumerate();
        let servers =
            servers.map(|(nth, proxy)| Server::member(&format!("m{nth}"), &proxy.url(), &all.join(","), &arguments));
        let ids = proxies.iter().map(|proxy| MemberId::of_initial(&[proxy.url()], TOKEN).get()).collect();
        let urls = Arc::new(Mutex::new(vec![String::new(); size]));
        Self { servers: servers.collect(), ids, proxies, network, urls }
    }

    /// Adds a member to the cluster through another member. It is appended to `servers`, but not started.
    pub async fn add_member(&mut self, via: usize, is_learner: bool) -> Result<usize, Status> {
        let proxy = Proxy::start(&self.network);
        let request = MemberAddRequest { peer_ur_ls: vec![proxy.url()], is_learner };
        let mut client = self.servers[via].cluster().await;
        let adding = tokio::time::timeout(time_limit(), client.member_add(request));
        let added = adding.await.expect("the request is answered in time")?.into_inner();
        let nth = self.servers.len();
        let (name, url) = (format!("m{nth}"), proxy.url());
        let names = added.members.iter().zip(0..).map(|(member, nth)| {
            let name = if member.peer_ur_ls == [url.clone()] { name.clone() } else { format!("other{nth}") };
            format!("{name}={}", member.peer_ur_ls.join(&format!(",{name}=")))
        });
        let all = names.collect::<Vec<_>>().join(",");
        let arguments = [QUICK, &["--initial-cluster-state=existing"]].concat();
        self.servers.push(Server::member(&name, &url, &all, &arguments));
        self.proxies.push(proxy);
        self.ids.push(added.member.expect("the response contains the new member").id);
        self.urls.lock().unwrap().push(String::new());
        Ok(nth)
    }

    /// The member list of one member. Retries while leadership is changing.
    pub async fn members(&self, nth: usize) -> Vec<Member> {
        let mut client = self.servers[nth].cluster().await;
        eventually_async("a member lists the members", time_limit(), async || {
            let listed = client.member_list(MemberListRequest { linearizable: true }).await;
            if let Err(refused) = &listed {
                assert_eq!(refused.code(), Code::Unavailable, "{refused}");
            }
            listed.map(|listed| listed.into_inner().members)
        })
        .await
    }

    /// Starts a member without waiting until it serves clients.
    pub fn launch(&mut self, nth: usize) {
        self.servers[nth].launch();
        self.proxies[nth].set_target(self.servers[nth].peer_address());
    }

    /// Starts a member and waits until it serves clients.
    pub fn restart(&mut self, nth: usize) {
        self.launch(nth);
        self.await_serving(nth);
    }

    /// Starts all members and waits until they serve clients.
    pub fn start_all(&mut self) {
        (0..self.servers.len()).for_each(|nth| self.launch(nth));
        (0..self.servers.len()).for_each(|nth| self.await_serving(nth));
    }

    fn await_serving(&mut self, nth: usize) {
        self.servers[nth].await_serving();
        self.urls.lock().unwrap()[nth] = self.servers[nth].url();
    }

    /// A client that is connected to one member.
    pub async fn client(&self, nth: usize) -> Client {
        self.servers[nth].client().await
    }

    /// A member's status, if it answers.
    pub async fn status(&self, nth: usize) -> Option<StatusResponse> {
        if !self.servers[nth].is_running() {
            return None;
        }
        let status = async { self.servers[nth].maintenance().await.status(StatusRequest::default()).await };
        let status = tokio::time::timeout(Duration::from_secs(5), status).await.ok()?.ok()?;
        Some(status.into_inner())
    }

    /// Waits until all of `among` agree on a leader, and returns it.
    pub async fn leader_among(&self, among: &[usize]) -> usize {
        self.agreed_leader(among, |_| true).await
    }

    /// Waits until all members except `old` agree on another leader, and returns it.
    pub async fn leader_after(&self, old: usize) -> usize {
        self.agreed_leader(&self.others(old), |leader| leader != old).await
    }

    async fn agreed_leader(&self, among: &[usize], fits: impl Fn(usize) -> bool) -> usize {
        eventually_async("the members agree on a leader", time_limit(), async || {
            let mut leaders = Vec::new();
            for &nth in among {
                leaders.push(self.status(nth).await.map_or(0, |status| status.leader));
            }
            let first = self.ids.iter().position(|id| *id == leaders[0]);
            let agreed = first.filter(|&first| fits(first) && leaders.iter().all(|leader| *leader == leaders[0]));
            agreed.ok_or_else(|| format!("these leaders: {leaders:x?}"))
        })
        .await
    }

    /// Waits until all members agree on a leader, and returns it.
    pub async fn leader(&self) -> usize {
        let all: Vec<_> = (0..self.servers.len()).collect();
        self.leader_among(&all).await
    }

    /// All members except one.
    pub fn others(&self, nth: usize) -> Vec<usize> {
        (0..self.servers.len()).filter(|other| *other != nth).collect()
    }

    /// Cuts the raft streams between a member and the others, in both directions. HTTP requests between them still pass.
    pub fn isolate(&self, nth: usize) {
        let others: Vec<u64> = self.others(nth).into_iter().map(|other| self.ids[other]).collect();
        self.network.isolate(self.ids[nth], &others);
    }

    /// Waits until these members have applied the same entries, and asserts that their data is the same.
    pub async fn assert_equal(&self, members: &[usize]) {
        let revision = eventually_async("the members have applied the same entries", time_limit(), async || {
            let mut applied = Vec::new();
            for &nth in members {
                let status = self.status(nth).await.expect("the member is running");
                applied.push((status.raft_applied_index, status.header.unwrap().revision));
            }
            let are_equal = applied.iter().all(|progress| *progress == applied[0]);
            if are_equal { Ok(applied[0].1) } else { Err(applied) }
        })
        .await;
        let hashes: Vec<_> = members.iter().map(|&nth| self.hash(nth, revision)).collect();
        let are_equal = hashes.iter().all(|hash| *hash == hashes[0]);
        assert!(are_equal, "members differ at revision {revision}: {hashes:x?}");
    }

    /// The hash of a member's data, and its compact revision. It is read from the peer port, which learners serve, too.
    pub fn hash(&self, nth: usize, revision: i64) -> (u64, i64) {
        let request = format!(r#"{{"revision":{revision}}}"#);
        let page = http(&self.servers[nth].peer_address(), "GET", "/members/hashkv", "", request.as_bytes());
        assert_eq!(page.status, 200, "{page:?}");
        let hash: serde_json::Value = serde_json::from_str(&page.body).unwrap();
        (hash["hash"].as_u64().unwrap(), hash["compact_revision"].as_i64().unwrap())
    }

    /// The same for all members.
    pub async fn assert_all_equal(&self) {
        let all: Vec<_> = (0..self.servers.len()).collect();
        self.assert_equal(&all).await;
    }
}
