//! Locks with a name: who stands first in line holds it, until his key goes.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Api, decode,
    recipe::{Caller, Recipe, refusal},
    succession::{self, Place},
};
use crate::{
    call::{Conversation, Metadata, Refusal},
    proto::{
        etcdserverpb::{DeleteRangeRequest, DeleteRangeResponse, RangeRequest, RangeResponse},
        v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse},
    },
};

impl Api {
    /// `Lock/Lock`.
    pub fn lock(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        Recipe::open(self, metadata, |caller, message| Box::pin(lock(caller, message)))
    }

    /// `Lock/Unlock`.
    pub fn unlock(self: &Arc<Self>, metadata: Metadata) -> Box<dyn Conversation> {
        Recipe::open(self, metadata, |caller, message| Box::pin(unlock(caller, message)))
    }
}

async fn lock(caller: Arc<Caller>, message: Bytes) -> Result<(), Refusal> {
    let LockRequest { name, lease } = caller.keep(&decode(message)?);
    let lease = succession::lease_or_new(&caller, lease).await?;
    let (place, taken) = Place::take(&caller, &name, lease, Bytes::new()).await?;
    let is_first = taken.oldest.is_none_or(|oldest| oldest.create_revision == taken.created);
    let header = if is_first {
        Some(taken.header)
    } else {
        succession::await_turn(&caller, &name, taken.created).await?;
        // All before us have gone; have we?
        let own = RangeRequest { key: place.key().clone(), ..RangeRequest::default() };
        let found: RangeResponse = caller.ask(Api::range, &own).await?;
        if found.kvs.is_empty() {
            return Err(refusal("mutex: session is expired"));
        }
        found.header
    };
    caller.say(&LockResponse { header, key: place.keep() }).await;
    Ok(())
}

/// Takes any key away, whoever holds it.
async fn unlock(caller: Arc<Caller>, message: Bytes) -> Result<(), Refusal> {
    let UnlockRequest { key } = caller.keep(&decode(message)?);
    let delete = DeleteRangeRequest { key, ..DeleteRangeRequest::default() };
    let deleted: DeleteRangeResponse = caller.ask(Api::delete_range, &delete).await?;
    caller.say(&UnlockResponse { header: deleted.header }).await;
    Ok(())
}
