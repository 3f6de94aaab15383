//! A state machine, its hub, and clients that talk to it one step at a time.

use std::{collections::VecDeque, sync::Arc, task::Waker, time::Duration};

use bytes::Bytes;
use metastore::{
    api::{header::Header, watch::Watching},
    call::{Conversation, Line, Step},
    mvcc::{
        Reader,
        compact::{Compaction, Progress},
    },
    node::status::Status,
    proto::{
        etcdserverpb::{
            CompactionRequest, DeleteRangeRequest, Member, PutRequest, RequestOp, TxnRequest, WatchCancelRequest,
            WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, request_op,
            watch_request::RequestUnion,
        },
        mvccpb::{Event, KeyValue},
    },
    state::{Command, Entry, Kind, Machine, Members},
    storage::memory::Memory,
    watch::{Gauges, Hub, HubCore, Publisher, Settings, Subscriber},
};
use prost::Message;

pub const CLUSTER: u64 = 0xc1;
pub const MEMBER: u64 = 0xee;
/// The limit of etcd's defaults.
pub const FRAGMENT_BYTES: usize = 2 << 20;
const VALUE_CACHE_BYTES: u64 = 1 << 20;

pub struct World {
    pub engine: Arc<Memory>,
    pub machine: Machine,
    pub publisher: Publisher,
    pub hub: Arc<Hub>,
    pub core: HubCore,
    pub gauges: Gauges,
    pub now: Duration,
    pub reader: Reader,
    index: u64,
}

impl World {
    pub fn new() -> Self {
        Self::with(Settings::default())
    }

    pub fn with(settings: Settings) -> Self {
        let (engine, machine) = new_machine();
        let reader = machine.readers().keys;
        let gauges = Gauges::detached();
        let (publisher, hub, core) = Hub::assemble(reader.clone(), settings, gauges.clone());
        Self { engine, machine, publisher, hub, core, gauges, now: Duration::ZERO, reader, index: 1 }
    }

    pub fn put(&mut self, key: &str, value: &str) -> i64 {
        self.apply(Kind::Put, &put(key, value))
    }

    pub fn delete(&mut self, key: &str) -> i64 {
        self.apply(Kind::DeleteRange, &delete(key, ""))
    }

    pub fn delete_range(&mut self, key: &str, end: &str) -> i64 {
        self.apply(Kind::DeleteRange, &delete(key, end))
    }

    /// One transaction of puts, and of deletions of those without a value.
    pub fn txn(&mut self, changes: &[(&str, Option<&str>)]) -> i64 {
        let ops = changes.iter().map(|(key, value)| match value {
            Some(value) => request_op::Request::RequestPut(put(key, value)),
            None => request_op::Request::RequestDeleteRange(delete(key, "")),
        });
        let success = ops.map(|op| RequestOp { request: Some(op) }).collect();
        self.apply(Kind::Txn, &TxnRequest { success, ..TxnRequest::default() })
    }

    pub fn compact(&mut self, revision: i64) {
        self.apply(Kind::Compact, &CompactionRequest { revision, physical: false });
    }

    /// Removes what was compacted.
    pub fn forget(&self) {
        while let Some(mut compaction) = Compaction::pending(self.machine.shared()) {
            assert_ne!(compaction.step(64).unwrap(), Progress::Blocked, "nobody reads for longer than a step");
        }
    }

    /// Applies one entry as the apply thread does; returns the revision.
    pub fn apply(&mut self, kind: Kind, request: &impl Message) -> i64 {
        self.stage(kind, request);
        self.publish();
        self.reader.head()
    }

    /// Applies an entry to the running batch.
    pub fn stage(&mut self, kind: Kind, request: &impl Message) {
        self.index += 1;
        let data = Command::encode(self.index, kind, &request.encode_to_vec());
        let applied = self.machine.apply(&Entry { index: self.index, term: 1, data, changes_members: false }).unwrap();
        applied.outcome.expect("tests ask for nothing that is refused");
    }

    /// Publishes the running batch.
    pub fn publish(&mut self) {
        let published = self.machine.commit().unwrap();
        self.publisher.append(published.events, published.head);
        self.machine.publish_head();
        self.publisher.wake();
    }

    pub fn settle(&mut self) -> Option<Duration> {
        self.hub.settle(&mut self.core, self.now).unwrap()
    }

