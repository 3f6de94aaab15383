//! A oneshot channel for conversations: receives an outcome from another thread and wakes the conversation's task.

use std::{sync::Arc, task::Waker};

use parking_lot::Mutex;

use crate::error::Error;

/// The receiving side.
pub struct OneshotReceiver<T = ()>(Arc<Mutex<Option<Result<T, Error>>>>);

impl<T> OneshotReceiver<T> {
    /// The outcome, if it has arrived. It is returned once.
    #[must_use]
    pub fn outcome(&self) -> Option<Result<T, Error>> {
        self.0.lock().take()
    }
}

/// The sending side.
pub type OneshotCallback<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// A receiver, and the callback that sets its outcome and then wakes the conversation.
#[must_use]
pub fn channel<T: Send + 'static>(waker: &Waker) -> (OneshotReceiver<T>, OneshotCallback<T>) {
    let shared = Arc::new(Mutex::new(None));
    let (sent, waker) = (shared.clone(), waker.clone());
    let callback = move |outcome| {
        *sent.lock() = Some(outcome);
        waker.wake();
    };
    (OneshotReceiver(shared), Box::new(callback))
}
