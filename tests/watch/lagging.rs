//! Lagging watches: they lose no event, receive none twice, and cost a bounded amount of memory.

use metastore::{
    proto::etcdserverpb::{WatchCreateRequest, WatchResponse},
    watch::Settings,
};

use crate::{
    client::Client,
    world::{World, between, from, on},
};

fn revisions(received: &[WatchResponse]) -> Vec<i64> {
    let events = received.iter().flat_map(|response| &response.events);
    events.map(|event| event.kv.as_ref().unwrap().mod_revision).collect()
}

/// Limits small enough for everything to overflow.
fn small_limits() -> Settings {
    Settings { ring_bytes: 2000, pending_bytes: 300, ..Settings::default() }
}

/// WATCH-7.
#[test]
fn more_than_a_thousand_revisions_come_in_several_responses() {
    for ring_bytes in [0, 8 << 20] {
        let mut world = World::with(Settings { ring_bytes, ..Settings::default() });
        for revision in 2..=2501 {
            world.txn(&[("a", Some(&revision.to_string())), ("b", Some(""))]);
        }
        let mut client = world.client();
        client.create(from(2, between("a", "z")));
        let received = world.receive(&mut client);
        let counts: Vec<usize> = received.iter().map(|response| response.events.len()).collect();
        assert_eq!(counts, [0, 2000, 2000, 1000]);
        assert!(received[1..].iter().all(|response| response.header.as_ref().unwrap().revision == 2501));
        let expected: Vec<i64> = (2..=2501).flat_map(|revision| [revision, revision]).collect();
        assert_eq!(revisions(&received), expected);
        assert_eq!(world.counts(), [1, 1, 0, 0]);
    }
}

#[test]
fn a_replayed_response_is_bounded_in_bytes_too() {
    let mut world = World::with(Settings { ring_bytes: 0, ..Settings::default() });
    let value = "v".repeat(100 << 10);
    for _ in 2..=31 {
        world.put("a", &value);
    }
    let mut client = world.client();
    client.create(from(2, on("a")));
    let received = world.receive(&mut client);
    assert_eq!(revisions(&received), (2..=31).collect::<Vec<_>>());
    assert!(received.iter().all(|response| response.events.len() <= 11), "about 1 MiB");
    assert_eq!(received.len(), 4);
}

/// FAULT-29 and FAULT-31.
#[test]
fn a_stalled_stream_costs_bounded_memory_and_then_receives_everything_once() {
    for ring_bytes in [0, 2000, 8 << 20] {
        let mut world = World::with(Settings { ring_bytes, ..small_limits() });
        let (mut slow, mut quick) = (world.client(), world.client());
        world.watch(&mut slow, on("a"));
        world.watch(&mut quick, on("a"));
        slow.line.capacity = 0;
        for round in 0..50 {
            for _ in 0..10 {
                world.put("a", "a value of some size");
            }
            slow.step();
            let expected: Vec<i64> = (round * 10 + 2..round * 10 + 12).collect();
            assert_eq!(revisions(&world.receive(&mut quick)), expected, "a stream that is read is not affected");
            let [_, _, lagging, pending] = world.counts();
            // The events that its task has taken and cannot send, one replayed response, and a few after it.
            assert!(lagging == 1 || round < 3);
            assert!(pending <= 40, "{pending} events are pending for a stream that is not read");
        }
        slow.line.capacity = usize::MAX;
        assert_eq!(revisions(&world.receive(&mut slow)), (2..=501).collect::<Vec<_>>());
        assert_eq!(world.counts(), [2, 2, 0, 0]);
        world.put("a", "live");
        assert_eq!(world.receive_text(&mut slow), ["0: 502+a=live @502"]);
    }
}