    pub fn client(&self) -> Client {
        Client::new(self.hub.open_with_period(Duration::from_secs(10)))
    }

    /// Lets everything happen that can; returns what the client hears.
    pub fn hear(&mut self, client: &mut Client) -> Vec<WatchResponse> {
        let mut silence = 0;
        while silence < 3 && client.line.room > client.line.sent.len() {
            self.settle();
            let before = client.line.sent.len();
            client.step();
            silence = if client.line.sent.len() == before { silence + 1 } else { 0 };
        }
        self.settle();
        std::mem::take(&mut client.line.sent)
    }

    /// The same, written down.
    pub fn told(&mut self, client: &mut Client) -> Vec<String> {
        self.hear(client).iter().map(text).collect()
    }

    /// Makes a watch; returns what the client hears.
    pub fn watch(&mut self, client: &mut Client, create: WatchCreateRequest) -> Vec<String> {
        client.create(create);
        self.told(client)
    }

    /// Streams, watches, lagging watches, pending events.
    pub fn counts(&self) -> [i64; 4] {
        let Gauges { streams, watches, lagging, pending, .. } = &self.gauges;
        [streams, watches, lagging, pending].map(prometheus::IntGauge::get)
    }
}

pub fn new_machine() -> (Arc<Memory>, Machine) {
    let engine = Arc::new(Memory::default());
    let members = Members::new([Member { id: MEMBER, ..Member::default() }]);
    Machine::bootstrap(engine.as_ref(), CLUSTER, &members, (1, 1)).unwrap();
    let machine = Machine::open(engine.clone(), VALUE_CACHE_BYTES).unwrap();
    (engine, machine)
}

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: owned(key), value: owned(value), ..PutRequest::default() }
}

pub fn delete(key: &str, end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: owned(key), range_end: owned(end), ..DeleteRangeRequest::default() }
}

pub fn owned(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// A watch of one key, from now on.
pub fn on(key: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: owned(key), ..WatchCreateRequest::default() }
}

/// A watch of everything from one key up to another.
pub fn between(key: &str, end: &str) -> WatchCreateRequest {
    WatchCreateRequest { range_end: owned(end), ..on(key) }
}

/// The same, from a revision on.
pub fn from(revision: i64, create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { start_revision: revision, ..create }
}

/// A client's end of a stream.
pub struct Client {
    pub conversation: Watching,
    pub line: Wire,
}

/// What lies between the two ends.
pub struct Wire {
    pub requests: VecDeque<Bytes>,
    pub sent: Vec<WatchResponse>,
    /// How many messages may lie in `sent`.
    pub room: usize,
    pub ended: bool,
    pub bytes: usize,
    pub waker: Waker,
}

impl Client {
    pub fn new(subscriber: Subscriber) -> Self {
        Self::with_gate(subscriber, FRAGMENT_BYTES, Box::new(|_, _| Ok(())))
    }

    pub fn with_gate(subscriber: Subscriber, fragment_bytes: usize, gate: metastore::api::watch::Gate) -> Self {
        let header = Header::new(CLUSTER, MEMBER, Arc::new(Status::default()));
        let conversation = Watching::new(subscriber, header, gate, fragment_bytes);
        let line = Wire {
            requests: VecDeque::new(),
            sent: Vec::new(),
            room: usize::MAX,
            ended: false,
            bytes: 0,
            waker: Waker::noop().clone(),
        };
        Self { conversation, line }
    }

    pub fn step(&mut self) {
        assert_eq!(self.conversation.step(&mut self.line), Step::Wait);
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

impl Line for Wire {
    fn receive(&mut self) -> Option<Bytes> {
        self.requests.pop_front()
    }

    fn ended(&self) -> bool {
        self.ended
    }

    fn has_room(&self) -> bool {
        self.sent.len() < self.room
    }

    fn send(&mut self, message: Bytes) {
        assert!(self.has_room(), "who sends has asked first");
        self.bytes += message.len();
        let response = WatchResponse::decode(message.clone()).unwrap();
        assert_eq!(response.encode_to_vec(), message, "what is assembled is what protobuf would have written");
        self.sent.push(response);
    }

    fn waker(&self) -> &Waker {
        &self.waker
    }
}

/// A response in one line.
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

/// `3+key=value` for a put at revision 3, `3*key=value` if it created the key, `4-key` for a deletion at revision 4; behind
/// each, where it was asked for, `<value@revision` of what was there before.
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
