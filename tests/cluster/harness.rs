//! Several real members, a network between them that can be cut, and what every test wants to know of them.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use etcd_client::Client;
use metastore::{
    node::identity::MemberId,
    proto::etcdserverpb::{Member, MemberAddRequest, MemberListRequest, StatusRequest, StatusResponse},
};
use tonic::{Code, Status};

use super::{
    proxy::{Network, Proxy},
    support::{Server, http},
};

/// Whatever takes longer than this has failed.
pub const PATIENCE: Duration = Duration::from_mins(1);
const TOKEN: &str = "etcd-cluster";

/// Short ticks, so that elections are over soon.
pub const QUICK: &[&str] = &["--heartbeat-interval", "50", "--election-timeout", "500"];
pub const ELECTION: Duration = Duration::from_millis(500);

/// Members that were founded together.
pub struct Cluster {
    pub servers: Vec<Server>,
    pub ids: Vec<u64>,
    pub proxies: Vec<Proxy>,
    pub network: Network,
    /// Where clients find the members: a new place after every start.
    pub urls: Urls,
}

/// Shared with whoever calls the members for a while.
pub type Urls = Arc<Mutex<Vec<String>>>;

impl Cluster {
    /// Founds a cluster of so many, and waits until all of them serve.
    pub fn found(size: usize, arguments: &[&str]) -> Self {
        let mut cluster = Self::prepare(size, arguments);
        cluster.start_all();
        cluster
    }

    /// A cluster to be, none of whose members was started.
    pub fn prepare(size: usize, arguments: &[&str]) -> Self {
        let network = Network::default();
        let proxies: Vec<Proxy> = (0..size).map(|_| Proxy::start(&network)).collect();
        let all: Vec<_> = proxies.iter().enumerate().map(|(nth, proxy)| format!("m{nth}={}", proxy.url())).collect();
        let arguments = [QUICK, arguments].concat();
        let servers = proxies.iter().enumerate();
        let servers =
            servers.map(|(nth, proxy)| Server::member(&format!("m{nth}"), &proxy.url(), &all.join(","), &arguments));
        let ids = proxies.iter().map(|proxy| MemberId::of_first(&[proxy.url()], TOKEN).get()).collect();
        let urls = Arc::new(Mutex::new(vec![String::new(); size]));
        Self { servers: servers.collect(), ids, proxies, network, urls }
    }

    /// Adds a member through another one. It is the last of the servers then, and does not run yet.
    pub async fn admit(&mut self, via: usize, is_learner: bool) -> Result<usize, Status> {
        let proxy = Proxy::start(&self.network);
        let request = MemberAddRequest { peer_ur_ls: vec![proxy.url()], is_learner };
        let mut client = self.servers[via].cluster().await;
        let adding = tokio::time::timeout(PATIENCE, client.member_add(request));
        let added = adding.await.expect("a change is answered")?.into_inner();
        let nth = self.servers.len();
        let (name, url) = (format!("m{nth}"), proxy.url());
        let names = added.members.iter().zip(0..).map(|(member, place)| {
            let name = if member.peer_ur_ls == [url.clone()] { name.clone() } else { format!("other{place}") };
            format!("{name}={}", member.peer_ur_ls.join(&format!(",{name}=")))
        });
        let all = names.collect::<Vec<_>>().join(",");
        let arguments = [QUICK, &["--initial-cluster-state=existing"]].concat();
        self.servers.push(Server::member(&name, &url, &all, &arguments));
        self.proxies.push(proxy);
        self.ids.push(added.member.expect("it names the new member").id);
        self.urls.lock().unwrap().push(String::new());
        Ok(nth)
    }

