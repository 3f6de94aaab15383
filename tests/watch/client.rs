//! A watch client that is stepped by hand, and a textual form of the responses that it receives.

#![allow(dead_code, reason = "each test target uses a part of it")]

use std::{collections::VecDeque, sync::Arc, task::Waker};

use bytes::Bytes;
use http2::call::{Conversation, Step, StreamIo};
use metastore::{
    frontend::grpc::{header::Header, watch::WatchConversation},
    node::status::Status,
    proto::{
        etcdserverpb::{
            WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
            watch_request::RequestUnion,
        },
        mvccpb::{Event, KeyValue},
    },
    service::watch::{WatchPermission, WatchStream},
    watch::Subscriber,
};
use prost::Message;

pub const CLUSTER: u64 = 0xc1;
pub const MEMBER: u64 = 0xee;
/// The limit with etcd's defaults.
pub const FRAGMENT_BYTES: usize = 2 << 20;

/// A client's end of a stream.
pub struct Client {
    pub conversation: WatchConversation,
    pub line: TestConnection,
}

/// The connection between client and conversation.
pub struct TestConnection {
    pub requests: VecDeque<Bytes>,
    pub sent: Vec<WatchResponse>,
    /// How many messages `sent` may hold.
    pub capacity: usize,
    /// How many more bytes may be held for the client.
    pub spare: usize,
    pub ended: bool,
    pub bytes: usize,
    pub waker: Waker,
}

impl Client {
    pub fn new(subscriber: Subscriber) -> Self {
        Self::with_permission(subscriber, FRAGMENT_BYTES, Box::new(|_, _| Ok(())))
    }

    pub fn with_permission(subscriber: Subscriber, fragment_bytes: usize, permission: WatchPermission) -> Self {
        let header = Header::new(CLUSTER, MEMBER, Arc::new(Status::default()));
        let conversation = WatchConversation::new(WatchStream::new(subscriber, permission), header, fragment_bytes);
        let line = TestConnection {
            requests: VecDeque::new(),
            sent: Vec::new(),
            capacity: usize::MAX,
            spare: usize::MAX,
            ended: false,
            bytes: 0,
            waker: Waker::noop().clone(),
        };
        Self { conversation, line }
    }

    pub fn step(&mut self) {
        assert_eq!(self.conversation.step(&mut self.line), Step::Wait);
    }

    /// Steps the conversation and, through `settle`, the hub until nothing more happens; returns what the client receives.
    pub fn receive(&mut self, mut settle: impl FnMut()) -> Vec<WatchResponse> {
        let mut idle_steps = 0;
        while idle_steps < 3 && self.line.capacity > self.line.sent.len() {
            settle();
            let before = self.line.sent.len();
            self.step();
            idle_steps = if self.line.sent.len() == before { idle_steps + 1 } else { 0 };
        }
        settle();
        std::mem::take(&mut self.line.sent)
    }

    pub fn ask(&mut self, request: RequestUnion) {
        let request = WatchRequest { request_union: Some(request) };
        self.line.requests.push_back(request.encode_to_vec().into());
    }

    pub fn create(&mut self, create: WatchCreateRequest) {
        self.ask(RequestUnion::CreateRequest(create));
    }

    pub fn cancel(&mut self, watch_id: i64) {
        self.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
    }

    pub fn progress(&mut self) {
        self.ask(RequestUnion::ProgressRequest(WatchProgressRequest {}));
    }
}

impl StreamIo for TestConnection {
    fn receive(&mut self) -> Option<Bytes> {
        self.requests.pop_front()
    }

    fn is_half_closed(&self) -> bool {
        self.ended
    }

    fn can_send(&self) -> bool {
        self.sent.len() < self.capacity
    }

    fn send(&mut self, message: Bytes) {
        assert!(self.can_send(), "the conversation must check `can_send` before it sends");
        self.bytes += message.len();
        let response = WatchResponse::decode(message.clone()).unwrap();
        assert_eq!(response.encode_to_vec(), message, "the assembled bytes are the canonical protobuf encoding");
        self.sent.push(response);
    }

    fn spare_bytes(&self) -> usize {
        self.spare
    }

    fn waker(&self) -> &Waker {
        &self.waker
    }
}

/// A response as one line of text.
pub fn text(response: &WatchResponse) -> String {
    let header = response.header.as_ref().expect("every response has a header");
    assert_eq!((header.cluster_id, header.member_id), (CLUSTER, MEMBER));
    let WatchResponse { watch_id, created, canceled, compact_revision, cancel_reason, fragment, .. } = response;
    let kind = match (created, canceled) {
        (true, true) => format!("refused {watch_id}: {cancel_reason}"),
        (true, false) => format!("created {watch_id}"),
        (false, true) if *compact_revision != 0 => format!("compacted {watch_id} at {compact_revision}"),
        (false, true) => format!("canceled {watch_id}"),
        (false, false) if response.events.is_empty() => format!("progress {watch_id}"),
        (false, false) => format!("{watch_id}: {}", events_text(&response.events)),
    };
    assert!(*canceled && *created || cancel_reason.is_empty());
    assert!(*canceled && !*created || *compact_revision == 0);
    let more = if *fragment { " …" } else { "" };
    format!("{kind}{more} @{}", header.revision)
}

fn events_text(events: &[Event]) -> String {
    let events: Vec<String> = events.iter().map(event_text).collect();
    events.join(" ")
}

/// `3+key=value` for a put at revision 3, `3*key=value` if it created the key, `4-key` for a deletion at revision 4, each
/// followed by `<value@revision` if the event has a previous value.
pub fn event_text(event: &Event) -> String {
    let kv = event.kv.as_ref().expect("every event has a key");
    let string = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let KeyValue { mod_revision, create_revision, version, .. } = kv;
    let change = match event.r#type {
        0 if create_revision == mod_revision => {
            assert_eq!(*version, 1);
            format!("{mod_revision}*{}={}", string(&kv.key), string(&kv.value))
        }
        0 => format!("{mod_revision}+{}={}", string(&kv.key), string(&kv.value)),
        _ => {
            let bare = KeyValue { key: kv.key.clone(), mod_revision: *mod_revision, ..KeyValue::default() };
            assert_eq!(*kv, bare, "a deletion names its key and revision, and nothing else");
            format!("{mod_revision}-{}", string(&kv.key))
        }
    };
    let previous = event.prev_kv.as_ref().map(|kv| format!("<{}@{}", string(&kv.value), kv.mod_revision));
    change + &previous.unwrap_or_default()
}
