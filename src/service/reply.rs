//! How an operation is answered, and how one waits for what other threads answer.

use std::{sync::Arc, task::Waker};

use parking_lot::Mutex;

use crate::error::Error;
use http2::ledger::Charge;

/// The right to answer one request, once, from any thread. A frontend implements it per kind of outcome: it knows how that is
/// encoded in its protocol, and how the answer reaches the client.
pub trait Reply<T>: Sized + Send + 'static {
    /// Ends the request.
    fn answer(self, outcome: Result<T, Error>);

    /// Ends the request with an outcome that `charge` counts. Once it is encoded, only the encoded answer has to be counted.
    fn answer_counted(self, outcome: Result<T, Error>, charge: Charge) {
        self.answer(outcome);
        drop(charge);
    }

    /// Runs `work` on the request's own task, so that the raft thread and the apply thread, which serve all clients, neither
    /// read the disk nor encode a large answer for one of them.
    fn run(self, work: impl FnOnce(Self) + Send + 'static);

    /// Whether the client still waits for the answer. To be asked before expensive work.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// The receiving side of a oneshot channel, for streams that are polled: another thread sends an outcome and wakes the stream's
/// task.
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

/// A receiver, and the callback that sets its outcome and then wakes the task.
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
