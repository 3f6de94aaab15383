//! A client that watches all keys, at one member after the other, and must receive each change once and in order.

use std::{collections::VecDeque, sync::Arc, task::Waker};

use bytes::Bytes;
use http2::call::{Conversation, Step, StreamIo};
use metastore::{
    frontend::grpc::{header::Header, watch::WatchConversation},
    node::status::Status,
    proto::{
        etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion},
        mvccpb::{Event, KeyValue, event::EventType},
    },
    service::watch::WatchStream,
};
use prost::Message;

use super::{
    member::{CLUSTER, Member},
    model::Model,
};

/// Larger than any response.
const FRAGMENT_BYTES: usize = 2 << 20;

/// The watching client.
pub struct Watcher {
    stream: Option<Stream>,
    /// The next revision that it expects.
    pub next: i64,
}

struct Stream {
    member: u64,
    conversation: WatchConversation,
    wire: Wire,
}

impl Watcher {
    pub fn new() -> Self {
        Self { stream: None, next: 2 }
    }

    /// The member that it is connected to.
    pub fn member(&self) -> Option<u64> {
        self.stream.as_ref().map(|stream| stream.member)
    }

    /// Connects to a member and requests what it has not received yet.
    pub fn watch_at(&mut self, id: u64, member: &Member) {
        let header = Header::new(CLUSTER, id, Arc::new(Status::default()));
        let subscriber = member.hub.open_with_period(std::time::Duration::from_secs(10));
        let conversation =
            WatchConversation::new(WatchStream::new(subscriber, Box::new(|_, _| Ok(()))), header, FRAGMENT_BYTES);
        let mut stream = Stream { member: id, conversation, wire: Wire::default() };
        stream.watch_from(self.next);
        self.stream = Some(stream);
    }

    /// Its member has crashed.
    pub fn disconnect(&mut self) {
        self.stream = None;
    }

    /// Receives and checks the pending responses; returns the number of events.
    pub fn receive(&mut self, model: &Model) -> usize {
        let Some(stream) = &mut self.stream else { return 0 };
        assert_eq!(stream.conversation.step(&mut stream.wire), Step::Wait);
        let mut received = 0;
        for response in std::mem::take(&mut stream.wire.sent) {
            if response.canceled {
                let compacted = response.compact_revision;
                assert!(compacted > self.next, "cancelled at {compacted}, but {} is next: {response:?}", self.next);
                self.next = compacted;
                stream.watch_from(compacted);
            }
            let revision = response.header.as_ref().expect("every response has a header").revision;
            for events in response.events.chunk_by(|a, b| revision_of(a) == revision_of(b)) {
                received += events.len();
                assert_eq!(revision_of(&events[0]), self.next, "the next expected revision");
                assert!(revision >= self.next, "the revision of the header is {revision}");
                let mut changes: Vec<_> = events.iter().map(change).collect();
                changes.sort_by(|a, b| a.0.cmp(&b.0));
                assert_eq!(changes, model.changes_at(self.next), "the changes of revision {}", self.next);
                self.next += 1;
            }
        }
        received
    }
}

fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().expect("every event has a key").mod_revision
}

fn change(event: &Event) -> (Bytes, Option<KeyValue>) {
    let kv = event.kv.clone().expect("every event has a key");
    (kv.key.clone(), (event.r#type() == EventType::Put).then_some(kv))
}

impl Stream {
    fn watch_from(&mut self, revision: i64) {
        let create = WatchCreateRequest {
            key: Bytes::from_static(&[0]),
            range_end: Bytes::from_static(&[0]),
            start_revision: revision,
            ..WatchCreateRequest::default()
        };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        self.wire.requests.push_back(request.encode_to_vec().into());
    }
}

/// The connection between the client and the member.
#[derive(Default)]
struct Wire {
    requests: VecDeque<Bytes>,
    sent: Vec<WatchResponse>,
}

impl StreamIo for Wire {
    fn receive(&mut self) -> Option<Bytes> {
        self.requests.pop_front()
    }

    fn is_half_closed(&self) -> bool {
        false
    }

    fn can_send(&self) -> bool {
        true
    }

    fn send(&mut self, message: Bytes) {
        self.sent.push(WatchResponse::decode(message).expect("a response"));
    }

    fn waker(&self) -> &Waker {
        Waker::noop()
    }
}
