//! The cost that one client can cause: whatever its watches are, whatever it requests, and however slowly it reads, the hub's
//! work and memory stay proportional to its requests.

use std::time::{Duration, Instant};

use http2::call::Conversation;
use metastore::{
    proto::{
        etcdserverpb::{
            DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchResponse, request_op,
        },
        mvccpb::{Event, event::EventType},
    },
    state::Kind,
    watch::Settings,
};
use tikv_jemalloc_ctl::thread;

use crate::{
    client::{Client, event_text},
    world::{World, between, from, on, owned},
};

/// Bytes that this thread has ever allocated, whether freed or not.
fn allocated() -> u64 {
    thread::allocatedp::read().unwrap().get()
}

/// Bytes that this thread has allocated and not freed. (A `World` runs on one thread.)
fn live() -> i64 {
    let freed = thread::deallocatedp::read().unwrap().get();
    allocated().cast_signed() - freed.cast_signed()
}

fn mebibytes(bytes: i64) -> i64 {
    bytes >> 20
}

/// The shortest of several runs, because other tests use the same processors.
fn shortest(times: usize, mut run: impl FnMut()) -> Duration {
    let took = (0..times).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    took.min().expect("`times` is at least one")
}

pub fn key(nth: usize) -> String {
    format!("key/{nth:07}")
}

