//! Named elections: the entry at the head of the queue is the leader, and its value is the proclamation.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{
    ChangeStream, Session,
    queue::{self, QueueEntry},
};
use crate::{
    error::Error,
    mvcc::Interval,
    proto::{
        etcdserverpb::{TxnRequest, compare::CompareResult},
        mvccpb::{KeyValue, event::EventType},
        v3electionpb::{CampaignRequest, LeaderKey, ProclaimRequest, ResignRequest},
    },
};

const NOT_LEADER: &str = "election: not leader";
const NO_LEADER: &str = "election: no leader";
const NO_LEADER_FIELD: &str = "\"leader\" field must be provided";

/// An election that was won.
#[derive(Debug)]
pub struct CampaignOutcome {
    pub revision: i64,
    pub leader: LeaderKey,
}

/// A leader's key and proclamation.
#[derive(Debug)]
pub struct Leader {
    pub revision: i64,
    pub key_value: Option<KeyValue>,
}

/// Waits until the caller is the leader.
pub async fn campaign(session: &Session, request: CampaignRequest) -> Result<CampaignOutcome, Error> {
    let CampaignRequest { name, lease, value } = request;
    let lease = queue::lease_or_new(session, lease).await?;
    let (entry, enqueued) = QueueEntry::enqueue(session, &name, lease, value.clone()).await?;
    if enqueued.before.is_some_and(|before| before.value != value) {
        put_value(session, entry.key(), enqueued.created, value, lease).await?;
    }
    queue::await_turn(session, &name, enqueued.created).await?;
    // As in etcd, nothing checks whether the key still exists.
    let leader = LeaderKey { name, key: entry.keep(), rev: enqueued.created, lease };
    Ok(CampaignOutcome { revision: enqueued.revision, leader })
}

/// Changes the leader's value. Returns the revision.
pub async fn proclaim(session: &Session, request: ProclaimRequest) -> Result<i64, Error> {
    let LeaderKey { key, rev, lease, .. } = leader_key(request.leader)?;
    let lease = queue::lease_or_new(session, lease).await?;
    put_value(session, &key, rev, request.value, lease).await
}

fn leader_key(leader: Option<LeaderKey>) -> Result<LeaderKey, Error> {
    leader.ok_or_else(|| Error::Unknown(NO_LEADER_FIELD.to_owned()))
}

/// Changes the value of a key, provided that its create revision is `created`.
async fn put_value(session: &Session, key: &Bytes, created: i64, value: Bytes, lease: i64) -> Result<i64, Error> {
    let txn = TxnRequest {
        compare: vec![queue::compare_create_revision(key, CompareResult::Equal, created)],
        success: vec![queue::put_op(key, value, lease)],
        failure: Vec::new(),
    };
    let (revision, response) = session.txn(txn).await?;
    if response.succeeded { Ok(revision) } else { Err(Error::Unknown(NOT_LEADER.to_owned())) }
}

/// The present leader.
pub async fn leader(session: &Session, name: &[u8]) -> Result<Leader, Error> {
    let (revision, found) = session.range(queue::oldest_entry(name)).await?;
    match found.into_iter().next() {
        Some(leader) => Ok(Leader { revision, key_value: Some(leader) }),
        None => Err(Error::Unknown(NO_LEADER.to_owned())),
    }
}

/// Deletes the leader's key. Returns the revision.
pub async fn resign(session: &Session, request: ResignRequest) -> Result<i64, Error> {
    let LeaderKey { key, rev, .. } = leader_key(request.leader)?;
    let txn = TxnRequest {
        compare: vec![queue::compare_create_revision(&key, CompareResult::Equal, rev)],
        success: vec![queue::delete_op(&key)],
        failure: Vec::new(),
    };
    Ok(session.txn(txn).await?.0)
}

/// The leaders of an election and their proclamations, one after another.
pub struct Observer {
    session: Session,
    name: Bytes,
    /// The changes of the present leader's key.
    changes: Option<ChangeStream>,
    /// Proclamations that were received and are not returned yet.
    pending: VecDeque<Leader>,
    /// Whether the key was deleted after these.
    is_deleted: bool,
}

impl Observer {
    #[must_use]
    pub fn new(session: &Session, name: Bytes) -> Self {
        Self { session: session.clone(), name, changes: None, pending: VecDeque::new(), is_deleted: false }
    }

    /// The next leader, or the next proclamation of the present one. An error ends it.
    pub async fn next(&mut self) -> Result<Leader, Error> {
        loop {
            if let Some(leader) = self.pending.pop_front() {
                return Ok(leader);
            }
            match &mut self.changes {
                Some(_) if self.is_deleted => (self.changes, self.is_deleted) = (None, false),
                Some(changes) => match changes.next().await? {
                    Some(batch) => {
                        for event in batch.events {
                            if event.r#type() == EventType::Delete {
                                self.is_deleted = true;
                                break;
                            }
                            self.pending.push_back(Leader { revision: batch.revision, key_value: event.kv });
                        }
                    }
                    None => self.changes = None,
                },
                None => {
                    let (revision, leader) = self.await_leader().await?;
                    self.changes = Some(self.session.watch(Interval::Key(leader.key.clone()), revision + 1));
                    return Ok(Leader { revision, key_value: Some(leader) });
                }
            }
        }
    }

    /// Returns the present leader, or the first one that comes.
    async fn await_leader(&self) -> Result<(i64, KeyValue), Error> {
        loop {
            let (revision, found) = self.session.range(queue::oldest_entry(&self.name)).await?;
            if let Some(leader) = found.into_iter().next() {
                return Ok((revision, leader));
            }
            let (key, range_end) = queue::prefix(&self.name);
            let mut changes = self.session.watch(Interval::Range(key, range_end), revision + 1);
            while let Some(change) = changes.next().await? {
                let mut puts = change.events.into_iter().filter(|event| event.r#type() == EventType::Put);
                if let Some(leader) = puts.find_map(|event| event.kv) {
                    return Ok((leader.mod_revision, leader));
                }
            }
        }
    }
}
