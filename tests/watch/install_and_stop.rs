//! Watches when a snapshot is installed or the hub stops.

use http2::call::{Conversation, Step};
use metastore::state::Machine;

use crate::world::{World, from, on};

/// FAULT-26.
#[test]
fn watches_survive_a_snapshot_without_missing_events() {
    let mut world = World::new();
    world.put("a", "1");
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.watch(&mut client, from(9, on("a")));
    // A later state of the same history, as in a snapshot from another member.
    let mut other = World::new();
    for value in 1..=5 {
        other.put("a", &value.to_string());
    }
    world.machine = Machine::open(other.engine.clone(), 1 << 20).unwrap();
    world.reader = world.machine.readers().keys;
    world.publisher.restore(world.reader.clone());
    assert_eq!(world.receive_text(&mut client), ["0: 3+a=2 4+a=3 5+a=4 6+a=5 @6"]);
}

#[test]
fn a_watch_below_the_compact_revision_of_a_snapshot_is_cancelled() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    let mut other = World::new();
    for value in 1..=5 {
        other.put("a", &value.to_string());
    }
    other.compact(4);
    world.machine = Machine::open(other.engine.clone(), 1 << 20).unwrap();
    world.reader = world.machine.readers().keys;
    world.publisher.restore(world.reader.clone());
    assert_eq!(world.receive_text(&mut client), ["compacted 0 at 4 @0"]);
}

#[test]
fn a_stopped_hub_ends_its_streams() {
    let world = World::new();
    let (_publisher, hub) = metastore::watch::Hub::start(world.reader.clone(), metastore::watch::Settings::default());
    let mut client = crate::client::Client::new(hub.open());
    hub.stop();
    let Step::End(Err(refusal)) = client.conversation.step(&mut client.line) else {
        panic!("the stream should have ended")
    };
    assert_eq!(refusal.code, http2::call::Code::Unavailable);
    assert_eq!(refusal.message, "etcdserver: server stopped");
}
