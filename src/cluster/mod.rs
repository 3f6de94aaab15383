//! The cluster as one of its members sees it: starting and joining, leadership, changes of members, the version that they
//! agree on, and whether their data is the same.
//!
//! ```text
//! service ─▶ Cluster ─┬─ node: proposals, the replicated member table
//!                     └─ PeerClient ══ HTTP/1.1 ══▶ other members (`frontend/peer_http.rs`)
//! ```
//!
//! Only the leader knows when leases expire and how far learners have caught up. The other members ask it over HTTP: they find
//! out which member leads, try each of its URLs, and try again until the request times out, because leaders change.

pub mod bootstrap;
pub mod capability;
pub mod corruption_check;
pub mod force_new_cluster;
pub mod join;
pub mod peer_client;
mod plan;
pub mod publish;
pub mod reconfig_check;
pub mod round_trips;
pub mod version;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use tokio::{runtime::Handle, sync::oneshot, time::sleep};

use crate::{
    error::Error,
    lease::{LeaseId, Renewal},
    metrics::{self, METRICS},
    mvcc::read::ReadError,
    node::{Node, identity::RequestIds, low_priority::LowPriorityThreads, read_pool::ReadPool},
    proto::etcdserverpb::{LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, Member, MemberPromoteRequest},
    state::{Command, Kind, Members, Response},
    version::{ETCD_VERSION, STORAGE_VERSION},
};
use peer_client::{PeerClient, PeerHash, Versions};
use reconfig_check::ReconfigCheck;

/// The pause between two attempts to reach the leader.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// A learner can be promoted once its match index has reached this fraction of the leader's.
const READY_RATIO: f64 = 0.9;

/// This member's view of its cluster. There is one per process.
pub struct Cluster {
    pub node: Arc<Node>,
    /// Allocates request and lease IDs.
    pub ids: Arc<RequestIds>,
    pub cluster_id: u64,
    pub member_id: u64,
    pub client: PeerClient,
    /// Whether membership changes that could lose the quorum are refused (`--strict-reconfig-check`).
    pub strict_reconfig_check: bool,
    /// The capability level that this member knows.
    pub known_level: u64,
    /// The maximum number of learners, for additions that this member proposes.
    pub max_learners: u64,
    pub request_timeout: Duration,
    pub heartbeat_interval: Duration,
    /// Runs the tasks that wait for other members.
    pub runtime: Handle,
    /// Runs long reads.
    pub read_pool: ReadPool,
    /// Runs the hashes that other members ask for.
    pub scans: LowPriorityThreads,
}

/// The outcome of asking the leader.
pub enum LeaderAnswer<T> {
    /// This member leads, and has to answer by itself.
    ThisMemberLeads,
    /// Another member leads, and has answered.
    Answered(T),
}

