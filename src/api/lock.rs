//! Named locks: the first entry of a lock's queue holds the lock until its key is deleted.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Api, decode,
    recipe::{AsyncConversation, Caller, refusal},
    succession::{self, QueueEntry},
};
use crate::{
    call::{CallError, Conversation, Metadata},
    proto::{
        etcdserverpb::{DeleteRangeRequest, DeleteRangeResponse, RangeRequest, RangeResponse},
        v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse},
    },
};

impl Api {
    /// `Lock/Lock`.
    pub fn lock(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(lock(caller, message)))
    }

    /// `Lock/Unlock`.
    pub fn unlock(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        AsyncConversation::open(self, metadata, |caller, message| Box::pin(unlock(caller, message)))
    }
}

async fn lock(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let LockRequest { name, lease } = caller.retain(&decode(message)?);
    let lease = succession::lease_or_new(&caller, lease).await?;
    let (entry, enqueued) = QueueEntry::enqueue(&caller, &name, lease, Bytes::new()).await?;
    let is_first = enqueued.oldest.is_none_or(|oldest| oldest.create_revision == enqueued.created);
    let header = if is_first {
        Some(enqueued.header)
    } else {
        succession::await_turn(&caller, &name, enqueued.created).await?;
        // All earlier entries are gone; check that this one is not gone, too.
        let own = RangeRequest { key: entry.key().clone(), ..RangeRequest::default() };
        let found: RangeResponse = caller.call(Api::range, &own).await?;
        if found.kvs.is_empty() {
            return Err(refusal("mutex: session is expired"));
        }
        found.header
    };
    caller.send(&LockResponse { header, key: entry.keep() }).await;
    Ok(())
}

/// Deletes the key, whichever client created it.
async fn unlock(caller: Arc<Caller>, message: Bytes) -> Result<(), CallError> {
    let UnlockRequest { key } = caller.retain(&decode(message)?);
    let delete = DeleteRangeRequest { key, ..DeleteRangeRequest::default() };
    let deleted: DeleteRangeResponse = caller.call(Api::delete_range, &delete).await?;
    caller.send(&UnlockResponse { header: deleted.header }).await;
    Ok(())
}
