//! Requests to the leader, for calls that cannot be answered from this member's own state.
//!
//! Only the leader knows when leases expire and how far learners have caught up. The other members ask it over HTTP: they find
//! out which member leads, try each of its URLs, and try again until the request times out, because leaders change.

use std::time::{Duration, Instant};

use tokio::{runtime::Handle, sync::oneshot, time::sleep};

use super::Api;
use crate::{error::Error, peer::Client};

/// The pause between two attempts to reach the leader.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// What a member needs to communicate with the others and to change the membership.
pub struct Company {
    pub client: Client,
    /// Whether membership changes that could lose the quorum are refused (`--strict-reconfig-check`).
    pub strict: bool,
    /// The maximum number of learners, for additions that this member proposes.
    pub max_learners: u64,
    /// How long a request may take.
    pub patience: Duration,
    /// The heartbeat interval.
    pub tick: Duration,
    /// Runs the tasks that wait for answers.
    pub runtime: Handle,
}

/// The outcome of asking the leader.
pub enum LeaderAnswer<T> {
    /// This member leads, and has to answer by itself.
    ThisMemberLeads,
    /// Another member leads, and has answered.
    Answered(T),
}

impl Api {
    /// Transfers leadership to another voter, until `is_over` is true of the present leader, or the request times out. The
    /// transfer is requested repeatedly: raft abandons one after an election timeout, and a voter that has not applied a
    /// membership change yet does not accept one.
    pub async fn move_leadership(&self, to: u64, is_over: impl Fn(u64) -> bool) -> Result<(), Error> {
        let moved = async {
            while !is_over(self.node.status().leader()) {
                self.node.transfer_leader(to);
                sleep(self.company.tick).await;
            }
        };
        tokio::time::timeout(self.company.patience, moved).await.map_err(|_| Error::TimeoutLeaderTransfer)
    }

    /// Whether this member leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.node.status().leader() == self.header.member_id()
    }

    /// Asks the leader: `ask` gets one of its URLs and a timeout, and is called again if it fails.
    pub async fn ask_leader<T, AnswerFuture>(
        &self,
        ask: impl Fn(String, Duration) -> AnswerFuture + Send + Sync,
    ) -> Result<LeaderAnswer<T>, Error>
    where
        AnswerFuture: Future<Output = Result<T, String>> + Send,
    {
        let deadline = Instant::now() + self.company.patience;
        loop {
            let leader = self.node.status().leader();
            if leader == self.header.member_id() {
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
            sleep(self.company.tick).await;
        }
    }

    fn peer_urls(&self, member: u64) -> Vec<String> {
        let readers = self.readers();
        let cluster_state = readers.cluster.read();
        cluster_state.members.get(member).map_or_else(Vec::new, |member| member.peer_ur_ls.clone())
    }
}

/// Waits for the outcome that a waiter is called with; `ask` passes the waiter on.
pub async fn outcome<T: Send + 'static>(
    ask: impl FnOnce(Box<dyn FnOnce(Result<T, Error>) + Send>),
) -> Result<T, Error> {
    let (sender, receiver) = oneshot::channel();
    ask(Box::new(move |outcome| _ = sender.send(outcome)));
    receiver.await.unwrap_or(Err(Error::Stopped))
}