/// Spreads consecutive numbers over all 64 bits (the finalizer of splitmix64).
fn scatter(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// An order of insertion that degenerates to a list in a search tree whose nodes take these consecutive numbers, scattered, as
/// weights.
pub fn hostile_order(count: usize) -> Vec<usize> {
    let mut by_weight: Vec<usize> = (0..count).collect();
    by_weight.sort_unstable_by_key(|&nth| scatter(nth as u64 + 1));
    let mut order = vec![0; count];
    for (rank, nth) in by_weight.into_iter().enumerate() {
        order[nth] = rank;
    }
    order
}

/// The time to create watches in this order and to remove them.
fn create_and_remove(order: &[usize]) -> Duration {
    let mut world = World::new();
    let mut client = world.client();
    let start = Instant::now();
    for &nth in order {
        client.create(between(&key(nth), &key(nth + 1)));
    }
    assert_eq!(world.receive(&mut client).len(), order.len());
    drop(client);
    world.settle();
    assert_eq!(world.counts(), [0, 0, 0, 0]);
    start.elapsed()
}

#[test]
fn watches_created_in_a_hostile_order_cost_no_more_than_others() {
    const COUNT: usize = 20_000;
    let ascending: Vec<usize> = (0..COUNT).collect();
    let hostile = hostile_order(COUNT);
    let usual = shortest(2, || _ = create_and_remove(&ascending));
    let chosen = shortest(2, || _ = create_and_remove(&hostile));
    println!("{COUNT} ranges created and removed: in ascending order {usual:?}, in a hostile order {chosen:?}");
    assert!(chosen < usual * 5, "{chosen:?} instead of {usual:?}");
}

#[test]
fn the_cost_of_a_progress_request_does_not_depend_on_the_number_of_watches() {
    let cost = |watches: usize| {
        let mut world = World::new();
        let mut client = world.client();
        (0..watches).for_each(|nth| client.create(on(&key(nth))));
        assert_eq!(world.receive(&mut client).len(), watches);
        shortest(20, || {
            for _ in 0..50 {
                client.progress();
            }
            assert_eq!(world.receive(&mut client).len(), 50);
        }) / 50
    };
    let (few, many) = (cost(100), cost(100_000));
    println!("a progress request: {few:?} with 100 watches, {many:?} with 100,000");
    assert!(many < few * 10, "{many:?} instead of {few:?}");
}

/// Puts `count` keys, in transactions.
fn fill(world: &mut World, count: usize) {
    for first in (0..count).step_by(1000) {
        let puts = (first..count.min(first + 1000)).map(|nth| {
            let put = PutRequest { key: owned(&key(nth)), value: owned("value"), ..PutRequest::default() };
            RequestOp { request: Some(request_op::Request::RequestPut(put)) }
        });
        world.apply(Kind::Txn, &TxnRequest { success: puts.collect(), ..TxnRequest::default() });
    }
}

fn deletions(received: &[WatchResponse], watch: i64) -> usize {
    let of_watch = received.iter().filter(|response| response.watch_id == watch);
    let events = of_watch.flat_map(|response| &response.events);
    events.inspect(|event| assert_eq!(event.r#type(), EventType::Delete)).count()
}

/// Measures a deletion of many keys that many watches overlap.
fn overlap(keys: usize, streams: usize, watches: usize, is_read: bool) {
    let mut world = World::new();
    fill(&mut world, keys);
    let mut clients: Vec<Client> = (0..streams).map(|_| world.client()).collect();
    for (nth, client) in clients.iter_mut().enumerate() {
        for watch in 0..watches {
            // All ranges are different.
            client.create(between(&key(nth * watches + watch), &key(keys - watch)));
        }
        assert_eq!(world.receive(client).len(), watches);
    }
    world.settle();
    world.delete_range(&key(0), &key(keys));
    let (before, live_before) = (allocated(), live());
    let start = Instant::now();
    world.settle();
    let (took, kept, used) = (start.elapsed(), live() - live_before, (allocated() - before).cast_signed());
    println!(
        "{keys} deletions, {streams} × {watches} watches: {took:?}, {} MiB allocated, {} MiB kept",
        mebibytes(used),
        mebibytes(kept)
    );
    let of_keys = i64::try_from(keys).unwrap() * 1000;
    let of_watches = i64::try_from(streams * watches).unwrap() * 2000;
    assert!(used < of_keys + of_watches + (4 << 20), "{} MiB were allocated", mebibytes(used));
    for (nth, client) in clients.iter_mut().enumerate().filter(|_| is_read) {
        let received = world.receive(client);
        for watch in [0, watches - 1] {
            let id = i64::try_from(watch).unwrap();
            assert_eq!(deletions(&received, id), keys - watch - (nth * watches + watch), "stream {nth}, watch {watch}");
        }
    }
    drop(clients);
    world.settle();
    assert!(live() - live_before < of_keys, "{} MiB are left", mebibytes(live() - live_before));
}

#[test]
fn the_cost_of_a_large_revision_does_not_multiply_with_the_watches() {
    overlap(10_000, 1, 400, true);
    overlap(10_000, 400, 1, true);
}

/// The events of some responses as text.
fn event_texts(received: &[WatchResponse]) -> Vec<String> {
    received.iter().flat_map(|response| &response.events).map(event_text).collect()
}

#[test]
fn each_watch_receives_its_part_of_a_large_revision_in_order() {
    for ring_bytes in [0, 8 << 20] {
        for puts_first in [false, true] {
            let mut world = World::with(Settings { ring_bytes, ..Settings::default() });
            fill(&mut world, 300);
            let delete = DeleteRangeRequest { key: owned(&key(50)), range_end: owned(&key(250)), ..Default::default() };
            let delete = [request_op::Request::RequestDeleteRange(delete)];
            let puts = [10, 20, 260, 5].map(|nth| {
                let (key, value) = (owned(&key(nth)), owned("new"));
                request_op::Request::RequestPut(PutRequest { key, value, ..PutRequest::default() })
            });
            // The events of the deletion alone are in key order; with these puts before it, those of the revision are not.
            let changes: Vec<_> = if puts_first { puts.into_iter().chain(delete).collect() } else { delete.into() };
            let success = changes.into_iter().map(|change| RequestOp { request: Some(change) }).collect();
            let revision = world.reader.head() + 1;
            let creates: Vec<WatchCreateRequest> =
                [(0, 300), (5, 6), (60, 61), (100, 110), (0, 60), (55, 245), (200, 290)]
                    .into_iter()
                    .flat_map(|(start, end)| {
                        let create = between(&key(start), &key(end));
                        let options = [(vec![], false), (vec![], true), (vec![0], false), (vec![1], true)];
                        options.map(|(filters, prev_kv)| WatchCreateRequest { filters, prev_kv, ..create.clone() })
                    })
                    .chain([on(&key(100)), on(&key(20))])
                    .collect();
            let mut live: Vec<Client> = creates.iter().map(|_| world.client()).collect();
            for (client, create) in live.iter_mut().zip(&creates) {
                world.watch(client, create.clone());
            }
            world.apply(Kind::Txn, &TxnRequest { success, ..TxnRequest::default() });
            let all = world.receive(&mut live[1]);
            let all: Vec<_> = all.into_iter().flat_map(|response| response.events).collect();
            assert_eq!(all.len(), if puts_first { 204 } else { 200 });
            for (nth, (create, client)) in creates.into_iter().zip(&mut live).enumerate().filter(|(nth, _)| *nth != 1) {
                let is_wanted = |event: &&Event| {
                    let (key, end) = (&event.kv.as_ref().unwrap().key, &create.range_end);
                    let inside = if end.is_empty() { *key == create.key } else { create.key <= key && key < end };
                    inside && !create.filters.contains(&event.r#type)
                };
                let wanted = all.iter().filter(is_wanted).cloned();
                let wanted = wanted.map(|event| Event { prev_kv: event.prev_kv.filter(|_| create.prev_kv), ..event });
                let expected: Vec<String> = wanted.map(|event| event_text(&event)).collect();
                assert_eq!(event_texts(&world.receive(client)), expected, "live watch {nth}, {create:?}");
                let mut late = world.client();
                late.create(from(revision, create.clone()));
                assert_eq!(event_texts(&world.receive(&mut late)), expected, "late watch {nth}, {create:?}");
            }
        }
    }
}

#[test]
#[ignore = "long"]
fn a_million_deletions_and_a_thousand_watches() {
    overlap(1_000_000, 10, 100, false);
}

/// Writes a history of `count` values of 10 KiB.
fn write_history(world: &mut World, count: usize) {
    let value = "v".repeat(10 << 10);
    for _ in 0..count {
        world.put("a", &value);
    }
}

fn revisions(received: &[WatchResponse]) -> usize {
    received.iter().map(|response| response.events.len()).sum()
}

#[test]
fn unread_streams_share_the_pending_limit_and_then_receive_everything() {
    const STREAMS: usize = 100;
    const HISTORY: usize = 300;
    let all_pending_bytes = 4 << 20;
    let mut world = World::with(Settings { all_pending_bytes, ring_bytes: 1 << 20, ..Settings::default() });
    write_history(&mut world, HISTORY);
    let mut clients: Vec<Client> = (0..STREAMS).map(|_| world.client()).collect();
    let before = live();
    for client in &mut clients {
        client.create(from(2, on("a")));
        client.line.capacity = 1; // For the created response.
        client.step();
        world.settle(); // In separate passes: events replayed to two streams in one pass are allocated once.
    }
    for _ in 0..10 {
        world.settle();
        clients.iter_mut().for_each(Client::step);
    }
    let (pending, kept) = (world.hub.pending_bytes(), live() - before);
    println!("{STREAMS} streams that replay 3 MiB each: {} KiB pending, {} KiB allocated", pending >> 10, kept >> 10);
    // Beyond the limit each stream may hold one response, of at most a fair share and one revision.
    let share = all_pending_bytes / STREAMS + (16 << 10);
    assert!(pending < all_pending_bytes + STREAMS * share, "{pending} bytes are pending");
    let allowed = i64::try_from(2 * (all_pending_bytes + STREAMS * share)).unwrap();
    assert!(kept < allowed, "{} MiB are allocated", mebibytes(kept));
    // A stream that is read is served although the others have used up the limit.
    let mut quick = world.client();
    quick.create(from(2, on("a")));
    assert_eq!(revisions(&world.receive(&mut quick)), HISTORY);
    world.put("a", "live");
    assert_eq!(revisions(&world.receive(&mut quick)), 1);
    for client in &mut clients {
        client.line.capacity = usize::MAX;
        assert_eq!(revisions(&world.receive(client)), HISTORY + 1);
    }
    assert_eq!(world.hub.pending_bytes(), 0);
    assert_eq!(world.counts()[1..], [101, 0, 0]);
}

#[test]
fn a_watch_is_counted_from_its_request_to_its_end() {
    let mut world = World::new();
    let mut client = world.client();
    let held = |client: &Client| client.conversation.held_bytes();
    assert_eq!(held(&client), 0);
    client.create(on("12345678"));
    client.create(between("a", "b"));
    client.step();
    let each = 400;
    assert_eq!(held(&client), 2 * each + 8 + 2);
    assert_eq!(world.receive(&mut client).len(), 2);
    assert_eq!(held(&client), 2 * each + 8 + 2, "received events are not held");
    world.put("12345678", &"v".repeat(1000));
    world.settle();
    assert!((1000..1300).contains(&(held(&client) - 2 * each - 10)), "{}", held(&client));
    client.line.capacity = 0;
    client.step();
    assert!(held(&client) > 1000, "events that cannot be sent are held");
    client.line.capacity = usize::MAX;
    client.create(WatchCreateRequest { watch_id: 1, ..on("c") });
    assert!(world.receive_text(&mut client)[1].starts_with("refused -1: mvcc: duplicate"));
    assert_eq!(held(&client), 2 * each + 10, "a refused watch holds nothing");
    client.cancel(0);
    world.receive_text(&mut client);
    assert_eq!(held(&client), each + 2);
    // A watch that a compaction ends.
    for _ in 0..5 {
        world.put("a", "");
    }
    world.compact(5);
    client.create(from(2, on("a")));
    assert!(world.receive_text(&mut client).last().unwrap().starts_with("compacted"));
    assert_eq!(held(&client), each + 2);
}

#[test]
fn watches_are_refused_without_memory_to_spare_and_with_keys_that_are_too_long() {
    let mut world = World::new();
    let mut client = world.client();
    client.line.spare = 1000;
    (0..3).for_each(|_| client.create(on("key")));
    let answers = world.receive_text(&mut client);
    assert_eq!(answers[..2], ["created 0 @1", "created 1 @1"]);
    assert!(answers[2].starts_with("refused -1: etcdserver: the watches of this connection take too much memory"));
    client.line.spare = usize::MAX;
    let (long, longest) = ("k".repeat((16 << 10) + 1), "k".repeat(16 << 10));
    let too_large = ["refused -1: etcdserver: request is too large @1"];
    assert_eq!(world.watch(&mut client, on(&long)), too_large);
    assert_eq!(world.watch(&mut client, between("a", &long)), too_large);
    assert_eq!(world.watch(&mut client, between("a", &longest)), ["created 2 @1"]);
    assert_eq!(world.watch(&mut client, on(&longest)), ["created 3 @1"]);
}

#[test]
fn the_cost_per_event_does_not_grow_with_the_waiting_watches_of_a_stream() {
    const WATCHES: usize = 20_000;
    // Small enough for each event to fill the outbox.
    let mut world = World::with(Settings { pending_bytes: 1, all_pending_bytes: 1, ..Settings::default() });
    let mut client = world.client();
    (0..WATCHES).for_each(|_| client.create(on("a")));
    assert_eq!(world.receive(&mut client).len(), WATCHES);
    world.put("a", &"v".repeat(1000));
    world.settle();
    let start = Instant::now();
    client.line.capacity = 2000;
    let first = world.receive(&mut client).len();
    println!("{first} of {WATCHES} waiting watches received the event: {:?}", start.elapsed());
    assert_eq!(first, 2000);
    client.line.capacity = usize::MAX;
    assert_eq!(world.receive(&mut client).len(), WATCHES - first);
    assert_eq!(world.counts(), [1, i64::try_from(WATCHES).unwrap(), 0, 0]);
}

#[test]
fn other_streams_receive_events_while_the_watches_of_a_closed_stream_are_removed() {
    let mut world = World::new();
    let (mut closed, mut other) = (world.client(), world.client());
    (0..10_000).for_each(|nth| closed.create(between(&key(nth), &key(nth + 1))));
    assert_eq!(world.receive(&mut closed).len(), 10_000);
    world.watch(&mut other, on("a"));
    drop(closed);
    let mut inputs = Vec::new();
    world.hub.drain_inputs(&mut inputs);
    world.core.step(world.now, &mut inputs).unwrap();
    let left = world.counts()[1];
    assert!((5_000..9_500).contains(&left), "one step removes a part of them: {left} are left");
    world.put("a", "1");
    let turn = world.core.step(world.now, &mut Vec::new()).unwrap();
    assert!(turn.busy && world.counts()[3] == 1, "the event is pending for its stream");
    assert_eq!(world.receive_text(&mut other), ["0: 2*a=1 @2"]);
    assert_eq!(world.counts(), [1, 1, 0, 0]);
}
