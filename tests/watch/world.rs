//! A state machine and its watch hub, for clients that are stepped by hand.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use metastore::{
    mvcc::{
        Reader,
        compact::{Compaction, CompactionProgress},
    },
    proto::etcdserverpb::{
        CompactionRequest, DeleteRangeRequest, Member, PutRequest, RequestOp, TxnRequest, WatchCreateRequest,
        WatchResponse, request_op,
    },
    state::{Command, Entry, Kind, Machine, Members},
    storage::memory::Memory,
    watch::{Gauges, Hub, HubCore, Publisher, Settings},
};
use prost::Message;

use crate::client::{CLUSTER, Client, MEMBER, text};

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

    /// One transaction with a put of each key with a value and a deletion of each key without one.
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

    /// Runs the pending compaction to its end.
    pub fn finish_compaction(&self) {
        let Some(mut compaction) = Compaction::pending(self.machine.shared()) else { return };
        let mut progress = CompactionProgress::More;
        while progress == CompactionProgress::More {
            progress = compaction.step(64).unwrap();
        }
        assert_eq!(progress, CompactionProgress::Done, "no reader blocks the compaction");
    }

    /// Applies one entry as the apply thread does; returns the revision.
    pub fn apply(&mut self, kind: Kind, request: &impl Message) -> i64 {
        self.stage(kind, request);
        self.publish();
        self.reader.head()
    }

    /// Applies an entry to the current batch.
    pub fn stage(&mut self, kind: Kind, request: &impl Message) {
        self.index += 1;
        let data = Command::encode(self.index, kind, &request.encode_to_vec());
        let applied = self.machine.apply(&Entry { index: self.index, term: 1, data, changes_members: false }).unwrap();
        applied.outcome.expect("tests ask for nothing that is refused");
    }

    /// Commits and publishes the current batch.
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

    /// Steps the client and the hub until nothing more happens; returns what the client receives.
    pub fn receive(&mut self, client: &mut Client) -> Vec<WatchResponse> {
        client.receive(|| _ = self.settle())
    }

    /// Like `receive`, with the responses as text.
    pub fn receive_text(&mut self, client: &mut Client) -> Vec<String> {
        self.receive(client).iter().map(text).collect()
    }

    /// Creates a watch; returns what the client receives.
    pub fn watch(&mut self, client: &mut Client, create: WatchCreateRequest) -> Vec<String> {
        client.create(create);
        self.receive_text(client)
    }

    /// The numbers of streams, watches, lagging watches and pending events.
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

/// A watch of one key, starting at the next revision.
pub fn on(key: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: owned(key), ..WatchCreateRequest::default() }
}

/// A watch of the keys from `key` up to, but not including, `end`.
pub fn between(key: &str, end: &str) -> WatchCreateRequest {
    WatchCreateRequest { range_end: owned(end), ..on(key) }
}

/// `create` with a start revision.
pub fn from(revision: i64, create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { start_revision: revision, ..create }
}
