//! Something that a conversation waits for, opened from another thread.

use std::{sync::Arc, task::Waker};

use parking_lot::Mutex;

use crate::{error::Error, node::waiters::ReadWaiter};

/// The side of the one who waits.
pub struct Barrier(Arc<Mutex<Option<Result<(), Error>>>>);

impl Barrier {
    /// What it came to, once, when it is open.
    #[must_use]
    pub fn outcome(&self) -> Option<Result<(), Error>> {
        self.0.lock().take()
    }
}

/// A barrier, and the waiter that opens it and wakes the conversation.
#[must_use]
pub fn erect(waker: &Waker) -> (Barrier, ReadWaiter) {
    let shared = Arc::new(Mutex::new(None));
    let (opens, waker) = (shared.clone(), waker.clone());
    let opener = move |outcome| {
        *opens.lock() = Some(outcome);
        waker.wake();
    };
    (Barrier(shared), Box::new(opener))
}
