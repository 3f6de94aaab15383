//! Named elections: the first entry of an election's queue is the leader, and its key's value is what the leader proclaims.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Api, decode, decode_streamed,
    recipe::{AsyncConversation, Caller, refusal},
    succession::{self, QueueEntry},
};
use crate::{
    call::{CallError, Conversation, Metadata},
    mvcc::Interval,
    proto::{
        etcdserverpb::{RangeResponse, ResponseHeader, TxnRequest, TxnResponse, compare::CompareResult},
        mvccpb::{KeyValue, event::EventType},
        v3electionpb::{
            CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
            ProclaimResponse, ResignRequest, ResignResponse,
        },
    },
};

const NOT_LEADER: &str = "election: not leader";
const NO_LEADER: &str = "election: no leader";
const NO_LEADER_FIELD: &str = "\"leader\" field must be provided";

impl Api {
    /// `Election/Campaign`.
    pub fn campaign(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(campaign(caller, message)))
    }

    /// `Election/Proclaim`.
    pub fn proclaim(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(proclaim(caller, message)))
    }

    /// `Election/Leader`.
    pub fn leader(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(leader(caller, message)))
    }

    /// `Election/Observe`.
    pub fn observe(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(observe(caller, message)))
    }

    /// `Election/Resign`.
    pub fn resign(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(resign(caller, message)))
    }
}

async fn campaign(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let CampaignRequest { name, lease, value } = caller.retain(&decode(message)?);
    let lease = succession::lease_or_new(&caller, lease).await?;
    let (entry, enqueued) = QueueEntry::enqueue(&caller, &name, lease, value.clone()).await?;
    if enqueued.before.is_some_and(|before| before.value != value) {
        put_value(&caller, entry.key(), enqueued.created, value, lease).await?;
    }
    succession::await_turn(&caller, &name, enqueued.created).await?;
    // As in etcd, nothing checks whether the key still exists.
    let leader = LeaderKey { name, key: entry.keep(), rev: enqueued.created, lease };
    caller.send(&CampaignResponse { header: Some(enqueued.header), leader: Some(leader) }).await;
    Ok(())
}

async fn proclaim(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let ProclaimRequest { leader, value } = caller.retain(&decode(message)?);
    let LeaderKey { key, rev, lease, .. } = leader.ok_or_else(|| refusal(NO_LEADER_FIELD))?;
    let lease = succession::lease_or_new(&caller, lease).await?;
    let header = put_value(&caller, &key, rev, value, lease).await?;
    caller.send(&ProclaimResponse { header }).await;
    Ok(())
}

/// Changes the value of a key, provided that its create revision is `created`.
async fn put_value(
    caller: &Caller,
    key: &Bytes,
    created: i64,
    value: Bytes,
    lease: i64,
) -> Result<Option<ResponseHeader>, CallError> {
    let txn = TxnRequest {
        compare: vec![succession::compare_create_revision(key, CompareResult::Equal, created)],
        success: vec![succession::put_op(key, value, lease)],
        failure: Vec::new(),
    };
    let response: TxnResponse = caller.call(Api::txn, &txn).await?;
    if response.succeeded { Ok(response.header) } else { Err(refusal(NOT_LEADER)) }
}

async fn leader(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let LeaderRequest { name } = caller.retain(&decode(message)?);
    let found: RangeResponse = caller.call(Api::range, &succession::oldest_entry(&name)).await?;
    let kv = Some(found.kvs.into_iter().next().ok_or_else(|| refusal(NO_LEADER))?);
    caller.send(&LeaderResponse { header: found.header, kv }).await;
    Ok(())
}

async fn resign(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let ResignRequest { leader } = caller.retain(&decode(message)?);
    let LeaderKey { key, rev, .. } = leader.ok_or_else(|| refusal(NO_LEADER_FIELD))?;
    let txn = TxnRequest {
        compare: vec![succession::compare_create_revision(&key, CompareResult::Equal, rev)],
        success: vec![succession::delete_op(&key)],
        failure: Vec::new(),
    };
    let response: TxnResponse = caller.call(Api::txn, &txn).await?;
    caller.send(&ResignResponse { header: response.header }).await;
    Ok(())
}

/// Sends the leader and each of its proclamations, for one leader after another. If a step fails the stream ends without an
/// error, as etcd's does.
async fn observe(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let LeaderRequest { name } = caller.retain(&decode_streamed(message)?);
    while let Ok((header, leader)) = await_leader(&caller, &name).await {
        let (key, from) = (leader.key.clone(), header.revision + 1);
        caller.send(&LeaderResponse { header: Some(header), kv: Some(leader) }).await;
        if follow_leader(&caller, key, from).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Returns the present leader, or the first one that comes.
async fn await_leader(caller: &Caller, name: &[u8]) -> Result<(ResponseHeader, KeyValue), CallError> {
    loop {
        let found: RangeResponse = caller.call(Api::range, &succession::oldest_entry(name)).await?;
        let header = found.header.expect("our own responses have a header");
        if let Some(leader) = found.kvs.into_iter().next() {
            return Ok((header, leader));
        }
        let (key, range_end) = succession::prefix(name);
        let mut changes = caller.watch(Interval::Range(key, range_end), header.revision + 1);
        while let Some(change) = changes.next().await? {
            let mut puts = change.events.into_iter().filter(|event| event.r#type() == EventType::Put);
            if let Some(leader) = puts.find_map(|event| event.kv) {
                return Ok((ResponseHeader { revision: leader.mod_revision, ..header }, leader));
            }
        }
    }
}

/// Sends all proclamations of a leader from a revision on, until its key is deleted.
async fn follow_leader(caller: &Caller, key: Bytes, from: i64) -> Result<(), CallError> {
    let mut changes = caller.watch(Interval::Key(key), from);
    while let Some(change) = changes.next().await? {
        for event in change.events {
            if event.r#type() == EventType::Delete {
                return Ok(());
            }
            let header = Some(caller.api.header.at(change.revision));
            caller.send(&LeaderResponse { header, kv: event.kv }).await;
        }
    }
    Ok(())
}
