//! Named locks: the entry at the head of the queue holds the lock until its key is deleted.

use bytes::Bytes;

use super::{
    Session,
    queue::{self, QueueEntry},
};
use crate::{
    error::Error,
    proto::{
        etcdserverpb::{DeleteRangeRequest, RangeRequest},
        v3lockpb::LockRequest,
    },
};

/// A lock that was acquired.
#[derive(Debug)]
pub struct LockOutcome {
    pub revision: i64,
    /// The lock is held until this key is deleted.
    pub key: Bytes,
}

/// Waits until the lock is acquired.
pub async fn lock(session: &Session, request: LockRequest) -> Result<LockOutcome, Error> {
    let LockRequest { name, lease } = request;
    let lease = queue::lease_or_new(session, lease).await?;
    let (entry, enqueued) = QueueEntry::enqueue(session, &name, lease, Bytes::new()).await?;
    let is_first = enqueued.oldest.is_none_or(|oldest| oldest.create_revision == enqueued.created);
    let revision = if is_first {
        enqueued.revision
    } else {
        queue::await_turn(session, &name, enqueued.created).await?;
        // All earlier entries are gone; this one may be gone, too.
        let own = RangeRequest { key: entry.key().clone(), ..RangeRequest::default() };
        let (revision, found) = session.range(own).await?;
        if found.is_empty() {
            return Err(Error::Unknown("mutex: session is expired".to_owned()));
        }
        revision
    };
    Ok(LockOutcome { revision, key: entry.keep() })
}

/// Deletes a key, whichever client put it. Returns the revision.
pub async fn unlock(session: &Session, key: Bytes) -> Result<i64, Error> {
    session.delete_range(DeleteRangeRequest { key, ..DeleteRangeRequest::default() }).await
}