    /// All members as one of them lists them, though leadership may be changing.
    pub async fn members(&self, nth: usize) -> Vec<Member> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let request = MemberListRequest { linearizable: true };
            match self.servers[nth].cluster().await.member_list(request).await {
                Ok(listed) => return listed.into_inner().members,
                Err(refused) => assert!(refused.code() == Code::Unavailable && Instant::now() < deadline, "{refused}"),
            }
        }
    }

    /// Starts a member without waiting until it serves.
    pub fn launch(&mut self, nth: usize) {
        self.servers[nth].launch();
        self.proxies[nth].lead_to(self.servers[nth].peer_address());
    }

    /// Starts a member and waits until it serves.
    pub fn restart(&mut self, nth: usize) {
        self.launch(nth);
        self.await_serving(nth);
    }

    /// Starts all members and waits until they serve.
    pub fn start_all(&mut self) {
        (0..self.servers.len()).for_each(|nth| self.launch(nth));
        (0..self.servers.len()).for_each(|nth| self.await_serving(nth));
    }

    fn await_serving(&mut self, nth: usize) {
        self.servers[nth].await_serving();
        self.urls.lock().unwrap()[nth] = self.servers[nth].url();
    }

    /// A client of one member.
    pub async fn client(&self, nth: usize) -> Client {
        self.servers[nth].client().await
    }

    /// What a member says of itself, if it says anything.
    pub async fn status(&self, nth: usize) -> Option<StatusResponse> {
        if !self.servers[nth].is_running() {
            return None;
        }
        let status = async { self.servers[nth].maintenance().await.status(StatusRequest::default()).await };
        let status = tokio::time::timeout(Duration::from_secs(5), status).await.ok()?.ok()?;
        Some(status.into_inner())
    }

    /// The member that leads, as soon as all of `among` agree on it.
    pub async fn leader_among(&self, among: &[usize]) -> usize {
        self.agreed_leader(among, |_| true).await
    }

    /// The same, but another one than `old`.
    pub async fn leader_after(&self, old: usize) -> usize {
        self.agreed_leader(&self.others(old), |leader| leader != old).await
    }

    async fn agreed_leader(&self, among: &[usize], fits: impl Fn(usize) -> bool) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut leaders = Vec::new();
            for &nth in among {
                leaders.push(self.status(nth).await.map_or(0, |status| status.leader));
            }
            let first = self.ids.iter().position(|id| *id == leaders[0]);
            if let Some(first) =
                first.filter(|&first| fits(first) && leaders.iter().all(|leader| *leader == leaders[0]))
            {
                return first;
            }
            assert!(Instant::now() < deadline, "no leader that all agree on: {leaders:x?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The member that leads, as soon as all agree on it.
    pub async fn leader(&self) -> usize {
        let all: Vec<_> = (0..self.servers.len()).collect();
        self.leader_among(&all).await
    }

    /// All but one.
    pub fn others(&self, nth: usize) -> Vec<usize> {
        (0..self.servers.len()).filter(|other| *other != nth).collect()
    }

    /// Cuts a member off from all others, or heals every link.
    pub fn isolate(&self, nth: usize) {
        let others: Vec<u64> = self.others(nth).into_iter().map(|other| self.ids[other]).collect();
        self.network.isolate(self.ids[nth], &others);
    }

    /// Waits until these members have applied the same, and asserts that they hold the same.
    pub async fn assert_equal(&self, members: &[usize]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut applied = Vec::new();
            for &nth in members {
                let status = self.status(nth).await.expect("it runs");
                applied.push((status.raft_applied_index, status.header.unwrap().revision));
            }
            if applied.iter().all(|progress| *progress == applied[0]) {
                let revision = applied[0].1;
                let mut hashes = Vec::new();
                for &nth in members {
                    hashes.push(self.hash(nth, revision));
                }
                assert!(
                    hashes.iter().all(|hash| *hash == hashes[0]),
                    "members differ at revision {revision}: {hashes:x?}"
                );
                return;
            }
            assert!(Instant::now() < deadline, "members do not come to the same index: {applied:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The hash of what a member holds, and from which revision on. The port for members gives it on learners, too.
    pub fn hash(&self, nth: usize, revision: i64) -> (u64, i64) {
        let request = format!(r#"{{"revision":{revision}}}"#);
        let page = http(&self.servers[nth].peer_address(), "GET", "/members/hashkv", "", request.as_bytes());
        assert_eq!(page.status, 200, "{page:?}");
        let hash: serde_json::Value = serde_json::from_str(&page.body).unwrap();
        (hash["hash"].as_u64().unwrap(), hash["compact_revision"].as_i64().unwrap())
    }

    /// Asserts that all members hold the same.
    pub async fn assert_all_equal(&self) {
        let all: Vec<_> = (0..self.servers.len()).collect();
        self.assert_equal(&all).await;
    }
}
