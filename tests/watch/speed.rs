//! The cost of delivering an event. Printed for `bench/RESULTS.md`, and compared with the cost of encoding its message, which is
//! measured in the same process: that holds on any machine and in any build.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http2::call::{Conversation, StreamIo};
use metastore::{
    frontend::grpc::{header::Header, watch::WatchConversation},
    proto::{
        etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion},
        mvccpb::{Event, KeyValue, event::EventType},
    },
    service::watch::WatchStream,
    watch::Settings,
};
use prost::Message;

use crate::{
    client::{CLUSTER, FRAGMENT_BYTES, MEMBER},
    world::{World, between, on},
};

const WATCHERS: usize = 1000;
const BATCH: usize = 200;
const VALUE_BYTES: usize = 256;

/// Records that a task was woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Accepts all messages and counts them.
struct Sink {
    request: Option<Bytes>,
    messages: usize,
    woken: Arc<Woken>,
    waker: Waker,
}

impl StreamIo for Sink {
    fn receive(&mut self) -> Option<Bytes> {
        self.request.take()
    }

    fn is_half_closed(&self) -> bool {
        false
    }

    fn can_send(&self) -> bool {
        true
    }

    fn send(&mut self, _message: Bytes) {
        self.messages += 1;
    }

    fn waker(&self) -> &Waker {
        &self.waker
    }
}

fn client(world: &World, create: WatchCreateRequest) -> (WatchConversation, Sink) {
    let header = Header::new(CLUSTER, MEMBER, std::sync::Arc::default());
    let watching =
        WatchConversation::new(WatchStream::new(world.hub.open(), Box::new(|_, _| Ok(()))), header, FRAGMENT_BYTES);
    let woken = Arc::new(Woken(AtomicBool::new(true)));
    let waker = Waker::from(woken.clone());
    let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    (watching, Sink { request: Some(request.encode_to_vec().into()), messages: 0, woken, waker })
}

/// Nanoseconds that encoding a message with one event takes.
fn encoding() -> usize {
    const MESSAGES: usize = 100_000;
    let value = "v".repeat(VALUE_BYTES);
    let start = Instant::now();
    for nth in 0..MESSAGES {
        let key = format!("key/{:04}", nth % WATCHERS);
        let kv = KeyValue { key: key.into(), value: value.clone().into(), mod_revision: 1, ..KeyValue::default() };
        let event = Event { r#type: EventType::Put as i32, kv: Some(kv), prev_kv: None };
        let response = WatchResponse { watch_id: 1, events: vec![event], ..WatchResponse::default() };
        std::hint::black_box(response.encode_to_vec());
    }
    start.elapsed().as_nanos() as usize / MESSAGES
}

/// Prints the nanoseconds per delivered event, in the hub and in the streams' tasks: at most `bound` times those of encoding it.
fn measure(name: &str, watches: impl Fn(usize) -> WatchCreateRequest, events: usize, receivers: usize, bound: usize) {
    let mut world = World::with(Settings { ring_bytes: 64 << 20, ..Settings::default() });
    let mut clients: Vec<_> = (0..WATCHERS).map(|nth| client(&world, watches(nth))).collect();
    let mut step = |world: &mut World| {
        for (watching, sink) in &mut clients {
            if sink.woken.0.swap(false, Ordering::Relaxed) {
                watching.step(sink);
            }
        }
        world.settle();
        clients.iter().map(|(_, sink)| sink.messages).sum::<usize>()
    };
    step(&mut world);
    assert_eq!(step(&mut world), WATCHERS);
    let value = "v".repeat(VALUE_BYTES);
    let (mut hub, mut tasks, mut received) = (Duration::ZERO, Duration::ZERO, 0);
    for batch in 0..events / BATCH {
        for nth in 0..BATCH {
            world.put(&format!("key/{:04}", (batch * BATCH + nth) * 7919 % WATCHERS), &value);
        }
        let start = Instant::now();
        world.settle();
        hub += start.elapsed();
        let start = Instant::now();
        received = step(&mut world);
        tasks += start.elapsed();
    }
    assert_eq!(received, WATCHERS + events * receivers);
    let each = |time: Duration| time.as_nanos() as usize / (events * receivers);
    let (encoding, whole) = (encoding(), each(hub + tasks));
    println!(
        "{name}: hub {} ns, stream's task {} ns an event delivered; encoding it takes {encoding} ns",
        each(hub),
        each(tasks)
    );
    assert!(whole < bound * encoding, "{name}: {whole} ns are more than {bound} times {encoding} ns");
}

#[test]
#[ignore = "long"]
fn delivering_an_event_to_one_of_a_thousand_watchers_is_cheap() {
    measure("exact keys", |nth| on(&format!("key/{nth:04}")), 100_000, 1, 40);
    measure("one range each", |nth| between(&format!("key/{nth:04}"), &format!("key/{nth:04}0")), 100_000, 1, 40);
    measure("one shared prefix", |_| between("key/", "key0"), 2_000, WATCHERS, 10);
    let with_previous = |nth| WatchCreateRequest { prev_kv: true, ..on(&format!("key/{nth:04}")) };
    measure("exact keys, with previous", with_previous, 100_000, 1, 60);
}