#[test]
fn a_stream_read_one_message_at_a_time_receives_everything_once_in_order() {
    let mut world = World::with(small_limits());
    let mut client = world.client();
    world.watch(&mut client, between("a", "z"));
    client.line.capacity = 1;
    let mut received = Vec::new();
    for revision in 2..=200 {
        world.txn(&[("a", Some("12345678901234567890")), ("b", Some(&revision.to_string()))]);
        if revision % 7 == 0 {
            received.extend(world.receive(&mut client));
        }
    }
    client.line.capacity = usize::MAX;
    received.extend(world.receive(&mut client));
    assert_eq!(revisions(&received), (2..=200).flat_map(|revision| [revision, revision]).collect::<Vec<_>>());
    for response in &received {
        let header = response.header.as_ref().unwrap().revision;
        assert!(header >= revisions(std::slice::from_ref(response)).pop().unwrap());
    }
}

/// WATCH-1.
#[test]
fn a_watch_from_below_the_compact_revision_is_created_and_then_cancelled() {
    let mut world = World::new();
    for value in 0..10 {
        world.put("a", &value.to_string());
    }
    world.compact(5);
    let mut client = world.client();
    assert_eq!(world.watch(&mut client, from(4, on("a"))), ["created 0 @11", "compacted 0 at 5 @0"]);
    assert_eq!(world.counts(), [1, 0, 0, 0]);
    client.cancel(0);
    client.progress();
    assert!(world.receive_text(&mut client).is_empty(), "the watch is gone already");
    let texts = world.watch(&mut client, from(5, on("a")));
    assert_eq!(texts, ["created 1 @11", "1: 5+a=3 6+a=4 7+a=5 8+a=6 9+a=7 10+a=8 11+a=9 @11"]);
}

/// WATCH-8 and FAULT-6.
#[test]
fn a_deletion_at_the_compact_revision_is_still_received() {
    for ring_bytes in [0, 8 << 20] {
        let mut world = World::with(Settings { ring_bytes, ..Settings::default() });
        world.put("a", "1");
        world.put("b", "1");
        world.delete("a");
        world.compact(4);
        world.finish_compaction();
        let mut client = world.client();
        assert_eq!(world.watch(&mut client, from(4, between("a", "z"))), ["created 0 @4", "0: 4-a @4"]);
    }
}

/// FAULT-28.
#[test]
fn a_stalled_watch_overtaken_by_compaction_receives_pending_events_and_is_cancelled() {
    let mut world = World::with(small_limits());
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    client.line.capacity = 0;
    for _ in 0..100 {
        world.put("a", "a value of some size");
        world.settle();
    }
    world.compact(90);
    world.finish_compaction();
    client.line.capacity = usize::MAX;
    let received = world.receive(&mut client);
    let (last, events) = received.split_last().unwrap();
    let seen = revisions(events);
    assert_eq!(seen, (2..).take(seen.len()).collect::<Vec<_>>());
    assert!(!seen.is_empty() && seen.len() < 80);
    assert_eq!(crate::client::text(last), "compacted 0 at 90 @0");
    assert_eq!(world.counts(), [1, 0, 0, 0]);
}

#[test]
fn compaction_does_not_affect_synced_and_future_watches() {
    let mut world = World::new();
    world.put("a", "1");
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.watch(&mut client, from(4, on("a")));
    world.put("a", "2");
    world.put("x", "2");
    world.put("x", "3");
    world.compact(5);
    world.finish_compaction();
    world.put("a", "3");
    let mut texts = world.receive_text(&mut client);
    texts.sort();
    assert_eq!(texts, ["0: 3+a=2 @3", "0: 6+a=3 @6", "1: 6+a=3 @6"]);
}

#[test]
fn a_hub_that_was_idle_for_longer_than_the_ring_reads_the_history() {
    let mut world = World::with(small_limits());
    let mut client = world.client();
    world.watch(&mut client, WatchCreateRequest { prev_kv: true, ..on("a") });
    for value in 0..3 {
        world.put("a", &value.to_string());
        world.put("x", &"x".repeat(3000));
    }
    assert_eq!(world.receive_text(&mut client), ["0: 2*a=0 @2", "0: 4+a=1<0@2 @4", "0: 6+a=2<1@4 @6"]);
}

