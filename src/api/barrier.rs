//! Something that a conversation waits for, opened from another thread.

use std::{sync::Arc, task::Waker};

use parking_lot::Mutex;

use crate::error::Error;

/// The side of the one who waits.
pub struct Barrier<T = ()>(Arc<Mutex<Option<Result<T, Error>>>>);

impl<T> Barrier<T> {
    /// What it came to, once, when it is open.
    #[must_use]
    pub fn outcome(&self) -> Option<Result<T, Error>> {
        self.0.lock().take()
    }
}

/// Opens a barrier.
pub type Opener<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// A barrier, and the waiter that opens it and wakes the conversation.
#[must_use]
pub fn erect<T: Send + 'static>(waker: &Waker) -> (Barrier<T>, Opener<T>) {
    let shared = Arc::new(Mutex::new(None));
    let (opens, waker) = (shared.clone(), waker.clone());
    let opener = move |outcome| {
        *opens.lock() = Some(outcome);
        waker.wake();
    };
    (Barrier(shared), Box::new(opener))
}
