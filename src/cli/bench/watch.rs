//! The watchers of the watch workload: streams that receive events and record their age.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use bytes::Bytes;
use tokio_stream::StreamExt;
use tonic::{Streaming, transport::Channel};

use crate::proto::etcdserverpb::{
    WatchCreateRequest, WatchRequest, WatchResponse, watch_client::WatchClient, watch_request::RequestUnion,
};

use super::{
    kv::age,
    measure::{Failure, LiveCounters, Tally},
};

/// A stream with all its watches created, from which nothing is received yet.
pub(super) struct WatchStream {
    responses: Streaming<WatchResponse>,
    /// Events that arrived while the watches were being created.
    early: u64,
}

impl WatchStream {
    /// Opens a stream and watches each of `keys`; the same key may occur many times.
    pub(super) async fn open(channel: Channel, keys: Vec<Bytes>) -> Result<Self, Failure> {
        let expected = keys.len();
        let creations = tokio_stream::iter(keys.into_iter().map(creation));
        // The request stream must stay open: otherwise the server ends the watch stream.
        let requests = creations.chain(tokio_stream::pending());
        let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
        let mut stream = Self { responses: client.watch(requests).await?.into_inner(), early: 0 };
        let mut created = 0;
        while created < expected {
            let response = stream.next().await?;
            created += usize::from(response.created);
            stream.early += response.events.len() as u64;
        }
        Ok(stream)
    }

    /// Receives events until the stream fails.
    pub(super) async fn receive(mut self, epoch: Instant, tally: Rc<RefCell<Tally>>, counters: Arc<LiveCounters>) {
        counters.events.fetch_add(self.early, Ordering::Relaxed);
        loop {
            match self.next().await {
                Ok(response) => record(&response, epoch, &mut tally.borrow_mut(), &counters),
                Err(failure) => {
                    counters.failed.fetch_add(1, Ordering::Relaxed);
                    return tally.borrow_mut().fail(failure);
                }
            }
        }
    }

    async fn next(&mut self) -> Result<WatchResponse, Failure> {
        let response = self.responses.message().await?;
        let response = response.ok_or_else(|| Failure::unanswered("the server ended the watch stream"))?;
        if response.canceled {
            return Err(Failure::wrong_answer(format!("the server cancelled a watch: {}", response.cancel_reason)));
        }
        Ok(response)
    }
}

fn creation(key: Bytes) -> WatchRequest {
    let create = WatchCreateRequest { key, ..WatchCreateRequest::default() };
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

/// Records the events of one response.
fn record(response: &WatchResponse, epoch: Instant, tally: &mut Tally, counters: &LiveCounters) {
    for event in &response.events {
        match event.kv.as_ref().and_then(|kv| age(&kv.value, epoch)) {
            Some(age) => tally.events.record(age),
            None => tally.fail(Failure::wrong_answer(
                "an event that this load generator did not cause; are other clients using these keys?",
            )),
        }
    }
    counters.events.fetch_add(response.events.len() as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use crate::proto::mvccpb::{Event, KeyValue};

    use super::*;

    #[test]
    fn events_of_other_clients_are_failures() {
        let stamped = |value: Vec<u8>| Event {
            kv: Some(KeyValue { value: value.into(), ..KeyValue::default() }),
            ..Event::default()
        };
        let events = vec![stamped(0u64.to_be_bytes().to_vec()), stamped(b"other".to_vec()), Event::default()];
        let (mut tally, counters) = (Tally::new(), LiveCounters::default());
        record(&WatchResponse { events, ..WatchResponse::default() }, Instant::now(), &mut tally, &counters);
        assert_eq!((tally.events.count(), tally.failed()), (1, 2));
        assert_eq!(counters.events.load(Ordering::Relaxed), 3);
    }
}