impl Cluster {
    /// All members, by ascending ID.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.node.readers().cluster.read().members.iter().cloned().collect()
    }

    /// The versions that this member reports.
    #[must_use]
    pub fn versions(&self) -> Versions {
        let cluster = self.node.readers().cluster.read().cluster_version.clone();
        Versions {
            server: ETCD_VERSION.to_owned(),
            cluster: if cluster.is_empty() { "not_decided".to_owned() } else { cluster },
            storage: STORAGE_VERSION.to_owned(),
        }
    }

    /// Whether this member leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.node.status().leader() == self.member_id
    }

    /// Transfers leadership to another voter, until `is_over` is true of the present leader, or the request times out. The
    /// transfer is requested repeatedly: raft abandons one after an election timeout, and a voter that has not applied a
    /// membership change yet does not accept one.
    pub async fn move_leadership(&self, to: u64, is_over: impl Fn(u64) -> bool) -> Result<(), Error> {
        let moved = async {
            while !is_over(self.node.status().leader()) {
                self.node.transfer_leader(to);
                sleep(self.heartbeat_interval).await;
            }
        };
        tokio::time::timeout(self.request_timeout, moved).await.map_err(|_| Error::TimeoutLeaderTransfer)
    }

    /// Asks the leader: `ask` gets one of its URLs and a timeout, and is called again if it fails. Ends at `deadline` if that
    /// comes before the request times out.
    pub async fn ask_leader<T, AnswerFuture>(
        &self,
        deadline: Option<Instant>,
        ask: impl Fn(String, Duration) -> AnswerFuture + Send + Sync,
    ) -> Result<LeaderAnswer<T>, Error>
    where
        AnswerFuture: Future<Output = Result<T, String>> + Send,
    {
        let timeout = Instant::now() + self.request_timeout;
        let deadline = deadline.map_or(timeout, |deadline| deadline.min(timeout));
        loop {
            let leader = self.node.status().leader();
            if leader == self.member_id {
                return Ok(LeaderAnswer::ThisMemberLeads);
            }
            for url in self.peer_urls(leader) {
                let left = deadline.saturating_duration_since(Instant::now());
                // A leader that is paused or partitioned may answer long after another member was elected.
                let answer = tokio::select! {
                    answer = ask(url, left) => answer,
                    () = self.leader_is_replaced(leader) => Err("another member became the leader".to_owned()),
                };
                match answer {
                    Ok(answer) => return Ok(LeaderAnswer::Answered(answer)),
                    Err(error) => tracing::debug!(error, "failed to ask the leader"),
                }
            }
            if Instant::now() + RETRY_INTERVAL >= deadline {
                return Err(if leader == 0 { Error::NoLeader } else { Error::Timeout });
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    /// Returns when a member other than `leader` is known to lead.
    async fn leader_is_replaced(&self, leader: u64) {
        let is_replaced = || ![0, leader].contains(&self.node.status().leader());
        while !is_replaced() {
            sleep(self.heartbeat_interval).await;
        }
    }

    fn peer_urls(&self, member: u64) -> Vec<String> {
        let readers = self.node.readers();
        let cluster = readers.cluster.read();
        cluster.members.get(member).map_or_else(Vec::new, |member| member.peer_ur_ls.clone())
    }

    /// Proposes a command on behalf of the server itself, once, and waits for its outcome.
    pub async fn propose(&self, kind: Kind, request: Vec<u8>) -> Result<Response, Error> {
        await_outcome(|waiter| self.node.propose(self.ids.next(), kind, &request, waiter)).await
    }

    /// Promotes a learner if this member leads: only the leader knows how far a learner has caught up.
    pub async fn promote(&self, id: u64) -> Result<Response, Error> {
        let count_failure = |reason| METRICS.learner_promotion_failures.with_label_values(&[reason]).inc();
        let outcome = self.try_to_promote(id).await;
        match &outcome {
            Ok(_) => METRICS.learner_promotions.inc(),
            Err(Error::NotLeader) => (), // The leader counts it.
            Err(Error::MemberNotFound) => count_failure("membership: ID not found".to_owned()),
            Err(error) => count_failure(error.to_string()),
        }
        outcome
    }

    async fn try_to_promote(&self, id: u64) -> Result<Response, Error> {
        await_outcome(|waiter| self.node.catch_up(waiter)).await?;
        let progress = await_outcome(|waiter| self.node.progress(Box::new(move |progress| waiter(Ok(progress)))));
        let progress = progress.await?.ok_or(Error::NotLeader)?;
        let matched = |member| progress.iter().find(|(id, _)| *id == member).map(|(_, matched)| *matched);
        let learner = matched(id).ok_or(Error::MemberNotFound)?;
        if !is_ready(learner, matched(self.member_id).unwrap_or_default()) {
            return Err(Error::LearnerNotReady);
        }
        self.check_reconfig(|check| check.check_promotion())?;
        let (request_id, request) = (self.ids.next(), MemberPromoteRequest { id }.encode_to_vec());
        let entry = Command::encode(request_id, Kind::MemberPromote, &request);
        await_outcome(|waiter| self.node.change_members(request_id, entry, waiter)).await
    }

    /// Checks that a membership change cannot lose the quorum, if that is configured.
    pub fn check_reconfig(
        &self,
        check: impl FnOnce(ReconfigCheck<'_, &ConnectedFor<'_>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !self.strict_reconfig_check {
            return Ok(());
        }
        let members: Members = self.node.readers().cluster.read().members.clone();
        let connected = |member| self.node.connectivity().active_for(member);
        check(ReconfigCheck { members: &members, this: self.member_id, connected: &connected })
            .inspect_err(|error| tracing::warn!(%error, "rejecting a membership change"))
    }

    /// What the leader knows about a lease, without its keys; None if the lease does not exist.
    pub fn look_up_lease(&self, id: LeaseId) -> Result<Option<LeaseTimeToLiveResponse>, Error> {
        let (readers, lease_expiry) = (self.node.readers(), self.node.lease_expiry());
        // A lease that only one of the two knows is being revoked at the moment.
        let found = readers.leases.lookup(id).and_then(|granted| Some((lease_expiry.remaining(id)?, granted)));
        let Some((ttl, granted_ttl)) = found else {
            return if lease_expiry.is_primary() { Ok(None) } else { Err(Error::LeaderChanged) };
        };
        Ok(Some(LeaseTimeToLiveResponse { id: id.0, ttl, granted_ttl, ..LeaseTimeToLiveResponse::default() }))
    }

    /// Adds the keys that are attached to a lease. There may be many.
    #[must_use]
    pub fn with_keys(&self, found: LeaseTimeToLiveResponse) -> LeaseTimeToLiveResponse {
        let keys = self.node.readers().leases.keys(LeaseId(found.id)).unwrap_or_default();
        LeaseTimeToLiveResponse { keys, ..found }
    }

    /// Renews a lease for a client of another member, if this one leads and can prove it. Returns its TTL, None if it does not
    /// exist. An expired lease that is not revoked yet is waited for.
    pub async fn renew(&self, id: LeaseId) -> Result<Option<i64>, Error> {
        let lease_expiry = self.node.lease_expiry();
        loop {
            match lease_expiry.renew(id) {
                Renewal::Renewed(ttl) => return Ok(Some(ttl)),
                Renewal::Unknown => return Ok(None),
                Renewal::NotPrimary if self.leads() => {
                    await_outcome(|waiter| lease_expiry.await_primary(waiter)).await?;
                }
                Renewal::NotPrimary => return Err(Error::NotPrimary),
                Renewal::Expired => await_outcome(|waiter| lease_expiry.await_end(id, waiter)).await?,
            }
        }
    }

    /// Answers a LeaseTimeToLive of another member, if this one leads and can prove it; None if the lease does not exist.
    pub async fn time_to_live(
        self: &Arc<Self>,
        request: LeaseTimeToLiveRequest,
    ) -> Result<Option<LeaseTimeToLiveResponse>, Error> {
        let found = loop {
            if self.leads() {
                await_outcome(|waiter| self.node.lease_expiry().await_primary(waiter)).await?;
            }
            match self.look_up_lease(LeaseId(request.id)) {
                Err(Error::LeaderChanged) if self.leads() => (), // It had no proof of its leadership for a moment.
                found => break found?,
            }
        };
        let found = match found {
            Some(found) if request.keys => found,
            found => return Ok(found),
        };
        let cluster = self.clone();
        let with_keys = |waiter: Waiter<_>| self.read_pool.run(move || waiter(Ok(cluster.with_keys(found))));
        await_outcome(with_keys).await.map(Some)
    }

    /// The hash of this member's history up to a revision, computed on the read pool.
    pub async fn hash_at(self: &Arc<Self>, revision: i64) -> Result<PeerHash, Error> {
        let cluster = self.clone();
        let hash = await_outcome(|waiter| {
            let hash = move |waiter: Waiter<_>| {
                waiter(match cluster.node.hash_kv(revision) {
                    Ok(hash) => Ok(hash),
                    Err(ReadError::Refused(error)) => Err(error),
                    Err(ReadError::Halt(halt)) => halt.abort(),
                });
            };
            if let Err(waiter) = self.scans.run(waiter, hash) {
                waiter(Err(too_many_scans(&self.scans)));
            }
        });
        let hash = hash.await?;
        Ok(PeerHash {
            hash: hash.hash,
            hash_revision: hash.hash_revision,
            compact_revision: hash.compact_revision,
            head: hash.head,
        })
    }
}

/// Why a hash or a defragmentation is refused. Counts it.
pub fn too_many_scans(scans: &LowPriorityThreads) -> Error {
    metrics::refused("hashes");
    Error::LimitReached {
        what: "too many hashes and defragmentations wait for each other",
        flag: "max-waiting-hashes",
        value: scans.max_waiting(),
    }
}

/// For how long another member has been connected; None if it is not.
pub type ConnectedFor<'a> = dyn Fn(u64) -> Option<Duration> + 'a;

#[allow(clippy::cast_precision_loss, reason = "etcd compares floats, and the loss of precision does not matter here")]
fn is_ready(learner: u64, leader: u64) -> bool {
    learner as f64 >= leader as f64 * READY_RATIO
}

/// Is called with an outcome, once.
pub type Waiter<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// Waits for the outcome that a waiter is called with; `ask` passes the waiter on.
pub async fn await_outcome<T: Send + 'static>(ask: impl FnOnce(Waiter<T>)) -> Result<T, Error> {
    let (sender, receiver) = oneshot::channel();
    ask(Box::new(move |outcome| _ = sender.send(outcome)));
    receiver.await.unwrap_or(Err(Error::Stopped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learner_is_ready_with_nine_tenths_of_the_leaders_log() {
        assert!(is_ready(90, 100) && is_ready(100, 100) && is_ready(0, 0));
        assert!(!is_ready(89, 100) && !is_ready(0, 1));
    }
}
