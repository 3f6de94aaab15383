//! Progress notifications: which watches receive them, and when.

use std::time::Duration;

use metastore::{proto::etcdserverpb::WatchCreateRequest, watch::Settings};

use crate::world::{World, between, from, on};

fn with_notifications(create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { progress_notify: true, ..create }
}

#[test]
fn a_progress_request_of_a_synced_stream_is_answered() {
    let mut world = World::new();
    let mut client = world.client();
    client.progress();
    assert!(world.receive_text(&mut client).is_empty(), "a stream without watches has no progress");
    world.watch(&mut client, on("a"));
    world.watch(&mut client, on("b"));
    client.progress();
    assert_eq!(world.receive_text(&mut client), ["progress -1 @1"]);
    world.put("a", "1");
    world.put("x", "1");
    client.progress();
    client.progress();
    assert_eq!(world.receive_text(&mut client), ["0: 2*a=1 @2", "progress -1 @3", "progress -1 @3"]);
}

/// WATCH-5.
#[test]
fn a_future_watch_suppresses_the_progress_of_its_whole_stream() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    assert_eq!(world.watch(&mut client, from(2, on("b"))), ["created 1 @1"]);
    client.progress();
    assert!(world.receive_text(&mut client).is_empty());
    world.put("x", "");
    assert!(world.receive_text(&mut client).is_empty(), "an unanswered progress request is not remembered");
    client.progress();
    assert_eq!(world.receive_text(&mut client), ["progress -1 @2"]);
}

/// WATCH-5 and FAULT-25.
#[test]
fn a_lagging_watch_suppresses_the_progress_of_its_whole_stream() {
    let mut world = World::with(Settings { pending_bytes: 0, ring_bytes: 0, ..Settings::default() });
    world.put("a", "1");
    let mut client = world.client();
    client.create(from(1, on("a")));
    client.create(from(1, on("a")));
    client.create(from(1, on("a")));
    client.progress();
    // One step handles all four requests; the history is read only after it.
    assert_eq!(
        world.receive_text(&mut client),
        ["created 0 @2", "created 1 @2", "created 2 @2", "0: 2*a=1 @2", "1: 2*a=1 @2", "2: 2*a=1 @2"]
    );
    client.progress();
    assert_eq!(world.receive_text(&mut client), ["progress -1 @2"]);
}

/// WATCH-4, WATCH-5 and FAULT-25.
#[test]
fn progress_never_overtakes_events_that_cannot_be_sent_yet() {
    let mut world = World::with(Settings { pending_bytes: 0, ..Settings::default() });
    let mut client = world.client();
    world.watch(&mut client, with_notifications(on("a")));
    client.line.capacity = 0;
    for value in 0..100 {
        world.put("a", &"x".repeat(value));
    }
    client.progress();
    world.now += Duration::from_secs(20);
    assert!(world.receive_text(&mut client).is_empty());
    client.step();
    world.settle();
    client.line.capacity = usize::MAX;
    let received = world.receive(&mut client);
    let revisions: Vec<i64> = received
        .iter()
        .flat_map(|response| &response.events)
        .map(|event| event.kv.as_ref().unwrap().mod_revision)
        .collect();
    assert_eq!(revisions, (2..=101).collect::<Vec<_>>());
    assert!(
        received.iter().all(|response| !response.events.is_empty()),
        "no watch was synced when progress was requested"
    );
    client.progress();
    assert_eq!(world.receive_text(&mut client), ["progress -1 @101"]);
}

#[test]
fn watches_with_progress_notify_are_notified_periodically() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.watch(&mut client, with_notifications(on("a")));
    world.watch(&mut client, with_notifications(on("b")));
    world.watch(&mut client, with_notifications(from(3, on("b"))));
    assert_eq!(world.settle(), Some(Duration::from_secs(10)));
    world.now = Duration::from_secs(10);
    assert_eq!(world.receive_text(&mut client), ["progress 1 @1", "progress 2 @1"], "watch 3 is a future watch");
    assert!(world.receive_text(&mut client).is_empty());
    world.put("a", "1");
    world.put("x", "1");
    let mut texts = world.receive_text(&mut client);
    texts.sort();
    assert_eq!(texts, ["0: 2*a=1 @2", "1: 2*a=1 @2"]);
    world.now = Duration::from_secs(20);
    assert_eq!(world.receive_text(&mut client), ["progress 2 @3", "progress 3 @3"], "watch 1 has received an event");
    world.now = Duration::from_secs(30);
    assert_eq!(world.receive_text(&mut client), ["progress 1 @3", "progress 2 @3", "progress 3 @3"]);
    assert_eq!(world.settle(), Some(Duration::from_secs(40)));
    for id in 1..=3 {
        client.cancel(id);
    }
    world.receive_text(&mut client);
    world.now = Duration::from_secs(40);
    assert!(world.receive_text(&mut client).is_empty());
    assert_eq!(world.settle(), None, "no timer is needed any more");
}

/// FAULT-25: a watch that has nothing to receive is still notified.
#[test]
fn filtered_events_do_not_suppress_notifications() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, WatchCreateRequest { filters: vec![0], ..with_notifications(between("a", "b")) });
    world.put("a", "1");
    world.now = Duration::from_secs(10);
    assert_eq!(world.receive_text(&mut client), ["progress 0 @2"]);
}

#[test]
fn periods_start_when_the_stream_is_opened() {
    let mut world = World::new();
    let mut client = world.client();
    world.settle();
    world.now = Duration::from_secs(7);
    world.watch(&mut client, with_notifications(on("a")));
    assert_eq!(world.settle(), Some(Duration::from_secs(10)));
    world.now = Duration::from_secs(34);
    assert_eq!(world.receive_text(&mut client), ["progress 0 @1"]);
    assert_eq!(world.settle(), Some(Duration::from_secs(40)));
}