#[test]
fn a_hub_that_was_idle_during_a_compaction_cancels_watches_that_missed_events() {
    let mut world = World::with(Settings { ring_bytes: 0, ..Settings::default() });
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.watch(&mut client, from(6, on("a")));
    for value in 2..=4 {
        world.put("a", &value.to_string());
    }
    world.compact(4);
    world.put("b", "");
    world.put("a", "6");
    assert_eq!(world.receive_text(&mut client), ["compacted 0 at 4 @0", "1: 6+a=6 @6"]);
}

#[test]
fn a_cancel_works_in_every_state() {
    let mut world = World::with(small_limits());
    let mut client = world.client();
    for _ in 0..3 {
        world.watch(&mut client, on("a"));
    }
    client.line.capacity = 0;
    for _ in 0..100 {
        world.put("a", "a value of some size");
        world.settle();
    }
    assert_eq!(world.counts()[2], 3, "all watches are lagging");
    for id in 0..3 {
        client.cancel(id);
    }
    client.step();
    world.settle();
    assert_eq!(world.counts()[1..3], [0, 0]);
    client.line.capacity = usize::MAX;
    let texts = world.receive_text(&mut client);
    assert_eq!(texts[texts.len() - 3..], ["canceled 0 @101", "canceled 1 @101", "canceled 2 @101"]);
    // During a replay.
    client.create(from(2, on("a")));
    client.cancel(3);
    client.create(from(100, on("a")));
    assert_eq!(
        world.receive_text(&mut client),
        [
            "created 3 @101",
            "canceled 3 @101",
            "created 4 @101",
            "4: 100+a=a value of some size 101+a=a value of some size @101"
        ]
    );
    assert_eq!(world.counts(), [1, 1, 0, 0]);
}

/// WATCH-20.
#[test]
fn a_dropped_stream_frees_everything_at_once() {
    let mut world = World::with(small_limits());
    let mut clients: Vec<Client> = (0..10).map(|_| world.client()).collect();
    for client in &mut clients {
        for nth in 0..100 {
            client.create(if nth % 2 == 0 { between("a", "z") } else { from(1, on("a")) });
        }
        assert_eq!(world.receive(client).len(), 100);
        client.line.capacity = 0;
    }
    for _ in 0..20 {
        world.put("a", "a value of some size");
        world.settle();
    }
    let [streams, watches, lagging, pending] = world.counts();
    assert_eq!((streams, watches), (10, 1000));
    assert!(lagging > 0 && pending > 0);
    drop(clients);
    assert_eq!(world.counts()[3], 0, "pending events are freed with the task of the stream");
    world.settle();
    assert_eq!(world.counts(), [0, 0, 0, 0]);
}

#[test]
fn requests_of_a_client_that_does_not_read_are_left_unread() {
    let mut world = World::new();
    let mut client = world.client();
    client.line.capacity = 0;
    for _ in 0..10_000 {
        client.create(on("a"));
    }
    for _ in 0..100 {
        client.step();
        world.settle();
    }
    assert!(client.line.requests.len() > 9_800, "{} requests are left", client.line.requests.len());
    client.line.capacity = usize::MAX;
    assert_eq!(world.receive(&mut client).len(), 10_000);
}

#[test]
fn ten_thousand_watches_of_one_stream_all_receive_an_event() {
    let mut world = World::new();
    let mut client = world.client();
    for _ in 0..10_000 {
        client.create(on("a"));
    }
    assert_eq!(world.receive(&mut client).len(), 10_000);
    for revision in 2..5 {
        world.put("a", "1");
        let received = world.receive(&mut client);
        assert_eq!(received.len(), 10_000);
        assert!(received.iter().all(|response| response.header.as_ref().unwrap().revision == revision));
    }
    assert_eq!(world.counts(), [1, 10_000, 0, 0]);
}
