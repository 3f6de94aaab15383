//! A client that watches everything, at one member after the other, and must hear each change once and in order.

use std::{collections::VecDeque, sync::Arc, task::Waker};

use bytes::Bytes;
use metastore::{
    api::{header::Header, watch::Watching},
    call::{Conversation, Line, Step},
    node::status::Status,
    proto::{
        etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion},
        mvccpb::{Event, KeyValue, event::EventType},
    },
};
use prost::Message;

use super::{
    member::{CLUSTER, Member},
    model::Model,
};

/// Larger than anything that is sent.
const FRAGMENT_BYTES: usize = 2 << 20;

/// The client.
pub struct Watcher {
    stream: Option<Stream>,
    /// The next revision that it has not heard of.
    pub next: i64,
}

struct Stream {
    member: u64,
    conversation: Watching,
    wire: Wire,
}

impl Watcher {
    pub fn new() -> Self {
        Self { stream: None, next: 2 }
    }

    /// The member that it listens to.
    pub fn member(&self) -> Option<u64> {
        self.stream.as_ref().map(|stream| stream.member)
    }

    /// Goes to a member and asks for what it has not heard.
    pub fn go_to(&mut self, id: u64, member: &Member) {
        let header = Header::new(CLUSTER, id, Arc::new(Status::default()));
        let subscriber = member.hub.open_with_period(std::time::Duration::from_secs(10));
        let conversation = Watching::new(subscriber, header, Box::new(|_, _| Ok(())), FRAGMENT_BYTES);
        let mut stream = Stream { member: id, conversation, wire: Wire::default() };
        stream.watch_from(self.next);
        self.stream = Some(stream);
    }

    /// Its member is gone.
    pub fn lose(&mut self) {
        self.stream = None;
    }

    /// Hears what there is; returns how many events that were.
    pub fn listen(&mut self, model: &Model) -> usize {
        let Some(stream) = &mut self.stream else { return 0 };
        assert_eq!(stream.conversation.step(&mut stream.wire), Step::Wait);
        let mut heard = 0;
        for response in std::mem::take(&mut stream.wire.sent) {
            if response.canceled {
                let compacted = response.compact_revision;
                assert!(compacted > self.next, "cancelled at {compacted}, but {} is next: {response:?}", self.next);
                self.next = compacted;
                stream.watch_from(compacted);
            }
            let revision = response.header.as_ref().expect("every response has a header").revision;
            for events in response.events.chunk_by(|a, b| revision_of(a) == revision_of(b)) {
                heard += events.len();
                assert_eq!(revision_of(&events[0]), self.next, "the next revision to be heard of");
                assert!(revision >= self.next, "the header says {revision}");
                let mut changes: Vec<_> = events.iter().map(change).collect();
                changes.sort_by(|a, b| a.0.cmp(&b.0));
                assert_eq!(changes, model.changes_at(self.next), "what happened at revision {}", self.next);
                self.next += 1;
            }
        }
        heard
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

/// What lies between the client and the member.
#[derive(Default)]
struct Wire {
    requests: VecDeque<Bytes>,
    sent: Vec<WatchResponse>,
}

impl Line for Wire {
    fn receive(&mut self) -> Option<Bytes> {
        self.requests.pop_front()
    }

    fn ended(&self) -> bool {
        false
    }

    fn has_room(&self) -> bool {
        true
    }

    fn send(&mut self, message: Bytes) {
        self.sent.push(WatchResponse::decode(message).expect("a response"));
    }

    fn waker(&self) -> &Waker {
        Waker::noop()
    }
}
