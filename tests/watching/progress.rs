//! Who is told that nothing happened, and when.

use std::time::Duration;

use metastore::{proto::etcdserverpb::WatchCreateRequest, watch::Settings};

use crate::world::{World, between, from, on};

fn notified(create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { progress_notify: true, ..create }
}

#[test]
fn a_stream_that_is_synced_is_told_how_far_things_are() {
    let mut world = World::new();
    let mut client = world.client();
    client.progress();
    assert!(world.told(&mut client).is_empty(), "without a watch there is nothing to tell");
    world.watch(&mut client, on("a"));
    world.watch(&mut client, on("b"));
    client.progress();
    assert_eq!(world.told(&mut client), ["progress -1 @1"]);
    world.put("a", "1");
    world.put("x", "1");
    client.progress();
    client.progress();
    assert_eq!(world.told(&mut client), ["0: 2*a=1 @2", "progress -1 @3", "progress -1 @3"]);
}

#[test]
fn a_watch_of_the_future_keeps_its_whole_stream_from_being_told() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    assert_eq!(world.watch(&mut client, from(2, on("b"))), ["created 1 @1"]);
    client.progress();
    assert!(world.told(&mut client).is_empty());
    world.put("x", "");
    assert!(world.told(&mut client).is_empty(), "a request that was not granted is not remembered");
    client.progress();
    assert_eq!(world.told(&mut client), ["progress -1 @2"]);
}

#[test]
fn a_watch_that_catches_up_keeps_its_whole_stream_from_being_told() {
    let mut world = World::with(Settings { pending_bytes: 0, ring_bytes: 0, ..Settings::default() });
    world.put("a", "1");
    let mut client = world.client();
    client.create(from(1, on("a")));
    client.create(from(1, on("a")));
    client.create(from(1, on("a")));
    client.progress();
    // One step handles all four requests; the history is only read behind it.
    assert_eq!(
        world.told(&mut client),
        ["created 0 @2", "created 1 @2", "created 2 @2", "0: 2*a=1 @2", "1: 2*a=1 @2", "2: 2*a=1 @2"]
    );
    client.progress();
    assert_eq!(world.told(&mut client), ["progress -1 @2"]);
}

#[test]
fn progress_never_overtakes_events_that_have_no_room() {
    let mut world = World::with(Settings { pending_bytes: 0, ..Settings::default() });
    let mut client = world.client();
    world.watch(&mut client, notified(on("a")));
    client.line.room = 0;
    for value in 0..100 {
        world.put("a", &"x".repeat(value));
    }
    client.progress();
    world.now += Duration::from_secs(20);
    assert!(world.told(&mut client).is_empty());
    client.step();
    world.settle();
    client.line.room = usize::MAX;
    let heard = world.hear(&mut client);
    let revisions: Vec<i64> = heard
        .iter()
        .flat_map(|response| &response.events)
        .map(|event| event.kv.as_ref().unwrap().mod_revision)
        .collect();
    assert_eq!(revisions, (2..=101).collect::<Vec<_>>());
    assert!(heard.iter().all(|response| !response.events.is_empty()), "nobody was synced when progress was asked for");
    client.progress();
    assert_eq!(world.told(&mut client), ["progress -1 @101"]);
}

#[test]
fn those_who_asked_for_it_are_told_now_and_then() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.watch(&mut client, notified(on("a")));
    world.watch(&mut client, notified(on("b")));
    world.watch(&mut client, notified(from(3, on("b"))));
    assert_eq!(world.settle(), Some(Duration::from_secs(10)));
    world.now = Duration::from_secs(10);
    assert_eq!(world.told(&mut client), ["progress 1 @1", "progress 2 @1"], "watch 3 is of the future");
    assert!(world.told(&mut client).is_empty());
    world.put("a", "1");
    world.put("x", "1");
    let mut told = world.told(&mut client);
    told.sort();
    assert_eq!(told, ["0: 2*a=1 @2", "1: 2*a=1 @2"]);
    world.now = Duration::from_secs(20);
    assert_eq!(world.told(&mut client), ["progress 2 @3", "progress 3 @3"], "watch 1 has heard something");
    world.now = Duration::from_secs(30);
    assert_eq!(world.told(&mut client), ["progress 1 @3", "progress 2 @3", "progress 3 @3"]);
    assert_eq!(world.settle(), Some(Duration::from_secs(40)));
    for id in 1..=3 {
        client.cancel(id);
    }
    world.told(&mut client);
    world.now = Duration::from_secs(40);
    assert!(world.told(&mut client).is_empty());
    assert_eq!(world.settle(), None, "nobody waits for the time any more");
}

#[test]
fn what_was_filtered_away_was_not_heard() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, WatchCreateRequest { filters: vec![0], ..notified(between("a", "b")) });
    world.put("a", "1");
    world.now = Duration::from_secs(10);
    assert_eq!(world.told(&mut client), ["progress 0 @2"]);
}

#[test]
fn ticks_are_counted_from_when_the_stream_was_opened() {
    let mut world = World::new();
    let mut client = world.client();
    world.settle();
    world.now = Duration::from_secs(7);
    world.watch(&mut client, notified(on("a")));
    assert_eq!(world.settle(), Some(Duration::from_secs(10)));
    world.now = Duration::from_secs(34);
    assert_eq!(world.told(&mut client), ["progress 0 @1"]);
    assert_eq!(world.settle(), Some(Duration::from_secs(40)));
}
