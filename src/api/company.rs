//! The other members, for those calls that are not answered out of this member's own state alone.
//!
//! Only the leader knows when leases end and how far learners are. A member that does not lead asks it, over HTTP: finds out
//! who leads, tries each of its URLs, and tries again until the request's time is over, because leaders change.

use std::time::{Duration, Instant};

use tokio::{runtime::Handle, sync::oneshot, time::sleep};

use super::Api;
use crate::{error::Error, peer::Client};

/// Between two attempts to hear from a leader.
const RETRY: Duration = Duration::from_millis(50);

/// What a member needs in order to deal with the others.
pub struct Company {
    /// Asks them.
    pub client: Client,
    /// Whether changes of the members that could cost the quorum are refused.
    pub strict: bool,
    /// Most learners, for who wants to add one here.
    pub max_learners: u64,
    /// How long a request may take.
    pub patience: Duration,
    /// How long a leader's heartbeat takes to come again.
    pub tick: Duration,
    /// Where it is waited for answers.
    pub runtime: Handle,
}

/// Who has the answer.
pub enum Led<T> {
    /// This member leads: the answer is to be found here.
    Here,
    /// Another one leads, and has answered.
    There(T),
}

impl Api {
    /// Lets another voter lead, until `is_over` says so of who leads, or the time is over. It is asked more than once: raft
    /// gives up a transfer after an election timeout, and a voter that has not applied a change of the members yet does not
    /// take it on.
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

    /// Asks the leader: `ask` gets one of its URLs and how long it may take, and is called again if it fails.
    pub async fn ask_leader<T, Asking>(
        &self,
        ask: impl Fn(String, Duration) -> Asking + Send + Sync,
    ) -> Result<Led<T>, Error>
    where
        Asking: Future<Output = Result<T, String>> + Send,
    {
        let deadline = Instant::now() + self.company.patience;
        loop {
            let leader = self.node.status().leader();
            if leader == self.header.member_id() {
                return Ok(Led::Here);
            }
            for url in self.peer_urls(leader) {
                let left = deadline.saturating_duration_since(Instant::now());
                // A leader that is paused or cut off answers when it goes on, long after another one could have been asked.
                let answer = tokio::select! {
                    answer = ask(url, left) => answer,
                    () = self.leader_is_replaced(leader) => Err("another member leads".to_owned()),
                };
                match answer {
                    Ok(answer) => return Ok(Led::There(answer)),
                    Err(error) => tracing::debug!(error, "the leader gives no answer"),
                }
            }
            if Instant::now() + RETRY >= deadline {
                return Err(if leader == 0 { Error::NoLeader } else { Error::Timeout });
            }
            sleep(RETRY).await;
        }
    }

    /// Ends when another member than this one is known to lead.
    async fn leader_is_replaced(&self, leader: u64) {
        let is_replaced = || ![0, leader].contains(&self.node.status().leader());
        while !is_replaced() {
            sleep(self.company.tick).await;
        }
    }

    fn peer_urls(&self, member: u64) -> Vec<String> {
        let readers = self.readers();
        let board = readers.board.read();
        board.members.get(member).map_or_else(Vec::new, |member| member.peer_ur_ls.clone())
    }
}

/// Waits for what a waiter is told; `ask` hands the waiter over.
pub async fn outcome<T: Send + 'static>(
    ask: impl FnOnce(Box<dyn FnOnce(Result<T, Error>) + Send>),
) -> Result<T, Error> {
    let (tell, told) = oneshot::channel();
    ask(Box::new(move |outcome| _ = tell.send(outcome)));
    told.await.unwrap_or(Err(Error::Stopped))
}
