//! Calls of unary methods from within this process, for frontends that are not the HTTP/2 server of this project.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Poll, Waker},
    time::Instant,
};

use parking_lot::Mutex;

use super::methods::GrpcMethod;
use http2::{
    call::{Call, CallResult, Code, Delivery, Reply, ReplySink},
    service::Method,
};

/// Where the answer of a call is put.
#[derive(Default)]
struct Sink {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    delivery: Option<Delivery>,
    waker: Option<Waker>,
    /// The caller does not wait any more.
    is_abandoned: bool,
}

impl ReplySink for Sink {
    fn put(self: Arc<Self>, _slot: u64, delivery: Delivery) {
        let mut state = self.state.lock();
        state.delivery = Some(delivery);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn is_open(&self, _slot: u64) -> bool {
        !self.state.lock().is_abandoned
    }
}

impl Sink {
    async fn delivery(&self) -> Delivery {
        poll_fn(|context| {
            let mut state = self.state.lock();
            if let Some(delivery) = state.delivery.take() {
                return Poll::Ready(delivery);
            }
            state.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A call that is not answered yet. Dropping it cancels it.
struct Pending<'a> {
    method: &'a GrpcMethod,
    sink: Arc<Sink>,
    is_answered: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.sink.state.lock().is_abandoned = true;
            self.method.handled(Code::Canceled);
        }
    }
}

/// Calls a method and waits for its answer, running the work that is to be run here. Counts everything but the start of the call.
pub async fn call(method: &GrpcMethod, call: Call) -> CallResult {
    let (started, request_bytes) = (Instant::now(), call.message.len());
    method.received(request_bytes);
    let mut pending = Pending { method, sink: Arc::default(), is_answered: false };
    method.call(call, Reply::new(pending.sink.clone(), 0));
    let answer = loop {
        match pending.sink.delivery().await {
            Delivery::Answer(answer) => break answer,
            Delivery::Work(work) => work(Reply::new(pending.sink.clone(), 0)),
        }
    };
    pending.is_answered = true;
    method.answered(started.elapsed(), request_bytes, &answer);
    answer
}
